"""What guidance samples from: the exact guided denoiser beside p(x | label)^(1 + w) p(x)^-w (poster).

Part of `reproduce_poster.py`. Functions of a `study.Study` return the lines of a table, functions of a Study and a path
draw a figure. Read `guidance.py` first.

Not here: what the results show, which is written in results/poster/README.md for the committed runs.
"""
import functools

import torch

import ddpm
import guidance
import metrics
import plots_guidance
import run
import samplers
from datasets2d import DATASETS, rings, standardised
from study import cell, rows

WEIGHTS = 0, 0.5, 1, 2, 5
COSINE, TARGET = ddpm.SCHEDULES["cosine"], "v"
# As good as 1,000 centres a ring: spaced by one standard deviation, their density ripples by 1e-7.
SETS = {"clusters": (DATASETS["clusters"], 3), "rings": (standardised(*rings(120)), 0)}     # data and label
SAMPLERS = {"flow": ("dpmpp", 128), "SDE": ("ancestral", 512)}
INTERVALS = {"low noise": (0.0, 1 / 3), "middle": (1 / 3, 2 / 3), "high noise": (2 / 3, 1.0), "all": (0.0, 1.0)}
TRAINED, EPOCHS = (0, 1, 5), 20        # weights and epochs of networks
TIMES = 0.2, 0.4, 0.6, 0.8
REAL = 50_000                          # points of `Tilted`, to compare with


@functools.cache
def tilted(name, w):
    """p(x | label)^(1 + w) p(x)^-w of a set, and points of it to compare with."""
    data, label = SETS[name]
    law = guidance.Tilted(data, label, w)
    return law, law.sample(REAL, run.generator("cpu", "tilted", name, w))


@functools.cache
def samples(name, w, sampler, n, interval=(0.0, 1.0)):
    """Samples of the exact guided denoiser -> (n, 2)."""
    return drawn(guidance.exact(SETS[name][0], TARGET, COSINE), name, w, sampler, n, interval)


def drawn(model, name, w, sampler, n, interval=(0.0, 1.0)):
    """Guided samples of any model with labels, the same noise for all -> (n, 2)."""
    model, (how, steps) = guidance.of_label(guidance.guided(model, w, interval), SETS[name][1]), SAMPLERS[sampler]
    return samplers.sample(model, (n, 2), steps, target=TARGET, schedule=COSINE, sampler=how, grid="logsnr",
                           generator=run.generator("cpu", "guided"))


def spread(x):
    """The standard deviation of points (n, 2), the root of its mean square over the axes."""
    return x.var(0).mean().sqrt().item()


def measured(name, x):
    """Of points (n, 2) of a label: share whose most probable label it is, spread, mean log p(x | label) in nats."""
    data, label = SETS[name]
    return [(guidance.posterior(data, x).argmax(1) == label).double().mean().item(), spread(x),
            data.given(label).log_prob(x).mean().item()]


def relative_error(name, w, t, n=2000):
    """Root mean square of guided score minus that of the diffused `Tilted`, over that of the latter, on its points."""
    (data, label), (law, real) = SETS[name], tilted(name, w)
    alpha, sigma = (float(c(torch.tensor(t, dtype=torch.float64))) for c in (COSINE.alpha, COSINE.sigma))
    z = alpha * real[:n] + sigma * torch.randn(n, 2, generator=run.generator("cpu", "error"))
    model = guidance.of_label(guidance.guided(guidance.exact(data, "s", COSINE), w), label)
    truth, score = law.score(z.double(), alpha, sigma), model(z.double(), torch.full((n,), t, dtype=torch.float64))
    return ((score - truth).square().mean() / truth.square().mean()).sqrt().item()


def guided(study):
    """Samples of the exact guided denoiser beside the density that they are said to have, by w and noise."""
    n, lines, cells = study.args.num_samples // 2, [], []
    show = lambda values: [f"{value:.3f}" for value in values]
    for name in SETS:
        for w in WEIGHTS:
            law, real = tilted(name, w)
            floor = "{:.3f} +- {:.3f}".format(*metrics.floor(
                law, n, REAL, 5, run.generator("cpu", "floor", name, w))["sliced_wasserstein"])
            lines.append([name, f"{w}", "the density", floor, *show(measured(name, real))])
            for sampler in SAMPLERS:
                x = samples(name, w, sampler, n)
                lines.append([name, f"{w}", sampler, f"{metrics.sliced_wasserstein(x, real):.3f}",
                              *show(measured(name, x))])
        for w in 1, 5:
            real = tilted(name, w)[1]
            for sampler in SAMPLERS:
                found = [samples(name, w, sampler, n, interval) for interval in INTERVALS.values()]
                distances = [metrics.sliced_wasserstein(x, real).item() for x in [samples(name, 0, sampler, n), *found]]
                cells.append([name, f"{w}", sampler, *show(distances)])
    errors = [[name, f"{w}", *(f"{relative_error(name, w, t):.2f}" for t in TIMES)] for name in SETS for w in WEIGHTS]
    return rows(["data", "w", "samples of", "sliced Wasserstein", "accuracy", "spread", "log-density"], lines) \
        + rows(["sliced Wasserstein", "w", "samples of", "no guidance", *(
            f"{title}, {low:.2g} < t <= {high:.2g}" for title, (low, high) in INTERVALS.items())], cells) \
        + rows(["error of the score", "w", *(f"t = {t:g}" for t in TIMES)], errors) + [
        f"One label, exact denoiser, cosine schedule; {n:,} samples by the flow ({SAMPLERS['flow'][1]} steps of dpmpp) "
        f"and by the reverse SDE ({SAMPLERS['SDE'][1]} of ancestral), equal steps of log-SNR, the same noise in all "
        f"rows. Distance to {REAL:,} points of the density p(x | label)^(1 + w) p(x)^-w, from a grid; of the density "
        "itself the floor of 5 draws. Accuracy: the share whose most probable label, by the exact p(label | x), is "
        "theirs. Spread: standard deviation, the root of its mean square over the axes. Log-density: mean of "
        "log p(x | label), nats. Second table: guidance in an interval of t alone. Third: guided score minus that of "
        "the diffused density, root mean square over that of the latter, on its points."]


def of_network(one, n):
    """Of a Run with labels {w and sampler: distance of its guided samples to the density, to the exact denoiser's,

    distance of the exact denoiser's to the density, and what `measured` has}.
    """
    name, model, found = one.config["data"], one.model(), {}
    for w in TRAINED:
        for sampler in SAMPLERS:
            real, exact, x = tilted(name, w)[1], samples(name, w, sampler, n), drawn(model, name, w, sampler, n)
            pairs = (x, real), (x, exact), (exact, real)
            found[f"{w} {sampler}"] = [metrics.sliced_wasserstein(*pair).item() for pair in pairs] + measured(name, x)
    return found


def trained(study):
    """How much of what a trained network's guided samples miss is guidance itself."""
    n, epochs, lines = study.args.num_samples // 4, min(EPOCHS, study.args.epochs), []
    runs = study.trained("labels", data=list(SETS), target=[TARGET], epochs=epochs)
    found = study.measured(runs, "guided", lambda one: of_network(one, n), f"guided-{n}")
    for name in SETS:
        seeds = [result for key, result in found.items() if key[0] == name]
        for w in TRAINED:
            for sampler in SAMPLERS:
                to_law, to_exact, exact, *rest = zip(*(result[f"{w} {sampler}"] for result in seeds))
                lines.append([name, f"{w}", sampler, f"{exact[0]:.3f}", *map(cell, (to_law, to_exact, *rest))])
    losses = "; ".join("{} {} of {:.3f}".format(name, cell([one.history[-1]["test_loss"] for one in of]),
                                                of[0].history[-1]["optimum"])
                       for name in SETS for of in [[one for key, one in runs.items() if key[0] == name]])
    return rows(["data", "w", "samples of", "exact to density", "network to density", "network to exact",
                 "accuracy", "spread", "log-density"], lines) + [
        f"Networks that see labels (v, mse, {epochs} epochs, {study.args.seeds} seeds, mean +- standard deviation), "
        f"{n:,} samples of one label beside those of the exact guided denoiser from the same noise: sliced Wasserstein "
        "distances to the density p(x | label)^(1 + w) p(x)^-w and to each other; the rest as in the table `guided`. "
        f"Test losses beside the best possible, of a denoiser that knows the labels: {losses}."]


def fig_plane(study, path):
    """Samples of the exact guided denoiser on the density that they are said to have."""
    panels = {(f"{name}, {sampler}", f"w = {w}"): (SETS[name][0], tilted(name, w)[0], samples(name, w, sampler, 1000))
              for name in SETS for sampler in SAMPLERS for w in WEIGHTS}
    plots_guidance.planes(panels, path)
