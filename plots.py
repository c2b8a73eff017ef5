"""The figures: one function a figure, written to a file. Never called from the training loop.

Each target has one colour everywhere (Okabe and Ito's, safe for colour-blind readers); panels share their axes; a
dashed line is the best possible.

    python plots.py runs/rings-*           # the test losses of these runs over epochs: curves.png
"""
import argparse
import io
from pathlib import Path

import matplotlib
import numpy as np
import torch

import movie
import run
import samplers
import settings

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402 - after the choice of backend

DPI = 120
SAMPLER_COLOURS = ["black", "#332288", "#88CCEE", "#44AA99", "#999933", "#882255"]      # Tol's, none of a target
COLOURS = {"x": "#0072B2", "eps": "#D55E00", "v": "#009E73", "s": "#CC79A7", "u": "#E69F00", "F": "#56B4E9",
           "mu": "black", "mu_skip": "#F0E442"}


def scatter(panels, path, points=5000, limits=(-3, 3)):
    """Points side by side on the same axes. panels: {title: (n, D) tensor}, at most `points` of each are shown.

    The first two axes of them, or one against 0; limits of both axes, None for those of the points.
    """
    fig, axes = plt.subplots(1, len(panels), figsize=(3.2 * len(panels), 3.5), sharex=True, sharey=True, squeeze=False)
    for ax, (title, x) in zip(axes[0], panels.items()):
        x = x[:points].cpu().numpy()
        y = x[:, 1] if x.shape[1] > 1 else 0 * x[:, 0]
        ax.scatter(x[:, 0], y, s=max(min(1, 5000 / len(x)), 4000 / len(x)), alpha=0.4, linewidths=0, color="#0072B2",
                   rasterized=True)
        ax.set_title(title, fontsize=10)
        if limits:
            ax.set(xlim=limits, ylim=limits, aspect="equal")
    fig.tight_layout()
    save(fig, path)


def point_grid(panels, path):
    """Small panels of points in rows and columns, axes from -3 to 3. panels: {(row, column): ((n, 2), text below)}."""
    rows, columns = list(dict.fromkeys(row for row, _ in panels)), list(dict.fromkeys(column for _, column in panels))
    size = 10.5 / len(columns)
    fig, axes = plt.subplots(len(rows), len(columns), figsize=(11, (size + 0.18) * len(rows) + 0.5), squeeze=False)
    for (row, column), (x, text) in panels.items():
        ax = axes[rows.index(row), columns.index(column)]
        colour = COLOURS.get(column.split(",")[0], COLOURS.get(row.split(",")[0], "#0072B2"))
        ax.scatter(x[:, 0], x[:, 1], s=1, alpha=0.5, linewidths=0, color=colour, rasterized=True)
        ax.set(xlim=(-3, 3), ylim=(-3, 3), xticks=[], yticks=[])
        ax.set_aspect("equal")
        ax.set_xlabel(text, fontsize=8, labelpad=2)
        if row == rows[0]:
            ax.set_title(column, fontsize=9)
        if column == columns[0]:
            ax.set_ylabel(row, fontsize=9)
    fig.tight_layout(pad=0.3, h_pad=0.4, w_pad=0.3)
    save(fig, path)


def loss_curve(history, config, path):
    """Train and test loss over epochs with the optimum as a dashed line. history: dicts of a run's metrics.jsonl."""
    fig, ax = plt.subplots(figsize=(5, 3.5))
    epochs, colour = [h["epoch"] for h in history], COLOURS.get(config["target"], "black")
    ax.plot(epochs, [h["train_loss"] for h in history], color=colour, alpha=0.4, label="train")
    ax.plot(epochs, [h["test_loss"] for h in history], color=colour, label="test")
    if history[-1]["optimum"] is not None:
        ax.axhline(history[-1]["optimum"], color="black", linestyle="--", linewidth=1, label="best possible")
    ax.set(xlabel="epoch", ylabel=f"{config['loss']} of {config['target']}",
           title=f"{config['data']}, {config['target']}, {config['loss']}, seed {config['seed']}")
    ax.legend()
    fig.tight_layout()
    save(fig, path)


SHADES = plt.get_cmap("Blues")(np.linspace(0, 0.45, 11))      # of a density, light enough to draw on


def curves(runs, path):
    """Test losses of Runs over epochs, log scale where none is negative, as a bound can be.

    A panel for each dataset, loss, schedule and number of timesteps: others do not compare. Dashed is the best
    possible, where it is known.
    """
    panels = {}
    for one in runs:
        panels.setdefault(tuple(map(one.config.get, ("data", "loss", "schedule", "timesteps"))), []).append(one)
    width = min(len(panels), 4)
    fig, axes = plt.subplots(-(-len(panels) // width), width, squeeze=False,
                             figsize=(max(5.5, 4 * width), 3.8 * -(-len(panels) // width)))
    for ax in axes.flat[len(panels):]:
        ax.remove()
    for ax, ((data, loss, schedule, timesteps), members) in zip(axes.flat, panels.items()):
        targets = [one.config["target"] for one in members]                    # two of one target: their own colours
        colours = {} if len(set(targets)) < len(targets) else COLOURS
        for i, one in enumerate(members):
            colour, optimum = colours.get(targets[i], f"C{i}"), one.history[-1].get("optimum")
            ax.plot([h["epoch"] for h in one.history], [h["test_loss"] for h in one.history], color=colour,
                    marker="." if len(one.history) < 5 else None, label=one.folder.name)
            if optimum is not None:
                ax.axhline(optimum, color=colour, linestyle="--", linewidth=1)
        positive = all(h["test_loss"] > 0 for one in members for h in one.history)
        ax.set(yscale="log" if positive else "linear", xlabel="epoch", ylabel=f"test loss, {loss}",
               title=f"{Path(data).name}, {schedule}" + (f", T = {timesteps}" if timesteps else ""))
        ax.grid(alpha=0.3)
        ax.legend(fontsize=8)
    fig.tight_layout()
    save(fig, path)


def band(ax, x, values, **style):
    """Mean of values (seeds, n) over the seeds, in a band from the least to the largest."""
    ax.plot(x, values.mean(0), **style)
    ax.fill_between(x, values.min(0), values.max(0), color=style["color"], alpha=0.2, linewidth=0)


def loss_curves(rows, path):
    """Losses over epochs. rows: {label: {data: {target: (values (seeds, epochs), optimum or None)}}}, log scale."""
    fig, axes = plt.subplots(len(rows), 4, figsize=(11, 2.9 * len(rows)), sharex=True, sharey="row", squeeze=False)
    for row, (label, sets) in zip(axes, rows.items()):
        for ax, (data, curves) in zip(row, sets.items()):
            for target, (values, optimum) in curves.items():
                band(ax, range(1, values.shape[1] + 1), values, color=COLOURS[target], label=target)
                if optimum is not None:
                    ax.axhline(optimum, color=COLOURS[target], linestyle="--", linewidth=1)
            ax.set(yscale="log", title=data)
        row[0].set_ylabel(label)
    for ax in axes[-1]:
        ax.set_xlabel("epoch")
    finish(fig, axes[0, 0], path, dashed=optimum is not None)


def over_time(curves, t, path):
    """log-SNR of the schedules. curves: {schedule: (n,)} over t (n,)."""
    fig, ax = plt.subplots(figsize=(5, 3.5))
    for (name, values), style in zip(curves.items(), ["-", "--", ":"]):
        ax.plot(t, values, style, color="black", label=name)
    ax.set(xlabel="t", ylabel="log-SNR")
    ax.grid(alpha=0.3)
    ax.legend()
    fig.tight_layout()
    save(fig, path)


def scalings(panels, t, path):
    """1/w(t). panels: {title: {target: (n,)}} over t (n,), log scale."""
    fig, axes = plt.subplots(1, len(panels), figsize=(4.5 * len(panels), 3.5), sharey=True)
    for ax, (title, curves) in zip(axes, panels.items()):
        for (target, values), style in zip(curves.items(), ["-", "-", ":", "-"]):
            ax.plot(t, values, style, color=COLOURS[target], label=target)
        ax.set(yscale="log", xlabel="t", title=title)
        ax.grid(alpha=0.3)
    axes[0].set_ylabel("1 / w(t)")
    axes[0].legend()
    finish(fig, None, path)


def over_t(panels, label, path):
    """Something over t in bins. panels: {title: [(label, target, values (seeds, bins), best (bins,))]}, log scale.

    Several curves of one target in a panel are drawn from light to dark.
    """
    fig, axes = plt.subplots(1, len(panels), figsize=(11, 3.4), sharey=True)
    for ax, (title, curves) in zip(axes, panels.items()):
        for i, (name, target, values, best) in enumerate(curves):
            shades = len({curve[1] for curve in curves}) == 1
            t = (0.5 + np.arange(values.shape[1])) / values.shape[1]
            band(ax, t, np.asarray(values), color=COLOURS[target], label=name,
                 alpha=(i + 1) / len(curves) if shades else 1)
            ax.plot(t, best, "--", color="black", linewidth=1,
                    label="best possible" if shades and i + 1 == len(curves) else None)
        ax.set(yscale="log", xlabel="t", xticks=[0, 0.5, 1], title=title)
        ax.grid(alpha=0.3)
        if shades:
            ax.legend(fontsize=8)
    axes[0].set_ylabel(label)
    finish(fig, None if shades else axes[0], path)


def over_evaluations(panels, label, path):
    """A distance over function evaluations, log scales; the floor dotted.

    In grey what is up to two standard errors of a mean of the seeds above it.
    panels: {(data, target): ({"mean", "std"} of the floor, {sampler: [(evaluations, values of the seeds)]})}.
    """
    columns, targets = (list(dict.fromkeys(names)) for names in zip(*panels))
    fig, axes = plt.subplots(len(targets), len(columns), figsize=(11, 2.4 * len(targets) + 0.5),
                             sharex=True, sharey=True, squeeze=False)
    for (data, target), (floor, curves) in panels.items():
        ax = axes[targets.index(target), columns.index(data)]
        for (sampler, points), colour in zip(curves.items(), SAMPLER_COLOURS):
            band(ax, [n for n, _ in points], np.array([values for _, values in points]).T, color=colour, label=sampler)
        error = floor["std"] / len(points[0][1])**0.5
        ax.axhline(floor["mean"], color="grey", linestyle=":", label="floor")
        ax.axhspan(floor["mean"], floor["mean"] + 2 * error, color="grey", alpha=0.3, linewidth=0,
                   label="+ 2 standard errors")
        ax.set_xscale("log", base=2)
        ax.set(yscale="log", ylim=(3e-3, 3))
        ax.set_title(f"{data}, {target}", fontsize=9)
    for ax in axes[-1]:
        ax.set_xlabel("function evaluations")
    for ax in axes[:, 0]:
        ax.set_ylabel(label)
    fig.tight_layout(rect=(0, 0, 1, 0.95))
    fig.legend(*axes[0, 0].get_legend_handles_labels(), loc="upper center", ncols=len(curves) + 2)
    save(fig, path)


def trajectories(runs, data, path, times=(0.6, 0.3, 0.12, 0.02), paths=24):
    """Paths of the probability flow ODE from noise to data over the exact log-density of z, a row for each of Runs.

    A column for each time: the paths until then, of the network in its target's colour, of the exact denoiser dashed,
    from the same noise. Arrows are the score, that of the exact denoiser grey and wider, each column on a scale of its
    own. data: a mixture of `datasets2d`.
    """
    fig, axes = plt.subplots(len(runs), len(times), figsize=(11, 3 * len(runs) + 0.3), sharex=True, sharey=True,
                             squeeze=False)
    axis = torch.linspace(-2.6, 2.6, 105)
    fine, coarse = (torch.cartesian_prod(c, c) for c in (axis, axis[4::8]))
    for row, one in zip(axes, runs):
        schedule, how = one.schedule, dict(target=one.target, schedule=one.schedule,
                                           stabiliser=one.config["stabiliser"])
        styles = {"network": (one.model(), COLOURS.get(one.target, "C1"), "-"),
                  "exact": (data.optimal_model(one.target, schedule, how["stabiliser"]), "black", (0, (3, 2)))}
        for name, (model, colour, style) in styles.items():
            film = movie.Film(schedule, 128, frames=128)
            samplers.sample(film.watch(model), (paths, 2), 128, sampler="dpmpp", t_min=run.smallest_t(one.config),
                            generator=run.generator("cpu", "trajectories"), **how)
            for ax, t in zip(row, torch.tensor(times)):
                scale = movie.scale(schedule, t)
                lines = torch.stack([z for s, z in film.frames if s >= t - 1e-6])             # (frames, paths, 2)
                ax.plot(*lines.unbind(2), color=colour, linestyle=style, linewidth=1.6 if name == "network" else 1,
                        zorder=3)
                ax.scatter(*lines[-1].T, s=9, color=colour, zorder=4, linewidths=0)
                with torch.no_grad():
                    z = coarse * scale
                    score = -samplers.denoiser(model, **how)(z, t)[1]                         # times sigma
                length = data.score(z, schedule.alpha(t), schedule.sigma(t)).norm(dim=1).max() * schedule.sigma(t)
                ax.quiver(*coarse.T, *(score / length).T, color=colour if name == "network" else "0.5", angles="xy",
                          scale_units="xy", scale=1.4, width=0.0025 if name == "network" else 0.005,
                          zorder=2 if name == "network" else 1)
        for ax, t in zip(row, torch.tensor(times)):
            scale = movie.scale(schedule, t)
            density = data.log_prob(fine * scale, schedule.alpha(t), schedule.sigma(t))
            density = (density + 2 * scale.log()).clamp(min=-8).unflatten(0, (len(axis), len(axis)))
            ax.contourf(axis, axis, density.T, levels=np.linspace(-8, density.max().item() + 0.1, 12), colors=SHADES,
                        zorder=0)
            ax.set(xlim=(-2.6, 2.6), ylim=(-2.6, 2.6), xticks=[], yticks=[], aspect="equal")
            ax.set_title(f"t = {t:g}" if one is runs[0] else "", fontsize=10)
        row[0].set_ylabel(f"{one.target}, {one.config['loss']}")
    handles = [plt.Line2D([], [], color=COLOURS.get(one.target, "C1"), label=f"network, {one.target}") for one in runs]
    fig.tight_layout(rect=(0, 0, 1, 0.94))
    fig.legend(handles=[*handles, plt.Line2D([], [], color="black", linestyle="--", label="exact denoiser")],
               loc="upper center", ncols=len(handles) + 1)
    save(fig, path)


def finish(fig, ax, path, dashed=True):
    """Lay out and save, with the legend of one panel above all of them; dashed lines are the best possible."""
    fig.tight_layout(rect=(0, 0, 1, 0.93) if ax else None)
    if ax:
        handles, labels = ax.get_legend_handles_labels()
        handles += [plt.Line2D([], [], color="black", linestyle="--", linewidth=1)] * dashed
        fig.legend(handles, labels + ["best possible"] * dashed, loc="upper center", ncols=len(handles))
    save(fig, path)


def save(fig, path):
    """Write the figure as PNG, whole or not at all, and close it."""
    buffer = io.BytesIO()
    fig.savefig(buffer, format="png", dpi=DPI)
    plt.close(fig)
    run.write(path, buffer.getbuffer())


def main(argv=None):
    parser = settings.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                             usage="python plots.py RUN... [options], see --help")
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folders of runs, or their ckpt.pt")
    parser.add_argument("--out", type=settings.file, default="curves.png", help="the figure, a PNG (curves.png)")
    args = parser.parse_args(argv)
    runs = [run.open(path) for path in args.runs]
    for one in runs:
        if not one.history:
            raise SystemExit(f"{one.folder} has no test yet, and so no curve - train it longer, or leave it out")
    curves(runs, args.out)
    print(f"wrote {args.out}")


if __name__ == "__main__":
    run.script(main, "nothing was written")
