"""Checkpoints, the files beside them and the lock: what is damaged, edited or in use ends in one sentence."""
import errno
import fcntl
import json
import os
import shlex
import shutil
import zipfile
from pathlib import Path

import pytest
import torch

import checkpoints
import run
import sample
import settings
import train
import train_points

POINTS = "--target v --width 8 --epochs 4 --batch-size 10000 --device cpu".split()
OLD = Path(__file__).parent / "old"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A run of points, killed after 2 of 4 epochs, in runs/ of the current folder; its checkpoint has a digest."""
    monkeypatch.chdir(tmp_path)
    folder = Path("runs/rings-v-mse-s0")
    shutil.copytree(OLD / "rings-v-mse-s0", folder)
    run.save(folder / "ckpt.pt", run.load(folder))
    return folder


def test_any_flipped_byte_is_noticed(folder):
    path = folder / "ckpt.pt"
    whole, g = path.read_bytes(), torch.Generator().manual_seed(0)
    assert run.load(folder)["format"] == checkpoints.FORMAT
    places = [*torch.randint(len(whole), (200,), generator=g).tolist(), 0, len(whole) - 1, len(whole) - 33]
    for place in places:
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1:])
        with pytest.raises(SystemExit, match="cannot read .*damaged|is not a checkpoint of this project"):
            run.load(folder)
    path.write_bytes(whole[:-checkpoints.SIGNATURE])               # the digest alone is gone
    with pytest.raises(SystemExit, match="is not a checkpoint of this project"):
        run.load(folder)


def test_a_compressed_file_is_not_unpacked(folder):
    """A small one could be of any size when unpacked; torch writes none."""
    with zipfile.ZipFile(OLD / folder.name / "ckpt.pt") as old, \
            zipfile.ZipFile(folder / "ckpt.pt", "w", zipfile.ZIP_DEFLATED) as new:
        for name in old.namelist():
            new.writestr(name, old.read(name))
    with pytest.raises(SystemExit, match="cannot read"):
        run.load(folder)


def test_a_checkpoint_is_what_torch_reads(folder):
    state = torch.load(folder / "ckpt.pt", weights_only=True)
    assert state["config"] == run.load(folder)["config"] and torch.equal(state["model"]["weights.0"],
                                                                         run.load(folder)["model"]["weights.0"])


def test_a_checkpoint_and_its_config_json_agree(folder):
    said = json.loads((folder / "config.json").read_text())
    for text in json.dumps(said | {"width": 16}), json.dumps(said | {"extra": 1}):
        (folder / "config.json").write_text(text)
        with pytest.raises(SystemExit, match=r"config.json is not that of the checkpoint beside it \((width|extra)\)"):
            run.open(folder)
    for text in "{", "[]", "[" * 100_000, "\xff":
        (folder / "config.json").write_text(text, encoding="latin-1")
        with pytest.raises(SystemExit, match="config.json is damaged - delete config.json: --resume makes it again"):
            run.open(folder)
    (folder / "config.json").unlink()
    assert run.open(folder).config["width"] == 8
    train.main([*POINTS, "--resume"])
    assert json.loads((folder / "config.json").read_text()) == run.load(folder)["config"]


@pytest.mark.parametrize("damage", ["gone", "half", "more"])
def test_metrics_are_made_again_from_the_checkpoint(folder, damage, capsys):
    """Of a finished run too, where nothing else is written."""
    log = folder / "metrics.jsonl"
    train.main([*POINTS, "--resume"])
    whole = log.read_bytes()
    log.write_bytes({"half": whole[:len(whole) // 2], "more": whole + b"{}\n", "gone": b""}[damage])
    if damage == "gone":
        log.unlink()
    capsys.readouterr()
    train.main([*POINTS, "--resume"])
    assert log.read_bytes() == whole and "metrics.jsonl was missing or another" in capsys.readouterr().out
    train.main([*POINTS, "--resume"])
    assert "metrics.jsonl" not in capsys.readouterr().out


def test_a_resumed_run_depends_on_all_that_is_restored(folder):
    """At an epoch's end and after the last it ends in the same weights; without the optimizer's state it does not."""
    def ends(state, out):
        run.save(Path(out) / folder.name / "ckpt.pt", state)
        train.main([*POINTS, "--resume", "--out", out])
        return run.load(Path(out) / folder.name)["model"]
    state = run.load(folder)
    train.main([*POINTS, "--out", "whole"])
    whole = run.load(Path("whole") / folder.name)
    first = ends(state, "resumed")
    again = ends(run.load(Path("resumed") / folder.name), "finished")
    for key, value in whole["model"].items():
        torch.testing.assert_close(first[key], value, rtol=1e-3, atol=1e-4)
        assert torch.equal(again[key], first[key])
    far = lambda model: max((model[key] - first[key]).abs().max() for key in first)
    moments = {i: {key: torch.zeros_like(value) for key, value in part.items()}
               for i, part in state["optimizer"].items()}
    weights = {key: 1.01 * value for key, value in state["model"].items()}
    assert far(ends(state | {"optimizer": moments}, "no-moments")) > 1e-3
    assert far(ends(state | {"model": weights}, "other-weights")) > 1e-3
    assert far(ends(state | {"history": state["history"][:1]}, "one-epoch-less")) > 1e-4


def test_more_epochs_are_refused_with_the_reason_and_what_to_type(folder):
    with pytest.raises(SystemExit, match=r"other settings \(--epochs 4\): the learning rate decays to 0 over all epochs"
                                         ".* another folder of runs, --out NAME, or start it again with train.py"):
        train.main([*POINTS, "--epochs", "8", "--resume"])
    with pytest.raises(SystemExit, match=r"other settings \(--epochs 4 --width 8\) - keep both .* --out NAME"):
        train.main([*POINTS, "--epochs", "8", "--width", "9", "--resume"])


def test_one_process_trains_a_run(folder):
    before = (folder / "ckpt.pt").read_bytes()
    other = os.open(folder, os.O_RDONLY)
    fcntl.flock(other, fcntl.LOCK_EX)                              # as another process has it
    for how in "--resume", "--overwrite":
        with pytest.raises(SystemExit, match="another process is training .* - wait for it, or .* --out NAME"):
            train.main([*POINTS, how])
    assert (folder / "ckpt.pt").read_bytes() == before and not checkpoints.LOCKED
    train.main([*POINTS, "--resume", "--out", "other"])
    os.close(other)
    train.main([*POINTS, "--resume"])


def test_the_lock_is_held_while_it_trains_and_then_no_more(folder, monkeypatch):
    tried, original = [], train_points.train_epoch

    def attempt():
        try:
            fcntl.flock(descriptor := os.open(folder, os.O_RDONLY), fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return "held"
        finally:
            os.close(descriptor)
        return "free"
    monkeypatch.setattr(train_points, "train_epoch",
                        lambda *args, **kw: tried.append(attempt()) or original(*args, **kw))
    train.main([*POINTS, "--resume"])
    assert tried == ["held", "held"] and attempt() == "free"


def test_without_locks_training_goes_on(folder, monkeypatch):
    """Windows has no fcntl, and some network drives refuse."""
    def refuses(*arguments):
        raise OSError(errno.ENOLCK, "No locks available")
    with monkeypatch.context() as patch:
        patch.setattr(checkpoints.fcntl, "flock", refuses)
        train.main([*POINTS, "--resume"])
    monkeypatch.setattr(checkpoints, "fcntl", None)
    train.main([*POINTS, "--overwrite"])
    assert len(run.load(folder)["history"]) == 4


@pytest.mark.parametrize("error, message", [
    (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), True), (MemoryError(), True),
    (RuntimeError("[enforce fail at alloc_cpu.cpp:117] err == 0. DefaultCPUAllocator: can't allocate memory"), True),
    (RuntimeError("MPS backend out of memory"), True),
    (RuntimeError("CUDA error: an illegal memory access was encountered"), False),
    (RuntimeError("shared memory of another kind"), False)])
def test_what_counts_as_too_little_memory(error, message):
    with pytest.raises(SystemExit if message else type(error), match="try less" if message else "memory"):
        with run.enough_memory("less"):
            raise error


def test_memory_that_a_cpu_does_not_have_is_one_sentence():
    with pytest.raises(SystemExit, match="not enough memory - try less"):
        with run.enough_memory("less"):
            torch.empty(2**60, dtype=torch.uint8)


def test_a_closed_pipe_loses_nothing(tmp_path, monkeypatch):
    """As with `| head -1`: the reader leaves, main goes on to its end."""
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w") as stream:
        monkeypatch.setattr("sys.stdout", stream)

        def main():
            for line in range(3):
                print(line, flush=True)
            (tmp_path / "samples.png").write_text("whole")
        run.script(main, "")
    assert (tmp_path / "samples.png").read_text() == "whole"


def test_a_folder_for_results_that_cannot_be_written_is_known_before_sampling(folder, monkeypatch):
    monkeypatch.setattr(settings, "folder", str)
    Path("file").write_text("")
    monkeypatch.setattr(run.Run, "model", lambda *arguments: pytest.fail("sampled"))
    with pytest.raises(SystemExit, match="cannot write file/.*Not a directory - .* choose another folder with --out"):
        sample.main(["--ckpt", str(folder), "--out", "file/here"])


def test_only_a_full_disk_is_told_to_make_room():
    for code, room in (errno.ENOSPC, True), (errno.EDQUOT, True), (errno.ENOTDIR, False), (errno.EACCES, False):
        assert ("make room or choose another" in str(checkpoints.cannot_write("x", OSError(code, "why")))) == room
    assert str(checkpoints.cannot_write("x", OSError(errno.EMFILE, "why"))).endswith("train fewer runs in one call")


def test_a_command_can_be_typed_whatever_the_folder_is_called():
    words = ["--ckpt", "my runs/it's", "--steps", 512]
    assert shlex.split(run.command("sample.py", *words))[2:] == ["--ckpt", "my runs/it's", "--steps", "512"]


def test_the_same_process_may_lock_a_folder_twice(tmp_path):
    checkpoints.lock(tmp_path)
    checkpoints.lock(tmp_path / ".." / tmp_path.name)
    assert len(checkpoints.LOCKED) == 1
    held = checkpoints.LOCKED.copy()
    checkpoints.LOCKED.clear()                                     # another process of this code
    with pytest.raises(SystemExit, match="another process is training"):
        checkpoints.lock(tmp_path)
    checkpoints.LOCKED.update(held)
    checkpoints.unlock()
    assert checkpoints.LOCKED == {}
