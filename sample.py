"""Draw samples from trained networks and measure them against the data.

    python sample.py                                       # the newest run, 512 steps
    python sample.py --ckpt runs/rings-*-s0 --steps 16     # many at once, as a stack, with the same noise
    python sample.py --sampler dpmpp --steps 16            # nearly as good with few evaluations
    python sample.py --ckpt runs/cifar10-v-mse-s0 --steps 500 --num-samples 50000 --fid

Points: writes samples.npy, samples.png (data and samples side by side) and metrics.json, and prints the mean, covariance and sliced
Wasserstein distance to 50,000 fresh points beside their floor: what two samples of the data itself, of the same sizes, give.
Pictures: writes samples/00000.png ... of the averaged weights (EMA), samples.png (a grid of the first) and metrics.json. A
call that was killed goes on with the first picture that is missing; a larger --num-samples adds to those that are there.
"""
import argparse
import functools
import hashlib
import io
import json
import time
from pathlib import Path

import numpy as np
import torch

import ddpm
import images
import metrics
import plots
import run
import samplers
import stack
import train
import train_images
import train_points
from datasets2d import DATASETS
from targets import TARGETS


def parse(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     usage="python sample.py [options], see --help")
    parser.add_argument("--ckpt", nargs="+", help="folders of runs, or their ckpt.pt (the newest run in runs/)")
    parser.add_argument("--steps", type=run.number(int, 1, 10**6), default=512, help="network evaluations (512)")
    parser.add_argument("--sampler", choices=samplers.SAMPLERS, default="ancestral", help="(ancestral)")
    parser.add_argument("--grid", choices=samplers.GRIDS, default="t", help="what the steps are equal in: t, log-SNR, or Karras's (t)")
    parser.add_argument("--eta", type=run.number(float, 0, 1), help="noise of --sampler ddim, 1 is that of ancestral (0)")
    parser.add_argument("--t-min", type=run.number(float, 1e-6, 0.49),
                        help="the steps divide [t_min, 1 - t_min] (that of training, at least 0.001)")
    parser.add_argument("--num-samples", type=run.number(int, 2, 10**9), help="(points: 10000, pictures: 64)")
    parser.add_argument("--seed", type=run.number(int, 0, 2**62), default=0, help="of the sampling noise (0)")
    parser.add_argument("--out", help="folder for the results (the run's folder), with one in it for each of several runs")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda", "mps"], default="auto", help="(auto: cuda or cpu)")
    group = parser.add_argument_group("pictures")
    group.add_argument("--batch-size", type=run.number(int, 1), help="drawn at once (64 on a CPU, else 250)")
    group.add_argument("--clip", action=argparse.BooleanOptionalAction, default=True,
                       help="keep x_hat in [-1, 1] at every step (yes)")
    group.add_argument("--overwrite", action=argparse.BooleanOptionalAction, default=False,
                       help="delete pictures drawn with other settings")
    group.add_argument("--fid", action=argparse.BooleanOptionalAction, default=False, help="FID to the data, Eq. (4.6)")
    group.add_argument("--fid-split", choices=["train", "test"], default="train", help="of the data, for FID (train)")
    group.add_argument("--inception-weights", metavar="PATH", help="local file of pytorch-fid's weights (downloaded once)")
    group.add_argument("--data-dir", default="data", help="where the data of FID are, and its statistics go (data)")
    args = parser.parse_args(argv)
    if args.eta is not None and args.sampler != "ddim":
        parser.error(f"--eta is for --sampler ddim, {args.sampler} has none")
    args.how = dict(sampler=args.sampler, grid=args.grid, **({"eta": args.eta} if args.eta is not None else {}))
    return args


def is_pictures(state):
    """Is this the checkpoint of a run on pictures?"""
    return "ema" in state


def load(ckpt):
    """A run's folder and checkpoint; SystemExit if this code lacks a row that it was trained with."""
    state = run.load(ckpt)
    for key, table in ("data", DATASETS), ("target", TARGETS), ("schedule", ddpm.SCHEDULES):
        if state["config"][key] not in table and not (key == "data" and is_pictures(state)):
            raise SystemExit(f"{ckpt} was trained with --{key} {state['config'][key]}, which this code does not have - put "
                             "its row back, or give another --ckpt")
    return (ckpt if ckpt.is_dir() else ckpt.parent), state


def build_model(states, device="cpu"):
    """The trained network of checkpoints that differ in data, target, loss and seed only, one or a stack."""
    model = train_points.build_model(states[0]["config"], len(states)).to(device)
    model.load_state_dict(stack.join([state["model"] for state in states]))
    return model


def smallest_t(config, t_min):
    """The end of sampling: what was asked for, else that of training, but at least 0.001."""
    return t_min or max(config["t_min"], 1e-3)


def draw(states, steps, num_samples=10_000, seed=0, device="cpu", t_min=None, **how):
    """Samples of runs that differ in data, target, loss and seed only, as one stack -> (M, num_samples, 2), on the CPU.

    how: the sampler, grid and eta of `samplers.sample`, where they are not the default.
    """
    config = states[0]["config"]
    model = stack.in_chunks(build_model(states, device), len(states), 5000 if torch.device(device).type == "cpu" else 2**20)
    names = [state["config"]["target"] for state in states]
    samples = samplers.sample(model, (num_samples, 2), steps, target=names, schedule=ddpm.SCHEDULES[config["schedule"]],
                              t_min=smallest_t(config, t_min), generator=run.generator(device, seed, "sample"),
                              stabiliser=config["stabiliser"], **how)
    return samples.unflatten(0, (len(states), -1)).cpu()


def in_stacks(runs, device):
    """Divide runs, (folder, checkpoint), into lists that `draw` can take: 8 on a CPU, else 96."""
    groups, size = {}, stack.size(device)
    for ckpt, state in runs:
        alike = tuple(state["config"][key] for key in ("schedule", "t_min", "stabiliser", "width"))
        groups.setdefault(alike, []).append((ckpt, state))
    return [group[i:i + size] for group in groups.values() for i in range(0, len(group), size)]


@functools.cache
def floor(data, n):
    """What the distances and the mean log-density of n perfect samples are: metrics.floor's dict, and nats."""
    real = train_points.test_set(data)
    return (metrics.floor(DATASETS[data], n, len(real), generator=run.generator("cpu", "floor")),
            metrics.log_density(DATASETS[data], real).item())


def measure(config, samples):
    """Distances of samples (n, 2) to 50,000 points of the data and their mean log-density, each beside that of the data."""
    result, real = {}, train_points.test_set(config["data"])
    distances, log_density = floor(config["data"], len(samples))
    for distance in metrics.DISTANCES:
        name, (mean, std) = distance.__name__, distances[distance.__name__]
        result[name], result[f"{name}_floor"] = distance(samples, real).item(), {"mean": mean, "std": std}
    return result | {"log_density": metrics.log_density(DATASETS[config["data"]], samples).item(),
                     "log_density_data": log_density}


def describe(state, samples, **facts):
    """Measure samples of a run, and write down what they are: what is in metrics.json. SystemExit if they are not finite."""
    if not samples.isfinite().all():
        raise SystemExit(f"{train.name(state['config'])} gives samples that are not finite - train it longer, or with another "
                         "--loss")
    last = state["history"][-1]
    return {**state["config"], "epochs_trained": len(state["history"]), "test_loss": last["test_loss"],
            "optimum": last["optimum"], "num_samples": len(samples), **facts, **measure(state["config"], samples)}


def save(out, state, samples, **facts):
    """Measure samples of a run, write samples.npy and metrics.json, and return what is in the latter."""
    result = describe(state, samples, **facts)
    buffer = io.BytesIO()
    np.save(buffer, samples.numpy())
    run.write(out / "samples.npy", buffer.getbuffer())
    run.write(out / "metrics.json", json.dumps(result, indent=2).encode())
    return result


def in_words(how):
    return ", ".join(f"{key} {value}" for key, value in how.items())


def place(folder, args, runs):
    """Where the results of a run go."""
    return Path(args.out) / (folder.name if len(runs) > 1 else "") if args.out else folder


def main_points(runs, args, device):
    """Draw points, in stacks, and measure them."""
    n = args.num_samples or 10_000
    stacks, start, done = in_stacks(runs, device), time.perf_counter(), 0
    for group in stacks:
        before = time.perf_counter()
        with run.enough_memory("a smaller --num-samples, or fewer runs at once"):
            samples = draw([state for _, state in group], args.steps, n, args.seed, device, args.t_min, **args.how)
        seconds = (time.perf_counter() - before) / len(group)
        done += len(group)
        for (folder, state), x in zip(group, samples):
            out = place(folder, args, runs)
            result = save(out, state, x, steps=args.steps, **args.how, sampling_seed=args.seed, device=str(device), seconds=seconds)
            print(f"{folder}: {n} samples in {args.steps} steps, {in_words(args.how)}, {seconds:.1f} s on {device}")
            print("                      samples    floor (data against data)")
            for key in "mean_distance", "covariance_distance", "sliced_wasserstein":
                print("{:20s} {:8.4f}    {mean:.4f} +- {std:.4f}".format(key.replace("_", " "), result[key],
                                                                         **result[f"{key}_floor"]))
            print("mean log-density     {log_density:8.4f}   {log_density_data:.4f} nats of the data itself".format(**result))
            title = "{target}, {loss}, {steps} steps".format(**result)
            plots.scatter({f"{result['data']}, data": train_points.test_set(result["data"]), title: x}, out / "samples.png")
            print(f"wrote samples.npy, samples.png and metrics.json to {out}/")
        if done < len(runs):
            left = (time.perf_counter() - start) / done * (len(runs) - done)
            print(f"{done} of {len(runs)} runs, {left:.0f} s left", flush=True)


def draw_pictures(folder, state, n, args, device):
    """Write n pictures as folder/00000.png ... Each batch has its own noise, so that what is there need not be drawn again."""
    config = state["config"]
    settings = dict(run=train.name(config), step=state["step"], test_loss=state["history"][-1]["test_loss"] if state["history"]
                    else None, steps=args.steps, **args.how, t_min=smallest_t(config, args.t_min), clip=args.clip,
                    sampling_seed=args.seed, batch_size=args.batch_size, precision=config["precision"])
    named, present = folder / "settings.json", sorted(folder.glob("*.png"))
    if present and (not named.exists() or json.loads(named.read_text()) != settings):
        if not args.overwrite:
            raise SystemExit(f"{folder} holds {len(present)} pictures of other settings, see settings.json there - keep them by "
                             "giving these another --out, or delete them with --overwrite")
        for path in present:
            path.unlink()
        present = []
    run.write(named, json.dumps(settings, indent=2).encode())

    model = train_images.build_model(config).to(device)
    model.load_state_dict(state["ema"])
    if device.type == "cuda":
        model = model.to(memory_format=torch.channels_last)
        model = torch.compile(model) if n >= 2048 else model          # compiling takes a minute
    have, size = {path.name for path in present}, args.batch_size
    names = [f"{i:05d}.png" for i in range(n)]
    missing = [i for i in range(0, n, size) if not have.issuperset(names[i:i + size])]
    start = time.perf_counter()
    for count, i in enumerate(missing, 1):
        generator = run.generator(device, args.seed, "sample", i)
        x = train_images.draw(model, (size, *config["shape"]), args.steps, config, generator, settings["t_min"], args.clip,
                              **args.how).cpu()
        for name, picture in zip(names[i:i + size], x):               # the last batch is drawn whole, too: one shape for all
            images.save_png(picture, folder / name)
        rate = count * size / (time.perf_counter() - start)
        print(f"{min(i + size, n):,} of {n:,} pictures, {rate:.2f} images/s, {(len(missing) - count) * size / rate:.0f} s left",
              flush=True)
    for name in {path.name for path in present} - set(names):         # of an earlier call that drew more
        (folder / name).unlink()
    return settings, time.perf_counter() - start


def fid_statistics(config, args, device):
    """Inception's statistics of the data that a run was trained on, computed once, and the network."""
    network, data = metrics.inception(args.inception_weights, device), config["data"]
    weights = Path(args.inception_weights).stem if args.inception_weights else "pytorch-fid"
    size = "x".join(map(str, config["shape"]))
    name = data                                                       # two folders may have one name
    if data not in images.IMAGES:
        key = f"{Path(data).resolve()} {config['skip_corrupt']}"
        name = f"{Path(data).resolve().name}-{hashlib.sha256(key.encode()).hexdigest()[:8]}"
    path = Path(args.data_dir) / f"inception-{name}-{args.fid_split}-{size}-{weights}.npz"
    load = lambda: images.load(data, args.fid_split, args.data_dir, config["image_size"], config["skip_corrupt"])
    return network, metrics.reference_statistics(path, load, network)


def main_pictures(runs, args, device):
    """Draw pictures, one run after the other, and measure their FID if asked to."""
    n = args.num_samples or 64
    if args.fid:
        metrics.enough_pictures(n)                                    # before any is drawn
    for folder, state in runs:
        config, out = state["config"], place(folder, args, runs)
        if args.fid:
            network, reference = fid_statistics(config, args, device)
        with run.enough_memory("a smaller --batch-size"):
            settings, seconds = draw_pictures(out / "samples", state, n, args, device)
        paths = sorted((out / "samples").glob("*.png"))[:64]
        images.save_png(images.grid(images.read(paths, paths, None, False), 8), out / "samples.png")
        result = {**config, **settings, "weights": "EMA", "num_samples": n, "device": str(device)}
        print(f"{folder}: {n:,} pictures in {args.steps} steps, {in_words(args.how)}, {seconds:.1f} s on {device}")
        if args.fid:
            fid = metrics.fid(metrics.statistics(images.read_folder(out / "samples"), network), reference)
            result |= dict(fid=fid, fid_split=args.fid_split, fid_reference=reference[2])
            print(f"FID {fid:.3f}: {n:,} samples (EMA, {in_words(args.how)}, {args.steps} steps{', clipped' if args.clip else ''}) "
                  f"against {reference[2]:,} pictures of {config['data']}, {args.fid_split} split")
        run.write(out / "metrics.json", json.dumps(result, indent=2).encode())
        print(f"wrote samples/, samples.png and metrics.json to {out}/")


def main(argv=None):
    args = parse(argv)
    device = run.device(args.device)
    args.batch_size = args.batch_size or (64 if device.type == "cpu" else 250)
    runs = [load(Path(ckpt)) for ckpt in args.ckpt or [run.newest()]]
    if args.out and len({folder.name for folder, _ in runs}) < len(runs):
        raise SystemExit("two of these runs have one name and would share a folder in --out - leave it out, or draw them apart")
    pictures = [is_pictures(state) for _, state in runs]
    if any(pictures) != all(pictures):
        raise SystemExit("points and pictures cannot be drawn in one call - give their runs to one call each")
    if args.fid and not all(pictures):
        raise SystemExit("FID is for pictures, and this run is on 2D points, which are measured without it - leave out --fid")
    (main_pictures if all(pictures) else main_points)(runs, args, device)


if __name__ == "__main__":
    run.script(main, "type the same command to draw again, or, of pictures, to go on")
