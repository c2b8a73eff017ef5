"""Demystifying Variational Diffusion Models: every loss as a weight of log-SNR, and its theorems.

Functions of a `study.Study` and a path draw a figure: see RESULTS, where `reproduce_theorems.py` has most. Read
`weightings.py` first.

Not here: what the results show, which is written in results/vdm/README.md.
"""
import torch

import plots_weightings
import reproduce_control
import reproduce_embedded
import reproduce_schedules
import reproduce_schedules_images
import reproduce_spaces
import reproduce_spaces_images
import reproduce_theorems
import reproduce_weightings
import targets
import weightings
from ddpm import SCHEDULES
from reproduce_spaces import SPACES


def grid(schedule, limit, n=201):
    """Log-SNR from -limit to limit, where the schedule has it: (n,)."""
    logsnr, (low, high) = torch.linspace(-limit, limit, n, dtype=torch.float64), schedule.ends(1e-9)
    return logsnr[(logsnr > low) & (logsnr < high)]


def implied_weights(limit=10):
    """{title: {name: (logsnr, w)}}: of `mse`, a panel for each target; of the rows of WEIGHTINGS, two panels.

    A name is a schedule, or a loss with the cosine schedule.
    """
    panels, logsnr = {}, torch.linspace(-limit, limit, 201, dtype=torch.float64)
    for target in [name for name in targets.TARGETS if name not in targets.OF_A_STEP]:
        curves = panels[f"mse of {target}" + (f"; {SPACES[target]}" if target in SPACES else "")] = {}
        for name, schedule in SCHEDULES.items():
            own = grid(schedule, limit)
            curves[name] = own, weightings.implied("mse", target, schedule, own)
        if target in ("x", "eps", "v", "s"):
            curves["nelbo_stable"] = logsnr, weightings.implied("nelbo_stable", target, SCHEDULES["cosine"], logsnr)
    for title, names in (("any target and schedule", weightings.OF_LOGSNR),
                         ("any target, cosine schedule", weightings.OF_EPS)):
        panels[title] = {name: (logsnr, weightings.WEIGHTINGS[name](logsnr)) for name in names}
    return panels


def fig_weights(study, path):
    """w(lambda) of every loss, VDM 4.4, a panel for each target."""
    plots_weightings.over_logsnr(implied_weights(), path)


def fig_densities(study, path):
    """p(lambda) of every schedule, VDM 4.5."""
    curves = {}
    for name, schedule in SCHEDULES.items():
        logsnr = grid(schedule, 14)
        curves[name] = logsnr, weightings.density(schedule, logsnr)
    plots_weightings.densities(curves, path)


RESULTS = {
    "weights": (fig_weights, "every loss as a weight of log-SNR, by target; dashed: not monotone"),
    "densities": (fig_densities, "density of log-SNR of every schedule, t uniform"),
    "loss-variance": (reproduce_schedules.loss_variance,
                      "std over mean of one draw of the loss for densities of t, exact denoiser"),
    "epochs": (reproduce_schedules.epochs, "NELBO of networks trained with each density of t, and epochs to near it"),
    "adapted-densities": (reproduce_schedules.fig_adapted, "densities of log-SNR that training arrives at, VDM 4.130"),
    "schedules-images": (reproduce_schedules_images.table, "bits/dim of images, each density of t: --data, --budget"),
    **reproduce_theorems.RESULTS, **reproduce_spaces.RESULTS, **reproduce_embedded.RESULTS,
    **reproduce_spaces_images.RESULTS, **reproduce_weightings.RESULTS, **reproduce_control.RESULTS,
}
TABLES = ("loss-variance", "epochs", "schedules-images", "spaces", "embedded", "spaces-images", "weightings",
          *reproduce_theorems.TABLES, *reproduce_control.TABLES)
