"""Runs of points on a discrete chain through all scripts: train, resume, test columns, samples, likelihoods, mistakes.

The chain is typed a second time here: the posterior by Bayes' rule, the KL by torch.distributions, in float64.
"""
import copy
import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.distributions import Normal, kl_divergence
from torch.testing import assert_close

import checkpoints
import kind_points
import likelihood
import losses
import optimum
import plots
import run
import sample
import settings
import stack
import tables
import train
import train_points
from datasets2d import DATASETS
from ddpm import SCHEDULES

FAST = "--data clusters --width 8 --epochs 2 --batch-size 500 --device cpu".split()
CACHED = optimum.optimal_predictions, optimum.optimal_errors, optimum.optimal_bound, kind_points.floors


@pytest.fixture(scope="module", autouse=True)
def few():
    """2,500 points to train and to test on in place of 50,000."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kind_points, "POINTS", 2500)
        for function in CACHED:
            function.cache_clear()
        yield
    for function in CACHED:
        function.cache_clear()


def posterior(schedule, s, t, z, x):
    """Mean and variance of q(z_s | z_t, x) by Bayes' rule: q(z_t | z_s) times q(z_s | x), both Gaussians in z_s."""
    alpha_s, sigma_s, alpha_t, sigma_t = schedule.alpha(s), schedule.sigma(s), schedule.alpha(t), schedule.sigma(t)
    ratio = alpha_t / alpha_s
    beta = sigma_t**2 - ratio**2 * sigma_s**2
    var = 1 / (1 / sigma_s**2 + ratio**2 / beta)
    mean = var * (alpha_s * x / torch.where(sigma_s > 0, sigma_s, 1)**2 + ratio * z / beta)
    return torch.where(sigma_s > 0, mean, x), var, beta


def steps_of(config, t):
    """s and t (B, 1) of the steps of a chain that start at times t, in float64."""
    length, t_0 = (1 - 2 * config["t_min"]) / config["timesteps"], config["t_min"]
    i = ((t.double() - t_0) / length).round()[:, None]
    return t_0 + length * (i - 1), t_0 + length * i


def by_hand(config, predict, x, t, eps):
    """The loss, the squared error of the posterior mean and the term of the bound, means over dimensions: (B,) each."""
    schedule, T = SCHEDULES[config["schedule"]], config["timesteps"]
    s, t = steps_of(config, t)
    x, eps, alpha, sigma = x.double(), eps.double(), schedule.alpha(t), schedule.sigma(t)
    z = alpha * x + sigma * eps
    mean, q, beta = posterior(schedule, s, t, z, x)
    y_hat, out = predict(z, t[:, 0]).split([2, 2 * (config["variance"] in ("direct", "log", "range"))], 1)
    y, x_hat = {"x": (x, y_hat), "eps": (eps, (z - sigma * y_hat) / alpha),
                "v": (alpha * eps - sigma * x, alpha * z - sigma * y_hat), "mu": (mean, None),
                "mu_skip": (mean - z, None)}[config["target"]]
    mean_hat = y_hat + (z if config["target"] == "mu_skip" else 0) if x_hat is None else posterior(
        schedule, s, t, z, x_hat)[0]
    last = q == 0                                          # the step to x itself
    second = posterior(schedule, t, 2 * t - s, z, x)[1]
    small = torch.where(last, second, q)
    var = {"small": lambda: small, "large": lambda: beta, "direct": lambda: (1 + out).clamp(min=1e-9),
           "log": lambda: out.exp(), "range": lambda: beta**((1 + out) / 2) * small**((1 - out) / 2),
           "best": lambda: q + (beta - q) / sigma**2 * DATASETS[config["data"]].covariance(
               z, alpha[:, 0], sigma[:, 0])}[config["variance"]]()
    inside = Normal(mean_hat.detach() if config["loss"] == "hybrid" else mean_hat, var.sqrt())
    bound = torch.where(last, -inside.log_prob(x), kl_divergence(Normal(mean, torch.where(last, 1, q).sqrt()), inside))
    error, bound = (y_hat - y).square().mean(1), bound.mean(1)
    weight = {"vlb": 0, "rescaled": ((y - y_hat) / (x - x_hat)).detach()[:, 0]**-2 if x_hat is not None else 0}
    times = {"vlb": T, "hybrid": config["vlb_weight"] * T}.get(config["loss"], 0)
    loss = weight.get(config["loss"], 1) * error + times * bound
    return loss, (mean_hat - mean).square().mean(1), bound


def configs_of(words, members):
    """Configs of a stack from the words of a command line and [(data, target, loss)]."""
    return [settings.configs(train.parse([*FAST, *words.split(), "--data", data, "--target", target, "--loss", loss,
                                          "--batch-size", "50", "--lr", "1e-5"]))[0] for data, target, loss in members]


def epoch(configs, moments=None):
    """An epoch of a stack by plain gradient descent -> what train_epoch returns, models before and after."""
    torch.manual_seed(0)
    alone = [kind_points.build_model(config) for config in configs]
    together = kind_points.build_model(configs[0], len(configs))
    together.load_state_dict(stack.join([model.state_dict() for model in alone]))
    points = {config["data"]: DATASETS[config["data"]].sample(210, torch.Generator().manual_seed(5))
              for config in configs}
    optimizer = torch.optim.SGD(together.parameters(), lr=1.0)
    step = train_points.build_step(together, optimizer, len(configs), configs[0]["variance"])
    found = train_points.train_epoch(step, optimizer, [points[c["data"]] for c in configs], 1, configs, moments=moments)
    return found, [copy.deepcopy(model).double() for model in alone], together


@pytest.fixture
def drawn(monkeypatch):
    """Every (x, t, eps) that the regression is asked for."""
    calls, original = [], losses.regression
    monkeypatch.setattr(losses, "regression", lambda *draws, **kw: calls.append(draws) or original(*draws, **kw))
    return calls


STACKS = [
    ("--schedule cosine --timesteps 10 --variance log", [("clusters", "eps", "vlb"), ("clusters", "mu", "vlb"),
                                                         ("waves", "x", "vlb")]),
    ("--schedule ddpm --timesteps 8 --variance range --vlb-weight 0.3", [("clusters", "v", "hybrid"),
                                                                         ("clusters", "eps", "vlb"),
                                                                         ("clusters", "mu_skip", "hybrid")]),
    ("--schedule iddpm --timesteps 6 --t-min 0.02 --variance large", [("clusters", "mu_skip", "mse"),
                                                                      ("clusters", "v", "vlb"),
                                                                      ("waves", "eps", "rescaled")]),
    ("--schedule linear --timesteps 5 --variance best", [("clusters", "x", "vlb"), ("waves", "v", "mse"),
                                                         ("waves", "mu", "vlb")]),
    ("--schedule ddpm --timesteps 9 --variance direct", [("clusters", "v", "vlb"), ("clusters", "mu_skip", "hybrid")]),
    ("--schedule cosine --timesteps 4 --t-min 0.1", [("clusters", "eps", "vlb")])]


@pytest.mark.parametrize("aware", [False, True])
@pytest.mark.parametrize("words, members", STACKS)
def test_an_epoch_is_the_loop_written_by_hand(drawn, words, members, aware):
    """Losses, norms of gradients and weights of every member; aware: with times drawn by their moments."""
    configs = configs_of(words, members)
    T, t_0 = configs[0]["timesteps"], configs[0]["t_min"]
    before = [torch.rand(T, generator=torch.Generator().manual_seed(m)) + 0.1 for m in range(len(configs))]
    moments = [c.clone() for c in before] if aware else None
    (found, over_t, norms), alone, together = epoch(configs, moments)
    for m, (config, model, (x, t, eps)) in enumerate(zip(configs, alone, drawn)):
        i = ((t - t_0) / (1 - 2 * t_0) * T).round().long() - 1
        p = 0.999 * before[m].sqrt() / before[m].sqrt().sum() + 0.001 / T
        importance = 1 / (T * p[i]) if aware else torch.ones_like(t)
        plain = []
        for k in range(4):
            rows = slice(50 * k, 50 * (k + 1))
            plain.append(by_hand(config, model, x[rows], t[rows], eps[rows])[0])
            loss = (plain[-1] * importance[rows]).mean()
            gradients = torch.autograd.grad(loss, list(model.parameters()))
            norm = sum(gradient.square().sum() for gradient in gradients)**0.5
            assert_close(found[k, m].double(), loss.detach(), rtol=1e-4, atol=0)
            assert_close(norms[k, m].double(), norm, rtol=1e-3, atol=0)
            rate = 1e-5 * 0.5 * (1 + math.cos(math.pi * (4 + k) / 8))
            with torch.no_grad():
                for parameter, gradient in zip(model.parameters(), gradients):
                    parameter -= rate * gradient
        parts = stack.member(together.state_dict(), m)
        for key, value in model.state_dict().items():
            assert_close(parts[key].double(), value, rtol=1e-4, atol=1e-6)
        plain = torch.cat(plain).detach()
        bins = [(20 * (i + 1) - 1) // T == k for k in range(20)]     # k < 20 (i + 1) / T <= k + 1
        sums = torch.stack([(plain * importance)[here].sum() / importance[here].sum() for here in bins])
        assert_close(over_t[m].double(), sums, rtol=1e-3, atol=0, equal_nan=True)
        if aware:
            assert all(torch.isclose(moments[m][k].double(), plain[i == k].square().mean(), rtol=1e-3)
                       if (i == k).any() else moments[m][k] == before[m][k] for k in range(T))
            assert not torch.equal(drawn[0][1], drawn[-1][1]) or len(configs) == 1
        else:
            assert torch.equal(t, drawn[0][1]) or config["data"] != configs[0]["data"]


def test_moments_begin_as_the_mean_square_of_all_losses(drawn):
    """So that steps that were not drawn in the first epoch are neither always nor never drawn in the second."""
    config, = configs_of("--schedule cosine --timesteps 300 --variance large", [("clusters", "v", "mse")])
    moments = [None]
    _, (model,), _ = epoch([config], moments)
    x, t, eps = drawn[0]
    i = ((t - 1e-3) / 0.998 * 300).round().long() - 1
    squares = by_hand(config, model, x, t, eps)[0].square()          # at a rate of 1e-5 the weights hardly move
    missed = torch.ones(300, dtype=torch.bool).index_fill(0, i, False)
    assert 50 < missed.sum() < 250
    assert_close(moments[0][missed].double(), squares.mean().expand(missed.sum()), rtol=0.02, atol=0)
    assert_close(moments[0][i[:20]].double(), torch.stack([squares[i == k].mean() for k in i[:20]]), rtol=0.05, atol=0)


def fit(out, words, *more):
    train.main([*FAST, "--out", str(out), *words.split(), *more])


RANGE = "--schedule ddpm --timesteps 12 --target eps mu --loss hybrid vlb --variance range"
AWARE = "--timesteps 12 --target v mu_skip --loss vlb --variance log --t-density loss_aware"


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Runs on the chain of ddpm, t_0 = 0, and on that of cosine, t_0 = 0.001 or given by hand."""
    out = tmp_path_factory.mktemp("chains")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plots, "loss_curve", lambda *arguments: None)
        fit(out / "range", RANGE)
        fit(out / "aware", AWARE)
        fit(out / "best", "--schedule linear --timesteps 7 --target x --loss vlb --variance best --data clusters waves")
        fit(out / "t", "--schedule cosine --timesteps 7 --t-min 0.05 --target eps --loss mse --variance large")
        fit(out / "continuous", "--target v")
    return out


def same(a, b):
    """Are two checkpoints the same but for the seconds?"""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a if key != "seconds")
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if torch.is_tensor(a) else a == b


@pytest.mark.parametrize("part, words", [("range", RANGE), ("aware", AWARE)])
def test_a_killed_stack_goes_on_bit_for_bit(trained, tmp_path, monkeypatch, part, words):
    """With the moments of its terms; with others it ends elsewhere."""
    original = train_points.train_epoch

    def stop(step, optimizer, data, epoch, *rest):
        if epoch == 1:
            raise KeyboardInterrupt
        return original(step, optimizer, data, epoch, *rest)
    monkeypatch.setattr(train_points, "train_epoch", stop)
    with pytest.raises(KeyboardInterrupt):
        fit(tmp_path, words)
    monkeypatch.undo()
    states = {path: run.load(path) for path in tmp_path.glob("*/ckpt.pt")}
    assert len(states) == (4 if part == "range" else 2) and all(len(s["history"]) == 1 for s in states.values())
    assert all(("moments" in state) == (part == "aware") for state in states.values())
    fit(tmp_path, words, "--resume")
    for path in states:
        assert same(run.load(path), run.load(trained / part / path.parent.name))
    if part == "aware":
        for path, state in states.items():
            run.save(path, state | {"moments": state["moments"].flip(0)})
        fit(tmp_path, words, "--resume")
        assert not any(same(run.load(path)["model"], run.load(trained / part / path.parent.name)["model"])
                       for path in states)



def bare(one, dtype=torch.float64):
    """The network of a run as it was trained, without what `Run.model` puts around it."""
    model = kind_points.build_model(one.config)
    model.load_state_dict(one.checkpoint["model"])
    return model.to(dtype).requires_grad_(False)


EVERY = ["range/clusters-eps-hybrid-s0", "range/clusters-mu-vlb-s0", "aware/clusters-mu_skip-vlb-s0",
         "aware/clusters-v-vlb-s0", "best/waves-x-vlb-s0", "t/clusters-eps-mse-s0"]


@pytest.mark.parametrize("name", EVERY)
def test_test_columns_and_their_optima(trained, drawn, name):
    """Of the network, and of the exact denoiser: with the run's variance, in place of a learned one the best."""
    one = run.open(trained / name)
    config, last = one.config, one.history[-1]
    z, t, *_ = optimum.test_batch(config)
    x, t, eps = drawn[0]
    assert torch.equal(x, kind_points.load(config)) and len(t.unique()) == config["timesteps"]
    columns = [c.mean().item() for c in by_hand(config, bare(one), x, t, eps)]
    found = [last[f"test_{key}"] for key in ("loss", "mean_mse", "vlb")]
    assert found == pytest.approx([columns[0], columns[1], config["timesteps"] * columns[2]], rel=1e-4)
    fixed = config | {"variance": "best" if config["variance"] in ("range", "log") else config["variance"]}
    schedule, data = SCHEDULES[config["schedule"]], DATASETS[config["data"]]

    def exact(z, t):
        alpha, sigma, step = schedule.alpha(t)[:, None], schedule.sigma(t)[:, None], steps_of(config, t)
        x_hat = data.optimal_model("x", schedule)(z, t)
        return {"x": lambda: x_hat, "eps": lambda: (z - alpha * x_hat) / sigma,
                "v": lambda: (alpha * z - x_hat) / sigma, "mu": lambda: posterior(schedule, *step, z, x_hat)[0],
                "mu_skip": lambda: posterior(schedule, *step, z, x_hat)[0] - z}[config["target"]]()
    columns = [c.mean().item() for c in by_hand(fixed, exact, x, t, eps)]
    found = [last[key] for key in ("optimum", "optimum_mean_mse", "optimum_vlb")]
    assert found == pytest.approx([columns[0], columns[1], config["timesteps"] * columns[2]], rel=1e-3)
    assert last["test_vlb"] > last["optimum_vlb"] and last["test_mean_mse"] > last["optimum_mean_mse"]


def test_the_floor_of_the_mean_error_is_that_of_the_specification(monkeypatch):
    """1.12e-5 on the clusters, T = 1000 on the linear betas, a mean over i = 2 ... 1000: i = 1 adds E Var[x | z_1]."""
    monkeypatch.setattr(kind_points, "POINTS", 20_000)
    config = dict(data="clusters", target="eps", loss="mse", schedule="ddpm", t_min=0.0, stabiliser=0.0, timesteps=1000,
                  variance="small", vlb_weight=1e-3)
    _, t, _, weights = optimum.test_batch(config)
    found = optimum.optimum(config, weights)[1]
    of_first = optimum.optimal_errors("clusters", "x", "ddpm", 0.0, 0.0, 1000)[t < 0.0015].mean().item() / 1000
    assert found - of_first == pytest.approx(1.12e-5, rel=0.05) and 0 < of_first < 2e-7
