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
from study import rows

WEIGHTS = 0, 0.5, 1, 2, 5
COSINE, TARGET = ddpm.SCHEDULES["cosine"], "v"
# As good as 1,000 centres a ring: spaced by one standard deviation, their density ripples by 1e-7.
SETS = {"clusters": (DATASETS["clusters"], 3), "rings": (standardised(*rings(120)), 0)}     # data and label
SAMPLERS = {"flow": ("dpmpp", 128), "SDE": ("ancestral", 512)}
INTERVALS = {"low noise": (0.0, 1 / 3), "middle": (1 / 3, 2 / 3), "high noise": (2 / 3, 1.0), "all": (0.0, 1.0)}
TIMES = 0.1, 0.3, 0.5, 0.7, 0.9
REAL = 50_000                          # points of `Tilted`, to compare with


@functools.cache
def tilted(name, w):
    """p(x | label)^(1 + w) p(x)^-w of a set, and points of it to compare with."""
    data, label = SETS[name]
    law = guidance.Tilted(data, label, w)
    return law, law.sample(REAL, run.generator("cpu", "tilted", name, w))


@functools.cache
def samples(name, w, sampler, n, interval=(0.0, 1.0)):
    """Samples of the exact guided denoiser, the same noise for all -> (n, 2)."""
    data, label = SETS[name]
    model = guidance.of_label(guidance.guided(guidance.exact(data, TARGET, COSINE), w, interval), label)
    how, steps = SAMPLERS[sampler]
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


def relative_error(name, w, t, n=1000):
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
    return rows(["data", "w", "samples of", "sliced Wasserstein", "accuracy", "spread", "log p(x | label)"], lines) \
        + rows(["sliced Wasserstein", "w", "samples of", "no guidance", *(
            f"{title}, {low:.2g} < t <= {high:.2g}" for title, (low, high) in INTERVALS.items())], cells) \
        + rows(["error of the score", "w", *(f"t = {t:g}" for t in TIMES)], errors) + [
        f"One label, exact denoiser, cosine schedule; {n:,} samples by the flow ({SAMPLERS['flow'][1]} steps of dpmpp) "
        f"and by the reverse SDE ({SAMPLERS['SDE'][1]} of ancestral), equal steps of log-SNR, the same noise in all "
        f"rows. Distance to {REAL:,} points of the density p(x | label)^(1 + w) p(x)^-w, from a grid; of the density "
        "itself the floor of 5 draws. Accuracy: the share whose most probable label, by the exact p(label | x), is "
        "theirs. Spread: standard deviation, the root of its mean square over the axes. log p(x | label): mean, nats. "
        "Second table: guidance in an interval of t alone. Third: guided score minus that of the diffused density, "
        "root mean square over that of the latter, on its points."]


def fig_plane(study, path):
    """Samples of the exact guided denoiser on the density that they are said to have."""
    panels = {(f"{name}, {sampler}", f"w = {w}"): (SETS[name][0], tilted(name, w)[0], samples(name, w, sampler, 1000))
              for name in SETS for sampler in SAMPLERS for w in WEIGHTS}
    plots_guidance.planes(panels, path)
