"""What the figures draw, read back from matplotlib."""
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import plots
from datasets2d import DATASETS
from ddpm import SCHEDULES


@pytest.fixture
def saved(monkeypatch):
    figures = []
    monkeypatch.setattr(plots, "save", lambda fig, path: figures.append(fig))
    yield figures
    plots.plt.close("all")


def test_curves_are_means_in_a_band_of_all_seeds_and_the_optimum_is_dashed(saved):
    values = np.array([[4.0, 1.0], [6.0, 3.0], [9.0, 2.0]])
    curves = {target: (values * (i + 1), 0.5) for i, target in enumerate(["x", "eps", "v", "s"])}
    plots.loss_curves({"a": dict.fromkeys(["p", "q", "r", "t"], curves),
                       "b": dict.fromkeys(["p", "q", "r", "t"], curves)}, "path")
    axes = saved[0].axes
    assert len(axes) == 8 and len({ax.get_ylim() for ax in axes[:4]}) == 1 \
        and {ax.get_yscale() for ax in axes} == {"log"}
    mean, dashed = axes[0].lines[:2]
    assert mean.get_ydata().tolist() == [19 / 3, 2.0] and mean.get_xdata().tolist() == [1, 2]
    assert dashed.get_linestyle() == "--" and list(dashed.get_ydata()) == [0.5, 0.5]
    band = axes[0].collections[0].get_paths()[0].vertices
    assert sorted({tuple(v) for v in band.round(6)}) == [(1, 4), (1, 9), (2, 1), (2, 3)]
    assert [line.get_color() for line in axes[5].lines[::2]] == [plots.COLOURS[target] for target in curves]


def test_one_seed_has_a_band_of_no_width(saved):
    plots.loss_curves({"a": {data: {"x": (np.array([[2.0, 1.0]]), 0.5)} for data in "pqrt"}}, "path")
    band = saved[0].axes[0].collections[0].get_paths()[0].vertices
    assert set(band[:, 1]) == {1.0, 2.0}


def test_curves_over_t_stand_at_the_middle_of_their_bins(saved):
    values, best = torch.ones(2, 4) * torch.tensor([[1.0], [3.0]]), torch.full((4,), 0.5)
    plots.over_t({"x": [("epoch 1", "x", values, best), ("epoch 9", "x", values + 1, best)],
                  "v": [("epoch 1", "v", values, best)]}, "label", "path")
    first, dashed, last, _ = saved[0].axes[0].lines
    assert first.get_xdata().tolist() == [0.125, 0.375, 0.625, 0.875] and first.get_ydata().tolist() == 4 * [2.0]
    assert last.get_ydata().tolist() == 4 * [3.0] and first.get_alpha() < last.get_alpha() == 1
    assert dashed.get_ydata().tolist() == 4 * [0.5] and saved[0].axes[0].get_ylim() == saved[0].axes[1].get_ylim()


def test_panels_of_points_share_their_axes_and_stand_in_their_place(saved):
    points = {(row, column): (np.full((3, 2), 10 * i + j), f"{i} {j}") for i, row in enumerate(["x, a", "v, b"])
              for j, column in enumerate(["2 steps", "4 steps", "8 steps"])}
    plots.point_grid(points, "path")
    axes = saved[0].axes
    assert [ax.collections[0].get_offsets()[0, 0] for ax in axes] == [0, 1, 2, 10, 11, 12]
    assert {ax.get_xlim() for ax in axes} == {(-3, 3)} \
        and axes[4].get_xlabel() == "1 1" and axes[3].get_ylabel() == "v, b"
    colours = [tuple(ax.collections[0].get_facecolor()[0, :3]) for ax in axes]
    assert colours[0] == plots.matplotlib.colors.to_rgb(plots.COLOURS["x"])
    assert colours[5] == plots.matplotlib.colors.to_rgb(plots.COLOURS["v"])


def test_the_loss_curve_of_a_run(saved, with_pictures):
    history = [dict(epoch=1, train_loss=3.0, test_loss=2.0, optimum=0.5),
               dict(epoch=2, train_loss=1.5, test_loss=1.0, optimum=0.5)]
    plots.loss_curve(history, dict(data="rings", target="v", loss="mse", seed=0), "path")
    train, test, best = saved[0].axes[0].lines
    assert (list(train.get_ydata()), list(test.get_ydata()), list(best.get_ydata())) == (
        [3.0, 1.5], [2.0, 1.0], [0.5, 0.5])


def test_a_scatter_shows_at_most_so_many_points(saved, with_pictures):
    plots.scatter({"a": torch.zeros(30, 2), "b": torch.zeros(5, 2)}, "path", points=20)
    assert [len(ax.collections[0].get_offsets()) for ax in saved[0].axes] == [20, 5]


def test_curves_over_evaluations_stand_beside_the_floor(saved):
    floor, curves = {"mean": 0.02, "std": 0.005}, {"heun": [(2, [0.5, 0.7]), (8, [0.1, 0.1])],
                                                   "sde": [(2, [2.0, 2.0]), (8, [0.3, 0.5])]}
    plots.over_evaluations({(data, target): (floor, curves) for data in "pq" for target in ("x", "s")}, "label", "path")
    axes = saved[0].axes
    assert [ax.get_title() for ax in axes] == ["p, x", "q, x", "p, s", "q, s"] \
        and {ax.get_yscale() for ax in axes} == {"log"}
    heun, sde, dotted = axes[3].lines
    assert list(heun.get_xdata()) == [2, 8] \
        and np.allclose(heun.get_ydata(), [0.6, 0.1]) and np.allclose(sde.get_ydata(), [2, 0.4])
    assert set(dotted.get_ydata()) == {0.02} and dotted.get_linestyle() == ":"
    assert np.allclose(axes[0].patches[0].get_extents().transformed(axes[0].transData.inverted()).intervaly,
                       [0.02, 0.02 + 2 * 0.005 / 2**0.5])
    assert [text.get_text() for text in saved[0].legends[0].get_texts()] == [
        "heun", "sde", "floor", "+ 2 standard errors"]
    colours = [line.get_color() for line in axes[0].lines[:2]]
    assert not {plots.matplotlib.colors.to_hex(c).upper() for c in colours} \
        & {c.upper() for c in plots.COLOURS.values()}


def fake(name, target, history, **config):
    return SimpleNamespace(folder=Path(name), target=target, history=history,
                           config=dict(data="rings", loss="mse", schedule="cosine", target=target) | config)


def test_curves_of_runs_are_in_a_panel_for_each_loss_with_their_optimum_if_there_is_one(saved):
    """Of images there is none, and their history begins within an epoch."""
    history = [dict(epoch=0.5, test_loss=3.0), dict(epoch=1, test_loss=2.0)]
    best = [h | dict(optimum=1.5) for h in history]
    plots.curves([fake("a", "v", best), fake("b", "x", best), fake("c", "v", best, loss="nelbo"),
                  fake("d", "v", history, loss="nelbo"), fake("e", "v", history, data="/folder/photos")], "path")
    first, second, third = saved[0].axes
    assert [line.get_color() for line in first.lines[::2]] == [plots.COLOURS["v"], plots.COLOURS["x"]]
    assert list(first.lines[0].get_xdata()) == [0.5, 1] and list(first.lines[0].get_ydata()) == [3, 2]
    assert [line.get_linestyle() for line in first.lines] == ["-", "--", "-", "--"]
    assert set(first.lines[1].get_ydata()) == {1.5}
    assert len(second.lines) == 3 and second.lines[0].get_color() != second.lines[2].get_color()      # both are v
    assert [text.get_text() for text in second.get_legend().get_texts()] == ["c", "d"] and len(third.lines) == 1
    assert third.get_title() == "photos, cosine" and third.get_ylabel() == "test loss, mse"


def test_curves_of_chains_have_a_panel_for_each_length_and_a_bound_may_be_negative(saved):
    """A network that predicts the mean is opened as one of x, and is not drawn as one."""
    history = [dict(epoch=1, test_loss=0.5, optimum=-1.0), dict(epoch=2, test_loss=-0.5, optimum=-1.0)]
    runs = [fake("a", "x", history, loss="vlb", timesteps=9), fake("b", "mu", history, loss="vlb", timesteps=9),
            fake("c", "x", [history[0]], loss="vlb", timesteps=7)]
    runs[1].target = "x"
    plots.curves(runs, "path")
    first, second = saved[0].axes
    assert (first.get_yscale(), second.get_yscale()) == ("linear", "log")
    assert first.lines[0].get_color() == plots.COLOURS["x"] != first.lines[2].get_color()
    assert (first.get_title(), second.get_title()) == ("rings, cosine, T = 9", "rings, cosine, T = 7")


def test_the_script_draws_runs_and_says_what_is_wrong(monkeypatch, tmp_path, capsys):
    drawn = []
    monkeypatch.setattr(plots, "curves", lambda runs, path: drawn.append((runs, path)))
    monkeypatch.setattr(plots.run, "open", lambda path: fake(path, "v", [] if path == "early" else [dict(epoch=1)]))
    plots.main(["a", "b", "--out", "c.png"])
    (runs, path), = drawn
    assert [str(one.folder) for one in runs] == ["a", "b"] and path == "c.png"
    assert "wrote c.png" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="early has no test yet, .* train it longer, or leave it out"):
        plots.main(["a", "early"])
    monkeypatch.undo()
    with pytest.raises(SystemExit, match="no checkpoint at .*nowhere.* train one first"):
        plots.main([str(tmp_path / "nowhere")])
    with pytest.raises(SystemExit) as stop:
        plots.main([])
    assert stop.value.code == 2


def test_the_paths_of_an_exact_network_are_those_of_the_exact_denoiser(saved, monkeypatch):
    """From noise to the data, on a schedule that explodes: everything is divided by the standard deviation of z."""
    data, schedule = DATASETS["clusters"], SCHEDULES["ve"]
    one = SimpleNamespace(target="v", schedule=schedule, config=dict(stabiliser=0.0, t_min=1e-3, loss="mse"),
                          model=lambda: data.optimal_model("v", schedule))
    arrows, original = [], plots.plt.Axes.quiver
    monkeypatch.setattr(plots.plt.Axes, "quiver", lambda ax, x, y, u, v, **how: arrows.append(
        torch.stack([u, v], 1)) or original(ax, x, y, u, v, **how))
    plots.trajectories([one], data, "path", times=(0.5, 0.01), paths=6)
    early, late = saved[0].axes
    assert (early.get_title(), late.get_title()) == ("t = 0.5", "t = 0.01") and len(late.lines) == 12
    for line, exact in zip(late.lines[:6], late.lines[6:]):
        assert np.array_equal(line.get_xydata(), exact.get_xydata()) and exact.get_linestyle() == "--"
        assert len(early.lines[0].get_xdata()) < 0.6 * len(line.get_xdata())
        assert data.log_prob(torch.as_tensor(line.get_xydata()[-1:])) > -6            # it has arrived
    axis = torch.linspace(-2.6, 2.6, 105)[4::8]
    z, t = torch.cartesian_prod(axis, axis), torch.tensor(0.5)
    sigma = 0.01 * 5000**0.5                                        # alpha = 1
    score = data.score(z * (1 + sigma**2)**0.5, 1.0, sigma)
    for found in arrows[0], arrows[2]:                              # network, exact; in between the other time
        assert torch.allclose(found, score / score.norm(dim=1).max(), atol=1e-4), t
