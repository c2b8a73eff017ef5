"""Bad command lines, hostile and damaged files, kills: each ends in one sentence, and nothing is lost.

A sentence is what argparse prints (exit code 2) or the text of a SystemExit (exit code 1). A bad call changes no file.
"""
import itertools
import json
import os
import pickle
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import checkpoints
import images
import likelihood
import metrics
import plots
import run
import sample
import train
import train_images
import train_points

OLD = Path(__file__).parent / "old"
POINTS, IMAGES = "runs/rings-v-mse-s0", "runs/dots-v-mse-s0"


class Bomb:
    def __reduce__(self):
        return os.mkdir, ("exploded",)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with a run of points and one of images, the images it was trained on, and worse ones."""
    root, g = tmp_path_factory.mktemp("robust"), np.random.default_rng(0)
    shutil.copytree(OLD, root / "runs")
    for name, sizes in {"dots": [8] * 12, "mixed": [8, 9, 8, 8], "single": [8], "one pixel": [1] * 12}.items():
        (root / name).mkdir()
        for i, size in enumerate(sizes):
            Image.fromarray(g.integers(0, 255, (size, size), np.uint8)).save(root / name / f"{i}.png")
    for name in "empty", "broken", "links", "truncated":
        (root / name).mkdir()
    for i in range(12):
        (root / "broken" / f"{i}.png").write_bytes(b"not an image")
        (root / "links" / f"{i}.png").symlink_to("/nowhere")
        (root / "truncated" / f"{i}.png").write_bytes((root / "dots" / "0.png").read_bytes()[:60])
    points = g.normal(size=(100, 2))
    arrays = {"points": points, "nan": points * [1, np.nan], "flat": points[:, 0], "few": points[:5],
              "constant": points * [1, 0], "complex": points * 1j, "none": points[:, :0], "cube": points[None],
              "words": points.astype(str)}
    for name, array in arrays.items():
        np.save(root / f"{name}.npy", array)
    np.save(root / "object.npy", np.array([Bomb()] * 30), allow_pickle=True)
    header = (root / "points.npy").read_bytes().replace(b"(100, 2)", b"(10**9,)")
    (root / "lies.npy").write_bytes(header)
    (root / "lies more.npy").write_bytes(header.replace(b"(10**9,)", b"(99999999999, 2)"[:8]))
    for name, text in {"empty": "", "words": "a,b\nc,d\n", "ragged": "1,2\n3\n" * 20, "zeros": "\0" * 100}.items():
        (root / f"{name}.csv").write_text(text)
    (root / "folder.npy").mkdir()
    os.mkfifo(root / "pipe.npy")
    (root / "loop.csv").symlink_to("loop.csv")
    (root / "file").write_text("")
    (root / "loop").symlink_to(root / "loop")
    (root / "bad.npz").write_bytes(b"PK")
    return root


@pytest.fixture
def here(made, monkeypatch):
    monkeypatch.chdir(made)
    return made


def files(root):
    """What lies under a folder: path -> size and time."""
    return {path: (path.lstat().st_size, path.lstat().st_mtime_ns) for path in root.rglob("*") if not path.is_dir()}


def complaint(capsys, main, *argv):
    """What is wrong with how a call ended, or None: it must end in one sentence."""
    before = files(Path("."))
    try:
        main([str(word) for word in argv])
        found = "no error"
    except SystemExit as stop:
        error = capsys.readouterr().err.strip()
        text = error.splitlines()[-1] if stop.code == 2 and error else stop.code
        right = isinstance(text, str) and len(text.splitlines()) == 1 and 20 < len(text) < 800
        found = None if right and "Traceback" not in error else f"exit {stop.code!r}, {error[-200:]}"
    except BaseException as error:
        found = f"{type(error).__name__}: {error}"
    capsys.readouterr()
    if found is None and files(Path(".")) != before:
        found = f"changed {dict(files(Path('.')).items() ^ before.items()).keys()}"
    return found


# Numbers: of each option some values of no number, not finite, out of range
WORDS = ["", "x", "nan", "inf", "-1", "1e400", "9" * 25]
TRAIN_POINTS = ["t-min", "stabiliser", "epochs", "batch-size", "lr", "width", "seed", "seeds", "stack", "timesteps",
                "vlb-weight", "ema"]
TRAIN_IMAGES = ["image-size", "channels", "channel-mult", "layers", "mid-blocks", "attention", "ema", "warmup",
                "clip-norm", "minutes", "test-every", "grid-every"]
NUMBERS = [
    (train.main, [], TRAIN_POINTS), (train.main, ["--data", "dots"], TRAIN_IMAGES),
    (sample.main, ["--ckpt", POINTS], ["steps", "eta", "churn", "t-min", "num-samples", "seed", "batch-size"]),
    (likelihood.main, ["--ckpt", POINTS], ["num", "t-min", "seed", "batch-size", "draws", "steps", "num-ode",
                                           "ode-steps", "tolerance", "probes"]),
    (images.main, ["dots"], ["image-size"]), (metrics.main, ["dots", "mixed"], ["dims"])]
ZEROS = [(train.main, words, [name for name in names if name not in ("stabiliser", "seed", "attention", "ema",
                                                              "vlb-weight")])
         for words, names in [([], TRAIN_POINTS), (["--data", "dots"], TRAIN_IMAGES)]]

SPARE, LONG = ["--data", "dots", "--batch-size", "4", "--channels", "4", "--layers", "1"], "a" * 300
LINES = [  # main, its arguments
    *[(train.main, [f"--{name}"]) for name in ("target", "data", "loss", "lr", "out", "nonsense", "tagret", "ema")],
    *[(train.main, [f"--{name}", word]) for name, word in itertools.product(
        ["data", "target", "loss", "schedule", "t-density", "variance", "device"],
        ["", "swis_roll", "epz", "..\0", LONG, "a b"])],
    *[(train.main, ["--data", word]) for word in ("empty", "broken", "links", "truncated", "mixed", "single", "file",
                                                  "loop", "nowhere/..", "one pixel")],
    *[(train.main, ["--data", word]) for word in (
        "nan.npy", "flat.npy", "few.npy", "words.npy", "constant.npy", "complex.npy", "none.npy", "cube.npy",
        "object.npy", "lies.npy", "lies more.npy", "empty.csv", "words.csv", "ragged.csv", "zeros.csv", "folder.npy",
        "pipe.npy", "loop.csv", "nowhere.csv", ".npy", "bad.npz", "points.npy")],      # the last: less than a batch
    *[(train.main, ["--out", word]) for word in ("", "file", "loop", LONG, "file/runs", "x\0y", "a/" * 3000)],
    *[(train.main, ["--data", "dots", "--data-dir", word]) for word in ("", "file", LONG)],
    *[(train.main, words) for words in (
        ["--resume", "--overwrite"], ["--target", "u", "--loss", "nelbo_stable"], ["--batch-size", "50001"],
        ["--data", "rings", "dots"], ["--target", "v", "--width", "8"], [*SPARE, "--stack", "2"],
        [*SPARE, "--width", "8"], ["--image-size", "8"], ["--no-compile"], ["--preset", "thesis"], ["--minutes", "1"],
        ["--warmup", "5"], ["--skip-corrupt"], ["--data", "dots", "--preset", "dddpm"],
        ["--data", "dots", "--precision", "fp8"], ["--data", "dots", "--batch-size", "100"],
        ["--data", "dots", "dots/../dots", "--batch-size", "4"], ["positional"], ["--device", "gpu"],
        ["--target", "v", "--width", "8", "--epochs", "5", "--batch-size", "10000", "--resume"],
        ["--target", "v", "--width", "8", "--epochs", "4", "--batch-size", "10000"],
        ["--timesteps", "9", "--data", "dots", "--batch-size", "4", "--variance", "best"], ["--timesteps", "9", "9"],
        ["--schedule", "cosine", "linear"], ["--t-min", "0.5"], ["--seed", "1.5"], ["--dropout", "0.9"])],
    *[(main, ["--ckpt", word]) for main in (sample.main, likelihood.main)
      for word in ("", "nowhere", "file", "loop", "dots", "dots/0.png", LONG, "x\0y", "runs", "bad.npz")],
    *[(main, ["--ckpt", POINTS, "--out", word]) for main in (sample.main, likelihood.main)
      for word in ("", "file", "loop", LONG, "file/out", "x\0y")],
    *[(sample.main, ["--ckpt", POINTS, *words]) for words in (
        ["--fid"], ["--no-fid"], ["--clip"], ["--no-clip"], ["--overwrite"], ["--batch-size", "5"],
        ["--fid-split", "train"], ["--fid-split", "val"], ["--inception-weights", "x"], ["--data-dir", "dots"],
        ["--variance", "log"], ["--variance", "none"], ["--grid", "rescaled"], ["--variance", ""],
        ["--variance", "large", "--sampler", "ddim"], ["--grid", "rescaled", "--sampler", "heun"],
        ["--eta", "0.5"], ["--sampler", "plms"], ["--grid", "x"], ["--device", "tpu"], ["--ckpt"],
        [IMAGES], ["--steps"], ["--eta"], ["--sampler", "heun", "--eta", "1"])],
    *[(sample.main, ["--ckpt", IMAGES, *words]) for words in (
        ["--variance", "best"], ["--variance", "range"], ["--fid"],
        ["--fid", "--num-samples", "4096", "--inception-weights", "nowhere"],
        ["--fid", "--num-samples", "4096", "--inception-weights", "file"], ["--data-dir", ""])],
    (sample.main, ["--ckpt", POINTS, IMAGES]), (likelihood.main, ["--ckpt", POINTS, IMAGES]),
    (sample.main, ["--ckpt", POINTS, f"{POINTS}/ckpt.pt", "--out", "both"]),
    *[(likelihood.main, ["--ckpt", POINTS, *words]) for words in (
        ["--variance", "large"], ["--variance", "log", "--steps", "4"], ["--variance", "none", "--steps", "4"],
        ["--num-ode", "1"], ["--uniform", "snr"], ["--data-dir", "dots"], ["--device", "tpu"], ["--ckpt"], ["--num"])],
    *[(main, ["--ckpt", POINTS, "--csv", word]) for main in (sample.main, likelihood.main)
      for word in ("", "dots", "loop", LONG, "file/table.csv", "x\0y", "pipe.npy")],
    *[(plots.main, words) for words in (
        [], [""], ["nowhere"], ["file"], ["dots"], [LONG], [POINTS, "nowhere"], [POINTS, "--out", ""],
        [POINTS, "--out", "dots"], [POINTS, "--out", "file/curves.png"], [POINTS, "--out", "loop"],
        [POINTS, "--nonsense"])],
    *[(images.main, [word]) for word in ("nowhere", "empty", "broken", "links", "truncated", "mixed", "single", "file",
                                         "loop", LONG, "x\0y")],
    *[(images.main, words) for words in (["dots", "dots"], ["dots", "--image-size"], ["dots", "--nonsense"])],
    *[(metrics.main, words) for words in (
        ["dots"], ["dots", "mixed"], ["dots", "dots"], ["dots", "empty"], ["dots", "bad.npz"], ["bad.npz", "bad.npz"],
        ["dots", "nowhere"], ["nowhere.npz", "dots"], ["dots", "dots", "dots"], ["--dims", "7", "dots", "dots"],
        ["--device", "tpu", "dots", "dots"], ["", ""], [LONG, LONG])],
]
BAD = ([(main, [*words, f"--{name}", word]) for main, words, names in NUMBERS for name in names for word in WORDS]
       + [(main, [*words, f"--{name}", "0"]) for main, words, names in ZEROS for name in names] + LINES)


def test_bad_command_lines(here, capsys, monkeypatch):
    assert len(BAD) > 300
    for module, name in (train_points, "train_stack"), (train_images, "train_run"):
        monkeypatch.setattr(module, name, lambda *args: pytest.fail("it trains"))
    ends = {f"{main.__module__}.py {argv!s:.200}": complaint(capsys, main, *argv) for main, argv in BAD}
    failed = [f"{call}: {found}" for call, found in ends.items() if found]
    assert not failed, "\n".join(failed)


# Edited checkpoints, with a digest as if this code had written them: a key of a part, or the part itself, and its value
RINGS = ["--target", "v", "--width", "8", "--epochs", "4", "--batch-size", "10000", "--device", "cpu"]
VALUES = [None, True, -1, 0.5, 1e300, float("nan"), "word", "", [], [1], {}, {1: 2}, int("9" * 4000),
          json.loads("[" * 200 + "]" * 200), "a" * 10_000]
KEYS = {"rings": ["width", "lr", "schedule", "t_min", "epochs", "batch_size", "stabiliser", "target", "data", "seed",
                  "timesteps", "variance", "vlb_weight", "t_density"],
        "dots": ["timesteps", "variance", "vlb_weight", "t_density", "shape", "channels", "channel_mult",
                 "attention", "ema", "skips", "precision", "flip"]}
RIGHT = [("timesteps", None), ("vlb_weight", 0.5), ("lr", 0.5), ("stabiliser", 0.5), ("flip", True), ("ema", 0.5),
         ("channel_mult", [1]), ("attention", [1])]
PARTS = {"rings": ["config", "model", "optimizer", "history"],
         "dots": ["config", "model", "ema", "optimizer", "history", "step", "seconds", "recent"]}


def edits(kind, state):
    """Checkpoints with one thing in them changed: {words: checkpoint}."""
    found = {f"{key} {value!s:.20}": state | {"config": state["config"] | {key: value}}
             for key in KEYS[kind] for value in VALUES[kind == "dots"::2] if (key, value) not in RIGHT}
    found |= {f"{part} {value!s:.20}": state | {part: value} for part in PARTS[kind] for value in VALUES[::2]
              if not (part == "seconds" and type(value) in (int, float) or (part, value) in [("recent", [])]
                      or kind == "dots" and (part, value) == ("history", []))}
    found |= {f"no {key}": state | {"config": {k: v for k, v in state["config"].items() if k != key}}
              for key in ("data", "target", "loss", "seed")}
    entry, weight = state["history"][0], next(iter(state["model"]))
    found |= {f"history {change}": state | {"history": [entry | change]}
              for change in ({"test_loss": "x"}, {"seconds": {}}, {"a": [[1]]}, {"train_loss_over_t": ["x"]})}
    found |= {f"{change}": state | {"config": state["config"] | change} for change in (
        {"t_min": 0.0}, {"variance": "log"}, {"target": "mu"}, {"loss": "vlb"}, {"t_density": "loss_aware"},
        {"timesteps": 4, "t_min": 0.0}, {"timesteps": 4, "t_density": "logsnr"}, {"timesteps": 4, "variance": "log"},
        {"timesteps": 4, "loss": "hybrid"}, {"timesteps": 4, "t_density": "loss_aware"},
        {"timesteps": 4, "loss": "vlb", "variance": "log"})}
    found |= {f"moments {value!s:.20}": state | {"moments": value} for value in (torch.ones(4), [1.0], 0, {})}
    if kind == "rings":
        short = {key: value[:, :1] if value.ndim else value for key, value in state["optimizer"][0].items()}
        found["moments"] = state | {"optimizer": state["optimizer"] | {0: short}}
        steps = {**state["optimizer"][0], "step": torch.zeros(1)}
        found["steps"] = state | {"optimizer": state["optimizer"] | {0: steps}}
    short = dict(entry)
    del short["test_loss"]
    return found | {
        "no test_loss": state | {"history": [short]}, "wider": state | {"config": state["config"] | {"width": 16}},
        "unknown": state | {"config": state["config"] | {"unknown": 1}},
        "shape": state | {"model": state["model"] | {weight: torch.zeros(7)},
                          "ema": state.get("ema", {}) | {weight: torch.zeros(7)}},
        "complex": state | {"model": state["model"] | {weight: "x"}},
        "weights": state | {key: {"w": torch.zeros(2)} for key in ("model", "ema")}}


@pytest.mark.parametrize("kind", ["rings", "dots"])
def test_edited_checkpoints(here, capsys, kind, tmp_path, monkeypatch):
    state = run.load(f"runs/{kind}-v-mse-s0")
    monkeypatch.chdir(tmp_path)
    failed, changed = [], edits(kind, state)
    path = Path(f"runs/{kind}-v-mse-s0/ckpt.pt")
    assert len(changed) > 100
    for words, checkpoint in changed.items():
        checkpoints.save(path, checkpoint)
        for main, argv in [(sample.main, ["--ckpt", path.parent, "--steps", "1", "--num-samples", "2"]),
                           (train.main, [*RINGS, "--resume"])][:1 + (kind == "rings")]:
            found = complaint(capsys, main, *argv)
            if found:
                failed.append(f"{words}: {main.__module__}.py: {found}")
    assert not failed, "\n".join(failed)


def test_edited_checkpoints_of_own_points_and_of_counted_images(here, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copy(here / "points.npy", "points.npy")
    argv = ["--data", "points.npy", *RINGS[:-2], "--epochs", "1", "--batch-size", "50", "--device", "cpu"]
    train.main(argv)
    path = Path("runs/points.npy-v-mse-s0/ckpt.pt")
    state, facts = run.load(path), run.load(path)["config"]["points"]
    (path.parent / "config.json").unlink()
    values = [*VALUES, *(facts | change for change in (
        {"dim": 3, "mean": [0.0] * 3, "scale": [1.0] * 3}, {"dim": 1}, {"scale": [0.0, 0.0]}, {"scale": ["x", "y"]},
        {"mean": [float("nan"), 0.0]}, {"digest": "another"}, {"rows": "x"}, {"more": 1}))]
    failed = []
    for value in values:
        checkpoints.save(path, state | {"config": state["config"] | {"points": value}})
        for main, words in (sample.main, ["--ckpt", path, "--steps", "1", "--num-samples", "2"]), (train.main, argv):
            found = complaint(capsys, main, *words)
            if found:
                failed.append(f"points {value!s:.60}: {main.__module__}.py: {found}")
    shutil.copytree(here / "dots", "dots")
    state, path = run.load(here / IMAGES), Path(IMAGES) / "ckpt.pt"
    for value in [*VALUES, {"count": "x", "digest": "y"}, {"count": 3, "digest": []}]:
        checkpoints.save(path, state | {"config": state["config"] | {"images": value}})
        found = complaint(capsys, train.main, *SPARE, "--target", "v", "--resume")
        if found:
            failed.append(f"images {value!s:.60}: {found}")
    assert not failed, "\n".join(failed)


def test_hostile_files_in_place_of_a_checkpoint(here, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = Path(POINTS) / "ckpt.pt"
    checkpoints.save(path, torch.load(here / POINTS / "ckpt.pt", weights_only=True))
    whole = path.read_bytes()
    path.unlink()

    def zipped(text, compression=zipfile.ZIP_STORED):
        with zipfile.ZipFile(path, "w", compression) as archive:
            archive.writestr("archive/data.pkl", text)
            archive.writestr("archive/version", "3\n")
            archive.writestr("archive/byteorder", "little")

    def again(change):
        checkpoints.save(path, torch.load(here / POINTS / "ckpt.pt", weights_only=True) | change)
    hostile = {
        "pickle": lambda: path.write_bytes(pickle.dumps({"model": Bomb()}, 2)),
        "zipped pickle": lambda: torch.save({"format": checkpoints.FORMAT, "model": Bomb()}, path),
        "pickle in zip": lambda: zipped(pickle.dumps(Bomb(), 2)),
        "zip bomb": lambda: zipped(b"\x80\x02X" + (10**7).to_bytes(4, "little") + b"a" * 10**7 + b".",
                                   zipfile.ZIP_DEFLATED),
        "empty": lambda: path.write_bytes(b""), "zeros": lambda: path.write_bytes(bytes(len(whole))),
        "truncated": lambda: path.write_bytes(whole[:-100]), "first half": lambda: path.write_bytes(whole[:9000]),
        "second half": lambda: path.write_bytes(whole[9000:]), "twice": lambda: path.write_bytes(whole + whole[:500]),
        "numpy": lambda: np.savez(path.open("wb"), a=np.zeros(3)), "text": lambda: path.write_text("{}" * 1000),
        "folder": path.mkdir, "folder with one": lambda: (path / "ckpt.pt").mkdir(parents=True),
        "loop": lambda: path.symlink_to(path.name), "pipe": lambda: os.mkfifo(path),
        "device": lambda: path.symlink_to("/dev/zero"), "nowhere": lambda: path.symlink_to("/nowhere"),
        "list": lambda: torch.save([1, 2], path), "tensor": lambda: torch.save(torch.zeros(3), path),
        "other": lambda: torch.save({"state_dict": {}}, path),
        "format": lambda: torch.save({"format": ["x"], "config": {}, "model": {}, "optimizer": 1, "history": 1}, path),
        "stride": lambda: again({"model": {"weights.0": torch.zeros(1).expand(2**40)}}),
    }
    failed = []
    for words, make in hostile.items():
        make()
        for main, argv in [(sample.main, ["--ckpt", path.parent]), (likelihood.main, ["--ckpt", path]),
                           (train.main, RINGS), (train.main, [*RINGS, "--resume"])]:
            found = complaint(capsys, main, *argv)
            if found:
                failed.append(f"{words}: {main.__module__}.py {argv}: {found}")
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    assert not failed and not Path("exploded").exists(), "\n".join(failed)


@pytest.mark.parametrize("what", ["before", "half"])
def test_kills(what, tmp_path, monkeypatch):
    """Before, or in the middle of, the n-th writing, renaming or deleting of a file, for every n: it goes on."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(plots, "loss_curve", lambda history, config, path: run.write(path, b"drawn"))
    argv = ["--target", "v", "--width", "8", "--epochs", "3", "--batch-size", "50000", "--device", "cpu"]
    train.main([*argv, "--out", "whole"])
    whole, kills = run.load("whole/rings-v-mse-s0"), 0
    for n in itertools.count(1):
        out, calls, killed = f"runs{n}", itertools.count(1), False
        with monkeypatch.context() as patch:
            for owner, name in (Path, "write_bytes"), (os, "replace"), (Path, "unlink"):
                original, partial = getattr(owner, name), name == "write_bytes"

                def spy(*arguments, original=original, partial=partial, **options):
                    if next(calls) != n:                                                            # noqa: B023
                        return original(*arguments, **options)
                    if what == "half":
                        original(*(arguments[0], bytes(arguments[1])[:len(arguments[1]) // 2]) if partial
                                 else arguments, **options)
                    raise KeyboardInterrupt
                patch.setattr(owner, name, spy)
            try:
                train.main([*argv, "--out", out])
            except KeyboardInterrupt:
                killed = True
        if not killed:
            break
        kills += 1
        train.main([*argv, "--out", out, "--resume"])
        ended, folder = run.load(f"{out}/rings-v-mse-s0"), Path(out, "rings-v-mse-s0")
        assert all(torch.equal(value, ended["model"][key]) for key, value in whole["model"].items())
        assert (folder / "metrics.jsonl").read_bytes() == checkpoints.lines(ended["history"])
        assert len(ended["history"]) == 3 and (folder / "loss.png").exists() and not list(folder.glob("*.tmp"))
    assert kills >= 10


def test_a_kill_while_a_run_is_overwritten_leaves_one_that_can_be_overwritten(tmp_path, monkeypatch):
    """Killed in the middle of it, the old run or none is there, and the same command starts again."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(plots, "loss_curve", lambda history, config, path: run.write(path, b"drawn"))
    for n in range(1, 10):
        argv = ["--target", "v", "--width", "8", "--epochs", "1", "--batch-size", "50000", "--device", "cpu"]
        train.main([*argv, "--overwrite"])
        calls = itertools.count(1)
        with monkeypatch.context() as patch:
            for owner, name in (Path, "write_bytes"), (os, "replace"), (Path, "unlink"):
                original = getattr(owner, name)

                def spy(*arguments, original=original, **options):
                    if next(calls) == n:                                                            # noqa: B023
                        raise KeyboardInterrupt
                    return original(*arguments, **options)
                patch.setattr(owner, name, spy)
            with pytest.raises(KeyboardInterrupt):
                train.main([*argv, "--overwrite", "--lr", "0.01"])
        train.main([*argv, "--overwrite", "--lr", "0.01"])
        assert run.load(POINTS)["config"]["lr"] == 0.01
