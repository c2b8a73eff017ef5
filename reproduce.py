"""Make a table of the README from real runs: trains what is missing, samples, prints Markdown.

    python reproduce.py moments   # eps and v with mse on the four sets, 512 steps, beside the thesis's Table 4.1
    python reproduce.py steps     # rings, x and v with mse: what more sampling steps do, Fig. 4.13

Runs and their samples are kept under --runs and never made twice; an interrupted call goes on where it was. The table is
also written to results/. Each cell is the mean +- standard deviation over the seeds.
"""
import argparse
import json
import statistics
from pathlib import Path

import torch

import ddpm
import metrics
import run
import sample
import train
from datasets2d import DATASETS

# Thesis, Table 4.1, weighted loss: mean distance, covariance distance.
THESIS = {("clusters", "eps"): (0.0634, 0.1430),   ("clusters", "v"): (0.0389, 0.0363),
          ("rings", "eps"): (0.0983, 0.0366),      ("rings", "v"): (0.0453, 0.0088),
          ("swiss_roll", "eps"): (0.0857, 0.0824), ("swiss_roll", "v"): (0.0427, 0.0269),
          ("waves", "eps"): (0.0748, 0.0778),      ("waves", "v"): (0.0131, 0.0271)}
DISTANCES = "mean_distance", "covariance_distance"


def result(args, data, target, seed, steps):
    """metrics.json of one run's samples as a dict; trains and samples if that has not been done since."""
    folder = Path(args.runs) / f"{data}-{target}-mse-s{seed}"
    ckpt, out = folder / "ckpt.pt", folder / f"steps-{steps}"
    metrics_json = out / "metrics.json"
    if ckpt.exists() and metrics_json.exists() and metrics_json.stat().st_mtime >= ckpt.stat().st_mtime:
        done = json.loads(metrics_json.read_text())
        if done["epochs_trained"] == args.epochs:
            return done
    train.main(["--data", data, "--target", target, "--loss", "mse", "--seed", str(seed), "--out", args.runs,
                "--epochs", str(args.epochs), "--device", args.device, "--resume"])
    sample.main(["--ckpt", str(folder), "--steps", str(steps), "--seed", str(seed), "--out", str(out),
                 "--device", args.device])
    return json.loads(metrics_json.read_text())


def cell(results, name):
    """Mean and, of more than one seed, standard deviation (n - 1)."""
    values = [r[name] for r in results]
    return f"{statistics.mean(values):.3f}" + (f" +- {statistics.stdev(values):.3f}" if len(values) > 1 else "")


def gap(results):
    """Mean log-density of the samples minus that of the data, in nats: 0 is right, more is too sharp."""
    return cell([{"gap": r["log_density"] - r["log_density_data"]} for r in results], "gap")


def floor(results, name):
    return "{mean:.3f} +- {std:.3f}".format(**results[0][f"{name}_floor"])


def moments(args):
    yield "| data | target | test loss | best possible | mean dist. | floor | thesis | covar. dist. | floor | thesis |"
    yield "|---|---|---|---|---|---|---|---|---|---|"
    for (data, target), thesis in THESIS.items():
        results = [result(args, data, target, seed, 512) for seed in range(args.seeds)]
        row = [data, target, cell(results, "test_loss"), f"{results[0]['optimum']:.3f}"]
        for name, value in zip(DISTANCES, thesis):
            row += [cell(results, name), floor(results, name), f"{value:.3f}"]
        yield "| " + " | ".join(row) + " |"


def steps(args):
    device, data, schedule = run.device(args.device), DATASETS["rings"], ddpm.SCHEDULES["cosine"]
    real = train.test_set("rings")
    yield "| steps | covar. dist.: x | v | exact denoiser | log-density gap: x | v | exact denoiser |"
    yield "|---|---|---|---|---|---|---|"
    for n in 2, 4, 8, 16, 32, 64, 128, 256, 512:
        columns = [[result(args, "rings", target, seed, n) for seed in range(args.seeds)] for target in ("x", "v")]
        exact = [ddpm.ancestral_sample(data.optimal_model("v", schedule), (10_000, 2), n, target="v", schedule=schedule,
                                       generator=run.generator(device, seed, "sample")).cpu()
                 for seed in range(args.seeds)]
        columns.append([{DISTANCES[1]: metrics.covariance_distance(x, real).item(),
                         "log_density": metrics.log_density(data, x).item(),
                         "log_density_data": columns[0][0]["log_density_data"]} for x in exact])
        yield f"| {n} | " + " | ".join([cell(c, DISTANCES[1]) for c in columns] + [gap(c) for c in columns]) + " |"
    yield "| floor |" + f" {floor(columns[0], DISTANCES[1])} |" * 3 + " 0 |" * 3


TABLES = {"moments": moments, "steps": steps}


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     usage="python reproduce.py {moments,steps} [options], see --help")
    parser.add_argument("table", choices=TABLES, help="which table")
    parser.add_argument("--seeds", type=run.number(int, 1), default=3, help="runs with seeds 0, 1, ... (3)")
    parser.add_argument("--epochs", type=run.number(int, 1), default=100, help="of each run (100)")
    parser.add_argument("--runs", default="runs", help="folder of the runs (runs)")
    parser.add_argument("--out", default="results", help="folder of the tables (results)")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda", "mps"], default="auto", help="(auto: cuda or cpu)")
    args = parser.parse_args(argv)
    lines = list(TABLES[args.table](args))
    device = run.device(args.device)
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"a CPU, {torch.get_num_threads()} threads"
    lines += ["", f"`python reproduce.py {args.table} --seeds {args.seeds} --epochs {args.epochs}`, "
              f"torch {torch.__version__} on {name}. 10,000 samples against 50,000 points of the data; "
              "mean +- standard deviation over the seeds."]
    text = "\n".join(lines) + "\n"
    print("\n" + text)
    run.write(Path(args.out) / f"{args.table}.md", text.encode())


if __name__ == "__main__":
    run.script(main, "type the same command to go on")
