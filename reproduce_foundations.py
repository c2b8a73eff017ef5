"""Foundations of Diffusion Models: its Tables 5.1 and 6.1 and its figures, beside the best possible of each column.

Functions of a `study.Study` return the lines of a table, functions of a Study and a path draw a figure: see RESULTS.
Read `discrete.py` and `variance.py` first.

Not here: the same on images (`reproduce_foundations_images.py`); what the results show, which is written in
results/foundations/README.md for the committed runs.
"""
import statistics

import numpy as np
import torch

import ddpm
import discrete
import plots_chain
import reproduce_foundations_images
import reproduce_variances
from datasets2d import FOUR
from reproduce_variances import DRAWS, EPOCHS, EXACT, SETS, bits, bound_of_run, entropy, exact_bound, trained
from study import rows

# Foundations, Tables 5.1 and 6.1: its mean, variance and loss, our target, recipe and loss, its mean MSE and NLL
# (CIFAR-10, bits/dim, one seed).
RUNS = [
    ("direct", "direct", "VLB", "mu", "chain-direct", "vlb", "0.08", "3425"),
    ("direct", "direct log", "VLB", "mu", "chain-log", "vlb", "2.36e-5", "8.35"),
    ("direct", "fixed", "VLB", "mu", "chain-small", "vlb", "4.54e-5", "10.66"),
    ("direct", "fixed", "MSE", "mu", "chain-small", "mse", "1.92e-5", "8.07"),
    ("x", "fixed", "VLB", "x", "chain-small", "vlb", "2.99e-6", "6.16"),
    ("x", "fixed", "MSE", "x", "chain-small", "mse", "3.66e-6", "20.81"),
    ("eps", "fixed", "VLB", "eps", "chain-small", "vlb", "1.62e-6", "4.06"),
    ("eps", "fixed", "MSE", "eps", "chain-small", "mse", "1.50e-6", "4.07"),
    ("eps", "direct log", "hybrid", "eps", "chain-log", "hybrid", "1.53e-6", "4.71"),
    ("eps", "range", "hybrid", "eps", "chain-range", "hybrid", "-", "-"),
    ("direct + z", "fixed", "VLB", "mu_skip", "chain-small", "vlb", "-", "-"),
    ("direct + z", "fixed", "MSE", "mu_skip", "chain-small", "mse", "-", "-"),
]

def norms(study, runs, key):
    """Of the norm of the gradient in training: median and maximum of every epoch, then of all steps."""
    if study.args.recorded:
        return study.recorded(runs[key].recipe, key, "norms")
    by_epoch = [entry["gradient_norms"] for entry in runs[key].history]
    every = [value for values in by_epoch for value in values]
    found = dict(median=statistics.median(every), maximum=max(every), medians=list(map(statistics.median, by_epoch)),
                 maxima=list(map(max, by_epoch)))
    study.note(runs[key].recipe, key, norms=found)
    return found


def number(values):
    """A cell of numbers that differ by orders of magnitude: mean and deviation with three digits."""
    mean = statistics.mean(values)
    return f"{mean:.3g}" + (f" +- {statistics.stdev(values):.2g}" if len(values) > 1 else "")


def lines_of(study, configurations, data):
    """A line of a table for each configuration on a dataset, and the best possible."""
    lines, seeds = [], range(study.args.seeds)
    for mean, variance, loss, target, recipe, ours, *document in configurations:
        runs = trained(study, recipe, ours, target, [data])
        names = ["small", "large"] if variance == "fixed" else [runs[data, target, ours, 0].config["variance"]]
        found = study.measured(runs, "bound", lambda one: bound_of_run(one, names))          # noqa: B023
        keys = [(data, target, ours, seed) for seed in seeds]
        gradient = [norms(study, runs, key) for key in keys]
        lines.append([mean, variance, loss, *document,
                      number([1e5 * study.curve(runs, key, "test_mean_mse")[-1] for key in keys]),
                      *(number([bits(found[key][names[k]][0]) for key in keys]) if k < len(names) else "-"
                        for k in range(2)),
                      number([g["median"] for g in gradient]), number([g["maximum"] for g in gradient])])
    last, of = runs[keys[0]].history[-1], {
        name: f"{bits(exact_bound(data, 'ddpm', 1000, name)[0]):.3f}" for name in EXACT}
    least = f"{1e5 * last['optimum_mean_mse']:.3f}"
    return lines + [["best possible", "fixed", "", "", "", least, of["small"], of["large"], "", ""],
                    ["best possible", "best", "", "", "", least, of["best"], "-", "", ""]]


HEADER = ["mean", "variance", "loss", "CIFAR-10: mean MSE", "NLL", "mean MSE x 1e5", "NLL, own or small", "NLL, large",
          "gradient norm, median", "maximum"]


def note(study):
    return [f"Schedule ddpm, T = 1000, {min(study.args.epochs, EPOCHS)} epochs, {study.args.seeds} seeds, mean +- "
            "standard deviation over them. Mean MSE per dimension, a mean over i and 50,000 test points; NLL is the "
            f"bound in bits/dim, {DRAWS:,} terms for each network, i drawn in proportion to the root of its mean "
            "square. Gradient norms over all steps of training. Best possible: the exact denoiser with each variance. "
            "CIFAR-10: the document's numbers, one seed."]


def table5_1(study):
    """Foundations, Table 5.1, on the four datasets, with a skip connection as two more rows."""
    text = []
    for data in FOUR:
        text += [f"**{data}**, entropy {bits(entropy(data)):.3f} bits/dim", ""]
        text += rows(HEADER, lines_of(study, [row for row in RUNS if row[5] != "hybrid"], data))
    return text + note(study)


MORE = [  # of Table 6.1: the weight of the bound in the hybrid, and the bound alone
    ("eps", "range, weight 1e-6", "hybrid", "eps", "chain-range-1e-6", "hybrid", "-", "-"),
    ("eps", "range, weight 1", "hybrid", "eps", "chain-range-1", "hybrid", "-", "-"),
    ("eps", "range", "VLB", "eps", "chain-range", "vlb", "-", "-"),
    ("eps", "range, loss-aware i", "VLB", "eps", "chain-range-aware", "vlb", "-", "-"),
]


def table6_1(study):
    """Foundations, Table 6.1 with the row of the range that it has not, on the four datasets."""
    text = []
    for data in FOUR:
        text += [f"**{data}**, entropy {bits(entropy(data)):.3f} bits/dim", ""]
        text += rows(HEADER, lines_of(study, RUNS[6:10] + (MORE if data in SETS else []), data))
    return text + note(study)


def fig1_3(study, path):
    """Foundations, Fig. 1.3: what is left of the data, sqrt(abar), on the chains of both papers."""
    i = torch.arange(0, 1001)
    plots_chain.over_steps({"sqrt(abar)": {name: (i, ddpm.SCHEDULES[name].alpha(i / 1000.0))
                                           for name in ("ddpm", "iddpm")}}, path, log=False)


def fig4_9(study, path):
    """Foundations, Figs 4.9 and 5.5: the weight of the mean, of x and of eps in the bound."""
    i, chains = torch.arange(2, 1001), {name: discrete.chain(ddpm.SCHEDULES[name], 1000, 0.0)
                                        for name in ("ddpm", "iddpm")}
    plots_chain.over_steps({name: {target: (i, discrete.weight(i, chain, target)) for target in ("mu", "x", "eps")}
                            for name, chain in chains.items()}, path)


def fig6_4(study, path):
    """Foundations, Fig. 6.4: beta tilde / beta."""
    i, curves = torch.arange(1, 1001), {}
    for name in "ddpm", "iddpm":
        step = discrete.chain(ddpm.SCHEDULES[name], 1000, 0.0).step(i, torch.zeros(0).double())
        curves[name] = i, (step.log_q - step.log_large).exp()
    plots_chain.over_steps({"beta tilde / beta": curves}, path, log=False)


def fig4_2(study, path):
    """Foundations, Figs 4.2 - 4.10 and their like: gradient norms, mean MSE and the bound over training."""
    panels = {label: {} for label in ("gradient norm, median", "gradient norm, maximum", "mean MSE",
                                      "bound, nats per dimension")}
    for data in SETS:
        for curves in panels.values():
            curves[data] = {}
        for mean, variance, loss, target, recipe, ours, *_ in RUNS:
            runs, name = trained(study, recipe, ours, target, [data]), f"{mean}, {variance}, {loss}"
            keys = [(data, target, ours, seed) for seed in range(study.args.seeds)]
            last, gradient = runs[keys[0]].history[-1], [norms(study, runs, key) for key in keys]
            of = lambda key: np.array([study.curve(runs, k, key) for k in keys])             # noqa: B023
            for curves, values, best in zip(panels.values(), (
                    np.array([g["medians"] for g in gradient]), np.array([g["maxima"] for g in gradient]),
                    of("test_mean_mse"), of("test_vlb")), (None, None, last["optimum_mean_mse"], last["optimum_vlb"])):
                curves[data][name] = values, best
    plots_chain.training(panels, path)


def images(study):
    """Foundations, Tables 5.1 and 6.1, on images."""
    return reproduce_foundations_images.table(study, RUNS)


RESULTS = {
    "tableF5.1": (table5_1, "Foundations, Table 5.1: mean, variance and loss at T = 1000, beside the best possible"),
    "tableF6.1": (table6_1, "Foundations, Table 6.1 with the row of the range, other weights, loss-aware i"),
    "tableF5.1-images": (images, "Foundations, Tables 5.1 and 6.1, on images: --data, --budget"),
    "variances": (reproduce_variances.learned, "bound of every variance at T = 10, 30, 100, 1000, learned beside best"),
    "own": (reproduce_variances.own, "likelihood of the chain itself by importance sampling, beside bound and flow"),
    "chain-samples": (reproduce_variances.samples, "samples in 10 to 1000 steps with every variance, some skipped"),
    "figF1.3": (fig1_3, "Foundations, Fig. 1.3: sqrt(abar) of both chains"),
    "figF4.2": (fig4_2, "Foundations, Figs 4.2 - 4.10: gradient norms, mean MSE and bound over training"),
    "figF4.9": (fig4_9, "Foundations, Figs 4.9, 5.5: weights of the bound over the steps"),
    "figF6.4": (fig6_4, "Foundations, Fig. 6.4: ratio of the two fixed variances"),
    "variances-over-t": (reproduce_variances.fig_variances, "learned and best variances over t, clusters and rings"),
    "variances-plane": (reproduce_variances.fig_plane, "where the best variance leaves the range, over the plane of z"),
}
TABLES = "tableF5.1", "tableF6.1", "tableF5.1-images", "variances", "own", "chain-samples"
