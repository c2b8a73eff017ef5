r"""How good samples are: mean distance, covariance distance and their floor (thesis 4.3.1), log-density.

Read `datasets2d.py` first. Two finite samples of one distribution already differ: with 10,000 points against 50,000 the
mean distance is about 0.014. That is the floor; a result at the floor is as good as this metric can tell.

Not here: FID (Eq. 4.6), and the likelihood of a model.

    python metrics.py     # the floor of every set, 10,000 points against 50,000
"""
import torch


def mean_distance(x, y):
    """Euclidean distance of the means of x (n, D) and y (m, D), Eq. (4.2), in data units -> ()."""
    return (x.mean(0) - y.mean(0)).norm()


def covariance(x):
    """Covariance of x (n, D) with n - 1 in the denominator, Eq. (4.3) -> (D, D)."""
    centred = x - x.mean(0)
    return centred.T @ centred / (len(x) - 1)


def covariance_distance(x, y):
    """Frobenius norm of the difference of the covariances of x (n, D) and y (m, D), Eq. (4.5), in data units^2 -> ()."""
    return (covariance(x) - covariance(y)).norm()


def log_density(dataset, x):
    """Mean log-density of points x (n, 2) under the data set's exact density, in nats -> ().

    For samples as good as the data it is that of the data, minus the entropy; more means too sharp, less means off the
    data. It sees what two moments do not: a ring drawn too thin has the right mean and covariance.
    """
    return dataset.log_prob(x).mean()


def floor(dataset, n, m, repetitions=20, generator=None):
    """What both distances are between n and m points of the data set itself.

    Returns {"mean_distance": (mean, std), "covariance_distance": (mean, std)} over the repetitions, std with n - 1.
    """
    pairs = [(dataset.sample(n, generator), dataset.sample(m, generator)) for _ in range(repetitions)]
    result = {}
    for distance in mean_distance, covariance_distance:
        values = torch.stack([distance(x, y) for x, y in pairs])
        result[distance.__name__] = (values.mean().item(), values.std().item())
    return result


if __name__ == "__main__":
    from datasets2d import DATASETS
    for name, dataset in DATASETS.items():
        distances = floor(dataset, 10_000, 50_000)
        print(f"{name:11s} " + "  ".join(f"{key} {mean:.4f} +- {std:.4f}" for key, (mean, std) in distances.items()))
