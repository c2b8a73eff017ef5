"""The table of flows of eps and s: its numbers by themselves, then the table on a study of small networks."""
import json
import math
from types import SimpleNamespace

import pytest
import torch
from test_reproduce import expected_cell
from test_slides import CACHES
from torch.testing import assert_close

import invariance
import kind_points
import reproduce
import reproduce_few
import reproduce_flows
import run
import samplers
import study as study_file
from datasets2d import DATASETS, GaussianMixture
from ddpm import SCHEDULES
from mlp import MLP

DISTANCES = "mean_distance", "covariance_distance", "sliced_wasserstein"
F64, COSINE, CLUSTERS = torch.float64, SCHEDULES["cosine"], DATASETS["clusters"]
ONE = {target: SimpleNamespace(target=target, config=dict(data="clusters", stabiliser=0.01, seed=0))
       for target in ("eps", "s", "v")}


@pytest.fixture(autouse=True)
def few_points(monkeypatch):
    monkeypatch.setattr(kind_points, "POINTS", 5000)


# The cause

@pytest.mark.parametrize("target", ["x", "eps", "s", "v"])
def test_what_is_kept_of_an_error_is_what_ddim_makes_of_it_step_by_step(target):
    """The same z with two predictions that differ by 1, a step at a time."""
    times, z = torch.tensor([0.99, 0.8, 0.3, 0.02], dtype=F64), torch.tensor([[0.3, -1.0]], dtype=F64)
    def after(t, s, y):
        seen = []
        def network(z, t):
            seen.append(z)
            return torch.full_like(z, y if len(seen) == 1 else 0.0)
        end = samplers.ddim(samplers.denoiser(network, target, COSINE, 0.01), z, torch.stack([t, s] if s else [t]),
                            COSINE, None)
        return seen[1] if s else end
    moved = [(after(t, s, 1.5) - after(t, s, 0.5)).abs()[0, 0] for t, s in zip(times, [*times[1:], None])]
    assert reproduce_flows.kept(target, times, COSINE) == pytest.approx(sum(moved).item(), rel=1e-9)


def test_the_first_of_32_steps_keeps_31_times_an_error_of_eps():
    """The docstring's numbers: sin of the angle over alpha, and the angle alone of v."""
    times = torch.tensor([0.999, 0.999 - 0.998 / 32], dtype=F64)
    rest = {target: reproduce_flows.kept(target, times[1:], COSINE) for target in ("eps", "v")}
    first = {target: reproduce_flows.kept(target, times, COSINE) - rest[target] for target in rest}
    angle = math.pi / 2 * 0.998 / 32
    assert first["v"] == pytest.approx(math.sin(angle), rel=1e-6)
    assert first["eps"] == pytest.approx(math.sin(angle) / math.sin(math.pi / 2 * 0.001), rel=1e-6)
    assert round(first["eps"]) == 31


@pytest.mark.parametrize("t_max", [0.9, 0.5])
def test_the_price_of_t_max_is_the_kl_of_a_gaussian_in_closed_form(t_max):
    data = GaussianMixture(torch.zeros(1, 2, dtype=F64), torch.tensor([0.3, 0.8], dtype=F64))
    expected = 0.0
    for std in 0.3, 0.8:
        var = (math.cos(math.pi / 2 * t_max) * std)**2 + math.sin(math.pi / 2 * t_max)**2
        expected += 0.5 * (var - 1 - math.log(var))
    assert reproduce_flows.price(data, t_max) == pytest.approx(expected, rel=1e-6)


def test_the_part_of_the_schedule_is_that_of_sampling():
    _, expected, t_min = invariance.of_run(None, "v", dict(schedule="cosine", stabiliser=0.0), 1e-3, t_max=0.8)
    assert t_min == 0 and reproduce_flows.part(0.8).ends(0.0) == expected.ends(0.0)


@pytest.mark.parametrize("t", [0.999, 0.5, 0.01])
def test_the_error_of_eps_hat(t):
    """Off by 3 and 4 in its axes: the root of (9 + 16) / 2; and z has noise of deviation sigma."""
    def denoise(z, t):
        noise = z - math.cos(math.pi / 2 * t) * kind_points.load(ONE["v"].config)[:100]
        assert noise.std().item() == pytest.approx(math.sin(math.pi / 2 * t), rel=0.15)
        eps = CLUSTERS.optimal_model("eps", COSINE)(z, t.expand(len(z)))
        return None, eps + torch.tensor([3.0, 4.0])
    one = SimpleNamespace(config=ONE["v"].config, denoiser=lambda: denoise)
    assert reproduce_flows.error(one, t, 100) == pytest.approx(12.5**0.5, rel=1e-5)


@pytest.mark.parametrize("target", ["eps", "s", "v"])
def test_ways_that_change_the_prediction_where_they_say(target):
    """x_hat: 0 in the first step alone; the exact one after the first, or above t = 0.8."""
    z = torch.randn(6, 2, generator=torch.Generator().manual_seed(1), dtype=F64)
    def x_hat(way, t):
        model = reproduce_flows.options(ONE[target], way)["watch"](lambda z, t: torch.cos(z))
        return samplers.denoiser(model, target, COSINE, 0.01)(z, torch.tensor(t, dtype=F64))[0]
    own = lambda t: samplers.denoiser(lambda z, t: torch.cos(z), target, COSINE, 0.01)(z, torch.tensor(t, dtype=F64))[0]
    exact = lambda t: CLUSTERS.denoise(z, *(c(torch.tensor(t, dtype=F64)) for c in (COSINE.alpha, COSINE.sigma)))
    first, late = reproduce_flows.CAUSE
    for t in 0.999, 0.968, 0.81, 0.79, 0.03:
        close = lambda way, expected: assert_close(x_hat(way, t), expected, rtol=1e-7, atol=1e-7)      # noqa: B023
        close("first x_hat 0", torch.zeros_like(z) if t == 0.999 else own(t))
        close(first, own(t) if t == 0.999 else exact(t))
        close(late, exact(t) if t > 0.8 else own(t))


def test_the_options_of_the_other_ways(monkeypatch):
    monkeypatch.setattr(kind_points, "load", lambda config: torch.tensor([[-3.0, 1.0], [2.0, 0.0]]))
    options = lambda way: reproduce_flows.options(ONE["eps"], way)
    assert options("as it is") == {} and options("grid logsnr") == {"grid": "logsnr"}
    assert options("t_max 0.95") == {"t_max": 0.95}
    assert options("clip") == {"clip": 3.0}


@pytest.mark.parametrize("t", [0.001, 0.3, 0.999])
def test_a_network_that_adds_sigma_z_and_is_scaled_by_alpha_is_one_of_v(t):
    """The docstring's identity, of any point, and its loss: the error of eps_hat is alpha times that of net."""
    x, eps, net = torch.randn(3, 5, 2, generator=torch.Generator().manual_seed(2), dtype=F64)
    alpha, sigma = math.cos(math.pi / 2 * t), math.sin(math.pi / 2 * t)
    z = alpha * x + sigma * eps
    assert_close(sigma * z + alpha * (alpha * eps - sigma * x), eps)
    found = samplers.denoiser(lambda z, t: net, "v", COSINE)(z, torch.tensor(t, dtype=F64))[1]
    assert_close(found, sigma * z + alpha * net, rtol=1e-6, atol=1e-9)


# The table

def call(folder, *more):
    """The table, without its last line: the command."""
    reproduce.main(["eps-flows", "--seeds", "2", "--epochs", "2", "--num-samples", "2000", "--device", "cpu",
                    "--runs", str(folder / "runs"), "--out", str(folder / "results"), *more])
    return (folder / "results/beyond/eps-flows.md").read_text().rsplit("\n`python", 1)[0]


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    folder, patch = tmp_path_factory.mktemp("flows"), pytest.MonkeyPatch()
    for cache in CACHES:                                               # of another number of points
        cache.cache_clear()
    patch.setattr(kind_points, "POINTS", 5000)
    patch.setattr(kind_points, "build_model", lambda config, members=1: MLP(width=8, members=members))
    for name, value in dict(FOUR=["clusters"], STEPS=6, T_MAX=[0.8], MENDS={"ddim": ["as it is", "t_max 0.8"],
                                                                        "dpmpp": ["as it is", "clip"]}).items():
        patch.setattr(reproduce_flows, name, value)
    patch.setattr(reproduce_few, "WITHIN", 1.0)
    patch.setattr(reproduce_few, "DISTANCES", ["mean_distance"])
    patch.setattr(kind_points.metrics, "floor", lambda *args, **how: dict.fromkeys(DISTANCES, (0.34, 0.015)))
    patch.setattr(study_file, "DRAWS", 2)
    patch.setattr(study_file, "ODE_STEPS", 2)
    yield folder, call(folder)
    patch.undo()
    for cache in CACHES:
        cache.cache_clear()


def tables(text):
    """Rows of each table, as lists of cells, without the two of the header."""
    parts = [[line.strip("| ").split(" | ") for line in part.splitlines() if line.startswith("| ")]
             for part in text.split("\n**")]
    return [part[2:] for part in parts if part]


def drawn(folder, target, seed, recipe="stabilised", loss="mse", **how):
    """What is measured of samples of a run, drawn here."""
    one = run.open(folder / f"runs/{recipe}-2-epochs/clusters-{target}-{loss}-s{seed}")
    return one, kind_points.measure(dict(data="clusters"), kind_points.draw(one, 6, 2000, seed, **how)[0])


def test_the_table_of_flows(study):
    """Every cell of samples is drawn here; the likelihoods and errors are those of the functions."""
    folder, text = study
    assert text == call(folder, "--recorded", "--runs", str(folder / "none"))
    cause, keeps, counts, clusters, likelihoods = tables(text)
    def cells(*arguments, **how):
        found = [drawn(folder, arguments[0], seed, *arguments[1:], **how)[1] for seed in (0, 1)]
        return found, [*(expected_cell([m[name] for m in found]) for name in DISTANCES),
                       expected_cell([m["log_density"] - m["log_density_data"] for m in found])]
    lines = {(line[0], line[1]): line[2:] for line in clusters[1:]}
    assert len(lines) == len(clusters) - 1 == 3 * 4 + 2 * 2
    largest = kind_points.load(dict(data="clusters", seed=0)).abs().max().item()
    reached = {}
    for target in "eps", "s", "v":
        for way, how in {"ddim, as it is": {}, "ddim, t_max 0.8": dict(t_max=0.8), "dpmpp, as it is": {},
                         "dpmpp, clip": dict(clip=largest), "ddim, as v": {}, "dpmpp, as v": {}}.items():
            own = [target] if way[-1] != "v" else ["v", "spaces", {"eps": "simple", "s": "s_space"}.get(target)]
            if own[-1]:
                reached[target, way], expected = cells(*own, sampler=way.split(",")[0], **how)
                assert lines[target, way] == expected
    best = reached["v", "ddim, as it is"][0]
    assert clusters[0] == ["floor", *("{mean:.3f} +- {std:.3f}".format(**best[f"{name}_floor"]) for name in DISTANCES),
                           "0"]
    assert [line[:2] for line in counts] == [[sampler, way] for sampler, ways in (
        ("ddim", ("as it is", "t_max 0.8", "as v")), ("dpmpp", ("as it is", "clip", "as v"))) for way in ways]
    mean = lambda target, sampler, way, name: sum(m[name] for m in reached[target, f"{sampler}, {way}"]) / 2
    for sampler, way, *found in counts:
        for target, cell in zip(("eps", "s", "v"), found):
            near = mean(target, sampler, way, "mean_distance") <= 0.34 + 2 * 0.015
            gap = mean(target, sampler, way, "log_density") - mean("v", sampler, "as it is", "log_density")
            assert cell == f"{near:d} / {near and abs(gap) <= 1.0:d}"
    assert {cell for _, _, *found in counts for cell in found} == {"0 / 0", "1 / 0", "1 / 1"}
    assert [*map(len, counts)] == [5, 5, 4] * 2

    for target, line in zip(("eps", "s", "v"), cause):
        assert line[:2] == ["clusters", target]
        ones = [run.open(folder / f"runs/stabilised-2-epochs/clusters-{target}-mse-s{seed}") for seed in (0, 1)]
        assert line[2:7] == [expected_cell([reproduce_flows.error(one, t) for one in ones])
                             for t in (0.999, 0.968, 0.9, 0.8, 0.5)]
        assert line[7] == lines[target, "dpmpp, as it is"][2]
        assert line[10] == clusters[0][3] and len(line) == 11
        for column, way in (8, "first step, then exact"), (9, "exact above 0.8"):
            wasserstein = [drawn(folder, target, one.config["seed"], sampler="dpmpp",
                                 **reproduce_flows.options(one, way))[1]["sliced_wasserstein"] for one in ones]
            assert line[column] == expected_cell(wasserstein)
        results = [one.folder for one in ones]
        for column, file in (2, "likelihood-500-2-2.json"), (3, "likelihood-500-2-2-0.8.json"):
            found = [json.loads((folder / file).read_text()) for folder in results]
            at = [likelihoods[["eps", "s", "v"].index(target)][column + 2 * i] for i in range(3)]
            assert at == [expected_cell([f["bound gap"][0] for f in found]), expected_cell(
                [f["exact gap"][0] for f in found]), expected_cell([f["exact median"] for f in found])]
    assert [line[0] for line in keeps] == ["t, t_max 0.999", "logsnr, t_max 0.999", "t, t_max 0.8"]
    times = torch.tensor([1e-3 + (0.8 - 1e-3) * i / 6 for i in range(6, 0, -1)], dtype=F64)
    assert keeps[2][1:4] == [f"{reproduce_flows.kept(target, times, COSINE):.2f}" for target in ("eps", "s", "v")]
    times = samplers.GRIDS["logsnr"](6, COSINE, 1e-3, dtype=F64)
    assert keeps[1][1:4] == [f"{reproduce_flows.kept(target, times, COSINE):.2f}" for target in ("eps", "s", "v")]
    assert len(keeps[2]) == 5 and keeps[2][4] == f"{reproduce_flows.price(CLUSTERS, 0.8):.0e}" == "1e-05"


def test_likelihoods_up_to_t_max_are_of_another_file_and_part(study):
    lines = map(json.loads, (study[0] / "results/beyond/runs.jsonl").read_text().splitlines())
    record = next(line for line in lines if line["run"] == "stabilised/clusters-eps-mse-s0")
    assert record["likelihood, t_max 0.8"]["exact gap"] != record["likelihood"]["exact gap"]


def test_samples_that_are_not_finite_are_infinitely_far(monkeypatch):
    monkeypatch.setattr(reproduce_flows, "MENDS", {"dpmpp": []})
    monkeypatch.setattr(reproduce_flows, "error", lambda one, t: t)
    monkeypatch.setattr(kind_points, "draw", lambda *args, **how: torch.full((1, 4, 2), math.nan))
    found = reproduce_flows.measure(ONE["s"], SimpleNamespace(num_samples=4), "cpu")
    assert found == {"errors": reproduce_flows.AT} | {f"dpmpp {way}": [math.inf] * 4 for way in reproduce_flows.CAUSE}


def test_the_table_of_the_fast_recipe_trains_its_networks(monkeypatch):
    """Nothing else differs: what is trained is what is asked of a study."""
    asked = []

    def trained(recipe, *which, **how):
        asked.append((recipe, *which, how))
        if len(asked) == 2:
            raise StopIteration
    study = SimpleNamespace(args=SimpleNamespace(seeds=1, epochs=100, num_samples=2000), trained=trained,
                            measured=lambda *arguments: {})
    with pytest.raises(StopIteration):
        reproduce.RESULTS["eps-flows-fast"][1](study)
    fast = dict(fast=True, epochs=15)
    assert asked == [("stabilised", ["mse"], reproduce_flows.FOUR, ["eps", "s", "v"], fast),
                     ("spaces", ["simple", "s_space"], reproduce_flows.FOUR, ["v"], fast)]
