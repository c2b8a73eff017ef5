r"""The diffusion: noise schedules, forward process, posterior (thesis 3.1.1, 3.1.2), SDE (slides).

Read this first, then `targets.py` (what the network predicts) and `losses.py` (how its errors are
weighed). Equation numbers are the thesis's; VDM is *Demystifying Variational Diffusion Models*
(Ribeiro and Glocker 2024), Foundations is *Foundations of Diffusion Models* (Grzybowski 2026),
slides are *Diffusion Models* (Beigy, lecture of 2025).

A noise schedule is its log signal-to-noise ratio, logsnr(t) = log(alpha^2 / sigma^2), strictly
decreasing in t in [0, 1], and a scale, which says how large alpha and sigma are at a log-SNR.
Everything else follows from the two. Times are tensors of shape (B,) or (), data are (B, ...);
every function works in float32 and float64, on any device (`edm` not on MPS). The ends t = 0 and
t = 1 of the cosine schedule are log-SNR +-infinity: training and sampling stay inside
[t_min, 1 - t_min]; with t_min = 1e-3 its log-SNR is +-12.9.

Not here: how samples are drawn (`samplers.py`), other variances of a step (`variance.py`),
schedules that are learned (`learned_schedule.py`).

    python ddpm.py        # alpha, sigma and log-SNR of every schedule; Fig. 3.2 has the first three
"""
import math
from dataclasses import dataclass
from typing import Callable, NamedTuple

import torch


def expand(c, x):
    """Give a coefficient c, (B,) or (), trailing axes, so that it multiplies x, (B, ...)."""
    return c.reshape(c.shape + (1,) * (x.ndim - c.ndim))


class Scale(NamedTuple):
    """The pair (alpha, sigma) as functions of log-SNR: any pair whose SNR decreases is one."""
    alpha: Callable
    sigma: Callable
    dlog_alpha: Callable           # d log(alpha) / d log-SNR as a function of (alpha, sigma)


# alpha^2 + sigma^2 = 1, alpha^2 = sigmoid(logsnr) (VDM A.3); 1 - alpha^2 would cancel near t = 0.
PRESERVING = Scale(lambda logsnr: torch.sigmoid(logsnr).sqrt(),
                   lambda logsnr: torch.sigmoid(-logsnr).sqrt(),
                   lambda alpha, sigma: 0.5 * sigma**2)
# alpha = 1
EXPLODING = Scale(torch.ones_like,
                  lambda logsnr: torch.exp(-0.5 * logsnr),
                  lambda alpha, sigma: torch.zeros_like(sigma))
# alpha + sigma = 1 (VDM 4.40)
STRAIGHT = Scale(lambda logsnr: torch.sigmoid(0.5 * logsnr),
                 lambda logsnr: torch.sigmoid(-0.5 * logsnr),
                 lambda alpha, sigma: 0.5 * sigma)


@dataclass(frozen=True)
class Schedule:
    """A noise schedule: logsnr(t), its derivative, what follows from them. All map (B,) -> (B,)."""
    logsnr: Callable
    dlogsnr: Callable
    scale: Scale = PRESERVING

    def alpha(self, t):
        """Signal coefficient of z = alpha x + sigma eps, Eq. (3.1)."""
        return self.scale.alpha(self.logsnr(t))

    def sigma(self, t):
        """Noise coefficient of z = alpha x + sigma eps, Eq. (3.1)."""
        return self.scale.sigma(self.logsnr(t))

    def snr(self, t):
        """SNR(t) = alpha^2 / sigma^2, Eq. (3.2)."""
        return torch.exp(self.logsnr(t))

    def dsnr(self, t):
        """SNR'(t) = SNR(t) dlogsnr(t); for the cosine schedule -pi alpha / sigma^3, Eq. (3.22)."""
        return self.snr(t) * self.dlogsnr(t)

    def t(self, logsnr):
        """The time of a log-SNR, any shape: inverse of logsnr(t), by bisection in float64 (CPU)."""
        wanted = logsnr.cpu().double()
        low, high = torch.zeros_like(wanted), torch.ones_like(wanted)
        for _ in range(60):
            middle = (low + high) / 2
            early = self.logsnr(middle) > wanted
            low, high = torch.where(early, middle, low), torch.where(early, high, middle)
        return middle.to(logsnr.dtype).to(logsnr.device)

    def ends(self, t_min):
        """log-SNR at 1 - t_min and t_min, two numbers: what training and sampling stay between."""
        return self.logsnr(torch.tensor([1 - t_min, t_min], dtype=torch.float64)).tolist()

    def drift(self, t):
        """f of dz = f z dt + g dw (slides): dlog(alpha)/dt; preserving -beta / 2, exploding 0."""
        return self.scale.dlog_alpha(self.alpha(t), self.sigma(t)) * self.dlogsnr(t)

    def diffusion_sq(self, t):
        """g^2 of dz = f z dt + g dw: dsigma^2/dt - 2 f sigma^2 = -sigma^2 dlogsnr; any schedule."""
        return -self.sigma(t)**2 * self.dlogsnr(t)


# alpha = cos(pi t / 2), Eq. (3.3).
# cos(pi t / 2) is written sin(pi (1 - t) / 2): right in float32 up to t = 1.
def cosine_logsnr(t):
    return 2 * (torch.sin(math.pi / 2 * (1 - t)).log() - torch.sin(math.pi / 2 * t).log())


def cosine_dlogsnr(t):
    return -math.pi / (torch.sin(math.pi / 2 * (1 - t)) * torch.sin(math.pi / 2 * t))


# VP-SDE, beta(t) = BETA_0 + (BETA_1 - BETA_0) t, alpha^2 = exp(-integral of beta)
# (Song et al. 2021, Eq. 32-33).
BETA_0, BETA_1 = 0.1, 20.0


def linear_logsnr(t):
    return -torch.expm1(BETA_0 * t + (BETA_1 - BETA_0) * t**2 / 2).log()


def linear_dlogsnr(t):
    beta = BETA_0 + (BETA_1 - BETA_0) * t
    return beta / torch.expm1(-BETA_0 * t - (BETA_1 - BETA_0) * t**2 / 2)


# Variance exploding, sigma geometric from SIGMA_0 to SIGMA_1 (Song et al. 2021, Eq. 31).
SIGMA_0, SIGMA_1 = 0.01, 50.0


def ve_logsnr(t):
    return -2 * (math.log(SIGMA_0) + t * math.log(SIGMA_1 / SIGMA_0))


def ve_dlogsnr(t):
    return torch.full_like(t, -2 * math.log(SIGMA_1 / SIGMA_0))


# Rectified flow, flow matching: alpha = 1 - t, sigma = t (VDM 4.38 - 4.49; Lipman et al. 2023).
def flow_logsnr(t):
    return 2 * ((1 - t) / t).log()


def flow_dlogsnr(t):
    return -2 / (t * (1 - t))


# DDPM: alpha^2 at t = i / 1000 is the product of 1 - beta_1 ... 1 - beta_i, beta_i equally spaced
# (Ho et al. 2020; Foundations 1.24).
def linear_betas(steps=1000):
    """beta_1 ... beta_steps in float64: 1e-4 to 0.02 times 1000 / steps (Foundations 1.25).

    So that the last alpha^2 is nearly that of 1000 steps if there are 500 or more; with 50 it is a
    fifth of it. Raises ValueError if steps <= 20, where the last beta would be 1 or more.
    """
    if steps <= 20:
        raise ValueError(f"steps must be at least 21, got {steps}: else the last beta is 1 or more")
    return torch.linspace(1e-4, 0.02, steps, dtype=torch.float64) * 1000 / steps


# 1 - beta_i = A - B i = B (R - i), and a product of those is B^k gamma(R) / gamma(R - k): smooth in
# k = 1000 t. Its log by Stirling's formula, which for R = 50,197 is exact in float64, in terms of
# one sign: nothing cancels, as it would in lgamma(R) - lgamma(R - k).
B = (0.02 - 1e-4) / 999
A = 1 - 1e-4 + B
R = A / B


def ddpm_log_alpha_sq(t):
    k, u = 1000 * t, 1000 * t / R
    integral = math.log(A) * k - R * sum(u**n / (n * (n - 1)) for n in range(2, 9))
    return integral + 0.5 * torch.log1p(-u) - u / (1 - u) / (12 * R)


def ddpm_logsnr(t):
    log_alpha_sq = ddpm_log_alpha_sq(t)
    return log_alpha_sq - (-torch.expm1(log_alpha_sq)).log()


def ddpm_dlogsnr(t):
    rest = R - 1000 * t                                            # below: log B + digamma(rest)
    slope = math.log(A) + torch.log1p(-1000 * t / R) - 0.5 / rest - 1 / (12 * rest**2)
    return 1000 * slope / -torch.expm1(ddpm_log_alpha_sq(t))


# Improved DDPM: alpha proportional to cos(C (t + S)), C = pi / (2 (1 + S)), and beta at most 0.999,
# which acts in the last of 1000 steps alone (Nichol and Dhariwal 2021, Eq. 17 f.).
S, LAST, CAP = 0.008, 0.999, 1000 * math.log(1 - 0.999)
C = math.pi / 2 / (1 + S)


def iddpm_log_alpha_sq(t):
    before = t.clamp(max=LAST)
    return 2 * (torch.sin(C * (1 - before)).log() - math.log(math.cos(C * S))) + CAP * (t - before)


def iddpm_var(t):
    """sigma^2: cos^2 a - cos^2 b = sin(b + a) sin(b - a), which does not cancel near t = 0."""
    early = torch.sin(C * (t + 2 * S)) * torch.sin(C * t) / math.cos(C * S)**2
    return torch.where(t < 0.5, early, -torch.expm1(iddpm_log_alpha_sq(t)))


def iddpm_logsnr(t):
    return iddpm_log_alpha_sq(t) - iddpm_var(t).log()


def iddpm_dlogsnr(t):
    slope = torch.where(t < LAST, -2 * C / torch.tan(C * (1 - t)), CAP)
    return slope / iddpm_var(t)


# EDM, in training: log(sigma) ~ N(-1.2, 1.2^2) for t uniform (Karras et al. 2022, Table 1).
P_MEAN, P_STD = -1.2, 1.2


def edm_logsnr(t):
    return -2 * (P_MEAN + P_STD * torch.special.ndtri(t))


def edm_dlogsnr(t):
    density = torch.exp(-0.5 * torch.special.ndtri(t)**2) / math.sqrt(2 * math.pi)
    return -2 * P_STD / density


SCHEDULES = {
    "cosine": Schedule(cosine_logsnr, cosine_dlogsnr),
    "linear": Schedule(linear_logsnr, linear_dlogsnr),
    "ve":     Schedule(ve_logsnr, ve_dlogsnr, EXPLODING),
    "flow":   Schedule(flow_logsnr, flow_dlogsnr, STRAIGHT),
    "ddpm":   Schedule(ddpm_logsnr, ddpm_dlogsnr),
    "iddpm":  Schedule(iddpm_logsnr, iddpm_dlogsnr),
    "edm":    Schedule(edm_logsnr, edm_dlogsnr, EXPLODING),
}


def fixed(name):
    """The schedule of a run by name; the cosine, the network's clock, where it is learned."""
    return SCHEDULES["cosine" if name == "learned" else name]


def standardise(z, t, schedule):
    """z divided by sqrt(alpha^2 + sigma^2), its standard deviation for standardised data.

    It is what networks are given; c_in of Karras et al. 2022, Table 1. The divisor is 1 for every
    variance preserving schedule; it keeps z of an exploding one (sigma up to 50) in range.
    """
    if schedule is None or schedule.scale is PRESERVING:
        return z
    return z * expand((schedule.alpha(t)**2 + schedule.sigma(t)**2).rsqrt(), z)


def q_sample(x, t, eps, schedule):
    """Draw z ~ q(z_t | x), Eq. (3.1): z = alpha x + sigma eps; x, eps, z (B, ...), t (B,)."""
    alpha, sigma = expand(schedule.alpha(t), x), expand(schedule.sigma(t), x)
    return alpha * x + sigma * eps                                 # Eq. (3.3)


def alpha_ts(s, t, schedule):
    """alpha_{t|s} of q(z_t | z_s), s < t, below Eq. (3.1). (B,) -> (B,)."""
    return schedule.alpha(t) / schedule.alpha(s)


def one_minus_snr_ratio(s, t, schedule):
    """1 - SNR(t) / SNR(s), s < t: (B,) -> (B,) in [0, 1]. expm1: near s = t, 1 - ratio cancels."""
    return -torch.expm1(schedule.logsnr(t) - schedule.logsnr(s))


def var_ts(s, t, schedule):
    """sigma^2_{t|s} = sigma_t^2 - alpha_{t|s}^2 sigma_s^2, below Eq. (3.1). (B,) -> (B,)."""
    return schedule.sigma(t)**2 * one_minus_snr_ratio(s, t, schedule)


def posterior_coefficients(s, t, schedule):
    r"""A, B and var of q(z_s | z_t, x) = N(A z + B x, var), Eq. (3.9), s < t: (B,) -> three (B,).

    A    = alpha_{t|s} sigma_s^2 / sigma_t^2,   B = alpha_s sigma^2_{t|s} / sigma_t^2     Eq. (3.11)
    var  = sigma^2_{t|s} sigma_s^2 / sigma_t^2                              VDM A.21, Eq. (3.10)
    """
    c = one_minus_snr_ratio(s, t, schedule)                        # sigma^2_{t|s} / sigma_t^2
    sigma_ratio_sq = (schedule.sigma(s) / schedule.sigma(t))**2
    return (alpha_ts(s, t, schedule) * sigma_ratio_sq, schedule.alpha(s) * c,
            schedule.sigma(s)**2 * c)


def posterior(z, x, s, t, schedule):
    """Mean and variance of q(z_s | z_t, x), Eq. (3.9), for s < t; s = 0 and t = 1 are allowed.

    z, x (B, ...), s, t (B,) or () -> mean (B, ...), var (B, 1, ...) or (1, ...), per dimension.
    """
    A, B, var = posterior_coefficients(s, t, schedule)
    return expand(A, z) * z + expand(B, x) * x, expand(var, z)


if __name__ == "__main__":
    for name, schedule in SCHEDULES.items():
        print(f"{name}\n      t    alpha     sigma   log-SNR   d log-SNR / dt")
        for t in torch.tensor([0.001, 0.25, 0.5, 0.75, 0.999]):
            print(f"  {t:.3f} {schedule.alpha(t):8.4f} {schedule.sigma(t):9.4f}"
                  f" {schedule.logsnr(t):9.3f} {schedule.dlogsnr(t):12.3f}")
    print("beta rescaled: the last alpha^2 of "
          + ", ".join(f"{n} steps {torch.prod(1 - linear_betas(n)):.3g}" for n in (4000, 1000, 50)))
