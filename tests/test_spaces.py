"""Targets, loss spaces, weightings and dimensions: measures of networks with known errors, then a small study."""
import json
import math
import os
import statistics
from types import SimpleNamespace

import pytest
import torch
from conftest import Narrow
from torch.testing import assert_close

import draw_images
import embedded
import images
import kind_points
import optimum
import plots
import reproduce
import reproduce_embedded
import reproduce_spaces
import reproduce_spaces_images
import reproduce_weightings
import run
import study as study_file
import train
from datasets2d import DATASETS
from ddpm import SCHEDULES

COSINE, SETS = SCHEDULES["cosine"], ("clusters", "unequal")
LIMIT = -2 * math.log(math.tan(math.pi / 2 * 1e-3))        # log-SNR of t = 0.001
FACTOR = 0.5 * 2 * LIMIT / 0.998
CACHES = (optimum.optimal_predictions, optimum.optimal_errors, kind_points.floors, study_file.nelbo_points,
          reproduce_spaces.best_eps, reproduce_embedded.test_points)


@pytest.fixture(autouse=True)
def few_points(monkeypatch):
    clear = lambda: [cache.cache_clear() for cache in CACHES]
    clear()
    monkeypatch.setattr(kind_points, "POINTS", 2500)
    monkeypatch.setattr(reproduce_embedded, "TESTED", 2000)
    yield
    clear()


class Off(torch.nn.Module):
    """The exact network of a target, and wrong by what error(alpha, sigma) says."""

    def __init__(self, data, target, error):
        super().__init__()
        self.best, self.error = DATASETS[data].optimal_model(target, COSINE), error
        self.unused = torch.nn.Parameter(torch.zeros(1))

    def forward(self, z, t):
        return self.best(z, t) + self.error(*(torch.as_tensor(f(math.pi / 2 * t))[:, None] for f in (
            torch.cos, torch.sin)))


def network(data, target, error):
    return SimpleNamespace(model=lambda: Off(data, target, error), target=target,
                           config=dict(data=data, target=target, stabiliser=0.0, seed=0))


# One network

@pytest.mark.parametrize("target, error", [("eps", lambda a, s: 0.1), ("x", lambda a, s: 0.1 * s / a),
                                           ("v", lambda a, s: 0.1 / a), ("s", lambda a, s: 0.1 / s)])
def test_the_nelbo_gap_is_what_the_error_of_eps_hat_adds_and_the_same_in_every_bin(target, error):
    found = reproduce_spaces.nelbo_gap(network("clusters", target, error))
    assert found["gap"] == pytest.approx(FACTOR * 0.01, rel=1e-3)
    assert found["bins"] == pytest.approx([FACTOR * 0.001] * 10, rel=5e-3)


def test_the_nelbo_gap_is_that_of_two_nelbos_and_its_first_bin_has_the_most_noise():
    one = network("rings", "eps", lambda a, s: torch.where(a / s < 0.01, 1.0, 0.3 * a))
    found, at = reproduce_spaces.nelbo_gap(one), lambda model: study_file.exact_nelbo(model, "eps", "rings").double()
    difference = at(one.model()) - at(DATASETS["rings"].optimal_model("eps", COSINE))
    assert abs(found["gap"] - difference.mean()) < 4 * difference.std() / len(difference)**0.5
    share = (LIMIT - 2 * math.log(100)) / (2 * LIMIT)      # of the range where alpha / sigma < 0.01: log-SNR < -9.2
    assert found["bins"][0] == pytest.approx(FACTOR * 0.1, rel=0.01) and found["bins"][0] > 5 * found["bins"][2]
    assert sum(found["bins"][:2]) == pytest.approx(FACTOR * share, rel=0.02)
    assert sum(found["bins"]) == pytest.approx(found["gap"])


def test_errors_in_D_dimensions_are_sums_of_x_hat_and_means_of_eps_hat():
    found = reproduce_embedded.errors(network("rings-7", "x", lambda a, s: 0.1 * s))
    assert found["excess"] == pytest.approx(7 * 0.01 * 0.5, rel=1e-3)            # the mean of sigma^2 is 1/2
    z, t, x, *_ = reproduce_embedded.test_points("rings-7", "uniform")
    best = DATASETS["rings-7"].optimal_model("x", COSINE)(z, t)
    assert found["best"] == pytest.approx((best - x).square().sum(1).mean().item())
    angle = math.pi / 2 * t[:, None]
    assert_close((z - angle.cos() * x)[:, 0].var().item(), 0.5, rtol=0.1, atol=0)     # what is not signal is sigma eps
    found = reproduce_embedded.errors(network("rings-7", "v", lambda a, s: 0.2 / a))
    assert found["gap"] == pytest.approx(FACTOR * 0.04, rel=1e-3)


def test_samples_in_the_plane_and_off_it(monkeypatch):
    data, asked = embedded.embed(DATASETS["swiss_roll"], 9), []
    real = kind_points.load(dict(data="swiss_roll"))
    off = data.off(torch.ones(2500, 9))
    shifted = (real + torch.tensor([0.3, 0.0])) @ data.basis.float().T + off

    def draw(one, steps, n, seed, **how):
        asked.append((steps, n, seed, how))
        return shifted[None]
    monkeypatch.setattr(kind_points, "draw", draw)
    one = network("swiss_roll-9", "x", lambda a, s: 0.0)
    found = reproduce_embedded.of_samples(one, 2500)
    assert asked == [(64, 2500, 0, dict(sampler="dpmpp", grid="logsnr"))]
    assert found["plane"] == pytest.approx(0.3 / 2**0.5, rel=1e-4)               # a shift, over all directions
    assert found["off"] == pytest.approx(9 - data.project(torch.ones(1, 9)).square().sum().item(), rel=1e-4)
    shifted[3, 3] = math.inf
    assert reproduce_embedded.of_samples(one, 2500) == {"plane": None, "off": None}
    study = SimpleNamespace(args=SimpleNamespace(num_samples=8000))
    titles, perfect = list(reproduce_embedded.MEASURES), reproduce_embedded.of_perfect
    assert perfect(study, titles[3], 102) == pytest.approx(0.01) and perfect(study, titles[0], 102) == 0
    floors, _ = kind_points.floor(dict(data="swiss_roll"), 2000)
    assert perfect(study, titles[2], 102) == floors["sliced_wasserstein"][0]


def test_the_exact_flow_has_no_gap_and_a_network_without_one_has_none(monkeypatch):
    monkeypatch.setattr(reproduce_weightings, "TESTED", 300)
    one = network("clusters", "v", lambda a, s: 0.0)
    one.schedule = COSINE
    mean, error = reproduce_weightings.exact_gap(one)["exact gap"]
    assert abs(mean) < 0.01 and error < 0.01
    one.model = lambda: lambda z, t: z + math.nan
    assert reproduce_weightings.exact_gap(one) == {"exact gap": [None, None]}


# Several networks

def given(values):
    """A study of three seeds, and {(data, target, loss, seed): number}: a row of values for each set."""
    keys = {(data, target, "a", seed): of[target][seed] for data, of in values.items() for target in of
            for seed in range(3)}
    return SimpleNamespace(args=SimpleNamespace(seeds=3)), keys


def test_means_over_sets_and_what_is_left_of_the_target(monkeypatch):
    monkeypatch.setattr(reproduce_weightings, "FOUR", SETS)
    study, keys = given({"clusters": {"x": [1, 2, 3], "eps": [4, 4, 4], "v": [2, 2, 2]},
                         "unequal": {"x": [3, 4, 5], "eps": [8, 8, 8], "v": [0, 2, 4]}})
    assert reproduce_weightings.over_sets(study, keys, "x", "a") == [2, 3, 4]
    assert reproduce_weightings.target_left(study, keys, "a") == pytest.approx(6 / 2)
    assert reproduce_weightings.seeds_left(study, keys, "a") == pytest.approx((2 + 1 + 3) / 3)
    keys["unequal", "x", "a", 1] = None
    assert reproduce_weightings.over_sets(study, keys, "x", "a") == [2, math.inf, 4]
    found = [reproduce_weightings.ratio(value) for value in (math.inf, 1.234, 174589.584, 2e7)]
    assert found == ["-", "1.23", "174590", "2e+07"]
    worst_over_best = reproduce_weightings.worst_over_best
    assert [worst_over_best(c) for c in ([4, 2, 6], [0.0, 1], [-0.1, 1])] == [3, math.inf, math.inf]


def test_the_best_loss_and_those_that_seeds_do_not_tell_from_it():
    """Standard deviations of 1, 0.1 and 2: the means differ by 0.9 and by 1.2, of 1.005 and 2.24 that they may."""
    values = {"a": [2.0, 3.0, 4.0], "b": [2.0, 2.1, 2.2], "c": [1.3, 3.3, 5.3], "d": [9.0, None, 9.0], "e": [3.2] * 3}
    assert reproduce_weightings.best_of(values) == ["b", "a", "c"]
    assert reproduce_weightings.best_of({"a": [2.0], "b": [1.0]}) == ["b"]


def test_thirds_of_the_range(monkeypatch):
    monkeypatch.setattr(reproduce_spaces, "FOUR", SETS)
    study, keys = given({data: {"x": [k, k, k]} for k, data in enumerate(SETS)})
    gaps = {key: {"bins": [100 * value + 10**-seed * bin for bin in range(10)]}
            for (*_, seed), (key, value) in zip(keys, keys.items())}
    bins = reproduce_spaces.THIRDS
    assert reproduce_spaces.third(study, gaps, "x", "a", bins["noise"]) == pytest.approx([153, 150.3, 150.03])
    assert sorted(k for third in bins.values() for k in third) == list(range(10))


# A small study

@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """All results of points with two seeds, one epoch of a narrow network on 2,500 points."""
    folder, patch = tmp_path_factory.mktemp("spaces"), pytest.MonkeyPatch()
    clear = lambda: [cache.cache_clear() for cache in CACHES]
    clear()

    three = {name: reproduce_spaces.SPACES[name] for name in ("x", "eps", "v")}
    two = {name: three[name] for name in ("x", "v")}
    for owner, name, value in [
            (kind_points, "POINTS", 2500), (kind_points, "MLP", Narrow),
            (plots, "DPI", 30), (reproduce_spaces, "FOUR", SETS), (reproduce_weightings, "FOUR", SETS),
            (reproduce_spaces, "SPACES", three), (reproduce_spaces, "TARGETS", [*three]),
            (reproduce_spaces, "SAMPLER", (4, "dpmpp", "logsnr")), (reproduce_embedded, "TESTED", 2000),
            (reproduce_spaces.trained, "__defaults__", ([*three], None)),
            (reproduce_embedded, "DIMENSIONS", (2, 5)), (reproduce_embedded, "SPACES", two),
            (reproduce_weightings, "LOSSES", ("nelbo", "edm", "simple", "v_space")),
            (reproduce_weightings, "TESTED", 40), (reproduce_weightings, "ODE_STEPS", 2)]:
        patch.setattr(owner, name, value)
    for recipe, options, names in [("spaces", [], [*three.values()]), ("weightings", [], ["nelbo", "edm"]),
                                   ("embedded", ["--stack", "3"], [*two.values()])]:
        patch.setitem(study_file.RECIPES, recipe, (options, names))
    call = lambda name, *more: reproduce.main([name, "--seeds", "2", "--epochs", "1", "--num-samples", "2000", *more,
                                               "--device", "cpu", "--runs", str(folder / "runs"),
                                               "--out", str(folder / "results")])
    names = [*reproduce_spaces.RESULTS, *reproduce_embedded.RESULTS, *reproduce_weightings.RESULTS]
    for name in names:
        call(name)
    yield folder, call, names
    patch.undo()
    clear()


def table(folder, name):
    text = (folder / "results/vdm" / f"{name}.md").read_text()
    blocks = [[]]
    for line in text.splitlines():
        if line.startswith("|"):
            blocks[-1].append([cell.strip() for cell in line.strip("|").split("|")])
        elif blocks[-1]:
            blocks.append([])
    return [[row for row in block if row[0] != "---"] for block in blocks if block]


def of_files(folder, recipe, names, file, value):
    return [value(json.loads((folder / "runs" / f"{recipe}-1-epochs" / f"{names}-s{seed}" / file).read_text()))
            for seed in range(2)]


def cell(values):
    mean, std = statistics.mean(values), statistics.stdev(values)
    return f"{mean:.3f} +- {std:.3f}" if abs(mean) < 100 else f"{mean:.0f} +- {std:.0f}" if abs(mean) < 1e6 \
        else f"{mean:.0e} +- {std:.0e}"


def test_every_table_and_figure_is_there_and_again_from_its_numbers(made):
    folder, call, names = made
    results = folder / "results/vdm"
    for name in names:
        path = results / f"{name}.{'md' if reproduce.is_table(name) else 'png'}"
        before = path.read_bytes()
        assert len(before) > 300
        call(name, "--recorded")
        assert path.read_bytes().replace(b" --recorded", b"") == before
    assert all(len(block[0]) <= 6 for name in ("spaces", "embedded", "weightings") for block in table(folder, name))


def test_cells_of_spaces_are_the_numbers_of_their_runs(made):
    folder, *_ = made
    gaps, wasserstein, covariance, thirds = table(folder, "spaces")
    rows = {row[0]: row[1:] for row in gaps}
    assert rows["data, target"] == ["x-space, `rescaled`", "eps-space, `simple`", "v-space, `v_space`"]
    runs = [run.open(folder / f"runs/spaces-1-epochs/unequal-v-simple-s{seed}") for seed in range(2)]
    z, t, *_ = study_file.nelbo_points("unequal")
    alpha, sigma = torch.cos(math.pi / 2 * t)[:, None], torch.sin(math.pi / 2 * t)[:, None]
    best = DATASETS["unequal"].optimal_model("eps", COSINE)(z, t)
    found = [(sigma * z + alpha * one.model()(z, t) - best).square().mean().item() * FACTOR for one in runs]
    assert rows["unequal, v"][1] == cell(found)
    for block, name in (wasserstein, "sliced_wasserstein"), (covariance, "covariance_distance"):
        values = of_files(folder, "spaces", "clusters-eps-v_space", "steps-4-2000-dpmpp-logsnr/metrics.json",
                          lambda found: found[name])                                            # noqa: B023
        assert dict((row[0], row[3]) for row in block)["clusters, eps"] == cell(values)
    noise = [of_files(folder, "spaces", f"{data}-x-rescaled", "nelbo-gap.json", lambda found: sum(found["bins"][:3]))
             for data in SETS]
    assert dict((row[0], row[1]) for row in thirds)["noise, x"] == cell([statistics.mean(c) for c in zip(*noise)])


def test_cells_of_embedded_are_the_numbers_of_their_runs(made):
    folder, *_ = made
    error, gap, plane, off = ({row[0]: row[1:] for row in block} for block in table(folder, "embedded"))
    found = lambda value: cell(of_files(folder, "embedded", "swiss_roll-5-v-rescaled", "embedded-500.json", value))
    assert error["5, v"] == [found(lambda c: c["excess"] / c["best"]), error["5, v"][1], "0"]
    assert gap["5, v"][0] == found(lambda c: c["gap"]) and plane["5, v"][0] == found(lambda c: c["plane"])
    assert off["5, v"][0] == found(lambda c: c["off"]) and off["5, v"][2] == "0.0003" and off["2, x"][2] == "0"


def test_cells_of_weightings_are_the_numbers_of_their_runs(made):
    folder, *_ = made
    *targets, best, left = table(folder, "weightings")
    assert [row[0] for row in targets[0]] == ["loss", "`nelbo`", "`edm` (rises)", "`simple` (rises)", "`v_space`"]
    of = lambda recipe, target, loss, file, value: [statistics.mean(c) for c in zip(*(
        of_files(folder, recipe, f"{data}-{target}-{loss}", file, value) for data in SETS))]
    assert targets[1][2][1] == cell(of("weightings", "eps", "edm", "nelbo-gap.json", lambda c: c["gap"]))
    assert targets[2][3][2] == cell(of("spaces", "v", "simple", "exact-40-2.json", lambda c: c["exact gap"][0]))
    samples = "steps-4-2000-dpmpp-logsnr/metrics.json"
    for k, name in enumerate(("mean_distance", "covariance_distance", "sliced_wasserstein"), 3):
        assert targets[0][1][k] == cell(of("weightings", "x", "nelbo", samples, lambda c: c[name]))  # noqa: B023
    means = [statistics.mean(of("weightings", target, "nelbo", samples, lambda c: c["sliced_wasserstein"]))
             for target in ("x", "eps", "v")]
    largest = max(means) / min(means)
    assert left[1][5].split()[0] == (f"{largest:.2f}" if largest < 100 else f"{largest:.0f}")
    gaps = {loss: statistics.mean(of_files(folder, recipe, f"unequal-v-{loss}", "nelbo-gap.json", lambda c: c["gap"]))
            for loss, recipe in (("nelbo", "weightings"), ("edm", "weightings"), ("simple", "spaces"),
                                 ("v_space", "spaces"))}
    assert best[-1][0].startswith("unequal, v") and best[-1][1].split()[0] == min(gaps, key=gaps.get)


# Images

def test_losses_of_images_are_one_error_in_three_spaces():
    """A network of x that says 0 of images that are 0.5 everywhere."""
    one = SimpleNamespace(model=lambda: lambda z, t: 0 * z, schedule=COSINE, config=dict(
        target="x", loss="simple", schedule="cosine", stabiliser=0.0, timesteps=None))
    found = reproduce_spaces_images.test_losses(one, torch.full((600, 1, 4, 4), 0.5))
    t = reproduce_spaces_images.losses.sample_t((600,), 1e-3, run.generator("cpu", "spaces")).double()
    angle = math.pi / 2 * t
    assert found["x"] == pytest.approx(0.25)
    assert found["eps"] == pytest.approx((0.25 / angle.tan()**2).mean().item(), rel=1e-4)
    assert found["v"] == pytest.approx((0.25 / angle.sin()**2).mean().item(), rel=1e-4)


def test_of_gaussian_images_the_control_variate_saves_all():
    """eps_hat = sigma z is exact for N(0, I); with eps_hat = 0 little is in common."""
    how = dict(config=dict(target="eps", t_min=1e-3), schedule=COSINE)
    x = torch.randn(200, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    sigma = lambda t: torch.sin(math.pi / 2 * t)[:, None, None, None]
    exact = SimpleNamespace(model=lambda: lambda z, t: sigma(t) * z, **how)
    nothing = SimpleNamespace(model=lambda: lambda z, t: 0 * z, **how)
    assert reproduce_spaces_images.saved(exact, x) > 1e4
    assert 0.9 < reproduce_spaces_images.saved(nothing, x) < 3


def test_the_table_of_images_has_equal_steps_and_each_runs_numbers(tmp_path, monkeypatch):
    calls, opened = [], []

    def trained(argv):
        calls.append(argv)
        for target in "x", "eps", "v":
            for loss in "rescaled", "simple", "v_space":
                folder = tmp_path / "images-spaces" / f"set-{target}-{loss}-s0"
                if not folder.exists():                    # a finished run's checkpoint is left alone
                    folder.mkdir(parents=True)
                    (folder / "ckpt.pt").touch()

    def measure(one, data_dir):
        opened.append(one)
        return dict(losses={"x": len(opened) / 10, "eps": 2.0, "v": 3.0}, bound=[4.5678, 0.05], saved=2.04)
    monkeypatch.setattr(train, "main", trained)
    monkeypatch.setattr(run, "open", lambda folder: SimpleNamespace(
        folder=folder, model=lambda: None, checkpoint=dict(step=77, ema=dict(w=torch.zeros(3, 5))),
        config=dict(shape=[1, 2, 2], batch_size=8, precision="bf16", schedule="cosine")))
    monkeypatch.setattr(reproduce_spaces_images, "measure", measure)
    study = SimpleNamespace(args=SimpleNamespace(data="set", runs=str(tmp_path), budget=18, device="cpu",
                                                 data_dir="data", more=["--channels", "8"]))
    for _ in range(2):                                     # the second time from spaces.json
        lines = [[c.strip() for c in line.strip("|").split("|")] for line in reproduce_spaces_images.table(study)
                 if line.startswith("|")]
    assert len(opened) == 9 and "--minutes 2.0 --channels 8 --resume" in " ".join(calls[0])
    assert lines[2] == ["x", "rescaled", "0.1", "2", "3", "4.568 +- 0.050", "2.0"]
    assert lines[10][:3] == ["v", "v_space", "0.9"]
    later = (tmp_path / "images-spaces/set-x-simple-s0/spaces.json").stat().st_mtime + 9
    os.utime(tmp_path / "images-spaces/set-x-simple-s0/ckpt.pt", (later, later))      # trained again: measured again
    assert "| x | simple | 1 | 2 | 3 | 4.568 +- 0.050 | 2.0 |" in reproduce_spaces_images.table(study)
    assert len(opened) == 10
    drawn = []

    def draw(model, shape, steps, config, g, **how):
        drawn.append((shape, steps, how))
        return torch.full((12, 1, 2, 2), 20 * len(drawn), dtype=torch.uint8)
    monkeypatch.setattr(draw_images, "draw", draw)
    monkeypatch.setattr(images, "save_png", lambda x, path: drawn.append(x))
    reproduce_spaces_images.fig_samples(study, tmp_path / "a.png")
    *how, figure = drawn
    assert how == [((12, 1, 2, 2), 32, dict(sampler="dpmpp"))] * 9
    dark = figure[0].masked_select(figure[0] < 255).unique().tolist()
    assert dark == [20 * k for k in range(1, 10)] and figure.shape[0] == 1
    place = lambda value: (figure[0] == value).nonzero().float().mean(0)
    assert place(20)[0] == place(60)[0] < place(80)[0] and place(20)[1] == place(80)[1] < place(40)[1]
