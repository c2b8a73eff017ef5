r"""Score matching: four ways to learn the score from samples alone (thesis 3.2, Eq. 3.30 - 3.45; slides).

Read `datasets2d.py` first, whose score is known. The Fisher divergence of a field s_hat(x) from the true score is what
should be small. What can be computed without the true score is the same on the average, up to a constant of the data:

    fisher         1/2 |score - s_hat|^2                       Eq. (3.30)
    exact          1/2 |s_hat|^2 + tr(ds_hat/dx)               Eq. (3.36)      fisher - 1/2 E|score|^2
    sliced         1/2 |s_hat|^2 / D + u' (ds_hat/dx) u        Eq. (3.40)      exact / D
    denoising      1/2 |s_hat(z) + eps / sigma|^2              Eq. (3.44)      fisher of z = x + sigma eps, + constant
    multi_scale    sigma^2 times it, at K noise levels         Eq. (3.45)      (Song and Ermon 2019)

`exact` and `sliced` need a network that is smooth: with ReLU the trace is constant in pieces, and autograd's gradient
of it leaves out that their borders move. (The slides print |1/2 ds/dx|^2 for 1/2 |s_hat|^2: ERRATA.md, 24.)

Not here: how samples are drawn with a score (`langevin.py`); the loss of diffusion models, which is multi_scale with
other weights (`losses.py`).

    python score_matching.py    # a wrong score of the clusters: the objectives agree; what they cost
"""
import torch

from ddpm import expand
from decoders import nats

DERIVATIVE = "exact", "sliced"         # the objectives that differentiate the network


def fisher(score, x, truth):
    """Fisher divergence, Eq. (3.30): x and the true score there (B, D) -> (B,), summed over dimensions."""
    return 0.5 * nats((truth - score(x))**2)                                                # Eq. (3.30)


def exact(score, x):
    """Score matching, Eq. (3.36) (Hyvarinen 2005): x (B, D) -> (B,), summed over dimensions.

    On the average `fisher` - 1/2 E|truth|^2. The trace takes D backward passes, one for each unit vector.
    """
    (s_hat, backward), trace = torch.func.vjp(score, x), 0
    for e in torch.eye(x[0].numel(), dtype=x.dtype, device=x.device):
        e = e.reshape(x[0].shape)
        trace = trace + nats(e * backward(e.expand_as(x))[0])                               # Eq. (3.38)
    return 0.5 * nats(s_hat**2) + trace                                                     # Eq. (3.36)


def sliced(score, x, u, reduced=True):
    """Sliced score matching, Eq. (3.40) (Song et al. 2019): x, u (B, D) -> (B,), one backward pass.

    u is uniform on the unit sphere. Then the mean is that of `exact` divided by D, for E[u u'] = I / D; with
    u ~ N(0, I) it would be `exact` itself. reduced: the mean over u of 1/2 (u' s_hat)^2 in its place, which lowers
    the variance.
    """
    s_hat, backward = torch.func.vjp(score, x)
    square = nats(s_hat**2) / x[0].numel() if reduced else nats(u * s_hat)**2
    return nats(backward(u)[0] * u) + 0.5 * square                                                 # Eq. (3.40)


def denoising(score, x, eps, sigma):
    """Denoising score matching, Eq. (3.44) (Vincent 2011): x, eps (B, D) -> (B,), summed over dimensions.

    With 1/2, which the thesis leaves out here: so it is `fisher` of z = x + sigma eps plus the constant
    1/2 (D / sigma^2 - E|score of z|^2), and has its gradients.
    """
    z = x + sigma * eps                                                                     # Eq. (3.41)
    return 0.5 * nats((score(z) + eps / sigma)**2)                                          # Eq. (3.43), (3.44)


def multi_scale(score, x, eps, i, sigmas):
    """Denoising at noise levels i (B,), integers, of sigmas (K,), Eq. (3.45): x, eps (B, D) -> (B,).

    score(z, i) -> (B, D). Weighted by sigma_i^2 (slides), without which the lowest level is nearly all of the loss.
    """
    sigma = expand(sigmas[i], x)                                                            # (B, 1)
    z = x + sigma * eps
    return 0.5 * nats(sigma**2 * (score(z, i) + eps / sigma)**2)                            # Eq. (3.45)


# For training, per dimension as all losses: (score, z, y) -> (B,), where y is of `batch`.
OBJECTIVES = {
    "exact":     lambda score, z, y: exact(score, z) / z[0].numel(),
    "sliced":    sliced,
    "denoising": lambda score, z, y: 0.5 * nats((score(z) - y)**2) / z[0].numel(),
}


def batch(x, eps, loss, sigma):
    """z = x + sigma eps and what the objective needs beside z, in its shape: x, eps (B, D) -> two (B, D).

    sigma = 0: z are the data. For exact it is zeros; for sliced u, the direction of another row's eps, as u may
    not depend on z; for denoising -eps / sigma, Eq. (3.43). ValueError: denoising without noise.
    """
    z = x + sigma * eps
    if loss == "exact":
        return z, torch.zeros_like(z)
    if loss == "sliced":
        u = eps.roll(1, 0)
        return z, u / expand(nats(u**2).sqrt(), u)
    if not sigma > 0:
        raise ValueError(f"denoising score matching needs noise: say how much, --sigma 0.1, got {sigma:g}")
    return z, -eps / sigma


if __name__ == "__main__":
    from datasets2d import DATASETS
    data, n, sigma, D = DATASETS["clusters"], 100_000, 0.1, 2
    g = torch.Generator().manual_seed(0)
    x, eps, u = data.sample(n, g, torch.float64), *torch.randn(2, n, D, generator=g, dtype=torch.float64)
    z, u = x + sigma * eps, u / u.norm(dim=1, keepdim=True)
    grid = torch.cartesian_prod(*[torch.arange(-3, 3, 0.02, dtype=torch.float64)] * D)

    def wrong(x):
        """The score of broader clusters, and a rotation."""
        return data.score(x, 1.0, 0.1) + torch.stack([-x[:, 1], x[:, 0]], 1)

    def information(sigma):
        """1/2 E|score|^2 of the data with noise, a sum over a grid."""
        weight = 0.02**2 * data.log_prob(grid, 1.0, sigma).exp()
        return 0.5 * (weight * nats(data.score(grid, 1.0, sigma)**2)).sum()
    own, noisy = information(0.0), information(sigma)
    rows = [
        ("the data", None, 0, 0),
        ("  fisher", lambda: fisher(wrong, x, data.score(x)), own, 0),
        ("  exact", lambda: exact(wrong, x), 0, D),
        ("  D sliced, plain", lambda: D * sliced(wrong, x, u, reduced=False), 0, 1),
        ("  D sliced", lambda: D * sliced(wrong, x, u), 0, 1),
        (f"with noise {sigma}", None, 0, 0),
        ("  fisher", lambda: fisher(wrong, z, data.score(z, 1.0, sigma)), noisy, 0),
        ("  exact", lambda: exact(wrong, z), 0, D),
        ("  denoising", lambda: denoising(wrong, x, eps, sigma), D / sigma**2 / 2, 0),
    ]
    print(f"a wrong score of the clusters, {n:,} points\n{'':18s}{'mean - constant':>21s}{'constant':>10s}"
          f"{'error of 1,000':>16s}{'backward passes':>17s}")
    for name, objective, constant, derivatives in rows:
        if objective is None:
            print(name)
            continue
        value = objective()
        print(f"{name:18s}{value.mean() - constant:11.3f} +-{value.std() / n**0.5:7.3f}{constant:10.2f}"
              f"{value.std() / 1000**0.5:16.2f}{derivatives:17d}")
