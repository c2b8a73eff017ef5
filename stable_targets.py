r"""Targets of less variance: the mean of x and eps given z and the points of the batch (Xu, Tong and Jaakkola 2023).

Read `batches.py` first. The target of a squared error is noisy: many x give nearly the same z, and the network has to
average them. Of the points of a batch the average is known. z = alpha x_J + sigma eps was made from one of x_1 .. x_B,
and as all of them were as likely before z was seen, the probability that it was x_j is

    w_j = softmax over j of -|z - alpha x_j|^2 / (2 sigma^2)

    E[x | z, batch] = sum_j w_j x_j,      E[eps | z, batch] = (z - alpha E[x | z, batch]) / sigma

z itself stays as it is. This costs no bias, whatever the size of the batch, as the rows of one batch are all made from
its own points: E[E[x | z, batch] | z] = E[x | z]. So the network that minimises the expected loss is the same and the
gradient has the same mean, each row's part of it with less variance (Rao and Blackwell). The loss in training is lower
by that variance; the loss on test points, which has none of this, stays comparable. Little is gained where the distance
of two points is above sigma / alpha, as it is near t = 0, and in many dimensions at most t.

Not here: what it does to training (`reproduce_fast.py`).

    python stable_targets.py        # the variance of the target that is left, by t and size of the batch
"""
import torch

import ddpm


def given_batch(x, t, eps, schedule):
    """E[x | z, batch] and E[eps | z, batch] for each of a batch: x, eps (B, D), t (B,) -> (B, D) each, of the same z.

    alpha must be above 0, as it is in continuous time.
    """
    alpha, sigma = (ddpm.expand(c(t), x) for c in (schedule.alpha, schedule.sigma))
    # Not by the product x x': of differences of size sigma nothing would be left. And not by `cdist`: slower.
    columns, ahead = x.T.contiguous(), (x + sigma / alpha * eps).T                                  # (D, B)
    distance_sq = sum((there[:, None] - column).square_() for there, column in zip(ahead, columns))
    probability = torch.softmax(-0.5 * (alpha / sigma)**2 * distance_sq, 1)                         # (B, B)
    mean = (columns @ probability.T).T                          # so round: the other is slow on a CPU
    return mean, eps + alpha / sigma * (x - mean)


def given_batches(x, t, eps, size, schedule):
    """`given_batch` of each `size` rows of many: the two means, like x and eps."""
    parts = zip(*(c.split(size) for c in (x, t, eps)))
    return tuple(map(torch.cat, zip(*(given_batch(*part, schedule) for part in parts))))


if __name__ == "__main__":
    from datasets2d import DATASETS
    data, schedule, n = DATASETS["rings"], ddpm.SCHEDULES["cosine"], 16_384
    g = torch.Generator().manual_seed(0)
    x, best = data.sample(n, g).double(), data.optimal_model("x", schedule)
    sizes = 1, 64, 512, 4096
    print("rings, cosine schedule: mean square of target x minus E[x | z]\n   t     "
          + " ".join(f"{f'batch {size}':>11s}" for size in sizes))
    for t in 0.01, 0.05, 0.1, 0.3, 0.5, 0.7, 0.9:
        times, eps = torch.full((n,), t, dtype=torch.float64), torch.randn(n, 2, generator=g, dtype=torch.float64)
        truth, left = best(ddpm.q_sample(x, times, eps, schedule), times), []
        for size in sizes:
            left.append((given_batches(x, times, eps, size, schedule)[0] - truth).square().mean().item())
        print(f"{t:5g}    " + " ".join(f"{value:11.3g}" for value in left))
