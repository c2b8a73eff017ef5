"""A run opens itself: network, denoiser and config, alone and as a stack; what a file loads; calls from elsewhere."""
import json
import math
import os
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.testing import assert_close

import ddpm
import kind_images
import kind_points
import mlp
import run
import targets
import train
import unet

ROOT = Path(__file__).parent.parent
FAST = ["--data", "clusters", "--epochs", "1", "--batch-size", "10000", "--width", "8", "--device", "cpu"]


@pytest.fixture(scope="module")
def points(tmp_path_factory):
    """A folder of runs: v and s with two losses, trained for an epoch."""
    out = tmp_path_factory.mktemp("runs")
    train.main([*FAST, "--target", "v", "s", "--loss", "mse", "nelbo", "--stabiliser", "0.02", "--out", str(out)])
    return out


@pytest.fixture(scope="module")
def image_run(tmp_path_factory):
    out, g = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    (out / "dots").mkdir()
    for i in range(12):
        Image.fromarray(g.integers(0, 255, (8, 8), np.uint8)).save(out / "dots" / f"{i}.png")
    train.main(["--data", str(out / "dots"), "--target", "v", "--channels", "4", "--channel-mult", "1", "--layers", "1",
                "--attention", "0", "--batch-size", "4", "--lr", "0.01", "--warmup", "1", "--minutes", "1e-6", "--out",
                str(out), "--device", "cpu"])
    return out / "dots-v-mse-s0"


Z, T = torch.randn(6, 2, generator=torch.Generator().manual_seed(0)), torch.tensor(0.4)
ALPHA, SIGMA = math.cos(0.2 * math.pi), math.sin(0.2 * math.pi)


def test_a_run_of_points_is_what_is_in_its_checkpoint(points):
    folder = points / "clusters-s-nelbo-s0"
    one, state = run.open(folder), run.load(folder)
    assert (one.folder, one.name, one.target, one.kind) == (folder, "clusters-s-nelbo-s0", "s", kind_points)
    assert one.config == state["config"] == json.loads((folder / "config.json").read_text())
    assert one.history == state["history"] and one.schedule is ddpm.SCHEDULES["cosine"] and one.members == [one]
    network = mlp.MLP(width=8)
    network.load_state_dict(state["model"])
    model = one.model()
    assert torch.equal(model(Z, T.expand(6)), network(Z, T.expand(6)).detach())
    assert not any(p.requires_grad for p in model.parameters())
    s = network(Z, T.expand(6)).detach()               # = -sigma eps / (sigma^2 + d), and x = (z - sigma eps) / alpha
    x_hat, eps_hat = one.denoiser()(Z, T)
    assert_close(eps_hat, -s * (SIGMA**2 + 0.02) / SIGMA, rtol=1e-4, atol=1e-5)
    assert_close(x_hat, (Z + s * (SIGMA**2 + 0.02)) / ALPHA, rtol=1e-4, atol=1e-5)
    assert_close(x_hat, targets.to_x("s", s, Z, torch.tensor(ALPHA), torch.tensor(SIGMA), 0.02), rtol=1e-4, atol=1e-5)
    assert one.denoiser(clip=0.1)(Z, T)[0].abs().max() == 0.1
    for path in str(folder), folder / "ckpt.pt":
        again = run.open(path)
        assert again.folder == folder and again.config == one.config


def test_a_run_of_images_has_the_averaged_weights(image_run):
    one, state = run.open(image_run), run.load(image_run)
    assert one.kind is kind_images and one.config["shape"] == [1, 8, 8] and one.history[-1]["step"] == 1
    differ = [not torch.equal(state["model"][key], state["ema"][key]) for key in state["ema"]]
    assert any(differ)
    network = unet.UNet(1, 8, channels=4, channel_mult=[1], layers=1, attention=[0])
    network.load_state_dict(state["ema"])
    z, t = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0)), T.expand(2)
    v = network(z, t).detach()
    assert_close(one.model()(z, t), v)
    x_hat, eps_hat = one.denoiser(clip=1.0)(z, T)
    assert_close(x_hat, (ALPHA * z - SIGMA * v).clamp(-1, 1), rtol=1e-4, atol=1e-5)
    assert_close(eps_hat, (z - ALPHA * x_hat) / SIGMA, rtol=1e-4, atol=1e-5)
    with pytest.raises(SystemExit, match="runs on images cannot be one stack"):
        run.open([image_run, image_run]).model()


def test_a_stack_is_its_members(points):
    folders = [points / f"clusters-{name}-s0" for name in ("v-mse", "s-mse", "s-nelbo")]
    together, alone = run.open(folders), [run.open(folder) for folder in folders]
    assert isinstance(together, run.Stack) and together.target == ["v", "s", "s"] and together.config == alone[0].config
    assert together.folder == folders[0] and [one.folder for one in together.members] == folders
    z = torch.cat([Z, 2 * Z, -Z])
    found = together.model()(z, T.expand(18))
    for one, rows, part in zip(alone, z.chunk(3), found.chunk(3)):
        assert_close(one.model()(rows, T.expand(6)), part)
    for k in 0, 1:
        parts = together.denoiser()(z, T)[k].chunk(3)
        for one, rows, part in zip(alone, z.chunk(3), parts):
            assert_close(one.denoiser()(rows, T)[k], part)
    assert not torch.allclose(alone[1].model()(Z, T.expand(6)), alone[2].model()(Z, T.expand(6)))


def test_runs_of_a_command_line(points, image_run, tmp_path):
    """Each with the folder of its results: its own, or in --out one of its name, or for one run --out itself."""
    first, second = points / "clusters-v-mse-s0", points / "clusters-s-mse-s0"
    named = lambda *arguments: [(one.folder, out) for one, out in run.chosen(*arguments)]
    assert named([first, second], None) == [(first, first), (second, second)]
    assert named([first, second], tmp_path) == [(one, tmp_path / one.name) for one in (first, second)]
    assert named([first], tmp_path) == [(first, tmp_path)]
    with pytest.raises(SystemExit, match="points and images cannot be mixed in one call"):
        run.chosen([first, image_run], None)
    with pytest.raises(SystemExit, match="two of these runs have one name"):
        run.chosen([first, first / "ckpt.pt"], tmp_path)


def test_runs_that_are_not_alike_are_no_stack(points, tmp_path):
    train.main([*FAST, "--width", "16", "--out", str(tmp_path)])
    with pytest.raises(SystemExit, match="differ in width, stabiliser and cannot|in stabiliser, width and cannot"):
        run.open([points / "clusters-v-mse-s0", tmp_path / "clusters-eps-mse-s0"])


def test_a_checkpoint_from_before_a_setting_has_its_default(points, tmp_path):
    """Opened, sampled from, resumed and stacked with newer ones as if the setting had been there."""
    state = run.load(points / "clusters-v-mse-s0")
    del state["config"]["t_density"]
    old = tmp_path / "clusters-v-mse-s0"
    run.save(old / "ckpt.pt", state)
    assert run.open(old).config == run.open(points / old.name).config and run.open(old).config["t_density"] == "uniform"
    assert len(run.open([old, points / "clusters-s-mse-s0"]).members) == 2
    argv = [*FAST, "--target", "v", "--stabiliser", "0.02", "--out", str(tmp_path), "--resume"]
    train.main(argv)
    with pytest.raises(SystemExit, match=r"other settings \(--t-density uniform\)"):
        train.main([*argv, "--t-density", "logsnr"])


def test_rows_that_this_code_lacks_are_one_sentence(points, tmp_path):
    for key in "schedule", "data":
        state = run.load(points / "clusters-v-mse-s0")
        state["config"][key] = "gone"
        run.save(tmp_path / "ckpt.pt", state)
        with pytest.raises(SystemExit, match=f"was trained with --{key} gone, which this code does not have"):
            run.open(tmp_path)


def test_the_end_of_sampling():
    """What is asked for, whatever training had; else that of training, at least 0.001."""
    for asked, trained, expected in ((None, 1e-6, 1e-3), (None, 0.05, 0.05), (1e-4, 1e-3, 1e-4), (0.2, 0.05, 0.2),
                                     (0.01, 0.05, 0.01)):
        assert run.smallest_t(dict(t_min=trained), asked) == expected


def test_two_new_runs_of_one_folder_are_refused_before_any_begins(tmp_path):
    configs = [dict(data=str(tmp_path / part / "dots"), target="v", loss="mse", seed=0, shape=[1, 8, 8])
               for part in ("a", "b")]
    with pytest.raises(SystemExit, match="two of these runs would share a folder, .* give each its own --out"):
        run.begin(configs, tmp_path / "runs")
    assert not (tmp_path / "runs").exists()
    (folder, config, state), = run.check(configs[:1], tmp_path / "runs")
    assert (folder, config, state) == (tmp_path / "runs" / "dots-v-mse-s0", configs[0], None)


def python(*arguments, cwd=ROOT):
    result = subprocess.run([sys.executable, *map(str, arguments)], cwd=cwd, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.mark.parametrize("files, without", [
    ("ddpm, targets, losses, samplers", ["matplotlib", "torchvision", "scipy"]),
    ("likelihood, sample", ["train", "train_points", "train_images", "matplotlib", "scipy"])])
def test_a_file_loads_what_it_needs_and_no_more(files, without):
    loaded = python("-c", f"import sys, {files}; print(*sys.modules)").split()
    assert {name.strip() for name in files.split(",")} <= set(loaded) and not set(without) & set(loaded)


def test_train_works_in_another_folder_and_says_a_command_that_does_too(tmp_path):
    """By a relative path, its runs in that folder; what it says to type next runs there as it stands."""
    script = os.path.relpath(ROOT / "train.py", tmp_path.resolve())
    assert script.startswith("..")
    words = shlex.split(python(script, *FAST, cwd=tmp_path).splitlines()[-1].split("in all; ")[1])
    assert words[:2] == ["next:", "python"] and words[3:] == ["--ckpt", "runs/clusters-eps-mse-s0", "--steps", "512"]
    assert (tmp_path / words[2]).resolve() == ROOT / "sample.py" and (tmp_path / words[4] / "ckpt.pt").exists()
