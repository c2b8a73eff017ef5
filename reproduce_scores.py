"""Learned scores beside the true ones: how far they are at every noise level, and samples by three samplers.

Part of `reproduce_slides.py`, which says what the functions are. Read `score_matching.py` and `langevin.py` first.

Not here: where no data are (`reproduce_modes.py`).
"""
import contextlib
import functools
import math

import torch

import ddpm
import kind_points
import langevin
import plots_slides
import run
import score_matching
import targets
from datasets2d import DATASETS, FOUR
from metrics import DISTANCES
from study import Missing, cell, gaps, rows

EPOCHS, STEP = 30, 1e-3                # of training; of Langevin dynamics
# Annealed Langevin dynamics: the noise levels of a multi-scale run, from the largest on
SIGMAS = torch.tensor([ddpm.SIGMA_1 * (ddpm.SIGMA_0 / ddpm.SIGMA_1)**(i / 49) for i in range(50)])
ANNEALED_STEP = 0.1                    # times sigma^2


def trained(study, recipe, loss, target="s", data=FOUR):
    return study.trained(recipe, [loss], list(data), [target], min(study.args.epochs, EPOCHS))


def budget(study):
    return f"{min(study.args.epochs, EPOCHS)} epochs"


def of_level(model, target, schedule, stabiliser=0.0):
    """A network of any target and schedule as the score of y = x + s eps: (y (B, 2), s > 0 a number) -> (B, 2).

    z = alpha y has the log-SNR -2 log s, so that d log p / dy = alpha d log p / dz = -alpha eps_hat / sigma, which is
    -eps_hat / s.
    """
    time_of = functools.cache(lambda s: schedule.t(torch.tensor(-2 * math.log(s), dtype=torch.float64)))

    def score(y, s):
        t = time_of(float(s)).to(y.dtype)
        alpha, sigma = schedule.alpha(t), schedule.sigma(t)
        z = alpha * y
        return -targets.to_eps(target, model(z, t.expand(len(z))), z, alpha, sigma, stabiliser) / s
    return score


def of_run(one):
    """`of_level` of a Run; of one without t its score at its own level, whatever s is."""
    model = kind_points.in_chunks(one.model())
    if one.config["sigma"] is not None:
        return lambda y, s: model(y, y[:, 0])
    return of_level(model, one.target, one.schedule, one.config["stabiliser"])


# How far learned scores are from the truth

LEVELS, TESTED = (0.01, 0.1, 0.3, 1.0), 20_000
LEARNED = [("exact", "score-0", "s", "exact"), ("sliced", "score-0", "s", "sliced"),
           ("denoising", "score-0.1", "s", "denoising"), ("multi-scale", "multi-scale", "s", "multi_scale"),
           ("multi-scale, eps", "multi-scale", "eps", "multi_scale"),
           ("eps", "silu", "eps", "mse"), ("v", "silu", "v", "mse")]


@functools.cache
def points_of_levels(data):
    """{level: (z, true score)} of TESTED points, z = x + level eps: the same for all runs."""
    x, found = kind_points.load(dict(data=data))[:TESTED].double(), {}
    eps = torch.randn(x.shape, generator=run.generator("cpu", "levels"), dtype=x.dtype)
    for level in LEVELS:
        z = x + level * eps
        found[level] = z.float(), DATASETS[data].score(z, 1.0, level).float()
    return found


@torch.no_grad()
def divergences(one):
    """{level: Fisher divergence of a run's score to the truth}, where it has one."""
    score, own = of_run(one), one.config["sigma"]
    levels = LEVELS if own is None else [max(own, LEVELS[0])]
    return {f"{level}": score_matching.fisher(lambda y: score(y, level), *points_of_levels(      # noqa: B023
        one.config["data"])[level]).mean().item() for level in levels}


def scores(study):
    """The Fisher divergence of learned scores to the true ones at four noise levels."""
    lines = []
    results = {title: study.measured(trained(study, recipe, loss, target), "divergences", divergences)
               for title, recipe, target, loss in LEARNED}
    for data in FOUR:
        for title, found in results.items():
            found = [result for key, result in found.items() if key[0] == data]
            lines.append([data, title, *(cell([result[f"{level}"] for result in found]) if f"{level}" in found[0]
                                         else "-" for level in LEVELS)])
        lines.append([data, "0 everywhere", *(f"{truth.square().sum(1).mean() / 2:.3f}"
                                              for _, truth in points_of_levels(data).values())])
    return rows(["data", "trained with", *(f"level {level}" for level in LEVELS)], lines) + [
        f"Fisher divergence, Eq. (3.30), sums over two dimensions, {TESTED:,} test points z = x + level eps, "
        f"{study.args.seeds} seeds, mean +- standard deviation; {budget(study)} for all. A score "
        "without t has one level, its own: exact and sliced have 0 and are compared with the truth of 0.01, denoising "
        "has 0.1. multi-scale: s, and eps with the same functional. eps and v: `mse` on the cosine schedule, where z / "
        "sqrt(1 + level^2) is the network's z and -eps_hat / level the score. 0 everywhere: of no network, "
        "E|score|^2 / 2."]


ANNEALED, PLAIN = 500, 500             # evaluations
DRAWN = [(*LEARNED[0], "langevin", PLAIN), (*LEARNED[2], "langevin", PLAIN), (*LEARNED[3], "annealed", ANNEALED),
         (*LEARNED[3], "ancestral", 50), (*LEARNED[4], "annealed", ANNEALED), (*LEARNED[4], "ancestral", 50),
         (*LEARNED[5], "annealed", ANNEALED), (*LEARNED[5], "ancestral", 128), (*LEARNED[6], "ancestral", 128)]


def by_langevin(one, n):
    """What `metrics` finds of n samples of a score without t, those that are finite; lost: the share of the others."""
    score, g, seen = of_run(one), run.generator("cpu", one.config["seed"], "sample"), {}
    with contextlib.suppress(langevin.Diverged):
        langevin.langevin(lambda x: score(x, 0.01), torch.randn(n, 2, generator=g), STEP, PLAIN, g,
                          watch=lambda step, x, accepted: seen.update(x=x))
    kept = seen["x"].isfinite().all(1)
    return kind_points.measure(one.config, seen["x"][kept]) | {"lost": 1 - kept.double().mean().item()}


@functools.cache
def exact_samples(data, n, sampler):
    """What `metrics` finds of n samples by the exact score -> the dict of metrics.json."""
    mixture, g = DATASETS[data], run.generator("cpu", "exact samples")
    if sampler == "langevin":
        x = langevin.langevin(mixture.score, torch.randn(n, 2, generator=g), STEP, PLAIN, g)
    else:
        x = langevin.annealed(lambda z, sigma: mixture.score(z, 1.0, sigma), SIGMAS[0] * torch.randn(n, 2, generator=g),
                              SIGMAS, ANNEALED_STEP, ANNEALED // len(SIGMAS), g)
    return kind_points.measure(dict(data=data), x)


NAMES = [distance.__name__ for distance in DISTANCES]


def samples(study):
    """Samples by Langevin dynamics, annealed Langevin dynamics and `ancestral`, beside the floor and exact scores."""
    lines = []
    row = lambda found: [*(cell([result[name] for result in found]) for name in NAMES), cell(gaps(found))]
    results, n = [], study.args.num_samples
    for title, recipe, target, loss, sampler, steps in DRAWN:
        runs = trained(study, recipe, loss, target)
        found = (study.measured(runs, "langevin", lambda one: by_langevin(one, n), f"langevin-{steps}-{n}")
                 if sampler == "langevin" else
                 study.sampled(runs, steps, sampler, "logsnr" if sampler == "annealed" else "t"))
        results.append((title, sampler, steps, found))
    lost = max(result.get("lost", 0) for *_, found in results for result in found.values())
    for data in FOUR:
        for title, sampler, steps, found in results:
            lines.append([data, title, sampler, str(steps), *row([x for key, x in found.items() if key[0] == data])])
        for sampler, steps in ("langevin", PLAIN), ("annealed", ANNEALED):
            found = exact_samples(data, n // 4, sampler)
            lines.append([data, "exact score", sampler, str(steps), *row([found])])
        floors, _ = kind_points.floor(dict(data=data), n)
        lines.append([data, "floor", "", "", *("{:.3f} +- {:.3f}".format(*floors[name]) for name in NAMES), "0"])
    return rows(["data", "trained with", "sampler", "evaluations", "mean distance", "covar. dist.",
                 "sliced Wasserstein", "log-density gap"], lines) + [
        f"{n:,} samples, of the exact score {n // 4:,}, against 50,000 points, {study.args.seeds} seeds, mean +- "
        f"standard deviation; {budget(study)}. Langevin dynamics of step {STEP:g} from N(0, I): at most "
        f"{100 * lost:.2g} % of a network's chains end in infinity and are left out. annealed: ten steps "
        "a level. The score of denoising is that of the data blurred by 0.1. The "
        "log-density gap, of samples to data, in nats: below 0 off the data, above 0 too sharp."]


def fig_fields(study, path, paths=40):
    """The slides' panels (a) - (d) and thesis Fig. 3.3: data, learned and true score, both, Langevin paths; seed 0."""
    if study.args.recorded:
        Missing()()
    panels = {}
    for data in FOUR:
        mixture, score = DATASETS[data], of_run(trained(study, "score-0", "exact")[data, "s", "exact", 0])
        g, x = run.generator("cpu", "fields"), kind_points.load(dict(data=data))[:3000]
        seen = [torch.randn(paths, 2, generator=g)]
        with contextlib.suppress(langevin.Diverged):       # a path that leaves the plane is what it is
            langevin.langevin(lambda x: score(x, 0.01), seen[0], STEP, 1000, g,                  # noqa: B023
                              watch=lambda step, x, accepted: seen.append(x))                    # noqa: B023
        panels[data] = mixture, x, lambda z, score=score: score(z, 0.01), torch.stack(seen)
    plots_slides.fields(panels, path)
