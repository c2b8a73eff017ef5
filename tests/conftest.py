"""Tests neither read nor write the user's cache; those of `cache.py` have a folder of their own."""
import os

import pytest

import mlp
import plots
import run

os.environ["DIFFUSION_LOSSES_CACHE"] = ""
LOSS_CURVE, SCATTER = plots.loss_curve, plots.scatter


class Narrow(mlp.MLP):
    """The network for points, 3 layers of 8, whatever width a run asks for."""

    def __init__(self, dim, width, **how):
        super().__init__(dim, 8, layers=3, **how)


def cells(lines):
    """The rows of the tables in lines of Markdown, each a list of its cells."""
    return [[c.strip() for c in line.strip("|").split("|")] for line in lines if line.startswith("|")]


@pytest.fixture(scope="session", autouse=True)
def quick_pictures():
    """Training draws its grids in 5 evaluations, not 100; curves and points are not drawn, see `with_pictures`."""
    import train_images
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_images, "GRID_STEPS", 5)
        patch.setattr(plots, "loss_curve", lambda history, config, path: run.write(path, b"not drawn"))
        patch.setattr(plots, "scatter", lambda panels, path, *rest, **options: run.write(path, b"not drawn"))
        yield


@pytest.fixture
def with_pictures(monkeypatch):
    """The curve of a run and samples of points are drawn after all."""
    monkeypatch.setattr(plots, "loss_curve", LOSS_CURVE), monkeypatch.setattr(plots, "scatter", SCATTER)


@pytest.fixture
def interrupted():
    """interrupted(call): call(), which trains points, is stopped as by Ctrl-C when its second epoch begins.

    check(optimizer) is called at every epoch before that, too.
    """
    import train_points  # here: most tests do not need it

    def interrupt(call, check=lambda optimizer: None):
        original = train_points.train_epoch

        def stop(step, optimizer, data, epoch, *rest):
            check(optimizer)
            if epoch == 1:
                raise KeyboardInterrupt
            return original(step, optimizer, data, epoch, *rest)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(train_points, "train_epoch", stop)
            with pytest.raises(KeyboardInterrupt):
                call()
    return interrupt
