"""Tables and figures from a small study: every cell and curve from the runs' own files, nothing done twice."""
import json
import os
import re
import shutil
import statistics
import types

import numpy as np
import pytest
import torch
from test_datasets2d import COARSE
from torch.testing import assert_close

import kind_points
import likelihood
import losses
import metrics
import optimum
import plots
import reproduce
import reproduce_beyond
import reproduce_thesis
import run
import samplers
import study as study_file
import train_points
from datasets2d import DATASETS, GaussianMixture
from ddpm import SCHEDULES
from mlp import MLP

COSINE = SCHEDULES["cosine"]
FIGURES = {"fig3.2": "over_time", "fig4.1": "scatter", "fig4.2": "point_grid", "fig4.8": "loss_curves",
           "fig4.9": "loss_curves", "fig4.10": "scalings", "fig4.11": "over_t", "fig4.12": "point_grid",
           "fig4.13": "point_grid", "fig4.14": "over_t",
           "appendix1": "over_t", "appendix2": "over_t", "appendix3": "over_t", "appendix4": "point_grid",
           "appendix5": "point_grid", "appendix6": "point_grid", "steps-covariance": "over_evaluations",
           "steps-wasserstein": "over_evaluations", "nelbo": "loss_curves", "trajectories": "trajectories"}
ELSEWHERE = "few", "eps-flows", "eps-flows-fast", "fast", "sweep"          # test_few.py, test_flows.py, test_fast.py


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """`all` with two seeds, two epochs of a narrow network on 5,000 points, 2 and 16 steps -> (folder, drawn, call)."""
    folder, drawn, patch = tmp_path_factory.mktemp("study"), {}, pytest.MonkeyPatch()
    caches = optimum.optimal_predictions, optimum.optimal_errors, kind_points.floors, study_file.nelbo_points
    clear = lambda: [cache.cache_clear() for cache in caches]        # they hold datasets of another size
    clear()
    patch.setattr(kind_points, "POINTS", 5000)
    for name, data in COARSE.items():
        patch.setitem(DATASETS, name, data)
    patch.setattr(kind_points, "build_model", lambda config, members=1: MLP(width=8, members=members))
    patch.setattr(reproduce_thesis, "STEPS", [2, 16])
    patch.setattr(reproduce_beyond, "STEPS", [2, 16])
    patch.setattr(reproduce_beyond, "SWEEPS", {"t": [2, 16], "logsnr": [16]})
    patch.setattr(reproduce_beyond, "FEW", [16])
    patch.setattr(reproduce_beyond, "COMPARED", ["flow", "edm"])
    patch.setattr(reproduce_beyond, "EVERY", ["u", "F"])
    patch.setattr(reproduce_beyond, "SAMPLERS", ("ancestral", "dpmpp"))
    patch.setattr(metrics, "log_density", lambda data, x: data.log_prob(x[:200]).mean())
    patch.setattr(study_file, "DRAWS", 4)
    patch.setattr(reproduce_beyond, "DRAWS", 4)
    patch.setattr(study_file, "ODE_STEPS", 3)
    patch.setattr(plots.plt.Figure, "tight_layout", lambda *args, **kw: None)              # tested in test_plots.py
    patch.setattr(plots, "save", lambda fig, path: (plots.plt.close(fig), run.write(path, b"\x89PNG")))
    read, original_open = {}, run.open

    def open_once(path):                                           # more than 700 times else, of 160 runs
        file = (path / "ckpt.pt").stat()
        key = path, file.st_ino, file.st_mtime_ns
        if key not in read:
            read[key] = original_open(path)
        return read[key]
    patch.setattr(run, "open", open_once)
    for name in set(FIGURES.values()):
        original = getattr(plots, name)

        def spy(*arguments, original=original):
            third = "over_time", "scalings", "over_t", "over_evaluations", "trajectories"
            which = 2 if original.__name__ in third else 1
            drawn[arguments[which].stem] = arguments
            return original(*arguments)
        patch.setattr(plots, name, spy)
    call = lambda name: reproduce.main([name, "--seeds", "2", "--epochs", "2", "--num-samples", "2000",
                                        "--device", "cpu", "--runs", str(folder / "runs"),
                                        "--out", str(folder / "results")])
    patch.setattr(reproduce, "RESULTS", {name: row for name, row in reproduce.RESULTS.items()
                                         if row[0] in ("thesis", "beyond")
                                         and name not in ELSEWHERE})
    # others: test_foundations.py, ...
    call("all")
    yield folder, drawn, call
    patch.undo()
    clear()


def history(folder, loss, data, target, seed):
    kind = {"nelbo": "exact"}.get(loss, "stabilised")
    lines = (folder / "runs" / f"{kind}-2-epochs" / f"{data}-{target}-{loss}-s{seed}" / "metrics.jsonl").read_text()
    return [json.loads(line) for line in lines.splitlines()]


def expected_cell(values):
    mean, std = sum(values) / 2, abs(values[0] - values[1]) / 2**0.5
    digits = "{:.3f}" if -100 < mean < 100 else "{:.0f}" if -1e6 < mean < 1e6 else "{:.0e}"
    return f"{digits.format(mean)} +- {digits.format(std)}"


def test_table_4_1_is_the_runs_own_numbers(study):
    folder, _, _ = study
    text = (folder / "results/thesis/table4.1.md").read_text()
    rows = [[cell.strip() for cell in line.strip("|").split("|")]
            for line in text.splitlines() if line.startswith("| ")]
    rows = [row for row in rows if row[0] in DATASETS]
    assert len(rows) == 64 and "of 32 test losses lie within 5 %" in text \
        and "python reproduce.py table4.1 --seeds 2 --epochs 2 --num-samples 2000" in text
    for k, loss in enumerate(["nelbo_stable", "mse"]):
        for row in rows[16 * k:16 * k + 16]:
            data, target = row[:2]
            last = [history(folder, loss, data, target, seed)[-1] for seed in range(2)]
            thesis = reproduce_thesis.THESIS[data, target][3 * k:3 * k + 3]
            assert [row[2], row[5], row[8]] == [f"{value:.3f}" for value in thesis]
            assert row[3:5] == [expected_cell([h["test_loss"] for h in last]), f"{last[0]['optimum']:.3f}"]
            made = [json.loads((folder / "runs" / "stabilised-2-epochs" / f"{data}-{target}-{loss}-s{seed}"
                                / "steps-16-2000" / "metrics.json").read_text()) for seed in range(2)]
            assert row[6] == expected_cell([m["mean_distance"] for m in made])
            assert row[9] == expected_cell([m["covariance_distance"] for m in made])
            assert row[7] == "{mean:.3f} +- {std:.3f}".format(**made[0]["mean_distance_floor"])
            assert row[11] == expected_cell([m["log_density"] - m["log_density_data"] for m in made])
            assert row[10] == "{mean:.3f} +- {std:.3f}".format(**made[0]["covariance_distance_floor"])
            assert [m["sampling_seed"] for m in made] == [0, 1] and made[0]["steps"] == 16
    for row, columns in [
            (row, [("stabilised", "mse"), ("stabilised", "nelbo_stable"), ("exact", "nelbo")]) for row in rows[32:48]
    ] + [(row, [("plain", "mse"), ("exact", "nelbo"), ("logsnr", "nelbo")]) for row in rows[48:]]:
        data, target = row[:2]
        for column, (recipe, loss) in enumerate(columns, 2):
            values = []
            for seed in range(2):
                state = run.load(folder / "runs" / f"{recipe}-2-epochs" / f"{data}-{target}-{loss}-s{seed}")
                model = kind_points.build_model(state["config"])
                model.load_state_dict(state["model"])
                values.append(study_file.exact_nelbo(model, target, data, state["config"]["stabiliser"]).mean().item())
            assert row[column] == expected_cell(values)
            assert statistics.mean(values) > float(row[5].split()[0]) > 5


def test_the_thesis_column_is_table_4_1():
    """The losses are typed a second time in test_losses.py, the distances here, column by column."""
    from test_losses import THESIS
    distances = {0: [.1754, .0364, .0307, .2279, .2744, .0914, .0459, .2254,
                     .1133, .0689, .0418, .1266, .1593, .0405, .0447, .0353],
                 1: [.5746, .0706, .0409, .1498, .3807, .1107, .0718, .1563,
                     .2645, .0941, .0598, .1972, .5559, .0757, .0738, .1369],
                 2: [.4300, .0634, .0389, .2688, .2807, .0983, .0453, .2220,
                     .5256, .0857, .0427, .0893, .1869, .0748, .0131, .0178],
                 3: [.2715, .1430, .0363, .1633, .3974, .0366, .0088, .1637,
                     .6875, .0824, .0269, .1227, .6911, .0778, .0271, .1676]}
    for i, ((data, target), row) in enumerate(reproduce_thesis.THESIS.items()):
        weighted, nelbo = THESIS[data][:4], THESIS[data][4:]
        k = ["x", "eps", "v", "s"].index(target)
        assert row == [nelbo[k], distances[0][i], distances[1][i], weighted[k], distances[2][i], distances[3][i]]
        assert target == study_file.TARGETS[i % 4] and data == list(DATASETS)[i // 4]


def test_the_runs_have_the_thesiss_settings_and_the_exact_ones(study):
    folder, _, _ = study
    config = lambda name: json.loads((folder / "runs" / name / "config.json").read_text())
    for recipe, loss, t_min, stabiliser, density, n in (
            ("stabilised", "mse", 1e-6, 0.01, "uniform", 64), ("exact", "nelbo", 1e-3, 0, "uniform", 32),
            ("plain", "mse", 1e-3, 0, "uniform", 32), ("logsnr", "nelbo", 1e-3, 0, "logsnr", 32)):
        found = config(f"{recipe}-2-epochs/rings-s-{loss}-s1")
        assert [found[key] for key in ("t_min", "stabiliser", "t_density")] == [t_min, stabiliser, density]
        assert len(list((folder / "runs" / f"{recipe}-2-epochs").iterdir())) == n


def test_tables_and_curves_come_from_the_recorded_numbers_alone(study, tmp_path, monkeypatch):
    """runs.jsonl has a line for each run; with it and no networks the tables are the same but for the seconds, and the
    command."""
    folder, drawn, _ = study
    shutil.copytree(folder / "results", tmp_path / "results")
    lines = [json.loads(line) for line in (tmp_path / "results/thesis/runs.jsonl").read_text().splitlines()]
    assert len(lines) == 160 == len({line["run"] for line in lines})
    one, = (line for line in lines if line["run"] == "stabilised/waves-v-mse-s1")
    last = history(folder, "mse", "waves", "v", 1)[-1]
    assert one["config"] == json.loads((folder / "runs/stabilised-2-epochs/waves-v-mse-s1/config.json").read_text())
    assert one["curves"]["test_loss"][1] == pytest.approx(last["test_loss"], rel=1e-5) \
        and one["seconds"] == last["seconds"]
    assert one["torch"] == torch.__version__ and one["machine"] == "cpu, 1 thread".replace("1 thread", run.device_name(
        torch.device("cpu")).split(", ")[1])
    drawn_before = {name: drawn[name] for name in ("fig4.8", "fig4.9", "fig4.14", "nelbo", "steps-covariance")}

    def never(*args, **kw):
        raise AssertionError("a network was used")
    monkeypatch.setattr(run, "load", never), monkeypatch.setattr(run, "open", never), \
        monkeypatch.setattr(train_points, "train_stack", never)
    call = lambda name: reproduce.main([name, "--seeds", "2", "--epochs", "2", "--num-samples", "2000",
                                        "--device", "cpu", "--recorded", "--runs", str(tmp_path / "none"),
                                        "--out", str(tmp_path / "results")])
    for document, name in ("thesis", "table4.1"), ("beyond", "steps"), ("beyond", "likelihood"):
        call(name)
        old, new = ((root / "results" / document / f"{name}.md").read_text().splitlines()
                    for root in (folder, tmp_path))
        assert len(old) == len(new)
        for a, b in zip(old, new):
            if not ("training" in a or "reproduce.py" in a or "Monte Carlo" in a):
                number = r"\d+\.?\d*(?:e[+-]?\d+)?"      # of eight digits in runs.jsonl: the last may differ
                assert re.sub(number, "#", a) == re.sub(number, "#", b)
                assert [float(n) for n in re.findall(number, a)] == pytest.approx(
                    [float(n) for n in re.findall(number, b)], rel=1e-5)
    for name, before in drawn_before.items():
        call(name)
        for a, b in zip(numbers(before[0]), numbers(drawn[name][0]), strict=True):
            assert_close(b, a, rtol=1e-4, atol=1e-5)
    drawn.update(drawn_before)                 # of the networks, for the tests that follow
    assert (tmp_path / "results/thesis/runs.jsonl").read_text() == (folder / "results/thesis/runs.jsonl").read_text()
    with pytest.raises(SystemExit, match="^no curves of stabilised/clusters-x-mse-s2 in runs.jsonl - "
                                         "leave out --recorded"):
        reproduce.main(["fig4.8", "--seeds", "3", "--epochs", "2", "--recorded", "--out", str(tmp_path / "results")])
    for name in "fig4.11", "fig4.12", "appendix4":
        with pytest.raises(SystemExit, match="^this is not in runs.jsonl, it needs the networks themselves - leave"):
            call(name)
    (tmp_path / "results/thesis/runs.jsonl").write_text("{")
    with pytest.raises(SystemExit, match="runs.jsonl is damaged - delete it"):
        call("fig4.8")


def test_nothing_is_done_twice_and_what_is_missing_is(study, monkeypatch, capsys):
    folder, _, call = study
    text = (folder / "results/thesis/table4.1.md").read_text()

    def never(*args, **kw):
        raise AssertionError("done twice")
    monkeypatch.setattr(train_points, "train_stack", never)
    with monkeypatch.context() as patch:
        patch.setattr(kind_points, "draw", never)
        patch.setattr(likelihood, "evaluate", never)
        call("table4.1"), call("fig4.12"), call("steps"), call("likelihood")
        assert (folder / "results/thesis/table4.1.md").read_text() == text
    made, judged = folder / "runs" / "stabilised-2-epochs" / "waves-v-mse-s1", []
    before = (made / "steps-16-2000" / "samples.npy").read_bytes()
    os.utime(made / "ckpt.pt",
             ((made / "steps-16-2000" / "metrics.json").stat().st_mtime + 10,) * 2)                # trained again since
    calls, original = [], kind_points.draw
    monkeypatch.setattr(kind_points, "draw", lambda runs, *rest, **how:
                        calls.append((len(runs.members), *rest[:3])) or original(runs, *rest, **how))
    call("fig4.12")
    assert calls == [(1, 16, 2000, 1)]
    evaluate = likelihood.evaluate
    os.utime(made / "likelihood-500-4-3.json", (0, 0))
    monkeypatch.setattr(likelihood, "evaluate", lambda *args, **kw: judged.append(args) or evaluate(*args, **kw))
    call("likelihood")
    assert len(judged) == 1
    assert np.allclose(np.frombuffer(before[128:], np.float32),
                       np.load(made / "steps-16-2000" / "samples.npy").ravel(), atol=1e-3)
    (made / "ckpt.pt").unlink()
    with pytest.raises(AssertionError, match="done twice"):
        call("fig4.8")
    monkeypatch.undo()
    call("fig4.8")
    assert "31 of 32 runs are finished already" in capsys.readouterr().out
    state = run.load(made)
    run.save(made / "ckpt.pt", state | {"history": state["history"][:1]})         # as if stopped after its first epoch
    call("fig4.8")
    assert len(run.load(made)["history"]) == 2


def test_the_table_of_steps(study):
    folder, _, _ = study
    rows = [line.split(" | ") for line in (folder / "results/beyond/steps.md").read_text().splitlines()
            if line.startswith("| ")]
    assert [row[0] for row in rows[:5]] == ["| steps", "| ---", "| 2", "| 16", "| floor"]
    made = [json.loads((folder / "runs" / "stabilised-2-epochs" / f"rings-x-mse-s{seed}" / "steps-2-2000"
                        / "metrics.json").read_text()) for seed in range(2)]
    assert rows[2][1] == expected_cell([m["covariance_distance"] for m in made])
    gaps = [m["log_density"] - m["log_density_data"] for m in made]
    assert rows[2][4].startswith(f"{sum(gaps) / 2:.3f} +- ")
    assert not rows[3][3].endswith("+- 0.000")                       # other noise for every seed
    exact = float(rows[3][3].split()[0]), float(rows[3][6].split()[0])
    assert 0.08 < exact[0] < 0.2 and 0.08 < exact[1] < 0.12              # the exact denoiser at 16 steps
    samples = [samplers.sample(DATASETS["rings"].optimal_model("v", COSINE), (2000, 2), 16, target="v", schedule=COSINE,
                               generator=run.generator("cpu", seed, "sample")) for seed in range(2)]
    real = kind_points.load(dict(data="rings"))
    assert rows[3][3] == expected_cell([metrics.covariance_distance(x, real).item() for x in samples])
    densities = [DATASETS["rings"].log_prob(x[:200]).mean().item() - made[0]["log_density_data"] for x in samples]
    assert rows[3][6].startswith(expected_cell(densities))
    for column in 1, 2, 3:
        assert rows[4][column] == "{mean:.3f} +- {std:.3f}".format(**made[0]["covariance_distance_floor"])


def metrics_of(folder, data, target, name, recipe="stabilised-2-epochs"):
    return [json.loads((folder / "runs" / recipe / f"{data}-{target}-mse-s{seed}" / name
                        / "metrics.json").read_text()) for seed in range(2)]


def test_the_tables_of_samplers(study):
    """Evaluations until the floor, v in few evaluations, eps and s on each grid: from the files of the runs."""
    folder, _, _ = study
    rows = [line.strip("| ").split(" | ") for line in (folder / "results/beyond/steps.md").read_text().splitlines()
            if line.startswith("| ")]
    t_grid, logsnr_grid, few, hard, noisy = rows[5:23], rows[23:41], rows[41:59], rows[59:69], rows[69:]
    assert t_grid[0] == ["data", "target", "ancestral", "dpmpp"] \
        and few[0][1] == "sampler, grid" and hard[0][2:4] == ["t, 16", "logsnr, 16"]
    assert len(hard) == 10 and len({tuple(row[:2]) for row in t_grid[2:]}) == 16
    distances = ["covariance_distance", "sliced_wasserstein"]
    for table, grid, numbers in (t_grid, "t", [2, 16]), (logsnr_grid, "logsnr", [16]):
        for data, target, *cells in table[2:]:
            for sampler, found in zip(("ancestral", "dpmpp"), cells):
                expected = []
                for distance in distances:
                    reached = "-"
                    for n in reversed(numbers):
                        made = metrics_of(folder, data, target, f"steps-{n}-2000" + (
                            f"-{sampler}-{grid}" if (sampler, grid) != ("ancestral", "t") else ""))
                        floor = made[0][f"{distance}_floor"]
                        if sum(m[distance] for m in made) / 2 <= floor["mean"] + 2 * floor["std"] / 2**0.5:
                            reached = str(n)
                        assert (made[0]["sampler"], made[0]["grid"], made[0]["steps"]) == (sampler, grid, n)
                    expected.append(reached)
                assert found == " / ".join(expected)
    clusters = metrics_of(folder, "clusters", "v", "steps-16-2000")[0]
    assert few[5][3:5] == ["{mean:.3f} +- {std:.3f}".format(**clusters[f"{d}_floor"]) for d in distances]
    data, how, n, *cells = few[4]
    assert (data, how, n) == ("clusters", "dpmpp, logsnr", "16")
    made = metrics_of(folder, "clusters", "v", "steps-16-2000-dpmpp-logsnr")
    assert cells == [expected_cell([m[d] for m in made]) for d in distances] + [
        expected_cell([m["log_density"] - m["log_density_data"] for m in made])]
    for row in hard[2], hard[-1]:
        made = metrics_of(folder, *row[:2], "steps-16-2000-dpmpp-logsnr")
        assert row[3] == study_file.cell([m["sliced_wasserstein"] for m in made])
        assert row[4] == "{mean:.3f} +- {std:.3f}".format(**made[0]["sliced_wasserstein_floor"])
    assert [hard[2][:2], hard[-1][:2]] == [["clusters", "eps"], ["waves", "s"]]
    assert noisy[0] == ["data", "target", "ancestral", "dpmpp", "floor"] and len(noisy) == 18
    assert noisy[-1][:2] == ["waves", "s"] and noisy[-1][3:] == hard[-1][3:]


def test_the_floor_is_reached_within_two_standard_errors_of_a_mean_of_the_seeds():
    """0.25 * 2 / sqrt(n): 0.354 for two seeds, 0.25 for four."""
    results = lambda *values: [{"d": value, "d_floor": {"mean": 1.0, "std": 0.25}} for value in values]
    assert reproduce_beyond.at_floor(results(1.2, 1.50), "d") and not reproduce_beyond.at_floor(results(1.2, 1.51), "d")
    assert reproduce_beyond.at_floor(4 * results(1.249), "d") and not reproduce_beyond.at_floor(4 * results(1.251), "d")


def test_the_curves_over_evaluations(study):
    folder, drawn, _ = study
    for name in "covariance_distance", "sliced_wasserstein":
        panels, label, path = drawn["steps-covariance" if name.startswith("c") else "steps-wasserstein"]
        assert label == name.replace("_", " ") and list(panels) == list(reproduce_thesis.THESIS)
        floor, curves = panels["waves", "eps"]
        made = {n: metrics_of(folder, "waves", "eps", f"steps-{n}-2000-dpmpp-t") for n in (2, 16)}
        assert curves["dpmpp"] == [(n, [m[name] for m in made[n]]) for n in (2, 16)] \
            and list(curves) == ["ancestral", "dpmpp"]
        assert floor == made[2][0][f"{name}_floor"]


def test_the_evaluations_of_a_curve_are_those_of_the_network():
    calls = []
    for sampler in samplers.SAMPLERS:
        calls.clear()
        samplers.sample(lambda z, t: calls.append(t) or 0 * z, (3, 2), 8, target="v", schedule=COSINE, sampler=sampler)
        assert len(calls) == samplers.evaluations(sampler, 8), sampler


def test_the_table_of_likelihoods(study):
    folder, _, _ = study
    text = (folder / "results/beyond/likelihood.md").read_text()
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")][2:]
    assert len(rows) == 80 and len({tuple(row[:3]) for row in rows}) == 80
    for data, target, loss, kind, title in (("clusters", "x", "mse", "stabilised", "`mse`"),
                                            ("waves", "v", "nelbo", "exact", "`nelbo`"),
                                            ("rings", "s", "nelbo_stable", "stabilised", "`nelbo_stable`"),
                                            ("rings", "eps", "mse", "plain", "`mse`, exact"),
                                            ("waves", "x", "nelbo", "logsnr", "`nelbo`, log-SNR")):
        row, = (row for row in rows if row[:3] == [data, target, title])
        x, found = kind_points.load(dict(data=data))[:500].double(), {"bound": [], "exact": [], "median": []}
        entropy = -DATASETS[data].log_prob(x)
        for seed in range(2):
            state = run.load(folder / "runs" / f"{kind}-2-epochs" / f"{data}-{target}-{loss}-s{seed}")
            model = kind_points.build_model(state["config"]).double()
            model.load_state_dict(state["model"])
            options = dict(target=target, schedule=COSINE, stabiliser=state["config"]["stabiliser"])
            terms = likelihood.bound(model, x, draws=4, generator=run.generator("cpu", "likelihood"), **options)
            found["bound"].append((terms["prior"] + terms["reconstruction"] + terms["diffusion"]).mean().item())
            exact = -likelihood.log_likelihood(model, x, steps=3, **options)[0].detach()
            found["exact"].append(exact.mean().item())
            found["median"].append((exact - entropy).median().item())
        h = entropy.mean().item()
        assert row[3:5] == [study_file.cell(found["bound"]), study_file.cell(found["exact"])] and row[5] == f"{h:.3f}"
        assert row[6:] == [study_file.cell([value - h for value in found["bound"]]),
                           study_file.cell([value - h for value in found["exact"]]),
                           study_file.cell(found["median"])]
    assert "the first 500 test points" in text and "(4 draws" in text
    ratios = [float(value) for value in re.findall(r"([\d.]+) \((?:clusters|rings|swiss_roll|waves)\)", text)]
    assert len(ratios) == 4 and min(ratios) > 3                            # t uniform has the larger variance
    errors = {"bound": [], "exact": []}
    for path in (folder / "runs").glob("*/*/likelihood-500-4-3.json"):
        for name in errors:
            gap, error = json.loads(path.read_text())[f"{name} gap"]
            errors[name] += [error] if -1 < gap < 1 else []
    said = [f"at most {max(values):.3f}" if values else "not small" for values in errors.values()]
    assert f"below 1 nat is {said[0]} for the bound" in text and f"and {said[1]} for the flow" in text


def test_the_table_of_schedules_is_the_runs_own_numbers(study):
    folder, _, _ = study
    text = (folder / "results/beyond/schedules.md").read_text()
    for sampler, part in zip(("", "-dpmpp-logsnr"), text.split("**dpmpp, grid `logsnr`**")):
        for schedule in "flow", "edm":
            values = []
            for target in "u", "F":
                runs = [folder / f"runs/schedule-{schedule}-2-epochs/rings-{target}-mse-s{seed}" for seed in (0, 1)]
                assert all(json.loads((run / "config.json").read_text())["schedule"] == schedule for run in runs)
                values.append(expected_cell([json.loads((run / f"steps-64-2000{sampler}/metrics.json").read_text())
                                             ["covariance_distance"] for run in runs]))
            assert f"| {schedule} | {values[0]} | {values[1]} |" in part


def test_samples_that_are_not_finite_are_said_to_be_and_stop_no_table(study, monkeypatch):
    folder, _, call = study
    draw = kind_points.draw

    def diverging(group, *args, **how):
        x = draw(group, *args, **how)
        for m, one in enumerate(group.members):
            if (one.config["schedule"], one.config["target"], one.config["seed"]) == ("edm", "u", 1):
                x[m, 7] = float("nan")
        return x
    monkeypatch.setattr(kind_points, "draw", diverging)
    for made in folder.glob("runs/schedule-edm-2-epochs/rings-u-mse-s1/steps-64-*/metrics.json"):
        made.rename(made.with_name("before.json"))
    call("schedules")
    text = (folder / "results/beyond/schedules.md").read_text()
    assert text.count("| edm | diverges, 1 of 2 | ") == 2
    for made in folder.glob("runs/schedule-edm-2-epochs/rings-u-mse-s1/steps-64-*/before.json"):
        made.replace(made.with_name("metrics.json"))


def test_every_figure_is_drawn_and_indexed(study):
    folder, drawn, _ = study
    assert drawn.keys() == FIGURES.keys() == {
        name for name in reproduce.RESULTS if not reproduce.is_table(name)} - reproduce.SET_BY.keys()
    for document, module in list(reproduce.DOCUMENTS.items())[:2]:           # the third: test_foundations.py
        index = (folder / "results" / document / "index.md").read_text()
        names = module.RESULTS.keys() - {*ELSEWHERE, *reproduce.SET_BY}
        for name in names:
            file = f"{name}.{'md' if name in module.TABLES else 'png'}"
            assert name in module.TABLES or (folder / "results" / document / file).exists()
            assert f"- [{file}]({file}): {module.RESULTS[name][1]}. `python reproduce.py {name} --seeds 2" in index
        assert index.count(" s on cpu, ") == len(names)
        assert not (folder / "results" / document / "README.md").exists()         # what they show is written by hand
    assert plots.plt.get_fignums() == []


def numbers(panels):
    """All arrays in nested dicts, lists and tuples, as tensors."""
    if isinstance(panels, dict):
        panels = panels.values()
    if isinstance(panels, (np.ndarray, torch.Tensor)):
        return [torch.as_tensor(panels).double()]
    if isinstance(panels, (int, float)):
        return [torch.tensor(float(panels), dtype=torch.float64)]
    return [] if panels is None or isinstance(panels, str) else [array for part in panels for array in numbers(part)]


def test_the_line_of_a_run_keeps_what_other_results_had_of_it():
    before = [{"run": "a", "config": {"lr": 1}, "samples": {"t 2": [1.0]}, "seconds": 5}, {"run": "c", "config": {}}]
    used = {"a": {"run": "a", "config": {"lr": 1}, "samples": {"t 4": [2.0]}, "seconds": 6},
            "b": {"run": "b", "config": {}}}
    assert reproduce.merged(before, used) == [
        {"run": "a", "config": {"lr": 1}, "samples": {"t 2": [1.0], "t 4": [2.0]}, "seconds": 6},
        {"run": "b", "config": {}}, {"run": "c", "config": {}}]
    used["a"]["config"] = {"lr": 2}                                         # another run: nothing of the old one counts
    assert reproduce.merged(before, used)[0]["samples"] == {"t 4": [2.0]}


def test_what_the_loss_figures_show(study):
    folder, drawn, _ = study
    weighted, rescaled = drawn["fig4.8"][0].values()
    stable, = drawn["fig4.9"][0].values()
    for rows, key, loss in ((weighted, "test_loss", "mse"), (rescaled, "test_rescaled", "mse"),
                            (stable, "test_loss", "nelbo_stable")):
        for data, target in reproduce_thesis.THESIS:
            histories = [history(folder, loss, data, target, seed) for seed in range(2)]
            values, least = rows[data][target]
            assert values.tolist() == [[h[key] for h in one] for one in histories]
            assert least == histories[0][0][key.replace("test", "optimum") if key != "test_loss" else "optimum"]
            assert (values > least).all()
    excess, = drawn["nelbo"][0].values()
    values, least = excess["waves"]["s"]
    made = [json.loads(line) for line in
            (folder / "runs/logsnr-2-epochs/waves-s-nelbo-s1/metrics.jsonl").read_text().splitlines()]
    assert least is None and values[1].tolist() == pytest.approx([h["test_nelbo"] - h["optimum_nelbo"] for h in made])
    panels = drawn["appendix2"][0]
    for target in study_file.TARGETS:
        (first, _, values, best), *_, last = panels[target]
        assert (first, last[0]) == ("epoch 1", "epoch 2")
        assert values.tolist() == torch.tensor([
            history(folder, "mse", "swiss_roll", target, seed)[0]["train_loss_over_t"] for seed in range(2)]).tolist()
        errors = optimum.optimal_errors("swiss_roll", target, "cosine", 1e-6, 0.01)
        assert abs(best.mean() / errors.mean() - 1) < 0.01           # bins of equal size


def test_what_the_variance_figure_shows(study):
    folder, drawn, _ = study
    label, target, values, best = drawn["fig4.11"][0]["waves"][2]
    assert label == target == "v" and values.shape == (2, 20)
    state = run.load(folder / "runs" / "stabilised-2-epochs" / "waves-v-mse-s1")
    model = kind_points.build_model(state["config"])
    model.load_state_dict(state["model"])
    z, t, y, _ = optimum.test_batch(state["config"])
    for errors, curve in ((model(z, t) - y).square().mean(1).detach(), values[1]), \
            (optimum.optimal_errors("waves", "v", "cosine", 1e-6, 0.01), best):
        inside = (t > 0.55) & (t < 0.6)
        assert_close(curve[11], errors[inside].var(correction=0), rtol=0.02, atol=0)


def test_what_the_images_of_points_show(study):
    folder, drawn, _ = study
    root = folder / "runs" / "stabilised-2-epochs"
    panels = drawn["fig4.12"][0]
    assert len(panels) == 36
    assert np.array_equal(panels["rings", "s, NELBO"][0],
                          np.load(root / "rings-s-nelbo_stable-s0/steps-16-2000/samples.npy")[:2000])
    assert np.array_equal(panels["waves", "x, weighted"][0],
                          np.load(root / "waves-x-mse-s0/steps-16-2000/samples.npy")[:2000])
    panels = drawn["appendix4"][0]
    assert len(panels) == 16
    points, text = panels["v, NELBO", "2 steps"]
    made = json.loads((root / "clusters-v-nelbo_stable-s0/steps-2-2000/metrics.json").read_text())
    assert text == f"{made['mean_distance']:.2f}, {made['covariance_distance']:.2f}"
    assert np.array_equal(points, np.load(root / "clusters-v-nelbo_stable-s0/steps-2-2000/samples.npy")[:2000])
    panels = drawn["fig4.2"][0]
    x, z = panels["rings", "t = 0.0"][0], panels["rings", "t = 1.0"][0]
    assert DATASETS["rings"].log_prob(x).mean() > -2 and abs(z.std() - 1) < 0.05
    assert abs((x * z).mean()) < 0.05 and abs((x * panels["rings", "t = 0.4"][0]).mean() - np.cos(0.2 * np.pi)) < 0.05


def test_what_the_analytic_figures_show(study):
    _, drawn, _ = study
    assert drawn["fig4.1"][2] == 50_000 and all(len(x) == 50_000 for x in drawn["fig4.1"][0].values())
    curves, t, _ = drawn["fig3.2"]
    assert_close(curves["cosine"], 2 * torch.log(torch.cos(torch.pi * t / 2) / torch.sin(torch.pi * t / 2)))
    exact, stabilised = drawn["fig4.10"][0].values()
    alpha, sigma = torch.cos(torch.pi * t / 2), torch.sin(torch.pi * t / 2)
    assert_close(exact["x"], torch.pi * alpha / sigma**3)            # -SNR', Eq. (3.22)
    assert_close(exact["s"], torch.pi * sigma / alpha)
    assert_close(stabilised["x"], alpha / (sigma**3 + 0.01))


def test_the_judging_points_cover_the_range_of_log_snr():
    """Their factor is half of it, 2 log cot(pi t_min / 2) for the cosine, over the length of the range of t."""
    _, t, _, factor = study_file.nelbo_points("rings")
    assert factor == pytest.approx(-2 * np.log(np.tan(0.001 * np.pi / 2)) / 0.998, rel=1e-6)
    assert 0.001 < t.min() < 0.00101 and 0.99899 < t.max() < 0.999001


def test_the_exact_nelbo_is_the_loss_with_t_uniform(monkeypatch):
    """Two estimates of one integral, and the same for every target of the exact denoiser."""
    g = torch.Generator().manual_seed(0)
    x = DATASETS["rings"].sample(200_000, g)
    t, eps = losses.sample_t((200_000,), generator=g), torch.randn(200_000, 2, generator=g)
    torch.manual_seed(1)
    model = MLP(width=32)
    for target, d in ("eps", 0.0), ("s", 0.3), ("v", 0.0):
        terms = study_file.exact_nelbo(model, target, "rings", d)
        uniform = losses.loss(model, x, t, eps, target=target, loss="nelbo", schedule=COSINE, stabiliser=d).detach()
        error = (terms.var() / len(terms) + uniform.var() / len(uniform)).sqrt()
        assert abs(terms.mean() - uniform.mean()) < 4 * error and error < 0.1 * terms.mean()
    best = [study_file.exact_nelbo(DATASETS["clusters"].optimal_model(target, COSINE, d), target, "clusters", d)
            for target, d in (("x", 0.0), ("eps", 0.0), ("s", 0.01))]
    for terms in best[1:]:
        assert_close(terms, best[0], rtol=0.02, atol=0.02)
    assert abs(best[0].mean() - 5.53) < 3 * best[0].std() / len(best[0])**0.5       # ERRATA.md of the clusters, float64
    normal = GaussianMixture(torch.zeros(1, 2, dtype=torch.float64), torch.ones(2, dtype=torch.float64))
    monkeypatch.setitem(DATASETS, "normal", normal)
    terms = study_file.exact_nelbo(normal.optimal_model("v", COSINE), "v", "normal")
    # 1/2 integral of sigmoid over log-SNR
    half_range = -torch.log(torch.tan(torch.tensor(0.001 * torch.pi / 2))).item()
    assert abs(terms.mean() - half_range / 0.998) < 4 * terms.std() / len(terms)**0.5


@pytest.mark.parametrize("target, loss", [("eps", "mse"), ("x", "nelbo_stable"), ("s", "nelbo"), ("v", "rescaled")])
def test_nothing_lies_below_the_optimum_by_more_than_its_monte_carlo_error(target, loss):
    """The exact denoiser against itself, pushed a little in any direction: every push costs."""
    config = dict(data="waves", target=target, loss=loss, schedule="cosine", t_min=1e-3, stabiliser=0.01)
    z, t, y, weights = optimum.test_batch(config)
    best = optimum.optimal_errors("waves", target, "cosine", 1e-3, 0.01)
    exact = DATASETS["waves"].optimal_model(target, COSINE, 0.01)(z, t)
    torch.manual_seed(0)
    for push in 0.05 * exact, -0.05 * exact, 0.1 * z, 0.1 * MLP(width=32)(z, t).detach(), 0.1 * torch.sin(5 * z):
        excess = (losses.weighted_error(exact + push, y, torch.ones_like(t)) - best)[:, None] * weights
        error = excess.std(0) / len(t)**0.5
        cost = (push.square().mean(1)[:, None] * weights).mean(0)    # the exact denoiser's errors are orthogonal to it
        assert (excess.mean(0) > -3 * error).all() and ((excess.mean(0) - cost).abs() < 4 * error).all()
    assert_close(torch.tensor(optimum.optimum(config, weights)), (best[:, None] * weights).mean(0))


def test_quick_and_other_settings_do_not_touch_the_results(monkeypatch):
    made = []
    monkeypatch.setattr(reproduce, "make", lambda name, args: made.append((name, args.out, args.seeds, args.epochs,
                                                                           args.num_samples)))
    reproduce.main(["table4.1", "--quick"]), reproduce.main(["fig4.8"]), \
        reproduce.main(["fig4.8", "--epochs", "3", "--runs", "a"])
    assert made == [("table4.1", "runs/results", 1, 20, 2500), ("fig4.8", "results", 3, 100, 10_000),
                    ("fig4.8", "a/results", 3, 3, 10_000)]
    made.clear()
    reproduce.main(["all"])
    assert [name for name, *_ in made] == [name for name in reproduce.RESULTS if name not in reproduce.SET_BY]


@pytest.mark.parametrize("arguments, message", [
    (["table4.3"], "invalid choice: 'table4.3' .choose from .*table4.1.*appendix6"),
    (["fig4.8", "--seeds", "0"], "must be at least 1"), ([], "required")])
def test_wrong_arguments_exit_with_2(capsys, arguments, message):
    with pytest.raises(SystemExit) as stop:
        reproduce.main(arguments)
    assert stop.value.code == 2 and re.search(message, capsys.readouterr().err)


def test_help_lists_every_name(capsys):
    with pytest.raises(SystemExit):
        reproduce.main(["--help"])
    out = capsys.readouterr().out
    assert all(re.search(rf"^  {re.escape(name)} +{re.escape(title)}$", out, re.M)
               for name, (_, _, title) in reproduce.RESULTS.items())


def test_the_agreement_with_the_thesis_counts_both_signs():
    deviations = {("rings", "x", "mse"): 0.051, ("rings", "s", "mse"): -0.0763, ("waves", "v", "mse"): -0.049}
    assert reproduce_thesis.agreement(deviations)[0] == (
        "1 of 3 test losses lie within 5 % of the thesis's; the others: rings x mse +5.1 %, rings s mse -7.6 %.")


def test_cells():
    assert study_file.cell([1.0, 3.0]) == "2.000 +- 1.414" and study_file.cell([0.12345]) == "0.123"
    assert study_file.cell([-3e8, -5e8]) == "-4e+08 +- 1e+08" \
        and study_file.cell([-0.5]) == "-0.500" and study_file.cell([-250.0]) == "-250"
    assert study_file.cell([150.0, 250.0]) == "200 +- 71"


def small_study(**args):
    """A Study, of one run that needs no file, and what it keeps of it in runs.jsonl."""
    study = study_file.Study(types.SimpleNamespace(device="cpu", recorded=False, num_samples=2000, **args))
    one = types.SimpleNamespace(recipe="exact", config=dict(stabiliser=0.0, data="clusters"),
                                model=lambda device="cpu", out=False: MLP(width=8),
                                checkpoint={}, schedule=None)
    return study, one, lambda: study.used["exact/clusters-x-nelbo-s0"]


def test_the_error_of_an_exact_nelbo_is_that_of_its_distance_from_the_optimum(monkeypatch):
    """Network and optimum are tested on the same points, and most of the noise is common to both."""
    study, one, kept = small_study()
    best = torch.randn(1000, generator=torch.Generator().manual_seed(0)) * 50 + 5
    excess = torch.rand(1000, generator=torch.Generator().manual_seed(1))
    monkeypatch.setattr(study_file, "exact_nelbo", lambda *args: best + excess)
    value, error = study.exact_nelbo({("clusters", "x", "nelbo", 0): one}, ("clusters", "x", "nelbo", 0), best)
    assert value == pytest.approx((best + excess).mean().item(), rel=1e-6)
    assert error == pytest.approx(np.std(excess.numpy(), ddof=1) / 1000**0.5, rel=1e-3) and error < 0.02
    assert kept()["nelbo"] == pytest.approx([value, error], rel=1e-7)


def test_points_that_lose_more_than_100_nats_in_the_flow_are_counted(tmp_path, monkeypatch):
    study, one, kept = small_study()
    x = torch.zeros(5, 2, dtype=torch.float64)
    monkeypatch.setattr(kind_points, "test_examples", lambda *args: x)
    entropy = -DATASETS["clusters"].log_prob(x)
    gaps = torch.tensor([0.5, 99.0, 101.0, -150.0, 1e4], dtype=torch.float64)
    terms = {"bound": entropy + 1, "exact": entropy + gaps}
    monkeypatch.setattr(likelihood, "evaluate", lambda *args, **how: (dict(terms), 7))
    one.folder = tmp_path
    (tmp_path / "ckpt.pt").write_bytes(b"")
    found = study.likelihoods({("clusters", "x", "nelbo", 0): one})["clusters", "x", "nelbo", 0]
    assert found["lost"] == 2 and found["exact median"] == pytest.approx(99)
    assert found["bound gap"] == pytest.approx([1, 0])
    assert found["exact gap"] == pytest.approx([gaps.mean().item(), gaps.std().item() / 5**0.5])
    assert kept()["likelihood"]["lost"] == 2


def test_recorded_numbers_are_read_and_not_written():
    """Of a study made from runs.jsonl nothing is noted: lines without settings would take the place of those with."""
    study, one, _ = small_study()
    study.args.recorded = True
    one.history = [{"test_loss": 2.0, "train_loss_over_t": [1.0]}]
    key = "clusters", "x", "nelbo", 0
    assert study.curve({key: one}, key, "test_loss") == [2.0] and study.over_t({key: one}, key, 1) == [1.0]
    assert study.used == {}
