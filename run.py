"""A run: its random numbers, its folder and its checkpoint. What `train.py` and `sample.py` share.

A run is a folder runs/<data>-<target>-<loss>-s<seed>/ with ckpt.pt, config.json and metrics.jsonl. Files are written
under a temporary name and then renamed: a kill or a full disk at any moment leaves the last complete one. A mistake of
the user ends in SystemExit with one sentence: exit code 1, no traceback.
"""
import argparse
import contextlib
import hashlib
import io
import os
import sys
from pathlib import Path

import torch

FORMAT = "diffusion-losses 2"        # written into every checkpoint


def generator(device, *key):
    """A random generator that is a function of the key, numbers and words, say (seed, "noise", epoch).

    So two runs of one seed see the same draws whatever their target and loss, and a resumed run goes on exactly. The
    key is hashed because torch's CPU generator looks at the low 32 bits of its seed only: sums would collide.
    """
    digest = hashlib.sha256(repr(key).encode()).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def device(name):
    """The torch device called auto, cpu, cuda or mps; auto is cuda where there is one, else cpu."""
    if name == "cuda" and not torch.cuda.is_available() or name == "mps" and not torch.backends.mps.is_available():
        raise SystemExit(f"this machine has no {name} device that torch can use - try --device auto")
    return torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)


def device_name(device):
    """What to write beside a measured time: the GPU, or how many threads of the CPU."""
    threads = torch.get_num_threads()
    return torch.cuda.get_device_name() if device.type == "cuda" else f"{device}, {threads} thread{'s' * (threads > 1)}"


def write(path, data):
    """Write bytes to path, whole or not at all; makes the folder. SystemExit if the disk is full or read-only."""
    path = Path(path)
    temporary = path.with_name(path.name + ".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(data)
        os.replace(temporary, path)
    except OSError as error:
        try:
            temporary.unlink(missing_ok=True)
        except OSError:
            pass
        raise SystemExit(f"cannot write {path}: {error.strerror} - what was there before is kept; make room or choose "
                         "another folder with --out") from None


def save(path, checkpoint):
    """Write a checkpoint, a dict of tensors and plain values."""
    buffer = io.BytesIO()
    torch.save({"format": FORMAT, **checkpoint}, buffer)
    write(path, buffer.getbuffer())


def load(path):
    """Read a checkpoint of this project (a file, or the folder of a run) to the CPU; no code in it is ever run."""
    path = Path(path)
    path = path / "ckpt.pt" if path.is_dir() else path
    if not path.exists():
        raise SystemExit(f"no checkpoint at {path} - train one first: python train.py --target eps --loss mse")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception:                  # torch raises many kinds for a damaged or foreign file
        raise SystemExit(f"cannot read {path}: it is damaged or not a checkpoint of this project, nothing in it was run - "
                         "train again with --overwrite or choose another") from None
    keys = {"config", "model", "optimizer", "history"}
    if not isinstance(checkpoint, dict) or checkpoint.get("format") != FORMAT or not keys <= checkpoint.keys():
        raise SystemExit(f"{path} is not a checkpoint of this project - make one with: python train.py")
    return checkpoint


@contextlib.contextmanager
def enough_memory(advice):
    """Turn torch's out-of-memory errors, of a GPU or of the CPU, into a SystemExit of one sentence."""
    try:
        yield
    except RuntimeError as error:          # torch.OutOfMemoryError is one
        if "memory" not in str(error):
            raise
        raise SystemExit(f"not enough memory - try {advice}") from None


def newest(root="runs"):
    """The folder of the run in `root` whose checkpoint was written last."""
    checkpoints = sorted(Path(root).glob("*/ckpt.pt"), key=lambda path: path.stat().st_mtime)
    if not checkpoints:
        raise SystemExit(f"no checkpoint under {root}/ - train one first: python train.py --target eps --loss mse")
    return checkpoints[-1].parent


def number(kind, low, high=float("inf")):
    """An argparse type: a finite number of `kind` in [low, high]."""
    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not {'a whole' if kind is int else 'a'} number") from None
        if not low <= value <= high or value == float("inf"):
            bound = f"at least {low}" if high == float("inf") else f"in [{low}, {high}]"
            raise argparse.ArgumentTypeError(f"must be {bound}, got {text}")
        return value
    return parse


def script(main, stopped):
    """Run a script's main(); after Ctrl-C say what became of the work, exit code 130."""
    try:
        main()
    except KeyboardInterrupt:
        print(f"\nstopped - {stopped}", file=sys.stderr)
        sys.exit(130)
