"""Runs of an older format open, sample and resume: two small ones in tests/old/, killed while they were trained.

They were made by, and killed after 2 of 4 epochs and, in the middle of the second epoch, 3 of 6 steps:

    python train.py --target v --width 8 --epochs 4 --batch-size 10000 --device cpu
    python train.py --data dots --target v --channels 4 --channel-mult 1 --layers 1 --attention 0 --batch-size 4
        --lr 0.01 --warmup 1 --epochs 3 --test-every 2 --device cpu          # dots: 12 random images of 8 x 8
"""
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import kind_points
import likelihood
import run
import sample
import settings
import train

OLD = Path(__file__).parent / "old"
TRAIN = {"rings-v-mse-s0": "--target v --width 8 --epochs 4 --batch-size 10000 --device cpu",
         "dots-v-mse-s0": "--data dots --target v --channels 4 --channel-mult 1 --layers 1 --attention 0 --batch-size "
                          "4 --lr 0.01 --warmup 1 --epochs 3 --test-every 2 --device cpu"}


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder to work in, with copies of the old runs in runs/ and the images of one of them in dots/."""
    shutil.copytree(OLD, tmp_path / "runs")
    (tmp_path / "dots").mkdir()
    g = np.random.default_rng(0)
    for i in range(12):
        Image.fromarray(g.integers(0, 255, (8, 8), np.uint8)).save(tmp_path / "dots" / f"{i}.png")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_an_old_run_has_no_chain_and_the_small_variance(here):
    """Samples and bound are those that are asked for with it, and others with beta."""
    one = run.open("runs/rings-v-mse-s0")
    assert (one.config["timesteps"], one.config["variance"], one.target) == (None, "small", "v")
    draw = lambda **how: kind_points.draw(one, 4, 20, **how)
    assert torch.equal(draw(), draw(variance="small")) and (draw() - draw(variance="large")).abs().max() > 0.1
    x = kind_points.load(one.config)[:20].double()
    bound = lambda *variance: likelihood.evaluate(one.model().double(), x, one.config, 16, 4, *variance, num_ode=0,
                                                  generator=torch.Generator().manual_seed(0))[0]["bound"].mean()
    assert bound() == bound("small") > bound("large")


@pytest.mark.parametrize("name", TRAIN)
def test_an_old_run_opens_and_samples(name, here):
    stored = torch.load(OLD / name / "ckpt.pt", weights_only=True)
    assert stored["format"] == "diffusion-losses 2" and "digest" not in stored
    one = run.open(f"runs/{name}")
    assert one.config == settings.completed(stored["config"]) and one.history == stored["history"]
    kept = stored["ema" if "ema" in stored else "model"]
    assert all(torch.equal(value, kept[key]) for key, value in one.model().state_dict().items())
    sample.main(["--ckpt", f"runs/{name}", "--steps", "2", "--num-samples", "4", "--device", "cpu"])
    assert json.loads(Path(f"runs/{name}/metrics.json").read_text())["num_samples"] == 4


def test_an_old_run_of_points_goes_on_to_the_weights_of_one_trained_whole(here):
    """Up to the rounding of another machine, and far from where it was."""
    name, words = "rings-v-mse-s0", TRAIN["rings-v-mse-s0"].split()
    before = run.load(f"runs/{name}")
    train.main([*words, "--resume"])
    train.main([*words, "--out", "whole"])
    resumed, whole = run.load(f"runs/{name}"), run.load(f"whole/{name}")
    assert len(before["history"]) == 2 and len(resumed["history"]) == 4
    for key, value in whole["model"].items():
        torch.testing.assert_close(resumed["model"][key], value, rtol=1e-3, atol=1e-4)
    assert max((before["model"][key] - value).abs().max() for key, value in whole["model"].items()) > 1e-3


def test_an_old_run_of_images_goes_on_with_its_state(here):
    """The optimizer's counter and the history go on from step 3."""
    before = run.load("runs/dots-v-mse-s0")
    train.main([*TRAIN["dots-v-mse-s0"].split(), "--resume"])
    after = run.load("runs/dots-v-mse-s0")
    assert before["step"] == 3 and after["step"] > 3 and after["history"][:1] == before["history"]
    assert after["history"][-1]["step"] == after["optimizer"]["state"][0]["step"] == after["step"]
    assert any(not torch.equal(value, after["model"][key]) for key, value in before["model"].items())
