"""Stable targets: Bayes over the batch, no bias by quadrature, what training is given, what they do not go with."""
import itertools
import math

import pytest
import torch
from torch.testing import assert_close

import batches
import ddpm
import kind_points
import run
import settings
import train
from datasets2d import GaussianMixture
from recipes import FAST, MUON, RECIPES, fast
from stable_targets import given_batch

WORDS = "--data clusters --width 8 --epochs 2 --batch-size 500 --device cpu".split()


@pytest.mark.parametrize("schedule", ["cosine", "flow", "ve"])
def test_bayes_over_the_batch(schedule):
    """The posterior of each point by torch's densities, at both ends of t; z stays as it is."""
    g, schedule = torch.Generator().manual_seed(0), ddpm.SCHEDULES[schedule]
    x, eps = (torch.randn(9, 3, generator=g, dtype=torch.float64) for _ in range(2))
    t = torch.tensor([1e-6, 1e-3, 0.01, 0.1, 0.3, 0.5, 0.9, 0.999, 1 - 1e-6], dtype=torch.float64)
    mean, noise = given_batch(x, t, eps, schedule)
    for i in range(9):
        alpha, sigma = schedule.alpha(t[i]), schedule.sigma(t[i])
        z = alpha * x[i] + sigma * eps[i]
        log = torch.stack([torch.distributions.Normal(alpha * of, sigma).log_prob(z).sum() for of in x])
        p = (log - log.logsumexp(0)).exp()
        assert_close(mean[i], sum(p[j] * x[j] for j in range(9)), rtol=1e-7, atol=1e-12)
        assert_close(alpha * mean[i] + sigma * noise[i], z, rtol=1e-12, atol=1e-12)
    assert_close(mean[:2], x[:2], rtol=0, atol=0)
    assert_close(noise[:2], eps[:2], rtol=0, atol=0)


@pytest.mark.parametrize("t", [1e-3, 0.1, 0.9, 0.999])
def test_single_precision_is_enough(t):
    """Points as near to each other as the noise is large."""
    g, schedule, time = torch.Generator().manual_seed(2), ddpm.SCHEDULES["cosine"], torch.full((50,), t)
    x = 1 + 2 * min(1, t) * torch.randn(50, 2, generator=g)
    eps = torch.randn(50, 2, generator=g)
    exact = given_batch(*(c.double() for c in (x, time, eps)), schedule)
    for single, double in zip(given_batch(x, time, eps, schedule), exact):
        assert_close(single.double(), double, rtol=0, atol=1e-3)
    assert (exact[0] - x).abs().max() > 1e-3                                       # points of the batch are mixed


def test_of_all_there_is_it_is_the_best_denoiser():
    """Data of 40 narrow Gaussians whose centres are the batch."""
    g, schedule = torch.Generator().manual_seed(1), ddpm.SCHEDULES["cosine"]
    x, eps = (torch.randn(40, 2, generator=g, dtype=torch.float64) for _ in range(2))
    t = torch.linspace(0.05, 0.999, 40, dtype=torch.float64)
    data = GaussianMixture(x, torch.full((2,), 1e-6, dtype=torch.float64))
    z = ddpm.q_sample(x, t, eps, schedule)
    for target, found in zip(("x", "eps"), given_batch(x, t, eps, schedule)):
        assert_close(found, data.optimal_model(target, schedule)(z, t), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("t", [0.3, 0.5, 0.95])
def test_no_bias(t):
    """Three atoms of unequal weight, every batch of two, eps by quadrature: E[(x - mean) f(z)] = 0 for any f."""
    schedule, time = ddpm.SCHEDULES["cosine"], torch.tensor(t, dtype=torch.float64)
    atoms, weights = [-1.0, 0.4, 2.0], [0.5, 0.3, 0.2]
    line = torch.linspace(-9, 9, 3001, dtype=torch.float64)
    density = torch.exp(-0.5 * line**2) / math.sqrt(2 * math.pi) * (line[1] - line[0])
    bias, size = torch.zeros(3, dtype=torch.float64), 0.0
    for i, j in itertools.product(range(3), repeat=2):
        x = torch.tensor([[atoms[i]], [atoms[j]]], dtype=torch.float64)
        means = torch.vmap(lambda eps: given_batch(x, time.expand(2), torch.stack([eps, eps])[:, None],    # noqa: B023
                                                   schedule)[0][0, 0])(line)
        z = schedule.alpha(time) * atoms[i] + schedule.sigma(time) * line
        error = weights[i] * weights[j] * density * (atoms[i] - means)
        bias += torch.stack([(error * f).sum() for f in (torch.ones_like(z), z, z.sin())])
        size += error.abs().sum().item()
    assert bias.abs().max() < 1e-9 < 1e-2 < size


def epochs(*words):
    """What an epoch of x and v on the clusters is given, with and without stable targets."""
    configs = [settings.configs(train.parse([*WORDS, *words, "--target", target]))[0] for target in ("x", "v")]
    data = [kind_points.load(config, "train")[:1700] for config in configs]
    return [batches.epoch(data, 3, [config | {"stable_targets": stable} for config in configs], [None, None] if
                          "adaptive" in words else None) for stable in (False, True)]


@pytest.mark.parametrize("words", ["", "--t-density logsnr", "--t-density adaptive", "--schedule flow"])
def test_training_is_given_the_same_z_and_the_means_of_each_batch(words):
    """All draws and weights are those of a run without; y is a linear function of the means of its own batch."""
    (_, z, t, y, w), (_, z_of, t_of, y_of, w_of) = epochs(*words.split())
    schedule = ddpm.SCHEDULES["flow" if "flow" in words else "cosine"]
    assert z.shape == (3, 1000, 2) and torch.equal(t, t_of) and torch.equal(w, w_of)
    assert_close(z, z_of, rtol=1e-5, atol=1e-5)
    assert (y - y_of).abs().max() > 0.1
    for step, member in itertools.product(range(3), range(2)):
        rows = slice(500 * member, 500 * member + 500)
        times, noisy = t[step, rows].double(), z[step, rows].double()
        alpha, sigma = (c(times)[:, None] for c in (schedule.alpha, schedule.sigma))
        x = y[step, :500].double()                                             # the target x is x
        mean, eps = given_batch(x, times, (noisy - alpha * x) / sigma, schedule)
        expected = mean if member == 0 else alpha * eps - sigma * mean
        assert_close(y_of[step, rows].double(), expected, rtol=0, atol=2e-3)


def test_the_gradient_has_less_variance_and_the_tests_are_the_same(tmp_path):
    """Two epochs on the clusters: norms of the gradient and losses in training fall, those of tests stay comparable."""
    for name, words in {"with": ["--stable-targets"], "without": []}.items():
        train.main([*WORDS, "--target", "x", "--out", str(tmp_path / name), *words])
    one, other = (run.open(tmp_path / name / "clusters-x-mse-s0") for name in ("with", "without"))
    assert one.config["stable_targets"] and not other.config["stable_targets"]
    last, plain = one.history[-1], other.history[-1]
    assert last["train_loss"] < plain["train_loss"] - 0.1 and last["optimum"] == plain["optimum"]
    assert last["test_loss"] == pytest.approx(plain["test_loss"], rel=0.05) and last["test_loss"] > last["optimum"]


@pytest.mark.parametrize("words", ["--labels", "--timesteps 10", "--schedule learned", "--loss sliced --target s"])
def test_what_it_is_not_for(words, capsys):
    with pytest.raises(SystemExit) as error:
        train.parse(["--stable-targets", *words.split()])
    assert error.value.code == 2
    assert "--stable-targets is for networks of continuous time without labels" in capsys.readouterr().err
    assert not train.parse(words.split()).stable_targets


def test_the_fast_recipe_has_it_where_it_can_and_what_a_recipe_says_counts():
    assert fast(["--t-density", "logsnr"]) == [*FAST, "--t-density", "logsnr"]
    assert FAST == [*MUON, "--stable-targets", "--t-density", "loss_aware"]
    for words in ["--labels"], ["--timesteps", "10"], ["--schedule", "learned"], ["--sigma", "0.1"]:
        assert fast(words) == [*MUON, *words]


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_has_stable_targets_where_the_command_line_takes_them(recipe, capsys):
    def refused(words):
        try:
            train.parse(["--loss", RECIPES[recipe][1][0], *words])
        except SystemExit:
            pass
        return "--stable-targets is" in capsys.readouterr().err
    words = fast(RECIPES[recipe][0])
    assert not refused(words) and ("--stable-targets" in words or refused([*words, "--stable-targets"]))
