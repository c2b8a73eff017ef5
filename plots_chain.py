"""The figures of the discrete chain: variances over t, the best one over the plane, weights, training.

Not here: all other figures (`plots.py`, which says what they have in common).
"""
import numpy as np
from matplotlib import pyplot as plt

from plots import COLOURS, band, save

LEARNED_COLOURS = {"log": "#CC79A7", "range": "#D55E00", "best": "#0072B2"}


def over_steps(panels, path, log=True):
    """Numbers of the steps of chains. panels: {title: {name: (t (n,), values (n,))}}, a colour for each name."""
    fig, axes = plt.subplots(1, len(panels), figsize=(4.2 * len(panels), 3.5), squeeze=False)
    for ax, (title, curves) in zip(axes[0], panels.items()):
        for k, (name, (t, values)) in enumerate(curves.items()):
            ax.plot(t, values, color=COLOURS.get(name, f"C{k}"), label=name)
        ax.set(yscale="log" if log else "linear", xlabel="step i", title=title)
        ax.grid(alpha=0.3)
        ax.legend(fontsize=8)
    fig.tight_layout()
    save(fig, path)


def variances(panels, path):
    """Where log v of a step lies between small (0) and large (1), over t.

    panels: {(data, T): {name: (t (n,), mean (n,), low (n,), high (n,))}}, band: 5 to 95 % over z.
    """
    rows, columns = (list(dict.fromkeys(names)) for names in zip(*panels))
    fig, axes = plt.subplots(len(rows), len(columns), figsize=(3 * len(columns), 2.8 * len(rows) + 0.5), sharex=True,
                             sharey=True, squeeze=False)
    for (data, T), curves in panels.items():
        ax = axes[rows.index(data), columns.index(T)]
        for name, (t, mean, low, high) in curves.items():
            colour = LEARNED_COLOURS[name]
            ax.plot(t, mean, color=colour, label=name, marker="." if len(t) < 40 else None)
            ax.fill_between(t, low, high, color=colour, alpha=0.15, linewidth=0)
        ax.axhline(0, color="black", linestyle=":", label="small")
        ax.axhline(1, color="black", linestyle="--", label="large")
        ax.set_title(f"{data}, T = {T}", fontsize=9)
        ax.set_ylim(-1.5, 2.5)
    for ax in axes[-1]:
        ax.set_xlabel("t")
    for ax in axes[:, 0]:
        ax.set_ylabel("u, log v from small to large")
    fig.tight_layout(rect=(0, 0, 1, 0.94))
    fig.legend(*axes[0, 0].get_legend_handles_labels(), loc="upper center", ncols=len(curves) + 2)
    save(fig, path)


def planes(panels, path, limit=3):
    """A number over the plane of z, with its lines 0 and 1. panels: {title: (n, n)}, rows of z_2, both from -3 to 3."""
    fig, axes = plt.subplots(1, len(panels), figsize=(3.2 * len(panels) + 0.8, 3.7), sharey=True, squeeze=False,
                             layout="constrained")
    for ax, (title, values) in zip(axes[0], panels.items()):
        mesh = ax.imshow(values, origin="lower", extent=(-limit, limit, -limit, limit), cmap="PuOr", vmin=-5, vmax=6)
        ax.contour(np.linspace(-limit, limit, len(values)), np.linspace(-limit, limit, len(values)), values, [0, 1],
                   colors="black", linewidths=0.7)
        ax.set_title(title, fontsize=9)
    fig.colorbar(mesh, ax=axes, label="u of the best variance of axis 1")
    save(fig, path)


def training(panels, path):
    """What Foundations draws over training: rows of numbers, log scale. panels: {row: {column: {name: (seeds, n)}}}."""
    columns = next(iter(panels.values()))
    fig, axes = plt.subplots(len(panels), len(columns), figsize=(3.3 * len(columns), 2.5 * len(panels) + 0.8),
                             sharex=True, sharey="row", squeeze=False)
    for row, (label, by_column) in zip(axes, panels.items()):
        for ax, (title, curves) in zip(row, by_column.items()):
            for k, (name, (values, best)) in enumerate(curves.items()):
                band(ax, range(1, values.shape[1] + 1), values, color=f"C{k}", label=name,
                     linestyle="-" if k < 10 else ":")
                if best is not None:
                    ax.axhline(best, color="black", linestyle="--", linewidth=1)
            ax.set(yscale="log")
            ax.grid(alpha=0.3)
            if ax in axes[0]:
                ax.set_title(title, fontsize=10)
        row[0].set_ylabel(label)
    for ax in axes[-1]:
        ax.set_xlabel("epoch")
    fig.tight_layout(rect=(0, 0, 1, 0.9))
    fig.legend(*axes[0, 0].get_legend_handles_labels(), loc="upper center", ncols=4, fontsize=8)
    save(fig, path)
