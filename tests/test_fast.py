"""Two recipes side by side, on a study of small networks; --recipe fast of any result."""
import json
import math
import re

import pytest
from conftest import cells
from test_reproduce import expected_cell
from test_slides import CACHES

import kind_points
import reproduce
import reproduce_fast
import run
import study as study_file
from mlp import MLP
from recipes import SWEEP

SETS = ["clusters", "unequal"]
SWEPT = ["thesis", "adam-ema", "adam-bf16"]


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """(folder, text of the table, of the sweep): two seeds, two epochs of Adam and one of Muon."""
    folder, patch = tmp_path_factory.mktemp("fast"), pytest.MonkeyPatch()
    clear = lambda: [cache.cache_clear() for cache in (*CACHES, study_file.nelbo_points)]
    clear()
    patch.setattr(kind_points, "POINTS", 5000)
    patch.setattr(kind_points, "build_model", lambda config, members=1: MLP(width=8, members=members))
    patch.setattr(reproduce_fast, "FOUR", SETS)
    patch.setattr(reproduce_fast, "SWEPT", dict(data=["clusters"], target=["x", "eps"]))
    patch.setattr(reproduce_fast, "SWEEP", {name: SWEEP[name] for name in SWEPT})
    patch.setattr(reproduce_fast, "FAST_EPOCHS", 1)
    patch.setattr(reproduce_fast, "SAMPLER", (6, "dpmpp", "logsnr"))

    def call(name, *more):
        reproduce.main([name, "--seeds", "2", "--epochs", "2", "--num-samples", "2000", "--device", "cpu", "--runs",
                        str(folder / "runs"), "--out", str(folder / "results"), *more])
        return (folder / f"results/beyond/{name}.md").read_text().rsplit("\n`python", 1)[0]
    texts = [call(name) for name in ("fast", "sweep")]
    assert [call(name, "--recorded") for name in ("fast", "sweep")] == texts
    yield folder, *texts
    patch.undo()
    clear()


def histories(folder, recipe, *key):
    return [json.loads((folder / "runs" / recipe / "{}-{}-{}-s{}".format(*key, seed) / "metrics.jsonl").read_text()
                       .splitlines()[-1]) for seed in (0, 1)]


def test_distances_and_times_are_those_of_the_runs(study):
    folder, text, _ = study
    lines = cells(text.splitlines())
    shown = {line[0]: line[1:] for line in lines}
    ratios, seconds = [], {}
    for data in SETS:
        for target in "x", "eps", "v", "s":
            row = []
            for loss in "mse", "nelbo_stable":
                means = {}
                for recipe in "side-by-side-2-epochs", "side-by-side-fast-1-epochs":
                    last = histories(folder, recipe, data, target, loss)
                    gaps = [h["test_loss"] - h["optimum"] for h in last]
                    row.append(expected_cell([1000 * gap for gap in gaps]))
                    means[recipe] = sum(gaps) / 2
                    seconds[recipe] = seconds.get(recipe, 0.0) + sum(h["seconds"] for h in last)
                ratios.append(means["side-by-side-fast-1-epochs"] / means["side-by-side-2-epochs"])
            assert shown[f"{data}, {target}"] == row
    mean = math.exp(sum(map(math.log, ratios)) / len(ratios))
    slow, quick = seconds.values()
    assert f"Of 16 test losses {sum(ratio <= 1 for ratio in ratios)} are no farther" in text
    assert f"geometric mean {mean:.2f}, at most {max(ratios):.2f}." in text
    assert float(re.search(r"a ratio of ([0-9.]+)\.\n", text)[1]) == pytest.approx(quick / slow, abs=0.0051)


def test_what_it_does_to_v(study):
    folder, text, _ = study
    lines = cells(text.splitlines())
    of = {line[0]: line[1:] for line in lines if line[0].endswith((", thesis", ", fast"))}
    assert [*of] == ["clusters, thesis", "clusters, fast", "unequal, thesis", "unequal, fast"]
    for name, recipe in ("unequal, thesis", "side-by-side-2-epochs"), ("unequal, fast", "side-by-side-fast-1-epochs"):
        folders = [folder / "runs" / recipe / f"unequal-v-mse-s{seed}" for seed in (0, 1)]
        read = lambda file: [json.loads((one / file).read_text()) for one in folders]                   # noqa: B023
        samples = read("steps-6-2000-dpmpp-logsnr/metrics.json")
        assert of[name][0] == expected_cell([found["gap"] for found in read("nelbo-gap.json")])
        assert of[name][1] == expected_cell([found["exact gap"][0] for found in read("exact-gap.json")])
        assert of[name][2] == expected_cell([found["sliced_wasserstein"] for found in samples])
        assert of[name][4] == expected_cell([found["log_density"] - found["log_density_data"] for found in samples])


def test_the_fast_recipe_is_muon_in_bf16_with_stable_targets(study):
    folder, *_ = study
    slow, fast = (run.open(folder / "runs" / recipe / "clusters-v-mse-s0").config
                  for recipe in ("side-by-side-2-epochs", "side-by-side-fast-1-epochs"))
    changed = {key: value for key, value in fast.items() if slow[key] != value}
    assert changed == dict(optimizer="muon", precision="bf16", epochs=1, stable_targets=True,
                           t_density="loss_aware")


def test_the_sweep_is_of_the_runs_beside_the_first_row(study):
    folder, _, text = study
    lines = cells(text.splitlines())
    titles = ["Adam", "Adam lr 2e-3 ema 0.999", "Adam lr 2e-3 precision bf16"]
    assert [line[:2] for line in lines[2:]] == [[title, epochs] for title, epochs in zip(titles, "211")]
    recipes = ["sweep-thesis-2-epochs", "sweep-adam-ema-1-epochs", "sweep-adam-bf16-1-epochs"]
    found = {(recipe, target, loss): histories(folder, recipe, "clusters", target, loss)
             for recipe in recipes for target in ("x", "eps") for loss in ("mse", "nelbo_stable")}
    far = {key: sum(h["test_loss"] - h["optimum"] for h in last) for key, last in found.items()}
    time = {recipe: sum(h["seconds"] for key, last in found.items() if key[0] == recipe for h in last)
            for recipe in recipes}
    for recipe, line in zip(recipes, lines[2:]):
        assert line[2:4] == [", ".join(f"{far[recipe, target, loss] / far[recipes[0], target, loss]:.2f}"
                                       for target in ("x", "eps")) for loss in ("mse", "nelbo_stable")]
        assert float(line[4]) == pytest.approx(time[recipe] / time[recipes[0]], abs=0.0051)
    config = run.open(folder / "runs/sweep-adam-ema-1-epochs/clusters-x-mse-s1").config
    assert (config["t_min"], config["stabiliser"], config["lr"], config["ema"]) == (1e-6, 0.01, 2e-3, 0.999)


def test_recipe_fast_of_any_result():
    """Fewer epochs unless they are said, and never into the results of the thesis's recipe."""
    fast = reproduce.parse(["table4.1", "--recipe", "fast"])
    assert (fast.epochs, fast.out) == (15, "runs/results")
    assert reproduce.parse(["table4.1"]).epochs == 100 and reproduce.parse(["table4.1"]).out == "results"
    assert reproduce.parse(["table4.1", "--recipe", "fast", "--epochs", "7"]).epochs == 7
    study = reproduce.Study(fast)
    line = {"curves": {"test_loss": [1.0]}, "optimum": {}, "seconds": 1.0}
    study.records = {f"stabilised-fast/rings-v-mse-s{seed}": line for seed in range(3)}
    fast.recorded = True
    runs = study.trained("stabilised", ["mse"], ["rings"], ["v"])
    assert {one.config["optimizer"] for one in runs.values()} == {"muon"}
