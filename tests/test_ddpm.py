"""The process against the thesis's formulas typed again, joint Gaussians, quadrature and autograd."""
import math

import pytest
import torch
from torch.testing import assert_close

import ddpm
from ddpm import SCHEDULES

F64 = torch.float64
T = torch.cat([torch.tensor([1e-4, 1e-3]), torch.linspace(0.01, 0.99, 99), torch.tensor([0.999, 0.9999])]).to(F64)
PAIRS = [(s, t) for s in (0.001, 0.1, 0.5, 0.9, 0.998) for t in (0.0011, 0.11, 0.5001, 0.95, 0.999) if s < t]
S_, T_ = torch.tensor(PAIRS, dtype=F64).T

every_schedule = pytest.mark.parametrize("name", SCHEDULES)


def alpha_sigma(name, t):
    """alpha and sigma from their textbook definitions, the integral of beta by quadrature."""
    if name == "cosine":
        return torch.cos(math.pi * t / 2), torch.sin(math.pi * t / 2)                          # Eq. (3.3)
    if name == "ve":
        return torch.ones_like(t), 0.01 * (50 / 0.01) ** t
    u = (torch.arange(20_000, dtype=F64) + 0.5) / 20_000
    integral = torch.stack([(0.1 + 19.9 * u * v).mean() * v for v in t])                       # of beta over [0, t]
    return torch.exp(-integral / 2), torch.sqrt(1 - torch.exp(-integral))


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


def test_q_sample_of_pictures_uses_one_t_a_picture():
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


def gaussian_model(c, name):
    """Exact x-prediction for data N(0, c^2): E[x | z] = alpha c^2 z / (alpha^2 c^2 + sigma^2)."""
    def model(z, t):
        alpha, sigma = alpha_sigma(name, t[:1])
        return alpha * c**2 / (alpha**2 * c**2 + sigma**2) * z
    return model


@every_schedule
@pytest.mark.parametrize("steps", [1, 2, 7])
def test_ancestral_sampling_of_gaussian_data_has_the_variance_of_its_recursion(name, steps):
    """z_s = (A + B k) z_t + noise is linear, so the variance is known at any number of steps."""
    c, t_min = 0.6, 1e-3
    grid = [t_min + (1 - 2 * t_min) * i / steps for i in range(steps + 1)]
    alpha, sigma = alpha_sigma(name, torch.tensor(grid, dtype=F64))
    k = alpha * c**2 / (alpha**2 * c**2 + sigma**2)
    var = alpha[-1]**2 + sigma[-1]**2
    for i in range(steps, 1, -1):
        gain = alpha[i] / alpha[i - 1] * sigma[i - 1]**2 / sigma[i]**2
        noise = sigma[i - 1]**2 - gain**2 * sigma[i]**2
        var = (gain + (alpha[i - 1] - gain * alpha[i]) * k[i])**2 * var + noise
    samples = ddpm.ancestral_sample(gaussian_model(c, name), (200_000, 1), steps, target="x", t_min=t_min,
                                    schedule=SCHEDULES[name], generator=torch.Generator().manual_seed(0), dtype=F64)
    assert_close(samples.var().item(), (k[1]**2 * var).item(), rtol=0.02, atol=0)


def test_ancestral_sampling_tells_the_network_the_true_t_and_adds_no_noise_at_the_end():
    seen = []

    def model(z, t):
        seen.append(t)
        return torch.full_like(z, 0.25)
    samples = ddpm.ancestral_sample(model, (5, 2), 4, target="x", schedule=SCHEDULES["cosine"], t_min=0.1, dtype=F64)
    assert_close(torch.stack(seen), torch.tensor([0.9, 0.7, 0.5, 0.3], dtype=F64)[:, None].expand(4, 5))
    assert_close(samples, torch.full_like(samples, 0.25), rtol=1e-12, atol=0)


@every_schedule
def test_ancestral_sampling_starts_with_the_variance_of_standardised_data(name):
    """sqrt(alpha^2 + sigma^2), not sigma: for the exploding schedule they differ by 2e-4."""
    seen, seed = [], lambda: torch.Generator().manual_seed(5)
    ddpm.ancestral_sample(lambda z, t: seen.append(z) or z, (6, 2), 1, target="x", schedule=SCHEDULES[name],
                          generator=seed(), dtype=F64)
    alpha, sigma = alpha_sigma(name, torch.tensor([0.999], dtype=F64))
    expected = (alpha**2 + sigma**2).sqrt() * torch.randn(6, 2, generator=seed(), dtype=F64)
    assert_close(seen[0], expected, rtol=1e-7, atol=0)


def test_ancestral_sampling_inverts_the_target_it_is_given():
    """The same denoiser, spoken as x, eps, v, stabilised s and u, draws the same samples."""
    from datasets2d import DATASETS
    data, schedule, runs = DATASETS["clusters"], SCHEDULES["cosine"], {}
    for target, d in ("x", 0), ("eps", 0), ("v", 0), ("s", 0.01), ("u", 0):
        runs[target] = ddpm.ancestral_sample(data.optimal_model(target, schedule, d), (50, 2), 20, target=target,
                                             schedule=schedule, generator=torch.Generator().manual_seed(3),
                                             stabiliser=d, dtype=F64)
        assert_close(runs[target], runs["x"], rtol=1e-5, atol=1e-6)


def test_ancestral_sampling_repeats_with_its_seed_and_refuses_zero_steps():
    sample = lambda seed, steps=3: ddpm.ancestral_sample(
        gaussian_model(1.0, "cosine"), (4, 2), steps, target="x", schedule=SCHEDULES["cosine"],
        generator=torch.Generator().manual_seed(seed))
    assert torch.equal(sample(1), sample(1)) and not torch.equal(sample(1), sample(2))
    assert sample(1).shape == (4, 2) and sample(1).dtype == torch.float32
    seen = []
    model = lambda z, t: seen.append((z, t)) or torch.zeros_like(z)
    samples = ddpm.ancestral_sample(model, (4, 2), 3, target="x", schedule=SCHEDULES["cosine"], dtype=F64)
    assert samples.dtype == F64 and all(z.dtype == F64 and t.dtype == F64 for z, t in seen)
    assert_close(seen[0][1], torch.full((4,), 0.999, dtype=F64))
    scale = SCHEDULES["cosine"].alpha(seen[0][1][0])**2 + SCHEDULES["cosine"].sigma(seen[0][1][0])**2
    assert (seen[0][0] / scale.sqrt() != (seen[0][0] / scale.sqrt()).float()).any()        # noise drawn in float64
    with pytest.raises(ValueError, match="at least 1"):
        sample(1, steps=0)
