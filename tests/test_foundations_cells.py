"""Each cell and curve of Foundations' tables from numbers that are given, and the bound against closed forms."""
import json
import math
import statistics
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import cells
from torch.testing import assert_close

import ddpm
import discrete
import importance
import kind_images
import plots_chain
import reproduce_foundations
import reproduce_foundations_images
import reproduce_variances
import run
import train
from datasets2d import GaussianMixture

F64 = torch.float64
NORMAL = GaussianMixture(torch.zeros(1, 2).double(), torch.ones(2).double())
ENTROPY = math.log(2 * math.pi * math.e)                         # of NORMAL, in nats


class Given:
    """A study of two seeds whose numbers are 1, 2, 4, ... in the order in which they are asked for."""

    def __init__(self, **args):
        self.args = SimpleNamespace(**dict(seeds=2, epochs=40, recorded=False, num_samples=2000) | args)
        self.asked, self.notes, self.networks = {}, [], {}

    def number(self, *of):
        return self.asked.setdefault(of, 1.5**len(self.asked))

    def trained(self, recipe, losses, data, target, epochs):
        assert epochs == 30 and len(losses) == len(target) == 1
        variance = recipe.removeprefix("chain-").split("-")[2 if recipe.startswith("steps") else 0]
        return {(d, target[0], losses[0], seed): SimpleNamespace(
            recipe=recipe, key=(d, target[0], losses[0], seed), config={"variance": variance, "data": d},
            target=target[0], history=self.history(recipe, losses[0], target[0], seed),
            model=lambda out: self.networks[recipe]) for d in data for seed in range(2)}

    def history(self, *of):
        return [dict(gradient_norms=[self.number(*of, "norm", epoch, k) for k in (0, 1, 2)],
                     test_mean_mse=self.number(*of, "mse", epoch), test_vlb=self.number(*of, "vlb", epoch),
                     optimum_mean_mse=7e-6, optimum_vlb=0.25, optimum=3.0, optimum_loss=4.0) for epoch in (0, 1)]

    def curve(self, runs, key, name):
        return [entry[name] for entry in runs[key].history]

    def measured(self, runs, part, measure):
        return {key: measure(one) for key, one in runs.items()}

    def note(self, recipe, key, **numbers):
        self.notes.append((recipe, key, numbers))

    def sampled(self, runs, steps, sampler="ancestral", grid="t", variance=None):
        return {key: {name: self.number(one.recipe, *key, sampler, steps, grid, variance, name) for name in (
            "mean_distance", "covariance_distance", "sliced_wasserstein", "log_density", "log_density_data")}
            for key, one in runs.items()}

    def likelihoods(self, runs):
        return {key: {name: [self.number(one.recipe, *key, name), 0.1] for name in (
            "bound", "exact", "entropy", "bound gap", "exact gap")} for key, one in runs.items()}


def cell(a, b):
    mean, form = (a + b) / 2, lambda v: ".3f" if (a + b) / 2 < 100 else ".0f" if (a + b) / 2 < 1e6 else ".0e"
    return f"{mean:{form(mean)}} +- {abs(a - b) / 2**0.5:{form(mean)}}"


def three_digits(a, b):
    return f"{(a + b) / 2:.3g} +- {abs(a - b) / 2**0.5:.2g}"


@pytest.fixture
def given(monkeypatch):
    """A Given, of which the bounds and entropies of all networks are numbers, too; datasets clusters and rings."""
    study = Given()
    for module in reproduce_variances, reproduce_foundations:
        monkeypatch.setattr(module, "bound_of_run", lambda one, names: {
            name: (study.number("bound", one.recipe, *one.key, name), 0.01) for name in names})
        monkeypatch.setattr(module, "exact_bound", lambda *of: (study.number("exact", *of), 0.01))
        monkeypatch.setattr(module, "entropy", lambda data: {"clusters": 0.5, "rings": -0.25}[data])
    monkeypatch.setattr(reproduce_variances, "CHAINS", [3])
    return study


# The bound

@pytest.mark.parametrize("name, t_min", [("iddpm", 0.0), ("cosine", 0.2)])
@pytest.mark.parametrize("variance", ["small", "large"])
def test_the_bound_on_gaussian_data_has_a_closed_form(name, t_min, variance):
    """N(0, 1): the denoiser alpha z is off by sigma^2 on the average. cosine: p(x | z_0) comes last."""
    T, schedule, x = 6, ddpm.SCHEDULES[name], torch.randn(100_000, 2, generator=run.generator("cpu", 1), dtype=F64)
    x = x / x.square().mean().sqrt()
    alpha_sq = schedule.alpha(t_min + (1 - 2 * t_min) * torch.arange(T + 1, dtype=F64) / T)**2
    expected = -(1 - alpha_sq[-1]).log().item()                              # prior, of two dimensions
    for i in range(T, 0, -1):
        beta, sigma_sq, before = 1 - alpha_sq[i] / alpha_sq[i - 1], 1 - alpha_sq[i], 1 - alpha_sq[i - 1]
        q, B = beta * before / sigma_sq, alpha_sq[i - 1].sqrt() * beta / sigma_sq
        if before == 0:
            second = (1 - alpha_sq[2] / alpha_sq[1]) * (1 - alpha_sq[1]) / (1 - alpha_sq[2])
            v = second if variance == "small" else beta
            expected += (math.log(2 * math.pi) + v.log() + sigma_sq / v).item()
        else:
            v = q if variance == "small" else beta
            expected += (q / v - 1 - (q / v).log() + B**2 * sigma_sq / v).item()
    if t_min:
        expected += math.log(2 * math.pi * math.e * (1 - alpha_sq[0]) / alpha_sq[0])
    model = lambda z, t: schedule.alpha(t)[:, None] * z
    how = dict(chain=discrete.chain(schedule, T, t_min), target="x", variance=variance, t_min=t_min)
    value, error = reproduce_variances.bound(model, x, draws=100_000, generator=run.generator("cpu", 2), **how)
    assert 0 < error < 0.02 and abs(value - expected) < 4 * error
    values, errors = zip(*(reproduce_variances.bound(model, x, draws=200, generator=run.generator("cpu", 3 + k), **how)
                           for k in range(40)))
    assert 0.6 < statistics.stdev(values) / statistics.mean(errors) < 1.6


def test_terms_are_drawn_where_they_are_large():
    """At most 1.2 times the least error, which is that of probabilities in proportion to their root mean square."""
    schedule, T, x = ddpm.SCHEDULES["iddpm"], 30, torch.randn(20_000, 2, generator=run.generator("cpu", 1), dtype=F64)
    of = discrete.chain(schedule, T, 0.0)
    how = dict(chain=of, target="x", variance="small")
    model, g = lambda z, t: schedule.alpha(t)[:, None] * z, run.generator("cpu", 2)
    terms = torch.stack([reproduce_variances.variances.term(
        model, x, torch.full((len(x),), i), torch.randn(x.shape, generator=g, dtype=F64), **how)
        for i in range(1, T + 1)])
    least = (terms.square().mean(1).sqrt().sum()**2 - terms.mean(1).sum()**2).sqrt() / 20_000**0.5
    uniform = (T * terms.square().mean(1).sum() - terms.mean(1).sum()**2).sqrt() / 20_000**0.5
    _, error = reproduce_variances.bound(model, x, draws=20_000, generator=run.generator("cpu", 3), **how)
    assert uniform > 1.5 * least and 0.9 * least < error < 1.2 * least


def test_the_exact_bound_and_the_bound_of_a_run_ask_for_what_they_say(monkeypatch):
    asked = []
    monkeypatch.setattr(reproduce_variances, "DATASETS", {"normal": NORMAL})
    monkeypatch.setattr(reproduce_variances.kind_points, "load", lambda config: NORMAL.sample(
        20_000, run.generator("cpu", 5)))
    monkeypatch.setattr(reproduce_variances, "DRAWS", 40_000)
    reproduce_variances.exact_bound.cache_clear()
    assert abs(reproduce_variances.entropy("normal") - ENTROPY) < 0.04
    for variance in "large", "best":                                        # both are exact here
        value, error = reproduce_variances.exact_bound("normal", "iddpm", 5, variance)
        assert abs(value - ENTROPY) < 0.04
    assert reproduce_variances.exact_bound("normal", "iddpm", 5, "small")[0] > ENTROPY + 1
    assert reproduce_variances.exact_bound("normal", "iddpm", 5, "large")[0] != reproduce_variances.exact_bound(
        "normal", "ddpm", 1000, "large")[0]
    reproduce_variances.exact_bound.cache_clear()
    monkeypatch.setattr(reproduce_variances, "bound", lambda model, x, **how: (asked.append(how), how["variance"])[1])
    config = dict(data="normal", schedule="iddpm", timesteps=7, t_min=0.0)
    one = SimpleNamespace(config=config, target="eps", model=lambda out: torch.nn.Linear(2, 2) if out else None)
    assert reproduce_variances.bound_of_run(one, ["best", "small"]) == {"best": "best", "small": "small"}
    assert all((how["target"], how["chain"].steps, how["data"], how["t_min"]) == ("eps", 7, NORMAL, 0.0)
               for how in asked)
    assert reproduce_variances.bits(3.0) == pytest.approx(1.5 / math.log(2))


# Tables of variances

def test_cells_of_learned_variances_and_the_share(given):
    header, _, *lines = cells(reproduce_variances.learned(given))
    assert header[3:9] == ["small", "large", "log", "range", "best", "share of the gain: range"]
    assert header[9:] == ["exact, small", "exact, large", "exact, best"]
    assert [line[:3] for line in lines] == [[target, data, "3"] for target in ("v", "eps")
                                            for data in ("clusters", "rings")]
    for target, data, _, *line in lines:
        loss = {"small": "mse", "large": "mse", "best": "mse", "log": "hybrid", "range": "hybrid"}
        entropy = {"clusters": 0.5, "rings": -0.25}[data]
        gap = {name: [given.asked["bound", f"steps-3-{name if loss[name] == 'hybrid' else 'small'}", data, target,
                                  loss[name], seed, name] - entropy for seed in range(2)] for name in loss}
        share = [(gap["small"][k] - gap["range"][k]) / (gap["small"][k] - gap["best"][k]) for k in range(2)]
        assert line[:6] == [cell(*gap[name]) for name in ("small", "large", "log", "range", "best")] + [cell(*share)]
        assert line[6:] == [f"{given.asked['exact', data, 'iddpm', 3, name] - entropy:.3f}"
                            for name in ("small", "large", "best")]


def test_cells_of_samples_are_of_their_variance_and_way(given, monkeypatch):
    names = ["mean_distance", "covariance_distance", "sliced_wasserstein"]
    monkeypatch.setattr(reproduce_variances.kind_points, "floor", lambda config, n: (
        {name: (k + 0.25, k + 0.5) for k, name in enumerate(names)}, 0.0))
    lines, asked = cells(reproduce_variances.samples(given)), given.asked

    def expected(recipe, loss, target, data, sampler, steps, grid, variance):
        found = [[asked[recipe, data, target, loss, seed, sampler, steps, grid, variance, name]
                  for name in [*names, "log_density", "log_density_data"]] for seed in range(2)]
        return [cell(found[0][k], found[1][k]) for k in range(3)] + [
            f"{(a + b) / 2:.{3 if abs(a + b) < 200 else 0}f} +- {abs(a - b) / 2**0.5:.{3 if abs(a + b) < 200 else 0}f}"
            if abs(a + b) < 2e6 else None for a, b in [[one[3] - one[4] for one in found]]]
    own = [line for line in lines if len(line) == 7 and line[1] == "3"]
    assert [line[2] for line in own] == ["small", "large", "best", "log", "range"] * 2
    for data, _, name, *line in own:
        recipe, loss, asked_for = {"small": ("small", "mse", None), "log": ("log", "hybrid", None),
                                   "range": ("range", "hybrid", None)}.get(name, ("small", "mse", name))
        check = expected(f"steps-3-{recipe}", loss, "v", data, "ancestral", 3, "t", asked_for)
        assert line[:3] == check[:3] and (check[3] is None or line[3] == check[3])
    assert [line[3:] for line in lines if line[1] == "floor"] == [
        ["0.250 +- 0.500", "1.250 +- 1.500", "2.250 +- 2.500", "0"]] * 2
    fewer = [line for line in lines if len(line) == 8 and line[1].isdigit()]
    assert [line[:4] for line in fewer] == [[data, n, how, name] for data in ("clusters", "rings") for n in (
        "25", "50", "100") for how in ("skip", "rescale") for name in ("small", "large")]
    for data, n, how, name, *line in fewer:
        check = expected("chain-small", "mse", "eps", data, "ancestral", int(n), {
            "skip": "t", "rescale": "rescaled"}[how], None if (how, name) == ("skip", "small") else name)
        assert line[:3] == check[:3] and (check[3] is None or line[3] == check[3])


def test_own_and_bound_from_known_weights(monkeypatch):
    """Bound: minus the mean of log w; own: minus the log of the mean; both minus -log p of the same points."""
    asked, log_w = {}, torch.tensor([[0.0, -3.0, -1.0], [math.log(3), -3.0, -9.0]])
    x = torch.tensor([[0.0, 0.0], [1.0, 1.0], [2.0, 0.0], [9.0, 9.0]])
    monkeypatch.setattr(reproduce_variances, "DATASETS", {"normal": NORMAL})
    monkeypatch.setattr(reproduce_variances, "TESTED", 3)
    monkeypatch.setattr(reproduce_variances.kind_points, "load", lambda config: x)
    monkeypatch.setattr(importance, "log_weights", lambda model, x, **how: (asked.update(how, x=x), log_w)[1])
    found = reproduce_variances.own_of("model", "normal", 7, "eps", "large", F64)
    surprise = [math.log(2 * math.pi) + square / 2 for square in (0, 2, 4)]
    bounds = [-math.log(3) / 2 - surprise[0], 3 - surprise[1], 5 - surprise[2]]
    own = [-math.log(2) - surprise[0], 3 - surprise[1],
           -math.log((math.exp(-1) + math.exp(-9)) / 2) - surprise[2]]
    for name, values in ("bound", bounds), ("own", own):
        assert found[name] == pytest.approx((statistics.mean(values), statistics.stdev(values) / 3**0.5), rel=1e-6)
    assert found["size"] == pytest.approx(16 / 10)                          # of 1.6, 2 and 1.0007
    assert asked["x"].dtype == F64 and len(asked["x"]) == 3 and asked["data"] is NORMAL
    assert (asked["target"], asked["variance"], asked["steps"], asked["chains"]) == ("eps", "large", 7, 1000)
    assert asked["schedule"] is ddpm.SCHEDULES["iddpm"]


def test_own_on_gaussian_data_against_the_law_of_the_chain(monkeypatch):
    """The exact chain of N(0, 1) with T = 3 draws N(0, V); with `large` it draws the data."""
    T, x = 3, NORMAL.sample(100, run.generator("cpu", 7), F64)
    monkeypatch.setattr(reproduce_variances, "DATASETS", {"normal": NORMAL})
    monkeypatch.setattr(reproduce_variances, "CHAINS_DRAWN", 2000)
    monkeypatch.setattr(reproduce_variances.kind_points, "load", lambda config: x)
    alpha_sq, V, q = ddpm.SCHEDULES["iddpm"].alpha(torch.arange(T + 1, dtype=F64) / T)**2, 1.0, None
    for i in range(T, 0, -1):
        beta = 1 - alpha_sq[i] / alpha_sq[i - 1]
        q = beta * (1 - alpha_sq[i - 1]) / (1 - alpha_sq[i]) if i > 1 else q                     # q_1 := q_2
        V = (1 - beta) * V + q                                               # the mean is sqrt(1 - beta) z
    model = NORMAL.optimal_model("x", ddpm.SCHEDULES["iddpm"])
    found = reproduce_variances.own_of(model, "normal", T, "x", "small", F64)
    expected = (V.log() + x.square().mean() / V - x.square().mean()).item()
    assert found["own"][0] == pytest.approx(expected, abs=0.03) and found["bound"][0] > expected + 0.3
    found = reproduce_variances.own_of(model, "normal", T, "x", "large", F64)
    assert found["own"][0] == pytest.approx(0, abs=1e-3) and found["size"] == pytest.approx(2000, rel=1e-3)


def test_cells_of_the_chain_itself(given, monkeypatch):
    monkeypatch.setattr(reproduce_variances.kind_points, "in_chunks", lambda model: model)
    monkeypatch.setattr(reproduce_variances, "OWN", [(3, "small"), (3, "range"), (3, "best")])
    given.networks = {f"steps-3-{name}": f"network {name}" for name in ("small", "range")}
    asked = []

    def own_of(model, data, T, target, variance, dtype):
        asked.append((str(model)[:10], data, T, target, variance, dtype))
        n = len(asked)
        return {"bound": (n + 0.5, n / 10), "own": (n + 0.125, n / 100), "size": 100.0 + n}
    monkeypatch.setattr(reproduce_variances, "own_of", own_of)
    header, _, *lines = cells(reproduce_variances.own(given))
    assert header[3:] == ["exact: bound", "chain itself", "chains that count", "trained: bound", "chain itself",
                          "chains that count", "flow"]
    n = 0
    for data, _, variance, *line in lines:
        recipe, loss = ("range", "hybrid") if variance == "range" else ("small", "mse")
        exact = ["-", "-", "-"]
        if variance != "range":
            n += 1
            exact = [f"{n + 0.5:.3f} +- {n / 10:.3f}", f"{n + 0.125:.3f} +- {n / 100:.3f}", str(100 + n)]
            assert asked[n - 1][1:] == (data, 3, "x", variance, F64)
        assert [call[1:] for call in asked[n:n + 2]] == [(data, 3, "v", variance, torch.float32)] * 2
        assert asked[n][0] == f"network {recipe}"[:10]
        flow = [given.asked[f"steps-3-{recipe}", data, "v", loss, seed, "exact gap"] for seed in range(2)]
        assert line == exact + [cell(n + 1.5, n + 2.5), cell(n + 1.125, n + 2.125), str(101 + n), cell(*flow)]
        n += 2
    assert [line[:3] for line in lines] == [[data, "3", name] for data in ("clusters", "rings")
                                            for name in ("small", "range", "best")]


# Tables 5.1 and 6.1

def test_the_norms_of_gradients_by_epoch_and_of_all_steps():
    study, key = Given(), ("clusters", "eps", "mse", 0)
    one = SimpleNamespace(recipe="chain-small", history=[dict(gradient_norms=[1.0, 30.0, 2.0]),
                                                        dict(gradient_norms=[3.0, 9.0, 4.0])])
    found = reproduce_foundations.norms(study, {key: one}, key)
    assert found == dict(median=3.5, maximum=30.0, medians=[2.0, 4.0], maxima=[30.0, 9.0])
    assert study.notes == [("chain-small", key, {"norms": found})]


def test_numbers_that_differ_by_orders_of_magnitude():
    assert reproduce_foundations.number([1234.0, 3.0e6, 5.0]) == "1e+06 +- 1.7e+06"
    assert reproduce_foundations.number([0.012345]) == "0.0123"
    assert reproduce_foundations.number([1.0, 2.0]) == "1.5 +- 0.71"


def test_every_row_is_trained_as_it_says_and_has_the_documents_numbers():
    document = {"direct direct VLB": "0.08 3425", "direct direct log VLB": "2.36e-5 8.35",
                "direct fixed VLB": "4.54e-5 10.66", "direct fixed MSE": "1.92e-5 8.07", "x fixed VLB": "2.99e-6 6.16",
                "x fixed MSE": "3.66e-6 20.81", "eps fixed VLB": "1.62e-6 4.06", "eps fixed MSE": "1.50e-6 4.07",
                "eps direct log hybrid": "1.53e-6 4.71"}
    for mean, variance, loss, target, recipe, ours, *numbers in reproduce_foundations.RUNS:
        assert target == {"direct": "mu", "direct + z": "mu_skip"}.get(mean, mean) and ours == loss.lower()
        assert recipe == "chain-" + {"fixed": "small", "direct log": "log"}.get(variance, variance)
        assert " ".join(numbers) == document.pop(f"{mean} {variance} {loss}", "- -")
    assert not document
    assert {row[1]: (row[4], row[5]) for row in reproduce_foundations.MORE} == {
        "range, weight 1e-6": ("chain-range-1e-6", "hybrid"), "range, weight 1": ("chain-range-1", "hybrid"),
        "range": ("chain-range", "vlb"), "range, loss-aware i": ("chain-range-aware", "vlb")}


@pytest.mark.parametrize("table, rows", [("table5_1", [0, 1, 2, 3, 4, 5, 6, 7, 10, 11]), ("table6_1", [6, 7, 8, 9])])
def test_cells_of_tables_5_1_and_6_1(given, monkeypatch, table, rows):
    monkeypatch.setattr(reproduce_foundations, "FOUR", ("clusters",))
    text = getattr(reproduce_foundations, table)(given)
    header, _, *lines = cells(text)
    assert f"entropy {0.5 / 2 / math.log(2):.3f} bits/dim" in text[0]
    assert header == ["mean", "variance", "loss", "CIFAR-10: mean MSE", "NLL", "mean MSE x 1e5", "NLL, own or small",
                      "NLL, large", "gradient norm, median", "maximum"]
    configurations = [reproduce_foundations.RUNS[k] for k in rows]
    configurations += reproduce_foundations.MORE * (table == "table6_1")
    assert len(lines) == len(configurations) + 2
    for (mean, variance, loss, target, recipe, ours, *document), line in zip(configurations, lines):
        of = [(recipe, ours, target, seed) for seed in range(2)]
        mse = [1e5 * given.asked[*name, "mse", 1] for name in of]
        names = ["small", "large"] if variance == "fixed" else [recipe.split("-")[1]]
        nll = [[given.asked["bound", recipe, "clusters", target, ours, seed, name] / math.log(4) for seed in range(2)]
               for name in names]
        norms = [[given.asked[*name, "norm", epoch, k] for epoch in (0, 1) for k in range(3)] for name in of]
        assert line == [mean, variance, loss, *document, three_digits(*mse), *(three_digits(*v) for v in nll),
                        *["-"] * (2 - len(nll)), three_digits(*map(statistics.median, norms)),
                        three_digits(*map(max, norms))]
    best = {name: f"{given.asked['exact', 'clusters', 'ddpm', 1000, name] / math.log(4):.3f}"
            for name in ("small", "large", "best")}
    assert lines[-2:] == [["best possible", "fixed", "", "", "", "0.700", best["small"], best["large"], "", ""],
                          ["best possible", "best", "", "", "", "0.700", best["best"], "-", "", ""]]


# Figures

def test_curves_over_the_steps_of_both_chains(monkeypatch):
    drawn, abar = [], {"ddpm": torch.cat([torch.ones(1).double(), (1 - ddpm.linear_betas(1000)).cumprod(0)]),
                       "iddpm": ddpm.SCHEDULES["iddpm"].alpha(torch.arange(1001, dtype=F64) / 1000)**2}
    monkeypatch.setattr(plots_chain, "over_steps", lambda panels, path, log=True: drawn.append((panels, log)))
    for name in "fig1_3", "fig6_4", "fig4_9":
        getattr(reproduce_foundations, name)(None, None)
    (roots, log), (ratios, log_too), (weights, log_last) = drawn
    assert not log and not log_too and log_last
    for name, bar in abar.items():
        i, values = roots["sqrt(abar)"][name]
        assert i.tolist() == list(range(1001))
        assert_close(values.double(), bar.sqrt(), rtol=1e-4, atol=1e-5)
        i, values = ratios["beta tilde / beta"][name]
        assert i.tolist() == list(range(1, 1001))
        assert_close(values, (1 - bar[:-1]) / (1 - bar[1:]), rtol=1e-5, atol=1e-9)
        q = (1 - bar[1:-1]) / (1 - bar[2:]) * (1 - bar[2:] / bar[1:-1])
        of_x = 0.5 * (bar[1:-1] / (1 - bar[1:-1]) - bar[2:] / (1 - bar[2:]))
        for target, expected in ("mu", 0.5 / q), ("x", of_x), ("eps", of_x / (bar[2:] / (1 - bar[2:]))):
            i, values = weights[name][target]
            assert i.tolist() == list(range(2, 1001))
            assert_close(values, expected, rtol=1e-5, atol=0)


def test_curves_over_training_and_the_best_possible(given, monkeypatch):
    drawn = []
    monkeypatch.setattr(plots_chain, "training", lambda panels, path: drawn.append(panels))
    reproduce_foundations.fig4_2(given, None)
    (panels,) = drawn
    assert list(panels) == ["gradient norm, median", "gradient norm, maximum", "mean MSE", "bound, nats per dimension"]
    of = lambda *name: np.array([[given.asked["chain-log", "hybrid", "eps", seed, *name, epoch]
                                  for epoch in (0, 1)] for seed in range(2)])
    norms = np.array([[[given.asked["chain-log", "hybrid", "eps", seed, "norm", epoch, k] for k in range(3)]
                       for epoch in (0, 1)] for seed in range(2)])
    expected = [(np.median(norms, 2), None), (norms.max(2), None), (of("mse"), 7e-6), (of("vlb"), 0.25)]
    for curves, (values, best) in zip(panels.values(), expected):
        assert list(curves) == ["clusters", "rings"] and len(curves["rings"]) == 12
        found = curves["rings"]["eps, direct log, hybrid"]
        assert found[0].tolist() == values.tolist() and found[1] == best


def test_bands_of_variances_over_t(given, monkeypatch):
    """Of N(0, 1), whose best variance is `large`; the range's network says t and z, that of the log says -2."""
    drawn, T = [], 3
    monkeypatch.setattr(reproduce_variances, "DATASETS", {"normal": NORMAL})
    monkeypatch.setattr(reproduce_variances, "SETS", ["normal"])
    monkeypatch.setattr(plots_chain, "variances", lambda panels, path: drawn.append(panels))
    given.networks = {"steps-3-range": lambda z, t: torch.cat([z, 2 * t[:, None] - 1 + z], 1),
                      "steps-3-log": lambda z, t: torch.cat([z, 0 * z - 2], 1)}
    reproduce_variances.fig_variances(given, None, draws=20_000)
    found = drawn[0]["normal", T]
    abar = ddpm.SCHEDULES["iddpm"].alpha(torch.arange(T + 1, dtype=F64) / T)**2
    for k, i in enumerate((2, 3)):
        t, mean, low, high = (values[k] for values in found["best"])
        assert t == i / T and (mean, low, high) == pytest.approx((1, 1, 1), abs=1e-5)
        t, mean, low, high = (values[k] for values in found["range"])
        assert (mean, low, high) == pytest.approx((t, t - 0.822, t + 0.822), abs=0.04)      # u = t + z / 2
        log_large = (1 - abar[i] / abar[i - 1]).log()
        log_small = log_large + ((1 - abar[i - 1]) / (1 - abar[i])).log()
        u = ((-2 - log_small) / (log_large - log_small)).item()
        assert [values[k] for values in found["log"]][1:] == pytest.approx([u] * 3, rel=1e-5)


def test_the_plane_has_axis_1_across_and_its_title_counts_points(monkeypatch):
    drawn, T = [], 40
    pair = GaussianMixture(torch.tensor([[-1.0, 0.2], [1.0, 0.2]]).double(), torch.tensor([0.1, 0.9]).double())
    monkeypatch.setattr(reproduce_variances, "DATASETS", {"pair": pair})
    monkeypatch.setattr(reproduce_variances, "SETS", ["pair"])
    monkeypatch.setattr(plots_chain, "planes", lambda panels, path: drawn.append(panels))
    reproduce_variances.fig_plane(None, None, T=T, n=7)
    ((title, values),) = drawn[0].items()
    alpha, sigma = (c(torch.tensor([19 / T, 20 / T], dtype=F64)) for c in (
        ddpm.SCHEDULES["iddpm"].alpha, ddpm.SCHEDULES["iddpm"].sigma))

    def u(z):                                              # two clusters: Var[x | z] from the logistic function
        beta = 1 - (alpha[1] / alpha[0])**2
        q, B = beta * sigma[0]**2 / sigma[1]**2, alpha[0] * beta / sigma[1]**2
        var = alpha[1]**2 * 0.01 + sigma[1]**2
        share, rest = torch.sigmoid(2 * alpha[1] * z[:, 0] / var), sigma[1]**2 / var
        best = q + B**2 * (rest * 0.01 + rest**2 * 4 * share * (1 - share))
        return (best.log() - q.log()) / (beta.log() - q.log())
    line = torch.linspace(-3, 3, 7, dtype=F64)
    expected = u(torch.stack([line, 0 * line], 1)).numpy()
    assert values == pytest.approx(np.broadcast_to(expected, (7, 7)), rel=1e-7) and expected[3] > 2 * expected[0]
    g = run.generator("cpu", "plane")
    x, eps = pair.sample(2000, g, F64), torch.randn(2000, 2, generator=g, dtype=F64)
    there = u(alpha[1] * x + sigma[1] * eps)
    assert title == f"pair, t = 0.5\n{100 * (there > 1).double().mean():.0f} % of z above 1, largest {there.max():.1f}"


def test_lines_bands_and_levels_are_drawn_as_given(monkeypatch):
    seen = []
    monkeypatch.setattr(plots_chain, "save", lambda fig, path: seen.append(fig))
    plots_chain.over_steps({"a": {"x": ([1, 2], [3.0, 4.0])}}, None)
    plots_chain.over_steps({"a": {"x": ([1, 2], [3.0, 4.0])}}, None, log=False)
    assert [fig.axes[0].get_yscale() for fig in seen] == ["log", "linear"]
    assert seen[0].axes[0].lines[0].get_xydata().tolist() == [[1, 3], [2, 4]]
    curve = lambda level: {"best": ([0.1, 0.5], [level, level], [level - 0.1] * 2, [level + 0.2] * 2)}
    sets = [(data, T) for data in ("clusters", "rings") for T in (3, 5)]
    plots_chain.variances({key: curve(k) for k, key in enumerate(sets)}, None)
    for k, ((data, T), ax) in enumerate(zip(sets, seen[2].axes)):
        assert ax.get_title() == f"{data}, T = {T}" and ax.lines[0].get_ydata().tolist() == [k, k]
        levels = {line.get_label(): line.get_ydata()[0] for line in ax.lines[1:]}
        assert levels == {"small": 0, "large": 1}
        ends = ax.collections[0].get_paths()[0].vertices[:, 1]
        assert (min(ends), max(ends)) == pytest.approx((k - 0.1, k + 0.2))
    plots_chain.planes({"a": np.arange(9.0).reshape(3, 3)}, None)
    image, contour = seen[3].axes[0].images[0], seen[3].axes[0].collections[0]
    assert image.origin == "lower" and image.get_extent() == [-3, 3, -3, 3] and list(contour.levels) == [0, 1]
    values = np.array([[1.0, 2.0, 3.0], [3.0, 4.0, 5.0]])
    plots_chain.training({"mean MSE": {"clusters": {"x": (values, 0.5)}, "rings": {"x": (values + 9, None)}}}, None)
    left, right = seen[4].axes
    assert left.lines[0].get_xydata().tolist() == [[1, 2], [2, 3], [3, 4]] and left.lines[1].get_ydata()[0] == 0.5
    assert len(right.lines) == 1 and right.lines[0].get_ydata().tolist() == [11, 12, 13]
    assert left.get_yscale() == "log" and left.get_title() == "clusters"


# Images

def test_a_run_on_images_is_measured_in_bits_with_the_discretised_decoder(monkeypatch):
    asked = []

    def bound(model, x, **how):
        asked.append(how)
        return (12 * math.log(2) * {"small": 5, "large": 7, "range": 6}[how["variance"]], 12 * math.log(2) / 4)
    monkeypatch.setattr(reproduce_variances, "bound", bound)
    monkeypatch.setattr(kind_images, "load", lambda *of: torch.zeros(2, 3, 2, 2, dtype=torch.uint8))
    config = dict(variance="small", schedule="ddpm", timesteps=9, t_min=0.0, shape=[3, 2, 2])
    one = SimpleNamespace(config=config, target="eps", model=lambda out: out, history=[
        dict(test_mean_mse=0.3, gradient_norms=[1.0, 9.0]), dict(test_mean_mse=0.2, gradient_norms=[2.0])])
    found = reproduce_foundations_images.measure(one, "data")
    assert found == dict(mean_mse=0.2, median=2.0, maximum=9.0, bounds={
        "small": pytest.approx([5, 0.25]), "large": pytest.approx([7, 0.25])})
    assert all(how["decoder"] is reproduce_foundations_images.discretised and how["chain"].steps == 9
               and how["target"] == "eps" and how["draws"] == 4000 for how in asked)
    config["variance"] = "range"
    assert reproduce_foundations_images.measure(one, "data")["bounds"] == {"range": pytest.approx([6, 0.25])}


def test_the_table_of_images_has_equal_steps_and_each_runs_numbers(tmp_path, monkeypatch):
    calls, networks = [], []

    def trained(argv):
        option = dict(zip(argv[::2], argv[1::2]))
        calls.append(argv)
        folder = tmp_path / option["--out"] / f"set-{option['--target']}-{option['--loss']}-s0"
        folder.mkdir(parents=True)
        (folder / "ckpt.pt").touch()

    def opened(folder):
        config = dict(shape=[1, 2, 2], batch_size=8, precision="fp32")
        networks.append(SimpleNamespace(folder=Path(folder), config=config, checkpoint=dict(
            step=77 + len(networks), ema=dict(w=torch.zeros(3, 5)))))
        return networks[-1]
    monkeypatch.setattr(train, "main", trained)
    monkeypatch.setattr(run, "open", opened)
    monkeypatch.setattr(reproduce_foundations_images, "measure", lambda one, folder: dict(
        mean_mse=len(networks) / 1000, median=0.5, maximum=2.5,
        bounds={"small": [4.125, 0.02], "large": [3.5, 0.03]} if len(networks) == 1 else {"range": [3.75, 0.04]}))
    rows = [("x", "fixed", "MSE", "x", "chain-small", "mse", "a", "b"),
            ("eps", "range", "hybrid", "eps", "chain-range", "hybrid", "c", "d")]
    study = Given(data="set", runs=str(tmp_path), budget=10, device="cpu", data_dir="data", more=["--channels", "8"])
    lines = reproduce_foundations_images.table(study, rows)
    assert cells(lines)[0] == ["mean", "variance", "loss", "CIFAR-10: mean MSE", "NLL", "mean MSE", "NLL, own or small",
                               "NLL, large", "gradient norm, median", "maximum"]
    assert cells(lines)[2:] == [
        ["x", "fixed", "MSE", "a", "b", "0.001", "4.12 +- 0.02", "3.5 +- 0.03", "0.5", "2.5"],
        ["eps", "range", "hybrid", "c", "d", "0.002", "3.75 +- 0.04", "-", "0.5", "2.5"]]
    assert "77 steps of 8 images in fp32, 15 parameters" in lines[-1] and "1x2x2" in lines[-1]
    first, second = (" ".join(argv) for argv in calls)
    assert "--variance small --target x --loss mse" in first and "--minutes 5.0" in first and "--channels 8" in first
    assert "--variance range --target eps --loss hybrid" in second and "--train-steps 77" in second
    written = tmp_path / "images-chain-range/set-eps-hybrid-s0/foundations.json"
    assert json.loads(written.read_text())["mean_mse"] == 0.002
