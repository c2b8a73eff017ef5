"""Noise in the bins of grey levels against scipy, quadrature over quantiles and one pixel of known entropy."""
import math

import numpy as np
import pytest
import torch
from scipy import integrate, stats
from torch.testing import assert_close

import dequantise
import flow
from ddpm import SCHEDULES
from targets import TARGETS

F64 = torch.float64
COSINE = SCHEDULES["cosine"]
LEVELS = torch.linspace(-1, 1, 256, dtype=F64)
seed = lambda n: torch.Generator().manual_seed(n)
STD = math.tan(math.pi / 2 * 1e-3)                          # sigma / alpha of the cosine schedule at t = 0.001
OF_SCIPY = {"uniform": lambda std: stats.uniform(-1 / 255, 2 / 255),
            "truncated-normal": lambda std: stats.truncnorm(-1 / 255 / std, 1 / 255 / std, scale=std)}
each = pytest.mark.parametrize("name", dequantise.DEQUANTISATIONS)


@pytest.fixture
def quantiles(monkeypatch):
    """Random numbers that are the middles of equal pieces of [0, 1]: a mean over them is an integral."""
    monkeypatch.setattr(torch, "rand", lambda shape, generator=None, device=None, dtype=None: (
        (torch.arange(math.prod(shape), dtype=F64) + 0.5) / math.prod(shape)).reshape(shape))


@each
@pytest.mark.parametrize("std", [2e-4, STD, 0.01])
def test_the_noise_and_its_density_are_those_of_scipy(name, std):
    x = LEVELS[torch.randint(256, (2000, 1, 2, 2), generator=seed(0))]
    spread, log_q = dequantise.DEQUANTISATIONS[name](x, std, seed(1))
    u, known = (spread - x).numpy(), OF_SCIPY[name](std)
    assert np.abs(u).max() <= 1 / 255 + 1e-12 and log_q.shape == (2000,)
    assert stats.kstest(u.ravel(), known.cdf).pvalue > 1e-3
    expected = known.logpdf(np.clip(u, -1 / 255, 1 / 255)).sum((1, 2, 3))
    assert_close(log_q, torch.from_numpy(expected), rtol=1e-9, atol=1e-6)


@each
@pytest.mark.parametrize("std", [STD, 0.003, 0.01])
def test_q_integrates_to_1(name, std, quantiles):
    """E_q[1 / q] is the width of the bin: over the quantiles of q, a sum that needs no density but its own."""
    _, log_q = dequantise.DEQUANTISATIONS[name](torch.zeros(200_000, 1, dtype=F64), std)
    assert abs(torch.exp(-log_q).mean() * 255 / 2 - 1) < 2e-3


@pytest.mark.parametrize("pixel, loose, of_uniform", [("256 levels", 0.00243, 0.4097), ("every 8th", 0.01821, 0.5045),
                                                      ("normal", 0.00237, 0.4094)])
def test_what_each_costs_a_perfect_model(pixel, loose, of_uniform):
    """E_q[log q - log p] - entropy in bits: q of scipy and p typed, by quadrature; the code's are the same."""
    p = dequantise.pixels()[pixel]
    u, x = np.linspace(-1 / 255, 1 / 255, 51), LEVELS.numpy()[p > 0]
    away = (x[:, None, None] + u[:, None] - LEVELS.numpy()) / STD                                   # (levels, u, 256)
    density = np.exp(-0.5 * away**2) @ p.numpy() / (math.sqrt(2 * math.pi) * STD)
    for name, expected in ("truncated-normal", loose), ("uniform", of_uniform):
        known, weight = OF_SCIPY[name](STD), p[p > 0].numpy()
        gap = integrate.simpson(known.pdf(u) * (known.logpdf(u) - np.log(density)), x=u)
        total = (weight * (gap + np.log(weight))).sum() / math.log(2)
        assert total == pytest.approx(expected, rel=0.005) and total > 0
        x_drawn = LEVELS[torch.multinomial(p, 20_000, replacement=True, generator=seed(0)), None]
        spread, log_q = dequantise.DEQUANTISATIONS[name](x_drawn, STD, seed(1))
        alpha, sigma = COSINE.alpha(torch.tensor(1e-3, dtype=F64)), COSINE.sigma(torch.tensor(1e-3, dtype=F64))
        log_p = dequantise.log_prob(alpha * spread, p, alpha, sigma.item()) + alpha.log()
        surprise = -p.log()[((x_drawn[:, 0] + 1) * 127.5).round().long()]
        found = (log_q - log_p - surprise) / math.log(2)
        assert abs(found.mean() - total) < 4 * found.std() / 20_000**0.5 + 2e-6


@pytest.mark.parametrize("dtype", [F64, torch.float32])
@pytest.mark.parametrize("std", [1e-6, 2e-4, 50.0])
def test_noise_that_is_far_from_the_bins_width_stays_in_it_and_is_finite(dtype, std):
    x = LEVELS[torch.randint(256, (500, 4), generator=seed(0))].to(dtype)
    spread, log_q = dequantise.truncated_normal(x, std, seed(1))
    assert (spread - x).abs().max() < 1 / 255 + 1e-6 and log_q.isfinite().all() and log_q.dtype == dtype
    if std == 50:                                                        # as the uniform one
        assert_close(log_q, torch.full((500,), 4 * math.log(255 / 2), dtype=dtype), rtol=1e-4, atol=0)


def test_the_number_minus_1_of_the_generator_is_no_infinity(monkeypatch):
    """torch.rand may be 0, and in float32 Z is 1 for a narrow normal."""
    monkeypatch.setattr(torch, "rand", lambda shape, **how: torch.zeros(shape))
    spread, log_q = dequantise.truncated_normal(torch.zeros(3, 2), 3e-4)
    assert (spread == -torch.tensor(1 / 255)).all() and log_q.isfinite().all()


@pytest.mark.parametrize("target", ["x", "eps", "v", "s"])
def test_the_exact_denoiser_of_one_pixel(target):
    """E[y | z] by Bayes' rule, level by level, in numpy."""
    p = dequantise.pixels()["normal"]
    z, t = torch.tensor([[0.02], [-0.3], [0.9]], dtype=F64), torch.tensor([0.01, 0.1, 0.6], dtype=F64)
    found = dequantise.optimal_model(p, target, COSINE)(z, t)
    for i in range(3):
        alpha, sigma = math.cos(math.pi / 2 * t[i]), math.sin(math.pi / 2 * t[i])
        weight = p.numpy() * stats.norm.pdf(z[i].item(), alpha * LEVELS.numpy(), sigma)
        eps = (z[i].item() - alpha * LEVELS.numpy()) / sigma
        y = {"x": LEVELS.numpy(), "eps": eps, "v": alpha * eps - sigma * LEVELS.numpy(), "s": -eps / sigma}[target]
        assert found[i].item() == pytest.approx((weight * y).sum() / weight.sum(), rel=1e-9)
        density = dequantise.log_prob(z[i:i + 1], p, alpha, sigma).item()
        assert density == pytest.approx(math.log(weight.sum()), rel=1e-9)
    assert target in TARGETS


def test_the_probabilities_of_the_pixels():
    found = dequantise.pixels()
    assert torch.equal(found["256 levels"], torch.full((256,), 1 / 256, dtype=F64))
    assert found["every 8th"].nonzero()[:, 0].tolist() == list(range(4, 256, 8)) and found["every 8th"].sum() == 1
    expected = stats.norm.pdf(LEVELS.numpy(), 0, 0.1)
    assert_close(found["normal"], torch.from_numpy(expected / expected.sum()))


def test_the_flow_of_the_exact_denoiser_has_the_density_of_z_0():
    p = dequantise.pixels()["every 8th"]
    x = torch.tensor([[0.0], [0.1], [-0.7]], dtype=F64) + 3 / 255
    x = torch.cat([x, LEVELS[p > 0][5:7, None] + 0.0007])
    alpha, sigma = math.cos(math.pi / 2 * 0.01), math.sin(math.pi / 2 * 0.01)
    found, _ = flow.log_likelihood(dequantise.optimal_model(p, "v", COSINE), x, target="v", schedule=COSINE, steps=96,
                                   t_min=0.01)
    assert_close(found, dequantise.log_prob(alpha * x, p, alpha, sigma) + math.log(alpha), rtol=0, atol=2e-3)
