"""A bound with less noise, and grey levels with noise: what the control variate saves, what dequantisation costs.

Part of `reproduce_vdm.py`, which says what the functions are. Read `control.py` and `dequantise.py` first.

Not here: images (results/images).
"""
import math

import torch

import dequantise
import kind_points
import likelihood
import run
from datasets2d import DATASETS, FOUR
from ddpm import SCHEDULES
from decoders import discretised
from study import cell, rows

EPOCHS, TESTED, REPEATS = 30, 500, 100          # of training; points; bounds of two draws each
SCHEDULE = SCHEDULES["cosine"]


def variances(model, data, target, schedule=SCHEDULE, stabiliser=0.0):
    """{"draw", "mean": [without, with control]}: variance of one draw, a mean over the points; of the points' mean.

    In nats^2, the second times the number of points: of as many independent draws both would be equal, and it is
    smaller because t is stratified over the points. The same t and noise without and with control.
    """
    x, found = kind_points.load(dict(data=data))[:TESTED].double(), {"draw": [], "mean": []}
    for control in False, True:
        terms = [likelihood.bound(model, x, target=target, schedule=schedule, stabiliser=stabiliser, draws=2,
                                  control=control, generator=run.generator("cpu", "control", data, k))
                 for k in range(REPEATS)]
        found["draw"].append(2 * torch.stack([term["error"] for term in terms]).square().mean().item())
        found["mean"].append(2 * TESTED * torch.stack([term["diffusion"].mean() for term in terms]).var().item())
    return found


def control(study):
    """How much of the variance of the bound the control variate leaves: exact denoiser and trained networks."""
    runs, lines = study.trained("plain", ["mse"], list(FOUR), ["v"], min(study.args.epochs, EPOCHS)), []
    found = study.measured(runs, "control", lambda one: variances(
        one.model().double(), one.config["data"], one.target, one.schedule, one.config["stabiliser"]))
    for data in FOUR:
        exact = [variances(DATASETS[data].optimal_model("v", SCHEDULE), data, "v")]
        for name, results in ("exact", exact), ("trained", [found[key] for key in runs if key[0] == data]):
            lines.append([data, name, *(cell([result["draw"][on] for result in results]) for on in (0, 1)),
                          *(cell([without / less for without, less in (result[part] for result in results)])
                            for part in ("draw", "mean"))])
    return rows(["data", "denoiser", "variance of a draw", "with control", "smaller by", "that of the mean by"],
                lines) + [
        f"Diffusion term of the bound, nats^2, log-SNR uniform, v; a mean over {TESTED:,} test points, {2 * REPEATS} "
        "draws for each, the same without and with control. Of the mean: over the points, whose t are stratified, so "
        f"that some of the noise is gone without control; {REPEATS} means of two draws, a seventh of either variance "
        f"is chance. Trained: `mse`, {min(study.args.epochs, EPOCHS)} epochs, {study.args.seeds} seeds, mean +- "
        "standard deviation over them."]


def costs(p, t_min=1e-3, n=1000, steps=64):
    """{"entropy", "bound", "uniform", "truncated-normal"} of one pixel and its exact denoiser, in bits: (mean, error).

    Errors are standard errors over n pixels of what is above the pixel's own -log P.
    """
    g = run.generator("cpu", "dequantise")
    x = dequantise.LEVELS[torch.multinomial(p, n, replacement=True, generator=g), None]
    surprise = -p.log()[((x[:, 0] + 1) * 127.5).round().long()]
    model = dequantise.optimal_model(p, "v", SCHEDULE)
    how, std = dict(target="v", schedule=SCHEDULE, t_min=t_min), math.exp(-0.5 * SCHEDULE.ends(t_min)[1])
    entropy = -torch.special.xlogy(p, p).sum()
    terms = likelihood.bound(model, x, decoder=discretised, draws=64, generator=g, **how)
    found = {"bound": terms["prior"] + terms["reconstruction"] + terms["diffusion"]}
    for name, dequantisation in dequantise.DEQUANTISATIONS.items():
        spread, log_q = dequantisation(x, std, g)
        found[name] = log_q - likelihood.log_likelihood(model, spread, steps=steps, **how)[0]
    bits = lambda value: value.item() / math.log(2)
    return {"entropy": (bits(entropy), 0.0)} | {
        name: (bits(entropy + (values - surprise).mean()), bits((values - surprise).std() / n**0.5))
        for name, values in found.items()}


def dequantisation(study):
    """One pixel of known entropy and its exact denoiser: bound, and flow with both kinds of noise, in bits."""
    lines = []
    for name, p in dequantise.pixels().items():
        found = costs(p)
        lines.append([name, f"{found['entropy'][0]:.3f}", *("{:.3f} +- {:.3f}".format(*found[column]) for column in (
            "bound", "uniform", "truncated-normal"))])
    return rows(["pixel", "entropy", "bound", "flow, uniform", "flow, truncated-normal"], lines) + [
        "Bits. One pixel of 256 levels and the exact denoiser of its distribution: all levels alike, every eighth, a "
        "normal of standard deviation 0.1 around the middle. Cosine schedule, t_min = 0.001; mean and standard error "
        "over 1,000 pixels; flow: 64 Runge-Kutta steps."]


RESULTS = {
    "control": (control, "variance of the bound without and with the control variate, exact denoiser and trained v"),
    "dequantisation": (dequantisation, "one pixel of known entropy: bound, and flow with uniform and truncated normal "
                                       "noise"),
}
TABLES = tuple(RESULTS)
