"""Scores without t, many noise levels and energies through all scripts: train, test columns, resume, samples, mistakes.

The objectives are typed a second time here, with Jacobians by torch.autograd.functional, in float64.
"""
import copy
import json
import re

import numpy as np
import pytest
import torch
from torch.testing import assert_close

import ddpm
import kind_points
import langevin
import likelihood
import losses
import optimum
import run
import sample
import samplers
import score_matching
import settings
import stack
import train
import train_points
from datasets2d import DATASETS
from energy import Energy

FAST = "--data clusters --width 8 --epochs 2 --batch-size 500 --device cpu --target s".split()
CACHED = (optimum.optimal_predictions, optimum.optimal_errors, optimum.optimal_bound, optimum.test_scores,
          kind_points.floors)
F64 = torch.float64


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


def jacobians(score, x):
    """(B, D, D) of a function that treats rows alike."""
    x = x.clone().requires_grad_()
    return torch.stack([torch.autograd.grad(score(x)[:, d].sum(), x, create_graph=True)[0] for d in range(2)], 1)


def directions(eps):
    """Of the sliced loss: the noise of the row before."""
    u = torch.cat([eps[-1:], eps[:-1]])
    return u / (u**2).sum(1, keepdim=True).sqrt()


def by_hand(loss, sigma, score, x, eps, u):
    """Per dimension: (B,)."""
    z = x + sigma * eps
    if loss == "denoising":
        return 0.5 * ((score(z) + eps / sigma)**2).mean(1)
    J, half_square = jacobians(score, z), 0.5 * (score(z)**2).sum(1)
    if loss == "exact":
        return (half_square + J[:, 0, 0] + J[:, 1, 1]) / 2
    return torch.einsum("bi,bij,bj->b", u, J, u) + half_square / 2


@pytest.fixture
def drawn(monkeypatch):
    """Every (x, t, eps) that the regression is asked for."""
    calls, original = [], losses.regression
    monkeypatch.setattr(losses, "regression", lambda *draws, **kw: calls.append(draws) or original(*draws, **kw))
    return calls


@pytest.mark.parametrize("words", ["--loss exact", "--loss exact --sigma 0.3", "--loss sliced",
                                   "--loss sliced --energy --sigma 0.2", "--loss denoising --sigma 0.5",
                                   "--loss denoising --energy"])
def test_an_epoch_of_a_stack_by_hand(words, drawn):
    """Losses, gradients and their norms of two members, each alone by autograd's Jacobians."""
    configs = [settings.configs(train.parse([*FAST, *words.split(), "--data", data, "--batch-size", "50",
                                             "--lr", "0.01"]))[0] for data in ("clusters", "waves")]
    loss, sigma = configs[0]["loss"], configs[0]["sigma"]
    torch.manual_seed(0)
    alone = [kind_points.build_model(config) for config in configs]
    together = kind_points.build_model(configs[0], 2)
    together.load_state_dict(stack.join([model.state_dict() for model in alone]))
    points = [DATASETS[config["data"]].sample(110, torch.Generator().manual_seed(5)) for config in configs]
    optimizer = torch.optim.SGD(together.parameters(), lr=1.0)
    step = train_points.build_step(together, optimizer, 2, loss=loss)
    found, _, norms = train_points.train_epoch(step, optimizer, points, 0, configs)
    assert found.shape == norms.shape == (2, 2) and len(drawn) == 2
    for m, (model, (x, _, eps)) in enumerate(zip(alone, drawn)):
        model = copy.deepcopy(model).double()
        score = lambda z: model(z, z[:, 0])                                                  # noqa: B023
        for i in range(2):
            part = slice(50 * i, 50 * i + 50)
            mean = by_hand(loss, sigma, score, *(c[part].double() for c in (x, eps, directions(eps)))).mean()
            parameters = [p for name, p in model.named_parameters() if name != "network.biases.6"]
            gradient = torch.autograd.grad(mean, parameters)                # without the constant of an energy
            assert_close(found[i, m].double(), mean.detach(), rtol=2e-4, atol=1e-5)
            assert_close(norms[i, m].double(), sum((g**2).sum() for g in gradient).sqrt(), rtol=2e-4, atol=1e-6)
            rate = 0.01 * 0.5 * (1 + np.cos(np.pi * i / 4))
            with torch.no_grad():
                for p, g in zip(parameters, gradient):
                    p -= rate * g
        for name, value in stack.member(together.state_dict(), m).items():
            assert_close(value.double(), model.state_dict()[name], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("loss, sigma", [("exact", 0.0), ("sliced", 0.2), ("denoising", 0.2)])
def test_test_columns_by_hand(loss, sigma, monkeypatch):
    """test_loss, the optimum on the same points and the Fisher divergence per dimension, of every member."""
    monkeypatch.setattr(kind_points, "POINTS", 1250)
    optimum.test_scores.cache_clear()
    configs = [settings.configs(train.parse([*FAST, "--loss", loss, "--sigma", str(sigma), "--data", data,
                                             "--activation", "silu"]))[0] for data in ("clusters", "unequal")]
    torch.manual_seed(1)
    model, draws = kind_points.build_model(configs[0], 2), []
    original = losses.regression
    monkeypatch.setattr(losses, "regression", lambda *given, **kw: draws.append(given) or original(*given, **kw))
    test, optima = optimum.ready(configs, "cpu")
    found = test(model)
    assert found.shape == (2, 2) and optimum.tests(configs[0]) == ("fisher",)
    for m, config in enumerate(configs):
        alone = kind_points.build_model(config).double()
        alone.load_state_dict({key: value.double() for key, value in stack.member(model.state_dict(), m).items()})
        x, _, eps = (c.double() for c in draws[m])
        z, data = x + sigma * eps, DATASETS[config["data"]]
        var = data.std**2 + sigma**2                       # the true score, typed again
        offsets = data.centres - z[:, None]
        share = (-0.5 * (offsets**2 / var).sum(2)).softmax(1)
        truth = (share[..., None] * offsets / var).sum(1)
        of_mixture = lambda z: data.score(z, 1.0, sigma)                                     # noqa: B023
        of_network = lambda z: alone(z, z[:, 0])                                             # noqa: B023
        for score, result in (of_network, found[m]), (of_mixture, torch.tensor(optima[m])):
            assert_close(result[0].double(), by_hand(loss, sigma, score, x, eps, directions(eps)).mean().detach(),
                         rtol=1e-4, atol=1e-5)
            assert_close(result[1].double(), 0.5 * ((score(z) - truth)**2).mean().detach(), rtol=1e-4, atol=1e-6)
    optimum.test_scores.cache_clear()


def test_the_theorem_in_the_columns():
    """Eq. (3.36), (3.44): loss minus optimum is the Fisher divergence, within its Monte Carlo error."""
    for loss, sigma in (("exact", 0.3), ("denoising", 0.3)):
        config, = settings.configs(train.parse([*FAST, "--loss", loss, "--sigma", str(sigma), "--activation", "silu"]))
        torch.manual_seed(3)
        test, ((best, zero),) = optimum.ready([config], "cpu")
        (value, fisher), = test(kind_points.build_model(config)).tolist()
        assert zero == 0.0 and abs(value - best - fisher) < 0.1 * fisher


def test_what_follows_from_a_loss():
    parse = lambda words: train.parse([*FAST, *words.split()])
    assert parse("--loss exact").sigma == 0.0 and parse("--loss sliced").activation == "silu"
    assert parse("--loss exact denoising").sigma == 0.1 and parse("--loss denoising").activation == "relu"
    assert parse("--loss denoising --energy").activation == "silu" and parse("--loss mse").sigma is None
    args = parse("--loss multi_scale")
    assert (args.timesteps, args.schedule, args.t_min, args.sigma) == (50, "ve", 0.0, None)
    assert parse("--loss multi_scale --timesteps 7 --schedule cosine").timesteps == 7
    assert parse("--loss mse multi_scale --timesteps 7 --schedule cosine").schedule == "cosine"
    exact, = settings.configs(parse("--loss exact"))
    assert kind_points.build_model(exact).weights[0].shape == (1, 8, 2)                 # no t
    assert kind_points.build_model(settings.configs(args)[0]).schedule is ddpm.SCHEDULES["ve"]
    assert settings.alike(exact)["loss"] == "exact" and "target" not in settings.alike(exact)
    energy, = settings.configs(parse("--loss mse --energy"))
    assert kind_points.build_model(energy).network.weights[-1].shape == (1, 1, 8)       # one output
    assert settings.alike(energy)["target"] == "s" and "loss" not in settings.alike(energy)


@pytest.mark.parametrize("words, sentence", [
    ("--loss exact --target eps", "--loss exact trains a score - take --target s"),
    ("--loss denoising --sigma 0", "--loss denoising needs a noise level above 0 - take --sigma 0.1"),
    ("--loss exact --timesteps 10", "does not use --timesteps - leave it out"),
    ("--loss sliced --schedule ve --stabiliser 1", "does not use --schedule, --stabiliser - leave it out"),
    ("--loss exact --t-min 0.1", "does not use --t-min - leave it out"),
    ("--loss mse exact", "--loss exact has no t and the others have: give them a call each"),
    ("--loss mse multi_scale --timesteps 5", "give it its own call"),
    ("--loss mse multi_scale", "give it its own call, or say these for all"),
    ("--loss mse --sigma 0.1", "mse has many noise levels - leave it out"),
    ("--loss exact --activation relu", "ReLU has no second derivative"),
    ("--loss mse --energy --activation relu", "take --activation silu"),
    ("--loss mse --energy --target v", "it is for --target s or eps"),
    ("--loss hybrid --energy --timesteps 9 --variance range", "no learned variance"),
    ("--loss mse --energy --stabiliser 0.01", "which --stabiliser changes - leave one out"),
    ("--loss exact --sigma -1", "in [0"),
    ("--loss exact --data mnist", "of an image of D numbers exact takes D backward passes"),
    ("--loss mse --energy --data mnist", "--energy is a setting of points, not of images"),
])
def test_settings_that_do_not_go_together(words, sentence, capsys):
    with pytest.raises(SystemExit) as error:
        train.parse([*FAST, *words.split()] if "mnist" not in words else ["--target", "s", *words.split()])
    assert error.value.code == 2 and sentence in capsys.readouterr().err


def test_multi_scale_is_the_sum_over_levels():
    """Eq. (3.45) with weights sigma_i^2, divided by D, on the geometric levels of schedule ve."""
    config, = settings.configs(train.parse([*FAST, "--loss", "multi_scale", "--timesteps", "6"]))
    chain, g = losses.chain_of(config), torch.Generator().manual_seed(0)
    x, eps, i = (torch.randn(40, 2, generator=g, dtype=F64), torch.randn(40, 2, generator=g, dtype=F64),
                 torch.randint(6, (40,), generator=g))
    sigmas = 0.01 * 5000**(torch.arange(1, 7, dtype=F64) / 6)
    t = chain.times[i + 1]
    z, y, w = losses.regression(x, t, eps, **losses.objective(config))
    assert_close(z, x + sigmas[i][:, None] * eps)
    field = lambda z, i: torch.sin(z) * sigmas[i][:, None]
    found = losses.weighted_error(field(z, i), y, w)
    assert_close(found, score_matching.multi_scale(field, x, eps, i, sigmas) / 2)
    assert_close(found, sigmas[i]**2 * 0.5 * ((field(z, i) + eps / sigmas[i][:, None])**2).mean(1))


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Small trained runs, one of each kind: {name: folder}."""
    root = tmp_path_factory.mktemp("runs")
    for name, words in {"exact": "--loss exact", "denoising": "--loss denoising --sigma 0.3 --energy",
                        "levels": "--loss multi_scale --timesteps 10", "eps": "--loss mse --target eps --energy",
                        "plain": "--loss mse --target v"}.items():
        train.main([*FAST, *words.split(), "--out", str(root / name)])
    return {name: next((root / name).glob("clusters-*")) for name in
            ("exact", "denoising", "levels", "eps", "plain")}


def test_training_says_how_to_go_on(tmp_path, capsys):
    train.main([*FAST, "--loss", "exact", "--seeds", "2", "--out", str(tmp_path)])
    said = capsys.readouterr().out
    assert re.search(r"test loss -?\d+\.\d{4} \(best possible -\d+\.\d{4}\), "
                     r"Fisher divergence \d+\.\d{3} \(0\.000\) per dimension", said)
    assert "--steps 512 --sampler langevin" in said
    last = json.loads((tmp_path / "clusters-s-exact-s0" / "metrics.jsonl").read_text().splitlines()[-1])
    assert "train_loss_over_t" not in last and last["test_fisher"] > 0 == last["optimum_fisher"]


def test_the_trace_of_a_large_dimension_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(kind_points, "dimension", lambda config: 4097)
    with pytest.raises(SystemExit, match="--loss exact takes 4,097 backward passes a step - take --loss sliced"):
        train.main([*FAST, "--loss", "exact", "--out", str(tmp_path)])
    assert not list(tmp_path.iterdir())


def test_a_killed_run_goes_on_exactly(tmp_path, interrupted):
    words = [*FAST, "--loss", "sliced", "--seeds", "2"]
    train.main([*words, "--out", str(tmp_path / "whole")])
    interrupted(lambda: train.main([*words, "--out", str(tmp_path / "killed")]))
    train.main([*words, "--out", str(tmp_path / "killed"), "--resume"])
    whole, killed = ({path.name: run.load(path)["model"] for path in (tmp_path / name).iterdir()}
                     for name in ("whole", "killed"))
    assert len(whole) == 2
    for name, state in whole.items():
        for key, value in state.items():
            assert torch.equal(value, killed[name][key])


def test_langevin_samples_of_a_run(runs, tmp_path, capsys):
    """sample.py draws what Algorithm 1 gives with the run's score, from N(0, I)."""
    how = "--sampler langevin --steps 7 --step-size 0.01 --num-samples 40 --seed 3".split()
    sample.main(["--ckpt", str(runs["exact"]), *how, "--out", str(tmp_path)])
    result = json.loads((tmp_path / "metrics.json").read_text())
    assert result["sampler"] == "langevin" and result["step_size"] == 0.01 and "grid" not in result
    one, g = run.open(runs["exact"]), run.generator("cpu", 3, "sample")
    model, x = one.model(), torch.randn(40, 2, generator=g)
    for _ in range(7):
        x = x + 0.01 * model(x, torch.zeros(40)) + 0.02**0.5 * torch.randn(40, 2, generator=g)
    assert_close(torch.from_numpy(np.load(tmp_path / "samples.npy")), x, rtol=1e-4, atol=1e-4)
    pair = kind_points.draw(run.Stack([one, one]), 7, 40, 3, sampler="langevin", step_size=0.01)
    assert_close(pair, torch.stack([x, x]), rtol=1e-4, atol=1e-4)


def test_metropolis_samples_of_an_energy(runs, tmp_path, monkeypatch):
    """Of an energy that refuses some steps, 2.5 |z|^2 beside what the run has learned."""
    learned = Energy.energy
    monkeypatch.setattr(Energy, "energy", lambda self, z, t: learned(self, z, t) + 2.5 * z.square().sum(1))
    one = run.open(runs["denoising"])
    sample.main(["--ckpt", str(runs["denoising"]), *"--sampler langevin --steps 9 --step-size 0.2 --num-samples 50 "
                 "--metropolis".split(), "--out", str(tmp_path)])
    model, g = one.model(), run.generator("cpu", 0, "sample")
    x = langevin.langevin(lambda x: model(x, x[:, 0]), torch.randn(50, 2, generator=g), 0.2, 9, g,
                          lambda x: -model.energy(x, x[:, 0]))
    assert_close(torch.from_numpy(np.load(tmp_path / "samples.npy")), x.detach(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name, words, sentence", [
    ("exact", "", "its score has no t, and so no likelihood - draw samples, with --sampler langevin"),
    ("plain", "--sampler langevin", "take --sampler annealed"),
    ("exact", "--sampler langevin --metropolis", "train with --energy"),
])
def test_runs_that_a_sampler_cannot_take(name, words, sentence, runs, tmp_path):
    with pytest.raises(SystemExit, match=re.escape(sentence)):
        sample.main(["--ckpt", str(runs[name]), "--num-samples", "20", "--out", str(tmp_path), *words.split()])
    assert not (tmp_path / "metrics.json").exists()


def test_steps_that_are_too_large(runs, tmp_path, monkeypatch):
    monkeypatch.setattr(langevin, "update", lambda x, *of: 1e30 * x)
    with pytest.raises(SystemExit, match="not finite from step 2 of 6 on - take a smaller step than 0.05"):
        sample.main(["--ckpt", str(runs["exact"]), "--sampler", "langevin", "--step-size", "0.05", "--steps", "6",
                     "--num-samples", "20", "--out", str(tmp_path)])
    assert not (tmp_path / "metrics.json").exists()


@pytest.mark.parametrize("words, sentence", [
    ("--step-size 1", "--step-size is for --sampler langevin or annealed"),
    ("--sampler langevin --grid t", "langevin has none"), ("--steps-per-level 3", "is for --sampler annealed"),
    ("--sampler annealed --metropolis", "--metropolis is for --sampler langevin"),
    ("--sampler langevin --movie", "langevin has no t"), ("--sampler langevin --t-min 0.1", "langevin has none"),
    ("--sampler annealed --grid rescaled", "needs its slope"),
    ("--sampler annealed --step-size 0", "must be in"),
])
def test_arguments_that_a_sampler_has_not(words, sentence, capsys):
    with pytest.raises(SystemExit) as error:
        sample.main(words.split())
    assert error.value.code == 2 and sentence in capsys.readouterr().err


def test_a_score_without_t_has_no_likelihood(runs, tmp_path):
    with pytest.raises(SystemExit, match="no likelihood"):
        likelihood.main(["--ckpt", str(runs["exact"]), "--num", "4", "--out", str(tmp_path)])


@pytest.mark.parametrize("name", ["levels", "eps"])
def test_many_levels_and_energies_take_every_sampler_and_likelihood(name, runs, tmp_path):
    for sampler in "ancestral", "dpmpp", "annealed":
        sample.main(["--ckpt", str(runs[name]), "--sampler", sampler, "--steps", "10", "--num-samples", "20",
                     "--out", str(tmp_path)])
        assert np.isfinite(np.load(tmp_path / "samples.npy")).all()
        grid = json.loads((tmp_path / "metrics.json").read_text())["grid"]
        assert grid == ("logsnr" if sampler == "annealed" else "t")
    likelihood.main(["--ckpt", str(runs[name]), "--num", "4", "--draws", "2", "--ode-steps", "2",
                     "--out", str(tmp_path)])


def test_what_a_run_opened_in_python_has(runs):
    with pytest.raises(ValueError, match="is no denoiser"):
        run.open(runs["exact"]).denoiser()
    train.main([*FAST, *"--loss multi_scale --timesteps 5 --energy --epochs 1 --out".split(),
                str(runs["exact"].parent.parent / "chain-energy")])
    one = run.open(runs["exact"].parent.parent / "chain-energy" / "clusters-s-multi_scale-s0").model()
    z, t = torch.randn(4, 2, requires_grad=True), torch.full((4,), 0.4)
    slope, = torch.autograd.grad(one.energy(z, t).sum(), z)
    assert_close(one(z, t), -slope)


def test_the_flow_of_an_energy_has_its_own_divergence(runs):
    """Through torch.func, of a network that is itself a gradient: against autograd's Jacobian."""
    one = run.open(runs["eps"])
    model, z, t = one.model().double(), torch.randn(3, 2, dtype=F64), torch.full((3,), 0.4, dtype=F64)
    for row, moment in zip(z, t):
        J = torch.autograd.functional.jacobian(lambda r: model(r[None], moment[None])[0], row)      # noqa: B023
        assert_close(J, J.T) and J.abs().max() > 0
        assert_close(torch.func.jacrev(lambda r: model(r[None], moment[None])[0])(row), J)          # noqa: B023


@pytest.mark.parametrize("schedule", ["cosine", "ve", "flow", "edm"])
def test_annealed_in_the_space_of_x(schedule):
    """Against annealed Langevin dynamics with the exact score of x + sigma eps, the same noise, on any schedule."""
    data, schedule, calls = DATASETS["clusters"], ddpm.SCHEDULES[schedule], []
    optimal = data.optimal_model("v", schedule)
    model = lambda z, t: calls.append(t) or optimal(z, t)
    draw = lambda **options: samplers.sample(
        model, (60, 2), 33, target="v", schedule=schedule, sampler="annealed", grid="logsnr", dtype=F64,
        generator=torch.Generator().manual_seed(1), **options)
    x = draw(step_size=0.2, steps_per_level=8)
    assert len(calls) == samplers.evaluations("annealed", 33, 8) == 33 and draw().shape == (60, 2)
    levels = torch.exp(-0.5 * torch.linspace(*schedule.ends(1e-3), 5, dtype=F64))
    g = torch.Generator().manual_seed(1)
    alpha = schedule.alpha(schedule.t(-2 * levels[0].log()))
    y = (1 + levels[0]**2).sqrt() * torch.randn(60, 2, generator=g, dtype=F64)
    assert alpha > 0
    for level in levels[:-1]:
        for _ in range(8):
            y = y + 0.2 * level**2 * data.score(y, 1.0, level) + (0.4 * level**2).sqrt() * torch.randn(
                60, 2, generator=g, dtype=F64)
    assert_close(x, y + levels[-1]**2 * data.score(y, 1.0, levels[-1]), rtol=1e-5, atol=1e-5)


def test_annealed_ends_at_the_data():
    data, schedule = DATASETS["unequal"], ddpm.SCHEDULES["ve"]
    x = samplers.sample(data.optimal_model("s", schedule), (2000, 2), 600, target="s", schedule=schedule,
                        sampler="annealed", grid="logsnr", generator=torch.Generator().manual_seed(0))
    assert abs((x.sum(1) > -1.2).float().mean() - 0.8) < 0.05
    assert data.log_prob(x).mean() > data.log_prob(data.sample(2000, torch.Generator().manual_seed(1))).mean() - 0.3
