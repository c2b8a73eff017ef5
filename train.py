"""Train networks on a target with a loss: one, or many at once.

    python train.py --target eps --loss mse                # the rings, 100 epochs, about a minute on a laptop
    python train.py --target x eps v s --loss mse nelbo --seeds 3     # all 24 combinations, as stacks
    python train.py --data points.npy                      # your own points, (N, D); also a .csv
    python train.py --data cifar10 --target v --loss mse   # images; also the path of a folder of them
    python train.py --target eps --loss mse --resume       # goes on after a kill, ends in the same weights

Writes runs/<data>-<target>-<loss>-s<seed>/ with ckpt.pt, config.json, metrics.jsonl and a figure. Noise, times and
batches are functions of (seed, step): runs of one seed differ in their target and loss, not in their draws. The loops
are in `train_points.py` (as stacks, see `stack.py`) and in `train_images.py` (one after the other; torchrun for several
GPUs), the settings in `settings.py`.
"""
import argparse
import itertools
import os

import checkpoints
import conflicts
import images
import kind_points
import latent_data
import losses
import own_points
import run
import settings
import train_images
import train_points
from datasets2d import DATASETS
from score_matching import OBJECTIVES
from targets import TARGETS

LOOPS = {"points": train_points.train, "images": train_images.train}


def data_name(text):
    """An argparse type: a 2D dataset, a file of points, a dataset of images or a folder of images."""
    if (text in DATASETS or text in images.IMAGES or text and os.path.isdir(text)
            or own_points.is_file_of_points(text) and os.path.isfile(text)):
        return text
    names = ", ".join([*DATASETS, *images.IMAGES])
    raise argparse.ArgumentTypeError(f"unknown data {text[:80]!r}: choose from {names}, "
                                     "or give the path of a file of points (.npy, .csv) or of a folder of images")


def parse(argv):
    """The arguments, complete and checked; exit code 2 if they are wrong. args.kind is points or images."""
    parser = settings.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                             usage="python train.py [options], see --help")
    group = parser.add_argument_group("what to train (several values: all combinations)")
    group.add_argument("--data", nargs="+", type=data_name, default=["rings"],
                       help=f"2D: {', '.join(DATASETS)}; rings-512: embedded in so many dimensions; "
                            "a .npy or .csv of points, one a row; "
                            f"images: {', '.join(images.IMAGES)}, a folder of them or of latents (rings)")
    group.add_argument("--target", nargs="+", choices=TARGETS, default=["eps"], help="what the network predicts (eps)")
    group.add_argument("--loss", nargs="+", choices=[*losses.LOSSES, *OBJECTIVES], default=["mse"],
                       help="how its errors are weighed (mse)")
    group.add_argument("--seed", type=settings.number(int, 0, 2**62), default=0,
                       help="of weights, data, batches and noise (0)")
    group.add_argument("--seeds", type=settings.number(int, 1, 1000), default=1,
                       help="so many seeds, from --seed on (1)")
    settings.add_arguments(parser)
    group = parser.add_argument_group("where it runs and where it goes")
    group.add_argument("--device", choices=["auto", "cpu", "cuda", "mps"], default="auto", help="(auto: cuda or cpu)")
    group.add_argument("--stack", type=settings.number(int, 1, 10_000),
                       help="networks for points trained at once (8 on a CPU, else 96)")
    group.add_argument("--out", type=settings.folder, default="runs", help="folder of all runs (runs)")
    group.add_argument("--resume", action=argparse.BooleanOptionalAction, default=False, help="go on with these runs")
    group.add_argument("--overwrite", action=argparse.BooleanOptionalAction, default=False, help="start them again")
    args = parser.parse_args(argv)
    if args.resume and args.overwrite:
        parser.error("--resume goes on with a run and --overwrite starts it again: choose one")
    kinds = {settings.kind_of_data(data) for data in args.data}
    if len(kinds) > 1:
        parser.error("points and images cannot be trained in one call: give them one each")
    args.kind, = kinds
    if found := conflicts.mixed(args):
        parser.error(found)
    conflicts.completed(args)
    settings.complete(args, args.kind, parser.error)
    for data in filter(latent_data.is_folder, args.data):
        for name in "flip", "labels", "image_size", "skip_corrupt":
            if getattr(args, name):
                parser.error(f"--{name.replace('_', '-')} is of images, and {data} has latents - leave it out")
    if args.kind == "images" and args.stack:
        parser.error("--stack is for points, images are trained one after the other")
    if args.kind == "points" and args.batch_size > kind_points.POINTS:
        parser.error(f"argument --batch-size: must be in [1, {kind_points.POINTS}], got {args.batch_size}")
    for loss, target in itertools.product(args.loss, args.target):
        found = conflicts.conflict(vars(args) | dict(loss=loss, target=target))
        if found:
            parser.error(found)
    if args.variance == "best" and not all(data in [*DATASETS] for data in args.data):
        parser.error(f"--variance best is known for {', '.join(DATASETS)} alone - take small, large or a learned one")
    return args


def main(argv=None):
    args = parse(argv)
    try:
        LOOPS[args.kind](args, run.device(args.device))
    finally:
        checkpoints.unlock()


if __name__ == "__main__":
    run.script(main, "what was saved so far is kept; go on with --resume, and without --overwrite")
