"""Draw samples from a trained network and measure them against the data.

    python sample.py                                       # the newest run, 512 steps
    python sample.py --ckpt runs/rings-eps-mse-s0 --steps 16
    python sample.py --num-samples 50000 --seed 1 --out samples

Writes samples.npy, samples.png (data and samples side by side) and metrics.json, and prints the mean and covariance
distance to 50,000 fresh points beside their floor: what two samples of the data itself, of the same sizes, give.
"""
import argparse
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
import train
from datasets2d import DATASETS
from targets import TARGETS


def parse(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     usage="python sample.py [options], see --help")
    parser.add_argument("--ckpt", help="folder of a run, or its ckpt.pt (the newest run in runs/)")
    parser.add_argument("--steps", type=run.number(int, 1), default=512, help="network evaluations (512)")
    parser.add_argument("--num-samples", type=run.number(int, 2), default=10_000, help="(10000)")
    parser.add_argument("--seed", type=run.number(int, 0, 2**62), default=0, help="of the sampling noise (0)")
    parser.add_argument("--out", help="folder for the three files (the run's folder)")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda", "mps"], default="auto", help="(auto: cuda or cpu)")
    return parser.parse_args(argv)


def main(argv=None):
    args = parse(argv)
    device = run.device(args.device)
    ckpt = Path(args.ckpt) if args.ckpt else run.newest()
    state = run.load(ckpt)
    config = state["config"]
    for key, table in ("data", DATASETS), ("target", TARGETS), ("schedule", ddpm.SCHEDULES):
        if config[key] not in table:
            raise SystemExit(f"{ckpt} was trained with --{key} {config[key]}, which this code does not have - put its row "
                             "back, or give another --ckpt")
    model = train.build_model(config).to(device)
    model.load_state_dict(state["model"])

    start = time.perf_counter()
    samples = ddpm.ancestral_sample(model, (args.num_samples, 2), args.steps, target=config["target"],
                                    schedule=ddpm.SCHEDULES[config["schedule"]], t_min=config["t_min"],
                                    generator=run.generator(device, args.seed, "sample"),
                                    stabiliser=config["stabiliser"]).cpu()
    seconds = time.perf_counter() - start
    if not samples.isfinite().all():
        raise SystemExit(f"{ckpt} gives samples that are not finite - train it longer, or with another --loss")

    data, real = DATASETS[config["data"]], train.test_set(config["data"])
    floor = metrics.floor(data, args.num_samples, len(real), generator=run.generator("cpu", "floor"))
    result = {"ckpt": str(ckpt), **config, "epochs_trained": len(state["history"]),
              "test_loss": state["history"][-1]["test_loss"], "optimum": state["history"][-1]["optimum"], "steps": args.steps,
              "num_samples": args.num_samples, "sampling_seed": args.seed, "device": str(device), "seconds": seconds}
    print(f"{ckpt}: {args.num_samples} samples in {args.steps} steps, {seconds:.1f} s on {device}")
    print("                      samples    floor (data against data)")
    for distance in metrics.mean_distance, metrics.covariance_distance:
        name, (mean, std) = distance.__name__, floor[distance.__name__]
        result[name], result[f"{name}_floor"] = distance(samples, real).item(), {"mean": mean, "std": std}
        print(f"{name.replace('_', ' '):20s} {result[name]:8.4f}    {mean:.4f} +- {std:.4f}")
    result["log_density"], result["log_density_data"] = (metrics.log_density(data, x).item() for x in (samples, real))
    print(f"mean log-density     {result['log_density']:8.4f}   {result['log_density_data']:.4f} nats of the data itself")

    out = Path(args.out) if args.out else ckpt if ckpt.is_dir() else ckpt.parent
    buffer = io.BytesIO()
    np.save(buffer, samples.numpy())
    run.write(out / "samples.npy", buffer.getbuffer())
    title = f"{config['target']}, {config['loss']}, {args.steps} steps"
    plots.scatter({f"{config['data']}, data": real, title: samples}, out / "samples.png")
    run.write(out / "metrics.json", json.dumps(result, indent=2).encode())
    print(f"wrote samples.npy, samples.png and metrics.json to {out}/")


if __name__ == "__main__":
    run.script(main, "type the same command to draw again")
