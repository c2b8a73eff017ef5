r"""Times drawn where the loss is large: the adaptive noise schedule (VDM 4.6; Kingma and Gao 2023).

Read `losses.py` first, whose `draw_t` has the densities of t that are fixed. With lambda = log-SNR a loss is

    L = 1/2 E_{lambda ~ p, eps}[ w(lambda) / p(lambda) |eps - eps_hat|^2 ]                      VDM 4.123

the same for every p > 0, but its variance is not: for one draw the integral of E[l^2] / p, minus L^2, where l(lambda)
= 1/2 w |eps - eps_hat|^2. The range of log-SNR has 100 equal bins, and training keeps what it sees in each:

    adaptive      p ~ E[l]              VDM 4.130: the mean of what is averaged is then the same in all bins
    loss_aware    p ~ sqrt(E[l^2])      the least variance there is, which the document's p has not

The latter is also what steps of a chain are drawn with (`losses.draw_step`). A thousandth is uniform, so that p > 0. In
a bin t is uniform: its density is known exactly, and needs no inverse of the schedule.

Not here: learned schedules.

    python adaptive.py    # std / mean of one draw of the NELBO of the exact denoiser, for each density
"""
import functools

import torch

import ddpm
import losses

BINS = 100
POWERS = {"adaptive": 1, "loss_aware": 2}      # p ~ E[l^power]^(1 / power)


class Bins:
    """n equal bins of log-SNR for t in [t_min, 1 - t_min], numbered 1..n as the steps of a `discrete.Chain` are.

    `times` (n + 1,), increasing, float64; `share` (n,): the part of the range of t that is in each.
    """

    def __init__(self, schedule, t_min, n=BINS):
        low, high = schedule.ends(t_min)
        self.steps, self.times = n, schedule.t(torch.linspace(high, low, n + 1, dtype=torch.float64))
        self.share = self.times.diff() / (1 - 2 * t_min)

    def index(self, t):
        """The bin of times t, any shape."""
        return torch.searchsorted(self.times.to(t), t.contiguous()).clamp(1, self.steps)


bins = functools.lru_cache(64)(Bins)


def draw_bins(shape, schedule, t_min=1e-3, p=None, generator=None, dtype=torch.float32):
    """Draw t with p (n,) in proportion to the probability of each bin -> t, its importance, as `losses.draw_t`.

    None: all bins alike. The importance is share / p of the bin, since 1 / (p(t) (1 - 2 t_min)) is.
    """
    of, u = bins(schedule, t_min), losses.sample_t(shape, 0.0, generator, dtype)
    i, inside, p = losses.bin_of(u.cpu().double(), torch.ones(of.steps) if p is None else p)
    return (of.times[i] + inside * of.times.diff()[i]).to(u), (of.share[i] / p).to(u)


def draw(shape, config, moments=None, generator=None):
    """Draw t as the settings of a run say -> t, its importance. moments: what `moved` returned last, or None."""
    density, chain = config["t_density"], losses.chain_of(config)
    if chain:
        return losses.draw_step(shape, chain, moments, generator)
    schedule, t_min = ddpm.SCHEDULES[config["schedule"]], config["t_min"]
    if density in POWERS:
        p = None if moments is None else moments ** (1 / POWERS[density])
        return draw_bins(shape, schedule, t_min, p, generator)
    return losses.draw_t(shape, schedule, t_min, density, generator)


def moved(moments, t, errors, rate, config):
    """The means of l^power in each bin, (n,), moved by `rate` to those of errors at times t, (N,) without importance.

    l is an error times the bin's share of t times n: what it would be drawn with, were all bins drawn alike. Of a chain
    it is the error. moments None: they begin as the mean over all. Bins that were not drawn stay as they are.
    """
    chain = losses.chain_of(config)
    of = chain or bins(ddpm.SCHEDULES[config["schedule"]], config["t_min"])
    i = of.index(t) - 1
    powers = (errors if chain else of.steps * of.share.to(errors)[i] * errors) ** POWERS[config["t_density"]]
    moments = powers.mean().expand(of.steps) if moments is None else moments
    zeros = torch.zeros_like(moments)
    counts, sums = zeros.index_add(0, i, torch.ones_like(powers)), zeros.index_add(0, i, powers)
    return torch.where(counts > 0, (1 - rate) * moments + rate * sums / counts, moments)


def one_draw(data, density, schedule, t_min=1e-3, target="v", loss="nelbo", n=200_000, seed=0):
    """Draws of a loss of the exact denoiser of a dataset, importance and all, (n,), float64, and the moments or None.

    A density of POWERS is adapted to as many draws before, with all bins alike: theirs are the moments.
    """
    g, moments = torch.Generator().manual_seed(seed), None
    config = dict(schedule=schedule, t_min=t_min, t_density=density, target=target, loss=loss, stabiliser=0.0)
    model = data.optimal_model(target, ddpm.SCHEDULES[schedule])
    for _ in range(2 if density in POWERS else 1):
        x = data.sample(n, g, torch.float64)
        t, importance = (c.double() for c in draw((n,), config, moments, g))
        errors = losses.loss(model, x, t, torch.randn(x.shape, generator=g, dtype=torch.float64),
                             **losses.objective(config))
        before, moments = moments, moved(moments, t, errors, 1.0, config) if density in POWERS else None
    return errors * importance, before


if __name__ == "__main__":
    from datasets2d import DATASETS
    t_min = ddpm.SCHEDULES["cosine"].t(torch.tensor(9.0, dtype=torch.float64)).item()      # log-SNR from -9 to 9
    print(f"{'NELBO, cosine':14s}   one draw, std / mean      mean, nats")
    for name, n in ("clusters", 400_000), ("rings", 40_000):
        for density in losses.T_DENSITIES:
            terms, _ = one_draw(DATASETS[name], density, "cosine", t_min, n=n)
            mean, std = terms.mean(), terms.std()
            nats = 2 * (1 - 2 * t_min)                                                     # two dimensions
            print(f"{name:9s}{density:11s}{std / mean:12.3f}{nats * mean:20.3f} +- {nats * std / len(terms)**0.5:.3f}")
