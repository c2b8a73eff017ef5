"""Two modes of weights 0.2 and 0.8: where learned scores are wrong, and which samplers find the weights.

Part of `reproduce_slides.py`, which says what the functions are. Read `langevin.py` first. After Song and Ermon 2019,
3.2, who have the learned scores alone; here the exact ones are beside them.
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
import samplers
import score_matching
from datasets2d import DATASETS, GaussianMixture
from reproduce_scores import ANNEALED_STEP, SIGMAS, STEP, budget, of_run, trained
from study import Missing, cell, rows

CHAINS, SAMPLES, WATCHED = 500, 10_000, (0, 10, 30, 100, 300, 1000, 3000, 10_000)
TOTALS = 50, 250, 500, 1000, 2500, 10_000                  # steps of annealed Langevin dynamics, all levels together
DATA = DATASETS["unequal"]
SMALL, LARGE = DATA.centres[0], DATA.centres[-1]


def with_error(values):
    """Mean of (n,) zeros and ones and its standard error."""
    share = values.double().mean().item()
    return share, (share * (1 - share) / len(values))**0.5


def in_large(x):
    """Which points are nearer to the centre of the large mode: (n, 2) -> (n,) of 0 and 1."""
    return ((x - LARGE.to(x)).square().sum(1) < (x - SMALL.to(x)).square().sum(1)).to(x)


def square(n, generator):
    """Points of a square around both modes, half its side 8 standard deviations of one (Song and Ermon 2019, 3.2.2)."""
    return ((SMALL + LARGE) / 2 + 8 * DATA.std * (2 * torch.rand(n, 2, generator=generator) - 1)).float()


STARTS = {"N(0, I)": lambda n, g: torch.randn(n, 2, generator=g), "square": square}


@torch.no_grad()
def plain(score, seed, chains=None):
    """Langevin dynamics from both starts together -> {start: {steps: share in the large mode}}."""
    g, n, found = run.generator("cpu", "modes", seed), chains or CHAINS, {start: {} for start in STARTS}
    x = torch.cat([start(n, g) for start in STARTS.values()])

    def watch(step, x, *_):
        if step in WATCHED:
            for start, part in zip(STARTS, x.split(n)):
                found[start][str(step)] = with_error(in_large(part))
    watch(0, x)
    with contextlib.suppress(langevin.Diverged):           # a chain that leaves for infinity is in no mode
        langevin.langevin(score, x, STEP, max(WATCHED), g, watch=watch)
    return found


@torch.no_grad()
def annealed(score, seed, chains=None, totals=None):
    """Annealed Langevin dynamics of so many steps in all -> {steps: share in the large mode}."""
    g, n, found = run.generator("cpu", "annealed", seed), chains or CHAINS, {}
    for total in totals or TOTALS:
        x = SIGMAS[0] * torch.randn(n, 2, generator=g)
        try:
            x = langevin.annealed(score, x, SIGMAS, ANNEALED_STEP, total // len(SIGMAS), g)
            found[str(total)] = with_error(in_large(x))
        except langevin.Diverged:
            found[str(total)] = math.nan, math.nan
    return found


DISTANCE_BINS = 12                     # standard deviations of a mode


@torch.no_grad()
def errors(score, sigma, n=101):
    """Of a score, beside that of the data blurred by sigma: over the square's plane, and over distance.

    -> {"map": (n, n) error, "error", "truth": rms by distance from the nearest centre, in standard deviations}
    """
    side = [torch.linspace(-1, 1, n, dtype=torch.float64) * 8 * std + middle
            for std, middle in zip(DATA.std, (SMALL + LARGE) / 2)]
    z = torch.stack(torch.meshgrid(*side, indexing="xy"), -1).flatten(0, 1)
    truth = DATA.score(z, 1.0, sigma)
    error = (score(z.float(), max(sigma, 0.01)).double() - truth).norm(dim=1)
    distance = torch.stack([((z - centre) / DATA.std).norm(dim=1) for centre in (SMALL, LARGE)]).amin(0)
    by = [distance.floor() == k for k in range(DISTANCE_BINS)]
    rms = lambda values: [values[there].square().mean().sqrt().item() for there in by]
    return {"map": error.unflatten(0, (n, n)).tolist(), "error": rms(error), "truth": rms(truth.norm(dim=1))}


def of_score(one):
    """What is measured of a run without t on the two modes."""
    score, config = of_run(one), one.config
    z = kind_points.load(config)
    z = z + config["sigma"] * torch.randn(z.shape, generator=run.generator("cpu", "modes"))
    found = errors(score, config["sigma"])
    del found["map"]                       # too many numbers to keep
    with torch.no_grad():
        fisher = score_matching.fisher(lambda x: score(x, 0.01), z, DATA.score(z, 1.0, config["sigma"])).mean().item()
    return {"langevin": plain(lambda x: score(x, 0.01), config["seed"]), "fisher": fisher, **found}


def of_levels(one):
    """What is measured of a run with t on the two modes."""
    points = kind_points.draw(one, one.config["timesteps"] or 128, SAMPLES, one.config["seed"], sampler="ancestral")[0]
    return {"annealed": annealed(of_run(one), one.config["seed"]), "ancestral": with_error(in_large(points))}


@functools.cache
def of_exact(chains=2000):
    """The same of the exact score."""
    blurred = lambda x, sigma: DATA.score(x, 1.0, float(sigma))
    points = samplers.sample(DATA.optimal_model("eps", ddpm.SCHEDULES["cosine"]), (SAMPLES, 2), 128, target="eps",
                             schedule=ddpm.SCHEDULES["cosine"], generator=run.generator("cpu", "modes"))
    return {"langevin": plain(DATA.score, 0, chains), "annealed": annealed(blurred, 0, chains),
            "ancestral": with_error(in_large(points))}


def measured(study):
    """{title: dicts of the seeds} of the runs on the two modes, and of the exact score one."""
    found = {}
    for title, recipe, target, loss, measure in (
            ("exact", "score-0", "s", "exact", of_score), ("denoising", "score-0.1", "s", "denoising", of_score),
            ("multi-scale", "multi-scale", "s", "multi_scale", of_levels),
            ("multi-scale, eps", "multi-scale", "eps", "multi_scale", of_levels),
            ("eps", "silu", "eps", "mse", of_levels)):
        runs = trained(study, recipe, loss, target, ["unequal"])
        found[title] = list(study.measured(runs, "modes", measure).values())
    return found | {"exact score": [of_exact()]}


def divergences(n=100_000):
    """The 0.2 and 0.8 of the modes beside 0.5 and 0.5: Fisher divergence, KL, in nats."""
    equal, x = GaussianMixture(torch.stack([SMALL, LARGE]), DATA.std), DATA.sample(
        n, run.generator("cpu", "weights"), torch.float64)
    return (score_matching.fisher(equal.score, x, DATA.score(x)).mean().item(),
            (DATA.log_prob(x) - equal.log_prob(x)).mean().item())


def modes(study):
    """The share of samples in the large mode, whose weight is 0.8."""
    results, lines = measured(study), []
    share = lambda found, *keys: cell([functools.reduce(dict.get, keys, result)[0] for result in found])
    for title, found in results.items():
        if "langevin" in found[0]:
            for start in STARTS:
                lines.append([title, f"Langevin from {start}", *(
                    share(found, "langevin", start, steps) for steps in ("0", "1000", "10000"))])
        if "annealed" in found[0]:
            lines.append([title, "annealed", "-", *(share(found, "annealed", steps) for steps in ("1000", "10000"))])
            lines.append([title, "ancestral, {} steps".format(50 if "multi-scale" in title else 128), "-",
                          share(found, "ancestral"), "-"])
    fisher, kl = divergences()
    text = rows(["trained with", "sampler", "share at the start", "1,000 steps", "10,000 steps"], lines)
    lines = [[title, *(cell([result["error"][k] for result in results[title]]) for k in (0, 2, 4, 6, 8)),
              cell([result["fisher"] for result in results[title]])] for title in ("exact", "denoising")]
    truth = results["exact"][0]["truth"]
    lines.append(["norm of the score", *(f"{truth[k]:.3f}" for k in (0, 2, 4, 6, 8)), "-"])
    text += rows(["error of the score, root mean square", *(f"{k} to {k + 1} std" for k in (0, 2, 4, 6, 8)),
                  "Fisher divergence"], lines)
    return text + [
        f"Two modes of weights 0.2 and 0.8; {study.args.seeds} seeds, mean +- standard deviation, {budget(study)}; "
        f"{CHAINS} chains a seed (standard error of a share of 0.8: {(0.16 / CHAINS)**0.5:.3f}), of the exact score "
        f"2,000, ancestral {SAMPLES:,}. Steps of {STEP:g}, annealed of {ANNEALED_STEP:g} sigma^2, {len(SIGMAS)} levels "
        f"from {SIGMAS[0]:g} to {SIGMAS[-1]:g}. N(0, I) is not around the middle of the modes, the square is. Errors "
        "over the distance from the nearest centre, points of the plane with equal weights, in standard deviations of "
        "a mode; denoising beside the data blurred by 0.1. The Fisher divergence is over the data. That of weights 0.5 "
        "and 0.5 from these is "
        f"{fisher:.1g}, their KL {kl:.3f} nats."]


def fig_steps(study, path):
    """The share in the large mode over steps, a panel for each start of plain Langevin dynamics."""
    results, panels = measured(study), {}
    curve = lambda found, *keys: {int(steps): [functools.reduce(dict.get, keys, result)[steps][0] for result in found]
                                  for steps in functools.reduce(dict.get, keys, found[0])}
    for start in STARTS:
        panels[f"Langevin from {start}"] = {
            ("Langevin", "exact score"): curve(results["exact score"], "langevin", start),
            ("Langevin", "learned: exact"): curve(results["exact"], "langevin", start),
            ("Langevin", "learned: denoising"): curve(results["denoising"], "langevin", start),
            ("annealed", "exact score"): curve(results["exact score"], "annealed"),
            ("annealed", "learned: multi-scale"): curve(results["multi-scale"], "annealed"),
            ("annealed", "learned: multi-scale, eps"): curve(results["multi-scale, eps"], "annealed")}
    plots_slides.shares(panels, path, truth=0.8)


def fig_plane(study, path):
    """True and learned scores of two modes, the error over the plane, of seed 0, and over distance, of all seeds."""
    if study.args.recorded:
        Missing()()
    rows_of, curves = {}, {}
    for title, recipe, loss in ("exact", "score-0", "exact"), ("denoising", "score-0.1", "denoising"):
        runs = trained(study, recipe, loss, data=["unequal"])
        sigma, found = runs["unequal", "s", loss, 0].config["sigma"], [errors(of_run(one), one.config["sigma"])
                                                                      for one in runs.values()]
        rows_of[title] = (DATA, sigma, of_run(runs["unequal", "s", loss, 0]), found[0]["map"])
        curves[title] = [result["error"] for result in found], found[0]["truth"]
    plots_slides.between_modes(rows_of, curves, kind_points.load(dict(data="unequal"))[:2000], path)
