"""The figures of weightings: w(log-SNR) of losses and the density of log-SNR of schedules.

Not here: all other figures (`plots.py`, which says what they have in common).
"""
import math

from matplotlib import pyplot as plt

import weightings
from plots import save

SCHEDULE_COLOURS = {"cosine": "black", "linear": "#332288", "ve": "#88CCEE", "flow": "#44AA99", "ddpm": "#999933",
                    "iddpm": "#CC6677", "edm": "#882255", "nelbo_stable": "#DDCC77"}                 # Tol's
DENSITY_COLOURS = {"uniform": "black", "logsnr": "#88CCEE", "adaptive": "#CC6677", "loss_aware": "#332288",
                   "learned": "#999933"}


def over_logsnr(panels, path, columns=4):
    """Weights over log-SNR, log scale, each divided by its value at 0; dashed: it rises somewhere.

    panels: {title: {name: (logsnr (n,), w (n,))}}; the names of the first have their colours and one legend.
    """
    rows = math.ceil(len(panels) / columns)
    fig, axes = plt.subplots(rows, columns, figsize=(3.3 * columns, 3 * rows), sharex=True, sharey=True, squeeze=False)
    for ax, (title, curves) in zip(axes.flat, panels.items()):
        for k, (name, (logsnr, w)) in enumerate(curves.items()):
            at_0 = w[logsnr.abs().argmin()]
            ax.plot(logsnr, w / at_0, "-" if weightings.falls(w) else "--", color=SCHEDULE_COLOURS.get(name, f"C{k}"),
                    label=name, linewidth=1.4)
        ax.set(yscale="log", ylim=(1e-3, 1e3), xlim=(-10, 10), title=title)
        ax.grid(alpha=0.3)
        if not curves.keys() <= SCHEDULE_COLOURS.keys():
            ax.legend(fontsize=7)
    for ax in axes[-1]:
        ax.set_xlabel("log-SNR")
    for ax in axes[:, 0]:
        ax.set_ylabel("w / w at 0")
    fig.tight_layout(rect=(0, 0, 1, 0.94))
    fig.legend([plt.Line2D([], [], color=colour) for colour in SCHEDULE_COLOURS.values()], SCHEDULE_COLOURS,
               loc="upper center", ncols=len(SCHEDULE_COLOURS))
    save(fig, path)


def panels(densities, path):
    """p(log-SNR) in a panel for each dataset: {title: {name: (logsnr (n,), p (n,), linestyle)}}; names have colours."""
    fig, axes = plt.subplots(1, len(densities), figsize=(3.5 * len(densities), 3.2), sharey=True, squeeze=False)
    for ax, (title, curves) in zip(axes[0], densities.items()):
        for name, (logsnr, p, linestyle) in curves.items():
            ax.plot(logsnr, p, linestyle, color=DENSITY_COLOURS[name.split(",")[0]], label=name, linewidth=1.2)
        ax.set(title=title, xlabel="log-SNR", ylim=(0, None))
        ax.grid(alpha=0.3)
    axes[0, 0].set_ylabel("p(log-SNR)")
    fig.tight_layout(rect=(0, 0, 1, 0.9))
    fig.legend(*axes[0, 0].get_legend_handles_labels(), loc="upper center", ncols=len(curves))
    save(fig, path)


def densities(curves, path):
    """p(log-SNR) of schedules: {name: (logsnr (n,), p (n,))}."""
    fig, ax = plt.subplots(figsize=(6, 3.8))
    for name, (logsnr, p) in curves.items():
        ax.plot(logsnr, p, color=SCHEDULE_COLOURS[name], label=name)
    ax.set(xlabel="log-SNR", ylabel="p(log-SNR), t uniform", xlim=(-14, 14), ylim=(0, None))
    ax.grid(alpha=0.3)
    ax.legend(fontsize=8)
    fig.tight_layout()
    save(fig, path)
