"""Latents where the truth is known: q(z) and its KL by quadrature, planes; then all results from a small study."""
import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import Narrow, cells
from PIL import Image
from torch.distributions import Categorical, Independent, MixtureSameFamily, Normal
from torch.testing import assert_close

import classifier
import embedded
import kind_points
import latent
import optimum
import plots
import plots_latent
import reproduce
import reproduce_embedded
import reproduce_latent
import reproduce_latent_images
import run
from datasets2d import DATASETS
from ddpm import SCHEDULES
from study import Study

F64 = torch.float64
FIVE = reproduce_latent.FIVE


def test_the_aggregate_posterior_is_a_mixture():
    g = torch.Generator().manual_seed(0)
    z, mean, log_var = torch.randn(7, 2, generator=g).double(), *torch.randn(2, 5, 2, generator=g).double()
    parts = Independent(Normal(mean, (log_var / 2).exp()), 1)
    assert_close(reproduce_latent.log_aggregate(z, mean, log_var, 3),
                 MixtureSameFamily(Categorical(torch.ones(5, dtype=F64)), parts).log_prob(z))


def test_the_clusters_are_five_and_standardised():
    g = torch.Generator().manual_seed(0)
    x = FIVE.sample(200_000, g, F64)
    assert len(FIVE.centres) == 5 and x.mean(0).abs().max() < 0.01 and (x.var(0) - 1).abs().max() < 0.01
    gaps = torch.cdist(FIVE.centres, FIVE.centres) + 9 * torch.eye(5)
    assert gaps.min() > 6 * FIVE.std.max()


@pytest.fixture
def known(monkeypatch):
    """An autoencoder that only adds noise, 0.6 and then 0.3; a diffusion prior that is one point."""
    def vae(noise):
        assert noise == 0.3
        encoder = lambda x: torch.cat([x, 0 * x + 2 * math.log(0.6)], 1)
        return SimpleNamespace(posterior=lambda x: encoder(x).chunk(2, 1), decode=lambda z: z)
    monkeypatch.setattr(reproduce_latent, "vae", vae)
    monkeypatch.setattr(reproduce_latent, "diffusion_prior", lambda study, z, noise: torch.zeros(4000, 2))
    reproduce_latent.of_holes.cache_clear()
    yield Study(SimpleNamespace(recorded=False, num_samples=5000, device="cpu"))
    reproduce_latent.of_holes.cache_clear()


def test_numbers_of_the_hole_problem_are_those_of_quadrature(known):
    """q(z) is FIVE with noise 0.6, samples are FIVE with noise (0.6^2 + 0.3^2)^(1/2)."""
    numbers, found, _ = reproduce_latent.of_holes(known, 0.3)
    line = torch.linspace(-7, 7, 281, dtype=F64)
    z = torch.cartesian_prod(line, line)
    log_q, log_p = FIVE.log_prob(z, 1.0, 0.6), -z.square().sum(1) / 2 - math.log(2 * math.pi)
    cell = (line[1] - line[0])**2
    assert numbers["kl"] == pytest.approx(((log_q - log_p) * log_q.exp()).sum().item() * cell.item(), abs=0.03)
    hole = (log_p.exp()[log_q < log_p - math.log(2)]).sum() * cell
    assert numbers["hole"] == pytest.approx(hole.item(), abs=0.02) and hole > 0.05
    rate = 0.5 * (1 + 0.36 - 1 - math.log(0.36))           # of each latent, the data have mean square 1
    assert numbers["rates"] == pytest.approx([rate, rate], abs=0.01)
    log_x = FIVE.log_prob(z, 1.0, 0.45**0.5)
    log_density = (FIVE.log_prob(z) * log_x.exp()).sum() * cell
    assert found["aggregate posterior"]["log_density"] == pytest.approx(log_density.item(), rel=0.03)
    of_prior = (FIVE.log_prob(z) * (-z.square().sum(1) / 2 / 1.09 - math.log(2 * math.pi * 1.09)).exp()).sum() * cell
    assert found["N(0, I)"]["log_density"] == pytest.approx(of_prior.item(), rel=0.03)
    x = 0.3 * torch.randn(4000, 2, generator=torch.Generator().manual_seed(1))
    assert found["diffusion prior"]["log_density"] == pytest.approx(FIVE.log_prob(x).mean().item(), rel=0.1)
    data = FIVE.sample(100_000, torch.Generator().manual_seed(2))
    low = FIVE.log_prob(data).sort().values[100]
    assert found["diffusion prior"]["off"] == pytest.approx((FIVE.log_prob(x) < low).float().mean().item(), abs=0.03)
    assert found["aggregate posterior"]["wasserstein"] < found["N(0, I)"]["wasserstein"] < 0.6
    assert found["diffusion prior"]["wasserstein"] > 0.6


def test_a_vae_learns_its_clusters(monkeypatch):
    monkeypatch.setattr(reproduce_latent, "STEPS", 250)
    model, g = reproduce_latent.vae(0.3), torch.Generator().manual_seed(0)
    x, eps = FIVE.sample(1000, g), torch.randn(1000, 2, generator=g)
    bound = model.loss(x, eps, 0.3).mean() + math.log(2 * math.pi * 0.09)
    normal = torch.distributions.MultivariateNormal(torch.zeros(2), torch.cov(x.T))
    assert bound < -normal.log_prob(x).mean() + 0.5        # near a Gaussian's or better; 26 untrained
    assert torch.equal(model.mean, torch.zeros(2))


def test_points_of_the_plane_and_off_it(monkeypatch):
    data, g = DATASETS["rings-16"], torch.Generator().manual_seed(0)
    plane = DATASETS["rings"].sample(5000, g) + torch.tensor([3.0, 0.0])
    up = embedded.basis(16).float()
    off = data.off(torch.randn(5000, 16, generator=g)) / 14**0.5
    monkeypatch.setattr(kind_points, "draw", lambda one, **how: [{"rings-16": plane @ up.T + off,
                                                                  "rings": plane}[one.config["data"]]])
    monkeypatch.setattr(reproduce_embedded, "errors", lambda one: {"gap": 0.25})
    monkeypatch.setattr(kind_points, "load", lambda config: DATASETS[config["data"]].sample(5000))
    found = [reproduce_latent.of_plane(SimpleNamespace(config=dict(data=name, seed=0)), 5000)
             for name in ("rings", "rings-16")]
    assert found[0]["off"] == 0 and found[1]["off"] == pytest.approx(1, rel=0.03)
    assert found[0]["plane"] == pytest.approx(3 / 2**0.5, rel=0.05) == pytest.approx(found[1]["plane"], rel=0.1)
    assert [of["gap"] for of in found] == [0.5, 4.0]


def test_the_angle_between_planes():
    data = DATASETS["rings-16"]
    assert reproduce_latent.principal_angle(data) < 1e-3
    third = data.off(torch.randn(1, 16, generator=torch.Generator().manual_seed(0)).double())[0]
    turned = data.basis.clone()
    turned[:, 0] = math.cos(0.1) * turned[:, 0] + math.sin(0.1) * third / third.norm()
    assert reproduce_latent.principal_angle(SimpleNamespace(sample=data.sample, basis=turned)) == pytest.approx(
        0.1, abs=1e-3)


# All of them from a small study

@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Two seeds, one epoch of a narrow network on 2,500 points, one dataset, few steps of a VAE."""
    folder, patch = tmp_path_factory.mktemp("latents"), pytest.MonkeyPatch()
    caches = (optimum.optimal_predictions, optimum.optimal_errors, kind_points.floors, reproduce_latent.of_holes,
              reproduce_embedded.test_points)
    clear = lambda: [cache.cache_clear() for cache in caches]
    clear()

    for owner, name, value in [
            (kind_points, "POINTS", 2500), (kind_points, "MLP", Narrow),
            (plots, "DPI", 30), (reproduce_latent, "POINTS", 3000), (reproduce_latent, "MIXED", 300),
            (reproduce_latent, "STEPS", 20), (reproduce_latent, "SAMPLER", dict(steps=4, sampler="ddim")),
            (reproduce_latent, "FOUR", ["rings"]), (reproduce_latent, "TARGETS", ["v"]),
            (reproduce_embedded, "TESTED", 500)]:
        patch.setattr(owner, name, value)
    call = lambda name, *more: reproduce.main([name, "--seeds", "2", "--epochs", "1", "--num-samples", "2000", *more,
                                               "--device", "cpu", "--runs", str(folder / "runs"),
                                               "--out", str(folder / "results")])
    for name in reproduce_latent.RESULTS:
        call(name)
    yield folder, call
    patch.undo()
    clear()


def table(folder, name):
    text = (folder / "results/slides" / f"{name}.md").read_text()
    return cells(text.splitlines())


def test_tables_have_the_numbers_of_the_runs_and_again_from_them(made, monkeypatch):
    folder, call = made
    record, = (json.loads(line) for line in (folder / "results/slides/runs.jsonl").read_text().splitlines()
               if "five-0.5" in line)
    found = record["holes"]
    rows = table(folder, "holes")
    assert [row[0] for row in rows[2:4]] == ["0.1", "0.5"]
    assert rows[3][1:] == [f"{rate:.2f}" for rate in found["latents"]["rates"]] + [
        f"{found['latents']['kl']:.3f}", f"{found['latents']['hole']:.3f}"]
    assert rows[-1] == ["0.5", "diffusion prior"] + ["{log_density:.2f}".format(**found["diffusion prior"])] + [
        "{off:.4f}".format(**found["diffusion prior"]), "{wasserstein:.3f}".format(**found["diffusion prior"])]
    rows = {row[0]: row[1:] for row in table(folder, "latent-16")[3:]}
    of = lambda data, what: [json.loads((folder / f"runs/plain-1-epochs/{data}-v-mse-s{seed}/plane-2000.json")
                                        .read_text())[what] for seed in range(2)]
    mean = lambda values: f"{sum(values) / 2:.3f}"
    assert [cell.split()[0] for cell in rows["rings, v"]] == [
        mean(of("rings", "gap")), mean(of("rings-16", "gap")), f"{1e4 * sum(of('rings-16', 'off')) / 2:.{3}f}"
        if 1e4 * sum(of("rings-16", "off")) / 2 < 100 else f"{1e4 * sum(of('rings-16', 'off')) / 2:.0f}"]
    first = table(folder, "latent-16")[2]
    assert [cell.split()[0] for cell in first[1:3]] == [mean(of("rings", "plane")), mean(of("rings-16", "plane"))]
    text = (folder / "results/slides/holes.md").read_text()
    prior = 0.5 * math.log1p(math.exp(SCHEDULES["cosine"].ends(1e-3)[0]))
    assert float(text.split("is at most ")[1].split(",")[0]) < 4 * prior
    monkeypatch.setattr(run.Run, "model", lambda *args, **kw: pytest.fail("a network was asked for"))
    monkeypatch.setattr(reproduce_latent, "vae", lambda noise: pytest.fail("an autoencoder was asked for"))
    for name in reproduce_latent.TABLES:
        before = table(folder, name)
        call(name, "--recorded")
        assert table(folder, name) == before
    reproduce_latent.of_holes.cache_clear()
    with pytest.raises(SystemExit, match="leave out --recorded"):
        call("hole-problem", "--recorded")


def test_the_figure_is_drawn_and_shades_the_holes(tmp_path, monkeypatch):
    """q(z) is N((9, 0), I): every z is a hole; and then N(0, I), where none is."""
    z = torch.randn(10, 2)
    numbers, found = dict(kl=0.1, hole=0.2), {name: dict(log_density=0.0, off=0.5) for name in ("N(0, I)", "other")}
    shaded = []
    original = plots_latent.plt.Axes.contourf
    monkeypatch.setattr(plots_latent.plt.Axes, "contourf", lambda self, x, y, inside, *args, **how: (
        shaded.append(inside.mean().item()) or original(self, x, y, inside, *args, **how)))
    points = dict(data=z, reconstructions=z, z={"aggregate posterior": z}, x={"N(0, I)": z, "other": z})
    normal = lambda centre: lambda z: -0.5 * (z - torch.tensor(centre)).square().sum(1) - math.log(2 * math.pi)
    plots_latent.holes({"far": (numbers, found, points, normal([9.0, 0.0])),
                        "same": (numbers, found, points, normal([0.0, 0.0]))}, tmp_path / "a.png")
    assert (tmp_path / "a.png").stat().st_size > 1000
    assert shaded == [pytest.approx(math.pi * 9 / 49, rel=0.05), 0]


# Images

def test_images_in_pixels_and_in_latents(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(reproduce_latent_images, "STEPS", 2)
    monkeypatch.setattr(reproduce_latent_images.reproduce_poster_images, "STEPS", 1)
    monkeypatch.setattr(classifier, "STEPS", 2)
    seen, frechet = [], iter((9.0, 30.0, 20.0, 10.0, 0.5))         # the first is of `classifier.main`
    monkeypatch.setattr(classifier, "distances", lambda x, y: seen.append((len(x[0]), len(y[0]))) or {
        "frechet": next(frechet)})
    measured, original = {}, reproduce_latent_images.seconds_of_a_step
    monkeypatch.setattr(reproduce_latent_images, "seconds_of_a_step", lambda *args: (
        measured.update(original(*args, repeats=1)) or {"pixels": 6.0, "latents": 1.5}))
    g = np.random.default_rng(0)
    for i in range(44):
        path = tmp_path / "set" / ("train" if i < 24 else "test") / "ab"[i % 2] / f"{i:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(g.integers(0, 255, (16, 16), np.uint8)).save(path)
    argv = ["--data", str(tmp_path / "set"), "--num-samples", "2000", "--budget", "0.01",
            "--runs", str(tmp_path / "runs"), "--device", "cpu",
            "--out", str(tmp_path), "--channels", "8", "--channel-mult", "1", "--layers", "1", "--batch-size", "4"]
    for name in reproduce_latent_images.RESULTS:
        reproduce.main([name, *argv])
    text = (tmp_path / "slides/latents.md").read_text()
    rows = cells(text.splitlines())
    assert [row[:2] for row in rows[2:]] == [["pixels", "1 x 16 x 16"], ["latents", "3 x 4 x 4"]]
    assert rows[2][4] == "1.0" and float(rows[2][2]) > 5 * float(rows[3][2])
    assert [row[3:5] for row in rows[2:]] == [["6.0000", "1.0"], ["1.5000", "4.0"]]
    assert measured.keys() == {"pixels", "latents"} and all(0 < seconds < 10 for seconds in measured.values())
    steps = [run.load(tmp_path / f"runs/latents-images/{name}-v-mse-s0")["step"] for name in ("set", "latent-set")]
    assert [row[5] for row in rows[2:]] == [f"{step:,}" for step in steps]
    assert [row[6] for row in rows[2:]] == ["30.0", "20.0"] and seen[1:] == 2 * [(2000, 20)] + [(20, 20), (24, 20)]
    assert "of the reconstructed test split 10.0, of 2,000 images of the train split 0.50." in text
    model = latent.read(tmp_path / "runs/latents-images/latent-set")
    error = latent.reconstructions(model["autoencoder"], reproduce_latent_images.images.load(
        str(tmp_path / "set"), "test"))[1]
    assert f"20 test images {error:.5f} in [-1, 1], PSNR {10 * math.log10(4 / error):.1f} dB" in text
    with Image.open(tmp_path / "slides/latents-samples.png") as picture:
        assert picture.size == (3 * 146 + 4 * 6, 74 + 2 * 6)
    with pytest.raises(SystemExit):
        reproduce.parse(["latents", "--image-size", "32"])
    assert "--image-size is set by latents itself" in capsys.readouterr().err
