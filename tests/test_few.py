"""The table of few evaluations, on a study of four small networks."""

import pytest
from test_reproduce import expected_cell, metrics_of
from test_slides import CACHES

import kind_points
import reproduce
import reproduce_few
import run
import samplers
from datasets2d import DATASETS
from ddpm import SCHEDULES
from mlp import MLP

COSINE, SETS = SCHEDULES["cosine"], ("clusters", "unequal")            # those whose exact denoiser takes no time


def call(folder, *more):
    """The table, without its last line: the command."""
    reproduce.main(["few", "--seeds", "2", "--epochs", "2", "--num-samples", "2000", "--device", "cpu",
                    "--runs", str(folder / "runs"), "--out", str(folder / "results"), *more])
    return (folder / "results/beyond/few.md").read_text().rsplit("\n`python", 1)[0]


def recorded(folder):
    return call(folder, "--recorded", "--runs", str(folder / "none"))


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    folder, patch = tmp_path_factory.mktemp("few"), pytest.MonkeyPatch()
    for cache in CACHES:                                               # of another number of points
        cache.cache_clear()
    patch.setattr(kind_points, "POINTS", 5000)
    patch.setattr(kind_points, "build_model", lambda config, members=1: MLP(width=8, members=members))
    patch.setattr(reproduce_few, "FOUR", SETS)
    patch.setattr(reproduce_few, "SAMPLERS", ["unipc"])
    patch.setattr(reproduce_few, "NUMBERS", [16])
    patch.setattr(reproduce_few, "SLOW", ("ancestral", "t", 128))
    patch.setattr(reproduce_few, "WAYS", [("unipc", "t", 16), ("unipc", "optimal", 16), ("ancestral", "t", 128)])
    patch.setattr(reproduce_few, "WITHIN", 0.3)
    patch.setattr(reproduce_few, "FAST_EPOCHS", 1)
    yield folder, call(folder)
    patch.undo()
    for cache in CACHES:
        cache.cache_clear()


def test_the_table_of_few_evaluations(study):
    """Networks from their metrics.json, the exact denoiser drawn here; the count of sets at the floor from both."""
    folder, text = study
    assert text == recorded(folder)
    lines = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")]
    assert [line[:2] for line in lines[2:4]] == [line[:2] for line in lines[6:8]] == [["unipc", "t"],
                                                                                      ["unipc", "optimal"]]
    close, near, data = [0, 0, 0], [0, 0, 0], iter(SETS)
    details, of_fast = lines[8:-6], lines[-6:]
    for line in details:
        if line[0] == "evaluations":
            name = next(data)
        if line[1] not in ("unipc, optimal",):
            continue
        found, slow = ([metrics_of(folder, name, "v", made, recipe) for recipe in (
            "stabilised-2-epochs", "stabilised-fast-1-epochs")] for made in (
            "steps-16-2000-unipc-optimal", "steps-128-2000"))
        for which in found, slow:
            which.append([kind_points.measure(dict(data=name), samplers.sample(
                DATASETS[name].optimal_model("v", COSINE), (2000, 2), 16 if which is found else 128, target="v",
                schedule=COSINE, generator=run.generator("cpu", seed, "sample"),
                **dict(sampler="unipc", grid="optimal") if which is found else {})) for seed in (0, 1)])
        distances = "mean_distance", "covariance_distance", "sliced_wasserstein"
        gap = lambda measured: sum(m["log_density"] - m["log_density_data"] for m in measured) / 2
        for i, measured in enumerate(found):
            shown = [expected_cell([m[key] for m in measured]) for key in distances] + [
                expected_cell([m["log_density"] - m["log_density_data"] for m in measured])]
            assert shown == ([line[2 + 2 * d + i // 2] for d in range(4)] if i != 1 else
                             next(row for row in of_fast if row[:3] == [name, "unipc, optimal", "16"])[3:])
            at_floor = all(sum(m[key] for m in measured) / 2 <= measured[0][f"{key}_floor"]["mean"]
                           + 2 * measured[0][f"{key}_floor"]["std"] for key in distances)
            close[i] += at_floor
            near[i] += abs(gap(measured) - gap(slow[i])) <= 0.3 and at_floor
    assert lines[3][2] == "{} / {} / {}".format(*close) and lines[7][2] == "{} / {} / {}".format(*near)
    assert near == [0, 0, 2] and [row[:3] for row in of_fast[-2:]] == [["unequal", "unipc, optimal", "16"],
                                                                       ["unequal", "ancestral, t", "128"]]


@pytest.mark.parametrize("distance, gap, slow_gap, expected", [
    (1.0, 0.1, 0.1, True), (1.19, 0.14, 0.1, True), (1.21, 0.1, 0.1, False), (1.0, 0.16, 0.1, False),
    (1.0, 0.04, 0.1, False), (1.0, 0.03, 0.0, True), (1.0, -0.01, 0.1, False)])
def test_what_is_at_the_floor(distance, gap, slow_gap, expected, monkeypatch):
    """A floor of 1 +- 0.1, gaps that may differ by 0.05 nats, two seeds."""
    monkeypatch.setattr(reproduce_few, "WITHIN", 0.05)
    def results(distance, gap):
        one = {name: distance for name in reproduce_few.DISTANCES} | {
            f"{name}_floor": {"mean": 1.0, "std": 0.1} for name in reproduce_few.DISTANCES}
        return [one | {"log_density": gap - 3 + d, "log_density_data": -3} for d in (-0.01, 0.01)]
    assert reproduce_few.is_as_slow(results(distance, gap), results(5.0, slow_gap)) is expected
