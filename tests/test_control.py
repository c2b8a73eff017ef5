"""The control variate against quadrature, the exact denoiser of a Gaussian and the bound without it."""
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from test_ddpm import alpha_sigma, every_schedule
from torch.testing import assert_close

import control
import decoders
import dequantise
import kind_points
import likelihood
import reproduce_control
import run
from datasets2d import DATASETS, GaussianMixture
from ddpm import SCHEDULES

F64 = torch.float64
COSINE = SCHEDULES["cosine"]
seed = lambda n: torch.Generator().manual_seed(n)
MEAN, STD = torch.tensor([0.4, -1.0], dtype=F64), torch.tensor([0.3, 1.5], dtype=F64)


def curve(name, t_min, n=4001):
    """log-SNR on a grid between the ends, alpha and sigma there: (n,)."""
    schedule = SCHEDULES[name]
    logsnr = torch.linspace(*schedule.ends(t_min), n, dtype=F64)
    alpha, sigma = alpha_sigma(name, schedule.t(logsnr))
    return logsnr, alpha, sigma


@every_schedule
def test_the_gaussian_model_is_the_best_of_gaussian_data(name):
    z, t = 3 * torch.randn(20, 2, generator=seed(0), dtype=F64), torch.linspace(0.02, 0.98, 20, dtype=F64)
    best = GaussianMixture(MEAN[None], STD).optimal_model("eps", SCHEDULES[name])
    assert_close(control.gaussian_model(MEAN, STD**2, SCHEDULES[name])(z, t), best(z, t))


@every_schedule
def test_its_diffusion_term_by_quadrature(name):
    """1/2 integral over log-SNR of the mean over eps of |eps_G - eps|^2, eps_G typed; three nodes do for a square."""
    x = torch.tensor([[0.1, 2.0], [-3.0, 0.5], [0.4, -1.0]], dtype=F64)
    logsnr, alpha, sigma = (c[:, None, None] for c in curve(name, 0.01))
    nodes, weights = np.polynomial.hermite_e.hermegauss(3)
    error = 0
    for eps, weight in zip(nodes, weights / weights.sum()):
        z = alpha * x + sigma * eps
        error = error + weight * (sigma * (z - alpha * MEAN) / (alpha**2 * STD**2 + sigma**2) - eps)**2
    expected = 0.5 * torch.trapezoid(error.sum(2), logsnr[:, 0], dim=0)
    assert_close(control.gaussian_diffusion(x, MEAN, STD**2, SCHEDULES[name], 0.01), expected, rtol=1e-5, atol=1e-6)
    small = control.gaussian_diffusion(x.float(), MEAN.float(), STD.float()**2, SCHEDULES[name], 0.01)
    assert_close(small.double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name, uniform", [("cosine", "logsnr"), ("cosine", "t"), ("ve", "logsnr"), ("flow", "logsnr")])
@pytest.mark.parametrize("shape", [(6, 2), (3, 2, 2, 2)])
def test_the_bound_has_the_same_mean_and_less_noise(name, uniform, shape):
    """eps_hat = 0.7 z / r, r^2 = alpha^2 + sigma^2, errs by alpha^2 0.49 x^2 / r^2 + (0.7 sigma / r - 1)^2."""
    x = 0.5 + torch.randn(shape, generator=seed(3), dtype=F64)
    logsnr, alpha, sigma = curve(name, 0.02)
    r = (alpha**2 + sigma**2).sqrt()
    errors = (0.49 * (alpha / r)**2)[:, None] * x.flatten(1).square().sum(1) \
        + ((0.7 * sigma / r - 1)**2 * x[0].numel())[:, None]
    expected = 0.5 * torch.trapezoid(errors, logsnr, dim=0)

    def model(z, t):
        alpha, sigma = alpha_sigma(name, t)
        return 0.7 * z / (alpha**2 + sigma**2).sqrt().reshape(-1, *[1] * (z.ndim - 1))
    many = x.repeat(500, *[1] * (x.ndim - 1))                     # of the same mean and variance: 5,000 draws of each
    plain, less = (likelihood.bound(model, many, target="eps", schedule=SCHEDULES[name], t_min=0.02, draws=10,
                                    uniform=uniform, control=on, generator=seed(1)) for on in (False, True))
    for found in plain, less:
        each = found["diffusion"].reshape(500, -1)
        assert ((each.mean(0) - expected).abs() < 4 * each.std(0) / 500**0.5).all()
    assert less["error"].square().mean() < 0.7 * plain["error"].square().mean()
    for same in "prior", "reconstruction":
        assert torch.equal(plain[same], less[same])


def test_of_gaussian_data_and_their_denoiser_nothing_is_left_to_chance():
    """Two draws are exact: it is its own control variate, of the mean and variance of the points as they are."""
    x = MEAN + STD * torch.randn(500, 2, generator=seed(0), dtype=F64)
    mean, var = x.mean(0), ((x - x.mean(0))**2).mean(0)
    model = GaussianMixture(mean[None], var.sqrt()).optimal_model("eps", COSINE)
    found = likelihood.bound(model, x, target="eps", schedule=COSINE, draws=2, generator=seed(1))
    assert found["error"].max() < 1e-10
    assert_close(found["diffusion"], control.gaussian_diffusion(x, mean, var, COSINE))


def test_the_error_is_that_of_the_draws_and_a_fifth_of_the_variance_is_left():
    """The exact denoiser of the clusters, on which it helps least of the four."""
    data = DATASETS["clusters"]
    x, how = data.sample(200, seed(0), F64), dict(target="v", schedule=COSINE, draws=20)
    model = data.optimal_model("v", COSINE)
    found = [likelihood.bound(model, x, generator=seed(k), **how) for k in range(20)]
    spread = torch.stack([terms["diffusion"] for terms in found]).var(0).mean()
    said = torch.stack([terms["error"] for terms in found]).square().mean()
    assert abs(spread / said - 1) < 0.1
    plain = likelihood.bound(model, x, generator=seed(0), control=False, **how)["error"].square().mean()
    assert 4 < plain / said < 6


def test_data_that_do_not_vary_and_the_discrete_bound_are_as_they_were():
    how = dict(target="v", schedule=COSINE, draws=3)
    x = torch.full((40, 2), 0.3, dtype=F64)
    plain, less = (likelihood.bound(lambda z, t: 0.1 * z, x, generator=seed(0), control=on, **how)
                   for on in (False, True))
    assert_close(plain, less)
    x = DATASETS["rings"].sample(9, seed(0), F64)
    plain, less = (likelihood.bound(lambda z, t: 0.1 * z, x, steps=4, generator=seed(0), control=on, **how)
                   for on in (False, True))
    assert torch.equal(plain["diffusion"], less["diffusion"])


def drawn(K, B, n=4000):
    """n times K draws of B losses and their control, t stratified -> (n, K, B) twice, (B,); the mean is `known`."""
    g = seed(K + B)
    t = (torch.rand(n, K, 1, generator=g, dtype=F64) + torch.arange(B) / B) % 1
    noise, more = torch.randn(2, n, K, B, generator=g, dtype=F64)
    known = torch.arange(B, dtype=F64)
    c = 3 * (t - 0.5) + 0.3 * (noise**2 - 1)
    return 2 * c + 0.5 * more + t**2 - 1 / 3 + known, c + known, known


@pytest.mark.parametrize("K, B", [(2, 11), (2, 30), (12, 1), (16, 3)])
def test_few_losses_have_their_mean_and_the_error_that_is_said(K, B):
    """b is of as little as 11 losses, and of the same ones as what it multiplies it would add a bias."""
    loss, of_gaussian, known = drawn(K, B)
    found = torch.stack([control.reduced(*one, known) for one in zip(loss, of_gaussian)])
    mean = found.mean(1)
    assert ((mean.mean(0) - known).abs() < 4 * mean.std(0) / 4000**0.5).all()
    assert mean.var(0).mean() == pytest.approx((found.var(1) / K).mean().item(), rel=0.15)
    assert found.var(1).mean() < 0.7 * loss.var(1).mean()


@pytest.mark.parametrize("K, B", [(4, 5), (2, 10), (11, 1)])
def test_b_is_that_of_least_squares_in_the_other_draws(K, B):
    loss, of_gaussian, known = (c[0] if c.ndim > 2 else c for c in drawn(K, B, 1))
    found = control.reduced(loss, of_gaussian, known)
    for k in range(K):
        rest = [i for i in range(K) if i != k]
        y, c = ((part - known)[rest].flatten().numpy() for part in (loss, of_gaussian))
        assert_close(found[k], loss[k] - np.polyfit(c, y, 1)[0] * (of_gaussian - known)[k])


@pytest.mark.parametrize("K, B", [(10, 1), (2, 9)])
def test_fewer_than_ten_other_losses_tell_no_b(K, B):
    loss, of_gaussian, known = drawn(K, B, 1)
    assert torch.equal(control.reduced(loss[0], of_gaussian[0], known), loss[0])


# The tables

def test_the_table_of_the_control_variate(monkeypatch):
    """Numbers of the measured networks at their place, those of the exact denoiser by `bound` itself."""
    monkeypatch.setattr(reproduce_control, "TESTED", 40)
    monkeypatch.setattr(reproduce_control, "REPEATS", 30)
    model, data = DATASETS["clusters"].optimal_model("v", COSINE), kind_points.load(dict(data="clusters"))[:40].double()
    found = reproduce_control.variances(model, "clusters", "v")
    for i, on in enumerate((False, True)):
        terms = [likelihood.bound(model, data, target="v", schedule=COSINE, draws=2, control=on,
                                  generator=run.generator("cpu", "control", "clusters", k)) for k in range(30)]
        diffusion = np.array([term["diffusion"].tolist() for term in terms])                             # (30, 40)
        errors = np.array([term["error"].tolist() for term in terms])
        assert found["draw"][i] == pytest.approx(2 * (errors**2).mean(), rel=1e-9)
        assert found["draw"][i] == pytest.approx(2 * diffusion.var(0, ddof=1).mean(), rel=0.25)
        assert found["mean"][i] == pytest.approx(80 * diffusion.mean(1).var(ddof=1), rel=1e-9)
    asked, keys = [], [(data, "v", "mse", k) for data in ("clusters", "rings", "swiss_roll", "waves") for k in (0, 1)]
    measured = {key: {"draw": [6.0 + key[3], 2.0], "mean": [8.0, 1.0 + key[3]]} for key in keys}
    study = SimpleNamespace(args=SimpleNamespace(epochs=50, seeds=2), measured=lambda runs, part, measure: measured,
                            trained=lambda *how: asked.append(how) or dict.fromkeys(keys))
    monkeypatch.setattr(reproduce_control, "variances", lambda model, data, target: {"draw": [9.0, 3.0],
                                                                                     "mean": [5.0, 2.0]})
    lines = reproduce_control.control(study)
    assert asked == [("plain", ["mse"], ["clusters", "rings", "swiss_roll", "waves"], ["v"], 30)]
    assert lines[2] == "| clusters | exact | 9.000 | 3.000 | 3.000 | 2.500 |"
    assert lines[3] == ("| clusters | trained | 6.500 +- 0.707 | 2.000 +- 0.000 | 3.250 +- 0.354 | 6.000 +- 2.828 |")
    assert len([line for line in lines if line.startswith("|")]) == 10 and "30 epochs, 2 seeds" in lines[-1]


def test_the_table_of_dequantisation(monkeypatch):
    """A pixel whose levels, 32 apart, have bounds that numpy knows; the cells are the numbers of each column."""
    p = (torch.arange(256) % 32 == 7).double() / 8
    found = reproduce_control.costs(p, n=300, steps=48)
    assert found["entropy"] == (3.0, 0.0)
    std = math.tan(math.pi / 2 * 1e-3)
    tau = 1 / 255 / std
    loose = -math.log2(math.erf(tau / 2**0.5))
    assert found["truncated-normal"][0] - 3 == pytest.approx(loose, abs=2e-3) and found["truncated-normal"][1] < 1e-3
    of_uniform = math.log2(math.sqrt(2 * math.pi) * std * 255 / 2) + tau**2 / 6 / math.log(2)   # E u^2 = tau^2 / 3
    assert abs(found["uniform"][0] - 3 - of_uniform) < 4 * found["uniform"][1]
    spread = tau**2 / 2 * math.sqrt(1 / 5 - 1 / 9) / math.log(2)                              # of u^2 / (2 std^2)
    assert found["uniform"][1] == pytest.approx(spread / 300**0.5, rel=0.15)
    x = dequantise.LEVELS[p > 0][:, None].repeat(500, 1)
    eps = torch.randn(x.shape, generator=seed(0), dtype=F64)
    ends = decoders.reconstruction(x, eps, COSINE.ends(1e-3)[1], decoders.discretised).mean() / math.log(2)
    assert abs(found["bound"][0] - 3 - ends) < 4 * found["bound"][1] + 0.02          # levels are known at t_min
    monkeypatch.setattr(reproduce_control, "costs", lambda p: {"entropy": (1.0, 0.0), "bound": (2.0, 0.2),
                                                               "uniform": (3.0, 0.3), "truncated-normal": (4.0, 0.4)})
    lines = reproduce_control.dequantisation(None)
    assert lines[2] == "| 256 levels | 1.000 | 2.000 +- 0.200 | 3.000 +- 0.300 | 4.000 +- 0.400 |" and len(lines) == 7
