"""Target times loss space, beside the optimum: which of the two decides how good a network is?

Part of `reproduce_vdm.py`, which says what the functions are. A loss space is a target whose squared error is the loss,
whatever the network predicts (`losses.translate`). Read `losses.py` and `weightings.py` first.

Not here: more dimensions (`reproduce_embedded.py`), other weights (`reproduce_weightings.py`), images
(`reproduce_spaces_images.py`).
"""
import functools
import statistics

import torch

import ddpm
import kind_points
import plots_spaces
import targets
from datasets2d import DATASETS, FOUR
from study import cell, floor, nelbo_points, rows

SPACES = {"x": "rescaled", "eps": "simple", "v": "v_space", "u": "u_space", "s": "s_space"}     # each a row of LOSSES
TARGETS = [*SPACES]
BINS, THIRDS = 10, {"noise": range(3), "middle": range(3, 7), "data": range(7, 10)}             # of log-SNR
SAMPLER = 64, "dpmpp", "logsnr"        # evaluations, sampler, grid


# What is measured of a network

@functools.cache
def best_eps(data):
    """E[eps | z] at `study.nelbo_points` -> (200,000, 2)."""
    z, t, *_ = nelbo_points(data)
    return DATASETS[data].optimal_model("eps", ddpm.SCHEDULES["cosine"])(z, t)


@torch.no_grad()
def nelbo_gap(one):
    """Exact NELBO of a Run minus the optimum's, nats per dimension: in all, and what each bin of log-SNR adds to it.

    As E|eps_hat - eps|^2 = E|eps_hat - E[eps | z]|^2 + E|E[eps | z] - eps|^2, whose last term is the optimum's, the
    first is all there is to measure, and it has no noise of eps. Bins are equally wide, the noisiest first.
    """
    (z, t, _, factor), schedule = nelbo_points(one.config["data"]), ddpm.SCHEDULES["cosine"]
    alpha, sigma = (ddpm.expand(c, z) for c in (schedule.alpha(t), schedule.sigma(t)))
    prediction = kind_points.in_chunks(one.model())(z, t)
    eps_hat = targets.to_eps(one.target, prediction, z, alpha, sigma, one.config["stabiliser"])
    terms = factor * (eps_hat - best_eps(one.config["data"])).double().square().mean(1)
    low, high = schedule.ends(1e-3)
    k = ((schedule.logsnr(t) - low) / (high - low) * BINS).long().clamp(0, BINS - 1)
    bins = terms.new_zeros(BINS).index_add(0, k, terms) / len(t)
    return {"gap": terms.mean().item(), "bins": bins.tolist()}


def measured(study, runs):
    """The NELBO gap and the distances of samples of runs -> {key: dict}, two of them."""
    return study.measured(runs, "nelbo gap", nelbo_gap, "nelbo-gap"), study.sampled(runs, *SAMPLER)


def trained(study, target=TARGETS, chosen=None):
    return study.trained("spaces", chosen, FOUR, [*target])


# The table and its figures

def of_seeds(study, data, target, loss):
    return [(data, target, loss, seed) for seed in range(study.args.seeds)]


def third(study, gaps, target, loss, bins):
    """Of each seed the mean over the four sets of what some bins add to the NELBO gap."""
    return [statistics.mean(sum(gaps[data, target, loss, seed]["bins"][k] for k in bins) for data in FOUR)
            for seed in range(study.args.seeds)]


def spaces(study):
    """The NELBO gap and two distances of five targets in five loss spaces; where in log-SNR the gap is."""
    gaps, samples = measured(study, trained(study))
    header = [f"{target}-space, `{loss}`" for target, loss in SPACES.items()]
    values = {"NELBO minus the best possible, nats per dimension": lambda key: gaps[key]["gap"],
              "Sliced Wasserstein distance of samples": lambda key: samples[key]["sliced_wasserstein"],
              "Covariance distance of samples": lambda key: samples[key]["covariance_distance"]}
    text = []
    for title, value in values.items():
        lines = [[f"{data}, {target}", *(cell([value(key) for key in of_seeds(study, data, target, loss)])
                                         for loss in SPACES.values())] for data in FOUR for target in TARGETS]
        text += [f"**{title}**", "", *rows(["data, target", *header], lines)]
    lines = [[f"{name}, {target}", *(cell(third(study, gaps, target, loss, bins)) for loss in SPACES.values())]
             for name, bins in THIRDS.items() for target in TARGETS]
    low, high = ddpm.SCHEDULES["cosine"].ends(1e-3)
    edges = [low + (high - low) * bins.stop / BINS for bins in THIRDS.values()]
    text += ["**What parts of the range of log-SNR add to the NELBO gap, mean over the four sets**", "",
             *rows(["log-SNR, target", *header], lines)]
    floors = "; ".join("{}: {} and {}".format(data, *(floor(samples[data, "x", "rescaled", 0], name) for name in (
        "sliced_wasserstein", "covariance_distance"))) for data in FOUR)
    return text + [
        f"{study.args.seeds} seeds, mean +- standard deviation, {study.args.epochs} epochs, cosine schedule, t "
        "uniform. The gap is on 200,000 points, log-SNR uniform, and is 0 for the exact denoiser. "
        f"{study.args.num_samples:,} samples by {SAMPLER[1]} with {SAMPLER[0]} evaluations on grid {SAMPLER[2]}; what "
        f"perfect samples have, sliced Wasserstein and covariance distance: {floors}. noise: log-SNR from {low:.1f} "
        f"to {edges[0]:.1f}, middle: to {edges[1]:.1f}, data: to {edges[2]:.1f}. Of the weights w(log-SNR) those of "
        "x-, v- and u-space fall everywhere, that of eps-space is largest at 0, that of s-space rises."]


def fig_spaces(study, path):
    """The first two tables of `spaces` as a heat map, means over seeds."""
    gaps, samples = measured(study, trained(study))
    panels = {}
    for title, value in {"NELBO gap": lambda key: gaps[key]["gap"],
                         "sliced Wasserstein": lambda key: samples[key]["sliced_wasserstein"]}.items():
        for data in FOUR:
            panels[title, data] = [[plots_spaces.mean(value(key) for key in of_seeds(study, data, target, loss))
                                    for loss in SPACES.values()] for target in TARGETS]
    plots_spaces.heat(panels, TARGETS, [f"{name}-space" for name in SPACES], path)


def fig_over_logsnr(study, path, shown=("v", "x")):
    """What every bin of log-SNR adds to the NELBO gap, by loss space: does a weight that rises somewhere leave more?"""
    runs = trained(study, shown)
    gaps = study.measured(runs, "nelbo gap", nelbo_gap, "nelbo-gap")
    low, high = ddpm.SCHEDULES["cosine"].ends(1e-3)
    middles = [low + (high - low) * (k + 0.5) / BINS for k in range(BINS)]
    panels = {f"{data}, {target}": {f"{name}-space": [gaps[key]["bins"] for key in of_seeds(study, data, target, loss)]
                                    for name, loss in SPACES.items()} for target in shown for data in FOUR}
    plots_spaces.over_logsnr(panels, middles, path)


RESULTS = {
    "spaces": (spaces, "five targets in five loss spaces: NELBO gap, samples, and where in log-SNR the gap is"),
    "spaces-map": (fig_spaces, "the same as a heat map"),
    "spaces-over-logsnr": (fig_over_logsnr, "what every bin of log-SNR adds to the NELBO gap, by loss space"),
}
