"""Poster: "the score based update step is annealed Langevin dynamics". Its law with the score of one noise level.

Part of `reproduce_slides.py`, which says what the functions are. The update x + beta (score + x / 2) + sqrt(beta) w
has the drift of Langevin dynamics, and x / 2, with half the variance: what is stationary under it is not p_t but
p_t^2 / N(0, I), in proportion.
"""
import functools

import torch

import ddpm
import plots_slides
import run
from datasets2d import DATASETS, GaussianMixture
from study import rows

T, FROZEN = 1000, (100, 300)           # of the chain of Ho et al.; times at which its update is frozen
STEPS, COPIES = 2000, 10_000
UPDATE, LANGEVIN = "DDPM's update", "Langevin dynamics"


def alpha_sigma_beta(i):
    """Of step i of the chain, three numbers."""
    betas = ddpm.linear_betas(T)
    alpha_sq = torch.prod(1 - betas[:i]).item()
    return alpha_sq**0.5, (1 - alpha_sq)**0.5, betas[i - 1].item()


def stationary(v):
    """Variance of p^2 / N(0, 1) for p = N(0, v)."""
    return v / (2 - v)


def stationary_of_update(v, beta):
    """Variance that x + beta (score + x / 2) + sqrt(beta) w keeps, for p = N(0, v): a little more than in the limit."""
    slope = 1 - beta * (1 / v - 0.5)
    return beta / (1 - slope**2)


@torch.no_grad()
def simulated(score, x, beta, generator, update=True):
    """The poster's update with one score, again and again; or Langevin dynamics of that step, without x / 2."""
    for _ in range(STEPS):
        w = torch.randn(x.shape, generator=generator, dtype=x.dtype)
        if update:
            x = x + beta * (score(x) + x / 2) + beta**0.5 * w
        else:
            x = x + beta * score(x) + (2 * beta)**0.5 * w
    return x


def axis_of_law(data, alpha, sigma, n=401, limit=6.0):
    """Densities of axis 1 of p_t and of p_t^2 / N(0, I), by quadrature -> grid, two (n,), each of integral 1."""
    line = torch.linspace(-limit, limit, n, dtype=torch.float64)
    z = torch.stack(torch.meshgrid(line, line, indexing="ij"), -1).flatten(0, 1)
    log_p = data.log_prob(z, alpha, sigma)
    return line, *(log.softmax(0).unflatten(0, (n, n)).sum(1) / (line[1] - line[0])
                   for log in (log_p, 2 * log_p + 0.5 * z.square().sum(1)))


@functools.cache
def of_frozen(data, i):
    """Of axis 1: {"p", "law", UPDATE, LANGEVIN: moments}, the points of the last two, the densities of the first."""
    alpha, sigma, beta = alpha_sigma_beta(i)
    mixture = DATASETS["clusters"] if data == "clusters" else GaussianMixture(
        torch.zeros(1, 2, dtype=torch.float64), torch.full((2,), 0.2, dtype=torch.float64))
    g = run.generator("cpu", "frozen", i)
    x = mixture.sample(COPIES, g, torch.float64)
    start = alpha * x + sigma * torch.randn(x.shape, generator=g, dtype=torch.float64)
    points = {name: simulated(lambda x: mixture.score(x, alpha, sigma), start, beta, g, name == UPDATE)
              for name in (UPDATE, LANGEVIN)}
    line, *densities = axis_of_law(mixture, alpha, sigma)
    centre = alpha * mixture.centres[:, 0].abs().max()
    moments = {"variance": lambda x: x**2, "around a centre": lambda x: (x.abs() - centre)**2}
    found = {name: {key: ((density * of(line)).sum() / density.sum()).item() for key, of in moments.items()}
             for name, density in zip(("p", "law"), densities)}
    found |= {name: {key: of(x[:, 0]).mean().item() for key, of in moments.items()} for name, x in points.items()}
    return found, points, (line, *densities)


def frozen(study):
    """What is stationary under the poster's update with the score of one noise level."""
    lines = []
    for data in "N(0, 0.04)", "clusters":
        for i in FROZEN:
            found, *_ = of_frozen(data, i)
            for key in ["variance"] + ["around a centre"] * (data == "clusters"):
                lines.append([data, str(i), key, *(f"{found[name][key]:.4f}"
                                                   for name in ("p", LANGEVIN, "law", UPDATE)),
                              f"{stationary_of_update(found['p'][key], alpha_sigma_beta(i)[2]):.4f}"
                              if data != "clusters" else "-"])
    return rows(["data", "step i of 1,000", "of axis 1", "p_t", "Langevin dynamics", "p_t^2 / N(0, I)", "the update",
                 "the update, closed form"], lines) + [
        f"The exact score of p_t, at one t, in {STEPS:,} steps of {COPIES:,} chains that start in p_t. The update: "
        "x + beta (score + x / 2) + sqrt(beta) w, DDPM's but for terms of order beta^2. Langevin dynamics: x + beta "
        "score + sqrt(2 beta) w. Quadrature for both densities; for Gaussian data of variance v they have v "
        "and v / (2 - v), and the update's own steps a little more. Standard error of a simulated variance: "
        f"{(2 / COPIES)**0.5:.3f} of it, for Gaussian data."]


def fig_frozen(study, path):
    """Histograms of axis 1 of the clusters beside p_t and p_t^2 / N(0, I)."""
    plots_slides.laws({f"step {i} of {T:,}": of_frozen("clusters", i)[1:] for i in FROZEN}, path)
