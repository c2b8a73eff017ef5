"""The two ends of the bound against scipy, torch.distributions, quadrature and the tails typed again."""
import math

import numpy as np
import pytest
import torch
from scipy import special, stats
from test_ddpm import alpha_sigma, every_schedule
from torch import distributions
from torch.testing import assert_close

import decoders
from ddpm import SCHEDULES

F64 = torch.float64
LEVELS = torch.linspace(-1, 1, 256, dtype=F64)
seed = lambda n: torch.Generator().manual_seed(n)
at = lambda name, t: alpha_sigma(name, torch.tensor([t], dtype=F64))


@every_schedule
@pytest.mark.parametrize("t_min", [1e-3, 0.3])
def test_the_prior_term_is_the_kl_of_two_gaussians(name, t_min):
    x = 2 * torch.randn(5, 3, dtype=F64)
    alpha, sigma = at(name, 1 - t_min)
    q, p = distributions.Normal(alpha * x, sigma), distributions.Normal(0, (alpha**2 + sigma**2).sqrt())
    assert_close(decoders.prior(x, SCHEDULES[name], t_min), distributions.kl_divergence(q, p).sum(1),
                 rtol=1e-6, atol=1e-12)
    assert_close(decoders.prior(x.float(), SCHEDULES[name], t_min).double(),
                 decoders.prior(x, SCHEDULES[name], t_min), rtol=1e-5, atol=1e-7)
    assert decoders.prior(torch.zeros(4, 1, 5, 5), SCHEDULES[name]).shape == (4,)


@every_schedule
def test_the_reconstruction_of_points_is_a_gaussian_around_z_0_over_alpha(name):
    x, (alpha, sigma) = torch.randn(5, 3, dtype=F64), at(name, 0.02)
    nodes, weights = np.polynomial.hermite_e.hermegauss(5)                 # exact for the quadratic
    terms = 0
    for eps, weight in zip(nodes, weights / weights.sum()):
        z = alpha * x + sigma * eps
        terms = terms - weight * distributions.Normal(z / alpha, sigma / alpha).log_prob(x).sum(1)
    found = decoders.reconstruction(x, None, SCHEDULES[name].ends(0.02)[1], decoders.gaussian)
    assert_close(found, terms, rtol=1e-8, atol=0)


@pytest.mark.parametrize("std", [1e-4, 1.6e-3, 0.02, 0.5, 3.0])
@pytest.mark.parametrize("mean", [-1.7, -1.0, -0.9991, -0.3, 0.0021, 0.7, 1.0, 1.2])
def test_the_256_probabilities_sum_to_1(mean, std):
    log_p = decoders.log_prob_level(LEVELS, torch.tensor(mean, dtype=F64), std)
    assert abs(log_p.exp().sum() - 1) < 1e-12 and log_p.isfinite().all()
    assert_close(decoders.log_prob_level(LEVELS.float(), torch.tensor(mean), 0.5).double(),
                 decoders.log_prob_level(LEVELS, torch.tensor(mean, dtype=F64), 0.5), rtol=1e-3, atol=1e-3)


def test_the_probability_of_a_level_is_that_of_its_bin():
    """scipy's distribution function, differences of the tail that does not cancel; black, white reach to infinity."""
    for mean, std in (0.1, 0.002), (-0.4, 0.05), (1.1, 0.3):
        middle, half = LEVELS[1:-1].numpy(), 1 / 255
        lower, upper = (middle - half - mean) / std, (middle + half - mean) / std
        p = np.where(lower > 0, stats.norm.sf(lower) - stats.norm.sf(upper),
                     stats.norm.cdf(upper) - stats.norm.cdf(lower))
        kept = p > 1e-290
        found = decoders.log_prob_level(LEVELS, torch.tensor(mean, dtype=F64), std)
        assert_close(found[1:-1][kept], torch.from_numpy(np.log(p[kept])), rtol=1e-9, atol=1e-9)
        assert_close(found[0].item(), stats.norm.logcdf((-1 + half - mean) / std), rtol=1e-9, atol=0)
        assert_close(found[-1].item(), stats.norm.logsf((1 - half - mean) / std), rtol=1e-9, atol=1e-12)


@every_schedule
def test_the_reconstruction_of_images_sees_z_0(name):
    x, eps = LEVELS[torch.randint(256, (3, 1, 4, 4), generator=seed(0))], \
        torch.randn(3, 1, 4, 4, generator=seed(1), dtype=F64)
    alpha, sigma = at(name, 0.001)
    z = alpha * x + sigma * eps
    expected = -decoders.log_prob_level(x, z / alpha, sigma / alpha).sum((1, 2, 3))
    found = decoders.reconstruction(x, eps, SCHEDULES[name].ends(0.001)[1], decoders.discretised)
    assert_close(found, expected, rtol=1e-6, atol=1e-9)


# From far outside, where a variance that is being learned may be, through where the code changes formula at -1.
PLACES = torch.tensor([-1e5, -3e4, -200.0, -38.0, -13.0, -5.0, -1.0001, -1.0, -0.9999, -0.3, 0.0, 0.7, 3.0, 6.0, 10.0],
                      dtype=F64)


@pytest.mark.parametrize("dtype, rtol", [(F64, 1e-12), (torch.float32, 3e-6)])
def test_the_log_of_the_normal_distribution_function_and_its_gradient(dtype, rtol):
    """scipy's; its derivative phi / Phi is sqrt(2 / pi) / erfcx(-x / sqrt(2)): 30,000 at -30,000, not 0.4."""
    x = PLACES.to(dtype).requires_grad_()
    slope, = torch.autograd.grad(decoders.log_ndtr(x).sum(), x)
    typed = x.detach().double().numpy()
    assert_close(decoders.log_ndtr(x).double(), torch.from_numpy(special.log_ndtr(typed)), rtol=rtol, atol=1e-38)
    with np.errstate(over="ignore"):
        expected = np.sqrt(2 / np.pi) / special.erfcx(-typed / np.sqrt(2))
    assert_close(slope.double(), torch.from_numpy(expected), rtol=max(rtol, 1e-11), atol=1e-38)
    far = x.detach()[:4].double()                                     # -x^2/2 - log(-x) - log(2 pi)/2 - 1/x^2
    assert_close(decoders.log_ndtr(x).double()[:4],
                 -0.5 * far**2 - (-far).log() - 0.5 * math.log(2 * math.pi) - far**-2, rtol=1e-6, atol=0)
    assert_close(slope.double()[:4], -far - 1 / far, rtol=1e-5, atol=0)


def test_the_distribution_function_of_infinity_is_0_and_1():
    for dtype in F64, torch.float32:
        ends = torch.tensor([-math.inf, math.inf], dtype=dtype)
        assert decoders.log_ndtr(ends).tolist() == [-math.inf, 0.0]


@pytest.mark.parametrize("dtype, rtol", [(F64, 1e-6), (torch.float32, 2e-3)])
@pytest.mark.parametrize("std", [1e-4, 0.003, 0.4])
def test_the_gradient_of_a_levels_log_probability(dtype, rtol, std):
    """d log P = (phi(upper) d upper - phi(lower) d lower) / P, for near means and means a hundred bins away."""
    x = torch.tensor([-1.0, -1.0, -87 / 255, -87 / 255, 1 / 255, 1.0, 1.0], dtype=F64)
    mean = torch.tensor([-1.3, -0.9, -0.34, 0.2, 0.0, 1.001, 0.5], dtype=F64)
    given = [mean.to(dtype).requires_grad_(), torch.full((7,), std, dtype=dtype).requires_grad_()]
    found = torch.autograd.grad(decoders.log_prob_level(x.to(dtype), *given).sum(), given)
    mean, std = (c.detach().double().numpy() for c in given)
    x = x.to(dtype).double().numpy()
    upper = np.where(x > 0.999, np.inf, (x + 1 / 255 - mean) / std)
    lower = np.where(x < -0.999, -np.inf, (x - 1 / 255 - mean) / std)
    flip = lower > 0                                                # the tail in which the logs do not cancel
    a, b = np.where(flip, -lower, upper), np.where(flip, -upper, lower)
    log_p = special.log_ndtr(a) + np.log1p(-np.exp(special.log_ndtr(b) - special.log_ndtr(a)))
    share = lambda c: np.exp(stats.norm.logpdf(c) - log_p)
    finite = lambda c: np.where(np.isinf(c), 0, c)
    expected = ((share(lower) - share(upper)) / std,
                (share(lower) * finite(lower) - share(upper) * finite(upper)) / std)
    for got, wanted in zip(found, expected):
        assert_close(got.double(), torch.from_numpy(wanted), rtol=rtol, atol=1e-4 * np.abs(wanted).max())


def test_the_tanh_of_foundations_3_9_is_off_by_at_most_18_hundred_thousandths():
    z = torch.linspace(-6, 6, 24_001, dtype=F64)
    typed = 0.5 * (1 + torch.tanh((2 / math.pi)**0.5 * (z + 0.044715 * z**3)))
    assert_close(decoders.cdf_tanh(z), typed, rtol=0, atol=1e-15)
    error = (decoders.cdf_tanh(z) - torch.from_numpy(special.ndtr(z.numpy()))).abs().max()
    assert 1.7e-4 < error < 1.8e-4


def test_the_decoder_of_points_is_a_normal_density_and_that_of_images_a_probability():
    x, mean, log_var = torch.randn(3, 4, 5, generator=seed(0), dtype=F64)
    normal = distributions.Normal(mean, torch.exp(log_var / 2))
    assert_close(decoders.gaussian(x, mean, log_var), -normal.log_prob(x), rtol=1e-12, atol=1e-12)
    level = LEVELS[torch.randint(1, 255, (4, 5), generator=seed(1))]
    p = normal.cdf(level + 1 / 255) - normal.cdf(level - 1 / 255)
    assert_close(decoders.discretised(level, mean, log_var), -p.log(), rtol=1e-7, atol=1e-9)


def test_on_mps_which_has_no_erfcx_it_is_computed_on_the_cpu_and_comes_back(monkeypatch):
    class Mps(torch.Tensor):
        """A tensor that says it is on MPS, until it is moved."""
        @property
        def device(self):
            return torch.device("mps")

        def cpu(self):
            return self.as_subclass(Cpu)

    class Cpu(torch.Tensor):
        def to(self, device):
            back.append(device.type)
            return self.as_subclass(Mps)
    places, back, original = [], [], torch.special.erfcx
    monkeypatch.setattr(torch.special, "erfcx", lambda x: places.append(x.device.type) or original(x))
    x, mean = torch.linspace(-1, 1, 256), torch.tensor(0.1)
    expected = decoders.log_prob_level(x, mean, 0.2)
    result = decoders.log_prob_level(x.as_subclass(Mps), mean, 0.2)
    assert places == 6 * ["cpu"] and back == 3 * ["mps"] and torch.equal(result.as_subclass(torch.Tensor), expected)
