"""What takes seconds and is the same for every run, kept on disk: the optimum of a dataset, the floor of distances.

The folder is diffusion-losses in $XDG_CACHE_HOME or ~/.cache; $DIFFUSION_LOSSES_CACHE names another, and empty means
none. A result is kept under a digest of all it depends on: its arguments, this project's code, torch, processor and
threads. What cannot be read is computed again, and what cannot be written is not kept: nothing depends on it.
"""
import functools
import hashlib
import os
from pathlib import Path

import torch

import checkpoints
import progress
import threads

FILES = 100                            # at most, of up to 0.8 MB; the oldest go


def folder():
    """Where results are kept, or None."""
    named = os.environ.get("DIFFUSION_LOSSES_CACHE")
    if named is not None:
        return Path(named) if named else None
    return Path(os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser(), "diffusion-losses")


@functools.cache
def code():
    """Digest of the files of this project and of what runs them: a result of other code is another one."""
    sources = sorted(Path(__file__).parent.glob("*.py"))
    return ([hashlib.sha256(path.read_bytes()).hexdigest() for path in sources], str(torch.__version__),
            torch.backends.cpu.get_cpu_capability())


def digest(*parts):
    """A name for tensors on the CPU and plain values, their content; of other objects, if they are equal in print."""
    result = hashlib.sha256(repr((code(), threads.MOST)).encode())
    for part in parts:
        tensor = torch.is_tensor(part)
        result.update(repr((part.shape, part.dtype) if tensor else part).encode() + b"\n")
        result.update(part.contiguous().numpy().tobytes() if tensor else b"")
    return result.hexdigest()


def kept(compute, name, *parts):
    """compute(), a nest of tensors and plain values, or what it gave for equal `parts`, all that it depends on.

    name: what it is, in words; the first is that of its file.
    """
    try:
        path = folder() / f"{name.split()[0]}-{digest(*parts)[:32]}.pt"
        value, form = checkpoints.unpack(path.read_bytes()) if path.is_file() else ({}, None)
        if form == checkpoints.FORMAT:
            return value["value"]
    except Exception:                      # no folder, not ours, damaged: torch raises many kinds
        pass
    with progress.announced(f"computing the {name}"):
        value = compute()
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        checkpoints.save(path, {"value": value})
        for old in sorted(path.parent.glob("*.pt"), key=os.path.getmtime)[:-FILES]:
            old.unlink()
    except (Exception, SystemExit):        # no folder, read-only, full, another process
        pass
    return value
