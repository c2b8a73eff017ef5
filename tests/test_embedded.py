"""A 2D set in D dimensions: against the mixture in D dimensions typed out, with full covariances, in float64."""
import math

import pytest
import torch
from torch.testing import assert_close

import embedded
import kind_points
import optimum
import settings
import train
from datasets2d import DATASETS, GaussianMixture
from ddpm import SCHEDULES

F64 = torch.float64
PLANE = GaussianMixture(torch.tensor([[-1.0, 0.3], [0.5, 0.8], [1.2, -1.0]], dtype=F64),
                        torch.tensor([0.2, 0.4], dtype=F64))


def components(data, alpha, sigma):
    """Each component of z as a normal distribution of D dimensions, and the gain of x from z in it."""
    P, identity = data.basis, torch.eye(data.dim, dtype=F64)
    cov = P @ torch.diag(data.plane.std**2) @ P.T + 0.01**2 * (identity - P @ P.T)
    of_z = alpha**2 * cov + sigma**2 * identity
    return [(torch.distributions.MultivariateNormal(alpha * P @ c, of_z), P @ c, alpha * cov @ of_z.inverse())
            for c in data.plane.centres]


@pytest.mark.parametrize("dim", [2, 3, 7])
@pytest.mark.parametrize("alpha, sigma", [(1.0, 0.01), (0.8, 0.6), (0.02, 1.0)])
def test_density_denoiser_and_score_are_those_of_the_mixture_in_D_dimensions(dim, alpha, sigma):
    data, g = embedded.Embedded(PLANE, dim), torch.Generator().manual_seed(0)
    z = (alpha * data.sample(40, g, F64) + sigma * torch.randn(40, dim, generator=g, dtype=F64)).requires_grad_()
    parts = components(data, alpha, sigma)
    log_p = torch.stack([normal.log_prob(z) for normal, _, _ in parts], 1) - math.log(3)
    share = log_p.softmax(1)
    x_hat = sum(share[:, k, None] * (centre + (z - normal.mean) @ gain.T)
                for k, (normal, centre, gain) in enumerate(parts))
    score, = torch.autograd.grad(log_p.logsumexp(1).sum(), z, retain_graph=True)
    assert_close(data.log_prob(z, alpha, sigma), log_p.logsumexp(1))
    assert_close(data.denoise(z, alpha, sigma), x_hat)
    assert_close(data.score(z, alpha, sigma), score)


def test_the_best_model_of_v_has_a_time_for_each_row():
    data, schedule = embedded.Embedded(PLANE, 5), SCHEDULES["cosine"]
    z, t = torch.randn(6, 5, generator=torch.Generator().manual_seed(1)).double(), torch.linspace(0.1, 0.9, 6).double()
    alpha, sigma = torch.cos(math.pi / 2 * t)[:, None], torch.sin(math.pi / 2 * t)[:, None]
    x_hat = torch.cat([data.denoise(z[i:i + 1], alpha[i, 0], sigma[i, 0]) for i in range(6)])
    assert_close(data.optimal_model("v", schedule)(z, t), (alpha * z - x_hat) / sigma)     # v = (alpha z - x) / sigma


def test_points_are_those_of_the_plane_and_a_little_off_it():
    data = DATASETS["rings-6"]
    x = data.sample(20_000, torch.Generator().manual_seed(3), F64)
    plane = DATASETS["rings"].sample(20_000, torch.Generator().manual_seed(3), F64)
    assert_close(data.project(x), plane)                   # of the same draws: the noise is off the plane alone
    assert_close(data.off(x).square().sum(1).mean().item(), 4 * 1e-4, rtol=0.03, atol=0)
    assert data.project(data.off(x)).abs().max() < 1e-12
    P = embedded.basis(300)
    assert_close(P.T @ P, torch.eye(2, dtype=F64))
    assert_close(embedded.basis(300), P, rtol=0, atol=0)
    assert not torch.equal(embedded.basis(301)[:300], P)


def test_the_least_error_of_x_does_not_depend_on_D_and_that_of_eps_neither():
    """In the plane it is that of 2D; off it 0.01^2 sigma^2 / (alpha^2 0.01^2 + sigma^2) a dimension."""
    alpha, sigma, g = 0.8, 0.6, torch.Generator().manual_seed(0)
    data = DATASETS["clusters-12"]
    x = data.sample(40_000, g, F64)
    z = alpha * x + sigma * torch.randn(x.shape, generator=g, dtype=F64)
    error = (data.denoise(z, alpha, sigma) - x).square().sum(1).mean().item()
    plane = DATASETS["clusters"].covariance(data.project(z), alpha, sigma).sum(1).mean().item()
    assert error == pytest.approx(plane + 10 * 1e-4 * 0.36 / (0.64e-4 + 0.36), rel=0.03)


def test_names_are_a_rule_and_no_row():
    data = DATASETS["rings-512"]
    assert "rings-512" in DATASETS and data.dim == 512 and data is DATASETS["rings-512"]
    assert DATASETS["rings"].dim == 2 and not any("-" in name for name in DATASETS) and len(DATASETS) == 5
    for name in "rings-1", "rings-0", "rings-02", "rings-4097", "rings-", "rings--4", "rings-4-4", "spiral-4", "-4", 4:
        assert name not in DATASETS
        with pytest.raises(KeyError):
            DATASETS[name]


@pytest.fixture
def few_points(monkeypatch):
    clear = lambda: [cached.cache_clear() for cached in (
        optimum.optimal_predictions, optimum.optimal_errors, kind_points.floors)]
    clear()
    monkeypatch.setattr(kind_points, "POINTS", 1250)
    yield
    clear()


@pytest.mark.usefixtures("few_points")
def test_a_run_of_it_is_one_of_points_in_D_dimensions(tmp_path, capsys):
    train.main(["--data", "rings-5", "rings-2", "rings", "--target", "x", "--loss", "v_space", "--epochs", "1",
                "--width", "4", "--out", str(tmp_path), "--device", "cpu"])
    one = train.run.open(tmp_path / "rings-5-x-v_space-s0")
    assert one.model().weights[0].shape == (1, 4, 6) and settings.kind(one.config) == "points"
    assert kind_points.load(one.config).shape == (1250, 5)
    last, best = one.history[-1], DATASETS["rings-5"].optimal_model("x", SCHEDULES["cosine"])
    z, t, x, w = train.train_points.optimum.test_batch(one.config)
    assert last["optimum"] == pytest.approx(
        ((best(z, t) - x).square().mean(1) / torch.sin(math.pi / 2 * t)**2).mean().item(), rel=1e-4)
    assert last["optimum"] < last["test_loss"]
    assert "stack 2 of 2" in capsys.readouterr().out       # rings and rings-2 are of one
    with pytest.raises(SystemExit):
        train.parse(["--data", "rings-5", "--target", "x", "--loss", "vlb", "--timesteps", "9", "--variance", "best"])
    assert "best is known for clusters, rings, swiss_roll, waves, unequal alone" in capsys.readouterr().err
