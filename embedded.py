r"""A 2D dataset in a plane of D dimensions, with everything about it known exactly: `--data rings-512`.

Read `datasets2d.py` first, whose DATASETS has <name>-<D> for every set and D from 2 to 4096. With the fixed orthonormal
columns of P (D, 2), a point p of the 2D set and n ~ N(0, I) in D dimensions

    x = P p + 0.01 (I - P P^T) n

so that a little noise stands on the plane. Noise of the diffusion is the same in all directions, so the plane and what
is off it stay independent: in the plane P^T z = alpha p + sigma eps is the diffusion of the 2D set, off it z is a
Gaussian of variance alpha^2 0.01^2 + sigma^2, and

    E[x | z] = P E[p | P^T z] + alpha 0.01^2 / (alpha^2 0.01^2 + sigma^2) (I - P P^T) z

The data fill 2 of D dimensions and eps fills all: that is what makes D a question to ask of targets (Li and He 2025,
"Back to basics: let denoising generative models denoise"; not in the documents). Coordinates are not standardised: each
has a variance of about 2 / D, and log-SNR means in the plane what it means in 2D.

Not here: which target survives that (`reproduce_embedded.py`).

    python embedded.py     # the best possible error of x_hat and eps_hat over D, sums over dimensions
"""
import functools
import math

import torch

from datasets2d import GaussianMixture

NOISE = 0.01                           # standard deviation off the plane


def basis(dim):
    """P: two orthonormal directions, always the same of a dimension -> (D, 2), float64."""
    a, b = torch.randn(2, dim, generator=torch.Generator().manual_seed(dim), dtype=torch.float64)
    a = a / a.norm()
    b = b - (a @ b) * a
    return torch.stack([a, b / b.norm()], 1)


class Embedded:
    """A 2D mixture `plane` in D dimensions; what it does is what `GaussianMixture` does, z (B, D). It has no labels."""
    classes = 0

    def __init__(self, plane, dim):
        self.plane, self.dim, self.basis = plane, dim, basis(dim)

    def project(self, x):
        """Coordinates in the plane: (B, D) -> (B, 2)."""
        return x @ self.basis.to(x)

    def off(self, x):
        """What is off the plane, (I - P P^T) x: (B, D) -> (B, D)."""
        return x - self.project(x) @ self.basis.to(x).T

    def sample(self, n, generator=None, dtype=torch.float32):
        """Draw n independent points -> (n, D), on the generator's device."""
        p = self.plane.sample(n, generator, dtype)
        noise = torch.randn(n, self.dim, generator=generator, device=p.device, dtype=dtype)
        return p @ self.basis.to(p).T + NOISE * self.off(noise)

    def sample_pairs(self, n, generator=None, dtype=torch.float32):
        return self.sample(n, generator, dtype), None

    def _off(self, z, alpha, sigma):
        """z off the plane (B, D), the variance of its coordinates there (B, 1), and alpha (B, 1)."""
        alpha, sigma = (torch.as_tensor(c, device=z.device, dtype=z.dtype).expand(len(z))[:, None]
                        for c in (alpha, sigma))
        return self.off(z), alpha**2 * NOISE**2 + sigma**2, alpha

    def log_prob(self, z, alpha=1.0, sigma=0.0):
        """Log-density of z = alpha x + sigma eps in nats: (B, D) -> (B,)."""
        off, var, _ = self._off(z, alpha, sigma)
        normal = -0.5 * (off.square() / var).sum(1) - 0.5 * (self.dim - 2) * (2 * math.pi * var[:, 0]).log()
        return self.plane.log_prob(self.project(z), alpha, sigma) + normal

    def denoise_and_score(self, z, alpha, sigma):
        """E[x | z] and the score of z: (B, D) -> both (B, D)."""
        x_hat, score = self.plane.denoise_and_score(self.project(z), alpha, sigma)
        (off, var, alpha), P = self._off(z, alpha, sigma), self.basis.to(z)
        return x_hat @ P.T + alpha * NOISE**2 / var * off, score @ P.T - off / var

    denoise, score, optimal_model = GaussianMixture.denoise, GaussianMixture.score, GaussianMixture.optimal_model


@functools.cache
def embed(plane, dim):
    """The one Embedded of a plane and dimension."""
    return Embedded(plane, dim)


if __name__ == "__main__":
    from datasets2d import DATASETS
    from ddpm import SCHEDULES
    schedule, t = SCHEDULES["cosine"], torch.full((4000,), 0.5)
    for D in 2, 8, 32, 128, 512:
        data, g = DATASETS[f"rings-{D}"], torch.Generator().manual_seed(0)
        x, eps = data.sample(4000, g), torch.randn(4000, D, generator=g)
        z = schedule.alpha(t)[:, None] * x + schedule.sigma(t)[:, None] * eps
        errors = [(data.optimal_model(name, schedule)(z, t) - y).square().sum(1).mean()
                  for name, y in (("x", x), ("eps", eps))]
        print(f"D = {D:3d}, t = 0.5: least error of x {errors[0]:.3f}, of eps {errors[1]:.3f}; |x|^2 is "
              f"{x.square().sum(1).mean():.2f}, |eps|^2 is {eps.square().sum(1).mean():.1f}")
