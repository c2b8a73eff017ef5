"""The figure of guidance: `reproduce_guidance.py` has the numbers, `plots.py` what figures have in common."""
import numpy as np
from matplotlib import pyplot as plt

from plots import SHADES, save


def planes(panels, path, limit=2.2, drop=8):
    """Points on a density, shades of its log down to `drop` nats below the maximum; the data's is a grey line.

    panels: {(row, column): (mixture of all data, `guidance.Tilted`, points (n, 2))}.
    """
    names, columns = list(dict.fromkeys(row for row, _ in panels)), list(dict.fromkeys(column for _, column in panels))
    fig, axes = plt.subplots(len(names), len(columns), figsize=(2.3 * len(columns), 2.35 * len(names)), squeeze=False)
    for (row, column), (data, law, x) in panels.items():
        ax, side = axes[names.index(row), columns.index(column)], round(len(law.x)**0.5)
        axis = law.x[:side, 1]
        plane = lambda values: values.unflatten(0, (side, side)).T                               # noqa: B023
        log_p = plane(law.probabilities.log())
        levels = np.linspace(log_p.max().item() - drop, log_p.max().item() + 0.1, len(SHADES) + 1)
        ax.contourf(axis, axis, log_p.clamp(min=levels[0]), levels=levels, colors=SHADES, zorder=0)
        log_p = plane(data.log_prob(law.x))
        ax.contour(axis, axis, log_p, [log_p.max().item() - 4], colors="0.6", linewidths=0.5, linestyles="-", zorder=1)
        ax.scatter(*x.T, s=1.5, color="#D55E00", alpha=0.5, linewidths=0, zorder=2, rasterized=True)
        ax.set(xlim=(-limit, limit), ylim=(-limit, limit), xticks=[], yticks=[], aspect="equal")
        if row == names[0]:
            ax.set_title(column, fontsize=10)
        if column == columns[0]:
            ax.set_ylabel(row)
    fig.tight_layout(pad=0.4)
    save(fig, path)
