r"""The 2D datasets, with everything about them known exactly (thesis 4.1.1, Fig. 4.1).

Each set is a Gaussian mixture with equal weights: centres along a curve (4 corners for the
clusters), Gaussian noise of one standard deviation around them, then standardised per axis by the
exact mean and standard deviation. So we have not only samples but the log-density, and after
diffusion to z = alpha x + sigma eps (again a mixture) the density of z, its score, and E[x | z],
the best possible denoiser: what every result of this project is compared with. The centres on a
curve are so close (at most 0.14 standard deviations apart) that more of them change nothing.
Each centre has a label, its class: a cluster, a ring, a wave, half of the roll, a mode. What is
known of the data is known of each class, which is a mixture too.

The thesis shows its datasets, all but `unequal`, only as images. The shapes here are inferred: the
32 losses of its Table 4.1 lie between 1 % below and 7 % above what their exact denoiser gets
(ERRATA.md entry 8).

Not here: images, and how training draws its batches (`train.py`).

    python datasets2d.py  # the datasets as an image, datasets2d.png
"""
import math
import re
from dataclasses import dataclass

import torch

import targets


@dataclass(frozen=True)
class GaussianMixture:
    """Equal-weight Gaussian mixture in 2D: centres (K, 2), one standard deviation per axis (2,).

    Both are float64 on the CPU. labels (K,): the class of each centre, 0, 1, ...; None: it has no
    classes. Data z are (B, 2), alpha and sigma numbers or tensors of shape
    (B,) or (). Results have z's dtype and device. The default alpha = 1, sigma = 0 is the data
    themselves. Work goes in chunks, so that memory does not grow with B.
    """
    centres: torch.Tensor
    std: torch.Tensor
    labels: torch.Tensor = None
    dim = 2

    @property
    def classes(self):
        """How many classes there are."""
        return 0 if self.labels is None else self.labels.max().item() + 1

    def given(self, label):
        """The data of one class, p(x | label), exactly. ValueError if there is no such class."""
        if label not in range(self.classes):
            raise ValueError(f"no label {label}: " + (
                f"choose from 0 to {self.classes - 1}" if self.classes else "these have none"))
        return GaussianMixture(self.centres[self.labels == label], self.std)

    def sample(self, n, generator=None, dtype=torch.float32):
        """Draw n independent points -> (n, 2), on the generator's device."""
        return self.sample_pairs(n, generator, dtype)[0]

    def sample_pairs(self, n, generator=None, dtype=torch.float32):
        """Draw the points of `sample` and their labels -> (n, 2), (n,) or None."""
        device = generator.device if generator is not None else "cpu"
        k = torch.randint(len(self.centres), (n,), generator=generator, device=device)
        noise = torch.randn(n, 2, generator=generator, device=device, dtype=dtype)
        x = self.centres.to(noise)[k] + self.std.to(noise) * noise
        return x, None if self.labels is None else self.labels.to(device)[k]

    def _chunks(self, z, alpha, sigma):
        """Yield z (b, 2), alpha and sigma (b, 1), the variance of z given its centre (b, 2),

        logits (b, K), those of the centres: -1/2 squared distances.
        """
        centres, data_var = self.centres.to(z), self.std.to(z)**2
        alpha, sigma = (torch.as_tensor(c, device=z.device, dtype=z.dtype).expand(len(z))[:, None]
                        for c in (alpha, sigma))
        # Of a CPU what a chunk needs stays in its cache; a GPU is slowed by many small ones.
        size = max(1, 2**(17 if z.device.type == "cpu" else 22) // len(centres))
        columns = zip(z.split(size), alpha.split(size), sigma.split(size))
        for z, alpha, sigma in columns:
            var = alpha**2 * data_var + sigma**2
            scale = var.rsqrt()
            # Differences, not the expanded square: in float32 that cancels for sharp centres.
            d0 = (z * scale)[:, :1] - (alpha * scale)[:, :1] * centres[:, 0]
            d1 = (z * scale)[:, 1:] - (alpha * scale)[:, 1:] * centres[:, 1]
            yield z, alpha, sigma, var, -0.5 * (d0 * d0 + d1 * d1)

    def log_prob(self, z, alpha=1.0, sigma=0.0):
        """Log-density of z = alpha x + sigma eps in nats: (B, 2) -> (B,)."""
        return torch.cat([logits.logsumexp(1) - math.log(len(self.centres))
                          - 0.5 * (2 * math.pi * var).log().sum(1)
                          for *_, var, logits in self._chunks(z, alpha, sigma)])

    def covariance(self, z, alpha, sigma):
        """Var[x | z] of each axis, what no denoiser can know: (B, 2) -> (B, 2).

        The variance of x given z and its centre, plus that of its mean over the centres.
        """
        centres, data_var, result = self.centres.to(z), self.std.to(z)**2, []
        for _, _, sigma, var, logits in self._chunks(z, alpha, sigma):      # noqa: B020
            share, rest = logits.softmax(1), sigma**2 / var
            mean = share @ centres                                          # E[centre | z]
            spread = torch.stack([(share * (centre - m[:, None])**2).sum(1)
                                  for centre, m in zip(centres.T, mean.T)], 1)
            result.append(rest * data_var + rest**2 * spread)
        return torch.cat(result)

    def denoise_and_score(self, z, alpha, sigma):
        """E[x | z] and the score of z, which share the centres' weights: (B, 2) -> both (B, 2)."""
        centres, data_var = self.centres.to(z), self.std.to(z)**2
        x_hat, score, chunks = [], [], self._chunks(z, alpha, sigma)
        for z, alpha, _, var, logits in chunks:
            centre = logits.softmax(1) @ centres                            # E[centre | z]
            score.append((alpha * centre - z) / var)
            x_hat.append(centre + alpha * data_var / var * (z - alpha * centre))
        return torch.cat(x_hat), torch.cat(score)

    def denoise(self, z, alpha, sigma):
        """E[x | z], the denoiser of least squared error: (B, 2) -> (B, 2).

        It does not divide by alpha: right for t = 1.
        """
        return self.denoise_and_score(z, alpha, sigma)[0]

    def score(self, z, alpha=1.0, sigma=0.0):
        """Score of the marginal, the gradient of log_prob in z: (B, 2) -> (B, 2)."""
        return self.denoise_and_score(z, alpha, sigma)[1]

    def optimal_model(self, target, schedule, stabiliser=0.0):
        """The best possible network: model(z, t) -> E[y | z] of any target y = a x + b eps.

        z (B, 2), t (B,). Not for the targets of a step of a chain.
        """
        def model(z, t):
            alpha, sigma = schedule.alpha(t), schedule.sigma(t)
            a, b = targets.coefficients(target, alpha, sigma, stabiliser)
            x_hat, score = self.denoise_and_score(z, alpha, sigma)
            # E[eps | z] = -sigma score
            return a[..., None] * x_hat - (b * sigma)[..., None] * score
        return model


def standardised(centres, std, labels=None):
    """The mixture of `centres` (K, 2) and noise `std`, per axis of exact mean 0 and variance 1."""
    mean, scale = centres.mean(0), (centres.var(0, correction=0) + std**2).sqrt()
    return GaussianMixture((centres - mean) / scale, std / scale, labels)


def line(start, end, n):
    """Midpoints of n equal pieces of [start, end]: centres of a uniform distribution on a curve."""
    return start + (end - start) * (torch.arange(n, dtype=torch.float64) + 0.5) / n


def clusters():
    """Four Gaussians at (+-1, +-1), standard deviation 0.2."""
    corners = torch.tensor([[-1, -1], [-1, 1], [1, -1], [1, 1]], dtype=torch.float64)
    return corners, 0.2, torch.arange(4)


def rings(n=1000):
    """Two rings of radius 1 around (+-0.5, 0), standard deviation 0.05; n centres on each."""
    u = line(0, 2 * math.pi, n)
    ring = torch.stack([u.cos(), u.sin()], 1)
    shift = torch.tensor([0.5, 0.0], dtype=torch.float64)
    return torch.cat([ring - shift, ring + shift]), 0.05, torch.arange(2 * n) // n


def swiss_roll(n=2000):
    """u (cos u, sin u) with u uniform in [1.5 pi, 4.5 pi], standard deviation 0.5; n centres.

    Its classes are the inner and the outer half of u.
    """
    u = line(1.5 * math.pi, 4.5 * math.pi, n)
    return torch.stack([u * u.cos(), u * u.sin()], 1), 0.5, 2 * torch.arange(n) // n


def waves(n=1000):
    """(u, sin u +- 1) with u uniform in [-2 pi, 2 pi], standard deviation 0.25; n on each."""
    u = line(-2 * math.pi, 2 * math.pi, n)
    centres = torch.cat([torch.stack([u, u.sin() - 1], 1), torch.stack([u, u.sin() + 1], 1)])
    return centres, 0.25, torch.arange(2 * n) // n


def unequal():
    """Weights 0.2 and 0.8, by a repeated centre, standard deviation 1 (Song and Ermon 2019)."""
    centres = torch.tensor([[-5, -5]] + 4 * [[5, 5]], dtype=torch.float64)
    return centres, 1.0, torch.tensor([0, 1, 1, 1, 1])


class Sets(dict):
    """Name -> dataset. rings-512, of no list, is the rings in 512 dimensions: `embedded.py`."""

    def parts(self, name):
        """rings-512 -> the rings, 512; None for other names."""
        name, dash, dim = name.rpartition("-") if isinstance(name, str) else ("", "", "")
        known = dash and dict.__contains__(self, name) and re.fullmatch(r"[1-9]\d{0,3}", dim)
        return (self[name], int(dim)) if known and 2 <= int(dim) <= 4096 else None

    def __contains__(self, name):
        return super().__contains__(name) or bool(self.parts(name))

    def __missing__(self, name):
        import embedded  # not above: it uses this file
        if not (found := self.parts(name)):
            raise KeyError(name)
        return embedded.embed(*found)


DATASETS = {shape.__name__: standardised(*shape())
            for shape in (clusters, rings, swiss_roll, waves, unequal)}
DATASETS = Sets(DATASETS)                                                   # and rings-512
FOUR = "clusters", "rings", "swiss_roll", "waves"                           # the thesis's


if __name__ == "__main__":
    import plots
    points = {name: data.sample(10_000) for name, data in DATASETS.items()}
    plots.scatter(points, "datasets2d.png")
    for name, data in DATASETS.items():
        print(f"{name:11s} entropy {-data.log_prob(data.sample(50_000)).mean():.3f} nats "
              "(50,000 points)")
    print("wrote datasets2d.png")
