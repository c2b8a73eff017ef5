"""Runs of points on a discrete chain through all scripts: train, resume, test columns, samples, likelihoods, mistakes.

The chain is typed a second time here: the posterior by Bayes' rule, the KL by torch.distributions, in float64.
"""
import copy
import csv
import json
import math
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.distributions import Normal, kl_divergence
from torch.testing import assert_close

import kind_points
import likelihood
import losses
import optimum
import plots
import run
import sample
import samplers
import settings
import stack
import train
import train_points
from datasets2d import DATASETS
from ddpm import SCHEDULES

FAST = "--data clusters --width 8 --epochs 2 --batch-size 500 --device cpu".split()
CACHED = optimum.optimal_predictions, optimum.optimal_errors, optimum.optimal_bound, kind_points.floors


@pytest.fixture(scope="module", autouse=True)
def few():
    """2,500 points to train and to test on in place of 50,000, and no figures."""
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
    beside = ["hybrid"] * ("--vlb-weight" in words)                    # which needs it; the first config is meant
    return [settings.configs(train.parse([*FAST, *words.split(), "--data", data, "--target", target, "--loss", loss,
                                          *beside, "--batch-size", "50", "--lr", "1e-5"]))[0]
            for data, target, loss in members]


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
    configs = configs_of(words + " --t-density loss_aware" * aware, members)
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
    config, = configs_of("--schedule cosine --timesteps 300 --variance large --t-density loss_aware",
                         [("clusters", "v", "mse")])
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
def test_a_killed_stack_goes_on_bit_for_bit(trained, tmp_path, interrupted, part, words):
    """With the moments of its terms; with others it ends elsewhere."""
    interrupted(lambda: fit(tmp_path, words))
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



def test_moments_are_those_of_the_steps_or_the_checkpoint_is_refused(trained, tmp_path):
    one, other = run.load(trained / "aware/clusters-v-vlb-s0"), run.load(trained / "range/clusters-eps-hybrid-s0")
    assert one["moments"].shape == (12,) and "moments" not in other
    right, sentence = one["moments"], "its moments is not that of a run on points - choose another, or train it again"
    bad = [None, 1.0, [1.0] * 12, right[:11], right[None], right.long(), -right, right * math.inf,
           right.index_fill(0, torch.tensor([3]), math.nan), {}]
    for state in [*(one | {"moments": value} for value in bad), other | {"moments": right},
                  {key: value for key, value in one.items() if key != "moments"}]:
        run.save(tmp_path / "ckpt.pt", state)
        with pytest.raises(SystemExit, match=sentence):
            run.open(tmp_path)
    run.save(tmp_path / "ckpt.pt", one | {"moments": 0 * right})
    assert run.open(tmp_path).checkpoint["moments"].sum() == 0


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


# Samples

def hand_x(one):
    """The network of a run as one that predicts x, in float64, and what else it gives: (z, t) -> x_hat, out."""
    config, model, schedule = one.config, bare(one), one.schedule
    length, t_0 = (1 - 2 * config["t_min"]) / config["timesteps"], config["t_min"]

    def predict(z, t):
        t, given = t[:, None], model(z, t)
        y_hat, out, alpha, sigma = given[:, :2], given[:, 2:], schedule.alpha(t), schedule.sigma(t)
        if not config["target"].startswith("mu"):
            return {"x": lambda: y_hat, "eps": lambda: (z - sigma * y_hat) / alpha,
                    "v": lambda: alpha * z - sigma * y_hat}[config["target"]](), out
        of_step = t.clamp(min=t_0 + length)
        mean = y_hat + (z if config["target"] == "mu_skip" else 0)
        of_z, of_x = (posterior(schedule, of_step - length, of_step, *c)[0] for c in ((z, 0 * z), (0 * z, 0 * z + 1)))
        return (mean - of_z) / of_x, out
    return predict


def linear_betas(steps):
    """The chain of Ho et al. in other steps, Foundations 1.25: beta times 1000 / T, as a schedule of i / T."""
    alpha_sq = torch.cumprod(1 - torch.linspace(1e-4, 0.02, steps, dtype=torch.float64) * 1000 / steps, 0)
    alpha_sq = torch.cat([torch.ones(1, dtype=torch.float64), alpha_sq])
    at = lambda t: alpha_sq[(t * steps).round().long()]
    return type("", (), dict(alpha=lambda t: at(t).sqrt(), sigma=lambda t: (1 - at(t)).sqrt()))


def samples_by_hand(one, steps, variance, n, rescaled=False):
    """Ancestral sampling from float32 noise, in float64; the last step is to x_hat."""
    schedule, t_0 = (linear_betas(steps), 0.0) if rescaled else (one.schedule, one.config["t_min"])
    g, predict, own = run.generator("cpu", 0, "sample"), hand_x(one), one.schedule
    z = torch.randn((n, 2), generator=g).double()
    for i in range(steps, 0, -1):
        t, s = (torch.full((n, 1), t_0 + (1 - 2 * t_0) * k / steps, dtype=torch.float64) for k in (i, i - 1))
        if rescaled:                                       # the network's prediction is of eps, with this chain's alpha
            given = bare(one)(z, t[:, 0])
            x_hat, out = (z - schedule.sigma(t) * given[:, :2]) / schedule.alpha(t), given[:, 2:]
        else:
            x_hat, out = predict(z, t[:, 0])
        if i == 1:
            return x_hat
        mean, small, beta = posterior(schedule, s, t, z, x_hat)
        cov = lambda: DATASETS[one.config["data"]].covariance(z, schedule.alpha(t)[:, 0], schedule.sigma(t)[:, 0])  # noqa: B023
        var = {"small": lambda: small, "large": lambda: beta, "log": lambda: out.exp(),                         # noqa: B023
               "range": lambda: beta**((1 + out) / 2) * small**((1 - out) / 2),                                 # noqa: B023
               "best": lambda: small + (beta - small) / own.sigma(t)**2 * cov()}[variance]()                    # noqa: B023
        z = mean + var.sqrt() * torch.randn((n, 2), generator=g).double()


@pytest.mark.parametrize("part, words, variance", [
    ("range", "--steps 12", "range"), ("range", "--steps 5", "range"), ("range", "--steps 5 --variance large", "large"),
    ("range", "--steps 4 --variance small", "small"),
    ("range", "--steps 24 --grid rescaled", "range"), ("aware", "--steps 12", "log"), ("best", "--steps 7", "best"),
    ("best", "--steps 3", "best"), ("t", "--steps 7", "large"), ("t", "--steps 4 --variance best", "best")])
def test_samples_are_the_chain_by_hand(trained, tmp_path, part, words, variance):
    """Of every run of a folder, as one stack: with its own variance or another, all steps, some, rescaled."""
    folders = [path for path in sorted((trained / part).iterdir())
               if "rescaled" not in words or "eps" in path.name]
    sample.main(["--ckpt", *map(str, folders), *words.split(), "--num-samples", "123", "--device", "cpu", "--out",
                 str(tmp_path)])
    for folder in folders:
        out = tmp_path / folder.name if len(folders) > 1 else tmp_path
        one, steps = run.open(folder), int(words.split()[1])
        expected = samples_by_hand(one, steps, variance, 123, "rescaled" in words)
        found = torch.from_numpy(np.load(out / "samples.npy")).double()
        assert_close(found, expected, rtol=1e-3, atol=1e-4 * expected.abs().max().item())
        said = json.loads((out / "metrics.json").read_text())
        assert (said["variance"], said["steps"], said["timesteps"]) == (variance, steps, one.config["timesteps"])


@pytest.mark.parametrize("name", ["range/clusters-mu-vlb-s0", "aware/clusters-mu_skip-vlb-s0"])
def test_a_run_that_predicts_the_mean_opens_as_one_that_predicts_x(trained, name):
    """Also before its first step ends, where samplers and the flow go; for every sampler."""
    one = run.open(trained / name)
    assert one.target == "x" and one.config["target"].startswith("mu") and one.members[0] is one
    z = torch.randn(40, 2, generator=torch.Generator().manual_seed(0))
    for t in torch.tensor([0.001, 0.05, 1 / 12, 0.3, 0.999]):
        expected = hand_x(one)(z.double(), t.double().expand(40))
        assert_close(one.model()(z, t.expand(40)).double(), expected[0], rtol=2e-3, atol=1e-3)
        assert_close(one.denoiser()(z, t)[0].double(), expected[0], rtol=2e-3, atol=1e-3)
        found = one.model(out=True)(z, t.expand(40)).double()
        assert_close(found, torch.cat(expected, 1), rtol=2e-3, atol=1e-3)
    model = lambda z, t: hand_x(one)(z.double(), t.double())[0].float()
    for sampler, grid in ("ddim", "t"), ("sde", "t"), ("euler", "t"), ("heun", "logsnr"), ("dpmpp", "karras"):
        found = kind_points.draw(one, 6, 20, sampler=sampler, grid=grid, variance="none")[0]
        expected = samplers.sample(model, (20, 2), 6, target="x", schedule=one.schedule, sampler=sampler, grid=grid,
                                   t_min=1e-3, generator=run.generator("cpu", 0, "sample"))
        assert_close(found, expected, rtol=1e-2, atol=1e-3 * expected.abs().max().item())


def test_a_film_a_curve_and_a_table_of_runs_on_a_chain(trained, tmp_path, capsys):
    folders = [str(path) for path in sorted((trained / "range").iterdir())][1:3]
    sample.main(["--ckpt", *folders, "--steps", "4", "--num-samples", "50", "--movie", "--variance", "large",
                 "--csv", str(tmp_path / "table.csv"), "--out", str(tmp_path / "out"), "--device", "cpu"])
    lines = list(csv.DictReader((tmp_path / "table.csv").open()))
    assert [line["variance"] for line in lines] == 3 * ["large"]
    assert all((tmp_path / "out" / Path(folder).name / "samples.gif").read_bytes().startswith(b"GIF8")
               for folder in folders)
    plots.main([*folders, "--out", str(tmp_path / "curves.png")])
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    sample.main(["--ckpt", folders[0], "--sampler", "ddim", "--variance", "none", "--steps", "3", "--num-samples", "50",
                 "--out", str(tmp_path), "--device", "cpu"])
    assert json.loads((tmp_path / "metrics.json").read_text())["variance"] is None     # a sampler that has none


def test_training_says_a_command_that_draws_with_all_steps(tmp_path, capsys):
    """`log` could not be drawn from with 512."""
    fit(tmp_path, "--timesteps 12 --loss vlb --variance log --epochs 1")
    out = capsys.readouterr().out
    words = shlex.split(out.splitlines()[-1].split("next: ")[1])
    assert words[2:] == ["--ckpt", str(tmp_path / "clusters-eps-vlb-s0"), "--steps", "12"]
    sample.main([*words[2:], "--num-samples", "10", "--device", "cpu"])
    last = run.load(tmp_path / "clusters-eps-vlb-s0")["history"][-1]
    assert f"VLB {last['test_vlb']:.3f} ({last['optimum_vlb']:.3f}) nats per dimension" in out
    fit(tmp_path, "--epochs 1")
    assert capsys.readouterr().out.endswith("--steps 512\n")


# Likelihood

def bound_by_hand(one, x, steps, variance, draws):
    """The three terms of the bound of every example, from the same noise, sums over dimensions, in nats."""
    t_0, g, model = one.config["t_min"], run.generator("cpu", 0, "likelihood"), hand_x(one)
    config = one.config | dict(target="x", loss="vlb", timesteps=steps, variance=variance)
    of_x = lambda z, t: torch.cat(model(z, t)[:2 if variance in ("range", "log") else 1], 1)
    terms = []
    for i in range(1, steps + 1):
        t = torch.full((len(x),), t_0 + (1 - 2 * t_0) * i / steps, dtype=torch.float64)
        of_step = [2 * by_hand(config, of_x, x, t, torch.randn(x.shape, generator=g, dtype=torch.float64))[2]
                   for _ in range(draws)]
        terms.append(torch.stack(of_step))
    ends = torch.tensor([t_0, 1 - t_0], dtype=torch.float64)
    alpha, sigma = one.schedule.alpha(ends), one.schedule.sigma(ends)
    prior = kl_divergence(Normal(alpha[1] * x, sigma[1]), Normal(0 * x, 1)).sum(1)
    if sigma[0] > 0:       # p(x | z_0) of N(z_0 / alpha, sigma^2 / alpha^2), its mean over z_0
        terms.insert(0, (1 + math.log(2 * math.pi) + 2 * math.log(sigma[0] / alpha[0])) * torch.ones(draws, len(x)))
    return prior, terms[0].mean(0), sum(terms[1:]).mean(0)


@pytest.mark.parametrize("name, words", [
    ("range/clusters-eps-hybrid-s0", ""), ("range/clusters-mu-vlb-s0", ""), ("aware/clusters-mu_skip-vlb-s0", ""),
    ("aware/clusters-v-vlb-s0", "--draws 3"), ("best/waves-x-vlb-s0", ""), ("t/clusters-eps-mse-s0", ""),
    ("range/clusters-eps-hybrid-s0", "--steps 5"), ("range/clusters-mu-vlb-s0", "--steps 5 --variance large"),
    ("aware/clusters-mu_skip-vlb-s0", "--variance best"), ("t/clusters-eps-mse-s0", "--steps 4 --variance small")])
def test_the_bound_of_a_run_is_all_terms_with_its_own_variance(trained, tmp_path, name, words):
    likelihood.main(["--ckpt", str(trained / name), "--num", "20", "--num-ode", "0", *words.split(), "--out",
                     str(tmp_path), "--device", "cpu"])
    path, = tmp_path.iterdir()
    said, one, given = json.loads(path.read_text()), run.open(trained / name), dict(zip(*2 * [iter(words.split())]))
    steps = int(given.get("--steps", one.config["timesteps"]))
    variance, draws = given.get("--variance", one.config["variance"]), int(given.get("--draws", 2))
    x = kind_points.load(one.config)[:20].double()
    for key, values in zip(("prior", "reconstruction", "diffusion"), bound_by_hand(one, x, steps, variance, draws)):
        assert said[key][0] == pytest.approx(values.mean().item(), rel=1e-5), key
    assert (said["steps"], said["variance"], said["draws"]) == (steps, variance, draws)
    assert path.name == "likelihood-num-20" + "".join(
        f"-{key}-{given[f'--{key}']}" for key in ("draws", "steps", "variance") if f"--{key}" in given
    ) + "-num-ode-0.json"


def test_the_flow_of_a_chain_goes_down_to_a_thousandth_with_the_prediction_of_x_alone(trained, tmp_path):
    for name in "range/clusters-eps-hybrid-s0", "aware/clusters-mu_skip-vlb-s0":
        one = run.open(trained / name)
        x = kind_points.load(one.config)[:5].double()
        model = lambda z, t: hand_x(one)(z, t)[0]                                               # noqa: B023
        terms, _ = likelihood.evaluate(one.model(out=True).double(), x, one.config, draws=2, ode_steps=6,
                                       generator=torch.Generator())
        expected, _ = likelihood.log_likelihood(model, x, target="x", schedule=one.schedule, steps=6, t_min=1e-3)
        assert_close(terms["exact"], -expected, rtol=1e-5, atol=0)


def test_what_a_likelihood_evaluates_is_counted(trained, tmp_path, monkeypatch):
    """For the line that says how long it takes: of a chain all terms, of continuous time the draws, and the flow."""
    done, totals = {}, {}
    monkeypatch.setattr(likelihood.clock, "counter", lambda what, total, unit: totals.update({what: total}) or (
        lambda n: done.update({what: done.get(what, 0) + n})))
    for name, words, terms in (("range/clusters-eps-hybrid-s0", ["--batch-size", "7"], 12), (
            "range/clusters-eps-hybrid-s0", ["--steps", "5", "--variance", "large"], 5), (
            "continuous/clusters-v-mse-s0", ["--draws", "2"], 1)):
        likelihood.main(["--ckpt", str(trained / name), "--num", "10", "--ode-steps", "3", "--device", "cpu", "--out",
                         str(tmp_path), *words])
        assert done == totals == {"flow": 4 * 3 * 10, "bound": 2 * terms * 10}
        done.clear()


def test_runs_with_and_without_a_chain_in_one_call_have_their_own_defaults(trained, tmp_path):
    folders = [trained / "continuous/clusters-v-mse-s0", trained / "range/clusters-eps-hybrid-s0"]
    argv = ["--ckpt", *map(str, folders), "--num", "20", "--num-ode", "0", "--out", str(tmp_path), "--device", "cpu"]
    likelihood.main(argv)
    said = [json.loads((tmp_path / one.name / "likelihood-num-20-num-ode-0.json").read_text()) for one in folders]
    assert [(entry["draws"], entry["steps"], entry["variance"]) for entry in said] == [(100, None, None),
                                                                                      (2, 12, "range")]
    likelihood.main([*argv, "--steps", "6", "--variance", "large"])
    for one in folders:
        said = json.loads((tmp_path / one.name / "likelihood-num-20-steps-6-variance-large-num-ode-0.json").read_text())
        assert (said["steps"], said["variance"]) == (6, "large")


# Mistakes

def ends(capsys, main, *argv):
    """Exit code and sentence of a call."""
    with pytest.raises(SystemExit) as stop:
        main([str(word) for word in argv])
    error = capsys.readouterr().err.strip()
    code, text = (2, error.splitlines()[-1]) if stop.value.code == 2 else (1, stop.value.code)
    assert isinstance(text, str) and "\n" not in text and "Traceback" not in error and len(text) < 400
    return code, text


TRAIN = [
    ("--variance log", "--variance log is of a discrete chain: say of how many steps, --timesteps 1000"),
    ("--variance large", "--variance large is of a discrete chain"), ("--loss vlb", "loss vlb is of a discrete chain"),
    ("--target mu", "target mu is the mean of a step"), ("--target eps mu_skip", "target mu_skip is the mean"),
    ("--timesteps 9 --adaptive", "adaptive is of continuous time - leave it or --timesteps out, or take loss_aware"),
    ("--t-min 0", r"--t-min must be in \[1e-06, 0.49\] without --timesteps, got 0"),
    ("--timesteps 9 --t-min 0", "--t-min 0 is for a schedule whose log-SNR is finite at t = 1, cosine's is not"),
    ("--timesteps 9 --t-min 0 --schedule flow", "flow's is not - leave it out"),
    ("--timesteps 9 --t-density logsnr", "logsnr is of continuous time - leave it or --timesteps out"),
    ("--timesteps 9 --variance log --loss mse", "learned, which --loss mse does not do - take vlb or hybrid"),
    ("--timesteps 9 --variance range --loss vlb nelbo", "learned, which --loss nelbo does not do"),
    ("--timesteps 9 --loss hybrid", "hybrid learns a variance, and small is fixed - add --variance range"),
    ("--timesteps 1", r"--timesteps: must be in \[2, 10000\], got 1"), ("--timesteps 0", "must be in"),
    ("--timesteps 1e3", "'1e3' is not a whole number"), ("--timesteps 9 --variance beta", "invalid choice: 'beta'"),
    ("--timesteps 9 --vlb-weight -1", "--vlb-weight: must be finite and at least 0|must be in"),
    ("--timesteps 9 --vlb-weight 0.1 --loss mse vlb", "--vlb-weight is of --loss hybrid alone - leave it out"),
    ("--timesteps 9 --target u --loss nelbo_stable", "has no weight for target 'u'"),
    ("--timesteps 9 --variance best --data points.npy", "--variance best is known for .*clusters.* alone"),
    ("--timesteps 9 --variance best --data cifar10", "--variance best is known for .*clusters.* alone"),
    ("--timesteps 9 --variance best --loss hybrid", "best is fixed")]


@pytest.mark.parametrize("words, message", TRAIN)
def test_mistakes_in_training(tmp_path, monkeypatch, capsys, words, message):
    monkeypatch.chdir(tmp_path)
    np.save("points.npy", np.zeros((30, 2)))
    code, text = ends(capsys, train.main, *words.split())
    assert code == 2 and re.search(message, text) and not Path("runs").exists(), text


SAMPLE = [  # run, words, exit code, message
    ("range/clusters-eps-hybrid-s0", "--sampler heun", 1, "range is learned, which sampler heun does not use - take "),
    ("range/clusters-eps-hybrid-s0", "--sampler heun --variance small", 2, "is for --sampler ancestral, heun has none"),
    ("range/clusters-eps-hybrid-s0", "--variance none", 2, "ancestral has a variance: choose small, large"),
    ("range/clusters-eps-hybrid-s0", "--variance log", 1, "has not learned a variance log, but has range - take small"),
    ("continuous/clusters-v-mse-s0", "--variance direct", 1, "has not learned a variance direct, but has small"),
    ("aware/clusters-v-vlb-s0", "", 1, "variance log is that of its own 12 steps alone - take --steps 12 "),
    ("aware/clusters-v-vlb-s0", "--steps 12 --grid logsnr", 1, "log is that of its own 12 steps alone"),
    ("aware/clusters-v-vlb-s0", "--steps 12 --t-min 0.01", 1, "12 steps alone - take --steps 12 and no --grid or --t-"),
    ("aware/clusters-v-vlb-s0", "--steps 30 --grid rescaled --variance small", 1, "are those of schedule ddpm"),
    ("range/clusters-eps-hybrid-s0", "--steps 20 --grid rescaled", 1, "steps must be at least 21, got 20"),
    *[("range/clusters-eps-hybrid-s0", f"--grid rescaled --variance none --sampler {name}", 2, f"{name} needs its slope"
       ) for name in ("sde", "euler", "heun")]]


@pytest.mark.parametrize("name, words, expected, message", SAMPLE)
def test_mistakes_in_sampling(trained, tmp_path, capsys, name, words, expected, message):
    code, text = ends(capsys, sample.main, "--ckpt", trained / name, *words.split(), "--out", tmp_path / "out")
    assert code == expected and message in text and not list(tmp_path.glob("out/*")), text


@pytest.mark.parametrize("names, words, message", [
    (["aware/clusters-v-vlb-s0"], "--steps 5", "variance log is that of its own 12 steps alone"),
    (["continuous/clusters-v-mse-s0"], "--variance large", "continuous time, which has no variance of a step - say of"),
    (["t/clusters-eps-mse-s0", "continuous/clusters-v-mse-s0"], "--variance large", "v-mse-s0: its bound is of cont"),
    (["range/clusters-eps-hybrid-s0"], "--variance direct", "has not learned a variance direct, but has range")])
def test_mistakes_in_likelihoods_are_known_before_the_first_is_computed(trained, tmp_path, capsys, names, words,
                                                                        message):
    folders = [trained / name for name in names]
    code, text = ends(capsys, likelihood.main, "--ckpt", *folders, *words.split(), "--out", tmp_path / "out")
    assert code == 1 and message in text and not list(tmp_path.rglob("*.json")), text


def test_the_best_variance_of_own_points_is_not_known(trained, tmp_path, monkeypatch, capsys):
    """Nor is it for a run on a chain of them; the others are."""
    monkeypatch.chdir(tmp_path)
    np.save("mine.npy", torch.randn(700, 2, generator=torch.Generator().manual_seed(0)).numpy())
    argv = ["--data", "mine.npy", *FAST[2:], "--timesteps", "5", "--loss", "hybrid", "--variance", "range"]
    train.main([*argv, "--epochs", "1"])
    for main, words in (sample.main, ["--steps", "5"]), (likelihood.main, ["--num", "9"]):
        code, text = ends(capsys, main, "--variance", "best", *words)
        assert code == 1 and "the best variance is known for the 2D datasets alone - take small or large" in text
        main([*words, "--device", "cpu"])
    last = run.open("runs/mine.npy-eps-hybrid-s0").history[-1]
    assert last["optimum_vlb"] is None and last["test_vlb"] > 0
