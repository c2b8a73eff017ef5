"""The settings of a training run, each declared once: a row of SETTINGS.

The command line, its help, the config in a checkpoint, the check of a resumed run and what may be trained or sampled
as one stack follow from the rows. A new setting is a row here and the place that uses it; a checkpoint from before it
has its default.

Points and images are the two kinds of data. Data, target, loss and seed, of which `train.py` takes several values, name
a run.

    python settings.py    # the rows: defaults for points and for images, and whether they are of a run's identity
"""
import argparse
import itertools
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

import conflicts
import losses
import mlp
import unet
from arguments import Parser, file, folder, number, path  # noqa: F401 - of the command lines of all scripts
from datasets2d import DATASETS
from ddpm import SCHEDULES
from own_points import are_facts, is_file_of_points
from score_matching import OBJECTIVES
from targets import TARGETS
from variance import VARIANCES

ABSENT = object()          # in place of a default: this kind of data has no such setting
NAMES = "data", "target", "loss", "seed"


@dataclass(frozen=True)
class Setting:
    """A row: --name on the command line. argument: further arguments of argparse's add_argument."""
    name: str
    help: str
    points: object = ABSENT
    images: object = ABSENT
    identity: str = "points images"        # the kinds in whose config it is: there another value is another run
    argument: dict = field(default_factory=dict)
    why: str = ""                          # a run cannot be resumed with another value of it


SETTINGS = [
    Setting("schedule", "noise schedule; learned: beside the network, see learned_schedule.py", "cosine", "cosine",
            argument=dict(choices=(*SCHEDULES, "learned"))),
    Setting("t_min", "t is in [t_min, 1 - t_min]; 0 for a chain whose schedule allows it", 1e-3, 1e-3,
            argument=dict(type=number(float, 0, 0.49))),
    Setting("t_density", "what is uniform, t or log-SNR, or where the loss is large: p ~ its mean in each bin of "
            "log-SNR, adaptive, or the root of its mean square there or in each step of a chain, loss_aware; the "
            "weights are exact in all", "uniform", "uniform", argument=dict(choices=losses.T_DENSITIES)),
    Setting("timesteps", "train a discrete chain of so many steps, see variance.py, Ho et al. 2020: 1000 (none: "
            "continuous time)", None, None, argument=dict(type=number(int, 2, 10_000))),
    Setting("variance", "of a step of a chain; direct, log and range are learned", "small", "small",
            argument=dict(choices=VARIANCES)),
    Setting("vlb_weight", "of --loss hybrid: its factor of the bound in nats per dimension, the sum over all steps",
            1e-3, 1e-3, argument=dict(type=number(float, 0, 10**6))),
    Setting("sigma", "noise level of scores without t, --loss exact, sliced or denoising, one for all of a call; "
            "0 is none (0, with denoising among them 0.1)", None, argument=dict(type=number(float, 0, 100))),
    Setting("energy", "the network's one output is an energy, the prediction of s or eps its gradient, see energy.py",
            False, argument=dict(action=argparse.BooleanOptionalAction)),
    Setting("labels", "the network sees the label of each point or image, of one in ten none, see guidance.py", False,
            False, argument=dict(action=argparse.BooleanOptionalAction)),
    Setting("activation", "relu, and silu where derivatives of the network are used", "relu",
            argument=dict(choices=mlp.ACTIVATIONS)),
    Setting("stabiliser", "d in the score target -sigma eps / (sigma^2 + d); the thesis's numbers: 0.01", 0.0, 0.0,
            argument=dict(type=number(float, 0, 100))),
    Setting("epochs", "passes over the data", 100, 500, "points", dict(type=number(int, 1, 10**6)),
            "the learning rate decays to 0 over all epochs, so that of a longer run is another from its first step on"),
    Setting("batch_size", "of all processes together", 512, 128, argument=dict(type=number(int, 1, 10**6))),
    Setting("lr", "points: Adam's, decays to 0 as a cosine; images: AdamW's, constant after the warm-up", 1e-3, 2e-4,
            argument=dict(type=number(float, 1e-12, 10**6))),
    Setting("optimizer", "adam, or muon, which makes the momentum of the inner weights orthogonal, see muon.py", "adam",
            argument=dict(choices=("adam", "muon"))),
    Setting("stable_targets", "x and eps are replaced by their means given z and the points of the batch: the same "
            "optimum, targets of less variance, see stable_targets.py", False,
            argument=dict(action=argparse.BooleanOptionalAction)),
    Setting("ema", "decay of the averaged weights, which are tested and sampled; 0, on points: none", 0.0, 0.9999,
            argument=dict(type=number(float, 0, 0.999999))),
    Setting("width", "of the hidden layers", 128, argument=dict(type=number(int, 1, 10_000))),
    Setting("precision", "of matrix products and convolutions in training and sampling; auto: bf16 of images on CUDA, "
            "else fp32; bf16 is good on CPUs that have it", "fp32", "auto", "points",
            dict(choices=["auto", "bf16", "fp32"])),
    Setting("data_dir", "where the named datasets are, or are downloaded to", images="data", identity="",
            argument=dict(type=folder)),
    Setting("image_size", "crop and scale to a square of so many pixels", images=None,
            argument=dict(type=number(int, 4, 4096))),
    Setting("skip_corrupt", "leave out files of a folder that cannot be read", images=False,
            argument=dict(action="store_true")),
    # The network of images: `configs` puts the preset, changed by the next five, into the config.
    Setting("preset", "UNet, see unet.py; the next five change it", images="ddpm", identity="",
            argument=dict(choices=unet.PRESETS)),
    Setting("channels", "of its first block", images=None, identity="", argument=dict(type=number(int, 4, 4096))),
    Setting("channel_mult", "times these, one number for each block", images=None, identity="",
            argument=dict(type=number(int, 1, 64), nargs="+")),
    Setting("layers", "in a block", images=None, identity="", argument=dict(type=number(int, 1, 64))),
    Setting("mid_blocks", "in the middle", images=None, identity="", argument=dict(type=number(int, 1, 64))),
    Setting("attention", "resolutions that attend, besides the middle", images=None, identity="",
            argument=dict(type=number(int, 0, 4096), nargs="+")),
    Setting("dropout", "in the UNet's resnet blocks; Ho et al. 2020: 0.1 on CIFAR-10", images=0.0,
            argument=dict(type=number(float, 0, 0.99))),
    Setting("flip", "mirror half of the images in training; yes for cifar10, else no", images=None, identity="",
            argument=dict(action=argparse.BooleanOptionalAction)),
    Setting("warmup", "steps until --lr is reached", images=1000, argument=dict(type=number(int, 1, 10**9))),
    Setting("clip_norm", "largest norm of the gradient", images=1.0, argument=dict(type=number(float, 1e-9, 10**9))),
    Setting("minutes", "stop after so long, further runs of this call after as many steps; --resume goes on",
            images=float("inf"), identity="", argument=dict(type=number(float, 1e-9))),
    Setting("train_steps", "stop after so many steps of training", images=float("inf"), identity="",
            argument=dict(type=number(int, 1, 10**9))),
    Setting("test_every", "steps between two tests", images=2000, identity="",
            argument=dict(type=number(int, 1, 10**9))),
    Setting("grid_every", "steps between two grids of samples", images=10_000, identity="",
            argument=dict(type=number(int, 1, 10**9))),
    Setting("compile", "with torch.compile; on CUDA it is the default", images=None, identity="",
            argument=dict(action=argparse.BooleanOptionalAction)),
]


# What is in a config besides the rows: the kinds that have it, whether it must be there, is a value right?
EXTRAS = {
    "data": ("points images", True, lambda value: isinstance(value, str) and value != ""),
    "target": ("points images", True, lambda value: isinstance(value, str) and value in TARGETS),
    "loss": ("points images", True, lambda value: isinstance(value, str) and value in (*losses.LOSSES, *OBJECTIVES)),
    "seed": ("points images", True, lambda value: type(value) is int and 0 <= value <= 2**63),
    "points": ("points", False, are_facts),                # of a file of points
    "shape": ("images", True, lambda value: isinstance(value, list) and len(value) == 3 and value[0] in (1, 3)
              and all(type(n) is int and 1 <= n <= 4096 for n in value)),
    "flip": ("images", True, lambda value: isinstance(value, bool)),
    **dict.fromkeys(("images", "latents"), (                               # of a folder of images, or of an autoencoder
        "images", False, lambda value: isinstance(value, dict) and value.keys() == {"count", "digest"}
        and type(value["count"]) is int and isinstance(value["digest"], str))),
    "classes": ("images", False, lambda value: type(value) is int and 2 <= value <= 10**6),          # with labels
    "precision": ("images", True, lambda value: value in ("bf16", "fp32")),
    "skips": ("images", True, lambda value: value in ("layer", "block")),
    **{key: ("images", True, None) for key in unet.PRESETS["ddpm"] if key != "skips"},    # None: as the row has it
}


def allows(row, value, default):
    """Could the command line have given this value, of a config that was read from a file, to a row?"""
    if value is None or isinstance(value, bool):
        return value is default or isinstance(value, bool) and "action" in row.argument
    if "nargs" in row.argument:
        return isinstance(value, list) and len(value) > 0 and all(
            allows(replace(row, argument={"type": row.argument["type"]}), one, None) for one in value)
    if "choices" in row.argument:
        return isinstance(value, str) and value in row.argument["choices"]
    try:
        return type(value) in (int, float) and row.argument["type"](repr(value)) == value
    except (argparse.ArgumentTypeError, ValueError):       # ValueError: repr of a number of thousands of digits
        return False


def fault(config):
    """What is wrong with a config that was read from a file, and what to do, in words; None if nothing is.

    Settings that are newer than the file may be missing.
    """
    cure = "put its row back, or give another --ckpt"
    if not isinstance(config, dict) or not all(isinstance(key, str) for key in config):
        return "has no settings - give another --ckpt"
    of, rows = kind(config), {row.name: row for row in SETTINGS}
    for key, (kinds, must, _) in EXTRAS.items():
        if must and of in kinds and key not in config:
            return f"has no setting {key} of {of} - give another --ckpt"
    for key, value in config.items():
        kinds, _, right = EXTRAS.get(key, ("", False, None))
        if of not in kinds and rows.get(key) not in identity(of):
            return f"was trained with the setting {key[:40]!r}, which this code does not have for {of} - {cure}"
        default = ABSENT if key in EXTRAS else getattr(rows[key], of)
        if not (right(value) if right else allows(rows[key], value, default)):
            return f"was trained with --{key.replace('_', '-')} {value!s:.40}, which this code does not have - {cure}"
    if of == "points" and config["data"] not in DATASETS and "points" not in config:
        return f"was trained with --data {config['data']:.40}, which this code does not have - {cure}"
    found = conflicts.conflict(completed(config))
    return found and f"was trained with settings that do not go together, {found} - give another --ckpt"


def default_text(row):
    """A row's defaults as its help has them."""
    text = {kind: " ".join(map(str, value)) if isinstance(value, list)
            else f"{value:g}" if isinstance(value, float) else str(value)
            for kind, value in (("points", row.points), ("images", row.images))
            if value is not ABSENT and value is not None}
    values = list(text.values())
    if len(set(values)) > 1:
        return " (" + ", ".join(f"{kind}: {value}" for kind, value in text.items()) + ")"
    return f" ({values[0]})" if values and values[0] not in ("False", "inf") else ""


def add_arguments(parser):
    """Add the rows to an argparse parser, those of images alone in a group; `complete` sets the defaults."""
    groups = {False: parser.add_argument_group("how to train it"), True: parser.add_argument_group("images")}
    for row in SETTINGS:
        help = (row.help + default_text(row)).replace("%", "%%")
        groups[row.points is ABSENT].add_argument(f"--{row.name.replace('_', '-')}", help=help,
                                                  **row.argument | {"default": None})
    groups[False].add_argument("--adaptive", dest="t_density", action="store_const", const="adaptive",
                               help="short for --t-density adaptive")


def complete(args, kind, error):
    """Give what was not set on the command line its default; error(sentence) for a setting that this kind has not."""
    for row in SETTINGS:
        default, given = getattr(row, kind), getattr(args, row.name) is not None
        if default is ABSENT and given:
            error(f"--{row.name.replace('_', '-')} is a setting of "
                  f"{'points' if kind == 'images' else 'images'}, not of {kind} - leave it out")
        if not given:
            setattr(args, row.name, None if default is ABSENT else default)


def kind_of_data(data):
    """points for a 2D dataset or a file of points, else images."""
    return "points" if data in DATASETS or is_file_of_points(data) else "images"


def kind(config):
    """points or images: which kind of data a run's config is of."""
    return "images" if "shape" in config else "points"


def identity(kind):
    """The rows that are part of a config."""
    return [row for row in SETTINGS if kind in row.identity and getattr(row, kind) is not ABSENT]


def completed(config):
    """A config with the default of every setting that is newer than its checkpoint."""
    return {row.name: getattr(row, kind(config)) for row in identity(kind(config))} | config


def alike(config):
    """Of a complete config what the runs of one stack must have in common: all but data, target, loss and seed.

    A loss of `score_matching.py` differentiates the network, and an energy its one target: there they are the same.
    With labels so are the data, whose classes the network counts, and else the dimension of embedded points.
    """
    own = ["loss"] * (config.get("sigma") is not None) + ["target"] * bool(config.get("energy"))
    own += ["data"] * bool(config.get("labels"))
    dim = DATASETS[config["data"]].dim if config["data"] in DATASETS else 2
    return ({key: value for key, value in config.items() if key not in NAMES or key in own}
            | ({"dimension": dim} if dim > 2 else {}))


def autocast(config, device):
    """Where a config asks for it, matrix products and convolutions in bf16."""
    return torch.autocast(device.type, torch.bfloat16, enabled=config.get("precision") == "bf16")


def configs(args, **more):
    """The config of every run that the arguments ask for; those of one dataset and seed, which share draws, together.

    Images need more: their shape and the device's precision.
    """
    kind = kind_of_data(args.data[0])
    more |= {row.name: getattr(args, row.name) for row in identity(kind)}
    if kind == "images":
        more |= {key: getattr(args, key, None) or value for key, value in unet.PRESETS[args.preset].items()}
    return [dict(data=data, target=target, loss=loss, seed=seed, **more)
            for data, seed, loss, target in itertools.product(
                dict.fromkeys(args.data), range(args.seed, args.seed + args.seeds), dict.fromkeys(args.loss),
                dict.fromkeys(args.target))]


def name(config):
    """Of a run's folder; for images from a folder that folder's own name."""
    return "{}-{target}-{loss}-s{seed}".format(Path(config["data"]).resolve().name, **config)


if __name__ == "__main__":
    show = lambda value: "" if value is ABSENT else str(value)
    print(f"{'setting':14s}{'points':>10s}{'images':>10s}   in the config of")
    for row in SETTINGS:
        kinds = ", ".join(kind for kind in ("points", "images") if row in identity(kind))
        print(f"{row.name:14s}{show(row.points):>10s}{show(row.images):>10s}   {kinds}")
