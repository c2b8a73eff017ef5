"""One network under every schedule, VDM A.43 - A.48: against exact denoisers of each, in float64, and end to end."""
import itertools
import json
import math
import runpy

import numpy as np
import pytest
import torch
from test_ddpm import alpha_sigma, every_schedule
from torch.testing import assert_close

import ddpm
import draw_images
import invariance
import kind_points
import likelihood
import run
import sample
import samplers
import settings
import targets
import train
from datasets2d import DATASETS
from ddpm import SCHEDULES

F64 = torch.float64
CLUSTERS, COSINE = DATASETS["clusters"], SCHEDULES["cosine"]
TARGETS = [name for name in targets.TARGETS if name not in targets.OF_A_STEP]
LOW, HIGH = -7.0, 8.0              # log-SNRs that every schedule has


def points(n, seed=0):
    return torch.randn(n, 2, generator=torch.Generator().manual_seed(seed), dtype=F64)


def log_snr(alpha, sigma):
    return 2 * torch.log(alpha / sigma)


# The part of a schedule

@every_schedule
@pytest.mark.parametrize("low, high", [(LOW, HIGH), (-12.9, 12.9)])
def test_the_part_between_has_its_ends_curve_slope_and_scale(name, low, high):
    schedule, part = SCHEDULES[name], invariance.between(SCHEDULES[name], low, high)
    t = torch.linspace(0, 1, 101, dtype=F64)
    u = part.logsnr(t)
    assert_close(u[[0, -1]], torch.tensor([high, low], dtype=F64), rtol=1e-8, atol=0)
    assert (u.diff() < 0).all() and part.scale is schedule.scale
    assert_close(part.alpha(t), schedule.scale.alpha(u))
    assert_close(part.ends(0.0), [low, high], rtol=1e-8, atol=0)
    single = part.logsnr(t.float())
    assert single.dtype == torch.float32 and (single[1:-1].double() - u[1:-1]).abs().max() < 2e-3
    inside = t[5:-5]
    if name == "iddpm":                                                  # its slope has a step, where beta is capped
        inside = inside[(part.logsnr(inside) > -10)]
    slope = (part.logsnr(inside + 1e-6) - part.logsnr(inside - 1e-6)) / 2e-6
    assert_close(part.dlogsnr(inside), slope, rtol=1e-6, atol=1e-7)
    whole = schedule.t(u[(u > schedule.ends(0.0)[0]) & (u < schedule.ends(0.0)[1])])
    assert whole.diff().diff().abs().max() < 1e-12                       # t is stretched, and nothing else


def test_a_schedule_that_ends_before_goes_on_by_its_formula():
    part = invariance.between(SCHEDULES["ve"], -20.0, 20.0)
    assert_close(part.logsnr(torch.linspace(0, 1, 5, dtype=F64)), torch.tensor([20.0, 10, 0, -10, -20], dtype=F64))
    assert_close(part.sigma(torch.ones((), dtype=F64)).item(), math.exp(10), rtol=1e-9, atol=0)
    t = invariance.time(SCHEDULES["linear"], -12.0)                      # alpha^2 = exp(-(0.1 t + 9.95 t^2)), t > 1
    rest = math.exp(-(0.1 * t + 9.95 * t * t))
    assert t > 1 and math.log(rest / (1 - rest)) == pytest.approx(-12.0, abs=1e-9)


# A network of one schedule under another

@pytest.mark.parametrize("own, other", list(itertools.product(SCHEDULES, SCHEDULES)))
def test_the_exact_denoiser_of_one_schedule_is_that_of_every_other(own, other):
    part = invariance.between(SCHEDULES[other], LOW + 2.5, HIGH)
    t = torch.linspace(0, 1, 40, dtype=F64)
    z = ddpm.q_sample(CLUSTERS.sample(40, torch.Generator().manual_seed(1), F64), t, points(40), part)
    for target, stabiliser in [*((name, 0.0) for name in TARGETS), ("s", 0.01)]:
        model = CLUSTERS.optimal_model(target, SCHEDULES[own], stabiliser)
        found = invariance.under(model, target, SCHEDULES[own], part, stabiliser)(z, t)
        truth = CLUSTERS.optimal_model(target, part, stabiliser)(z, t)
        assert_close(found, truth, rtol=1e-12, atol=1e-12 * truth.abs().max().item())


@pytest.mark.parametrize("other", ["ve", "flow"])
def test_what_a_network_is_given_and_how_its_prediction_is_read(other):
    """A.45 and A.47 typed again for a network that is no denoiser: v of cosine, t told, z at the same log-SNR."""
    seen, schedule = [], SCHEDULES[other]

    def model(z, t):
        seen.append((z, t))
        return torch.sin(3 * z) + t[:, None]
    t, z = torch.tensor([0.7, 0.2, 0.7, 0.4], dtype=F64), points(4)
    found = invariance.under(model, "v", COSINE, schedule)(z, t)
    sigma_b = 0.01 * 5000**t if other == "ve" else t
    alpha_b = torch.ones_like(t) if other == "ve" else 1 - t
    angle = torch.atan2(sigma_b, alpha_b)                                # tan = sigma / alpha, of cosine too
    (z_a, t_a), = seen
    assert_close(t_a, 2 / math.pi * angle, rtol=1e-9, atol=0)
    alpha, sigma = torch.cos(angle)[:, None], torch.sin(angle)[:, None]
    assert_close(z_a, alpha / alpha_b[:, None] * z)
    v = torch.sin(3 * z_a) + t_a[:, None]
    x_hat, eps_hat = alpha * z_a - sigma * v, sigma * z_a + alpha * v    # Eq. (3.58)
    assert_close(found, alpha_b[:, None] * eps_hat - sigma_b[:, None] * x_hat)


def test_a_stack_has_its_targets_in_blocks_and_images_their_axes():
    names, part = ["v", "x", "s"], invariance.between(SCHEDULES["flow"], LOW, HIGH)
    model = lambda name: lambda z, t: torch.cos(2 * z) * (2 + names.index(name))
    stacked = lambda z, t: torch.cat([model(name)(c, None) for name, c in zip(names, z.chunk(3))])
    z, t = points(12), torch.linspace(0, 1, 4, dtype=F64).repeat(3)
    found = invariance.under(stacked, names, COSINE, part, 0.01)(z, t)
    for name, z_m, t_m, found_m in zip(names, z.chunk(3), t.chunk(3), found.chunk(3)):
        assert_close(found_m, invariance.under(model(name), name, COSINE, part, 0.01)(z_m, t_m))
    picture = invariance.under(torch.sin, "v", COSINE, part)
    with pytest.raises(TypeError):                                       # a model has two arguments
        picture(z, t)
    one = invariance.under(lambda z, t: torch.sin(z), "v", COSINE, part)
    flat = one(z, t)
    assert_close(one(z.reshape(12, 2, 1, 1), t).flatten(1), flat)


@every_schedule
def test_the_bound_of_one_network_is_one_number_draw_by_draw(name):
    """VDM 4.80: with log-SNR uniform no schedule is left, whatever the network; prior and reconstruction are equal."""
    model = lambda z, t: torch.sin(2 * z) - t[:, None]
    x = CLUSTERS.sample(200, torch.Generator().manual_seed(2), F64)
    config = dict(schedule="cosine", stabiliser=0.02)

    def terms(under):
        own, schedule, t_min = invariance.of_run(model, "s", config, 0.01, under)
        return likelihood.bound(own, x, target="s", schedule=schedule, t_min=t_min, draws=3, stabiliser=0.02,
                                generator=torch.Generator().manual_seed(3))
    expected, found = terms(None), terms(name)
    for part in expected:
        assert_close(found[part], expected[part], rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("name", ["ve", "flow"])
def test_the_flow_of_one_network_is_one_density(name):
    model, x = CLUSTERS.optimal_model("v", COSINE), CLUSTERS.sample(5, torch.Generator().manual_seed(4), F64)
    config = dict(schedule="cosine", stabiliser=0.0)
    own, schedule, t_min = invariance.of_run(model, "v", config, 1e-3, name)
    found, _ = likelihood.log_likelihood(own, x, target="v", schedule=schedule, t_min=t_min, steps=20)
    expected, _ = likelihood.log_likelihood(model, x, target="v", schedule=COSINE, t_min=1e-3, steps=20)
    assert_close(found, expected, rtol=0, atol=0.04)
    assert (found - CLUSTERS.log_prob(x)).abs().max() < 0.1


@pytest.mark.parametrize("sampler", ["ddim", "dpmpp", "ancestral"])
def test_in_equal_steps_of_log_snr_samples_are_the_same_points(sampler):
    model, config = CLUSTERS.optimal_model("eps", COSINE), dict(schedule="cosine", stabiliser=0.0)

    def draw(name, grid):
        own, schedule, t_min = invariance.of_run(model, "eps", config, 1e-3, name)
        return samplers.sample(own, (50, 2), 12, target="eps", schedule=schedule, t_min=t_min, sampler=sampler,
                               grid=grid, generator=torch.Generator().manual_seed(5), dtype=F64)
    expected = draw(None, "logsnr")
    for name in SCHEDULES:
        assert_close(draw(name, "logsnr"), expected, rtol=3e-6, atol=3e-6)
    assert_close(draw("cosine", "t"), draw(None, "t"), rtol=1e-7, atol=1e-7)
    assert (draw("ve", "t") - draw(None, "t")).abs().max() > 1e-2


# Another first t

@every_schedule
@pytest.mark.parametrize("t_max, t_min", [(0.8, 0.01), (0.999, 1e-3)])
def test_sampling_from_t_max_is_ddim_on_times_typed_here(name, t_max, t_min):
    """Noise has the variance alpha^2 + sigma^2 of t_max, and the network hears its own times."""
    seen, n, own = [], 5, SCHEDULES[name]
    network = lambda z, t: seen.append(t) or torch.sin(2 * z) * t[:, None]
    model, schedule, least = invariance.of_run(network, "v", dict(schedule=name, stabiliser=0.0), t_min, t_max=t_max)
    found = samplers.sample(model, (20, 2), n, target="v", schedule=schedule, t_min=least, sampler="ddim",
                            generator=torch.Generator().manual_seed(6), dtype=F64)
    times = torch.tensor([t_min + (t_max - t_min) * i / n for i in range(n, 0, -1)], dtype=F64)
    assert_close(torch.stack(seen)[:, 0], times, rtol=1e-9, atol=1e-9)
    alpha, sigma = alpha_sigma(name, times)
    z = torch.randn(20, 2, generator=torch.Generator().manual_seed(6), dtype=F64) * (alpha[0]**2 + sigma[0]**2)**0.5
    for i in range(n):
        v, r_sq = torch.sin(2 * z) * times[i], alpha[i]**2 + sigma[i]**2
        x_hat, eps_hat = (alpha[i] * z - sigma[i] * v) / r_sq, (sigma[i] * z + alpha[i] * v) / r_sq
        z = alpha[i + 1] * x_hat + sigma[i + 1] * eps_hat if i < n - 1 else x_hat
    assert_close(found, z, rtol=1e-5, atol=1e-6 * z.abs().max().item())
    assert own.scale is schedule.scale


def test_under_another_schedule_t_max_is_the_runs_own():
    config = dict(schedule="cosine", stabiliser=0.0)
    _, schedule, t_min = invariance.of_run(torch.sin, "v", config, 0.01, "ve", t_max=0.7)
    logsnr = lambda t: -2 * math.log(math.tan(math.pi * t / 2))
    assert_close(schedule.ends(t_min), [logsnr(0.7), logsnr(0.01)], rtol=1e-8, atol=0)


@pytest.mark.parametrize("t_max", [None, 0.8, 0.5])
def test_likelihoods_up_to_t_max_of_gaussian_data(t_max):
    """Exact: z_0 = alpha_0 x grows to z_1 as its deviation does, and z_1 is held against N(0, 1). Prior: by hand."""
    c, t_min, x = 0.6, 0.01, points(10)
    model = lambda z, t: (math.pi / 2 * t).cos()[:, None] * c**2 / (
        (math.pi / 2 * t).cos()**2 * c**2 + (math.pi / 2 * t).sin()**2)[:, None] * z
    config = dict(schedule="cosine", target="x", stabiliser=0.0, data="clusters", t_min=t_min)
    terms, _ = likelihood.evaluate(model, x, settings.completed(config), 2, ode_steps=30, t_min=t_min, t_max=t_max)
    var = lambda t: math.cos(math.pi / 2 * t)**2 * c**2 + math.sin(math.pi / 2 * t)**2
    last = t_max or 1 - t_min
    scale = math.cos(math.pi / 2 * t_min) * math.sqrt(var(last) / var(t_min))                # z_1 = scale x
    log_p = (-0.5 * (scale * x)**2 - 0.5 * math.log(2 * math.pi) + math.log(scale)).sum(1)
    assert_close(terms["exact"], -log_p, rtol=1e-5, atol=1e-5)
    alpha, sigma = math.cos(math.pi / 2 * last), math.sin(math.pi / 2 * last)
    assert_close(terms["prior"], (0.5 * (sigma**2 + (alpha * x)**2 - 1) - math.log(sigma)).sum(1), rtol=1e-6, atol=1e-9)


# Scripts

@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs")
    train.main(["--data", "clusters", "--target", "v", "x", "--epochs", "1", "--batch-size", "25000", "--width", "8",
                "--device", "cpu", "--out", str(out)])
    return out


def test_samples_under_another_schedule(runs, tmp_path, capsys):
    sample.main(["--ckpt", str(runs / "clusters-v-mse-s0"), str(runs / "clusters-x-mse-s0"), "--schedule", "ve",
                 "--steps", "7", "--sampler", "dpmpp", "--num-samples", "30", "--device", "cpu",
                 "--out", str(tmp_path), "--csv", str(tmp_path / "table.csv")])
    assert "under" in (tmp_path / "table.csv").read_text().splitlines()[0]
    part = invariance.between(SCHEDULES["ve"], *COSINE.ends(1e-3))
    for target in "v", "x":
        one = run.open(runs / f"clusters-{target}-mse-s0")
        found = json.loads((tmp_path / one.name / "metrics.json").read_text())
        assert (found["schedule"], found["under"], found["sampler"]) == ("cosine", "ve", "dpmpp")
        model = invariance.under(one.model(), target, COSINE, part)
        expected = samplers.sample(model, (30, 2), 7, target=target, schedule=part, t_min=0.0, sampler="dpmpp",
                                   generator=run.generator("cpu", 0, "sample"))
        assert_close(torch.tensor(np.load(tmp_path / one.name / "samples.npy")), expected, rtol=1e-4, atol=1e-4)
    capsys.readouterr()


def test_samples_and_likelihoods_up_to_t_max(runs, tmp_path, capsys):
    folder = runs / "clusters-v-mse-s0"
    for more in [], ["--t-max", "0.7"]:
        sample.main(["--ckpt", str(folder), "--steps", "4", "--sampler", "ddim", "--num-samples", "30",
                     "--device", "cpu", "--out", str(tmp_path), *more])
        likelihood.main(["--ckpt", str(folder), "--num", "20", "--draws", "2", "--ode-steps", "4",
                         "--out", str(tmp_path), *more])
    found, one = json.loads((tmp_path / "metrics.json").read_text()), run.open(folder)
    model, schedule, t_min = invariance.of_run(one.model(), "v", one.config, 1e-3, t_max=0.7)
    expected = samplers.sample(model, (30, 2), 4, target="v", schedule=schedule, t_min=t_min, sampler="ddim",
                               generator=run.generator("cpu", 0, "sample"))
    assert_close(torch.tensor(np.load(tmp_path / "samples.npy")), expected, rtol=1e-5, atol=1e-5)
    assert found["t_max"] == 0.7 and "t_max 0.7" in capsys.readouterr().out
    own, other = (json.loads((tmp_path / f"likelihood-num-20-draws-2-ode-steps-4{end}.json").read_text())
                  for end in ("", "-t-max-0.7"))
    assert own["prior"][0] < 1e-4 and other["prior"][0] > 0.05 and (own["t_max"], other["t_max"]) == (None, 0.7)
    assert kind_points.table_rows(one, found | {"steps": 4})[0]["t_max"] == 0.7


def test_the_likelihood_under_another_schedule(runs, tmp_path, capsys):
    folder = str(runs / "clusters-v-mse-s0")
    common = ["--ckpt", folder, "--num", "20", "--draws", "4", "--ode-steps", "16", "--out", str(tmp_path)]
    for more in [], ["--schedule", "flow"]:
        likelihood.main([*common, *more])
    own, other = (json.loads((tmp_path / f"likelihood-{middle}num-20-draws-4-ode-steps-16{end}.json").read_text())
                  for middle, end in (("", ""), ("", "-under-flow")))
    for key in "prior", "reconstruction", "diffusion", "bound":
        assert own[key] == pytest.approx(other[key], rel=1e-6)
    assert 0 < abs(own["exact"][0] - other["exact"][0]) < 0.02                       # of Runge-Kutta steps
    assert own["under"] is None and other["under"] == "flow"
    discrete = ["--steps", "8", "--num-ode", "0"]
    for more in [], ["--schedule", "ve"]:
        likelihood.main([*common, *discrete, *more])
    assert len(list(tmp_path.glob("likelihood-*steps-8*.json"))) == 2
    capsys.readouterr()


def test_images_under_another_schedule():
    config = dict(schedule="cosine", target="v", stabiliser=0.0, loss="mse", precision="fp32", timesteps=None)
    model = lambda z, t: 0.3 * z
    draw = lambda under, grid="logsnr", **how: draw_images.draw(
        model, (2, 1, 3, 3), 5, config, torch.Generator().manual_seed(1), 1e-3, under=under, sampler="ddim", grid=grid,
        **how)
    levels = [draw(under).int() for under in (None, "ve", "flow")]
    assert levels[0].float().std() > 10 and all((level - levels[0]).abs().max() <= 1 for level in levels)
    assert (draw("ve", "t").int() - draw(None, "t").int()).abs().max() > 1
    assert (draw(None, "t", t_max=0.6).int() - draw(None, "t").int()).abs().max() > 1


@pytest.mark.parametrize("config, name, message", [
    (dict(schedule="cosine"), "foo", "unknown schedule 'foo': choose from cosine, linear"),
    (dict(schedule="ddpm", timesteps=10), "ve", "the times of a chain alone - leave out --schedule"),
    (dict(schedule="cosine", sigma=0.1), "ve", "has no t, and so no schedule - leave out")])
def test_what_cannot_be_used_says_so(config, name, message):
    with pytest.raises(ValueError, match=message):
        invariance.of_run(None, "v", config | {"stabiliser": 0.0}, 1e-3, name)
    invariance.check(config, None)
    if name != "foo":
        with pytest.raises(ValueError, match=message):
            invariance.of_run(None, "v", config | {"stabiliser": 0.0}, 1e-3, t_max=0.9)


def test_scripts_refuse_in_a_sentence(tmp_path, capsys):
    train.main(["--data", "clusters", "--target", "eps", "--schedule", "ddpm", "--timesteps", "10", "--epochs", "1",
                "--batch-size", "25000", "--width", "8", "--device", "cpu", "--out", str(tmp_path)])
    folder = str(tmp_path / "clusters-eps-mse-s0")
    for script in sample, likelihood:
        with pytest.raises(SystemExit, match=f"^{folder}: its network knows the times of a chain alone - leave"):
            script.main(["--ckpt", folder, "--schedule", "ve"])
        with pytest.raises(SystemExit, match=f"^{folder}: its network knows the times of a chain alone - leave"):
            script.main(["--ckpt", folder, "--t-max", "0.9"])
        with pytest.raises(SystemExit) as stop:
            script.main(["--schedule", "foo"])
        assert stop.value.code == 2 and "invalid choice: 'foo'" in capsys.readouterr().err
    for script, line, message in (
            (sample, "--sampler langevin --schedule ve", "--schedule is for --sampler ancestral or ddim"),
            (sample, "--grid rescaled --schedule ve", "is a chain of its own - leave out --schedule"),
            (sample, "--sampler langevin --t-max 0.9", "--t-max is for --sampler ancestral or ddim"),
            (sample, "--grid rescaled --t-max 0.9", "is a chain of its own - leave out --schedule and --t-max"),
            (sample, "--t-max 0.4", "must be in [0.5, 0.999999]"),
            (likelihood, "--chains 10 --t-max 0.9", "--chains are of the schedule of training"),
            (likelihood, "--chains 10 --schedule ve", "--chains are of the schedule of training")):
        with pytest.raises(SystemExit) as stop:
            script.main(line.split())
        assert stop.value.code == 2 and message in capsys.readouterr().err


def test_the_script_shows_one_bound(capsys):
    runpy.run_path(invariance.__file__, run_name="__main__")
    lines = [line.split() for line in capsys.readouterr().out.splitlines()[2:]]
    assert [line[0] for line in lines] == list(SCHEDULES)
    for line in lines:
        assert abs(float(line[1]) - 7.131) < 0.15 and float(line[-1]) < 1e-10
    spread = {line[0]: float(line[3]) for line in lines}                 # std over mean, by quadrature elsewhere
    for name, expected in dict(cosine=4.31, linear=6.93, ve=1.81, flow=3.51, edm=3.11).items():
        assert spread[name] == pytest.approx(expected, rel=0.06)
