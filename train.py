"""Train networks on a target with a loss: one, or many at once.

    python train.py --target eps --loss mse                # the rings, 100 epochs, about a minute on a laptop
    python train.py --target x eps v s --loss mse nelbo --seeds 3     # all 24 combinations, as stacks
    python train.py --data cifar10 --target v --loss mse   # pictures; also the path of a folder of them
    python train.py --target eps --loss mse --resume       # goes on after a kill, ends in the same weights

Writes runs/<data>-<target>-<loss>-s<seed>/ with ckpt.pt, config.json, metrics.jsonl and a picture. Noise, times and
batches are functions of (seed, step): runs of one seed differ in their target and loss, not in their draws. The loops are
in `train_points.py` (as stacks, see `stack.py`) and in `train_images.py` (one after the other; torchrun for several GPUs).
"""
import argparse
import functools
import itertools
import json
import os
import sys
import time
from pathlib import Path

import torch
from torch import distributed
from tqdm import tqdm

import images
import losses
import plots
import run
import stack
import train_images
import train_points
import unet
from datasets2d import DATASETS
from ddpm import SCHEDULES
from targets import TARGETS

DEFAULTS = {"points": dict(epochs=100, batch_size=512, lr=1e-3), "pictures": dict(epochs=500, batch_size=128, lr=2e-4)}


def data_name(text):
    """An argparse type: a 2D set, a set of pictures or a folder of pictures."""
    if text in DATASETS or text in images.IMAGES or Path(text).is_dir():
        return text
    raise argparse.ArgumentTypeError(f"unknown data {text!r}: choose from {', '.join([*DATASETS, *images.IMAGES])}, or give "
                                     "the path of a folder of pictures")


def parse(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     usage="python train.py [options], see --help")
    group = parser.add_argument_group("what to train (several values: all combinations)")
    group.add_argument("--data", nargs="+", type=data_name, default=["rings"],
                       help=f"2D set: {', '.join(DATASETS)}; pictures: {', '.join(images.IMAGES)} or a folder of them (rings)")
    group.add_argument("--target", nargs="+", choices=TARGETS, default=["eps"], help="what the network predicts (eps)")
    group.add_argument("--loss", nargs="+", choices=losses.LOSSES, default=["mse"], help="how its errors are weighed (mse)")
    group.add_argument("--seed", type=run.number(int, 0, 2**62), default=0, help="of weights, data, batches and noise (0)")
    group.add_argument("--seeds", type=run.number(int, 1), default=1, help="so many seeds, from --seed on (1)")
    group = parser.add_argument_group("how to train it")
    group.add_argument("--schedule", choices=SCHEDULES, default="cosine", help="noise schedule (cosine)")
    group.add_argument("--t-min", type=run.number(float, 1e-6, 0.49), default=1e-3,
                       help="t is uniform in [t_min, 1 - t_min] (0.001)")
    group.add_argument("--t-density", choices=losses.T_DENSITIES, default="uniform",
                       help="what is uniform in training, t or log-SNR; weights are divided by the density (uniform)")
    group.add_argument("--stabiliser", type=run.number(float, 0), default=0.0,
                       help="d in the score target -sigma eps / (sigma^2 + d) (0; the thesis's numbers: 0.01)")
    group.add_argument("--epochs", type=run.number(int, 1), help="passes over the data (50,000 points: 100, pictures: 500)")
    group.add_argument("--batch-size", type=run.number(int, 1), help="of all processes together (points: 512, pictures: 128)")
    group.add_argument("--lr", type=run.number(float, 0), help="points: Adam's, decays to 0 as a cosine (0.001); pictures: "
                                                               "AdamW's, constant after the warm-up (0.0002)")
    group.add_argument("--width", type=run.number(int, 1), default=128, help="of the hidden layers, points (128)")
    group = parser.add_argument_group("pictures")
    group.add_argument("--data-dir", default="data", help="where the named sets are, or are downloaded to (data)")
    group.add_argument("--image-size", type=run.number(int, 4), help="crop and scale to a square of so many pixels")
    group.add_argument("--skip-corrupt", action="store_true", help="leave out files of a folder that cannot be read")
    group.add_argument("--preset", choices=unet.PRESETS, default="ddpm", help="UNet, see unet.py (ddpm); the next five change it")
    group.add_argument("--channels", type=run.number(int, 4), help="of its first block")
    group.add_argument("--channel-mult", type=run.number(int, 1), nargs="+", help="times these, one number for each block")
    group.add_argument("--layers", type=run.number(int, 1), help="in a block")
    group.add_argument("--mid-blocks", type=run.number(int, 1))
    group.add_argument("--attention", type=run.number(int, 0), nargs="+", help="resolutions that attend, besides the middle")
    group.add_argument("--precision", choices=["auto", "bf16", "fp32"], default="auto",
                       help="of matrix products and convolutions (auto: bf16 on CUDA; bf16 is also good on CPUs that have it)")
    group.add_argument("--ema", type=run.number(float, 0, 1), default=0.9999, help="decay of the averaged weights (0.9999)")
    group.add_argument("--warmup", type=run.number(int, 1), default=1000, help="steps until --lr is reached (1000)")
    group.add_argument("--clip-norm", type=run.number(float, 0), default=1.0, help="largest norm of the gradient (1)")
    group.add_argument("--minutes", type=run.number(float, 0), default=float("inf"), 
                       help="stop after so long, further runs of this call after as many steps; --resume goes on (no limit)")
    group.add_argument("--test-every", type=run.number(int, 1), default=2000, help="steps between two tests (2000)")
    group.add_argument("--grid-every", type=run.number(int, 1), default=10_000, help="steps between two grids of samples (10000)")
    group.add_argument("--compile", action=argparse.BooleanOptionalAction, help="with torch.compile (on CUDA)")
    group = parser.add_argument_group("where it runs and where it goes")
    group.add_argument("--device", choices=["auto", "cpu", "cuda", "mps"], default="auto", help="(auto: cuda or cpu)")
    group.add_argument("--stack", type=run.number(int, 1), help="2D networks trained at once (8 on a CPU, else 96)")
    group.add_argument("--out", default="runs", help="folder of all runs (runs)")
    group.add_argument("--resume", action=argparse.BooleanOptionalAction, default=False, help="go on with these runs")
    group.add_argument("--overwrite", action=argparse.BooleanOptionalAction, default=False, help="start them again")
    args = parser.parse_args(argv)
    if args.resume and args.overwrite:
        parser.error("--resume goes on with a run and --overwrite starts it again: choose one")
    args.kind = "points" if args.data[0] in DATASETS else "pictures"
    if any((data in DATASETS) != (args.kind == "points") for data in args.data):
        parser.error("points and pictures cannot be trained in one call: give them one each")
    for key, value in DEFAULTS[args.kind].items():
        setattr(args, key, value if getattr(args, key) is None else getattr(args, key))
    if args.kind == "points" and args.batch_size > train_points.POINTS:
        parser.error(f"argument --batch-size: must be in [1, {train_points.POINTS}], got {args.batch_size}")
    try:
        for loss, target in itertools.product(args.loss, args.target):
            losses.weight(loss, target, torch.tensor([0.5]), SCHEDULES[args.schedule], args.stabiliser)
    except ValueError as error:            # a loss that has no weight for this target
        parser.error(str(error))
    return args


def configs(args, **more):
    """The config of every run that the arguments ask for; those of one set and seed, which share draws, side by side.

    Pictures need more: their shape and the device's precision.
    """
    shared = {"points": ["schedule", "t_min", "t_density", "stabiliser", "epochs", "batch_size", "lr", "width"],
              "pictures": ["schedule", "t_min", "t_density", "stabiliser", "batch_size", "lr", "image_size", "skip_corrupt", "ema", "warmup", "clip_norm"]}
    more |= {key: getattr(args, key) for key in shared[args.kind]}
    if args.kind == "pictures":
        more |= {key: getattr(args, key, None) or value for key, value in unet.PRESETS[args.preset].items()}
    return [dict(data=data, target=target, loss=loss, seed=seed, **more)
            for data, seed, loss, target in itertools.product(
                dict.fromkeys(args.data), range(args.seed, args.seed + args.seeds), dict.fromkeys(args.loss),
                dict.fromkeys(args.target))]


def name(config):
    """Of a run's folder; for pictures from a folder that folder's own name."""
    return "{}-{target}-{loss}-s{seed}".format(Path(config["data"]).resolve().name, **config)


def existing(folder, config, args):
    """The checkpoint in a run's folder, or None. A run is never silently overwritten, nor resumed with other settings."""
    if not (folder / "ckpt.pt").exists() or args.overwrite:
        return None
    state = run.load(folder)
    if state["config"] != config:
        changed = [f"--{k.replace('_', '-')} {v}" for k, v in state["config"].items() if config.get(k) != v]
        raise SystemExit(f"{folder} holds a run with other settings ({' '.join(changed)}) - keep both by giving this one "
                         "another folder of runs, or start it again with train.py --overwrite")
    if not args.resume:
        raise SystemExit(f"{folder} holds this run already - add --resume to go on with it or --overwrite to start again")
    return state


def open_runs(configs, args):
    """[(folder, config, checkpoint or None)] of the runs to train; writes their config.json and deletes what is overwritten."""
    runs = []
    for config in configs:
        folder = Path(args.out) / name(config)
        runs.append((folder, config, existing(folder, config, args)))
    for folder, config, _ in runs:     # written before anything goes: a full disk stops here
        run.write(folder / "config.json", json.dumps(config, indent=2).encode())
        if args.overwrite:
            for file in ["ckpt.pt", "metrics.jsonl", "loss.png", "samples.npy", "metrics.json", *folder.glob("samples*.png")]:
                (folder / Path(file).name).unlink(missing_ok=True)
    return runs


def main_points(args, device):
    """Train runs on points, as stacks."""
    runs = open_runs(configs(args), args)
    finished = lambda run: len(run[2]["history"]) if run[2] else 0
    unfinished = sorted((run for run in runs if finished(run) < args.epochs), key=finished)
    size = args.stack or stack.size(device)
    stacks = [group[i:i + size] for group in (list(group) for _, group in itertools.groupby(unfinished, key=finished))
              for i in range(0, len(group), size)]
    if len(unfinished) < len(runs):
        print(f"{len(runs) - len(unfinished)} of {len(runs)} runs are finished already")

    steps, terminal, start = train_points.POINTS // args.batch_size, sys.stderr.isatty(), time.perf_counter()
    before = sum(finished(run) for run in runs) * steps
    bar = tqdm(total=len(runs) * args.epochs * steps, initial=before, unit="step", disable=not terminal, smoothing=0)
    say = bar.write if terminal else functools.partial(print, flush=True)
    done, failures = before, []
    for number, group in enumerate(stacks, 1):
        header = f"{group[0][0]}" + (f" and {len(group) - 1} more" if len(group) > 1 else "")
        say(f"{header}: {args.schedule} schedule, {args.epochs} epochs of {steps} steps on {device}"
            + (f", after epoch {finished(group[0])}" if finished(group[0]) else "")
            + (f"; stack {number} of {len(stacks)}" if len(stacks) > 1 else ""))

        def on_epoch(epoch, train_loss, test_loss):
            nonlocal done
            done += steps * len(group)
            line = f"epoch {epoch:3d}" + (f"  train {train_loss:.4f}  test {test_loss:.4f}" if len(group) == 1 else "")
            spent = time.perf_counter() - start
            left = spent / (done - before) * (bar.total - done)
            if terminal:
                bar.set_description(line)
            elif len(group) == 1 or epoch % 10 == 0 or epoch == args.epochs:
                say(f"{line}  {spent:.0f} s, {left:.0f} s left")
        try:
            with run.enough_memory("a smaller --stack, --width or --batch-size"):
                failures += train_points.train_stack(group, device, lambda: bar.update(len(group)), on_epoch)
        except BaseException:
            bar.close()
            raise
    bar.close()
    if failures:                           # the others are done
        raise SystemExit("\n".join(failures))

    for folder, config, _ in runs:
        last = (history := run.load(folder)["history"])[-1]
        if not (folder / "loss.png").exists():
            plots.loss_curve(history, config, folder / "loss.png")
        print(f"{folder}: test loss {last['test_loss']:.4f}, best possible {last['optimum']:.4f}; "
              f"NELBO {last['test_nelbo']:.3f}, best possible {last['optimum_nelbo']:.3f} nats per dimension; "
              f"{last['seconds']:.0f} s")
    print(f"next: python sample.py --ckpt {' '.join(str(folder) for folder, _, _ in runs[:3])}"
          f"{' ...' if len(runs) > 3 else ''} --steps 512")


def main_pictures(args, device):
    """Train runs on pictures, one after the other; in every process that torchrun started."""
    rank, world = train_images.processes(device)
    if world > 1 and device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    if args.batch_size % world:
        raise SystemExit(f"--batch-size {args.batch_size} cannot be divided among {world} processes - make it a multiple")
    limit = dict(minutes=args.minutes)                     # of the first run, then its number of steps
    precision = args.precision if args.precision != "auto" else "bf16" if device.type == "cuda" else "fp32"
    for data in dict.fromkeys(args.data):
        for turn in range(2):                              # the first process downloads and decodes before the others
            if turn == min(rank, 1):
                sets = [images.load(data, split, args.data_dir, args.image_size, args.skip_corrupt) for split in ("train", "test")]
            if world > 1:
                distributed.barrier()
        if len(sets[0]) < args.batch_size:
            raise SystemExit(f"{data} has {len(sets[0])} pictures to train on, less than a batch - lower --batch-size")
        args.data, shape = [data], list(sets[0].shape[1:])
        for config in configs(args, shape=shape, flip=shape[0] == 3, precision=precision):
            if rank == 0:
                (folder, _, state), = open_runs([config], args)
            if world > 1:
                distributed.barrier()
            if rank > 0:
                folder = Path(args.out) / name(config)
                state = run.load(folder) if args.resume and (folder / "ckpt.pt").exists() else None
            steps = limit.get("steps", args.epochs * (len(sets[0]) // args.batch_size))
            with run.enough_memory("a smaller --batch-size, --channels or --image-size"):
                torch.manual_seed(config["seed"])
                model = train_images.build_model(config).to(device)
                if rank == 0:
                    print(f"{folder}: {sum(p.numel() for p in model.parameters()):,} parameters, {len(sets[0]):,} pictures of "
                          f"{'x'.join(map(str, shape))}, {steps:,} steps in {precision} on {run.device_name(device)}"
                          + (f", after step {state['step']:,}" if state else ""), flush=True)
                last = train_images.train_run(
                    folder, config, state, device, model, sets, steps, limit["minutes"], args.test_every, args.grid_every,
                    args.compile if args.compile is not None else device.type == "cuda",
                    progress(config, steps, limit["minutes"]))
            if args.minutes < float("inf"):                # so that runs of one call are trained equally long
                limit = dict(minutes=float("inf"), steps=last["step"])
            if rank == 0:
                tests = ", ".join(f"{key.removeprefix('test_')} {value:.4g}" for key, value in last.items() if key.startswith("test_"))
                print(f"{folder}: step {last['step']:,}, test losses of the averaged weights: {tests}; {last['seconds']:.0f} s")
    if rank == 0:
        print(f"next: python sample.py --ckpt {folder} --steps 500")
    if world > 1:                                          # together: one that left earlier would abort at exit
        distributed.barrier()
        distributed.destroy_process_group()


def progress(config, steps, minutes):
    """A function to be called at every step that shows loss, speed and time left now and then."""
    start = shown = time.perf_counter()
    first, terminal = None, sys.stderr.isatty()

    def on_step(step, loss, seconds):
        nonlocal first, start, shown
        now = time.perf_counter()
        if first is None:                                  # of the first step, which warms up, the clock does not run
            first, start = step, now
        elif now - shown > (1 if terminal else 30) or step == steps:
            rate, shown = (step - first) / (now - start), now
            left = min((steps - step) / rate, 60 * minutes - seconds)
            print(f"step {step:,} of {steps:,}  loss {loss.item():.4f}  {rate:.2f} steps/s  "
                  f"{rate * config['batch_size']:.0f} images/s  {max(left, 0):.0f} s left  ",
                  end="\r" if terminal else "\n", file=sys.stderr, flush=True)
    return on_step


def main(argv=None):
    args = parse(argv)
    device = run.device(args.device)
    (main_points if args.kind == "points" else main_pictures)(args, device)


if __name__ == "__main__":
    run.script(main, "what was saved so far is kept; go on with --resume, and without --overwrite")
