"""Score matching, Langevin dynamics and energies beside the truth (slides, "Score-based generative models"; thesis).

Functions of a `study.Study` return the lines of a table, functions of a Study and a path draw a figure: see RESULTS.
Read `score_matching.py`, `langevin.py` and `energy.py` first.

Not here: what the results show, which is written in results/slides/README.md for the committed runs.
"""
import functools
import math
import time

import torch
from torch import nn

import reproduce_energies
import reproduce_frozen
import reproduce_latent
import reproduce_modes
import reproduce_scores
import run
import score_matching
from datasets2d import DATASETS
from study import rows

POINTS, SCALES = 200_000, 0.01 * 500**torch.linspace(0, 1, 10, dtype=torch.float64)      # of the wrong score

def bend(z):
    """A smooth field that is the gradient of nothing: (B, 2) -> (B, 2)."""
    return torch.stack([torch.sin(2 * z[:, 0]) + z[:, 1], torch.cos(z[:, 0] + z[:, 1])], 1)


def wrong(z, sigma=0.0):
    """A score of the blurred clusters that is wrong in scale and shape: z (B, 2), sigma () or (B,) -> (B, 2)."""
    return 0.7 * DATASETS["clusters"].score(z, 1.0, sigma) + 0.5 * bend(z)


@functools.cache
def of_objectives(n=None, chunk=10_000):
    """Terms of every objective of the wrong score -> {(name, sigma): (terms, what they have the mean of)}, both (n,).

    Terms are without the objective's constant: D / (2 sigma^2) of denoising, D / 2 of multi-scale. What they have the
    mean of: the Fisher divergence at that noise level minus E|score|^2 / 2, on the same points.
    """
    data, g, D, found = DATASETS["clusters"], run.generator("cpu", "objectives"), 2, {}
    like = dict(generator=g, dtype=torch.float64)

    def add(name, sigma, terms, expected):
        found.setdefault((name, sigma), []).append(torch.stack([terms, expected]))

    def expected(score, z, sigma=0.0):
        truth = data.score(z, 1.0, sigma)
        return score_matching.fisher(score, z, truth) - 0.5 * truth.square().sum(1)
    for _ in range(0, n or POINTS, chunk):
        x, eps, angle = data.sample(chunk, g, torch.float64), torch.randn(chunk, D, **like), torch.rand(chunk, **like)
        u, i = torch.stack([torch.cos(2 * math.pi * angle), torch.sin(2 * math.pi * angle)], 1), torch.randint(
            len(SCALES), (chunk,), generator=g)
        fisher = expected(wrong, x)
        add("Fisher divergence", 0.0, fisher, fisher)
        add("exact", 0.0, score_matching.exact(wrong, x), fisher)
        add("D times sliced, plain", 0.0, D * score_matching.sliced(wrong, x, u, reduced=False), fisher)
        add("D times sliced", 0.0, D * score_matching.sliced(wrong, x, u), fisher)
        for sigma in 0.01, 0.1, 0.5:
            terms, z = score_matching.denoising(wrong, x, eps, sigma), x + sigma * eps
            add("denoising", sigma, terms - D / (2 * sigma**2), expected(wrong, z, sigma))
            add("denoising, each eps's", sigma, terms - eps.square().sum(1) / (2 * sigma**2), expected(wrong, z, sigma))
        sigma, of_levels = SCALES[i], lambda z, i: wrong(z, SCALES[i])
        add("multi-scale", "all", score_matching.multi_scale(of_levels, x, eps, i, SCALES) - D / 2,
            sigma**2 * expected(lambda z: of_levels(z, i), x + sigma[:, None] * eps, sigma))     # noqa: B023
    return {key: torch.cat(parts, 1) for key, parts in found.items()}


EVALUATIONS = {"Fisher divergence": 1, "exact": 3, "D times sliced, plain": 2, "D times sliced": 2, "denoising": 1,
               "denoising, each eps's": 1, "multi-scale": 1}


def objectives(study):
    """All objectives of one wrong score are its Fisher divergence but for a constant; they differ in error and cost."""
    found, lines = of_objectives(), []
    exact = found["exact", 0.0][1].mean()
    for (name, sigma), (terms, expected) in found.items():
        n, cost, difference = len(terms), EVALUATIONS[name], terms - expected
        lines.append([name, f"{sigma}", f"{terms.mean():.3f} +- {terms.std() / n**0.5:.3f}",
                      f"{expected.mean():.3f}", "0" if name == "Fisher divergence" else
                      f"{difference.mean():.3f} +- {difference.std() / n**0.5:.3f}",
                      f"{expected.mean() - exact:.3f}" if name != "multi-scale" else "-",
                      f"{terms.std() / 1000**0.5:.3f}", f"{cost}", f"{cost * terms.var() / 0.1**2:.2g}"])
    return rows(["objective", "sigma", "mean, without its constant", "Fisher divergence - E score^2 / 2", "difference",
                 "that at sigma - at 0", "standard error, 1,000 points", "evaluations",
                 "evaluations for an error of 0.1"], lines) + [
        f"One wrong score, {POINTS:,} points of the clusters, sums over two dimensions with the 1/2 of Eq. (3.30), "
        "float64, +- standard error. Constants: D / (2 sigma^2) of denoising, D / 2 of multi-scale. \"each eps's\": "
        "|eps|^2 / (2 sigma^2) of each point instead, which no gradient sees. multi-scale: "
        f"sigma_i^2 times the loss of {len(SCALES)} noise levels from {SCALES[0]:g} to {SCALES[-1]:g}, of a score that "
        "knows the level. Evaluations: of the network, a backward pass through it is one more; the trace takes one for "
        "each dimension, and D is 2 here."]


# The cost of the trace

def seconds(objective, repeats=7):
    """Of one call and its backward pass: the median of some."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        objective().mean().backward()
        times.append(time.perf_counter() - start)
    return sorted(times)[repeats // 2]


DIMENSIONS = 2, 8, 32, 128, 256


def trace_cost(study, batch=128, width=128):
    """Thesis, Figs 3.4 and 3.5: what the objectives cost over the dimension D."""
    lines, torch_state = [], torch.get_rng_state()
    for D in DIMENSIONS:
        torch.manual_seed(0)
        score = nn.Sequential(nn.Linear(D, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, D))
        x, eps = torch.randn(2, batch, D)
        u = eps / eps.norm(dim=1, keepdim=True)
        spent = [seconds(lambda: score_matching.denoising(score, x, eps, 0.1)),                  # noqa: B023
                 seconds(lambda: score_matching.sliced(score, x, u)),                            # noqa: B023
                 seconds(lambda: score_matching.exact(score, x))]                                # noqa: B023
        lines.append([str(D), "1", f"{1e3 * spent[0]:.2f}", "2", f"{1e3 * spent[1]:.2f}", f"{spent[1] / spent[0]:.1f}",
                      str(D + 1), f"{1e3 * spent[2]:.2f}", f"{spent[2] / spent[0]:.1f}"])
    torch.set_rng_state(torch_state)
    return rows(["D", "denoising: evaluations", "ms", "sliced: evaluations", "ms", "times denoising",
                 "exact: evaluations", "ms", "times denoising"], lines) + [
        f"A batch of {batch}, forward and backward pass, the slides' network of two hidden layers of {width} with "
        "SiLU; a backward pass through the network for a derivative is one more evaluation. Median of 7."]


RESULTS = {
    "objectives": (objectives, "every objective of one wrong score beside its Fisher divergence: mean, error, cost"),
    "trace-cost": (trace_cost, "thesis, Figs 3.4, 3.5: evaluations and time of the objectives over D"),
    "scores": (reproduce_scores.scores, "Fisher divergence of learned scores to the true ones at four noise levels"),
    "score-samples": (reproduce_scores.samples, "samples by Langevin, annealed and ancestral, beside the floor"),
    "fields": (reproduce_scores.fig_fields, "slides, panels (a) - (d), thesis, Fig. 3.3: data, scores, Langevin paths"),
    "modes": (reproduce_modes.modes, "weights of two modes by every sampler, from learned and from exact scores"),
    "modes-plane": (reproduce_modes.fig_plane, "slides: the error of learned scores between two modes"),
    "modes-steps": (reproduce_modes.fig_steps, "the weight of a mode over steps of Langevin dynamics"),
    "frozen": (reproduce_frozen.frozen, "poster: is the score update annealed Langevin? Its law at one noise level"),
    "frozen-laws": (reproduce_frozen.fig_frozen, "the same on the clusters: histograms beside both densities"),
    "energies": (reproduce_energies.energies, "energies beside -log p, curl, cost, samples and likelihood, --energy"),
    "energy-planes": (reproduce_energies.fig_planes, "learned energies beside the exact -log p, over the plane"),
    **reproduce_latent.RESULTS,
}
TABLES = ("objectives", "trace-cost", "scores", "score-samples", "modes", "frozen", "energies",
          *reproduce_latent.TABLES)
