"""A run: its folder, its checkpoint and the network in it; and what all scripts share: random numbers, files, mistakes.

A run is a folder runs/<data>-<target>-<loss>-s<seed>/ with ckpt.pt, config.json and metrics.jsonl. Its checkpoint says
all that is needed to use it, so that a run opens itself:

    r = run.open("runs/rings-v-mse-s0")
    r.config, r.history, r.schedule, r.target                    # what was trained, and how it went
    x_hat, eps_hat = r.denoiser()(z, torch.tensor(0.5))          # z (B, 2); r.model()(z, t) is the bare network

Files are written under a temporary name and then renamed: a kill or a full disk leaves the last complete one. A mistake
of the user ends in SystemExit with one sentence: exit code 1, no traceback.
"""
import contextlib
import hashlib
import importlib
import json
import os
import shlex
import sys
from pathlib import Path

import torch
from torch import distributed

import checkpoints
import learned_schedule
import losses
import samplers
import settings
import stack
import variance
from checkpoints import FORMAT, load, save, write  # noqa: F401 - run.load, run.save

KINDS = {"points": "kind_points", "images": "kind_images"}     # files with the same verbs: load, draw, measure, ...


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


def processes(device=torch.device("cpu")):             # noqa: B008
    """Rank and number of the processes that torchrun started, else 0 and 1; the first call joins them, for a device."""
    if "WORLD_SIZE" not in os.environ:
        return 0, 1
    if not distributed.is_initialized():
        distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return distributed.get_rank(), distributed.get_world_size()


@contextlib.contextmanager
def enough_memory(advice):
    """Turn torch's out-of-memory errors, of a GPU or of the CPU, into a SystemExit of one sentence."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:           # those of a CPU and of MPS have no class of their own
        if not (isinstance(error, (MemoryError, torch.OutOfMemoryError)) or any(
                words in str(error) for words in ("DefaultCPUAllocator: can't allocate memory", "out of memory"))):
            raise
        raise SystemExit(f"not enough memory - try {advice}") from None


def newest(root="runs"):
    """The folder of the run in `root` whose checkpoint was written last."""
    found = sorted(filter(os.path.isfile, Path(root).glob("*/ckpt.pt")), key=lambda path: path.stat().st_mtime)
    if not found:
        raise SystemExit(f"no checkpoint under {root}/ - train one first: python train.py --target eps --loss mse")
    return found[-1].parent


def kind_module(kind):
    """The file of a kind of data, points or images. Imported here: it uses this file, and points need no images."""
    return importlib.import_module(KINDS[kind])


class Run:
    """A trained run, opened: folder, config, history (a dict for each test), checkpoint, and all it takes to use it."""

    def __init__(self, folder, checkpoint):
        self.folder, self.checkpoint, self.history = Path(folder), checkpoint, checkpoint["history"]
        self.config = settings.completed(checkpoint["config"])
        self.members = [self]

    @property
    def name(self):
        return settings.name(self.config)

    @property
    def target(self):
        """What `model` predicts: the target of its training, or x in place of the mean of a step of a chain."""
        return variance.predicted(self.config["target"])

    @property
    def schedule(self):
        return learned_schedule.of_run(self.config, self.checkpoint)

    @property
    def kind(self):
        """The file with the verbs of its data, `kind_points` or `kind_images`."""
        return kind_module(settings.kind(self.config))

    def model(self, device="cpu", out=False):
        """The trained network, model(z, t) -> prediction of `target`, to evaluate; of images with averaged weights.

        out: of a learned variance the network's second half, too: `variance.split` takes them apart.
        """
        model = self.kind.build_model(self.config, len(self.members))
        with checkpoints.fitting(self.folder):
            model.load_state_dict(stack.join([self.kind.weights(run.checkpoint) for run in self.members]))
        names, chain = [run.config["target"] for run in self.members], losses.chain_of(self.config)
        model = model if chain is None else variance.Mean(model, names, chain, out)
        model = learned_schedule.OnSchedule(model, self.schedule) if "schedule" in self.checkpoint else model
        return model.to(device).requires_grad_(False).eval()

    def denoiser(self, device="cpu", **options):
        """The network as (z, t) -> x_hat, eps_hat, for z (B, ...), t (): `samplers.denoiser`, which has the options."""
        if self.config.get("sigma") is not None:
            raise ValueError("a score without t is no denoiser - r.model()(x, t) is the score, whatever t")
        return samplers.denoiser(self.model(device), self.target, self.schedule, self.config["stabiliser"], **options)


class Stack(Run):
    """Several runs that differ in data, target, loss and seed only, as one: `target` is a list, z in equal blocks.

    Folder, history and config are those of the first. SystemExit if they differ in anything else.
    """

    def __init__(self, runs):
        super().__init__(runs[0].folder, runs[0].checkpoint)
        self.members = list(runs)
        for run in runs[1:]:
            first, other = settings.alike(self.config), settings.alike(run.config)
            different = [key for key in {**first, **other} if first.get(key) != other.get(key)]
            different += ["schedule"] * ("schedule" in run.checkpoint)         # learned: each has its own
            if different:
                raise SystemExit(f"{runs[0].folder} and {run.folder} differ in {', '.join(different)} "
                                 "and cannot be one stack - open them one by one")

    @property
    def target(self):
        return [run.target for run in self.members]


def open(path):
    """Open a trained run, its folder or its ckpt.pt -> Run; a list of them, which must be alike, -> Stack.

    SystemExit if there is none, or if this code lacks a row that it was trained with.
    """
    if not isinstance(path, (str, Path)):
        return Stack([open(one) for one in path])
    path = Path(path)
    return Run(path if os.path.isdir(path) else path.parent, load(path))


def stacks(runs, device):
    """Divide runs into stacks of those that are alike: of at most 8 on a CPU, else 96."""
    groups, size = {}, stack.size(device)
    for run in runs:
        same = settings.alike(run.config) | ({"schedule": str(run.folder)} if "schedule" in run.checkpoint else {})
        groups.setdefault(repr(sorted(same.items())), []).append(run)
    return [Stack(group[i:i + size]) for group in groups.values() for i in range(0, len(group), size)]


def chosen(paths, out):
    """The runs that a command line names, or the newest, and where the results of each go: [(Run, folder)].

    SystemExit if they are not of one kind, or if two would share a folder in `out`.
    """
    runs = [open(path) for path in paths or [newest()]]
    if len({run.kind for run in runs}) > 1:
        raise SystemExit("points and images cannot be mixed in one call - give their runs to one call each")
    if out and len({run.folder.name for run in runs}) < len(runs):
        raise SystemExit("two of these runs have one name and would share a folder in --out - "
                         "leave it out, or take them apart")
    places = [(run, Path(out) / (run.folder.name if len(runs) > 1 else "") if out else run.folder) for run in runs]
    for _, folder in places:
        checkpoints.check_writable(folder)                 # before hours of work, not after
    return places


def of_images(args, options, config):
    """Give the options of images alone, {name: default}, their defaults; SystemExit if one is given for points."""
    for name, default in options.items():
        if getattr(args, name) is None:
            setattr(args, name, default)
        elif settings.kind(config) == "points":
            raise SystemExit(f"--{name.replace('_', '-')} is an option of images, and this run is on points - "
                             "leave it out")


def smallest_t(config, t_min=None, sampler="ancestral", grid="t", **how):
    """The end of sampling: what was asked for, else that of training, but at least 0.001.

    A chain's own sampler goes through the chain's own times, which may end in 0.
    """
    own = config.get("timesteps") and (sampler, grid) == ("ancestral", "t")
    return t_min or (config["t_min"] if own else max(config["t_min"], 1e-3))


def existing(folder, config, resume, overwrite):
    """The checkpoint in a run's folder, or None. No run is silently overwritten, or resumed with other settings."""
    if overwrite or not os.path.lexists(folder / "ckpt.pt"):
        return None
    state = load(folder)
    before = settings.completed(state["config"])
    changed = [key for key in before if config.get(key) != before[key]]
    if before != config:
        why = [row.why for row in settings.SETTINGS if changed == [row.name] and row.why]
        raise SystemExit(f"{folder} holds a run with other settings "
                         f"({' '.join(f'--{key} {before[key]}'.replace('_', '-') for key in changed)})"
                         f"{': ' * bool(why)}{''.join(why)} - keep both by giving this one another folder of runs, "
                         "--out NAME, or start it again with train.py --overwrite")
    if not resume:
        raise SystemExit(f"{folder} holds this run already - "
                         "add --resume to go on with it or --overwrite to start again")
    return state


def check(configs, out, resume=False, overwrite=False):
    """[(folder, config, checkpoint or None)] of the runs to train. SystemExit if one must stay, or two share one."""
    folders = [Path(out) / settings.name(config) for config in configs]
    if len(set(folders)) < len(folders):
        raise SystemExit("two of these runs would share a folder, the data's folders have one name - "
                         "give each its own --out")
    return [(folder, config, existing(folder, config, resume, overwrite)) for folder, config in zip(folders, configs)]


def begin(configs, out, resume=False, overwrite=False):
    """`check`, lock, and then write the runs' config.json and delete what is overwritten."""
    for folder, *_ in check(configs, out, resume, overwrite):
        checkpoints.lock(folder)
    runs = check(configs, out, resume, overwrite)          # again, as it is now that no other process changes it
    for folder, config, state in runs:     # written before anything goes: a full disk stops here
        write(folder / "config.json", json.dumps(config, indent=2).encode())
        log, lines = folder / "metrics.jsonl", checkpoints.lines(state["history"]) if state else b""
        if state and not (os.path.isfile(log) and log.read_bytes() == lines):
            write(log, lines)
            print(f"{folder}: metrics.jsonl was missing or another, and is made again from the checkpoint")
        if overwrite:
            for file in ["ckpt.pt", "metrics.jsonl", "loss.png", "samples.npy", "samples.gif", "metrics.json",
                         *folder.glob("samples*.png"), *folder.glob("likelihood*.json")]:
                (folder / Path(file).name).unlink(missing_ok=True)
    return runs


def command(script, *words):
    """A command of this project as it can be typed in the current folder."""
    return shlex.join(["python", os.path.relpath(Path(__file__).with_name(script)), *map(str, words)])


class Output:
    """A stream whose reader may leave, as `head` does: the rest is not shown, and the work goes on."""

    def __init__(self, stream):
        self.stream = stream

    def __getattr__(self, name):
        return getattr(self.stream, name)

    def write(self, text):
        return self.attempt(self.stream.write, text)

    def flush(self):
        return self.attempt(self.stream.flush)

    def attempt(self, method, *arguments):
        try:
            return method(*arguments)
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())


def script(main, stopped):
    """Run a script's main(); after Ctrl-C say what became of the work, exit code 130."""
    with (contextlib.redirect_stdout(Output(sys.stdout)) as out, contextlib.redirect_stderr(Output(sys.stderr))):
        try:
            main()
        except KeyboardInterrupt:
            print(f"\nstopped - {stopped}", file=sys.stderr)
            sys.exit(130)
        finally:
            out.flush()
