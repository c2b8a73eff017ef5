"""Make the tables and figures of the thesis, those of points beside their optimum, from real runs: trains what is missing.

    python reproduce.py table4.1                  # 144 networks: about an hour on 2 CPU cores
    python reproduce.py table4.1 --quick          # 20 epochs, 1 seed, 2,500 samples: a preview in minutes
    python reproduce.py all                       # but table4.2
    python reproduce.py table4.2 --budget 60      # pictures, CIFAR-10: so many minutes of training on a GPU, then sampling

Runs and their samples are kept under --runs and never made twice; an interrupted call goes on where it was. Results are
written to --out, with their index, README.md.
"""
import argparse
import functools
import itertools
import json
import statistics
import time
from pathlib import Path

import numpy as np
import torch

import ddpm
import likelihood
import losses
import metrics
import plots
import run
import sample
import samplers
import stack
import targets
import train
import train_points
from datasets2d import DATASETS

TARGETS = ["x", "eps", "v", "s"]
STEPS = [2, 4, 8, 16, 32, 64, 128, 256, 512]
FEW = [8, 16, 32]      # of them, where grids are compared
DRAWS, ODE_STEPS = 100, 64     # of the bound and of the flow, in `likelihood`
PICTURE_STEPS = 500    # thesis 4.4.4
SWEEPS = {"t": STEPS, "logsnr": STEPS[2:6], "karras": STEPS[2:6]}    # network evaluations; above 64 grids matter little
DISTANCES = "mean_distance", "covariance_distance"
# As the thesis computes them (ERRATA.md entry 8): t in all of [0, 1], the stabiliser in the score and in the weights.
STABILISED = ["--loss", "mse", "nelbo_stable", "--t-min", "1e-6", "--stabiliser", "0.01"]
EXACT = ["--loss", "nelbo"]

# Thesis, Table 4.1: loss, mean distance, covariance distance with the NELBO, then with the weighted loss.
THESIS = {(row.split()[0], row.split()[1]): [float(number) for number in row.split()[2:]] for row in """\
    clusters   x    0.6777 0.1754 0.5746   0.4754 0.4300 0.2715
    clusters   eps  2.3636 0.0364 0.0706   0.3522 0.0634 0.1430
    clusters   v    2.5396 0.0307 0.0409   0.8264 0.0389 0.0363
    clusters   s    0.7657 0.2279 0.1498   2.6934 0.2688 0.1633
    rings      x    0.8785 0.2744 0.3807   0.4932 0.2807 0.3974
    rings      eps  2.5700 0.0914 0.1107   0.4266 0.0983 0.0366
    rings      v    2.5452 0.0459 0.0718   0.9227 0.0453 0.0088
    rings      s    0.9577 0.2254 0.1563   3.0981 0.2220 0.1637
    swiss_roll x    0.8640 0.1133 0.2645   0.4934 0.5256 0.6875
    swiss_roll eps  2.5324 0.0689 0.0941   0.4261 0.0857 0.0824
    swiss_roll v    2.4861 0.0418 0.0598   0.9171 0.0427 0.0269
    swiss_roll s    0.9493 0.1266 0.1972   3.0274 0.0893 0.1227
    waves      x    0.9104 0.1593 0.5559   0.4939 0.1869 0.6911
    waves      eps  2.6805 0.0405 0.0757   0.4500 0.0748 0.0778
    waves      v    2.6873 0.0447 0.0738   0.9411 0.0131 0.0271
    waves      s    1.0210 0.0353 0.1369   3.4165 0.0178 0.1676""".splitlines()}


# Thesis, Table 4.2: NELBO and its FID, weighted loss and its FID.
THESIS_PICTURES = {"x": (0.09, 13.54, 0.05, 16.96), "eps": (0.84, 24.26, 0.06, 13.75), "v": (0.86, 18.18, 0.12, 18.24)}


def trained(args, options, data=tuple(DATASETS)):
    """Train what is missing of data x targets x losses x seeds -> {(data, target, loss, seed): (folder, checkpoint)}."""
    root = Path(args.runs) / f"{'stabilised' if options is STABILISED else 'exact'}-{args.epochs}-epochs"
    argv = ["--data", *data, "--target", *TARGETS, *options, "--seeds", str(args.seeds), "--epochs", str(args.epochs),
            "--out", str(root), "--device", args.device, "--resume"]
    configs = train.configs(train.parse(argv))
    folders = [root / train.name(config) for config in configs]
    states = [run.load(folder) if (folder / "ckpt.pt").exists() else None for folder in folders]
    if not all(state and len(state["history"]) == args.epochs for state in states):
        train.main(argv)
        states = [run.load(folder) for folder in folders]
    return {tuple(config[key] for key in ("data", "target", "loss", "seed")): (folder, state)
            for config, folder, state in zip(configs, folders, states)}


def sampled(args, runs, steps, sampler="ancestral", grid="t"):
    """Draw what is missing of the samples of runs -> {key: metrics.json}, in <run>/steps-<steps>/.

    The points are kept there too for the thesis's sampler. Other samplers and grids are in the folder's name.
    """
    thesis = (sampler, grid) == ("ancestral", "t")
    folder = lambda key: runs[key][0] / "-".join([f"steps-{steps}"] + [str(args.num_samples)] * (args.num_samples != 10_000)
                                                 + [sampler, grid] * (not thesis))

    def current(key):
        made = folder(key) / "metrics.json"
        return (made.exists() and made.stat().st_mtime >= (runs[key][0] / "ckpt.pt").stat().st_mtime
                and metrics.DISTANCES[-1].__name__ in made.read_text())      # else of a version that measured less
    device, start, done = run.device(args.device), time.perf_counter(), 0
    missing = [key for key in runs if not current(key)]
    for seed in sorted({key[3] for key in missing}):     # the sampling noise differs between seeds too
        keys = [key for key in missing if key[3] == seed]
        for group in sample.in_stacks([(key, runs[key][1]) for key in keys], device):
            before = time.perf_counter()
            points = sample.draw([state for _, state in group], steps, args.num_samples, seed, device, sampler=sampler, grid=grid)
            facts = dict(steps=steps, sampler=sampler, grid=grid, sampling_seed=seed, device=str(device),
                         seconds=(time.perf_counter() - before) / len(group))
            for (key, state), x in zip(group, points):
                if thesis:
                    sample.save(folder(key), state, x, **facts)
                else:
                    run.write(folder(key) / "metrics.json", json.dumps(sample.describe(state, x, **facts), indent=2).encode())
            done += len(group)
            left = (time.perf_counter() - start) / done * (len(missing) - done)
            print(f"sampling in {steps} steps, {sampler}, grid {grid}: {done} of {len(missing)} networks, {left:.0f} s left", flush=True)
    return {key: {**json.loads((folder(key) / "metrics.json").read_text()), "folder": folder(key)} for key in runs}


@functools.cache
def judging_points(data, t_min=1e-3):
    """The points on which every model of a set is judged: z, eps (200,000, 2), t (200,000,) uniform in log-SNR, a factor.

    The exact NELBO, the mean of -1/2 dlogsnr/dt (eps_hat - eps)^2 over t ~ U(t_min, 1 - t_min), is the factor times the mean
    of the squared error alone when log-SNR is uniform: the weight is gone, and most of the variance (VDM 4.6).
    """
    schedule, g = ddpm.SCHEDULES["cosine"], run.generator("cpu", "judge", data)
    x = DATASETS[data].sample(4 * train_points.POINTS, g)
    t = losses.draw_t((len(x),), schedule, t_min, "logsnr", g, torch.float64)[0].float()
    eps, (low, high) = torch.randn(x.shape, generator=g), schedule.ends(t_min)
    return ddpm.q_sample(x, t, eps, schedule), t, eps, 0.5 * (high - low) / (1 - 2 * t_min)


@torch.no_grad()
def exact_nelbo(model, target, data, stabiliser=0.0):
    """Terms whose mean is the exact NELBO of any model in nats per dimension -> (200,000,)."""
    (z, t, eps, factor), schedule = judging_points(data), ddpm.SCHEDULES["cosine"]
    alpha, sigma = ddpm.expand(schedule.alpha(t), z), ddpm.expand(schedule.sigma(t), z)
    eps_hat = targets.to_eps(target, model(z, t), z, alpha, sigma, stabiliser)
    return factor * (eps_hat - eps).square().mean(1)


def cell(values):
    """Mean and, of more than one seed, standard deviation (n - 1)."""
    mean = statistics.mean(values)
    form = ".3f" if abs(mean) < 100 else ".0f" if abs(mean) < 1e6 else ".0e"
    return f"{mean:{form}}" + (f" +- {statistics.stdev(values):{form}}" if len(values) > 1 else "")


def gaps(results):
    """Mean log-density of samples under the data's density minus that of the data, in nats: more than 0 is too sharp."""
    return [result["log_density"] - result["log_density_data"] for result in results]


def floor(result, name):
    return "{mean:.3f} +- {std:.3f}".format(**result[f"{name}_floor"])


def rows(header, lines):
    """Markdown."""
    return ["| " + " | ".join(row) + " |" for row in [header, ["---"] * len(header), *lines]] + [""]


def agreement(deviations):
    """How many test losses are the thesis's, and which are not. deviations: {(data, target, loss): ours / thesis - 1}."""
    far = [f"{' '.join(key)} {100 * value:+.1f} %" for key, value in deviations.items() if abs(value) > 0.05]
    return [f"{len(deviations) - len(far)} of {len(deviations)} test losses lie within 5 % of the thesis's"
            + (f"; the others: {', '.join(far)}" if 0 < len(far) < 5 else "") + ".", ""]


def table4_1(args):
    stabilised, exact = trained(args, STABILISED), trained(args, EXACT)
    results = sampled(args, stabilised, STEPS[-1])
    seeds, text = range(args.seeds), []
    for title, loss, column in (("NELBO, stabilised as in the thesis (`nelbo_stable`)", "nelbo_stable", 0),
                                ("Weighted loss (`mse`)", "mse", 3)):
        lines = []
        for (data, target), thesis in THESIS.items():
            runs = [results[data, target, loss, seed] for seed in seeds]
            line = [data, target, f"{thesis[column]:.3f}", cell([r["test_loss"] for r in runs]), f"{runs[0]['optimum']:.3f}"]
            for name, value in zip(DISTANCES, thesis[column + 1:]):
                line += [f"{value:.3f}", cell([r[name] for r in runs]), floor(runs[0], name)]
            lines.append([*line, cell(gaps(runs))])
        text += [f"**{title}**", ""] + rows(["data", "target", "test loss: thesis", "ours", "best possible", "mean dist.: thesis",
                                             "ours", "floor", "covar. dist.: thesis", "ours", "floor", "log-density gap"], lines)
    text += agreement({(data, target, loss): statistics.mean(results[data, target, loss, seed]["test_loss"] for seed in seeds)
                       / THESIS[data, target][column] - 1
                       for data, target in THESIS for loss, column in (("nelbo_stable", 0), ("mse", 3))})
    lines, errors, standard_error = [], [], lambda terms: terms.std().item() / len(terms)**0.5
    for data, target in THESIS:
        if target == TARGETS[0]:
            best = exact_nelbo(DATASETS[data].optimal_model("eps", ddpm.SCHEDULES["cosine"]), "eps", data)
        line = [data, target]
        for source, loss in (stabilised, "mse"), (stabilised, "nelbo_stable"), (exact, "nelbo"):
            values = []
            for _, state in (source[data, target, loss, seed] for seed in seeds):
                model = stack.in_chunks(sample.build_model([state]), 1, 5000)
                terms = exact_nelbo(model, target, data, state["config"]["stabiliser"])
                values.append(terms.mean().item())
                errors.append((values[-1] - best.mean().item(), standard_error(terms - best)))
            line.append(cell(values))
        lines.append([*line, f"{best.mean():.3f} +- {standard_error(best):.3f}"])
    text += ["**Exact NELBO of every model, whatever it was trained on**, nats per dimension, t in [0.001, 0.999]", ""]
    text += rows(["data", "target", "trained with `mse`", "with `nelbo_stable`", "with `nelbo`", "best possible"], lines)
    near, far = [e for gap, e in errors if gap < 1], [e / gap for gap, e in errors if gap >= 1]
    text += ["All models of a set are judged on the same 200,000 points, t uniform in log-SNR; the last column has the Monte Carlo error "
             "of the level, which they share. That of a model's distance from the best possible is "
             + " and ".join([f"at most {max(near):.4f} where this is below 1 nat"] * bool(near)
                            + [f"at most {100 * max(far):.0f} % of it elsewhere"] * bool(far)) + ".", ""]
    training = sum(state["history"][-1]["seconds"] for runs in (stabilised, exact) for _, state in runs.values())
    sampling = sum(result["seconds"] for result in results.values())
    text += [f"{len(stabilised) + len(exact)} networks, {args.epochs} epochs, {args.seeds} seeds; training {training / 60:.1f} "
             f"min, sampling {sampling / 60:.1f} min. {args.num_samples:,} samples in {STEPS[-1]} steps against 50,000 points of the "
             "data; mean +- standard deviation over the seeds. The log-density gap, of samples to data, in nats: below 0 off the "
             "data, above 0 too sharp."]
    return text


def table4_2(args):
    """Pictures. The budget is shared by six runs of equally many steps; what is not an option here goes to train.py."""
    root = Path(args.runs) / f"table4.2-{Path(args.data).resolve().name}-{args.budget:g}-minutes"
    argv = ["--data", args.data, "--target", *THESIS_PICTURES, "--loss", "mse", "nelbo", "--minutes", str(args.budget / 6),
            "--out", str(root), "--device", args.device, "--data-dir", args.data_dir, "--resume", *args.more]
    train.main(argv)
    at_hand = args.inception_weights or metrics.downloaded_weights().exists()
    n = args.num_samples if at_hand else 64
    fid = ["--fid", *(["--inception-weights", args.inception_weights] if args.inception_weights else [])] if at_hand else []
    folder = lambda target, loss: root / f"{Path(args.data).resolve().name}-{target}-{loss}-s0"
    folders = [str(folder(target, loss)) for target in THESIS_PICTURES for loss in ("mse", "nelbo")]
    sample.main(["--ckpt", *folders, "--steps", str(PICTURE_STEPS), "--num-samples", str(n), "--data-dir", args.data_dir,
                 "--device", args.device, *fid])
    lines = []
    for target, thesis in THESIS_PICTURES.items():
        last = {loss: run.load(folder(target, loss))["history"][-1] for loss in ("mse", "nelbo")}
        drawn = {loss: json.loads((folder(target, loss) / "metrics.json").read_text()) for loss in last}
        fids = [f"{drawn[loss]['fid']:.2f}" if "fid" in drawn[loss] else "-" for loss in last]
        lines.append([target, f"{thesis[2]:.2f}", f"{last['mse']['test_mse']:.4f}", f"{thesis[0]:.2f}",
                      f"{last['nelbo']['test_nelbo_stable']:.4f}", *(f"{last[loss]['test_nelbo']:.4f}" for loss in last),
                      f"{thesis[3]:.2f}", fids[0], f"{thesis[1]:.2f}", fids[1]])
    state = run.load(folders[0])
    config, parameters = state["config"], sum(value.numel() for value in state["ema"].values())
    header = ["target", "weighted loss: thesis", "ours", "NELBO, thesis's units: thesis", "ours",
              "exact NELBO, trained with `mse`", "with `nelbo`", "FID, weighted: thesis", "ours", "FID, NELBO: thesis", "ours"]
    note = (f"{args.data}, {'x'.join(map(str, config['shape']))}, test split, averaged weights, one seed. {parameters:,} "
            f"parameters, {state['step']:,} steps of {config['batch_size']} pictures in {config['precision']} for each of six runs, "
            f"{state['seconds'] / 60:.1f} minutes for the first. Exact NELBO in nats per dimension, t in [0.001, 0.999]; in the "
            "thesis's units it is `nelbo_stable` (ERRATA.md, entry 8), of networks trained on the exact one. ")
    note += (f"FID of {n:,} pictures, {PICTURE_STEPS} ancestral steps, clipped, against the train split." if at_hand else
             "No FID: Inception's weights are not at hand, see python sample.py --help.")
    return rows(header, lines) + [note]


def judged(args, runs):
    """Measure what is missing of the likelihoods of runs -> {key: {name: mean}}, in <run>/likelihood-....json."""
    device, n, start, done = run.device(args.device), min(args.num_samples // 4, train_points.POINTS), time.perf_counter(), 0
    path = lambda key: runs[key][0] / f"likelihood-{n}-{DRAWS}-{ODE_STEPS}.json"
    missing = [key for key in runs if not path(key).exists()
               or path(key).stat().st_mtime < (runs[key][0] / "ckpt.pt").stat().st_mtime]
    for key in missing:
        config = runs[key][1]["config"]
        x = train_points.test_set(key[0])[:n].to(device)
        x = x if device.type == "mps" else x.double()
        model = sample.build_model([runs[key][1]], device).to(x.dtype).requires_grad_(False)
        terms, _ = likelihood.evaluate(model, x, config, DRAWS, ode_steps=ODE_STEPS, generator=run.generator(device, "likelihood"))
        terms["entropy"] = -DATASETS[key[0]].log_prob(x.cpu())
        gaps = {f"{name} gap": terms[name] - terms["entropy"] for name in ("bound", "exact")}
        result = {name: likelihood.mean_and_error(values) for name, values in (terms | gaps).items()}
        run.write(path(key), json.dumps(result | {"exact median": gaps["exact gap"].median().item()}).encode())
        done += 1
        left = (time.perf_counter() - start) / done * (len(missing) - done)
        print(f"likelihood: {done} of {len(missing)} networks, {left:.0f} s left", flush=True)
    return {key: json.loads(path(key).read_text()) for key in runs}


def likelihoods(args):
    stabilised, exact = trained(args, STABILISED), trained(args, EXACT)
    results, lines, errors = judged(args, stabilised) | judged(args, exact), [], {"bound gap": [], "exact gap": []}
    for (data, target), loss in itertools.product(THESIS, ("mse", "nelbo_stable", "nelbo")):
        found = [results[data, target, loss, seed] for seed in range(args.seeds)]
        column = lambda name: cell([result[name][0] for result in found])
        for name, values in errors.items():
            values += [error for gap, error in (result[name] for result in found) if abs(gap) < 1]
        lines.append([data, target, f"`{loss}`", column("bound"), column("exact"), f"{found[0]['entropy'][0]:.3f}", column("bound gap"),
                      column("exact gap"), cell([result["exact median"] for result in found])])
    variances, g = {}, run.generator("cpu", "variance")
    for data, mixture in DATASETS.items():
        x, schedule = mixture.sample(500, g, torch.float64), ddpm.SCHEDULES["cosine"]
        error_sq = [likelihood.bound(mixture.optimal_model("eps", schedule), x, target="eps", schedule=schedule, uniform=uniform,
                                     draws=DRAWS, generator=g)["error"].square().mean().item() for uniform in ("t", "logsnr")]
        variances[data] = error_sq[0] / error_sq[1]
    n = min(args.num_samples // 4, train_points.POINTS)
    text = rows(["data", "target", "trained with", "bound", "exact NLL", "entropy", "bound - entropy", "exact - entropy",
                 "median over points"], lines)
    worst = {name: f"at most {max(values):.3f}" if values else "not small" for name, values in errors.items()}
    return text + [f"Nats (for two dimensions), the first {n:,} test points and their own entropy; {args.epochs} epochs, {args.seeds} "
                   "seeds, mean +- standard deviation over them. The Monte Carlo error of a gap below 1 nat is "
                   f"{worst['bound gap']} for the bound ({DRAWS} draws of t and noise a point) and {worst['exact gap']} for the flow "
                   f"({ODE_STEPS} Runge-Kutta steps equal in log-SNR, float64). The bound is that of the ancestral model, the exact "
                   "NLL that of the probability flow ODE: two models with one network, of which either may be the better. With t "
                   "uniform in place of log-SNR the bound of the exact denoiser has "
                   + ", ".join(f"{value:.0f} ({data})" for data, value in variances.items()) + " times the variance."]


def weighted_runs(args):
    return {key: value for key, value in trained(args, STABILISED).items() if key[2] == "mse"}


def swept(args):
    """Samples of the runs with the weighted loss: {(sampler, grid, evaluations): {(data, target): metrics of the seeds}}."""
    runs, results = weighted_runs(args), {}
    for (grid, numbers), sampler in itertools.product(SWEEPS.items(), samplers.SAMPLERS):
        for n in numbers:
            by_run = sampled(args, runs, n, sampler, grid)
            results[sampler, grid, n] = {(data, target): [by_run[data, target, "mse", seed] for seed in range(args.seeds)]
                                         for data, target in THESIS}
    return results


def average(results, name):
    return statistics.mean(result[name] for result in results)


def at_floor(results, name):
    """Is the mean distance over the seeds at most that of data to data, plus two of its standard deviations?"""
    floor = results[0][f"{name}_floor"]
    return average(results, name) <= floor["mean"] + 2 * floor["std"]


def steps(args):
    device, data, schedule = run.device(args.device), DATASETS["rings"], ddpm.SCHEDULES["cosine"]
    results = swept(args)
    real, lines, two = train_points.test_set("rings"), [], ("covariance_distance", "sliced_wasserstein")
    for n in STEPS:
        columns = [results["ancestral", "t", n]["rings", target] for target in ("x", "v")]
        exact = [samplers.sample(data.optimal_model("v", schedule), (args.num_samples, 2), n, target="v", schedule=schedule,
                                 generator=run.generator(device, seed, "sample")).cpu() for seed in range(args.seeds)]
        columns.append([{two[0]: metrics.covariance_distance(x, real).item(),
                         "log_density": metrics.log_density(data, x).item(),
                         "log_density_data": columns[0][0]["log_density_data"]} for x in exact])
        lines.append([str(n), *(cell([r[two[0]] for r in c]) for c in columns),
                      *(cell(gaps(c)) for c in columns)])
    lines.append(["floor"] + 3 * [floor(columns[0][0], two[0])] + 3 * ["0"])
    text = ["**More ancestral steps: x and v on the rings**, beside the exact denoiser", ""]
    text += rows(["steps", "covar. dist.: x", "v", "exact denoiser", "log-density gap: x", "v", "exact denoiser"], lines)

    for grid, numbers in SWEEPS.items():
        lines = []
        for key in THESIS:
            line = list(key)
            for sampler in samplers.SAMPLERS:
                first = [next((str(n) for n in numbers if at_floor(results[sampler, grid, n][key], name)), "-") for name in two]
                line.append(" / ".join(first))
            lines.append(line)
        text += [f"**Evaluations until the floor, grid `{grid}`**, of {', '.join(map(str, numbers))}: covariance distance / sliced "
                 "Wasserstein distance", ""] + rows(["data", "target", *samplers.SAMPLERS], lines)

    lines = []
    for name in DATASETS:
        for sampler, grid, n in [("ancestral", "t", STEPS[-1]), *itertools.product(["dpmpp"], SWEEPS, FEW)]:
            found = results[sampler, grid, n][name, "v"]
            lines.append([name, f"{sampler}, {grid}", str(n), *(cell([r[d] for r in found]) for d in two), cell(gaps(found))])
        lines.append([name, "floor", "", *(floor(found[0], d) for d in two), "0"])
    text += ["**v in few evaluations**", ""] + rows(["data", "sampler, grid", "evaluations", "covar. dist.", "sliced Wasserstein",
                                                     "log-density gap"], lines)

    lines = []
    for key in [(name, target) for name in DATASETS for target in ("eps", "s")]:
        lines.append([*key, *(cell([r[two[1]] for r in results["dpmpp", grid, n][key]])
                              for grid in SWEEPS for n in FEW), floor(results["dpmpp", "t", FEW[0]][key][0], two[1])])
    text += ["**eps and s in few evaluations of `dpmpp`**: sliced Wasserstein distance", ""]
    text += rows(["data", "target", *(f"{grid}, {n}" for grid in SWEEPS for n in FEW), "floor"], lines)
    return text + [f"Networks with `mse`, {args.epochs} epochs, {args.seeds} seeds. {args.num_samples:,} samples against 50,000 "
                   "points of the data; mean +- standard deviation over the seeds. At the floor is a mean over the seeds of at most "
                   "the floor plus two of its standard deviations; - is nowhere. `heun` takes one evaluation less than it says."]


def over_evaluations(name):
    def figure(args, path):
        results, panels = swept(args), {}
        for (sampler, grid, n), by_key in results.items():
            for key, found in by_key.items():
                if grid == "t":
                    panels.setdefault(key, (found[0][f"{name}_floor"], {}))[1].setdefault(sampler, []).append(
                        (n, [result[name] for result in found]))
        plots.over_evaluations(panels, name.replace("_", " "), path)
    return figure


def fig3_2(args, path):
    t = torch.linspace(0.001, 0.999, 500, dtype=torch.float64)
    plots.over_time({name: schedule.logsnr(t) for name, schedule in ddpm.SCHEDULES.items()}, t, path)


def fig4_1(args, path):
    plots.scatter({name: data.sample(50_000, run.generator("cpu", name)) for name, data in DATASETS.items()}, path, 50_000)


def fig4_2(args, path):
    times, panels = [0.0, 0.1, 0.2, 0.4, 0.6, 0.8, 1.0], {}
    for name, data in DATASETS.items():
        g = run.generator("cpu", name)
        x, eps = data.sample(2000, g), torch.randn(2000, 2, generator=g)
        for t in times:
            z = ddpm.q_sample(x, torch.full((2000,), t), eps, ddpm.SCHEDULES["cosine"])
            panels[name, f"t = {t}"] = z, ""
    plots.point_grid(panels, path)


def over_epochs(runs, loss, key, args):
    """{data: {target: (values (seeds, epochs), optimum)}} of what the history calls `key`."""
    optimum = key.replace("test", "optimum") if key != "test_loss" else "optimum"
    return {data: {target: (np.array([[h[key] for h in runs[data, target, loss, seed][1]["history"]]
                                      for seed in range(args.seeds)]),
                            runs[data, target, loss, 0][1]["history"][-1][optimum]) for target in TARGETS}
            for data in DATASETS}


def fig4_8(args, path):
    runs = trained(args, STABILISED)
    plots.loss_curves({"weighted test loss": over_epochs(runs, "mse", "test_loss", args),
                       "rescaled test loss": over_epochs(runs, "mse", "test_rescaled", args)}, path)


def fig4_9(args, path):
    stabilised, exact = trained(args, STABILISED), trained(args, EXACT)
    plots.loss_curves({"stabilised NELBO": over_epochs(stabilised, "nelbo_stable", "test_loss", args),
                       "exact NELBO": over_epochs(exact, "nelbo", "test_loss", args)}, path)


def fig4_10(args, path):
    t, schedule = torch.linspace(0.001, 0.999, 500, dtype=torch.float64), ddpm.SCHEDULES["cosine"]
    plots.scalings({"exact, Table 3.2": {target: 2 * losses.weight("nelbo", target, t, schedule) for target in TARGETS},
                    "stabilised, d = 0.01": {target: losses.weight("nelbo_stable", target, t, schedule) for target in TARGETS}},
                   t, path)


def fig4_11(args, path):
    """Variance over samples at equal t, in 20 bins of t: E[e^2] - E[e]^2 of the squared error e."""
    variance = lambda e, t: losses.over_t(e**2, t, 1e-6) - losses.over_t(e, t, 1e-6)**2
    runs, panels = trained(args, STABILISED), {}
    for data, target in THESIS:
        curves = []
        for seed in range(args.seeds):
            state = runs[data, target, "mse", seed][1]
            model, (z, t, y, _) = sample.build_model([state]), train_points.test_batch(state["config"])
            with torch.no_grad():
                curves.append(variance(losses.weighted_error(model(z, t), y, torch.ones_like(t)), t))
        best = variance(train_points.optimal_errors(data, target, "cosine", 1e-6, 0.01), t)
        panels.setdefault(data, []).append((target, target, torch.stack(curves), best))
    plots.over_t(panels, "variance of the weighted loss", path)


def fig4_12(args, path):
    results, panels = sampled(args, trained(args, STABILISED), STEPS[-1]), {}
    for data, dataset in DATASETS.items():
        panels[data, "data"] = dataset.sample(2000, run.generator("cpu", data)), ""
    for (data, target), loss in itertools.product(THESIS, ("mse", "nelbo_stable")):
        points = np.load(results[data, target, loss, 0]["folder"] / "samples.npy")[:2000]
        panels[data, f"{target}, {'weighted' if loss == 'mse' else 'NELBO'}"] = points, ""
    columns = ["data", *(f"{target}, {loss}" for loss in ("weighted", "NELBO") for target in TARGETS)]
    plots.point_grid({(data, column): panels[data, column] for data in DATASETS for column in columns}, path)


def over_steps(data):
    def figure(args, path):
        runs, panels = {k: v for k, v in trained(args, STABILISED, [data]).items() if k[3] == 0}, {}
        for n in STEPS:
            for (_, target, loss, _), result in sampled(args, runs, n).items():
                row = f"{target}, {'weighted' if loss == 'mse' else 'NELBO'}"
                panels[row, f"{n} steps"] = (np.load(result["folder"] / "samples.npy")[:2000],
                                             "{mean_distance:.2f}, {covariance_distance:.2f}".format(**result))
        rows = [f"{target}, {loss}" for loss in ("weighted", "NELBO") for target in TARGETS]
        plots.point_grid({(row, f"{n} steps"): panels[row, f"{n} steps"] for row in rows for n in STEPS}, path)
    return figure


def loss_over_t(data):
    def figure(args, path):
        runs, panels = trained(args, STABILISED, [data]), {}
        t = train_points.test_batch(runs[data, "x", "mse", 0][1]["config"])[1]
        for target in TARGETS:
            best = losses.over_t(train_points.optimal_errors(data, target, "cosine", 1e-6, 0.01), t, 1e-6)
            histories = [runs[data, target, "mse", seed][1]["history"] for seed in range(args.seeds)]
            panels[target] = [(f"epoch {epoch}", target, torch.tensor([h[epoch - 1]["train_loss_over_t"] for h in histories]),
                               best) for epoch in sorted({1, max(1, args.epochs // 10), args.epochs})]
        plots.over_t(panels, f"weighted train loss, {data}", path)
    return figure


# name: (function, what it is, what to see in it). A function of (args) returns the lines of a table, of (args, path) draws.
RESULTS = {
    "table4.1":  (table4_1, "loss and sample quality of every set, target and loss",
                  "trained models lie at the best possible of each loss, as the thesis's do; judged by one exact NELBO, "
                  "x and s with the thesis's losses are the worst and not the best"),
    "table4.2":  (table4_2, "losses and FID of pictures for x, eps and v", "what so many minutes of training give"),
    "likelihood": (likelihoods, "variational bound and exact log-likelihood of every set, target and loss, beside the entropy",
                   "by the exact log-likelihood v with the weighted loss is the best on all four sets, by the bound v or s with a "
                   "NELBO; the flow of s loses a few points altogether, which is what its means show"),
    "steps":     (steps, "how many network evaluations each sampler needs",
                  "beyond 64 ancestral steps x draws the rings thinner and thinner, v does not; v comes to the floor with 8 to 64 "
                  "evaluations of dpmpp on the grid t; eps and s need noise to get there, but for the clusters, and with few "
                  "evaluations the grid logsnr to come near"),
    "steps-covariance": (over_evaluations("covariance_distance"), "covariance distance over network evaluations, every set, target "
                         "and sampler, grid t",
                         "v comes to the floor (data against data; grey: two of its standard deviations) with all samplers, first with "
                         "dpmpp (on the rings and the Swiss roll as soon with euler); eps and s do only with ancestral and sde, which "
                         "add noise, but for eps on the clusters; x gets worse with more than 64 evaluations"),
    "steps-wasserstein": (over_evaluations("sliced_wasserstein"), "sliced Wasserstein distance over network evaluations, every set, "
                          "target and sampler, grid t",
                          "as by the covariance distance, but euler is the first or among the first for v, x never comes to the floor on "
                          "the rings and the waves, and v on the rings with 64 evaluations at the earliest"),
    "fig3.2":    (fig3_2, "log-SNR of the three schedules", "the cosine changes slowest in the middle and is infinite at both ends; t from 0.001 to 0.999"),
    "fig4.1":    (fig4_1, "the four sets, 50,000 points each", "mean 0 and variance 1 per axis, for all four"),
    "fig4.2":    (fig4_2, "their diffusion with the cosine schedule", "at t = 0.4 the shape is nearly gone, at t = 1 all are one Gaussian"),
    "fig4.8":    (fig4_8, "weighted and rescaled test losses over epochs",
                  "x and v come together when rescaled, eps and s stay above: the weight divides by alpha^2, and what they get "
                  "wrong near t = 1 counts 400,000 times"),
    "fig4.9":    (fig4_9, "NELBO over epochs, stabilised as in the thesis and exact",
                  "above, each target tends to a minimum of its own, x and s low, eps and v high; below all have one minimum, and x "
                  "alone stays away from it"),
    "fig4.10":   (fig4_10, "SNR scalings 1/w(t), exact and stabilised",
                  "exact, x rises to 10^9 at t = 0.001 and eps and v to 10^3; the stabiliser cuts all four at 100"),
    "fig4.11":   (fig4_11, "variance of the weighted loss over t",
                  "near t = 0 that of x vanishes and that of s is the largest, near t = 1 that of eps and s vanishes; the trained "
                  "networks are at the best possible, but for x near t = 0 and s near t = 1"),
    "fig4.12":   (fig4_12, "2,000 samples at 512 steps, every set, target and loss",
                  "eps, v and s with the weighted loss look like the data, x is too thin; with the NELBO s is too thin on all but the "
                  "waves, x on all but the clusters, and v fills the inside of the rings (seed 0)"),
    "fig4.13":   (over_steps("rings"), "samples of the rings at 2 to 512 steps, mean and covariance distance below each panel",
                  "at 2 steps x and v are blurred and eps and s explode, as the first x_hat divides by alpha = 0.0016, s with the "
                  "weighted loss up to 8 steps (points outside the frame are not shown); beyond 64 steps x gets thinner and thinner"),
    "fig4.14":   (loss_over_t("rings"), "weighted train loss over t at three epochs, rings",
                  "x is hard near t = 1 and eps near t = 0, v nearly as hard everywhere, s above 10 near t = 0; what is learned last "
                  "is the easy end"),
    "appendix1": (loss_over_t("clusters"), "weighted train loss over t at three epochs, clusters",
                  "as for the rings; eps and v have a dip where the clusters are apart and z still tells the noise"),
    "appendix2": (loss_over_t("swiss_roll"), "weighted train loss over t at three epochs, Swiss roll", "as for the rings"),
    "appendix3": (loss_over_t("waves"), "weighted train loss over t at three epochs, waves", "as for the rings"),
    "appendix4": (over_steps("clusters"), "samples of the clusters at 2 to 512 steps, mean and covariance distance below each panel",
                  "x with the weighted loss loses the shape of the clusters, s with the NELBO their size"),
    "appendix5": (over_steps("swiss_roll"), "samples of the Swiss roll at 2 to 512 steps, mean and covariance distance below each panel",
                  "x with both losses and s with the NELBO end as a line; with the NELBO the two distances hardly see it"),
    "appendix6": (over_steps("waves"), "samples of the waves at 2 to 512 steps, mean and covariance distance below each panel",
                  "eps with the NELBO leaves points between the waves; beyond 64 steps x thins them to lines"),
}


TABLES = table4_1, table4_2, likelihoods, steps


def write_index(out):
    """README.md of the results folder from index.json: the pictures that are there, what to see, command, time, machine."""
    index = json.loads((out / "index.json").read_text())
    text = ["# Results", "", "Times are those of the call that made the file, when the trained networks and most of what it "
            "measures of them were there already; ../README.md has the others. A dashed line is the best possible, computed with the exact "
            "denoiser; a band goes from the least to the largest seed.", ""]
    for name, (_, title, see) in RESULTS.items():
        if name in index:
            made = f"`{index[name]['command']}`, {index[name]['seconds']:.0f} s on {index[name]['where']}."
            text += [f"## {name}: {title}", "", f"{see[:1].upper()}{see[1:]}. {made}", "",
                     f"![{name}]({name}.png)" if (out / f"{name}.png").exists() else f"[{name}.md]({name}.md)", ""]
    run.write(out / "README.md", "\n".join(text).encode())


def make(name, args):
    """One table or figure, and its line in the index."""
    function, start, out = RESULTS[name][0], time.perf_counter(), Path(args.out)
    where = run.device_name(run.device(args.device))
    defaults = {"seeds": 3, "epochs": 100, "num_samples": 10_000}
    if function is table4_2:
        defaults = {"data": "cifar10", "budget": None, "num_samples": 10_000}
    command = f"python reproduce.py {name}" + "".join(f" --{key.replace('_', '-')} {getattr(args, key)}"
                                                      for key, value in defaults.items() if getattr(args, key) != value)
    command = " ".join([command, *args.more])
    if function in TABLES:
        lines = function(args) + ["", f"`{command}`, torch {torch.__version__}, {where}."]
        print("\n" + "\n".join(lines) + "\n")
        run.write(out / f"{name}.md", ("\n".join(lines) + "\n").encode())
    else:
        function(args, out / f"{name}.png")
    index = json.loads((out / "index.json").read_text()) if (out / "index.json").exists() else {}
    index[name] = dict(command=command, seconds=time.perf_counter() - start, where=where)
    run.write(out / "index.json", json.dumps(index, indent=1).encode())
    write_index(out)
    print(f"wrote {out / name}.{'md' if function in TABLES else 'png'}")


def main(argv=None):
    names = "\n".join(f"  {name:10s} {title}" for name, (_, title, _) in RESULTS.items())
    parser = argparse.ArgumentParser(description=f"{__doc__}\n{names}\n  all        all of these but table4.2",
                                     formatter_class=argparse.RawDescriptionHelpFormatter,
                                     usage="python reproduce.py NAME [options], see --help", allow_abbrev=False)
    parser.add_argument("name", choices=[*RESULTS, "all"], metavar="NAME", help="one of the above")
    parser.add_argument("--seeds", type=run.number(int, 1), default=3, help="runs with seeds 0, 1, ... (3)")
    parser.add_argument("--epochs", type=run.number(int, 1), default=100, help="of each run (100)")
    parser.add_argument("--num-samples", type=run.number(int, 2000), default=10_000, help="of each run (10000)")
    parser.add_argument("--quick", action="store_true", help="--seeds 1 --epochs 20 --num-samples 2500")
    parser.add_argument("--runs", default="runs", help="folder of the runs (runs)")
    parser.add_argument("--out", help="folder of the results (results; with other seeds, epochs or samples <runs>/results)")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda", "mps"], default="auto", help="(auto: cuda or cpu)")
    group = parser.add_argument_group("table4.2 (further options are handed to train.py, say --channels 32)")
    group.add_argument("--data", default="cifar10", type=train.data_name, help="pictures (cifar10)")
    group.add_argument("--budget", type=run.number(float, 0.01), default=60, help="minutes of training, all runs together (60)")
    group.add_argument("--data-dir", default="data", help="where the named sets are, or are downloaded to (data)")
    group.add_argument("--inception-weights", metavar="PATH", help="local file of pytorch-fid's weights")
    args, args.more = parser.parse_known_args(argv)
    if args.more and args.name != "table4.2":
        parser.error(f"unrecognized arguments: {' '.join(args.more)}")
    if args.quick:
        args.seeds, args.epochs, args.num_samples = 1, 20, 2500
    full = (args.seeds, args.epochs, args.num_samples, args.data, args.more) == (3, 100, 10_000, "cifar10", [])
    args.out = args.out or ("results" if full else f"{args.runs}/results")
    for name in [name for name in RESULTS if name != "table4.2"] if args.name == "all" else [args.name]:
        make(name, args)


if __name__ == "__main__":
    run.script(main, "type the same command to go on")
