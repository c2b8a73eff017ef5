"""Tables and figure of densities of t: cells from numbers that are given, then all of them from a small study."""
import json
import math
import re
import statistics
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import Narrow, cells
from torch.testing import assert_close

import adaptive
import kind_points
import losses
import optimum
import plots
import plots_weightings
import reproduce
import reproduce_schedules
import reproduce_schedules_images
import run
import study
import train
from datasets2d import DATASETS
from ddpm import SCHEDULES

F64 = torch.float64
NAMES = "loss-variance", "epochs", "adapted-densities"
CACHES = (optimum.optimal_predictions, optimum.optimal_errors, reproduce_schedules.of_exact, study.nelbo_points)


def test_the_first_epoch_that_is_near():
    """Within 0.5 nats of two dimensions."""
    assert reproduce_schedules.first_within([1.3, 1.24, 1.26, 1.0], 1.0) == 2
    assert reproduce_schedules.first_within([1.3, 1.251], 1.0) is None


@pytest.mark.parametrize("density, power", adaptive.POWERS.items())
def test_the_density_of_moments_is_one_of_log_snr(density, power):
    """It has integral 1, and bin k is k-th from the high end."""
    moments, schedule = torch.zeros(100).index_fill(0, torch.tensor([0, 1]), 2.0**power), SCHEDULES["linear"]
    moments[1] *= 3.0**power
    logsnr, p = reproduce_schedules.of_moments(moments, density, schedule)
    low, high = schedule.ends(1e-3)
    width = (high - low) / 100
    assert_close(logsnr[[0, -1]], torch.tensor([high - width / 2, low + width / 2], dtype=F64), rtol=1e-6, atol=1e-9)
    assert_close(p[:3] * width, torch.tensor([0.25, 0.75, 0.0], dtype=F64), rtol=1e-6, atol=1e-9)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """All of points, with two seeds, two epochs of a narrow network on 2,500 points; and what the figure shows."""
    folder, patch, drawn = tmp_path_factory.mktemp("schedules"), pytest.MonkeyPatch(), []
    clear = lambda: [cache.cache_clear() for cache in CACHES]
    clear()

    original = plots_weightings.panels
    for owner, name, value in [
            (kind_points, "POINTS", 2500), (kind_points, "MLP", Narrow),
            (plots, "DPI", 30), (reproduce_schedules, "FOUR", ["clusters"]), (reproduce_schedules, "DRAWS", 2000),
            (reproduce_schedules, "EPOCHS", 2), (reproduce_schedules, "NEAR", 2.5),
            (plots_weightings, "panels", lambda panels, path: (drawn.append(panels), original(panels, path)))]:
        patch.setattr(owner, name, value)
    call = lambda name, *more: reproduce.main([name, "--seeds", "2", "--num-samples", "2000", *more, "--device", "cpu",
                                               "--runs", str(folder / "runs"), "--out", str(folder / "results")])
    for name in NAMES:
        call(name)
    yield folder, call, drawn
    patch.undo()
    clear()


def table(folder, name):
    return cells((folder / "results/vdm" / f"{name}.md").read_text().splitlines())


def cell(values):
    return f"{statistics.mean(values):.3f} +- {statistics.stdev(values):.3f}"


def test_variances_of_the_exact_denoiser(made):
    header, _, *lines = table(made[0], "loss-variance")
    assert [line[:2] for line in lines] == [["clusters", "nelbo"], ["clusters", "mse"]]
    for _, loss, *found in lines:
        for density, value in zip(("uniform", "logsnr", "adaptive", "loss_aware"), found):
            terms = [adaptive.one_draw(DATASETS["clusters"], density, "cosine", loss=loss, n=2000, seed=seed)[0]
                     for seed in range(2)]
            assert value == cell([(c.std() / c.mean()).item() for c in terms])
        assert loss == "mse" or float(found[0].split()[0]) > float(found[1].split()[0]) > float(found[2].split()[0])


def test_what_was_learned_with_each_density(made):
    folder, _, _ = made
    lines = {line[1]: line for line in table(folder, "epochs")[2:]}
    assert list(lines) == ["uniform", "logsnr", "adaptive", "loss_aware", "learned"]
    best = study.exact_nelbo(DATASETS["clusters"].optimal_model("x", SCHEDULES["cosine"]), "x", "clusters").mean()
    for density, recipe in reproduce_schedules.DENSITIES.items():
        runs = [run.open(folder / f"runs/{recipe}-2-epochs/clusters-v-nelbo-s{seed}") for seed in range(2)]
        learned = density == "learned"
        assert all(one.config["schedule" if learned else "t_density"] == density for one in runs)
        networks = [one.model().network if learned else one.model() for one in runs]           # on the cosine's t
        gaps = [(study.exact_nelbo(network, "v", "clusters").mean() - best).item() for network in networks]
        first = [[k + 1 for k, h in enumerate(one.history) if 2 * (h["test_nelbo"] - h["optimum_nelbo"]) < 2.5]
                 for one in runs]
        near = [found[0] for found in first if found]
        assert float(lines[density][2].split()[0]) == pytest.approx(statistics.mean(gaps), abs=2e-3)
        assert lines[density][3] == (f"{statistics.mean(near):.1f}" if near else "") + (
            "" if len(near) == 2 else f" ({len(near)} of 2)")
        found = [json.loads((one.folder / "spread.json").read_text()) for one in runs]
        assert lines[density][4:] == [cell([one["draw"] for one in found]), cell([one["step"] for one in found])]
        assert all(one["draw"] > 3 * one["step"] > 0 for one in found)


def test_the_spread_is_of_draws_of_the_density(made):
    """By many more draws of the same network."""
    for recipe in "logsnr", "adaptive", "learned":
        one = run.open(made[0] / f"runs/{recipe}-2-epochs/clusters-v-nelbo-s0")
        g, moments = torch.Generator().manual_seed(1), one.checkpoint.get("moments")
        t, importance = ((losses.sample_t((60_000,), 1e-3, g), 1.0) if recipe == "learned"
                         else adaptive.draw((60_000,), one.config, moments, g))
        x = DATASETS["clusters"].sample(60_000, g)
        terms = importance * losses.loss(one.model(), x, t, torch.randn(x.shape, generator=g),
                                         **losses.objective(one.config) | {"schedule": one.schedule})
        found = reproduce_schedules.spread(one)
        assert found["draw"] == pytest.approx((terms.std() / terms.mean()).item(), rel=0.15)


def test_the_figure_has_what_was_adapted(made):
    folder, _, drawn = made
    curves = drawn[0]["clusters"]
    assert list(curves) == ["uniform", "adaptive", "adaptive, exact denoiser", "loss_aware",
                            "loss_aware, exact denoiser"]
    logsnr, p, _ = curves["uniform"]
    assert_close(p, 1 / torch.cosh(logsnr / 2) / (2 * math.pi), rtol=1e-6, atol=0)
    for density, power in adaptive.POWERS.items():
        recipe = reproduce_schedules.DENSITIES[density]
        moments = torch.stack([run.load(folder / f"runs/{recipe}-2-epochs/clusters-v-nelbo-s{seed}")["moments"]
                               for seed in range(2)]).double().mean(0)**(1 / power)
        width = 2 * SCHEDULES["cosine"].logsnr(torch.tensor(1e-3, dtype=F64)) / 100
        assert_close(curves[density][1], moments / moments.sum() / width, rtol=1e-6, atol=1e-12)
        exact = adaptive.one_draw(DATASETS["clusters"], density, "cosine", n=2000)[1]**(1 / power)
        assert_close(curves[f"{density}, exact denoiser"][1], exact / exact.sum() / width, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("name", NAMES[1:])
def test_recorded_they_are_the_same_without_a_network(made, monkeypatch, name):
    folder, call, drawn = made
    file = folder / "results/vdm" / (f"{name}.md" if name == "epochs" else f"{name}.png")
    before = cells(file.read_text().splitlines()) if name == "epochs" else drawn[0]["clusters"]["adaptive"][1]
    monkeypatch.setattr(run.Run, "model", lambda *args, **kw: pytest.fail("a network was asked for"))
    call(name, "--recorded")
    if name == "epochs":
        assert cells(file.read_text().splitlines()) == before
    else:
        assert_close(drawn[-1]["clusters"]["adaptive"][1], before, rtol=1e-6, atol=0)


# Images

def test_a_run_on_images_is_measured_in_bits(monkeypatch):
    config, asked = dict(shape=[1, 2, 2]), []
    monkeypatch.setattr(reproduce_schedules_images, "TESTED", 3)
    monkeypatch.setattr(reproduce_schedules_images.kind_images, "load",
                        lambda *of: torch.zeros(5, 1, 2, 2, dtype=torch.uint8))
    monkeypatch.setattr(reproduce_schedules_images.likelihood, "evaluate", lambda model, x, *of, **how: (
        asked.append((x, of, how)), ({"bound": torch.tensor([4.0, 8.0, 12.0]) * math.log(2)}, 0))[1])
    one = SimpleNamespace(config=config, model=lambda: None, schedule=None, history=[dict(gradient_norms=[1.0, 4.0]),
                                                                                     dict(gradient_norms=[2.0])])
    found = reproduce_schedules_images.measure(one, "data")
    assert found == {"bound": pytest.approx([1, 2, 3]), "median": 2.0, "maximum": 4.0}
    (x, of, how), = asked
    assert x.shape == (3, 1, 2, 2) and x.max() == -1 and of == (config, 4) and how["num_ode"] == 0


def test_the_table_of_images_is_paired_and_has_equal_steps(tmp_path, monkeypatch):
    calls, networks = [], []

    def trained(argv):
        calls.append(argv)
        folder = tmp_path / argv[argv.index("--out") + 1] / "set-v-nelbo-s0"
        folder.mkdir(parents=True)
        (folder / "ckpt.pt").touch()

    def opened(folder):
        config = dict(shape=[1, 2, 2], batch_size=8, precision="fp32")
        networks.append(SimpleNamespace(folder=Path(folder), config=config, checkpoint=dict(
            step=77 + len(networks), ema=dict(w=torch.zeros(3, 5)))))
        return networks[-1]
    monkeypatch.setattr(train, "main", trained)
    monkeypatch.setattr(run, "open", opened)
    monkeypatch.setattr(reproduce_schedules_images, "measure", lambda one, folder: dict(
        bound=[4.0 - 0.5 * len(networks), 6.0 - 0.5 * len(networks)], median=0.5, maximum=len(networks)))
    asked = SimpleNamespace(args=SimpleNamespace(data="set", runs=str(tmp_path), budget=10, device="cpu",
                                                 data_dir="data", more=["--channels", "8"]))
    lines = reproduce_schedules_images.table(asked)
    assert cells(lines)[2:] == [["uniform", "4.500 +- 1.000", "-", "0.5", "1"],
                                ["logsnr", "4.000 +- 1.000", "-0.500 +- 0.000", "0.5", "2"],
                                ["adaptive", "3.500 +- 1.000", "-1.000 +- 0.000", "0.5", "3"],
                                ["loss_aware", "3.000 +- 1.000", "-1.500 +- 0.000", "0.5", "4"],
                                ["learned", "2.500 +- 1.000", "-2.000 +- 0.000", "0.5", "5"]]
    assert "77 steps of 8 images in fp32, 15 parameters" in lines[-1] and "1x2x2" in lines[-1]
    first, *others = (" ".join(argv) for argv in calls)
    assert "--minutes 2.0" in first and "--t-density" not in first and "--channels 8" in first
    assert all("--train-steps 77" in other for other in others)
    assert ["--t-density logsnr", "--t-density adaptive", "--t-density loss_aware", "--schedule learned"] == [
        found for other in others for found in re.findall(r"--(?:t-density|schedule) \w+", other)]
