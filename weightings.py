r"""Every loss as one weight of the log-SNR (VDM 4.4, 4.5; Kingma and Gao 2023, Table 1).

Read `losses.py` first, whose LOSSES has the rows of this file. With lambda = log-SNR all losses are, for t ~ U(0, 1),

    E_t[weight(t) * error of the target] = 1/2 * integral of w(lambda) * error of eps_hat, d lambda      VDM 4.113
    w(lambda) = 2 p(lambda) * weight(t) * (det / alpha)^2,       p(lambda) = -dt / d lambda              VDM 4.102

errors squared, means over dimensions. No factor is left open: `nelbo` has w = 1 for every target and schedule. Where w
nowhere rises with lambda the loss is a bound too, of data with Gaussian noise added (VDM 4.7). In closed form, exact,
for the weight 1 (`mse`):

    2 p(lambda)         cosine  sech(lambda / 2) / pi           flow  sech(lambda / 4)^2 / 4
                        edm     2 N(lambda; 2.4, 2.4^2)         ve    1 / log(5000)
                        linear  2 / (beta (1 + e^lambda)),  beta^2 = 0.01 + 39.8 log(1 + e^-lambda)
    (det / alpha)^2     eps  1      x  e^-lambda      F  1 + e^-lambda      u  (1 + e^(-lambda / 2))^2
                        v    (1 + e^-lambda)^2 alpha^2, preserving: 1 + e^-lambda
                        s    1 / sigma^2,               preserving: 1 + e^lambda

and so w is sech(lambda / 2) / pi for eps with cosine, 2 / pi e^(-lambda / 2) for v with cosine, e^(-lambda / 2) for u
with flow (flow matching), e^-lambda sech(lambda / 4)^2 / 4 for x with flow, and 2 / pi e^(lambda / 2), which rises, for
s with cosine.

Not here: which weight learns what.

    python weightings.py    # w of mse with the cosine schedule beside the rows of WEIGHTINGS, over log-SNR
"""
import math

import torch

import ddpm
import targets

BIAS, GAMMA = 2.0, 5.0
MEAN, STD = -2 * ddpm.P_MEAN, 2 * ddpm.P_STD               # of log-SNR in the training of EDM
PEAK = -3.1153158                                          # the log-SNR where the weight of EDM is largest


def sech(x):
    return 1 / torch.cosh(x)


def sigmoid(logsnr, bias=BIAS):
    """Kingma and Gao 2023: 1 for much noise, down to 1/2 at log-SNR = bias."""
    return torch.sigmoid(bias - logsnr)


def edm(logsnr):
    """The training of EDM, `mse` of F with schedule edm: w = 2 N(lambda; 2.4, 2.4^2) (1 + e^-lambda).

    For data of variance 1; Karras et al. 2022 have (e^-lambda + 0.25) / 0.25 in it, for images of deviation 0.5.
    """
    normal = torch.exp(-0.5 * ((logsnr - MEAN) / STD)**2) / (math.sqrt(2 * math.pi) * STD)
    return 2 * normal * (1 + torch.exp(-logsnr))


# w(lambda), whatever the schedule: such a loss is w times `nelbo`.
OF_LOGSNR = {
    "elbo":          torch.ones_like,                                           # `nelbo` itself
    "sigmoid":       sigmoid,
    "edm":           edm,
    "edm_monotonic": lambda logsnr: edm(logsnr.clamp(min=PEAK)),                # Kingma and Gao 2023: and flat below
}
# Factors of the error of eps_hat, whatever the schedule: w is 2 p(lambda) times that, another one with each.
OF_EPS = {
    "simple":       torch.ones_like,                                            # Ho et al. 2020, VDM 4.91
    "min_snr":      lambda logsnr: (GAMMA * torch.exp(-logsnr)).clamp(max=1),   # min(SNR, 5) of x_hat, Hang et al. 2023
    "soft_min_snr": lambda logsnr: GAMMA / (torch.exp(logsnr) + GAMMA),         # Crowson et al. 2024, gamma 4 there
    "trunc_snr":    lambda logsnr: torch.exp(-logsnr).clamp(min=1),             # max(SNR, 1) of x_hat, Salimans and Ho
    "p2":           lambda logsnr: 1 / (1 + torch.exp(logsnr)),                 # k = gamma = 1, Choi et al. 2022
}


def with_cosine(factor):
    """w(lambda) of a factor of the error of eps_hat with the cosine schedule, as in Kingma and Gao's Table 1."""
    return lambda logsnr: sech(logsnr / 2) / math.pi * factor(logsnr)


WEIGHTINGS = OF_LOGSNR | {name: with_cosine(factor) for name, factor in OF_EPS.items()}
# Does w of WEIGHTINGS nowhere rise with log-SNR?
MONOTONIC = {"elbo": True, "sigmoid": True, "edm": False, "edm_monotonic": True, "simple": False, "min_snr": False,
             "soft_min_snr": False, "trunc_snr": True, "p2": False}


def falls(w):
    """Does w, its values from low to high log-SNR, nowhere rise? A bool; (n,)."""
    return bool((w[1:] <= w[:-1] * (1 + 1e-9)).all())


# The rows of `losses.LOSSES`

def row(factor, of_nelbo):
    """A weight of `losses.LOSSES`: a function of log-SNR times that of `nelbo`, or else of the error of eps_hat."""
    def weight(target, alpha, sigma, det, dlogsnr):
        logsnr = 2 * torch.log(alpha / sigma)
        return factor(logsnr) * (alpha / det)**2 * (-0.5 * dlogsnr if of_nelbo else 1)
    return weight


ROWS = {name: row(w, True) for name, w in OF_LOGSNR.items() if name != "elbo"} | {
    name: row(factor, False) for name, factor in OF_EPS.items()}


# What a loss amounts to

def time(schedule, logsnr):
    """The t of a log-SNR; ValueError if the schedule has none."""
    t = schedule.t(logsnr)
    if not torch.allclose(schedule.logsnr(t), logsnr, rtol=1e-6, atol=1e-6):
        low, high = schedule.logsnr(torch.tensor([1.0, 0.0], dtype=torch.float64)).tolist()
        raise ValueError(f"the schedule has log-SNR from {low:.4g} to {high:.4g} - take values between")
    return t


def density(schedule, logsnr):
    """p(lambda) of log-SNR for t ~ U(0, 1), VDM 4.102: (n,) -> (n,). ValueError outside of the schedule's range."""
    return -1 / schedule.dlogsnr(time(schedule, logsnr))


def implied(loss, target, schedule, logsnr):
    """w(lambda) of a loss of LOSSES, a target and a schedule, for t uniform: (n,) -> (n,), float64 as logsnr should be.

    With t ~ U(t_min, 1 - t_min) the loss is the integral over that range divided by 1 - 2 t_min. Raises ValueError
    outside of the schedule's range, and where `losses.weight` does: of a discrete chain there is no p(lambda).
    """
    import losses  # not above: its LOSSES has the rows of this file

    t = time(schedule, logsnr)
    alpha, sigma = schedule.alpha(t), schedule.sigma(t)
    det = targets.determinant(target, alpha, sigma)
    return -2 / schedule.dlogsnr(t) * losses.weight(loss, target, t, schedule) * (det / alpha)**2    # 2 p(lambda) * ...


# What a weight that falls is

def augmented(w, bound):
    """L_w by parts, VDM 4.145: the integral of p_w times L(lambda), and the rest, of the ends: two numbers.

    Both (n,), from much noise to little. bound: L(lambda), 1/2 the integral of the error of eps_hat from the first
    log-SNR to this one, which is -ELBO of data with that noise, minus the entropy of the noise (4.158); it starts with
    0, or with the KL of the prior. If w falls, p_w = -dw/dlambda (4.150) is w[0] - w[-1] times a density, and L_w, but
    for the ends, the bound of data with Gaussian noise added. Where w rises p_w is negative, and L_w no bound.
    """
    p_w = -w.diff()                                                        # times the step of log-SNR
    return (p_w * (bound[1:] + bound[:-1]) / 2).sum(), w[-1] * bound[-1] - w[0] * bound[0]


def negative(w):
    """Which part of the mass of |p_w| is where w rises: w (n,) from much noise to little -> a number; nan if flat."""
    steps = w.diff()[w.diff().abs() > 1e-9 * w.abs().max()]
    return (steps.clamp(min=0).sum() / steps.abs().sum()).item()


if __name__ == "__main__":
    logsnr = torch.linspace(-8, 8, 9, dtype=torch.float64)
    print(f"{'log-SNR':22s}" + "".join(f"{value:10.0f}" for value in logsnr) + "   falls")
    line = lambda name, w: print(f"{name:22s}" + "".join(f"{value:10.3g}" for value in w) + f"   {falls(w)}")
    for target, schedule in ("x", "cosine"), ("eps", "cosine"), ("v", "cosine"), ("s", "cosine"), ("u", "flow"):
        line(f"mse of {target}, {schedule}", implied("mse", target, ddpm.SCHEDULES[schedule], logsnr))
    for name, w in WEIGHTINGS.items():
        line(name, w(logsnr))
