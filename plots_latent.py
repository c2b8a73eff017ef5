"""The figure of the hole problem: latents, a prior, and what is decoded from it.

Not here: all other figures (`plots.py`, which says what they have in common).
"""
import numpy as np
import torch
from matplotlib import pyplot as plt

from plots import save

DATA, SAMPLES, HOLE = "#0072B2", "#D55E00", "#CC79A7"
SHOWN, LIMIT = 3000, 3.5               # points of a panel; half the side of the plane of latents


def shown(ax, x, colour):
    ax.scatter(*x[:SHOWN].T, s=1.5, alpha=0.4, linewidths=0, color=colour, rasterized=True)


def holes(panels, path, points=101):
    """A row for each VAE: data and reconstructions, latents, samples decoded from each source of z.

    panels: {title: (numbers, {source: numbers of its samples}, points, log q(z))}, of `reproduce_latent.of_holes`. In
    the plane of latents are contours of the prior, at 1, 2 and 3 standard deviations, and shaded where q(z) < p(z) / 2.
    """
    sources = list(next(iter(panels.values()))[1])
    fig, axes = plt.subplots(len(panels), 2 + len(sources), figsize=(3 * (2 + len(sources)), 3.5 * len(panels)),
                             squeeze=False, layout="constrained")
    axis = torch.linspace(-LIMIT, LIMIT, points)
    z = torch.stack(torch.meshgrid(axis, axis, indexing="xy"), -1)
    radius = z.norm(dim=2)
    for row, (title, (numbers, found, of, log_q)) in zip(axes, panels.items()):
        shown(row[0], of["data"], DATA)
        row[0].scatter(*of["reconstructions"][:SHOWN].T, s=1.5, linewidths=0, color="black", rasterized=True)
        row[0].set(title="data, reconstructions (black)", ylabel=title)
        gap = log_q(z.flatten(0, 1)).unflatten(0, (points, points)) + radius**2 / 2 + np.log(2 * np.pi)
        row[1].contourf(axis, axis, ((gap < -np.log(2)) & (radius < 3)).float(), [0.5, 1], colors=[HOLE], alpha=0.3)
        row[1].contour(axis, axis, radius, [1, 2, 3], colors="grey", linewidths=0.7)
        shown(row[1], of["z"]["aggregate posterior"], DATA)
        row[1].set_title(f"q(z), KL {numbers['kl']:.2f} from N(0, I);\n{numbers['hole']:.0%} of N(0, I) in holes")
        for ax, source in zip(row[2:], sources):
            shown(ax, of["x"][source], SAMPLES)
            ax.set_title(f"z from the {source}\n" if source != "N(0, I)" else "z from N(0, I)\n")
            ax.set_title(ax.get_title() + "log-density {log_density:.2f}, off {off:.1%}".format(**found[source]))
        for ax in row:
            limit = LIMIT if ax is row[1] else 2.6
            ax.set(xlim=(-limit, limit), ylim=(-limit, limit), xticks=[], yticks=[], aspect="equal")
            ax.title.set_fontsize(9)
    save(fig, path)
