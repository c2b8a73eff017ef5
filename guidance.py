r"""Classifier-free guidance: samples of a label, and more of the label than the data have (poster).

Read `datasets2d.py` and `samplers.py` first. A network that sees labels, and sometimes none, knows
two scores: that of the points of a label, and that of all points. Guidance follows (Ho and
Salimans 2022, Eq. 6)

    (1 + w) score(z | label) - w score(z) = score(z | label) + w grad log p(label | z)

said to sample p(x | label)^(1 + w) p(x)^-w ~ p(x | label) p(label | x)^w, here `Tilted`. Of that
density it is the score at t = 0 alone. The score of `Tilted` diffused to t is

    score(z | label) + grad log E[p(label | x)^w | z, label]

and guidance has w grad log E[p(label | x) | z] there. So the flow does not draw from `Tilted`
with it, nor does the reverse SDE, which forgets more of its way.

A network with labels is model(z, t, label) -> prediction: label (B,), NULL where it sees none.

In training it sees a label with probability 0.9.

Not here: the loops (`train_points.py`, `train_images.py`).

    python guidance.py    # mean and spread of one cluster over w, beside those of `Tilted`
"""
import math

import torch

import ddpm
from datasets2d import line

NULL = -1              # in place of a label
DROPPED = 0.1          # of labels in training
SAMPLING = "label", "guidance", "guidance_interval"        # in the config of a run that is guided


def dropped(label, generator):
    """What a network sees of labels (n,) in training: one in ten is NULL."""
    hidden = torch.rand(len(label), generator=generator, device=generator.device) < DROPPED
    return torch.where(hidden.to(label.device), NULL, label)


def one_hot(label, classes, like):
    """label (B,) -> (B, classes): 1 for its own, of NULL none; label None is NULL for all of `like` (B, ...)."""
    label = torch.full(like.shape[:1], NULL, device=like.device) if label is None else label
    return (label[:, None] == torch.arange(classes, device=like.device)).to(like)


def guided(model, w, interval=(0.0, 1.0)):
    """(1 + w) conditional - w unconditional, for t in (low, high]: another model(z, t, label).

    It is right for every target: from z and t a prediction is c x_hat + d for numbers c and d
    (`targets.py`, with eps_hat = (z - alpha x_hat) / sigma), and the two factors sum to 1, so that
    d stays. Outside of the interval it is the conditional model (Kynkaanniemi et al. 2024). Of a
    learned variance it has the conditional `out`.
    """
    low, high = interval

    def combined(z, t, label):
        conditional, *out = model(z, t, label).split(z.shape[1], 1)
        acting = w * ((low < t) & (t <= high)).to(z)                        # (B,)
        if not acting.any():                                                # half the evaluations
            return torch.cat([conditional, *out], 1)
        unconditional = model(z, t, torch.full_like(label, NULL))[:, :z.shape[1]]
        acting = ddpm.expand(acting, z)
        y = (1 + acting) * conditional - acting * unconditional
        return torch.cat([y, *out], 1)
    return combined


def of_label(model, label):
    """A model with labels as model(z, t), what samplers take. label: a number, or (B,) of rows."""
    return lambda z, t: model(z, t, torch.as_tensor(label, device=z.device).expand(len(z)))


def of_run(model, config):
    """A run's model as what samplers take: with `label` in its config the guided one of that."""
    if "label" not in config:
        return model
    interval = config.get("guidance_interval", (0.0, 1.0))
    return of_label(guided(model, config["guidance"], interval), config["label"])


def towards(config):
    """What samples of a run are guided to, in words."""
    if "label" not in config:
        return ""
    interval = config.get("guidance_interval")
    return ", label {label}, w = {guidance:g}".format(**config) + (
        " for t in ({:g}, {:g}]".format(*interval) if interval else "")


def exact(data, target, schedule, stabiliser=0.0):
    """The best possible network with labels: (z, t, label) -> E[y | z, label]; of NULL E[y | z]."""
    models = {NULL: data} | {label: data.given(label) for label in range(data.classes)}
    models = {label: each.optimal_model(target, schedule, stabiliser)
              for label, each in models.items()}

    def model(z, t, label):
        result = torch.empty_like(z)
        for each in label.unique().tolist():
            of = label == each
            result[of] = models[each](z[of], t[of])
        return result
    return model


def posterior(data, z, alpha=1.0, sigma=0.0):
    """p(label | z) exactly, by Bayes' rule: (B, 2) -> (B, classes)."""
    return torch.stack([data.given(label).log_prob(z, alpha, sigma)
                        + (data.labels == label).double().mean().log()
                        for label in range(data.classes)], 1).softmax(1)


class Tilted:
    """p(x | label)^(1 + w) p(x)^-w, normalised on a grid of cells (n, 2) of `probabilities` (n,).

    Each cell has the density of its centre. They must be small beside the data's noise.
    """

    def __init__(self, data, label, w, cells=400, limit=3.0):
        axis = line(-limit, limit, cells)
        self.x, self.size = torch.cartesian_prod(axis, axis), 2 * limit / cells
        log_p = (1 + w) * data.given(label).log_prob(self.x) - w * data.log_prob(self.x)
        self.log_mass = log_p.logsumexp(0) + 2 * math.log(self.size)
        self.probabilities = log_p.softmax(0)

    def moments(self):
        """Mean and standard deviation of each axis: (2,), (2,)."""
        mean = self.probabilities @ self.x
        return mean, (self.probabilities @ (self.x - mean)**2).sqrt()

    def sample(self, n, generator=None, dtype=torch.float32):
        """Draw n independent points -> (n, 2)."""
        i = torch.multinomial(self.probabilities, n, replacement=True, generator=generator)
        inside = torch.rand(n, 2, generator=generator, dtype=torch.float64) - 0.5
        return (self.x[i] + self.size * inside).to(dtype)

    def score(self, z, alpha, sigma):
        """The score of the diffused density, for sigma / alpha large beside a cell: (B, 2)."""
        kept = self.probabilities > 1e-9 * self.probabilities.max()
        x, log_p = self.x[kept].to(z), self.probabilities[kept].to(z).log()
        share = torch.softmax(log_p - torch.cdist(z, alpha * x)**2 / (2 * sigma**2), 1)
        return (alpha * share @ x - z) / sigma**2


if __name__ == "__main__":
    import samplers
    from datasets2d import DATASETS
    data, schedule, label = DATASETS["clusters"], ddpm.SCHEDULES["cosine"], 3
    print("one of four clusters, exact denoiser, flow, 5,000 samples: one axis, mean of both\n"
          "   w    mean     std   log p(x | label)    of p(x | label)^(1 + w) p(x)^-w: mean     std")
    for w in 0, 0.5, 1, 2, 5, 10:
        model = of_label(guided(exact(data, "v", schedule), w), label)
        x = samplers.sample(model, (5000, 2), 64, target="v", schedule=schedule, sampler="dpmpp",
                            grid="logsnr")
        mean, std = Tilted(data, label, w).moments()
        print(f"{w:4g} {x.mean():7.3f} {x.std(0).mean():7.3f} "
              f"{data.given(label).log_prob(x).mean():18.2f} {mean.mean():47.3f} "
              f"{std.mean():7.3f}")
