"""The table of targets against the thesis's definitions, autograd, and each inverse typed on its own."""
import math

import pytest
import torch
from test_ddpm import every_schedule
from torch.testing import assert_close

import ddpm
import losses
import targets
from ddpm import SCHEDULES

F64 = torch.float64
TARGETS = "x", "eps", "v", "s", "u", "F"        # a row that is added needs its definition in `typed` below
T = torch.tensor([1e-3, 0.01, 0.1, 0.3, 0.5, 0.7, 0.9, 0.99, 0.999], dtype=F64)[:, None]
X, EPS = torch.randn(2, len(T), 4, dtype=F64, generator=torch.Generator().manual_seed(0))


def setting(name):
    alpha, sigma = SCHEDULES[name].alpha(T), SCHEDULES[name].sigma(T)
    return alpha, sigma, alpha * X + sigma * EPS


def typed(target, alpha, sigma, z, d=0.0):
    """Each target as the thesis defines it."""
    return {"x": X, "eps": EPS, "v": alpha * EPS - sigma * X, "u": EPS - X,                   # (3.55)
            "F": (sigma * X - alpha * EPS) / (alpha**2 + sigma**2).sqrt(),
            "s": -(z - alpha * X) / (sigma**2 + d)}[target]                                    # (3.53)


@every_schedule
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("d", [0.0, 0.01])
def test_rows_are_the_definitions_and_the_solve_inverts_them(name, target, d):
    alpha, sigma, z = setting(name)
    y = typed(target, alpha, sigma, z, d)
    a, b = targets.coefficients(target, alpha, sigma, d)
    assert a.shape == b.shape == alpha.shape
    assert_close(a * X + b * EPS, y, rtol=1e-8, atol=1e-10)
    assert_close(targets.to_x(target, y, z, alpha, sigma, d), X, rtol=1e-6, atol=1e-8)
    assert_close(targets.to_eps(target, y, z, alpha, sigma, d), EPS, rtol=1e-6, atol=1e-8)


@every_schedule
def test_inverses_are_those_of_the_thesis_also_for_a_wrong_prediction(name):
    """x_hat and eps_hat from a prediction that is not the truth, each formula on its own."""
    alpha, sigma, z = setting(name)
    y, r_sq = torch.randn(z.shape, dtype=F64, generator=torch.Generator().manual_seed(1)), alpha**2 + sigma**2
    x_hat = {"x": y, "eps": (z - sigma * y) / alpha, "s": (z + sigma**2 * y) / alpha,         # 3.1.5, (3.49)
             "v": (alpha * z - sigma * y) / r_sq, "u": (z - sigma * y) / (alpha + sigma),      # (3.58) for r = 1
             "F": (alpha * z + sigma * r_sq.sqrt() * y) / r_sq}
    eps_hat = {"x": (z - alpha * y) / sigma, "eps": y, "s": -sigma * y,
               "v": (sigma * z + alpha * y) / r_sq, "u": (z + alpha * y) / (alpha + sigma),
               "F": (sigma * z - alpha * r_sq.sqrt() * y) / r_sq}
    for target in TARGETS:
        assert_close(targets.to_x(target, y, z, alpha, sigma), x_hat[target], rtol=1e-9, atol=1e-9)
        assert_close(targets.to_eps(target, y, z, alpha, sigma), eps_hat[target], rtol=1e-9, atol=1e-9)
    if name == "cosine":
        assert_close(targets.to_x("v", y, z, alpha, sigma), alpha * z - sigma * y, rtol=1e-9, atol=1e-9)


@every_schedule
@pytest.mark.parametrize("target", TARGETS)
def test_determinant_turns_an_error_of_y_into_errors_of_x_and_eps(name, target):
    alpha, sigma, z = setting(name)
    y, error = typed(target, alpha, sigma, z), 0.3
    det = targets.determinant(target, alpha, sigma)
    x_error = targets.to_x(target, y + error, z, alpha, sigma) - targets.to_x(target, y, z, alpha, sigma)
    eps_error = targets.to_eps(target, y + error, z, alpha, sigma) - targets.to_eps(target, y, z, alpha, sigma)
    assert_close(x_error, (-sigma / det * error).expand_as(X), rtol=1e-6, atol=1e-8)
    assert_close(eps_error, (alpha / det * error).expand_as(X), rtol=1e-6, atol=1e-8)


def test_score_is_the_gradient_of_the_log_density():
    """Eq. (3.53) against autograd through torch's Normal."""
    alpha, sigma, z = setting("cosine")
    z.requires_grad_()
    log_q = torch.distributions.Normal(alpha * X, sigma.expand_as(X)).log_prob(z)
    score, = torch.autograd.grad(log_q.sum(), z)
    a, b = targets.coefficients("s", alpha, sigma)
    assert_close(a * X + b * EPS, score, rtol=1e-9, atol=1e-9)


def test_velocity_is_the_derivative_along_the_circle():
    """Eq. (3.55): v = dz / dphi with phi = pi t / 2 on the cosine schedule."""
    t = T.expand_as(X).clone().requires_grad_()
    z = torch.cos(math.pi * t / 2) * X + torch.sin(math.pi * t / 2) * EPS
    dz_dt, = torch.autograd.grad(z.sum(), t)
    alpha, sigma, _ = setting("cosine")
    a, b = targets.coefficients("v", alpha, sigma)
    assert_close(a * X + b * EPS, dz_dt / (math.pi / 2), rtol=1e-9, atol=1e-9)


def test_flow_is_the_derivative_along_the_straight_path():
    t = T.expand_as(X).clone().requires_grad_()
    dz_dt, = torch.autograd.grad(((1 - t) * X + t * EPS).sum(), t)
    a, b = targets.coefficients("u", 1 - T, T)
    assert_close(a * X + b * EPS, dz_dt)
    assert_close(targets.to_x("u", dz_dt, (1 - T) * X + T * EPS, 1 - T, T), X)


def test_unknown_target_is_named_with_the_choices():
    with pytest.raises(ValueError, match="unknown target 'foo': choose from .*x, eps, v, s"):
        targets.coefficients("foo", T, T)


def test_f_with_mse_on_edm_is_the_training_of_karras_et_al():
    """Their Table 1 typed out, sigma_data = 1: D = c_skip z + c_out F(c_in z), and the loss is lambda (D - x)^2."""
    data, g = 1.0, torch.Generator().manual_seed(2)
    schedule, t = SCHEDULES["edm"], T[:, 0]
    sigma = torch.exp(-1.2 + 1.2 * torch.special.ndtri(t))[:, None]
    c_skip, c_out = data**2 / (sigma**2 + data**2), sigma * data / (sigma**2 + data**2).sqrt()
    c_in, weight = 1 / (sigma**2 + data**2).sqrt(), (sigma**2 + data**2) / (sigma * data)**2
    network = lambda z, t: torch.tanh(z) + 0.1 * t[:, None]                       # any, given c_in z
    z = X + sigma * EPS
    denoised = c_skip * z + c_out * network(c_in * z, t)
    ours = lambda z, t: network(ddpm.standardise(z, t, schedule), t)
    found = losses.loss(ours, X, t, EPS, target="F", loss="mse", schedule=schedule)
    assert_close(found, (weight * (denoised - X)**2).mean(1), rtol=1e-8, atol=0)
    assert_close(targets.to_x("F", ours(z, t), z, torch.ones_like(sigma), sigma), denoised, rtol=1e-8, atol=1e-12)
    assert_close(losses.weight("rescaled", "F", t, schedule), (c_out**2)[:, 0], rtol=1e-8, atol=0)
    y = torch.randn(z.shape, dtype=F64, generator=g)                              # (x - c_skip z) / c_out is the row
    a, b = targets.coefficients("F", torch.ones_like(sigma), sigma)
    assert_close(a * y + b * EPS, (y - c_skip * (y + sigma * EPS)) / c_out, rtol=1e-7, atol=1e-9)


@every_schedule
@pytest.mark.parametrize("target, skip", [("mu", 0), ("mu_skip", 1)])
def test_the_mean_of_a_step_is_a_row_too(name, target, skip):
    """Foundations 2.40 from the joint Gaussian of z_s and z_t, minus z where the network has a skip connection."""
    alpha, sigma, z = setting(name)
    s = SCHEDULES[name]
    early = T - torch.tensor([5e-4, 0.005, 0.02, 0.1, 0.1, 0.2, 0.2, 0.1, 0.01], dtype=F64)[:, None]
    alpha_s, sigma_s = s.alpha(early), s.sigma(early)
    gain = alpha / alpha_s * sigma_s**2 / sigma**2
    mean = lambda x: alpha_s * x + gain * (z - alpha * x) - skip * z
    step = ddpm.posterior_coefficients(early, T, s)[:2]
    a, b = targets.coefficients(target, alpha, sigma, step=step)
    assert a.shape == b.shape == alpha.shape
    assert_close(a * X + b * EPS, mean(X), rtol=1e-8, atol=1e-9)
    wrong = X + torch.randn(X.shape, dtype=F64, generator=torch.Generator().manual_seed(1))
    assert_close(targets.to_x(target, mean(wrong), z, alpha, sigma, step=step), wrong, rtol=1e-5, atol=1e-5)
    det = targets.determinant(target, alpha, sigma, step=step)
    assert_close(det, -alpha_s * (sigma**2 - (alpha / alpha_s * sigma_s)**2) / sigma, rtol=1e-5, atol=1e-12)


def test_the_mean_of_a_step_needs_its_step():
    for target in "mu", "mu_skip":
        with pytest.raises(ValueError, match=f"target {target} is the mean of a step of a discrete chain: "
                                             "say of how many steps, --timesteps 1000"):
            targets.coefficients(target, T, T)
