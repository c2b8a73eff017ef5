"""The 2D datasets against torch.distributions, autograd, brute-force integration and their descriptions."""
import math

import pytest
import torch
from torch.testing import assert_close

import datasets2d
import ddpm
import metrics
import samplers
from datasets2d import DATASETS

F64 = torch.float64
every_set = pytest.mark.parametrize("name", DATASETS)
# (alpha, sigma): the data, both ends and the middle of the cosine schedule, an exploding one.
DIFFUSED = [(1.0, 0.0), (0.9999988, 0.00157), (0.7, 0.714), (0.00157, 0.9999988), (1.0, 50.0)]


def reference(data, alpha, sigma):
    """The diffused mixture in torch.distributions."""
    d = torch.distributions
    scale = (alpha**2 * data.std**2 + sigma**2).sqrt().expand(len(data.centres), 2)
    return d.MixtureSameFamily(d.Categorical(torch.ones(len(data.centres), dtype=F64)),
                               d.Independent(d.Normal(alpha * data.centres, scale), 1))


@every_set
@pytest.mark.parametrize("alpha, sigma", DIFFUSED)
def test_density_score_and_denoiser(name, alpha, sigma):
    data, g = DATASETS[name], torch.Generator().manual_seed(0)
    x = data.sample(700, g, dtype=F64)
    z = (alpha * x + sigma * torch.randn(700, 2, generator=g, dtype=F64)).requires_grad_()
    log_prob = reference(data, alpha, sigma).log_prob(z)
    score, = torch.autograd.grad(log_prob.sum(), z)
    assert_close(data.log_prob(z, alpha, sigma), log_prob, rtol=1e-9, atol=1e-9)
    assert_close(data.score(z, alpha, sigma), score, rtol=1e-7, atol=1e-7)
    tweedie = (z + sigma**2 * score) / alpha                                                    # Eq. (3.48)
    assert_close(data.denoise(z, alpha, sigma), tweedie, rtol=1e-5, atol=1e-6)
    single = data.denoise(z.float(), alpha, sigma)
    assert single.dtype == torch.float32
    assert_close(single.to(F64), tweedie, rtol=0, atol=2e-3)


@every_set
def test_clean_data_is_the_default(name):
    data = DATASETS[name]
    x = data.sample(50, torch.Generator().manual_seed(0), dtype=F64)
    assert_close(data.log_prob(x), reference(data, 1.0, 0.0).log_prob(x))
    assert_close(data.score(x), data.score(x, 1.0, 0.0))
    assert_close(data.denoise(x, 1.0, 0.0), x)


@every_set
def test_each_point_has_its_own_alpha_and_sigma(name):
    data, t = DATASETS[name], torch.tensor([0.1, 0.5, 0.9], dtype=F64)
    alpha, sigma, z = torch.cos(t), torch.sin(t), torch.randn(3, 2, dtype=F64)
    for function in data.log_prob, data.score, data.denoise, data.covariance:
        together = function(z, alpha, sigma)
        for i in range(3):
            assert_close(together[i:i + 1], function(z[i:i + 1], alpha[i], sigma[i]))


def test_chunks_change_nothing():
    data, z = DATASETS["rings"], torch.randn(150, 2, dtype=F64)          # three chunks of at most 65
    t = torch.rand(150, dtype=F64)
    alpha, sigma = t.cos(), t.sin()
    assert [len(chunk[0]) for chunk in data._chunks(z, alpha, sigma)] == [65, 65, 20]
    for function in data.log_prob, data.score, data.denoise, data.covariance:
        rows = torch.cat([function(z[i:i + 1], alpha[i], sigma[i]) for i in range(150)])
        assert_close(function(z, alpha, sigma), rows)


@pytest.mark.parametrize("name", ["clusters", "waves"])
def test_denoiser_is_the_posterior_mean_by_brute_force(name):
    """E[x | z] = integral of x p(x) N(z; alpha x, sigma^2 I) on a fine grid of x."""
    data, alpha, sigma = DATASETS[name], 0.8, 0.6
    axis = torch.linspace(-3.5, 3.5, 141, dtype=F64)
    x = torch.cartesian_prod(axis, axis)
    log_prob = data.log_prob(x)
    for z in torch.tensor([[0.3, -0.5], [-1.1, 0.2]], dtype=F64):
        weight = (log_prob - ((z - alpha * x)**2).sum(1) / (2 * sigma**2)).softmax(0)
        assert_close(data.denoise(z[None], alpha, sigma)[0], weight @ x, rtol=1e-5, atol=1e-6)


@every_set
@pytest.mark.parametrize("alpha, sigma", DIFFUSED[1:])
def test_the_covariance_of_x_is_the_derivative_of_the_denoiser(name, alpha, sigma):
    """Var[x | z] = sigma^2 / alpha dE[x | z] / dz of each axis, by autograd; in float32, too."""
    data, g = DATASETS[name], torch.Generator().manual_seed(0)
    x = data.sample(60, g, dtype=F64)
    z = (alpha * x + sigma * torch.randn(60, 2, generator=g, dtype=F64)).requires_grad_()
    x_hat = data.denoise(z, alpha, sigma)
    slopes = [torch.autograd.grad(x_hat[:, k].sum(), z, retain_graph=True)[0][:, k] for k in (0, 1)]
    found = data.covariance(z.detach(), alpha, sigma)
    assert_close(found, sigma**2 / alpha * torch.stack(slopes, 1), rtol=1e-6, atol=1e-14)
    single = data.covariance(z.detach().float(), alpha, sigma)
    assert single.dtype == torch.float32 and (single > 0).all()
    # the position of z, rounded, moves the weights of centres: more where noise is small
    assert_close(single.double(), found, rtol=2e-2 if sigma < 0.01 else 1e-3, atol=0)


def test_the_covariance_of_x_by_brute_force_and_at_the_ends():
    """Of all x on a fine grid; nothing is left to know without noise, all of the data's variance without signal."""
    data, alpha, sigma = DATASETS["clusters"], 0.8, 0.6
    axis = torch.linspace(-3, 3, 121, dtype=F64)
    x = torch.cartesian_prod(axis, axis)
    for z in torch.tensor([[0.3, -0.5], [-1.1, 0.2]], dtype=F64):
        weight = (data.log_prob(x) - ((z - alpha * x)**2).sum(1) / (2 * sigma**2)).softmax(0)
        mean = weight @ x
        assert_close(data.covariance(z[None], alpha, sigma)[0], weight @ (x - mean)**2, rtol=1e-5, atol=1e-6)
    z = torch.tensor([[0.7, -0.2]], dtype=F64)
    assert data.covariance(z, 1.0, 0.0).tolist() == [[0, 0]]
    assert_close(data.covariance(z, 0.0, 1.0), torch.ones(1, 2, dtype=F64), rtol=1e-9, atol=0)


@every_set
def test_optimal_model_speaks_every_target(name):
    data, schedule = DATASETS[name], ddpm.SCHEDULES["cosine"]
    t, z = torch.tensor([0.001, 0.3, 0.8, 0.999], dtype=F64), torch.randn(4, 2, dtype=F64)
    alpha, sigma = torch.cos(math.pi * t / 2)[:, None], torch.sin(math.pi * t / 2)[:, None]
    x_hat = data.denoise(z, alpha[:, 0], sigma[:, 0])
    score = data.score(z, alpha[:, 0], sigma[:, 0])
    expected = {"x": x_hat, "eps": -sigma * score, "v": -alpha * sigma * score - sigma * x_hat, "s": score,
                "u": -sigma * score - x_hat}
    for target, y_hat in expected.items():
        assert_close(data.optimal_model(target, schedule)(z, t), y_hat, rtol=1e-6, atol=1e-6)
    stable = data.optimal_model("s", schedule, 0.01)(z, t)
    assert_close(stable, sigma**2 / (sigma**2 + 0.01) * score, rtol=1e-6, atol=1e-6)


def test_errata_9_the_best_score_network_is_the_marginal_score():
    """Eq. (3.46): trained on the conditional score, the least error is at the score of q(z), not of q(z | x)."""
    data, schedule, g = DATASETS["clusters"], ddpm.SCHEDULES["cosine"], torch.Generator().manual_seed(0)
    x, eps = data.sample(20_000, g, dtype=F64), torch.randn(20_000, 2, generator=g, dtype=F64)
    t = torch.full((20_000,), 0.4, dtype=F64)
    z, best = ddpm.q_sample(x, t, eps, schedule), data.optimal_model("s", schedule)
    residual = -eps / schedule.sigma(t)[:, None] - best(z, t)             # conditional minus marginal score
    assert residual.square().mean() > 0.1                                  # they are not the same
    for f in torch.ones_like(z), z, z.sin(), best(z, t):                    # but differ by noise no f(z) can explain
        product = (residual * f).mean(1)
        assert abs(product.mean()) < 4 * product.std() / 20_000**0.5


@every_set
def test_standardised_exactly(name):
    data = DATASETS[name]
    assert_close(data.centres.mean(0), torch.zeros(2, dtype=F64), atol=1e-12, rtol=0)
    assert_close(data.centres.var(0, correction=0) + data.std**2, torch.ones(2, dtype=F64))
    x = data.sample(200_000, torch.Generator().manual_seed(0), dtype=F64)
    assert x.shape == (200_000, 2)
    assert_close(x.mean(0), torch.zeros(2, dtype=F64), atol=0.01, rtol=0)
    assert_close(x.var(0), torch.ones(2, dtype=F64), atol=0.01, rtol=0)


def test_noise_is_independent_and_equal_on_both_axes():
    data = DATASETS["clusters"]
    x = data.sample(100_000, torch.Generator().manual_seed(0), dtype=F64)
    noise = (x - data.centres[torch.cdist(x, data.centres).argmin(1)]) / data.std
    assert_close(torch.cov(noise.T), torch.eye(2, dtype=F64), atol=0.02, rtol=0)
    share = torch.cdist(x, data.centres).argmin(1).bincount() / 100_000
    assert_close(share, torch.full((4,), 0.25), atol=0.01, rtol=0)


def test_centres_on_a_curve_are_a_fraction_of_the_noise_apart():
    for name in "rings", "swiss_roll", "waves":
        data = DATASETS[name]
        gaps = (data.centres.diff(dim=0) / data.std).norm(dim=1)
        assert len(data.centres) == 2000 and gaps.sort().values[:-1].max() < 0.14     # the largest joins two curves


def test_shapes_are_the_described_ones():
    """Undo the standardising with the exact variance of each shape, then check the curve and the noise."""
    pi = math.pi
    u = 1.5 * pi + 3 * pi * (torch.arange(10**6, dtype=F64) + 0.5) / 10**6
    spiral = torch.stack([u * u.cos(), u * u.sin()])
    var = {"clusters": (1 + 0.04, 1 + 0.04), "rings": (0.5 + 0.25 + 0.0025, 0.5 + 0.0025),
           "swiss_roll": (spiral.var(1) + 0.25).tolist(), "waves": ((4 * pi)**2 / 12 + 0.0625, 0.5 + 1 + 0.0625)}
    noise = {"clusters": 0.2, "rings": 0.05, "swiss_roll": 0.5, "waves": 0.25}
    mean = {"swiss_roll": spiral.mean(1)}
    raw = {}
    for name in var:
        data, scale = DATASETS[name], torch.tensor(var[name], dtype=F64).sqrt()
        assert_close(data.std, noise[name] / scale, rtol=1e-5, atol=0)
        raw[name] = data.centres * scale + mean.get(name, 0)
    x, y = raw["clusters"].T
    assert {(round(a, 6), round(b, 6)) for a, b in raw["clusters"].tolist()} == {(1, 1), (1, -1), (-1, 1), (-1, -1)}
    x, y = raw["rings"].T
    radius = torch.hypot(x.abs() - 0.5, y), torch.hypot(x.abs() + 0.5, y)
    assert torch.minimum((radius[0] - 1).abs(), (radius[1] - 1).abs()).max() < 1e-4
    radius = raw["swiss_roll"].norm(dim=1)
    assert_close(torch.atan2(*raw["swiss_roll"].T.flip(0)).cos(), radius.cos(), atol=1e-2, rtol=0)
    assert_close(radius.aminmax().min.item(), 1.5 * pi, atol=0.01, rtol=0)
    assert_close(radius.aminmax().max.item(), 4.5 * pi, atol=0.01, rtol=0)
    x, y = raw["waves"].T
    assert_close((y - x.sin()).abs(), torch.ones_like(x), atol=1e-3, rtol=0)
    assert_close(x.max().item(), 2 * pi, atol=0.01, rtol=0)


@pytest.mark.parametrize("shape", [datasets2d.rings, datasets2d.swiss_roll, datasets2d.waves])
def test_more_centres_change_nothing(shape):
    coarse, fine = datasets2d.standardised(*shape()), datasets2d.standardised(*shape(4000))
    x = fine.sample(2000, torch.Generator().manual_seed(0), dtype=F64)
    assert_close(coarse.log_prob(x), fine.log_prob(x), rtol=0, atol=2e-3)
    assert abs((coarse.log_prob(x) - fine.log_prob(x)).mean()) < 1e-5


COARSE = {"clusters": DATASETS["clusters"], "rings": datasets2d.standardised(*datasets2d.rings(150)),
          "swiss_roll": datasets2d.standardised(*datasets2d.swiss_roll(200)),
          "waves": datasets2d.standardised(*datasets2d.waves(150))}      # fewer centres: 7 times faster


@pytest.mark.parametrize("name", COARSE)
def test_ancestral_sampling_with_the_exact_denoiser_ends_at_the_floor(name):
    data, schedule, g = COARSE[name], ddpm.SCHEDULES["cosine"], torch.Generator().manual_seed(1)
    samples = samplers.sample(data.optimal_model("v", schedule), (2500, 2), 256, target="v", schedule=schedule,
                                    generator=g)
    real = DATASETS[name].sample(50_000, g)
    for distance, (mean, std) in metrics.floor(DATASETS[name], 2500, 50_000, 20, g).items():
        assert getattr(metrics, distance)(samples, real) < mean + 3.5 * std
    assert_close(DATASETS[name].log_prob(samples).mean(), DATASETS[name].log_prob(real[:10_000]).mean(),
                 atol=0.1, rtol=0)                                          # standard errors 0.02 and 0.01
