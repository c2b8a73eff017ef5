"""What the figures draw, read back from matplotlib."""
import numpy as np
import pytest
import torch

import plots


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


def test_the_loss_curve_of_a_run(saved):
    history = [dict(epoch=1, train_loss=3.0, test_loss=2.0, optimum=0.5),
               dict(epoch=2, train_loss=1.5, test_loss=1.0, optimum=0.5)]
    plots.loss_curve(history, dict(data="rings", target="v", loss="mse", seed=0), "path")
    train, test, best = saved[0].axes[0].lines
    assert (list(train.get_ydata()), list(test.get_ydata()), list(best.get_ydata())) == (
        [3.0, 1.5], [2.0, 1.0], [0.5, 0.5])


def test_a_scatter_shows_at_most_so_many_points(saved):
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
