"""The results of the slides: formulas in float64 against others, then all of them from a small study."""
import json
import math
from types import SimpleNamespace

import pytest
import torch
from conftest import Narrow, cells
from torch.testing import assert_close

import ddpm
import discrete
import kind_points
import optimum
import plots
import reproduce
import reproduce_energies
import reproduce_frozen
import reproduce_latent
import reproduce_latent_images
import reproduce_modes
import reproduce_scores
import reproduce_slides
import run
from datasets2d import DATASETS, GaussianMixture

F64 = torch.float64
CACHES = (optimum.optimal_predictions, optimum.optimal_errors, optimum.optimal_bound, optimum.test_scores,
          kind_points.floors, discrete.chain, reproduce_slides.of_objectives, reproduce_modes.of_exact,
          reproduce_scores.points_of_levels, reproduce_scores.exact_samples, reproduce_frozen.of_frozen)


OWN = [name for name in reproduce_slides.RESULTS              # those of latents are in test_holes.py
       if name not in {**reproduce_latent.RESULTS, **reproduce_latent_images.RESULTS}]


def points(n, seed=0):
    return torch.randn(n, 2, generator=torch.Generator().manual_seed(seed), dtype=F64)


# Objectives of one wrong score

def test_objectives_without_their_constants_are_the_fisher_divergence_without_its_own():
    """Within 4.5 standard errors of paired terms; the constant is an integral of |score|^2 by another estimate."""
    found = reproduce_slides.of_objectives(20_000)
    for (name, sigma), (terms, expected) in found.items():
        difference = terms - expected
        assert abs(difference.mean()) < 4.5 * difference.std() / len(terms)**0.5 + 1e-12, (name, sigma)
    again = reproduce_slides.of_objectives(20_000)["exact", 0.0]
    data, g = DATASETS["clusters"], torch.Generator().manual_seed(1)
    x = data.sample(20_000, g, F64).requires_grad_()
    s = reproduce_slides.wrong(x)
    trace = sum(torch.autograd.grad(s[:, d].sum(), x, retain_graph=True)[0][:, d] for d in range(2))
    exact = 0.5 * (s**2).sum(1) + trace                                                    # other points
    assert abs(again[0].mean() - exact.mean()) < 4.5 * (2 * exact.var() / 20_000)**0.5


def test_the_wrong_score_is_one():
    """It has a curl, and its Fisher divergence is far from 0."""
    z = points(3000)
    assert reproduce_energies.relative_curl(reproduce_slides.bend, z) > 0.3
    truth = DATASETS["clusters"].score(z)
    assert (reproduce_slides.wrong(z) - truth).square().sum(1).mean() > 1
    assert_close(reproduce_slides.wrong(z, 0.3), 0.7 * DATASETS["clusters"].score(z, 1.0, 0.3)
                 + 0.5 * torch.stack([(2 * z[:, 0]).sin() + z[:, 1], z.sum(1).cos()], 1))


def test_standard_errors_and_cost_of_the_table(monkeypatch):
    terms = torch.stack([torch.tensor([1.0, 3.0]).double(), torch.tensor([1.0, 1.0]).double()])
    monkeypatch.setattr(reproduce_slides, "of_objectives", lambda: {("exact", 0.0): terms})
    row = reproduce_slides.objectives(None)[2].strip("| ").split(" | ")
    assert row == ["exact", "0.0", "2.000 +- 1.000", "1.000", "1.000 +- 1.000", "0.000", f"{(2 / 1000)**0.5:.3f}", "3",
                   f"{3 * 2 / 0.01:.2g}"]


# Scores of networks at a noise level

@pytest.mark.parametrize("schedule", ["cosine", "ve", "flow"])
@pytest.mark.parametrize("target", ["eps", "v", "x", "s"])
def test_any_network_as_the_score_of_a_noise_level(schedule, target):
    """The exact network of any target and schedule gives the score of x + s eps."""
    data, y = DATASETS["rings"], points(40)
    score = reproduce_scores.of_level(data.optimal_model(target, ddpm.SCHEDULES[schedule]), target,
                                      ddpm.SCHEDULES[schedule])
    for s in 0.05, 0.4, 2.0:
        assert_close(score(y, s), data.score(y, 1.0, s), rtol=1e-6, atol=1e-6)


def test_noise_levels_are_those_of_schedule_ve():
    t = torch.linspace(1, 0, 50, dtype=F64)
    assert_close(reproduce_scores.SIGMAS.double(), ddpm.SCHEDULES["ve"].sigma(t), rtol=1e-6, atol=0)


# Two modes

def test_the_larger_mode_and_the_square_around_both():
    large = torch.tensor([[5.0, 5.0]])
    of = lambda x: (x - 3) / 17**0.5                       # standardised: the mean is 3, the variance 16 + 1
    x = of(torch.cat([large, -large, torch.tensor([[0.1, 0.0], [-0.1, 0.0]])]))
    assert reproduce_modes.in_large(x).tolist() == [1, 0, 1, 0]
    x = reproduce_modes.square(20_000, torch.Generator().manual_seed(0)) * 17**0.5 + 3
    assert x.abs().max() < 8.001 and abs(x.mean()) < 0.1 and x.abs().amin(0).max() < 0.1 and x.abs().max() > 7.99
    share, error = reproduce_modes.with_error(torch.tensor([1.0, 1, 1, 0]))
    assert share == 0.75 and error == pytest.approx((0.75 * 0.25 / 4)**0.5)


def test_errors_of_a_score_by_distance():
    """A score that is off by 3 everywhere; the true one of one mode is its distance over its standard deviation."""
    data = reproduce_modes.DATA
    off = lambda z, s: data.score(z.double()) + torch.tensor([0.0, 3.0])
    found = reproduce_modes.errors(off, 0.0, 61)
    assert found["error"] == pytest.approx([3.0] * reproduce_modes.DISTANCE_BINS, rel=1e-3)
    assert torch.tensor(found["map"]).shape == (61, 61)
    std = data.std[0].item()
    for k in range(3):
        assert k / std < found["truth"][k] < (k + 1) / std


def test_the_weights_change_the_score_less_than_the_density():
    fisher, kl = reproduce_modes.divergences(20_000)
    assert fisher < 1e-10 and abs(kl - (0.8 * math.log(1.6) + 0.2 * math.log(0.4))) < 0.02


# Frozen at one noise level

def test_p_squared_over_the_standard_normal_of_a_gaussian():
    """By quadrature; of the update's own steps the recursion of the variance, to its end."""
    line = torch.linspace(-8, 8, 4001, dtype=F64)
    for v in 0.1, 0.6, 1.0:
        log = 2 * (-line**2 / (2 * v)) + line**2 / 2
        density = log.softmax(0)
        assert reproduce_frozen.stationary(v) == pytest.approx((density * line**2).sum().item(), rel=1e-6)
        var, beta = 0.5, 0.01
        for _ in range(20_000):
            var = (1 + beta * (-1 / v + 0.5))**2 * var + beta
        assert reproduce_frozen.stationary_of_update(v, beta) == pytest.approx(var, rel=1e-9)


def test_axis_of_the_law_has_the_moments_of_a_gaussian():
    gaussian = GaussianMixture(torch.zeros(1, 2, dtype=F64), torch.full((2,), 0.5, dtype=F64))
    line, p, law = reproduce_frozen.axis_of_law(gaussian, 0.8, 0.6)
    v, width = 0.16 + 0.36, line[1] - line[0]
    for density, var in (p, v), (law, v / (2 - v)):
        assert (density.sum() * width).item() == pytest.approx(1, abs=1e-9)
        assert ((density * line**2).sum() * width).item() == pytest.approx(var, rel=1e-6)


def test_the_frozen_update_and_langevin_dynamics_of_it(monkeypatch):
    """Of a linear score 200 steps are the recursion of the mean, whose noise many chains average away."""
    monkeypatch.setattr(reproduce_frozen, "STEPS", 3)
    score, beta = lambda x: -2 * x, 0.05
    x = torch.full((200_000, 2), 4.0, dtype=F64)
    for update, slope, noise in (True, 1 + beta * (-2 + 0.5), beta), (False, 1 - 2 * beta, 2 * beta):
        end = reproduce_frozen.simulated(score, x, beta, torch.Generator().manual_seed(0), update)
        assert abs(end.mean() - 4 * slope**3) < 4 * end.std() / 400_000**0.5
        assert end.var().item() == pytest.approx(noise * (1 + slope**2 + slope**4), rel=0.01)


def test_coefficients_of_a_step_of_the_chain():
    alpha, sigma, beta = reproduce_frozen.alpha_sigma_beta(300)
    t = torch.tensor(0.3, dtype=F64)
    assert alpha == pytest.approx(ddpm.SCHEDULES["ddpm"].alpha(t).item(), rel=1e-9)
    assert sigma == pytest.approx(ddpm.SCHEDULES["ddpm"].sigma(t).item(), rel=1e-9)
    assert beta == pytest.approx(1e-4 + 299 * (0.02 - 1e-4) / 999, rel=1e-9)


# Energies

def test_curl_of_a_gradient_a_rotation_and_a_shear():
    z, energy = points(50), lambda z: torch.stack([z[:, 0]**3 * z[:, 1], z[:, 0]**4 / 4], 1)
    assert reproduce_energies.relative_curl(energy, z) < 1e-12
    rotation = lambda z: torch.stack([z[:, 1], -z[:, 0]], 1)                    # entries 0, 1, -1, 0 and curl 2
    assert reproduce_energies.relative_curl(rotation, z) == pytest.approx(2 / 0.5**0.5)
    shear = lambda z: torch.stack([3 * z[:, 0] + 4 * z[:, 1], z[:, 1]], 1)      # 3, 4, 0, 1 and curl 4
    assert reproduce_energies.relative_curl(shear, z) == pytest.approx(4 / (26 / 4)**0.5)


def test_of_the_exact_energy_nothing_is_wrong(monkeypatch):
    """A run whose network is exact: no curl, E + log p is a constant, the flow has the entropy's likelihood."""
    monkeypatch.setattr(reproduce_energies, "FLOW_POINTS", 40)
    data, schedule = DATASETS["clusters"], ddpm.SCHEDULES["cosine"]

    class Exact(torch.nn.Module):
        def forward(self, z, t):
            return data.optimal_model("eps", schedule)(z, t)

        def energy(self, z, t):
            return 3 - data.log_prob(z, schedule.alpha(t), schedule.sigma(t))
    one = SimpleNamespace(model=Exact, config=dict(data="clusters", energy=True, stabiliser=0.0), target="eps",
                          schedule=schedule)
    found = reproduce_energies.of_run(one)
    assert max(found["curl"]) < 1e-5 and max(found["nats"]) < 1e-4 and len(found["nats"]) == 3
    assert abs(found["flow"][0]) < 0.01


# All of them from a small study

@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """All results with two seeds, one epoch of a narrow network on 2,500 points, few chains and steps."""
    folder, patch = tmp_path_factory.mktemp("slides"), pytest.MonkeyPatch()
    clear = lambda: [cache.cache_clear() for cache in CACHES]
    clear()

    for owner, name, value in [
            (kind_points, "POINTS", 2500), (kind_points, "MLP", Narrow),
            (plots, "DPI", 30), (reproduce_energies, "ODE_STEPS", 2), (reproduce_energies, "FLOW_POINTS", 20),
            (reproduce_slides, "POINTS", 10_000), (reproduce_slides, "DIMENSIONS", (2, 8)),
            (reproduce_scores, "FOUR", ("clusters",)), (reproduce_scores, "TESTED", 500),
            (reproduce_scores, "PLAIN", 4), (reproduce_scores, "ANNEALED", 50), (reproduce_scores, "DRAWN", [
                (*row[:5], min(row[5], 50)) for row in reproduce_scores.DRAWN]),
            (reproduce_scores.trained, "__defaults__", ("s", ("clusters",))),
            (reproduce_modes, "SAMPLES", 500), (reproduce_modes, "CHAINS", 20),
            (reproduce_modes, "WATCHED", (0, 1000, 10_000)),
            (reproduce_modes, "TOTALS", (50, 1000, 10_000)), (reproduce_modes, "of_exact", lambda: {
                "langevin": {start: {str(steps): (0.5, 0.1) for steps in (0, 1000, 10_000)}
                             for start in reproduce_modes.STARTS},
                "annealed": {str(total): (0.8, 0.1) for total in (50, 1000, 10_000)}, "ancestral": (0.8, 0.1)}),
            (reproduce_modes, "plain", lambda score, seed: {start: {str(steps): (0.5 + seed / 10, 0.1) for steps in (
                0, 1000, 10_000)} for start in reproduce_modes.STARTS}),
            (reproduce_modes, "annealed", lambda score, seed: {str(total): (0.7 + seed / 10, 0.1) for total in (
                50, 1000, 10_000)}),
            (reproduce_frozen, "STEPS", 5), (reproduce_frozen, "COPIES", 100),
            (reproduce_energies, "SETS", ("clusters",)), (reproduce_energies, "SAMPLE_STEPS", 3)]:
        patch.setattr(owner, name, value)
    call = lambda name, *more: reproduce.main([name, "--seeds", "2", "--epochs", "1", "--num-samples", "2000", *more,
                                               "--device", "cpu", "--runs", str(folder / "runs"),
                                               "--out", str(folder / "results")])
    for name in OWN:
        call(name)
    yield folder, call
    patch.undo()
    clear()


def table(folder, name):
    text = (folder / "results/slides" / f"{name}.md").read_text()
    return cells(text.splitlines())


def test_every_table_and_figure_is_there(made):
    folder, _ = made
    for name in OWN:
        ending = "md" if name in reproduce_slides.TABLES else "png"
        assert (folder / "results/slides" / f"{name}.{ending}").stat().st_size > 300
    for name in set(OWN) & set(reproduce_slides.TABLES):
        assert len({len(row) for row in table(folder, name) if row[0] != "---"}) <= 1 + (name == "modes")


def test_scores_are_compared_at_their_own_level_alone(made):
    folder, _ = made
    rows = {row[1]: row[2:] for row in table(folder, "scores")}
    assert rows["exact"][1:] == rows["sliced"][1:] == ["-"] * 3
    assert [value == "-" for value in rows["denoising"]] == [True, False, True, True]
    assert all("+-" in value for name in ("multi-scale", "multi-scale, eps", "eps", "v") for value in rows[name])
    one, data = run.open(folder / "runs/silu-1-epochs/clusters-v-mse-s0"), DATASETS["clusters"]
    found = json.loads((one.folder / "divergences.json").read_text())
    x = kind_points.load(one.config)[:500]
    eps = torch.randn(500, 2, generator=run.generator("cpu", "levels"), dtype=F64)
    y, alpha = x + 0.3 * eps, 1 / (1 + 0.3**2)**0.5
    t = torch.full((500,), math.atan(0.3) * 2 / math.pi)                        # cosine: sigma / alpha = tan(pi t / 2)
    z = alpha * y.float()
    score = -(0.3 * alpha * z + alpha * one.model()(z, t)) / 0.3                # eps_hat = sigma z + alpha v
    assert found["0.3"] == pytest.approx(
        (0.5 * (score - data.score(y, 1.0, 0.3)).square().sum(1)).mean().item(), rel=1e-4)


def test_modes_and_energies_have_the_numbers_of_their_runs(made):
    folder, _ = made
    rows = {tuple(row[:2]): row[2:] for row in table(folder, "modes")}
    assert rows["exact", "Langevin from square"] == ["0.550 +- 0.071"] * 3
    assert rows["multi-scale", "annealed"] == ["-", "0.750 +- 0.071", "0.750 +- 0.071"]
    ancestral = [json.loads(path.read_text())["ancestral"] for path in folder.glob(
        "runs/silu-1-epochs/unequal-eps-mse-s*/modes.json")]
    assert float(rows["eps", "ancestral, 128 steps"][1].split()[0]) == pytest.approx(
        sum(share for share, _ in ancestral) / 2, abs=1e-3)
    rows = {row[1]: row[2:] for row in table(folder, "energies")}
    assert rows["plain"][:3] == ["-"] * 3 and all("+-" in value for value in rows["energy"][:3])
    assert all(float(value) < 1e-4 for value in rows["energy"][3:6])
    assert all(float(value) > 1e-4 for value in rows["plain"][3:6])
    one = run.open(folder / "runs/energy-1-epochs/clusters-eps-mse-s1")
    x = kind_points.load(one.config)[:5000]
    z = math.cos(0.05 * math.pi) * x + math.sin(0.05 * math.pi) * torch.randn(
        x.shape, generator=run.generator("cpu", "energies", 0.1))
    log_p = DATASETS["clusters"].log_prob(z.double(), math.cos(0.05 * math.pi), math.sin(0.05 * math.pi))
    spread = (one.model().energy(z, torch.full((len(z),), 0.1)) + log_p).std().item()
    assert json.loads((one.folder / "energy.json").read_text())["nats"][1] == pytest.approx(spread, rel=1e-3)


@pytest.mark.parametrize("name", ["scores", "score-samples", "modes", "energies"])
def test_recorded_tables_are_the_same_without_a_network(made, monkeypatch, name):
    folder, call = made
    before = table(folder, name)
    monkeypatch.setattr(run.Run, "model", lambda *args, **kw: pytest.fail("a network was asked for"))
    call(name, "--recorded")
    assert table(folder, name) == before
