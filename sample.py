"""Draw samples from trained networks and measure them against the data.

    python sample.py                                       # the newest run, 512 steps
    python sample.py --ckpt runs/rings-eps-mse-s0 --steps 16
    python sample.py --ckpt runs/rings-*-s0                # many at once, as a stack, with the same noise
    python sample.py --num-samples 50000 --seed 1 --out samples

Writes samples.npy, samples.png (data and samples side by side) and metrics.json, and prints the mean and covariance
distance to 50,000 fresh points beside their floor: what two samples of the data itself, of the same sizes, give.
"""
import argparse
import functools
import io
import json
import time
from pathlib import Path

import numpy as np
import torch

import ddpm
import metrics
import plots
import run
import stack
import train
from datasets2d import DATASETS
from targets import TARGETS


def parse(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     usage="python sample.py [options], see --help")
    parser.add_argument("--ckpt", nargs="+", help="folders of runs, or their ckpt.pt (the newest run in runs/)")
    parser.add_argument("--steps", type=run.number(int, 1), default=512, help="network evaluations (512)")
    parser.add_argument("--t-min", type=run.number(float, 1e-6, 0.49),
                        help="the steps divide [t_min, 1 - t_min] (that of training, at least 0.001)")
    parser.add_argument("--num-samples", type=run.number(int, 2), default=10_000, help="(10000)")
    parser.add_argument("--seed", type=run.number(int, 0, 2**62), default=0, help="of the sampling noise (0)")
    parser.add_argument("--out", help="folder for the three files (the run's folder), with one in it for each of several runs")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda", "mps"], default="auto", help="(auto: cuda or cpu)")
    return parser.parse_args(argv)


def load(ckpt):
    """A run's folder and checkpoint; SystemExit if this code lacks a row that it was trained with."""
    state = run.load(ckpt)
    for key, table in ("data", DATASETS), ("target", TARGETS), ("schedule", ddpm.SCHEDULES):
        if state["config"][key] not in table:
            raise SystemExit(f"{ckpt} was trained with --{key} {state['config'][key]}, which this code does not have - put "
                             "its row back, or give another --ckpt")
    return (ckpt if ckpt.is_dir() else ckpt.parent), state


def build_model(states, device="cpu"):
    """The trained network of checkpoints that differ in data, target, loss and seed only, one or a stack."""
    model = train.build_model(states[0]["config"], len(states)).to(device)
    model.load_state_dict(stack.join([state["model"] for state in states]))
    return model


def draw(states, steps, num_samples=10_000, seed=0, device="cpu", t_min=None):
    """Samples of runs that differ in data, target, loss and seed only, as one stack -> (M, num_samples, 2), on the CPU."""
    config = states[0]["config"]
    model = stack.in_chunks(build_model(states, device), len(states), 5000 if torch.device(device).type == "cpu" else 2**20)
    names = [state["config"]["target"] for state in states]
    samples = ddpm.ancestral_sample(model, (num_samples, 2), steps, target=names,
                                    schedule=ddpm.SCHEDULES[config["schedule"]], t_min=t_min or max(config["t_min"], 1e-3),
                                    generator=run.generator(device, seed, "sample"), stabiliser=config["stabiliser"])
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
    real = train.test_set(data)
    return (metrics.floor(DATASETS[data], n, len(real), generator=run.generator("cpu", "floor")),
            metrics.log_density(DATASETS[data], real).item())


def measure(config, samples):
    """Distances of samples (n, 2) to 50,000 points of the data and their mean log-density, each beside that of the data."""
    result, real = {}, train.test_set(config["data"])
    distances, log_density = floor(config["data"], len(samples))
    for distance in metrics.mean_distance, metrics.covariance_distance:
        name, (mean, std) = distance.__name__, distances[distance.__name__]
        result[name], result[f"{name}_floor"] = distance(samples, real).item(), {"mean": mean, "std": std}
    return result | {"log_density": metrics.log_density(DATASETS[config["data"]], samples).item(),
                     "log_density_data": log_density}


def save(out, state, samples, **facts):
    """Measure samples of a run, write samples.npy and metrics.json, and return what is in the latter."""
    if not samples.isfinite().all():
        raise SystemExit(f"{train.name(state['config'])} gives samples that are not finite - train it longer, or with another "
                         "--loss")
    last = state["history"][-1]
    result = {**state["config"], "epochs_trained": len(state["history"]), "test_loss": last["test_loss"],
              "optimum": last["optimum"], "num_samples": len(samples), **facts, **measure(state["config"], samples)}
    buffer = io.BytesIO()
    np.save(buffer, samples.numpy())
    run.write(out / "samples.npy", buffer.getbuffer())
    run.write(out / "metrics.json", json.dumps(result, indent=2).encode())
    return result


def main(argv=None):
    args = parse(argv)
    device = run.device(args.device)
    ckpts = [Path(ckpt) for ckpt in args.ckpt] if args.ckpt else [run.newest()]
    runs = [load(ckpt) for ckpt in ckpts]
    if args.out and len({folder.name for folder, _ in runs}) < len(runs):
        raise SystemExit("two of these runs have one name and would share a folder in --out - leave it out, or draw them apart")
    stacks, start, done = in_stacks(runs, device), time.perf_counter(), 0
    for group in stacks:
        before = time.perf_counter()
        with run.enough_memory("a smaller --num-samples, or fewer runs at once"):
            samples = draw([state for _, state in group], args.steps, args.num_samples, args.seed, device, args.t_min)
        seconds = (time.perf_counter() - before) / len(group)
        done += len(group)
        for (folder, state), x in zip(group, samples):
            out = Path(args.out) / (folder.name if len(ckpts) > 1 else "") if args.out else folder
            result = save(out, state, x, steps=args.steps, sampling_seed=args.seed, device=str(device), seconds=seconds)
            print(f"{folder}: {args.num_samples} samples in {args.steps} steps, {seconds:.1f} s on {device}")
            print("                      samples    floor (data against data)")
            for key in "mean_distance", "covariance_distance":
                print("{:20s} {:8.4f}    {mean:.4f} +- {std:.4f}".format(key.replace("_", " "), result[key],
                                                                         **result[f"{key}_floor"]))
            print("mean log-density     {log_density:8.4f}   {log_density_data:.4f} nats of the data itself".format(**result))
            title = "{target}, {loss}, {steps} steps".format(**result)
            plots.scatter({f"{result['data']}, data": train.test_set(result["data"]), title: x}, out / "samples.png")
            print(f"wrote samples.npy, samples.png and metrics.json to {out}/")
        if done < len(ckpts):
            left = (time.perf_counter() - start) / done * (len(ckpts) - done)
            print(f"{done} of {len(ckpts)} runs, {left:.0f} s left", flush=True)


if __name__ == "__main__":
    run.script(main, "type the same command to draw again")
