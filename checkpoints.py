"""Files of a run: written whole or not at all, checked when they are read, and one process at a time.

A checkpoint is what torch.save writes of a dict, and after it MARK and the SHA-256 of all before: torch.load reads it
as it is. `load` runs no code in it, and what comes out has the types and the settings that the rest relies on:
a flipped byte (where there is a digest), a foreign file or an edited one ends in SystemExit with one sentence.

    config, model, history, optimizer          of every run
    ema                                        of images, and of points with --ema, too
    step, seconds, recent                      of images, too: see train_images.py
    schedule                                   of --schedule learned, too: see learned_schedule.Learner
    moments                                    of --t-density loss_aware and adaptive, too: see adaptive.py

Not here: what a run does with them (`run.py`).
"""
import contextlib
import errno
import hashlib
import io
import json
import os
import zipfile
from pathlib import Path

import torch

import adaptive
import learned_schedule
import settings

try:
    import fcntl
except ImportError:                    # Windows: no lock there
    fcntl = None

FORMAT, UNSIGNED = "diffusion-losses 3", "diffusion-losses 2"          # the latter has no digest
MARK = b"sha256:"
SIGNATURE = len(MARK) + hashlib.sha256().digest_size
LOCKED = {}                            # folders of this process: path -> file descriptor


def cannot_write(path, error):
    """The SystemExit for an OSError while writing."""
    room = "make room or choose another folder with --out"
    cures = {errno.ENOSPC: room, errno.EDQUOT: room, errno.EMFILE: "train fewer runs in one call"}
    return SystemExit(f"cannot write {path}: {error.strerror} - what was there before is kept; "
                      + cures.get(error.errno, "choose another folder with --out"))


def write(path, data):
    """Write bytes to path, whole or not at all; makes the folder. SystemExit if the disk is full or read-only."""
    path = Path(path)
    temporary = path.with_name(path.name + ".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(data)
        os.replace(temporary, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise cannot_write(path, error) from None


def check_writable(folder):
    """SystemExit if no file can be written into a folder, which is made: to be known before any work."""
    write(probe := Path(folder) / ".writable", b"")
    probe.unlink(missing_ok=True)


def lock(folder):
    """Keep a run's folder for this process until `unlock` or its end, a kill too; SystemExit if another has it."""
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if fcntl is None or folder.resolve() in LOCKED:
            return
        LOCKED[folder.resolve()] = descriptor = os.open(folder, os.O_RDONLY)
    except OSError as error:
        raise cannot_write(folder, error) from None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)         # of the folder itself: nothing to be left behind
    except BlockingIOError:
        raise SystemExit(f"another process is training {folder} - wait for it, or give this one another folder of runs "
                         "with --out NAME") from None
    except OSError:                    # some network drives have no locks
        pass


def unlock():
    """Let go of all folders that this process keeps."""
    while LOCKED:
        os.close(LOCKED.popitem()[1])


def digest(*parts):
    """Eight hexadecimal digits for the content of tensors, of which all bytes count, and of other things."""
    sha = hashlib.sha256()
    for part in parts:
        sha.update(part.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data
                   if torch.is_tensor(part) else repr(part).encode(errors="surrogateescape"))
    return sha.hexdigest()[:8]


def lines(history):
    """A history as metrics.jsonl has it."""
    return "".join(json.dumps(entry) + "\n" for entry in history).encode()


def outdated(path):
    """Is a file with what was measured of a run not there, or older than the checkpoint beside it?"""
    return not path.exists() or path.stat().st_mtime < path.with_name("ckpt.pt").stat().st_mtime


def once(one, name, measure, *more):
    """What measure(one, *more) -> dict finds of a Run, where it is outdated -> it, from <run>/<name>.json."""
    path = one.folder / f"{name}.json"
    if outdated(path):
        write(path, json.dumps(measure(one, *more)).encode())
    return json.loads(path.read_text())


def save(path, checkpoint):
    """Write a checkpoint, a dict of tensors and plain values, with its digest."""
    buffer = io.BytesIO()
    torch.save({**checkpoint, "format": FORMAT, "torch": str(torch.__version__)}, buffer)
    digest = hashlib.sha256(buffer.getbuffer()).digest()
    buffer.seek(0, io.SEEK_END)
    buffer.write(MARK + digest)
    write(path, buffer.getbuffer())


def unpack(data):
    """The dict in a checkpoint's bytes, and the format that it must have; any Exception if they are not one."""
    signed = data[-SIGNATURE:].startswith(MARK)
    if signed and hashlib.sha256(memoryview(data)[:-SIGNATURE]).digest() != data[len(MARK) - SIGNATURE:]:
        raise ValueError("damaged")
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        if any(part.compress_type for part in archive.infolist()):     # torch stores: a small file would unpack to a
            raise ValueError("compressed")                             # large one
    return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True), FORMAT if signed else UNSIGNED


def is_number(value):
    return type(value) in (int, float)


def has_weights(state):
    """Is it a network's state, {name: tensor}?"""
    return isinstance(state, dict) and len(state) > 0 and all(map(torch.is_tensor, state.values()))


def has_moments(state, model):
    """Is it the state of Adam for a network's weights, {0: {"step", "exp_avg", "exp_avg_sq"}, ...}?

    The fused kernel does not look at shapes: moments that are too short would be read beyond their end.
    """
    return (isinstance(state, dict) and list(state) == list(range(len(model))) and all(
        isinstance(moments, dict) and moments.keys() == {"step", "exp_avg", "exp_avg_sq"}
        and all(map(torch.is_tensor, moments.values())) and moments["step"].shape == ()
        and moments["exp_avg"].shape == moments["exp_avg_sq"].shape == weight.shape
        for moments, weight in zip(state.values(), model.values())))


def has_entries(history, *keys):
    """Is it a history, a list of dicts with these keys, their values numbers, None or lists of those?"""
    def plain(value):
        return value is None or is_number(value)
    return isinstance(history, list) and all(
        isinstance(entry, dict) and entry.keys() >= {"epoch", "step", "train_loss", "test_loss", "seconds", *keys}
        and all(plain(value) or isinstance(value, list) and all(map(plain, value)) for value in entry.values())
        for entry in history)


def has_loss_moments(checkpoint):
    """Has it the moments of its loss in each bin or step, `adaptive.moved`, where its times are drawn with them?"""
    config, moments = checkpoint["config"], checkpoint.get("moments")
    if config.get("t_density") not in adaptive.POWERS:
        return moments is None
    return (torch.is_tensor(moments) and moments.shape == (config.get("timesteps") or adaptive.BINS,)
            and moments.is_floating_point() and bool((moments.isfinite() & (moments >= 0)).all()))


def has_schedule(checkpoint):
    """Has it the weights of a learned schedule and their optimiser's state, where the config says so?"""
    config, state = checkpoint["config"], checkpoint.get("schedule")
    if config.get("schedule") != "learned":
        return state is None
    weights, fresh = state["weights"], learned_schedule.Learner(config).schedule.state_dict()
    shapes = lambda weights: {name: (value.shape, value.dtype) for name, value in weights.items()}
    return (shapes(weights) == shapes(fresh) and all(bool(value.isfinite().all()) for value in weights.values())
            and has_moments(state["optimizer"], {name: weights[name] for name in weights if name != "raw_ends"}))


PARTS = {  # what a checkpoint of each kind has besides its config: name, test of the whole checkpoint
    "points": [("model", lambda c: has_weights(c["model"])),
               ("ema", lambda c: not c["config"].get("ema") or has_weights(c["ema"])),
               ("history", lambda c: c["history"] != [] and has_entries(c["history"], "optimum")),
               ("optimizer", lambda c: has_moments(c["optimizer"], c["model"])),
               ("schedule", has_schedule),
               ("moments", has_loss_moments)],
    "images": [("model", lambda c: has_weights(c["model"])),
               ("ema", lambda c: has_weights(c["ema"])),
               ("history", lambda c: has_entries(c["history"])),
               ("optimizer", lambda c: has_moments(c["optimizer"]["state"], c["model"])),
               ("schedule", has_schedule),
               ("moments", has_loss_moments),
               ("step", lambda c: type(c["step"]) is int and c["step"] >= 0),
               ("seconds", lambda c: is_number(c["seconds"])),
               ("recent", lambda c: isinstance(c["recent"], list) and len(c["recent"]) in (0, 5)
                and [column.ndim for column in c["recent"]] in ([], [1, 1, 2, 2, 2])
                and len({len(column) for column in c["recent"]}) < 2)],
}


def fault(checkpoint, expected):
    """What is wrong with what came out of a checkpoint's file, and what to do, in words; None if nothing is."""
    keys = {"config", "model", "optimizer", "history"}
    if not isinstance(checkpoint, dict) or checkpoint.get("format") != expected or not keys <= checkpoint.keys():
        return "is not a checkpoint of this project - make one with: python train.py"
    found = settings.fault(checkpoint["config"])
    if found:
        return found
    kind = settings.kind(checkpoint["config"])
    for part, right in PARTS[kind]:
        try:
            if right(checkpoint):
                continue
        except (KeyError, TypeError, AttributeError):      # missing, or of a type that has no keys or length
            pass
        return f"was edited or is damaged: its {part} is not that of a run on {kind} - choose another, " \
               "or train it again with --overwrite"
    return None


def check_beside(path, config):
    """SystemExit if the config.json beside a checkpoint is damaged or says something else than its config."""
    path = path.with_name("config.json")
    if not path.is_file():
        return
    cure = "delete config.json: --resume makes it again from the checkpoint"
    try:
        said = settings.completed(json.loads(path.read_bytes()))
    except (OSError, ValueError, TypeError, RecursionError):
        raise SystemExit(f"{path} is damaged - {cure}") from None
    config = settings.completed(config)
    different = [key for key in {**config, **said} if config.get(key) != said.get(key)]
    if different:
        raise SystemExit(f"{path} is not that of the checkpoint beside it ({', '.join(different)}) - put back the one "
                         f"that belongs to it, or {cure}")


def load(path):
    """Read a checkpoint of this project (a file, or the folder of a run) to the CPU; no code in it is ever run.

    SystemExit if there is none, if it is damaged or foreign, or if it and the config.json beside it differ.
    """
    path = Path(path)
    path = path / "ckpt.pt" if os.path.isdir(path) else path
    if not os.path.lexists(path):
        raise SystemExit(f"no checkpoint at {path} - train one first: python train.py --target eps --loss mse")
    try:
        if not os.path.isfile(path):   # a folder, a link to nowhere, a pipe, which would never end
            raise ValueError("not a file")
        checkpoint, expected = unpack(path.read_bytes())
    except Exception:                  # torch raises many kinds for a damaged or foreign file
        raise SystemExit(f"cannot read {path}: it is damaged or not a checkpoint of this project, "
                         "nothing in it was run - train again with --overwrite or choose another") from None
    found = fault(checkpoint, expected)
    if found:
        raise SystemExit(f"{path} {found}")
    check_beside(path, checkpoint["config"])
    return checkpoint


@contextlib.contextmanager
def fitting(path):
    """Turn the errors of weights that do not fit their network into a SystemExit of one sentence."""
    try:
        yield
    except (RuntimeError, KeyError) as error:
        raise SystemExit(f"the weights in {path} do not fit the network of its config "
                         f"({str(error).splitlines()[-1].strip()[:150]}) - choose another, or train it again with "
                         "--overwrite") from None
