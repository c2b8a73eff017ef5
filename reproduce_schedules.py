"""Which t to train on: fixed densities and those that follow the loss (VDM 4.6), by variance and by epochs.

Part of `reproduce_vdm.py`. Read `adaptive.py` first.

Not here: images (`reproduce_schedules_images.py`).
"""
import functools
import statistics

import torch

import adaptive
import batches
import kind_points
import losses
import plots_weightings
import weightings
from datasets2d import DATASETS, FOUR
from ddpm import SCHEDULES
from learned_schedule import Learner
from study import cell, exact_nelbo, rows

# Densities by their recipe; learned is that of a learned schedule.
DENSITIES = {"uniform": "exact", "logsnr": "logsnr", "adaptive": "adaptive", "loss_aware": "loss-aware",
             "learned": "learned"}
DRAWS, EPOCHS, NEAR = 100_000, 20, 0.5        # NEAR: nats, both dimensions together


@functools.cache
def of_exact(data, density, loss, seed, n=None):
    """Draws of a loss of the exact denoiser, v with schedule cosine: std / mean, and the moments or None."""
    terms, moments = adaptive.one_draw(DATASETS[data], density, "cosine", loss=loss, n=n or DRAWS, seed=seed)
    return (terms.std() / terms.mean()).item(), moments


def loss_variance(study):
    """Std over mean of one draw, of two weights: what the density alone does."""
    lines = [[data, loss, *(cell([of_exact(data, density, loss, seed)[0] for seed in range(study.args.seeds)])
                            for density in losses.T_DENSITIES)]
             for loss in ("nelbo", "mse") for data in FOUR]
    return rows(["data", "loss", "t uniform, cosine", "log-SNR uniform", "VDM 4.130, adaptive",
                 "least variance, loss_aware"], lines) + [
        f"One draw of t, x and noise, exact denoiser, v with schedule cosine, log-SNR from -12.9 to 12.9. {DRAWS:,} "
        "draws; densities of the last two columns are adapted to as many before, in 100 bins. mean +- standard "
        "deviation over seeds of the draws."]


def spread(one):
    """Std / mean of the training loss of a run's network, with the t it would draw next: of one draw, of a batch."""
    config, moments, model, learned = one.config, one.checkpoint.get("moments"), one.model(), None
    if "schedule" in one.checkpoint:
        model, learned = model.network, [Learner(config, one.checkpoint["schedule"])]
    _, z, t, y, w = batches.epoch([kind_points.load(config, "train")], config["epochs"], [config],
                                  None if moments is None else [moments], learned)          # (steps, batch_size, ...)
    errors = torch.stack([losses.weighted_error(model(z, t), y, w) for z, t, y, w in zip(z, t, y, w)])
    steps = errors.mean(1)
    return {"draw": (errors.std() / errors.mean()).item(), "step": (steps.std() / steps.mean()).item()}


def first_within(values, best):
    """The first epoch at which a test NELBO is within NEAR of the best possible, per dimension; None: at none."""
    return next((epoch for epoch, value in enumerate(values, 1) if 2 * (value - best) < NEAR), None)


def epochs(study):
    """What is learned in 20 epochs with `nelbo` and each density, and how fast."""
    seeds, lines = range(study.args.seeds), []
    runs = {density: study.trained(recipe, ["nelbo"], FOUR, ["v"], EPOCHS) for density, recipe in DENSITIES.items()}
    spreads = {density: study.measured(of, "spread", spread) for density, of in runs.items()}
    for data in FOUR:
        best = exact_nelbo(DATASETS[data].optimal_model("v", SCHEDULES["cosine"]), "v", data)
        for density, of in runs.items():
            keys = [(data, "v", "nelbo", seed) for seed in seeds]
            gaps = [study.exact_nelbo(of, key, best)[0] - best.mean().item() for key in keys]
            first = [first_within(study.curve(of, key, "test_nelbo"), of[key].history[-1]["optimum_nelbo"])
                     for key in keys]
            near = [epoch for epoch in first if epoch]
            lines.append([data, density, cell(gaps), (f"{statistics.mean(near):.1f}" if near else "")
                          + f" ({len(near)} of {len(first)})" * (len(near) < len(first)),
                          cell([spreads[density][key]["draw"] for key in keys]),
                          cell([spreads[density][key]["step"] for key in keys])])
    return rows(["data", "density of t", "NELBO - best possible, nats per dimension", f"epochs to within {NEAR} nats",
                 "std / mean of the loss, one draw", "one step"], lines) + [
        f"v, `nelbo`, schedule cosine, {EPOCHS} epochs, mean +- standard deviation over {len(seeds)} seeds. NELBO: "
        "exact, on the 200,000 points of every model; that of the exact denoiser is the best possible. Epochs: the "
        f"first whose test NELBO, both dimensions together, is within {NEAR} nats of that of the exact denoiser on the "
        "same points; (n of m): of so many seeds, the others never. The loss is that of the last network in training, "
        "importance and all; a step has 512 draws, stratified in t."]


def of_moments(moments, density, schedule):
    """p(log-SNR) at the middles of the bins that moments of training give: two (n,)."""
    p = moments.double() ** (1 / adaptive.POWERS[density])
    low, high = schedule.ends(1e-3)
    width = (high - low) / len(p)
    return high - width * (torch.arange(len(p), dtype=torch.float64) + 0.5), p / p.sum() / width


def fig_adapted(study, path):
    """p(lambda) after training, beside those of the exact denoiser and of t uniform: VDM 4.130 and the best."""
    schedule, panels = SCHEDULES["cosine"], {}
    logsnr = torch.linspace(-12.8, 12.8, 201, dtype=torch.float64)
    runs = {density: study.trained(DENSITIES[density], ["nelbo"], FOUR, ["v"], EPOCHS) for density in adaptive.POWERS}
    for data in FOUR:
        curves = panels[data] = {"uniform": (logsnr, weightings.density(schedule, logsnr), "-")}
        for density, of in runs.items():
            found = study.measured({key: one for key, one in of.items() if key[0] == data}, "moments",
                                   lambda one: {"mean": one.checkpoint["moments"].tolist()})
            mean = torch.tensor([found[key]["mean"] for key in found], dtype=torch.float64).mean(0)
            curves[density] = *of_moments(mean, density, schedule), "-"
            curves[f"{density}, exact denoiser"] = *of_moments(of_exact(data, density, "nelbo", 0)[1], density,
                                                               schedule), ":"
    plots_weightings.panels(panels, path)
