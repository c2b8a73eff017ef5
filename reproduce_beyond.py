"""Results that no document has: every network's likelihood beside the entropy, and the evaluations each sampler needs.

Functions of a `study.Study` return the lines of a table, functions of a Study and a path draw a figure: see RESULTS.

Not here: what they show; that is written in results/beyond/README.md for the committed runs.
"""
import functools
import itertools
import statistics

import numpy as np
import torch

import ddpm
import kind_points
import likelihood
import metrics
import plots
import reproduce_fast
import reproduce_few
import reproduce_few_images
import reproduce_flows
import run
import samplers
import targets
from datasets2d import DATASETS, FOUR
from recipes import FAST_EPOCHS
from study import DRAWS, ODE_STEPS, STEPS, TARGETS, Missing, cell, floor, gaps, rows

FEW = [8, 16, 32]      # of them, where grids are compared
# Every target on every schedule, trained for 20 epochs
COMPARED, SHORT = list(ddpm.SCHEDULES), 20
EVERY = [name for name in targets.TARGETS if name not in targets.OF_A_STEP]
SWEEPS = {"t": STEPS, "logsnr": STEPS[2:6], "karras": STEPS[2:6]}    # evaluations; above 64 grids matter little
SAMPLERS = "ancestral", "ddim", "sde", "euler", "heun", "dpmpp"       # of multistep.py the rest is in reproduce_few.py
TWO = "covariance_distance", "sliced_wasserstein"
# What networks were trained with, as the table calls it: recipe of study.py, loss, title
TRAINED_WITH = [("stabilised", "mse", "`mse`"), ("stabilised", "nelbo_stable", "`nelbo_stable`"),
                ("exact", "nelbo", "`nelbo`"), ("plain", "mse", "`mse`, exact"),
                ("logsnr", "nelbo", "`nelbo`, log-SNR")]


def likelihoods(study):
    """The bound and the exact log-likelihood of every network."""
    args, lines, errors, results = study.args, [], {"bound gap": [], "exact gap": []}, {}
    for recipe in dict.fromkeys(recipe for recipe, _, _ in TRAINED_WITH):
        results |= {(recipe, *key): found for key, found in study.likelihoods(study.trained(recipe)).items()}
    for data, target, (recipe, loss, title) in itertools.product(FOUR, TARGETS, TRAINED_WITH):
        found = [results[recipe, data, target, loss, seed] for seed in range(args.seeds)]
        column = lambda name: cell([result[name][0] for result in found])       # noqa: B023 - called in this turn
        for name, values in errors.items():
            values += [error for gap, error in (result[name] for result in found) if abs(gap) < 1]
        lines.append([data, target, title, column("bound"), column("exact"), f"{found[0]['entropy'][0]:.3f}",
                      column("bound gap"), column("exact gap"), cell([result["exact median"] for result in found])])
    variances, g = {}, run.generator("cpu", "variance")
    for data in FOUR:
        mixture, schedule = DATASETS[data], ddpm.SCHEDULES["cosine"]
        x = mixture.sample(500, g, torch.float64)
        error_sq = [likelihood.bound(mixture.optimal_model("eps", schedule), x, target="eps", schedule=schedule,
                                     uniform=uniform, draws=DRAWS, generator=g, control=False
                                     )["error"].square().mean().item()
                    for uniform in ("t", "logsnr")]
        variances[data] = error_sq[0] / error_sq[1]
    n = min(args.num_samples // 4, kind_points.POINTS)
    text = rows(["data", "target", "trained with", "bound", "exact NLL", "entropy", "bound - entropy",
                 "exact - entropy", "median over points"], lines)
    worst = {name: f"at most {max(values):.3f}" if values else "not small" for name, values in errors.items()}
    lost = [f"{data} {title}: "
            f"{', '.join(str(results[recipe, data, 's', loss, seed].get('lost', '?')) for seed in range(args.seeds))}"
            for data, (recipe, loss, title) in itertools.product(FOUR, TRAINED_WITH)]
    return text + [f"Nats (for two dimensions), the first {n:,} test points and their own entropy; {args.epochs} "
                   f"epochs, {args.seeds} seeds, mean +- standard deviation over them. The Monte Carlo error of a gap "
                   f"below 1 nat is {worst['bound gap']} for the bound ({DRAWS} draws of t and noise a point) and "
                   f"{worst['exact gap']} for the flow ({ODE_STEPS} Runge-Kutta steps equal in log-SNR, float64). The "
                   "bound is that of the ancestral model, the exact NLL that of the probability flow ODE: two models "
                   "with one network, of which either may be the better. With t uniform in place of log-SNR the bound "
                   "of the exact denoiser has "
                   + ", ".join(f"{value:.0f} ({data})" for data, value in variances.items())
                   + " times the variance.", "",
                   "`mse` and `nelbo_stable`: trained with t uniform in [1e-6, 1 - 1e-6] and d = 0.01. `nelbo`: t "
                   "uniform in [0.001, 0.999], d = 0. `mse`, exact: the same range with d = 0. `nelbo`, log-SNR: the "
                   "same range, log-SNR uniform.", "",
                   f"Points of {n:,} that lose more than 100 nats in the flow of s, seed by seed: {'; '.join(lost)}."]


def swept(study):
    """Samples of the runs with the weighted loss -> {(sampler, grid, evaluations): {(data, target): [metrics]}}."""
    runs, results = study.trained("stabilised", ["mse"]), {}
    for (grid, numbers), sampler in itertools.product(SWEEPS.items(), SAMPLERS):
        for n in numbers:
            by_run = study.sampled(runs, n, sampler, grid)
            results[sampler, grid, n] = {
                (data, target): [by_run[data, target, "mse", seed] for seed in range(study.args.seeds)]
                for data, target in itertools.product(FOUR, TARGETS)}
    return results


def at_floor(results, name):
    """Is the mean distance over the seeds at most the floor, plus two standard errors of a mean of so many?"""
    floor = results[0][f"{name}_floor"]
    return statistics.mean(result[name] for result in results) <= floor["mean"] + 2 * floor["std"] / len(results)**0.5


def steps(study):
    """How many evaluations until the floor, and what is drawn with few."""
    args, device, data, schedule = study.args, study.device, DATASETS["rings"], ddpm.SCHEDULES["cosine"]
    results = swept(study)
    real, lines = kind_points.load(dict(data="rings")), []
    for n in STEPS:
        columns = [results["ancestral", "t", n]["rings", target] for target in ("x", "v")]
        exact = [samplers.sample(data.optimal_model("v", schedule), (args.num_samples, 2), n, target="v",
                                 schedule=schedule, generator=run.generator(device, seed, "sample")).cpu()
                 for seed in range(args.seeds)]
        columns.append([{TWO[0]: metrics.covariance_distance(x, real).item(),
                         "log_density": metrics.log_density(data, x).item(),
                         "log_density_data": columns[0][0]["log_density_data"]} for x in exact])
        lines.append([str(n), *(cell([r[TWO[0]] for r in c]) for c in columns), *(cell(gaps(c)) for c in columns)])
    lines.append(["floor"] + 3 * [floor(columns[0][0], TWO[0])] + 3 * ["0"])
    text = ["**More ancestral steps: x and v on the rings**, beside the exact denoiser", ""]
    text += rows(["steps", "covar. dist.: x", "v", "exact denoiser", "log-density gap: x", "v", "exact denoiser"],
                 lines)

    for grid, numbers in SWEEPS.items():
        lines = []
        for key in itertools.product(FOUR, TARGETS):
            line = list(key)
            for sampler in SAMPLERS:
                first = [next((str(n) for n in numbers if at_floor(results[sampler, grid, n][key], name)), "-")
                         for name in TWO]
                line.append(" / ".join(first))
            lines.append(line)
        text += [f"**Evaluations until the floor, grid `{grid}`**, of {', '.join(map(str, numbers))}: covariance "
                 "distance / sliced Wasserstein distance", ""] + rows(["data", "target", *SAMPLERS], lines)

    lines = []
    for name in FOUR:
        for sampler, grid, n in [("ancestral", "t", STEPS[-1]), *itertools.product(["dpmpp"], SWEEPS, FEW)]:
            found = results[sampler, grid, n][name, "v"]
            lines.append([name, f"{sampler}, {grid}", str(n), *(cell([r[d] for r in found]) for d in TWO),
                          cell(gaps(found))])
        lines.append([name, "floor", "", *(floor(found[0], d) for d in TWO), "0"])
    text += ["**v in few evaluations**", ""] + rows(
        ["data", "sampler, grid", "evaluations", "covar. dist.", "sliced Wasserstein", "log-density gap"], lines)

    lines = []
    for key in itertools.product(FOUR, ("eps", "s")):
        lines.append([*key, *(cell([r[TWO[1]] for r in results["dpmpp", grid, n][key]])
                              for grid in SWEEPS for n in FEW), floor(results["dpmpp", "t", FEW[0]][key][0], TWO[1])])
    text += ["**eps and s in few evaluations of `dpmpp`**: sliced Wasserstein distance", ""]
    text += rows(["data", "target", *(f"{grid}, {n}" for grid in SWEEPS for n in FEW), "floor"], lines)

    n, lines = SWEEPS["logsnr"][-1], []
    for key in itertools.product(FOUR, TARGETS):
        lines.append([*key, *(cell([r[TWO[1]] for r in results[sampler, "logsnr", n][key]])
                              for sampler in SAMPLERS),
                      floor(results["ancestral", "logsnr", n][key][0], TWO[1])])
    text += [f"**Every sampler on grid `logsnr`, {n} evaluations**: sliced Wasserstein distance", ""]
    text += rows(["data", "target", *SAMPLERS, "floor"], lines)
    return text + [f"Networks with `mse`, t in [1e-6, 1 - 1e-6], d = 0.01, {args.epochs} epochs, {args.seeds} seeds. "
                   f"{args.num_samples:,} samples against 50,000 points of the data; mean +- standard deviation over "
                   "the seeds. At the floor is a mean over the seeds of at most the floor plus two standard errors of "
                   f"such a mean, the floor's deviation over the root of {args.seeds}; - is nowhere. `heun` takes one "
                   "evaluation less than it says."]


def over_evaluations(name):
    def figure(study, path):
        results, panels = swept(study), {}
        for (sampler, grid, n), by_key in results.items():
            for key, found in by_key.items():
                if grid == "t":
                    panels.setdefault(key, (found[0][f"{name}_floor"], {}))[1].setdefault(sampler, []).append(
                        (samplers.evaluations(sampler, n), [result[name] for result in found]))
        plots.over_evaluations(panels, name.replace("_", " "), path)
    return figure


def excess(study, path):
    """How far the exact NELBO stays above the best possible, over epochs, when log-SNR is uniform in training."""
    runs, panels = study.trained("logsnr"), {}
    for data, target in itertools.product(FOUR, TARGETS):
        keys = [(data, target, "nelbo", seed) for seed in range(study.args.seeds)]
        values = (np.array([study.curve(runs, key, "test_nelbo") for key in keys])
                  - runs[keys[0]].history[-1]["optimum_nelbo"])
        panels.setdefault(data, {})[target] = values, None
    plots.loss_curves({"exact NELBO above the best possible": panels}, path)


def schedules(study):
    """Every target on every schedule, trained briefly: two samplers with 64 evaluations."""
    args, text, epochs = study.args, [], min(study.args.epochs, SHORT)
    runs = {name: study.trained(f"schedule-{name}", data=["rings"], target=EVERY, epochs=epochs) for name in COMPARED}
    for sampler, grid in ("ancestral", "t"), ("dpmpp", "logsnr"):
        lines = []
        for name in COMPARED:
            found = study.sampled(runs[name], 64, sampler, grid)
            by_target = [[found["rings", target, "mse", seed] for seed in range(args.seeds)] for target in EVERY]
            lines.append([name, *(cell([result[TWO[0]] for result in results]) for results in by_target)])
        lines.append(["floor", floor(by_target[0][0], TWO[0]), *[""] * (len(EVERY) - 1)])
        text += [f"**{sampler}, grid `{grid}`**: covariance distance", ""] + rows(["schedule", *EVERY], lines)
    return text + [f"The rings, `mse`, {epochs} epochs, {args.seeds} seeds; {args.num_samples:,} samples in 64 "
                   "evaluations, mean +- standard deviation over the seeds."]


def trajectories(study, path):
    """Paths of the flow of two networks on the rings, which differ in their target."""
    runs = study.trained("plain", data=["rings"])
    if study.args.recorded:
        Missing()()
    plots.trajectories([runs["rings", target, "mse", 0] for target in ("v", "eps")], DATASETS["rings"], path)


RESULTS = {
    "likelihood": (likelihoods, "variational bound and exact log-likelihood of every dataset, target and loss, "
                                "beside the entropy"),
    "schedules":  (schedules, "covariance distance of every target on every schedule, the rings"),
    "nelbo":      (excess, "exact NELBO above the best possible over epochs, trained on it with log-SNR uniform"),
    "trajectories": (trajectories, "paths of the probability flow ODE and score fields, of two networks and of "
                                   "the exact denoiser, the rings"),
    "steps":      (steps, "how many function evaluations each sampler needs"),
    "few":        (reproduce_few.few, "v in 4 to 16 function evaluations, every sampler beside the exact denoiser"),
    "eps-flows":  (reproduce_flows.eps_flows, "why flows of eps and s miss the floor in 32 evaluations, and what mends "
                                              "it"),
    "eps-flows-fast": (functools.partial(reproduce_flows.eps_flows, fast=True, epochs=FAST_EPOCHS),
                       "the same with networks of the fast recipe, which are nearer to the best possible"),
    "steps-covariance": (over_evaluations("covariance_distance"),
                         "covariance distance over function evaluations, every dataset, target and sampler, grid t"),
    "steps-wasserstein": (over_evaluations("sliced_wasserstein"),
                          "sliced Wasserstein distance over function evaluations, every dataset, target and sampler, "
                          "grid t"),
    **reproduce_few_images.RESULTS,
    **reproduce_fast.RESULTS,
}
TABLES = ("likelihood", "schedules", "steps", "few", "eps-flows", "eps-flows-fast", *reproduce_few_images.TABLES,
          *reproduce_fast.TABLES)
