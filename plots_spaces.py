"""The figures of targets and loss spaces: heat maps, gaps over log-SNR, errors over the dimension.

Not here: all other figures (`plots.py`, which says what they have in common).
"""
import math
import statistics

import numpy as np
from matplotlib import colors
from matplotlib import pyplot as plt

from plots import COLOURS, band, save


def mean(values):
    """Mean of the seeds; infinite if one of them diverges."""
    values = [math.inf if value is None else value for value in values]
    return statistics.mean(values)


def number(value):
    """Of a cell: two digits, none of a large number."""
    return "-" if not math.isfinite(value) else f"{value:.2g}" if value < 100 else f"{value:.0f}" if value < 1e4 \
        else f"{value:.0e}"


def heat(panels, names, spaces, path):
    """Numbers as colours, log scale, one for each row of panels. panels: {(row, column): lists (names, spaces)}."""
    rows, columns = (list(dict.fromkeys(key[i] for key in panels)) for i in range(2))
    fig, axes = plt.subplots(len(rows), len(columns), figsize=(2.9 * len(columns) + 0.6, 2.9 * len(rows)),
                             squeeze=False, layout="constrained", sharex=True, sharey=True)
    for line, row in zip(axes, rows):
        values = np.array([panels[row, column] for column in columns])
        finite = values[np.isfinite(values) & (values > 0)]
        scale = colors.LogNorm(finite.min(), np.quantile(finite, 0.95), clip=True)
        for ax, column, found in zip(line, columns, values):
            mesh = ax.imshow(np.where(np.isfinite(found), found, finite.max()), cmap="Blues", norm=scale)
            for (i, k), value in np.ndenumerate(found):
                dark = not math.isfinite(value) or scale(value) > 0.6
                ax.text(k, i, number(value), ha="center", va="center", fontsize=8, color="white" if dark else "black")
            ax.set(xticks=range(len(spaces)), yticks=range(len(names)), title=f"{column}, {row}")
            ax.set_xticklabels(spaces, rotation=45, fontsize=8)
            ax.set_yticklabels(names)
            ax.title.set_fontsize(9)
        fig.colorbar(mesh, ax=line, extend="max", label=row)
        line[0].set_ylabel("target")
    save(fig, path)


def over_logsnr(panels, middles, path, columns=4):
    """What bins of log-SNR add, a line a loss space, log scale. panels: {title: {"x-space": (seeds, bins)}}."""
    rows = math.ceil(len(panels) / columns)
    fig, axes = plt.subplots(rows, columns, figsize=(3 * columns, 2.8 * rows + 0.5), sharex=True, sharey=True,
                             squeeze=False)
    for ax, (title, curves) in zip(axes.flat, panels.items()):
        for name, values in curves.items():
            band(ax, middles, np.array(values), color=COLOURS[name.split("-")[0]], label=name,
                 marker=".", linewidth=1.2)
        ax.set(yscale="log", title=title)
        ax.grid(alpha=0.3)
    for ax in axes[-1]:
        ax.set_xlabel("log-SNR")
    for ax in axes[:, 0]:
        ax.set_ylabel("NELBO gap of the bin, nats")
    fig.tight_layout(rect=(0, 0, 1, 0.93))
    fig.legend(*axes[0, 0].get_legend_handles_labels(), loc="upper center", ncols=len(curves))
    save(fig, path)


def over_dimension(panels, dimensions, path):
    """Something over D, a line a target, log scales. panels: {(row, column): ({target: (seeds, D)}, floor or None)}."""
    rows, columns = (list(dict.fromkeys(key[i] for key in panels)) for i in range(2))
    fig, axes = plt.subplots(len(rows), len(columns), figsize=(3.4 * len(columns), 2.9 * len(rows) + 0.4), sharex=True,
                             sharey="row", squeeze=False)
    for line, row in zip(axes, rows):
        for ax, column in zip(line, columns):
            curves, floor = panels[row, column]
            for target, values in curves.items():
                band(ax, dimensions, np.array(values, dtype=float), color=COLOURS[target], label=target, marker=".")
            if floor is not None:
                ax.axhline(floor, color="black", linestyle="--", linewidth=1, label="best possible")
            ax.set(xscale="log", yscale="log", title=column)
            ax.set_xticks(dimensions, dimensions)
            ax.minorticks_off()
            ax.grid(alpha=0.3)
        line[0].set_ylabel(row)
    for ax in axes[-1]:
        ax.set_xlabel("D")
    fig.tight_layout(rect=(0, 0, 1, 0.94))
    found = {label: handle for ax in axes.flat for handle, label in zip(*ax.get_legend_handles_labels())}
    fig.legend(found.values(), found.keys(), loc="upper center", ncols=len(found))
    save(fig, path)
