r"""The two ends of the bound: how far z_1 is from the prior, and how well x is told from z_0 or z_1 (Foundations 3.2).

Read `ddpm.py` first. A decoder is -log p(x | z) of a Gaussian around a mean: for points its density, for images, which
have 256 grey levels, the probability of the level's bin.

Not here: the terms between, `losses.py` (continuous time) and `variance.py` (T steps).

    python decoders.py    # a Gaussian on the 256 levels, and the tanh that DDPM's code has in place of its integral
"""
import math

import torch


def nats(c):
    """Sum over all dimensions but the first: (B, ...) -> (B,)."""
    return c.flatten(1).sum(1)


def prior(x, schedule, t_min=1e-3):
    """KL of q(z_1 | x) = N(alpha x, sigma^2) from p(z_1) = N(0, alpha^2 + sigma^2), Eq. (3.6).

    x (B, ...) -> (B,) in nats. With r^2 = alpha^2 + sigma^2 it is
    1/2 (sigma^2 / r^2 + alpha^2 x^2 / r^2 - 1 - log(sigma^2 / r^2)), and alpha^2 / r^2 is
    sigmoid(logsnr) for every schedule.
    """
    return prior_at(x, schedule.ends(t_min)[0])


def prior_at(x, logsnr):
    """`prior` of z_1 at this log-SNR, a number or a tensor ()."""
    logsnr = torch.as_tensor(logsnr, dtype=x.dtype, device=x.device)
    return nats(0.5 * (torch.sigmoid(logsnr) * (x**2 - 1) + torch.nn.functional.softplus(logsnr)))


def gaussian(x, mean, log_var):
    """-log N(x; mean, e^log_var), the decoder of points: broadcastable -> x's shape, in nats."""
    return 0.5 * (math.log(2 * math.pi) + log_var + (x - mean)**2 * torch.exp(-log_var))


def log_ndtr(x):
    """Log of the normal distribution function, any shape.

    torch.special.log_ndtr has a wrong gradient in float32, 0.4 in place of 30,000 at -30,000, where a variance that is
    being learned may be. -2, not -1: at its own bound a clamp has no gradient.
    """
    y = x.cpu() if x.device.type == "mps" else x                                            # MPS has no erfcx
    tail = torch.log(torch.special.erfcx(-y.clamp(max=-1) / math.sqrt(2)) / 2) - 0.5 * y.clamp(max=-1)**2
    return torch.where(y < -1, tail, torch.log1p(-torch.special.erfc(y.clamp(min=-2) / math.sqrt(2)) / 2)).to(x.device)


def log_prob_level(x, mean, std):
    """Log-probability that N(mean, std^2) falls on the grey level x, one of 256 in [-1, 1].

    Broadcastable -> x's shape. The bins are 2 / 255 wide, and those of black and white reach to
    infinity, so that the 256 probabilities sum to 1: Foundations 3.2.4, Algorithm 2, with x itself
    in its tests (ERRATA.md, entry 14).
    """
    upper, lower = (x + 1 / 255 - mean) / std, (x - 1 / 255 - mean) / std
    upper = torch.where(x > 0.999, math.inf, upper)
    lower = torch.where(x < -0.999, -math.inf, lower)
    right = lower > 0                           # Phi(upper) - Phi(lower) cancels there: mirror it
    upper, lower = torch.where(right, -lower, upper), torch.where(right, -upper, lower)
    return log_ndtr(upper) + torch.log1p(-torch.exp(log_ndtr(lower) - log_ndtr(upper)))


def cdf_tanh(x):
    """The normal distribution function nearly, Foundations 3.9 (Page 1977): off by 1.8e-4 at most.

    DDPM's code and its followers decode with it; here it is shown beside the exact one.
    """
    return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def discretised(x, mean, log_var):
    """-log-probability of grey levels, the decoder of images: (B, ...) -> x's shape, in nats."""
    return -log_prob_level(x, mean, torch.exp(0.5 * log_var))


def reconstruction(x, eps, logsnr, decoder):
    """-log p(x | z_0) at z_0 = alpha x + sigma eps, of N(z_0 / alpha, sigma^2 / alpha^2): (B, ...) -> (B,) in nats.

    Of a Gaussian its mean over eps, whatever eps is given: eps enters as a square, whose mean is 1.
    """
    eps = torch.ones_like(x) if decoder is gaussian else eps
    log_var = torch.as_tensor(-logsnr, dtype=x.dtype, device=x.device)
    return nats(decoder(x, x + torch.exp(0.5 * log_var) * eps, log_var))


if __name__ == "__main__":
    levels = torch.linspace(-1, 1, 256, dtype=torch.float64)
    for mean, std in (0.0, 0.01), (0.99, 0.1), (3.0, 0.5):
        p = log_prob_level(levels, torch.tensor(mean, dtype=torch.float64), std).exp()
        print(f"N({mean}, {std}^2): the 256 probabilities sum to {p.sum():.12f}, the largest is {p.max():.4f}")
    z = torch.linspace(-5, 5, 10_001, dtype=torch.float64)
    print(f"tanh in place of the normal distribution function (Foundations 3.9): off by "
          f"{(cdf_tanh(z) - torch.special.ndtr(z)).abs().max():.1e} at most")
