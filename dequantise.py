r"""Grey levels with noise: how images, which have 256 levels, get a density for the flow (Theis et al. 2016).

Read `decoders.py` first. With noise u ~ q(u | x) inside the level's bin, |u| <= 1/255, and a density p,

    -log P(x) = -log of the integral of p over x's bin <= E[log q(u | x) - log p(x + u)]

which is tight where q is p's shape inside the bin. Two q, each dimension alone:

    uniform             q = 255 / 2
    truncated-normal    q = N(u; 0, s^2) / Z,    Z = P(|s eps| <= 1/255),    s = sigma / alpha at t_min

A network was trained on z_0 = alpha x + sigma eps = alpha (x + s eps), and so p, that of the flow from z_0, has a peak
of the width s at every level. With the truncated normal it sees what it was trained on (i-DODE, Zheng et al. 2023,
3.1); for a p that is right and levels that do not overlap the bound is then loose by -log Z: 0.018 bits/dim with the
cosine schedule and t_min = 0.001. Uniform noise lies beside the peaks, too.

Not here: the flow itself (`flow.py`).

    python dequantise.py    # one pixel of known entropy and its own density: what each of the two costs
"""
import math

import torch

import targets
from ddpm import expand
from decoders import nats

HALF = 1 / 255                                              # of a bin: levels in [-1, 1] are 2 / 255 apart


def uniform(x, std, generator=None):
    """x + u, u uniform in the bin, and log q(u | x): (B, ...) -> (B, ...), (B,) in nats. std is not used."""
    u = HALF * (2 * torch.rand(x.shape, generator=generator, device=x.device, dtype=x.dtype) - 1)
    return x + u, nats(torch.full_like(x, -math.log(2 * HALF)))


def truncated_normal(x, std, generator=None):
    """x + u, u ~ N(0, std^2) where that is in the bin, and log q(u | x): (B, ...) -> (B, ...), (B,) in nats."""
    Z = math.erf(HALF / std / math.sqrt(2))
    share = 2 * torch.rand(x.shape, generator=generator, device=x.device, dtype=x.dtype) - 1
    u = (std * math.sqrt(2) * torch.special.erfinv(Z * share)).clamp(-HALF, HALF)       # in float32 Z may be 1
    return x + u, nats(-0.5 * (u / std)**2 - math.log(math.sqrt(2 * math.pi) * std * Z))


DEQUANTISATIONS = {"uniform": uniform, "truncated-normal": truncated_normal}


LEVELS = torch.linspace(-1, 1, 256, dtype=torch.float64)


def log_prob(z, p, alpha, sigma):
    """Log-density of z = alpha x + sigma eps for one pixel x with probabilities p (256,): (B, 1) -> (B,)."""
    return torch.logsumexp(p.log() - 0.5 * ((z - alpha * LEVELS) / sigma)**2, 1) - math.log(
        math.sqrt(2 * math.pi) * sigma)


def optimal_model(p, target, schedule):
    """The best possible network for one pixel: model(z, t) -> E[y | z], z (B, 1), t (B,); as in `datasets2d.py`."""
    def model(z, t):
        alpha, sigma = expand(schedule.alpha(t), z), expand(schedule.sigma(t), z)
        a, b = targets.coefficients(target, alpha, sigma)
        x_hat = (torch.softmax(p.log() - 0.5 * ((z - alpha * LEVELS) / sigma)**2, 1) * LEVELS).sum(1, keepdim=True)
        return a * x_hat + b * (z - alpha * x_hat) / sigma
    return model


def pixels():
    """Probabilities of the 256 levels, {name: (256,)}: all alike, every eighth, and a normal in the middle."""
    normal = torch.exp(-0.5 * (LEVELS / 0.1)**2)
    return {"256 levels": torch.ones(256, dtype=torch.float64) / 256,
            "every 8th": (torch.arange(256) % 8 == 4).double() / 32, "normal": normal / normal.sum()}


if __name__ == "__main__":
    from ddpm import SCHEDULES
    schedule, t = SCHEDULES["cosine"], torch.tensor(1e-3, dtype=torch.float64)
    alpha, sigma = schedule.alpha(t).item(), schedule.sigma(t).item()
    print(f"bits/dim, the density of z_0 / alpha at t = 0.001, s = {255 * sigma / alpha:.2f} / 255\n"
          f"{'':12s}{'entropy':>10s}" + "".join(f"{name:>20s}" for name in DEQUANTISATIONS))
    for name, p in pixels().items():
        g, cells = torch.Generator().manual_seed(0), ""
        x = LEVELS[torch.multinomial(p, 100_000, replacement=True, generator=g), None]
        for dequantise in DEQUANTISATIONS.values():
            spread, log_q = dequantise(x, sigma / alpha, g)
            log_p = log_prob(alpha * spread, p, alpha, sigma) + math.log(alpha)
            cells += f"{(log_q - log_p).mean() / math.log(2):20.4f}"
        print(f"{name:12s}{-torch.special.xlogy(p, p).sum() / math.log(2):10.4f}{cells}")
