"""The tables and figures of Foundations from a small study: their numbers are the runs' own, again from runs.jsonl."""
import json
import math

import pytest
import torch
from conftest import cells

import ddpm
import decoders
import discrete
import images
import kind_points
import optimum
import plots
import plots_chain
import reproduce
import reproduce_foundations
import reproduce_variances
import run
import study as study_file
from datasets2d import DATASETS
from mlp import MLP

NAMES = [name for name in reproduce_foundations.RESULTS if name != "tableF5.1-images"]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """All but the images with two seeds, one epoch of a narrow network on 2,500 points, chains of 3 and 5 steps."""
    folder, patch = tmp_path_factory.mktemp("foundations"), pytest.MonkeyPatch()
    caches = (optimum.optimal_predictions, optimum.optimal_errors, optimum.optimal_bound, kind_points.floors,
              discrete.chain)
    clear = lambda: [cache.cache_clear() for cache in caches]
    clear()
    build = lambda config, members=1: MLP(width=8, members=members, out=2 * kind_points.variances.outputs(config))
    for owner, name, value in [
            (kind_points, "POINTS", 2500), (kind_points, "build_model", build),
            (plots, "DPI", 30), (study_file, "ODE_STEPS", 2), (study_file, "DRAWS", 4),
            (reproduce_variances, "DRAWS", 2000), (reproduce_foundations, "DRAWS", 2000),
            (reproduce_variances, "CHAINS", [3, 5]),
            (reproduce_variances, "OWN", [(3, "small"), (3, "range"), (3, "best")]),
            (reproduce_variances, "SETS", ("clusters",)), (reproduce_foundations, "SETS", ("clusters",)),
            (reproduce_variances, "CHAINS_DRAWN", 20), (reproduce_variances, "TESTED", 30),
            (reproduce_foundations, "FOUR", ("clusters",)), (reproduce_variances, "FEWER", (25,)),
            (study_file, "RECIPES", study_file.RECIPES | {
                f"steps-{T}-{name}": (["--schedule", "iddpm", "--timesteps", str(T), "--variance", name], [loss])
                for T in (3, 5) for name, loss in (("small", "mse"), ("log", "hybrid"), ("range", "hybrid"))})]:
        patch.setattr(owner, name, value)
    call = lambda name, *more: reproduce.main([name, "--seeds", "2", "--epochs", "1", "--num-samples", "2000", *more,
                                               "--device", "cpu", "--runs", str(folder / "runs"),
                                               "--out", str(folder / "results")])
    for name in NAMES:
        call(name)
    yield folder, call
    patch.undo()
    clear()


def table(folder, name):
    text = (folder / "results/foundations" / f"{name}.md").read_text()
    return cells(text.splitlines())


def test_every_table_and_figure_is_there(made):
    folder, _ = made
    for name in NAMES:
        ending = "md" if name in reproduce_foundations.TABLES else "png"
        assert (folder / "results/foundations" / f"{name}.{ending}").stat().st_size > 300


def test_the_numbers_of_table_5_1_are_those_of_the_runs(made):
    folder, _ = made
    rows = {tuple(row[:3]): row[3:] for row in table(folder, "tableF5.1")}
    paths = [folder / f"runs/chain-small-1-epochs/clusters-eps-vlb-s{seed}/metrics.jsonl" for seed in range(2)]
    histories = [[json.loads(line) for line in path.read_text().splitlines()] for path in paths]
    row, last = rows["eps", "fixed", "VLB"], [history[-1] for history in histories]
    assert row[:2] == ["1.62e-6", "4.06"]
    assert float(row[2].split()[0]) == pytest.approx(1e5 * sum(h["test_mean_mse"] for h in last) / 2, rel=5e-3)
    norms = [sorted(v for h in history for v in h["gradient_norms"]) for history in histories]
    middle = lambda v: (v[(len(v) - 1) // 2] + v[len(v) // 2]) / 2
    assert float(row[5].split()[0]) == pytest.approx(sum(map(middle, norms)) / 2, rel=5e-3)
    assert float(row[6].split()[0]) == pytest.approx(sum(n[-1] for n in norms) / 2, rel=5e-3)
    least = f"{1e5 * last[0]['optimum_mean_mse']:.3f}"
    assert len(rows) == 2 + 10 + 2 and rows["best possible", "best", ""][2] == least


def test_the_drawn_bound_is_the_sum_of_all_terms():
    """Within 4 of its standard errors, of a model that is not exact; and exact terms of N(0, 1) data have no error."""
    g, of = torch.Generator().manual_seed(0), discrete.chain(ddpm.SCHEDULES["iddpm"], 8, 0.0)
    x = DATASETS["clusters"].sample(4000, g, torch.float64)
    model = lambda z, t: 0.8 * z
    how = dict(target="x", variance="large")
    value, error = reproduce_variances.bound(model, x, chain=of, draws=40_000, generator=g, **how)
    parts = reproduce_variances.variances.vlb(model, x, schedule=of.schedule, steps=8, draws=4, generator=g, **how)
    expected = (parts["prior"] + parts["reconstruction"] + parts["diffusion"]).mean().item()
    assert 0 < error < 0.05 and abs(value - expected) < 4 * math.hypot(error, 0.02)
    short = discrete.chain(ddpm.SCHEDULES["cosine"], 8, 0.02)                     # z_0 is not x
    value, error = reproduce_variances.bound(model, x, chain=short, draws=40_000, t_min=0.02, generator=g, **how)
    parts = reproduce_variances.variances.vlb(model, x, schedule=short.schedule, steps=8, t_min=0.02, draws=4,
                                              generator=g, **how)
    expected = (parts["prior"] + parts["reconstruction"] + parts["diffusion"]).mean().item()
    assert abs(value - expected) < 4 * math.hypot(error, 0.03)
    # Grey levels have a probability there, and no density
    x = images.to_float(torch.randint(256, (500, 1, 2, 2), generator=g, dtype=torch.uint8)).double()
    how |= dict(decoder=decoders.discretised, t_min=0.02, generator=g)
    value, error = reproduce_variances.bound(model, x, chain=short, draws=20_000, **how)
    parts = reproduce_variances.variances.vlb(model, x, schedule=short.schedule, steps=8, draws=4, **how)
    expected = (parts["prior"] + parts["reconstruction"] + parts["diffusion"]).mean().item()
    assert parts["reconstruction"].mean() > 4 and abs(value - expected) < 4 * math.hypot(error, 0.1)


def test_the_place_between_the_fixed_variances():
    step = discrete.Step(*(torch.tensor(v) for v in (0.0, 0.0, -3.0, -3.0, -1.0, 0.0)))
    assert reproduce_variances.place(torch.tensor([-3.0, -1.0, 0.0, -4.0]), step).tolist() == [0, 1, 1.5, -0.5]


@pytest.mark.parametrize("name", reproduce_foundations.TABLES[:2] + ("variances", "own"))
def test_recorded_tables_are_the_same_without_a_network(made, monkeypatch, name):
    folder, call = made
    before = table(folder, name)
    monkeypatch.setattr(run.Run, "model", lambda *args, **kw: pytest.fail("a network was asked for"))
    call(name, "--recorded")
    assert table(folder, name) == before


def test_planes_and_variances_show_what_they_are_given(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(plots_chain, "save", lambda fig, path: seen.append(fig))
    plots_chain.variances({("clusters", 3): {"best": ([0.1, 0.5], [0.2, 0.4], [0.1, 0.3], [0.5, 0.6])}}, tmp_path / "a")
    lines = seen[0].axes[0].lines
    assert lines[0].get_xydata().tolist() == [[0.1, 0.2], [0.5, 0.4]] and lines[1].get_ydata()[0] == 0
    plots_chain.planes({"a": torch.arange(9.0).reshape(3, 3).numpy()}, tmp_path / "b")
    assert seen[1].axes[0].images[0].get_array().tolist() == [[0, 1, 2], [3, 4, 5], [6, 7, 8]]
