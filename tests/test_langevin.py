"""Langevin dynamics against the variance recursions of Gaussian data, the Metropolis rule written out, quadrature."""
import math

import pytest
import torch
from torch.testing import assert_close

import langevin
from datasets2d import GaussianMixture

F64 = torch.float64
UNEQUAL = GaussianMixture(torch.tensor([[-1, 0], [1, 0], [1, 0], [1, 0], [1, 0]]).double(),
                          torch.tensor([0.2, 0.2]).double())


def seed(n=0):
    return torch.Generator().manual_seed(n)


def normal(*shape, n=100):
    return torch.randn(shape, generator=seed(n), dtype=F64)


def recorded(n=7):
    """A source of noise and the list of what it gave."""
    given, g = [], seed(n)

    def noise(x):
        given.append(torch.randn(x.shape, generator=g, dtype=x.dtype))
        return given[-1]
    return noise, given


def score(x):
    """Of a density that is not Gaussian: log p = -x^4 / 4 - x^2 / 2 in each dimension."""
    return -x**3 - x


def log_prob(x):
    return -(x**4 / 4 + x**2 / 2).flatten(1).sum(1)


def test_a_step_is_algorithm_1():
    x, s, w = torch.tensor([[1.0, -2.0]]), torch.tensor([[0.5, 3.0]]), torch.tensor([[-1.0, 2.0]])
    assert_close(langevin.update(x, s, 0.08, w), torch.tensor([[1 + 0.04 - 0.4, -2 + 0.24 + 0.8]]))


def test_every_step_uses_the_score_where_it_is_and_fresh_noise():
    noise, given = recorded()
    x = expected = normal(5, 1, 2, 2)
    seen = []
    result = langevin.langevin(score, x, 0.01, 4, noise, watch=lambda i, x, accepted: seen.append((i, x, accepted)))
    for i in range(4):
        expected = expected + 0.01 * (-expected**3 - expected) + math.sqrt(0.02) * given[i]
        assert_close(seen[i][1], expected)
    assert len(given) == 4 and [(i, accepted) for i, _, accepted in seen] == [(i, None) for i in (1, 2, 3, 4)]
    assert torch.equal(result, seen[-1][1])


@pytest.mark.parametrize("steps", [1, 3, 40])
def test_of_gaussian_data_the_variance_is_that_of_its_recursion(steps):
    """V <- (1 - a / c^2)^2 V + 2 a, which ends at c^2 / (1 - a / (2 c^2)), above c^2."""
    c, a, start = 0.6, 0.15, 2.0
    V, mean = 0.0, start
    for _ in range(steps):
        V, mean = (1 - a / c**2)**2 * V + 2 * a, (1 - a / c**2) * mean
    if steps == 40:
        assert_close(V, c**2 / (1 - a / (2 * c**2)), rtol=1e-9, atol=0)
    x = langevin.langevin(lambda x: -x / c**2, torch.full((200_000, 1), start, dtype=F64), a, steps, seed())
    assert_close(x.var().item(), V, rtol=0.015, atol=0)
    assert_close(x.mean().item(), mean, rtol=0, atol=0.01)


def test_what_the_poster_calls_annealed_langevin_has_another_law():
    """At one t its step is beta (score + x / 2) with noise sqrt(beta): `update` of 2 score + x with step beta / 2.

    That is the score of p^2 / N(0, I): of N(0, v) the variance v / (2 - v).
    """
    v, beta = 0.25, 0.004
    x = langevin.langevin(lambda x: -2 * x / v + x, normal(20_000, 1), beta / 2, 300, seed())
    assert_close(x.var().item(), v / (2 - v), rtol=0.05, atol=0)


def test_metropolis_accepts_by_the_ratio_of_densities_and_proposals():
    """One step at a time, each row by hand: p(x') q(x | x') / (p(x) q(x' | x)) against u = Phi(w)."""
    step, seen = 0.3, []
    noise, given = recorded()
    start = normal(4000, 2)
    langevin.langevin(score, start, step, 2, noise, log_prob, lambda *row: seen.append(row))
    q = lambda to, x: torch.distributions.Normal(x + step * (-x**3 - x), math.sqrt(2 * step)).log_prob(to).sum(1)
    p = lambda x: -(x**4 / 4 + x**2 / 2).sum(1)
    assert len(given) == 4
    for i, x, accepted in seen:
        ahead = start + step * (-start**3 - start) + math.sqrt(2 * step) * given[2 * i - 2]
        u = torch.distributions.Normal(0.0, 1.0).cdf(given[2 * i - 1][:, 0])
        by_hand = u < torch.exp(p(ahead) + q(start, ahead) - p(start) - q(ahead, start))
        assert accepted.dtype == torch.bool and torch.equal(accepted, by_hand)
        assert 0.2 < accepted.double().mean() < 0.9
        assert_close(x, torch.where(by_hand[:, None], ahead, start))
        assert torch.equal(x[~accepted], start[~accepted])
        start = x


@pytest.mark.parametrize("a", [0.8, 1.5])
def test_with_it_the_variance_of_gaussian_data_is_exact_at_a_large_step(a):
    """Where plain Langevin dynamics has 1 / (1 - a / 2) of it, 1.67 and 4 times."""
    c, accepted = 0.7, []
    for log_prob, expected in (lambda x: -x[:, 0]**2 / (2 * c**2), c**2), (None, c**2 / (1 - a / 2)):
        x = langevin.langevin(lambda x: -x / c**2, c * normal(100_000, 1), a * c**2, 40, seed(), log_prob,
                              lambda i, x, ok: accepted.append(ok))
        assert_close(x.var().item(), expected, rtol=0.02, atol=0)
    assert 0.3 < torch.stack(accepted[:40]).double().mean() < 0.95


def test_with_it_a_density_that_is_not_gaussian_stays_what_it_is_and_without_it_does_not():
    """From draws of it, by its distribution function on a grid, on to the moments by quadrature."""
    grid = torch.arange(-5, 5, 1e-3, dtype=F64)
    weight = log_prob(grid[:, None]).exp() / log_prob(grid[:, None]).exp().sum()
    u = torch.rand(100_000, generator=seed(1), dtype=F64)
    start = grid[torch.searchsorted(weight.cumsum(0), u)][:, None]
    moments = lambda x: torch.stack([x.pow(2).mean(), x.pow(4).mean()])
    expected = torch.stack([(weight * grid**2).sum(), (weight * grid**4).sum()])
    drawn = moments(langevin.langevin(score, start, 0.3, 15, seed(), log_prob))
    assert_close(drawn, expected, rtol=0.02, atol=0)
    assert (moments(langevin.langevin(score, start, 0.1, 15, seed())) > 1.05 * expected).all()


def test_it_costs_one_evaluation_a_step_and_that_of_the_start():
    calls = {"score": 0, "log_prob": 0}

    def counted(name, function):
        def call(x):
            calls[name] += 1
            return function(x)
        return call
    for density, expected in (None, {"score": 9, "log_prob": 0}), (log_prob, {"score": 10, "log_prob": 10}):
        calls.update(score=0, log_prob=0)
        langevin.langevin(counted("score", score), normal(3, 2), 0.1, 9, seed(),
                          density and counted("log_prob", density))
        assert calls == expected


def test_it_takes_data_of_any_shape_and_refuses_each_example_whole():
    x, seen = normal(200, 1, 2, 2), []
    result = langevin.langevin(score, x, 0.4, 1, seed(), log_prob, lambda i, x, accepted: seen.append(accepted))
    moved = (result != x).flatten(1)
    assert torch.equal(moved.all(1), seen[0]) and torch.equal(moved.any(1), seen[0]) and 0 < seen[0].sum() < 200


def test_a_step_to_where_the_density_is_not_finite_is_refused():
    x = torch.full((50, 1), 0.5, dtype=F64)
    wall = lambda x: torch.where(x[:, 0] > 0, -x[:, 0], torch.nan)
    result = langevin.langevin(lambda x: -torch.ones_like(x), x, 0.5, 20, seed(), wall)
    assert (result > 0).all() and (result != x).any()


def test_draws_repeat_with_their_generator_and_keep_dtype():
    run = lambda n, dtype=F64: langevin.langevin(score, torch.zeros(4, 2, dtype=dtype), 0.1, 3, seed(n))
    assert torch.equal(run(1), run(1)) and not torch.equal(run(1), run(2))
    assert run(1, torch.float32).dtype == torch.float32
    torch.manual_seed(3)
    assert torch.equal(langevin.langevin(score, torch.zeros(4, 2, dtype=F64), 0.1, 3, None), run(3))


def test_no_graph_is_kept():
    weight = torch.ones(2, requires_grad=True)
    assert not langevin.langevin(lambda x: -weight * x, torch.zeros(3, 2), 0.1, 2, seed()).requires_grad
    assert not langevin.annealed(lambda x, s: -weight * x, torch.zeros(3, 2), [1.0], 0.1, 2, seed()).requires_grad


def test_a_step_that_diverges_is_named():
    """x <- x - step x^3 from 3 with step 1: by hand until it is not finite, at the one row that diverges."""
    x, first = torch.tensor(3.0), 0
    while x.isfinite():
        x, first = x - x**3, first + 1
    start, still = torch.tensor([[0.0], [3.0], [0.5]]), lambda x: torch.zeros_like(x)
    message = f"not finite from step {first} of 20 on - take a smaller step than 1"
    with pytest.raises(ValueError, match=message):
        langevin.langevin(lambda x: -x**3, start, 1.0, 20, still)
    with pytest.raises(ValueError, match=message):
        langevin.annealed(lambda x, sigma: -x**3 / sigma**2, start, [2.0, 1.0, 0.5, 0.2], 1.0, 5, still)
    assert 3 < first < 10
    langevin.langevin(lambda x: -x**3, start, 1.0, first - 1, still)


def test_a_network_that_is_not_finite_does_not_pass_for_one_that_refuses_every_step():
    x = torch.zeros(3, 2)
    for s, log_p in ((lambda x: x * torch.nan, log_prob), (score, lambda x: x[:, 0] / 0)):
        with pytest.raises(ValueError, match="not finite where Langevin dynamics starts"):
            langevin.langevin(s, x, 0.1, 3, seed(), log_p)


@pytest.mark.parametrize("step", [0, -0.1, math.nan])
def test_a_step_must_be_above_0(step):
    with pytest.raises(ValueError, match="must be above 0, got"):
        langevin.langevin(score, torch.zeros(3, 2), step, 3, seed())
    with pytest.raises(ValueError, match="must be above 0, got"):
        langevin.annealed(lambda x, sigma: -x, torch.zeros(3, 2), [1.0, 0.5], step, 3, seed())


def test_there_must_be_a_step():
    with pytest.raises(ValueError, match="steps must be at least 1, got 0"):
        langevin.langevin(score, torch.zeros(3, 2), 0.1, 0, seed())
    with pytest.raises(ValueError, match="steps must be at least 1, got 0"):
        langevin.annealed(lambda x, sigma: -x, torch.zeros(3, 2), [1.0, 0.5], 0.1, 0, seed())


@pytest.mark.parametrize("sigmas", [[0.1, 0.5], [1.0, 1.0], [1.0, 0.0], [0.5, -0.1], [], [1.0, 0.1, 0.2],
                                    [1.0, math.nan]])
def test_noise_levels_must_decrease(sigmas):
    with pytest.raises(ValueError, match="noise levels must decrease and be above 0"):
        langevin.annealed(lambda x, sigma: -x, torch.zeros(3, 2), sigmas, 0.1, 3, seed())


def test_annealed_takes_steps_in_proportion_to_the_variance_of_each_level():
    sigmas, told, seen = [3.0, 0.7, 0.1], [], []

    def score_at(x, sigma):
        told.append(sigma)
        return torch.full_like(x, 2.0)
    noise = lambda x: torch.full_like(x, 3.0)
    x = torch.full((2, 1, 2), 5.0, dtype=F64)
    result = langevin.annealed(score_at, x, sigmas, 0.2, 2, noise, lambda *row: seen.append(row))
    expected = x
    for k, level in enumerate([3.0, 3.0, 0.7, 0.7, 0.1, 0.1]):
        expected = expected + 2 * 0.2 * level**2 + 3 * math.sqrt(2 * 0.2) * level
        i, at, accepted = seen[k]
        assert i == k + 1 and accepted is None
        assert_close(at, expected)
        assert told[k].shape == () and told[k].dtype == F64
        assert_close(told[k].item(), level, rtol=1e-15, atol=0)
    assert len(told) == len(seen) == 6 and torch.equal(result, at)


def test_annealed_of_gaussian_data_has_the_variance_of_its_recursion():
    c, sigmas, step = 0.5, [2.0, 1.0, 0.4, 0.1], 0.2
    V = 4.0
    for sigma in sigmas:
        for _ in range(3):
            a = step * sigma**2
            V = (1 - a / (c**2 + sigma**2))**2 * V + 2 * a
    score_at = lambda x, sigma: -x / (c**2 + sigma**2)
    x = langevin.annealed(score_at, 2 * normal(200_000, 1), torch.tensor(sigmas), step, 3, seed())
    assert_close(x.var().item(), V, rtol=0.015, atol=0)


def test_the_weights_of_far_modes_are_found_with_noise_alone():
    """Exact score, 0.8 in the right mode: from N(0, I) half of the points stay left."""
    right = lambda x: (x[:, 0] > 0).double().mean().item()
    start, sigmas = torch.randn(2000, 2, generator=seed()), torch.logspace(math.log10(5), math.log10(0.02), 20)
    assert_close(right(langevin.langevin(UNEQUAL.score, start, 0.004, 300, seed())), 0.5, rtol=0, atol=0.05)
    x = langevin.annealed(lambda x, sigma: UNEQUAL.score(x, 1.0, sigma), 5 * start, sigmas, 0.1, 50, seed())
    assert_close(right(x), 0.79, rtol=0, atol=0.04)
    assert_close(UNEQUAL.log_prob(x).mean().item(), -0.15, rtol=0, atol=0.15)
