"""Sampling end to end, and checkpoints that are missing, damaged, dangerous or of another project."""
import json
import os
import pickle
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import ddpm
import kind_points
import metrics
import mlp
import plots
import run
import sample
import samplers
import train
from datasets2d import DATASETS

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs")
    train.main(["--data", "clusters", "--target", "v", "--epochs", "5", "--width", "64", "--device", "cpu",
                "--out", str(out)])
    return out / "clusters-v-mse-s0"


def draw(ckpt, *extra):
    sample.main(["--ckpt", str(ckpt), "--device", "cpu", *extra])


def test_samples_and_distances(trained, tmp_path, capsys, with_pictures):
    draw(trained, "--steps", "50", "--num-samples", "5000", "--out", str(tmp_path))
    samples = np.load(tmp_path / "samples.npy")
    assert samples.shape == (5000, 2) and samples.dtype == np.float32
    result = json.loads((tmp_path / "metrics.json").read_text())
    real = kind_points.load(dict(data="clusters"))
    assert real.shape == (50_000, 2)
    for name in "mean_distance", "covariance_distance":
        assert abs(result[name] - getattr(metrics, name)(torch.from_numpy(samples), real).item()) < 1e-6
        assert result[name] < 0.2 and 0 < result[f"{name}_floor"]["mean"] < 0.05
    for key, points in ("log_density", torch.from_numpy(samples)), ("log_density_data", real):
        assert abs(result[key] - DATASETS["clusters"].log_prob(points).mean().item()) < 1e-5
    floor = metrics.floor(DATASETS["clusters"], 5000, 50_000, generator=run.generator("cpu", "floor"))
    assert (result["mean_distance_floor"]["mean"], result["mean_distance_floor"]["std"]) == floor["mean_distance"]
    last = run.load(trained)["history"][-1]
    assert (result["test_loss"], result["optimum"]) == (last["test_loss"], last["optimum"])
    assert (result["steps"], result["num_samples"], result["target"], result["epochs_trained"]) == (50, 5000, "v", 5)
    assert (tmp_path / "samples.png").read_bytes().startswith(b"\x89PNG")
    out = capsys.readouterr().out
    assert "mean distance" in out and "floor" in out and f"{result['covariance_distance']:.4f}" in out


def test_sampling_is_the_checkpoints_own_model_schedule_and_target(tmp_path):
    train.main(["--data", "waves", "--target", "s", "--loss", "nelbo", "--schedule", "ve", "--t-min", "0.02",
                "--stabiliser", "0.05", "--epochs", "1", "--width", "8", "--device", "cpu", "--out", str(tmp_path)])
    folder = tmp_path / "waves-s-nelbo-s0"
    draw(folder, "--steps", "3", "--num-samples", "10", "--seed", "7", "--out", str(tmp_path))
    model = mlp.MLP(width=8, schedule=ddpm.SCHEDULES["ve"])
    model.load_state_dict(run.load(folder)["model"])
    expected = samplers.sample(model, (10, 2), 3, target="s", schedule=ddpm.SCHEDULES["ve"], t_min=0.02,
                                     generator=run.generator("cpu", 7, "sample"), stabiliser=0.05)
    assert np.array_equal(np.load(tmp_path / "samples.npy"), expected.numpy())


def test_the_grid_of_steps_has_its_own_t_min(trained, tmp_path):
    """That of training, at least 0.001: eps of a run trained down to 1e-6 would divide by alpha = 1.6e-6."""
    state = run.load(trained)
    state["config"]["t_min"] = 1e-6
    state["history"] = state["history"][:2]
    run.save(tmp_path / "ckpt.pt", state)
    model = kind_points.build_model(state["config"])
    model.load_state_dict(state["model"])
    for extra, t_min in ([], 1e-3), (["--t-min", "0.02"], 0.02):
        draw(tmp_path, "--steps", "3", "--num-samples", "20", *extra)
        assert json.loads((tmp_path / "metrics.json").read_text())["epochs_trained"] == 2
        expected = samplers.sample(model, (20, 2), 3, target="v", schedule=ddpm.SCHEDULES["cosine"], t_min=t_min,
                                         generator=run.generator("cpu", 0, "sample"))
        assert np.allclose(np.load(tmp_path / "samples.npy"), expected.numpy(), atol=1e-6)


def test_two_runs_of_one_name_do_not_share_a_folder(trained, tmp_path):
    with pytest.raises(SystemExit, match="two of these runs have one name .* leave it out"):
        sample.main(["--ckpt", str(trained), str(trained / "ckpt.pt"), "--out", str(tmp_path)])
    assert not list(tmp_path.iterdir())


def test_the_newest_run_is_the_default_and_its_folder_the_output(trained, capsys, monkeypatch):
    older = trained.parent / "waves-eps-mse-s9"
    older.mkdir()
    (older / "ckpt.pt").write_bytes(b"")
    os.utime(older / "ckpt.pt", (0, 0))
    monkeypatch.setattr(run, "newest", lambda newest=run.newest: newest(trained.parent))
    sample.main(["--steps", "1", "--num-samples", "100", "--device", "cpu"])
    assert str(trained) in capsys.readouterr().out and (trained / "samples.npy").exists()
    draw(trained / "ckpt.pt", "--steps", "2", "--num-samples", "100")
    assert json.loads((trained / "metrics.json").read_text())["steps"] == 2


def test_no_run_at_all(tmp_path):
    with pytest.raises(SystemExit, match="no checkpoint under .* train one first: python train.py"):
        run.newest(tmp_path)
    with pytest.raises(SystemExit, match="no checkpoint at .* train one first: python train.py"):
        draw(tmp_path)


class Bomb:
    def __reduce__(self):
        return os.system, ("touch exploded",)


@pytest.mark.parametrize("kind", ["truncated", "empty", "text", "pickle", "zipped pickle", "folder"])
def test_a_damaged_or_dangerous_checkpoint_is_one_sentence(trained, tmp_path, kind, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "ckpt.pt"
    whole = (trained / "ckpt.pt").read_bytes()
    contents = {"truncated": whole[:len(whole) // 2], "empty": b"", "text": b"not a checkpoint\n",
                "pickle": pickle.dumps({"model": Bomb()}, protocol=2)}
    if kind == "zipped pickle":
        torch.save({"format": run.FORMAT, "model": Bomb()}, path)
    elif kind == "folder":
        (path / "ckpt.pt").mkdir(parents=True)
    else:
        path.write_bytes(contents[kind])
    with pytest.raises(SystemExit, match="damaged or not a checkpoint of this project, nothing in it was run"):
        draw(path)
    assert not (tmp_path / "exploded").exists()


def test_a_checkpoint_of_another_project_is_one_sentence(tmp_path):
    for foreign in {"model": {}, "config": {"target": "eps"}}, {"format": run.FORMAT}, [1, 2], torch.zeros(3):
        torch.save(foreign, tmp_path / "ckpt.pt")
        with pytest.raises(SystemExit, match="not a checkpoint of this project - make one with"):
            draw(tmp_path / "ckpt.pt")


def test_a_target_that_the_code_lost_is_one_sentence(trained, tmp_path):
    state = run.load(trained)
    state["config"]["target"] = "f"
    run.save(tmp_path / "ckpt.pt", state)
    with pytest.raises(SystemExit, match="trained with --target f, which this code does not have - put its row back"):
        draw(tmp_path)


def test_a_diverged_model_is_one_sentence(trained, tmp_path):
    state = run.load(trained)
    state["model"]["biases.6"][:] = float("nan")
    run.save(tmp_path / "ckpt.pt", state)
    with pytest.raises(SystemExit, match="not finite"):
        draw(tmp_path, "--steps", "2", "--num-samples", "10")
    assert not (tmp_path / "samples.npy").exists()


@pytest.mark.parametrize("arguments", [["--steps", "0"], ["--steps", "-3"], ["--num-samples", "1"], ["--steps", "x"]])
def test_wrong_arguments_exit_with_2(trained, arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        draw(trained, *arguments)
    assert stop.value.code == 2 and "--" in capsys.readouterr().err


def test_a_full_disk_keeps_the_old_samples(trained, tmp_path):
    draw(trained, "--steps", "1", "--num-samples", "10", "--out", str(tmp_path))
    before = (tmp_path / "samples.npy").read_bytes()
    (tmp_path / "samples.npy.tmp").symlink_to("/dev/full")
    with pytest.raises(SystemExit, match="cannot write .*samples.npy: No space left on device"):
        draw(trained, "--steps", "2", "--num-samples", "10", "--out", str(tmp_path))
    assert (tmp_path / "samples.npy").read_bytes() == before


def test_defaults_and_what_the_image_shows(trained, tmp_path, monkeypatch):
    args = sample.parse([])
    assert (args.ckpt, args.steps, args.num_samples, args.seed, args.out) == (None, 512, None, 0, None)
    shown, figures = {}, plots.plt.get_fignums()           # of other tests
    monkeypatch.setattr(plots, "scatter", lambda panels, path, limits: shown.update(panels))
    draw(trained, "--steps", "2", "--num-samples", "50", "--out", str(tmp_path))
    assert torch.equal(shown["clusters, data"], kind_points.load(dict(data="clusters")))
    assert np.array_equal(shown["v, mse, 2 steps"].numpy(), np.load(tmp_path / "samples.npy"))
    assert plots.plt.get_fignums() == figures


def test_exit_codes_from_a_shell(tmp_path):
    def call(*arguments):
        result = subprocess.run([sys.executable, str(ROOT / "sample.py"), *arguments], cwd=tmp_path,
                                capture_output=True, text=True)
        assert "Traceback" not in result.stderr
        return result.returncode, result.stderr.strip().splitlines()
    code, lines = call("--ckpt", "nowhere")
    assert code == 1 and len(lines) == 1 and "train one first" in lines[0]
    code, lines = call("--steps", "0")
    assert code == 2 and "--steps: must be in [1, 1000000], got 0" in lines[-1]


def test_sampler_and_grid_reach_the_samples_and_the_record(trained, tmp_path, capsys):
    model = kind_points.build_model(run.load(trained)["config"])
    model.load_state_dict(run.load(trained)["model"])
    for arguments, how in (["--sampler", "dpmpp", "--grid", "karras"], dict(sampler="dpmpp", grid="karras")), \
                          (["--sampler", "ddim", "--eta", "0.5"], dict(sampler="ddim", grid="t", eta=0.5)), \
                          (["--sampler", "heun", "--churn", "2"], dict(sampler="heun", grid="t", churn=2.0)):
        draw(trained, "--steps", "4", "--num-samples", "20", "--out", str(tmp_path), *arguments)
        expected = samplers.sample(model, (20, 2), 4, target="v", schedule=ddpm.SCHEDULES["cosine"],
                                   generator=run.generator("cpu", 0, "sample"), **how)
        assert np.allclose(np.load(tmp_path / "samples.npy"), expected.numpy(), atol=1e-6)
        assert how.items() <= json.loads((tmp_path / "metrics.json").read_text()).items()
        assert ", ".join(f"{key} {value}" for key, value in how.items()) in capsys.readouterr().out
    args = sample.parse([])
    assert args.how == dict(sampler="ancestral", grid="t")


@pytest.mark.parametrize("arguments, message", [
    (["--sampler", "plms"], "invalid choice: 'plms' .choose from .*ancestral"),
    (["--grid", "x"], "invalid choice: 'x'"), (["--eta", "2"], "must be in"),
    (["--eta", "0.5"], "--eta is for --sampler ddim or sde, ancestral has none"),
    (["--sampler", "dpmpp", "--churn", "1"], "--churn is for --sampler heun, dpmpp has none")])
def test_a_wrong_sampler_exits_with_2(arguments, message, capsys):
    with pytest.raises(SystemExit) as stop:
        sample.main(arguments)
    assert stop.value.code == 2 and re.search(message, capsys.readouterr().err)
