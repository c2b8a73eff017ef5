"""The objectives against linear scores, autograd's Jacobian, quadrature, and the Fisher divergence they stand for."""
import math
import runpy

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import score_matching
from datasets2d import DATASETS

F64 = torch.float64
CLUSTERS = DATASETS["clusters"]
A = torch.tensor([[1.3, 0.4, -0.2], [-0.7, 0.8, 0.5], [0.1, -0.3, 2.1]], dtype=F64)
OFFSET = torch.tensor([0.3, -1.0, 0.6], dtype=F64)


def seed(n):
    return torch.Generator().manual_seed(n)


def normal(*shape, n=0):
    return torch.randn(shape, generator=seed(n), dtype=F64)


def on_sphere(*shape, n=1):
    u = normal(*shape, n=n)
    return u / u.flatten(1).norm(dim=1).reshape(-1, *[1] * (len(shape) - 1))


def linear(x):
    return OFFSET - x @ A.T


class Smooth(nn.Module):
    """A small network with its own weights, x (B, ...) -> (B, ...)."""

    def __init__(self, dim=3):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(dim, 8), nn.Tanh(), nn.Linear(8, 8), nn.SiLU(),
                                    nn.Linear(8, dim)).double()

    def forward(self, x):
        return self.layers(x.flatten(1)).reshape(x.shape)


def jacobians(score, x, **options):
    """ds_i / dx_j of each row by backward passes: (B, D, D)."""
    one = lambda row: score(row[None])[0]
    return torch.stack([torch.autograd.functional.jacobian(one, row, **options).reshape(row.numel(), -1) for row in x])


def wrong(x):
    """A score of the wrong width, with curl: no gradient of anything."""
    return CLUSTERS.score(x, 1.0, 0.3) + torch.stack([torch.sin(2 * x[:, 1]), 0.5 * x[:, 0]], 1)


def quadrature(sigma=0.0, h=0.02):
    """A grid (B, 2) and weights, the density of the clusters with noise: sums over it are means."""
    grid = torch.cartesian_prod(*[torch.arange(-3 - 3 * sigma, 3 + 3 * sigma, h, dtype=F64)] * 2)
    weight = h * h * CLUSTERS.log_prob(grid, 1.0, sigma).exp()
    assert_close(weight.sum().item(), 1.0, rtol=1e-6, atol=0)
    return grid, weight


def angles(n=16):
    """Directions in the plane at equal angles: the mean over them of a polynomial of u is that over the circle."""
    angle = torch.arange(n, dtype=F64) * 2 * math.pi / n + 0.1
    return torch.stack([angle.cos(), angle.sin()], 1)


def test_fisher_divergence_is_half_a_squared_distance_summed_over_dimensions():
    x, truth = torch.tensor([[1.0, 2.0], [0.0, -1.0]]), torch.tensor([[2.0, 0.0], [1.0, 1.0]])
    assert_close(score_matching.fisher(lambda x: 3 * x, x, truth), torch.tensor([0.5 * (1 + 36), 0.5 * (1 + 16)]))


def test_of_a_linear_score_each_objective_is_its_formula():
    x, u = normal(50, 3), on_sphere(50, 3)
    s = OFFSET - torch.einsum("ij,bj->bi", A, x)
    assert_close(score_matching.exact(linear, x), 0.5 * s.square().sum(1) - (1.3 + 0.8 + 2.1))
    curvature = -torch.einsum("bi,ij,bj->b", u, A, u)
    assert_close(score_matching.sliced(linear, x, u), curvature + 0.5 * s.square().mean(1))
    plain = curvature + 0.5 * torch.einsum("bi,bi->b", u, s)**2
    assert_close(score_matching.sliced(linear, x, u, reduced=False), plain)


@pytest.mark.parametrize("shape", [(3,), (1, 3, 2)])
def test_of_a_network_they_are_those_of_autograds_jacobian(shape):
    score = Smooth(math.prod(shape))
    x, u = normal(7, *shape), on_sphere(7, *shape)
    J, s, flat = jacobians(score, x), score(x).flatten(1), u.flatten(1)
    exact = 0.5 * s.square().sum(1) + J.diagonal(dim1=1, dim2=2).sum(1)
    assert_close(score_matching.exact(score, x), exact)
    sliced = torch.einsum("bi,bij,bj->b", flat, J, flat)
    assert_close(score_matching.sliced(score, x, u), sliced + 0.5 * s.square().mean(1))
    assert_close(score_matching.sliced(score, x, u, False), sliced + 0.5 * (flat * s).sum(1)**2)


def test_gradients_reach_the_network_and_are_those_of_autograds_jacobian():
    score, x, u = Smooth(), normal(5, 3), on_sphere(5, 3)
    weights = list(score.parameters())
    J, s = jacobians(score, x, create_graph=True), score(x)
    exact = 0.5 * s.square().sum(1) + J.diagonal(dim1=1, dim2=2).sum(1)
    sliced = torch.einsum("bi,bij,bj->b", u, J, u) + 0.5 * s.square().mean(1)
    for ours, by_hand in (score_matching.exact(score, x), exact), (score_matching.sliced(score, x, u), sliced):
        expected = torch.autograd.grad(by_hand.mean(), weights, allow_unused=True, retain_graph=True)
        got = torch.autograd.grad(ours.mean(), weights, allow_unused=True)
        assert_close(got, expected)


def test_they_work_without_gradients_and_of_a_score_that_is_a_gradient_itself():
    """E = sum log cosh(A x): its score is -A' tanh(A x), whose Jacobian is -A' diag(1 - tanh^2) A."""
    def score(x):
        return torch.func.grad(lambda x: -torch.log(torch.cosh(x @ A.T)).sum())(x)
    x, u = normal(6, 3), on_sphere(6, 3)
    tanh = torch.tanh(x @ A.T)
    J = -torch.einsum("ki,bk,kj->bij", A, 1 - tanh**2, A)
    half = 0.5 * (tanh @ A).square().sum(1)
    for grad in True, False:
        with torch.set_grad_enabled(grad):
            assert_close(score_matching.exact(score, x), half + torch.einsum("bii->b", J))
            assert_close(score_matching.sliced(score, x, u), half / 3 + torch.einsum("bi,bij,bj->b", u, J, u))
    with torch.no_grad():
        assert not score_matching.exact(Smooth(), x).requires_grad


def test_without_the_truth_exact_is_the_fisher_divergence_but_for_a_constant_of_the_data():
    x, weight = quadrature()
    truth = CLUSTERS.score(x)
    fisher = (weight * score_matching.fisher(wrong, x, truth)).sum()
    exact = (weight * score_matching.exact(wrong, x)).sum()
    constant = 0.5 * (weight * truth.square().sum(1)).sum()
    assert fisher > 5
    assert_close(exact, fisher - constant, rtol=1e-5, atol=0)


def test_the_least_exact_objective_is_minus_half_the_fisher_information():
    """Clusters so far apart are Gaussians of variance 1 / 26: 26 for two dimensions, -25.87 by 1,000,000 draws."""
    x, weight = quadrature()
    value = (weight * score_matching.exact(CLUSTERS.score, x)).sum()
    assert_close(value.item(), -26.0, rtol=1e-4, atol=0)


@pytest.mark.parametrize("reduced", [True, False])
def test_over_directions_sliced_is_exact_over_its_dimensions(reduced):
    x = normal(5, 2)
    values = [score_matching.sliced(wrong, x, u.expand_as(x), reduced) for u in angles()]
    assert_close(torch.stack(values).mean(0), score_matching.exact(wrong, x) / 2)


def test_the_reduced_form_varies_less():
    x, u = CLUSTERS.sample(20_000, seed(0), F64), on_sphere(20_000, 2)
    std = lambda reduced: score_matching.sliced(CLUSTERS.score, x, u, reduced).std().item()
    assert_close(std(False), 18.0, rtol=0.03, atol=0)                # of the same set: SPECS of the issue, 18.0
    assert std(True) < 0.8 * std(False)


def test_with_relu_the_value_is_right_and_autograds_gradient_is_not():
    """s = relu(x - c) for x ~ N(0, 1): d/dc of E[trace] = P(x > c) is -p(c); autograd says 0."""
    x = torch.arange(-8, 8, 1e-3, dtype=F64)[:, None]
    weight = 1e-3 * torch.exp(-0.5 * x[:, 0]**2) / math.sqrt(2 * math.pi)
    score = lambda c: lambda x: (x - c).relu()
    trace = lambda c: (weight * (score_matching.exact(score(c), x) - 0.5 * score(c)(x)[:, 0]**2)).sum()
    c = torch.tensor(0.5, dtype=F64, requires_grad=True)
    assert_close(trace(c).item(), 0.5 * math.erfc(0.5 / math.sqrt(2)), rtol=1e-3, atol=0)
    gradient, = torch.autograd.grad(trace(c), c, allow_unused=True)
    assert gradient is None or gradient.abs() < 1e-12


def test_they_cost_as_many_evaluations_as_they_say(monkeypatch):
    """One of the score each, and D backward passes of `exact`, one of `sliced`."""
    calls, passes, vjp = [], [], torch.func.vjp

    def counted(score, x):
        value, backward = vjp(score, x)
        return value, lambda u: passes.append(1) or backward(u)
    monkeypatch.setattr(torch.func, "vjp", counted)
    score, x = lambda x: calls.append(1) or -x, normal(4, 5)
    for objective, n in [(lambda: score_matching.fisher(score, x, x), 0), (lambda: score_matching.exact(score, x), 5),
                         (lambda: score_matching.sliced(score, x, x), 1),
                         (lambda: score_matching.denoising(score, x, x, 0.1), 0)]:
        calls.clear()
        passes.clear()
        objective()
        assert (len(calls), len(passes)) == (1, n)


def test_denoising_is_equation_3_44_with_a_half():
    x, eps, sigma = normal(6, 3), normal(6, 3, n=1), 0.3
    z = x + 0.3 * eps
    expected = 0.5 * (linear(z) + (z - x) / 0.3**2).square().sum(1)
    assert_close(score_matching.denoising(linear, x, eps, sigma), expected)


def test_denoising_is_the_fisher_divergence_of_the_noisy_data_but_for_a_constant():
    """Quadrature over x and eps, of a mixture on a line, whose noisy density is again one."""
    sigma, h = 0.5, 0.05
    centres, share = torch.tensor([-1.0, 0.8], dtype=F64), torch.tensor([0.3, 0.7], dtype=F64)

    def log_prob(x, std):
        return (share.log() + torch.distributions.Normal(centres, std).log_prob(x)).logsumexp(-1)
    score = lambda z, std: torch.func.grad(lambda z: log_prob(z, std).sum())(z)
    field = lambda z: torch.sin(z) - 0.7 * z
    line = torch.arange(-6, 6, h, dtype=F64)
    x, eps = torch.cartesian_prod(line, line)[:, :1], torch.cartesian_prod(line, line)[:, 1:]
    weight = h * h * (log_prob(x, 0.4) - 0.5 * eps[:, 0]**2).exp() / math.sqrt(2 * math.pi)
    denoising = (weight * score_matching.denoising(field, x, eps, sigma)).sum()
    std, z = math.hypot(0.4, sigma), torch.arange(-9, 9, h, dtype=F64)[:, None]
    weight, truth = h * log_prob(z, std).exp(), score(z, std)
    fisher = (weight * score_matching.fisher(field, z, truth)).sum()
    constant = 0.5 * (1 / sigma**2 - (weight * truth[:, 0]**2).sum())
    assert_close(denoising, fisher + constant, rtol=1e-6, atol=0)


@pytest.mark.parametrize("sigma, floor", [(0.1, 158.6), (0.3, 7.82), (1.0, 0.918)])
def test_the_least_denoising_objective_is_what_no_score_can_know(sigma, floor):
    """D / sigma^2 minus the Fisher information of the noisy clusters, halved, by quadrature and by draws."""
    z, weight = quadrature(sigma, 0.05)
    half = 0.5 * (2 / sigma**2 - (weight * CLUSTERS.score(z, 1.0, sigma).square().sum(1)).sum()).item()
    assert_close(half, floor / 2, rtol=0.01, atol=0)
    x, eps = CLUSTERS.sample(100_000, seed(2), F64), normal(100_000, 2, n=3)
    drawn = score_matching.denoising(lambda z: CLUSTERS.score(z, 1.0, sigma), x, eps, sigma).mean().item()
    assert_close(drawn, half, rtol=0.02, atol=0)


def test_multi_scale_is_denoising_at_every_rows_own_level_times_its_variance():
    x, eps, i = normal(6, 3), normal(6, 3, n=1), torch.tensor([0, 2, 1, 1, 0, 2])
    sigmas, seen = torch.tensor([0.1, 0.4, 2.0], dtype=F64), []

    def score(z, i):
        seen.append((z, i))
        return linear(z) * (1 + i[:, None])
    value = score_matching.multi_scale(score, x, eps, i, sigmas)
    for row, level in enumerate(i.tolist()):
        sigma = [0.1, 0.4, 2.0][level]
        z = x[row] + sigma * eps[row]
        assert_close(seen[0][0][row], z)
        expected = 0.5 * sigma**2 * ((1 + level) * (OFFSET - A @ z) + (z - x[row]) / sigma**2).square().sum()
        assert_close(value[row], expected)
    assert len(seen) == 1 and seen[0][1] is i
    image = score_matching.multi_scale(lambda z, i: 0 * z, eps.reshape(6, 1, 3, 1), eps.reshape(6, 1, 3, 1), i, sigmas)
    assert_close(image, 0.5 * eps.square().sum(1))                    # the weighted target is eps itself


@pytest.mark.parametrize("shape", [(3,), (1, 3, 2)])
@pytest.mark.parametrize("sigma", [0.0, 0.2])
def test_objectives_for_training_are_the_same_per_dimension(shape, sigma):
    D = math.prod(shape)
    score, x, eps = Smooth(D), normal(5, *shape), normal(5, *shape, n=1)
    assert set(score_matching.OBJECTIVES) == {"exact", "sliced", "denoising"}
    objective = lambda loss: score_matching.OBJECTIVES[loss](score, *score_matching.batch(x, eps, loss, sigma))
    z, y = score_matching.batch(x, eps, "exact", sigma)
    assert_close(z, x + sigma * eps)
    assert_close(y, torch.zeros_like(x))
    assert_close(objective("exact"), score_matching.exact(score, z) / D)
    z, u = score_matching.batch(x, eps, "sliced", sigma)
    assert_close(z, x + sigma * eps)
    assert_close(u.flatten(1).norm(dim=1), torch.ones(5, dtype=F64))
    neighbour = torch.cat([eps[-1:], eps[:-1]])
    assert_close(torch.nn.functional.cosine_similarity(u.flatten(1), neighbour.flatten(1)), torch.ones(5, dtype=F64))
    assert_close(objective("sliced"), score_matching.sliced(score, z, u, True))
    if sigma:
        z, y = score_matching.batch(x, eps, "denoising", sigma)
        assert_close(z, x + sigma * eps)
        assert_close(y, (x - z) / sigma**2)
        assert_close(objective("denoising"), score_matching.denoising(score, x, eps, sigma) / D)


def test_in_a_batch_the_direction_tells_nothing_of_the_point():
    """The objective of the exact score of N(0, 1 + sigma^2): with u = eps of the same row its mean would be another."""
    n, sigma = 200_000, 1.0
    x, eps = normal(n, 2), normal(n, 2, n=1)
    z, u = score_matching.batch(x, eps, "sliced", sigma)
    value = score_matching.sliced(lambda z: -z / 2 * (1 + z**2), z, u, reduced=False)
    expected = score_matching.exact(lambda z: -z / 2 * (1 + z**2), z).mean() / 2
    assert_close(value.mean(), expected, rtol=0.02, atol=0)


def test_denoising_without_noise_is_refused():
    x = normal(4, 2)
    for sigma in 0.0, -0.1:
        with pytest.raises(ValueError, match="needs noise: say how much, --sigma 0.1"):
            score_matching.batch(x, x, "denoising", sigma)


def test_the_script_shows_objectives_that_agree(capsys):
    """Mean minus constant, in units of the standard error printed beside it."""
    runpy.run_path(score_matching.__file__, run_name="__main__")
    lines = capsys.readouterr().out.replace("+-", " ").splitlines()
    rows = [line.split() for line in lines if line.startswith("  ") and "mean" not in line]
    values = [(row[0], *map(float, row[-5:])) for row in rows]
    assert [name for name, *_ in values] == ["fisher", "exact", "D", "D", "fisher", "exact", "denoising"]
    for _, mean, error, *_ in values[1:4]:
        assert abs(mean - values[0][1]) < 4 * error
    for _, mean, error, *_ in values[5:]:
        assert abs(mean - values[4][1]) < 4 * error
    assert [row[-1] for row in values] == [0, 2, 1, 1, 0, 2, 0]
