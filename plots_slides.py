"""The figures of score matching, Langevin dynamics and energies: fields, errors between modes, laws, energies.

Not here: all other figures (`plots.py`, which says what they have in common).
"""
import numpy as np
import torch
from matplotlib import pyplot as plt

from plots import SHADES, band, save

EXACT, LEARNED = "black", "#D55E00"
PLANE = 2.6                            # the planes of standardised data are [-PLANE, PLANE]^2


def density(ax, data, sigma, axes, drop=10):
    """The log-density of blurred data as shades, down to `drop` nats below its maximum. axes: two (n,)."""
    z = torch.stack(torch.meshgrid(*axes, indexing="xy"), -1)
    log_p = data.log_prob(z.flatten(0, 1), 1.0, sigma).unflatten(0, z.shape[:2])
    levels = np.linspace(log_p.max().item() - drop, log_p.max().item() + 0.1, len(SHADES) + 1)
    ax.contourf(*axes, log_p.clamp(min=levels[0]), levels=levels, colors=SHADES, zorder=0)


def arrows(ax, z, field, colour, longest, width=0.004, **style):
    """A field at z (n, 2) as arrows with the root of its length, `longest` the field of one cell."""
    length = field.norm(dim=1, keepdim=True)
    shown = field * (length * longest).rsqrt()             # the root: scores differ by orders of magnitude
    return ax.quiver(*z.T, *shown.T, color=colour, angles="xy", scale_units="xy", scale=1 / CELL, width=width, **style)


CELL = 0.3                             # between two arrows


def fields(panels, path, points=17):
    """The slides' panels. panels: {data: (mixture, x (n, 2), score of z (B, 2), paths (steps, n, 2))}."""
    axis = torch.linspace(-PLANE, PLANE, points)
    z, fine = torch.cartesian_prod(axis, axis), [torch.linspace(-PLANE, PLANE, 131).double()] * 2
    fig, axes = plt.subplots(len(panels), 5, figsize=(13, 2.75 * len(panels)), squeeze=False)
    for row, (data, (mixture, x, score, paths)) in zip(axes, panels.items()):
        truth, learned = mixture.score(z), score(z)
        longest = truth.norm(dim=1).quantile(0.9)
        row[0].scatter(*x.T, s=1, color="#0072B2", alpha=0.4, linewidths=0, rasterized=True)
        arrows(row[1], z, truth, EXACT, longest)
        arrows(row[2], z, learned, LEARNED, longest)
        density(row[3], mixture, 0.0, fine)
        arrows(row[3], z, truth, EXACT, longest, width=0.009)
        arrows(row[3], z, learned, LEARNED, longest)
        density(row[4], mixture, 0.0, fine)
        row[4].plot(*paths.unbind(2), color=LEARNED, linewidth=0.4, alpha=0.6)
        row[4].scatter(*paths[0].T, s=6, color="grey", linewidths=0, zorder=3)
        row[4].scatter(*paths[-1].T, s=8, color=EXACT, linewidths=0, zorder=4)
        row[0].set_ylabel(data)
    for ax, title in zip(axes[0], ("(a) data", "true score", "(b) learned score", "(c) both, and the density",
                                   "(d) Langevin paths, learned")):
        ax.set_title(title, fontsize=10)
    for ax in axes.flat:
        ax.set(xlim=(-PLANE, PLANE), ylim=(-PLANE, PLANE), xticks=[], yticks=[], aspect="equal")
    fig.tight_layout()
    save(fig, path)


COLOURS_OF_SCORES = {"exact score": EXACT, "learned: exact": LEARNED, "learned: denoising": "#0072B2",
                     "learned: multi-scale": "#009E73", "learned: multi-scale, eps": "#E69F00"}


def shares(panels, path, truth):
    """A share over steps. panels: {title: {(sampler, score): {steps: values of the seeds}}}; the true one dotted."""
    fig, axes = plt.subplots(1, len(panels), figsize=(5 * len(panels), 3.9), sharey=True, squeeze=False)
    for ax, (title, curves) in zip(axes[0], panels.items()):
        for (sampler, score), values in curves.items():
            band(ax, [max(steps, 1) for steps in values], np.array(list(values.values())).T,
                 color=COLOURS_OF_SCORES[score], linestyle="-" if sampler == "annealed" else "--",
                 marker="o" if sampler == "annealed" else ".", markersize=4, label=f"{sampler}, {score}")
        ax.axhline(truth, color="grey", linestyle=":", label="weight of the mode")
        ax.set(xscale="log", ylim=(0, 1), xlabel="steps, in all", title=title)
        ax.grid(alpha=0.3)
    axes[0, 0].set_ylabel("share in the large mode")
    fig.tight_layout(rect=(0, 0, 1, 0.8))
    fig.legend(*axes[0, 0].get_legend_handles_labels(), loc="upper center", ncols=3, fontsize=9)
    save(fig, path)


def between_modes(panels, curves, x, path, points=15):
    """Scores, their error over the plane and over distance.

    panels: {title: (mixture, sigma, score (z, s), error of a square's plane, (n, n))}; x (n, 2) points of the data.
    curves: {title: (errors of the seeds, norm of the true score), by distance}.
    """
    fig, axes = plt.subplots(len(panels), 4, figsize=(14, 3.3 * len(panels)), squeeze=False, layout="constrained")
    for row, (title, (data, sigma, score, error)) in zip(axes, panels.items()):
        middle, half = (data.centres[0] + data.centres[-1]) / 2, 8 * data.std
        low, high = middle - half, middle + half
        side = lambda n: [torch.linspace(a, b, n).double() for a, b in zip(low, high)]           # noqa: B023
        z = torch.cartesian_prod(*side(points)).float()
        truth, learned = data.score(z, 1.0, sigma), score(z, max(sigma, 0.01))
        for ax, field, colour in (row[0], truth, EXACT), (row[1], learned, LEARNED):
            density(ax, data, sigma, side(121), drop=60)
            arrows(ax, z, field, colour, truth.norm(dim=1).max())
        mesh = row[2].imshow(np.log10(np.array(error)), origin="lower", cmap="viridis", vmin=-1, vmax=2,
                             extent=(low[0].item(), high[0].item(), low[1].item(), high[1].item()))
        row[2].scatter(*x.T, s=0.5, color="white", linewidths=0)
        for ax in row[:3]:
            ax.set(xlim=(low[0], high[0]), ylim=(low[1], high[1]), xticks=[], yticks=[], aspect="equal")
        fig.colorbar(mesh, ax=row[2], label="log10 of the error", shrink=0.8)
        errors, norm = curves[title]
        band(row[3], 0.5 + np.arange(len(norm)), np.array(errors), color=LEARNED, label="error, all seeds")
        row[3].plot(0.5 + np.arange(len(norm)), norm, "--", color=EXACT, label="true score")
        row[3].set(yscale="log", xlabel="distance from a centre, std", title="root mean square")
        row[3].grid(alpha=0.3)
        row[3].legend(fontsize=8)
        row[0].set_ylabel(f"{title} (blur {sigma:g})")
        for ax, name in zip(row, ("true score", "learned score", "error")):
            ax.set_title(name, fontsize=10)
    save(fig, path)


def laws(panels, path):
    """Points of an axis beside two densities. panels: {title: ({name: (n, 2)}, (grid, p, law))}."""
    fig, axes = plt.subplots(1, len(panels), figsize=(5 * len(panels), 3.4), squeeze=False)
    for ax, (title, (points, (line, p, law))) in zip(axes[0], panels.items()):
        for (name, x), colour in zip(points.items(), (LEARNED, "#0072B2")):
            ax.hist(x[:, 0].numpy(), bins=np.linspace(-3, 3, 81), density=True, color=colour, alpha=0.35, label=name)
        ax.plot(line, p, color=EXACT, linestyle="--", label="p_t")
        ax.plot(line, law, color=EXACT, label="p_t^2 / N(0, I)")
        ax.set(xlim=(-3, 3), xlabel="axis 1", title=title)
    axes[0, 0].set_ylabel("density")
    fig.tight_layout(rect=(0, 0, 1, 0.9))
    fig.legend(*axes[0, 0].get_legend_handles_labels(), loc="upper center", ncols=4, fontsize=9)
    save(fig, path)


def energies(panels, limit, path, largest=12):
    """Energies over the plane, in nats above the least. panels: {title: {name: (n, n), rows of z_2}}."""
    names, width = list(next(iter(panels.values()))), len(panels)
    fig, axes = plt.subplots(len(names), width, figsize=(2.5 * width + 0.8, 2.6 * len(names)), squeeze=False,
                             layout="constrained")
    for column, (title, values) in zip(axes.T, panels.items()):
        for ax, name in zip(column, names):
            mesh = ax.imshow(values[name], origin="lower", extent=(-limit, limit, -limit, limit), cmap="Blues_r",
                             vmin=0, vmax=largest)
            side = np.linspace(-limit, limit, len(values[name]))
            ax.contour(side, side, values[name], range(0, largest + 1, 2), colors="black", linewidths=0.4)
            ax.set(xticks=[], yticks=[])
            if ax in axes[:, 0]:
                ax.set_ylabel(name)
        column[0].set_title(title, fontsize=9)
    fig.colorbar(mesh, ax=axes, label="nats above the least -log p", extend="max")
    save(fig, path)
