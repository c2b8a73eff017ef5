"""Images in few evaluations: the distance, that the first noise is one, the best way, and the table's numbers."""
import json
from types import SimpleNamespace

import pytest
import torch

import images
import reproduce
import reproduce_few_images
import reproduce_spaces_images
from ddpm import SCHEDULES

CONFIG = dict(target="v", loss="v_space", schedule="cosine", shape=[1, 4, 4], precision="fp32", stabiliser=0.0,
              timesteps=None)


def run_of(target, folder, steps=7):
    """A Run whose network is the exact one of images x ~ N(0, 0.09 I)."""
    def model(z, t):
        alpha, sigma = (c(t)[:, None, None, None] for c in (SCHEDULES["cosine"].alpha, SCHEDULES["cosine"].sigma))
        x_hat = 0.09 * alpha / (0.09 * alpha**2 + sigma**2) * z
        eps_hat = (z - alpha * x_hat) / sigma
        return alpha * eps_hat - sigma * x_hat if target == "v" else eps_hat
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "ckpt.pt").touch()
    return SimpleNamespace(model=lambda: model, config=CONFIG | {"target": target}, folder=folder,
                           checkpoint={"step": steps})


def test_the_distance_is_in_grey_levels():
    a = torch.tensor([0, 10], dtype=torch.uint8).reshape(2, 1, 1, 1)
    b = torch.tensor([200, 10], dtype=torch.uint8).reshape(2, 1, 1, 1)
    assert reproduce_few_images.distance(a, b) == pytest.approx(200 / 2**0.5)


def test_few_evaluations_of_one_first_noise_are_near_the_flow(tmp_path):
    """The flow of Gaussian data is a factor, so each image is that of its noise times 0.3; with other noise it is not.

    ancestral steps go their own way from the same first noise, and are no nearer than another image.
    """
    one = run_of("v", tmp_path)
    flow = reproduce_few_images.draw(one, *reproduce_few_images.FLOW)
    z = torch.randn(32, 1, 4, 4, generator=reproduce_few_images.run.generator("cpu", 0, "sample"))
    assert reproduce_few_images.distance(flow, images.to_uint8(0.3 * z)) < 2
    found = reproduce_few_images.measure(one)
    assert found["dpmpp t 8"] < 8 and found["dpmpp t 32"] < 2 and found["ddim t 32"] < found["ddim t 8"]
    scale = 0.3 * 127.5 * 2**0.5
    assert found["other noise"] == pytest.approx(scale, rel=0.15) and found["ancestral"] > 0.5 * scale
    assert len(found) == 32 and found["ddim t 8"] < found["ddim logsnr 8"]


def test_the_table_and_the_figure_have_the_numbers_of_their_runs(tmp_path, monkeypatch):
    made, opened = [], {("v", "v_space"): run_of("v", tmp_path / "v"), ("eps", "simple"): run_of("eps", tmp_path / "e")}
    monkeypatch.setattr(reproduce_spaces_images, "trained", lambda study: opened)
    monkeypatch.setattr(reproduce_few_images, "measure", lambda one: made.append(one) or {
        "other noise": 50.0, "ancestral": 40.0, **{f"{sampler} {grid} {n}": 100 / n + k + 10 * (one.config[
            "target"] == "eps") for k, sampler in enumerate(reproduce_few_images.SAMPLERS)
            for grid in ("t", "logsnr") for n in (8, 16, 32)}, "unipc logsnr 16": 0.25})
    study = SimpleNamespace(args=SimpleNamespace(data="fashion_mnist"))
    text = "\n".join(reproduce_few_images.table(study))
    assert "| v | ddim | t | 12.5 | 6.2 | 3.1 |" in text and "| eps | dpmpp | logsnr | 23.5 | 17.2 | 14.1 |" in text
    assert "v: 50.0 to the flow's of another noise, 40.0 to 500 ancestral" in text and "7 steps" in text
    drawn, original = [], reproduce_few_images.draw
    monkeypatch.setattr(reproduce_few_images, "draw", lambda one, *way, count: (
        drawn.append(way), original(one, way[0], way[1], 4, count))[1])
    reproduce_few_images.fig(study, tmp_path / "fig.png")
    ways = [("ddim", "t", 8), ("unipc", "logsnr", 16), ("ddim", "t", 32), ("dpmpp", "logsnr", 500),
            ("ancestral", "t", 500)]
    assert drawn == ways * 2 and len(made) == 2
    width = images.read([tmp_path / "fig.png"], [tmp_path / "fig.png"], None, False).shape[3]
    assert width == 2 * (8 * (4 + 2) + 2 + 6) + 6
    (tmp_path / "v" / "ckpt.pt").touch()
    reproduce_few_images.table(study)
    assert len(made) == 3 and json.loads((tmp_path / "v" / "few.json").read_text())["ddim t 8"] == 12.5


def test_options_that_the_table_sets_are_refused(capsys):
    with pytest.raises(SystemExit) as error:
        reproduce.parse(["few-images", "--loss", "mse"])
    assert error.value.code == 2 and "--loss is set by few-images itself" in capsys.readouterr().err
