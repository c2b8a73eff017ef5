"""Both distances against numpy, and the floor against its closed form."""
import math

import numpy as np
import pytest
import torch
from pytorch_fid import fid_score
from torch.testing import assert_close

import metrics
from datasets2d import DATASETS, GaussianMixture

g = torch.Generator().manual_seed(0)
X, Y = torch.randn(5, 3, generator=g, dtype=torch.float64), 2 + torch.randn(7, 3, generator=g, dtype=torch.float64)


def test_distances_are_numpys():
    x, y = X.numpy(), Y.numpy()
    assert_close(metrics.mean_distance(X, Y).item(), float(np.linalg.norm(x.mean(0) - y.mean(0))))
    assert_close(metrics.covariance(X), torch.from_numpy(np.cov(x.T)))                           # n - 1
    difference = np.cov(x.T) - np.cov(y.T)
    assert_close(metrics.covariance_distance(X, Y).item(), float(np.sqrt((difference**2).sum())))  # Frobenius


def test_distances_by_hand():
    """Two and three points, equations (4.1) - (4.5) on paper."""
    x, y = torch.tensor([[0.0, 0.0], [2.0, 4.0]]), torch.tensor([[0.0, 0.0], [3.0, 0.0], [0.0, 3.0]])
    assert_close(metrics.mean_distance(x, y).item(), 1.0)                                        # (1, 2) and (1, 1)
    # covariances [[2, 4], [4, 8]] and [[3, -1.5], [-1.5, 3]]
    assert_close(metrics.covariance_distance(x, y).item(), math.sqrt(1 + 2 * 5.5**2 + 25))
    assert metrics.mean_distance(x, x) == 0 and metrics.covariance_distance(x, x) == 0


def test_log_density_sees_a_ring_that_is_too_thin():
    """The mean over rings of half the noise is log p under the data, by torch.distributions: 0.3 nats too high."""
    data = DATASETS["rings"]
    thin = GaussianMixture(data.centres, data.std / 2)
    x, y = (d.sample(20_000, torch.Generator().manual_seed(0), dtype=torch.float64) for d in (data, thin))
    d = torch.distributions
    reference = d.MixtureSameFamily(d.Categorical(torch.ones(len(data.centres), dtype=torch.float64)),
                                    d.Independent(d.Normal(data.centres, data.std.expand_as(data.centres)), 1))
    assert_close(metrics.log_density(data, y[:1000]), reference.log_prob(y[:1000]).mean())
    assert metrics.covariance_distance(x, y) < 0.02
    assert 0.25 < metrics.log_density(data, y) - metrics.log_density(data, x) < 0.45


def test_floor_of_the_mean_distance_is_its_closed_form():
    """Means of n and m standardised points differ by N(0, 1/n + 1/m) per axis: a Rayleigh distance."""
    floor = metrics.floor(DATASETS["clusters"], 1000, 5000, 400, torch.Generator().manual_seed(0))
    scale = math.sqrt(1 / 1000 + 1 / 5000)
    mean, std = floor["mean_distance"]
    assert abs(mean / (scale * math.sqrt(math.pi / 2)) - 1) < 0.1
    assert abs(std / (scale * math.sqrt(2 - math.pi / 2)) - 1) < 0.15
    values = [metrics.floor(DATASETS["clusters"], 10, 20, 2, torch.Generator().manual_seed(1)) for _ in range(2)]
    assert values[0] == values[1]                                      # a function of the generator alone
    g = torch.Generator().manual_seed(1)
    a, b = (metrics.mean_distance(DATASETS["clusters"].sample(10, g), DATASETS["clusters"].sample(20, g)).item()
            for _ in range(2))
    assert_close(torch.tensor(values[0]["mean_distance"]), torch.tensor([(a + b) / 2, abs(a - b) / math.sqrt(2)]))
    mean, std = floor["covariance_distance"]
    assert 0.02 < mean < 0.06 and 0 < std < mean


def test_the_floor_is_of_twenty_pairs_unless_asked_otherwise():
    class Counting:
        sizes = []

        def sample(self, n, generator):
            self.sizes.append(n)
            return torch.randn(n, 2)
    metrics.floor(Counting(), 4, 6)
    assert Counting.sizes == 20 * [4, 6]


def test_the_sliced_wasserstein_distance_is_the_mean_over_directions_of_scipys():
    """Order 2 from the quantiles, with 1 point against 3: the transport plan of sorted points, solved as a linear
    programme."""
    from scipy.optimize import linear_sum_assignment
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(6, 2, generator=g, dtype=torch.float64), \
        1 + 2 * torch.randn(18, 2, generator=g, dtype=torch.float64)
    squares = []
    for k in range(20):
        u = torch.tensor([math.cos(math.pi * k / 20), math.sin(math.pi * k / 20)], dtype=torch.float64)
        cost = ((x @ u).repeat(3)[:, None] - (y @ u)[None, :])**2
        squares.append(cost.numpy()[linear_sum_assignment(cost.numpy())].mean())
    assert_close(metrics.sliced_wasserstein(x, y).item(), math.sqrt(sum(squares) / 20))
    assert_close(metrics.sliced_wasserstein(y, x), metrics.sliced_wasserstein(x, y))
    shift = torch.tensor([3.0, 4.0], dtype=torch.float64)
    assert_close(metrics.sliced_wasserstein(x, x + shift).item(), 5 / math.sqrt(2))               # mean of cos^2 is 1/2
    assert metrics.sliced_wasserstein(x, x) == 0
    assert list(metrics.floor(DATASETS["rings"], 10, 20, 2)) == ["mean_distance", "covariance_distance",
                                                                 "sliced_wasserstein"]


def test_rows_are_sorted_as_torch_sorts_them():
    for dtype in torch.float32, torch.float64:
        x = torch.randn(3, 1000, generator=torch.Generator().manual_seed(0), dtype=dtype)
        x[1, 3:9], x[2, 5] = x[1, 2], math.inf
        assert_close(metrics.ascending(x), x.sort().values, rtol=0, atol=0)


def test_log_density_of_points_far_off_the_data_is_not_cut_off():
    """One Gaussian: -1/2 (|x|^2 / s^2 + 2 log(2 pi s^2)), at x up to 20 standard deviations away -200 nats."""
    data = GaussianMixture(torch.zeros(1, 2, dtype=torch.float64), torch.full((2,), 0.5, dtype=torch.float64))
    x = torch.tensor([[0.0, 10.0], [-3.0, 4.0]], dtype=torch.float64)
    expected = [-0.5 * (square / 0.25 + 2 * math.log(2 * math.pi * 0.25)) for square in (100, 25)]
    assert_close(metrics.log_density(data, x).item(), sum(expected) / 2, rtol=1e-9, atol=0)


# Distances of features

def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.filterwarnings("ignore:The `disp`:DeprecationWarning")
def test_the_distance_of_features_is_pytorch_fids():
    a, b = normal(40, 5), 1 + 2 * normal(50, 5, seed=1) @ normal(5, 5, seed=2)
    of = lambda x: (x.mean(0).numpy(), np.cov(x.numpy().T))
    assert_close(metrics.frechet(a, b).item(), float(fid_score.calculate_frechet_distance(*of(a), *of(b))))
    assert metrics.frechet(a.float(), b.float()).dtype == torch.float64


def test_the_kernel_distance_is_its_sums():
    """Pairs of two different points alone, each of three sums over all i and j."""
    a, b = normal(5, 3), 1 + normal(7, 3, seed=1)
    k = lambda x, y: (float(x @ y) / 3 + 1)**3
    mean = lambda pairs: sum(k(x, y) for x, y in pairs) / len(pairs)
    inside = lambda x: mean([(x[i], x[j]) for i in range(len(x)) for j in range(len(x)) if i != j])
    expected = inside(a) + inside(b) - 2 * mean([(x, y) for x in a for y in b])
    for rows in 1000, 2:
        assert metrics.kid(a, b, rows).item() == pytest.approx(expected)


def test_the_kernel_distance_has_no_bias():
    """Of one distribution its mean is 0; with the pairs i = j it would be 1."""
    found = torch.stack([metrics.kid(*pair) for pair in normal(400, 2, 20, 4)])
    error = found.std() / 400**0.5
    assert abs(found.mean()) < 4 * error and error < 0.05


def balls(x, y, k):
    """Share of x in the balls of y, by sorting."""
    inside = 0
    for point in x.numpy():
        for centre in y.numpy():
            radius = sorted(np.linalg.norm(other - centre) for other in y.numpy())[k]
            if np.linalg.norm(point - centre) <= radius:
                inside += 1
                break
    return inside / len(x)


def test_precision_and_recall_are_shares_within_the_balls():
    real, fake = normal(23, 2), 1 + 2 * normal(17, 2, seed=1)
    for k in 1, 3:
        precision, recall = (value.item() for value in metrics.precision_recall(real, fake, k))
        assert (precision, recall) == (balls(fake, real, k), balls(real, fake, k)) and precision != recall
        assert [metrics.covered(fake, real, k, rows).item() for rows in (1, 5, 100)] == 3 * [precision]
    assert metrics.precision_recall(real, fake) == metrics.precision_recall(real, fake, 3)


def test_a_lost_mode_costs_recall_and_noise_costs_precision():
    left, right, far = (normal(200, 2, seed=at) + torch.tensor([at - 20, 0]) for at in (0, 40, 400))
    real = torch.cat([left, right])
    precision, recall = metrics.precision_recall(real, left + 0.01)
    assert precision > 0.95 and abs(recall - 0.5) < 0.05
    precision, recall = metrics.precision_recall(real, torch.cat([real + 0.01, far, far]))
    assert abs(precision - 0.5) < 0.05 and recall > 0.95
