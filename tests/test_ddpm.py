"""The process against the thesis's formulas typed again, joint Gaussians, quadrature and autograd."""
import math

import numpy as np
import pytest
import torch
from torch.testing import assert_close

import ddpm
from ddpm import SCHEDULES

F64 = torch.float64
T = torch.cat([torch.tensor([1e-4, 1e-3]), torch.linspace(0.01, 0.99, 99), torch.tensor([0.999, 0.9999])]).to(F64)
PAIRS = [(s, t) for s in (0.001, 0.1, 0.5, 0.9, 0.998) for t in (0.0011, 0.11, 0.5001, 0.95, 0.999) if s < t]
S_, T_ = torch.tensor(PAIRS, dtype=F64).T

def linear(t):
    """The integral of beta over [0, t] by quadrature."""
    u = (torch.arange(20_000, dtype=F64) + 0.5) / 20_000
    integral = torch.stack([(0.1 + 19.9 * u * v).mean() * v for v in t])
    return torch.exp(-integral / 2), torch.sqrt(1 - torch.exp(-integral))


def gamma_ratio(t):
    """DDPM: the log of B^k gamma(R) / gamma(R - k) is the integral of log B + digamma(R - v) over v in [0, k]."""
    b = 0.0199 / 999
    nodes, weights = map(torch.from_numpy, np.polynomial.legendre.leggauss(8))
    v = 1000 * t[:, None] * (1 + nodes) / 2
    integrand = math.log(b) + torch.digamma((1 - 1e-4 + b) / b - v)
    log_alpha_sq = 1000 * t / 2 * (weights * integrand).sum(1)
    return torch.exp(log_alpha_sq / 2), torch.sqrt(-torch.expm1(log_alpha_sq))


def iddpm(t):
    """f(t) / f(0), and in the last of 1000 steps the product with 1 - beta = 0.001 to the power of the part of it."""
    f = lambda t: torch.cos((t + 0.008) / 1.008 * math.pi / 2)**2
    alpha_sq = f(t.clamp(max=0.999)) / f(torch.zeros_like(t)) * 0.001**(1000 * (t - 0.999).clamp(min=0))
    return alpha_sq.sqrt(), (1 - alpha_sq).sqrt()


DEFINITIONS = {     # alpha and sigma; a schedule that is added is tested once its textbook definition is here
    "cosine": lambda t: (torch.cos(math.pi * t / 2), torch.sin(math.pi * t / 2)),              # Eq. (3.3)
    "linear": linear,
    "ve": lambda t: (torch.ones_like(t), 0.01 * (50 / 0.01)**t),
    "flow": lambda t: (1 - t, t),                                                              # VDM 4.40
    "ddpm": gamma_ratio,
    "iddpm": iddpm,
    "edm": lambda t: (torch.ones_like(t),                                                      # Karras et al., Table 1
                      torch.exp(-1.2 + 1.2 * torch.distributions.Normal(0.0, 1.0).icdf(t))),
}
every_schedule = pytest.mark.parametrize("name", DEFINITIONS)


def alpha_sigma(name, t):
    return DEFINITIONS[name](t)


@every_schedule
def test_alpha_sigma_snr_are_their_definitions(name):
    alpha, sigma = alpha_sigma(name, T)
    schedule = SCHEDULES[name]
    assert_close(schedule.alpha(T), alpha, rtol=1e-9, atol=0)
    assert_close(schedule.sigma(T), sigma, rtol=1e-9, atol=0)
    assert_close(schedule.snr(T), alpha**2 / sigma**2, rtol=1e-8, atol=0)                      # Eq. (3.2)
    assert_close(schedule.logsnr(T), torch.log(alpha**2 / sigma**2), rtol=1e-8, atol=1e-9)
    assert (schedule.logsnr(T).diff() < 0).all()


@every_schedule
def test_derivatives_are_those_of_autograd(name):
    schedule, t = SCHEDULES[name], T.clone().requires_grad_()
    for value, derivative in ("logsnr", "dlogsnr"), ("snr", "dsnr"):
        expected, = torch.autograd.grad(getattr(schedule, value)(t).sum(), t)
        assert_close(getattr(schedule, derivative)(T), expected, rtol=1e-9, atol=0)


def test_dsnr_of_cosine_is_equation_3_22():
    alpha, sigma = alpha_sigma("cosine", T)
    assert_close(SCHEDULES["cosine"].dsnr(T), -math.pi * alpha / sigma**3, rtol=1e-9, atol=0)


@every_schedule
def test_float32_is_right_at_both_ends(name):
    schedule, t = SCHEDULES[name], torch.tensor([1e-3, 1e-2, 0.5, 0.99, 0.999], dtype=torch.float32)
    for value in "alpha", "sigma", "logsnr", "dlogsnr", "snr", "dsnr":
        single, double = getattr(schedule, value)(t), getattr(schedule, value)(t.to(F64))
        assert single.dtype == torch.float32
        assert_close(single.to(F64), double, rtol=2e-5, atol=1e-6)
    s = t - 5e-4
    single, double = ddpm.var_ts(s, t, schedule), ddpm.var_ts(s.to(F64), t.to(F64), schedule)
    assert_close(single.to(F64), double, rtol=2e-3, atol=0)


def test_two_nearly_equal_snrs_do_not_cancel_in_float32():
    """1 - SNR(t) / SNR(s) = 1e-6 by expm1; one minus an exponential, or a difference of variances, is off by 5 %."""
    schedule = ddpm.Schedule(lambda t: -1e-6 * t, lambda t: torch.full_like(t, -1e-6))
    s, t = torch.tensor([0.0]), torch.tensor([1.0])
    assert_close(ddpm.var_ts(s, t, schedule), torch.tensor([0.5e-6]), rtol=1e-5, atol=0)
    _, var = ddpm.posterior(torch.zeros(1, 2), torch.zeros(1, 2), s, t, schedule)
    assert_close(var, torch.tensor([[0.5e-6]]), rtol=1e-5, atol=0)


def test_cosine_log_snr_is_13_at_t_min_and_infinite_at_the_ends():
    schedule = SCHEDULES["cosine"]
    assert_close(schedule.logsnr(torch.tensor([1e-3, 0.999], dtype=F64)), torch.tensor([12.912, -12.912], dtype=F64),
                 atol=1e-3, rtol=0)
    for dtype in torch.float32, F64:
        ends = torch.tensor([0.0, 1.0], dtype=dtype)
        assert schedule.logsnr(ends).tolist() == [math.inf, -math.inf]
        assert schedule.alpha(ends).tolist() == [1, 0] and schedule.sigma(ends).tolist() == [0, 1]


def test_cosine_is_right_in_float32_next_to_t_1():
    """cos(pi t / 2) loses its digits there, sin(pi (1 - t) / 2) does not."""
    t = torch.tensor([0.9999, 0.99999])
    for value in "logsnr", "dlogsnr", "alpha":
        function = getattr(SCHEDULES["cosine"], value)
        assert_close(function(t).to(F64), function(t.to(F64)), rtol=2e-6, atol=0)


@every_schedule
def test_q_sample_is_equation_3_1(name):
    alpha, sigma = alpha_sigma(name, T)
    x, eps = torch.randn(2, len(T), 3, dtype=F64)
    assert_close(ddpm.q_sample(x, T, eps, SCHEDULES[name]), alpha[:, None] * x + sigma[:, None] * eps)
    assert_close(ddpm.q_sample(x[0], T[5], eps[0], SCHEDULES[name]), alpha[5] * x[0] + sigma[5] * eps[0])


def test_q_sample_of_images_uses_one_t_a_image():
    x, eps = torch.randn(2, 2, 3, 4, 4, dtype=F64)
    z = ddpm.q_sample(x, torch.tensor([0.2, 0.7], dtype=F64), eps, SCHEDULES["cosine"])
    assert_close(z[1], math.cos(0.35 * math.pi) * x[1] + math.sin(0.35 * math.pi) * eps[1])


@every_schedule
def test_two_steps_of_the_forward_process_are_one(name):
    alpha_s, sigma_s = alpha_sigma(name, S_)
    alpha_t, sigma_t = alpha_sigma(name, T_)
    alpha_ts, var_ts = ddpm.alpha_ts(S_, T_, SCHEDULES[name]), ddpm.var_ts(S_, T_, SCHEDULES[name])
    assert_close(alpha_ts * alpha_s, alpha_t, rtol=1e-8, atol=0)
    assert_close(alpha_ts**2 * sigma_s**2 + var_ts, sigma_t**2, rtol=1e-8, atol=0)
    assert_close(var_ts, sigma_t**2 - (alpha_t / alpha_s)**2 * sigma_s**2, rtol=1e-6, atol=1e-12)


@every_schedule
def test_posterior_is_the_conditional_of_the_joint_gaussian(name):
    """(z_s, z_t) given x is Gaussian with covariance [[ss, c], [c, tt]]: condition it, without (3.8) - (3.11)."""
    alpha_s, sigma_s = alpha_sigma(name, S_)
    alpha_t, sigma_t = alpha_sigma(name, T_)
    covariance = alpha_t / alpha_s * sigma_s**2
    x, z = torch.randn(2, len(S_), 2, dtype=F64)
    mean, var = ddpm.posterior(z, x, S_, T_, SCHEDULES[name])
    gain = (covariance / sigma_t**2)[:, None]
    assert_close(mean, alpha_s[:, None] * x + gain * (z - alpha_t[:, None] * x), rtol=1e-6, atol=1e-9)
    assert_close(var[:, 0], sigma_s**2 - covariance**2 / sigma_t**2, rtol=1e-5, atol=1e-12)


@every_schedule
def test_posterior_is_bayes_rule_by_quadrature(name):
    """Errata 1: prior q(z_s | x) times likelihood q(z_t | z_s), Eq. (3.7), integrated on a grid of z_s."""
    s, t, x, z = (torch.tensor([v], dtype=F64) for v in (0.3, 0.6, 0.7, -0.4))
    (alpha_s, sigma_s), (alpha_t, sigma_t) = alpha_sigma(name, s), alpha_sigma(name, t)
    ratio = alpha_t / alpha_s
    var_ts = sigma_t**2 - ratio**2 * sigma_s**2
    grid = torch.linspace(-12, 12, 400_001, dtype=F64)
    log_p = -(grid - alpha_s * x)**2 / (2 * sigma_s**2) - (z - ratio * grid)**2 / (2 * var_ts)
    p = log_p.softmax(0)
    mean, var = ddpm.posterior(z[:, None], x[:, None], s, t, SCHEDULES[name])
    assert_close(mean[0, 0], (p * grid).sum(), rtol=1e-7, atol=1e-9)
    assert_close(var[0, 0], (p * (grid - mean[0, 0])**2).sum(), rtol=1e-7, atol=1e-9)


def test_posterior_at_the_ends():
    x, z = torch.randn(2, 3, 2, dtype=F64)
    zero, half, one = torch.tensor([0.0, 0.5, 1.0], dtype=F64)
    mean, var = ddpm.posterior(z, x, zero, half, SCHEDULES["cosine"])
    assert_close(mean, x)
    assert var.item() == 0
    mean, var = ddpm.posterior(z, x, half, one, SCHEDULES["cosine"])
    assert_close(mean, math.sqrt(0.5) * x)
    assert_close(var.flatten(), torch.tensor([0.5], dtype=F64))
    mean, var = ddpm.posterior(z, x, zero, one, SCHEDULES["cosine"])
    assert_close(mean, x)
    assert var.item() == 0


@every_schedule
def test_the_sde_has_the_marginals_of_the_process(name):
    """dz = f z dt + g dw: alpha' = f alpha and d sigma^2 = 2 f sigma^2 + g^2, by autograd of the textbook alpha and
    sigma."""
    schedule, t = SCHEDULES[name], T[3:-3].clone().requires_grad_()
    alpha, sigma = schedule.alpha(t), schedule.sigma(t)
    dalpha, dvar = (torch.autograd.grad(c.sum(), t, retain_graph=True)[0] for c in (alpha + 0 * t, sigma**2))
    t = t.detach()
    assert_close(schedule.drift(t) * alpha.detach(), dalpha, rtol=1e-8, atol=1e-12)
    assert_close(2 * schedule.drift(t) * sigma.detach()**2 + schedule.diffusion_sq(t), dvar, rtol=1e-8, atol=1e-12)
    if name == "linear":                                   # dx = -beta x / 2 dt + sqrt(beta) dw, slides
        assert_close(schedule.drift(t), -(0.1 + 19.9 * t) / 2, rtol=1e-8, atol=0)
        assert_close(schedule.diffusion_sq(t), 0.1 + 19.9 * t, rtol=1e-8, atol=0)


@every_schedule
@pytest.mark.parametrize("dtype, atol", [(F64, 1e-9), (torch.float32, 2e-7)])
def test_the_time_of_a_log_snr(name, dtype, atol):
    schedule, t = SCHEDULES[name], T.to(dtype)
    found = schedule.t(schedule.logsnr(T).to(dtype))
    assert found.dtype == dtype and found.shape == t.shape
    assert_close(found, t, rtol=0, atol=atol)


def test_the_ends_of_log_snr():
    low, high = SCHEDULES["cosine"].ends(1e-3)
    assert abs(low + 12.912) < 1e-3 and abs(high - 12.912) < 1e-3
    low, high = SCHEDULES["ve"].ends(0.25)
    assert abs(high + 2 * math.log(0.01 * 5000**0.25)) < 1e-9 and abs(low + 2 * math.log(0.01 * 5000**0.75)) < 1e-9


def test_ddpm_is_the_product_of_its_1000_factors_and_is_smooth_between():
    """alpha^2(i / 1000) = (1 - beta_1) ... (1 - beta_i), Ho et al. 2020."""
    product = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=F64), 0)
    t = torch.arange(1, 1001, dtype=F64) / 1000
    schedule = SCHEDULES["ddpm"]
    assert_close(schedule.alpha(t)**2, product, rtol=1e-10, atol=0)
    assert_close(schedule.logsnr(t), torch.log(product / (1 - product)), rtol=1e-10, atol=1e-10)
    fine = schedule.logsnr(torch.linspace(0.001, 1, 99_901, dtype=F64))
    bends = fine.diff().diff()                                # a kink at every i / 1000 would be a jump of these
    assert bends.diff().abs().max() < 0.05 * bends.abs().max()


def test_iddpm_is_the_product_of_its_1000_factors():
    """beta_i = 1 - f(i) / f(i - 1), at most 0.999: Nichol and Dhariwal 2021, Eq. 17."""
    f = torch.cos((torch.arange(1001, dtype=F64) / 1000 + 0.008) / 1.008 * math.pi / 2)**2
    product = torch.cumprod(1 - (1 - f[1:] / f[:-1]).clamp(max=0.999), 0)
    t = torch.arange(1, 1001, dtype=F64) / 1000
    assert_close(SCHEDULES["iddpm"].alpha(t)**2, product, rtol=1e-9, atol=0)


def test_betas_of_other_numbers_of_steps_and_too_few():
    """Foundations 1.25: beta times 1000 / steps, so that alpha_T^2 stays near exp(-10.05)."""
    assert_close(ddpm.linear_betas(), torch.linspace(1e-4, 0.02, 1000, dtype=F64))
    for steps, log_alpha_sq in (4000, -10.067), (500, -10.19), (250, -10.33), (100, -10.80), (50, -11.77):
        betas = ddpm.linear_betas(steps)
        assert len(betas) == steps and abs(betas[-1] - 20 / steps) < 1e-12 and abs(betas[0] - 0.1 / steps) < 1e-12
        assert abs(torch.log(1 - betas).sum() - log_alpha_sq) < 0.006
    assert ddpm.linear_betas(21)[-1] < 1
    for steps in 20, 1:
        with pytest.raises(ValueError, match="at least 21"):
            ddpm.linear_betas(steps)


def test_any_pair_is_a_schedule():
    """Here alpha = 2 - t, sigma = t (1 + t): its scale from its log-SNR by bisection, its slope from autograd."""
    def time(logsnr):
        low, high = torch.zeros_like(logsnr), torch.ones_like(logsnr)
        for _ in range(60):
            t = (low + high) / 2
            low, high = torch.where(pair_logsnr(t) > logsnr, t, low), torch.where(pair_logsnr(t) > logsnr, high, t)
        return t

    pair_logsnr = lambda t: 2 * (torch.log(2 - t) - torch.log(t * (1 + t)))
    slope = lambda t: -2 / (2 - t) - 2 * (1 + 2 * t) / (t * (1 + t))
    scale = ddpm.Scale(lambda logsnr: 2 - time(logsnr), lambda logsnr: time(logsnr) * (1 + time(logsnr)),
                       lambda alpha, sigma: -1 / alpha / slope(2 - alpha))
    schedule, t = ddpm.Schedule(pair_logsnr, slope, scale), torch.tensor([0.1, 0.5, 0.9], dtype=F64)
    assert_close(schedule.alpha(t), 2 - t)
    assert_close(schedule.sigma(t), t * (1 + t))
    assert_close(schedule.drift(t), -1 / (2 - t))                                  # dlog(alpha) / dt
    assert_close(schedule.diffusion_sq(t), 2 * t * (1 + t) * (1 + 2 * t) + 2 / (2 - t) * (t * (1 + t))**2)
    x = ddpm.q_sample(torch.ones(3, 1, dtype=F64), t, torch.zeros(3, 1, dtype=F64), schedule)
    assert_close(ddpm.standardise(x, t, schedule)[:, 0], (2 - t) / ((2 - t)**2 + (t * (1 + t))**2).sqrt())
