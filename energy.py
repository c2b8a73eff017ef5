r"""Energies: a network with one output, whose gradient is the prediction (VDM 4.2.3, Eq. 4.20 - 4.24).

Read `targets.py` and `score_matching.py` first. A network for the score is any field. One that gives an energy E(z, t),
p(z) = exp(-E) / Z, has a score that is a gradient, as the true one is:

    s_hat = grad log p = -grad E            Eq. (4.24), as grad log Z = 0
    eps_hat = -sigma s_hat = sigma grad E

So -E(z, t) is its log-density of z at t up to a constant, and its curl is 0. An evaluation costs a backward pass, a
step of training two. The network must be smooth: with ReLU the score would be constant in pieces.

Not here: Z, which nothing here needs; sampling with the energy's Metropolis correction (`langevin.py`).

    python energy.py      # an energy and a free network of one noise level of the clusters: curl, E against log p
"""
import torch
from torch import nn

from ddpm import expand

TARGETS = "s", "eps"


class Energy(nn.Module):
    """model(z, t) -> prediction of s or eps, z (B, ...), t (B,), of network(z, t) -> (B, 1), smooth.

    Rows must not mix in the network. schedule: for eps, whose sigma(t) it needs. It works under torch.no_grad, and
    derivatives can be taken of it, as of any network. ValueError: another target, eps without a schedule.
    """

    def __init__(self, network, target="s", schedule=None):
        super().__init__()
        if target not in TARGETS:
            raise ValueError(f"an energy predicts s or eps, the gradients of a log-density, not {target} - "
                             "take --target s or eps")
        if target == "eps" and schedule is None:
            raise ValueError("an energy that predicts eps = sigma grad E needs the schedule of sigma")
        self.network, self.target, self.schedule = network, target, schedule

    def energy(self, z, t):
        """E(z, t) = -log p(z) + a constant of t: (B, ...), (B,) -> (B,), in nats."""
        return self.network(z, t).flatten(1).sum(1)

    def forward(self, z, t):
        grad = torch.func.grad(lambda z: self.energy(z, t).sum())(z)           # of each row its own
        if self.target == "s":
            return -grad                                                       # Eq. (4.24)
        return expand(self.schedule.sigma(t), z) * grad                        # eps = -sigma s


if __name__ == "__main__":
    import score_matching
    from datasets2d import DATASETS

    class Smooth(nn.Module):
        """A small network of z alone."""

        def __init__(self, out, width=64):
            super().__init__()
            self.layers = nn.Sequential(nn.Linear(2, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(),
                                        nn.Linear(width, out))

        def forward(self, z, t):
            return self.layers(z)
    torch.manual_seed(0)
    data, sigma, steps = DATASETS["clusters"], 0.3, 2000
    z = data.sample(4000) + sigma * torch.randn(4000, 2)
    truth, t = data.score(z, 1.0, sigma), torch.zeros(len(z))
    print(f"clusters with noise {sigma}, denoising score matching, {steps:,} steps of 256 points\n"
          f"{'':9s}{'parameters':>11s}{'Fisher divergence':>19s}{'rms of curl':>13s}{'std of E + log p, nats':>24s}")
    for name, model in ("energy", Energy(Smooth(1))), ("free", Smooth(2)):
        g = torch.Generator().manual_seed(0)
        optimizer = torch.optim.Adam(model.parameters(), 2e-3)
        cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        for _ in range(steps):
            noisy, y = score_matching.batch(data.sample(256, g), torch.randn(256, 2, generator=g), "denoising", sigma)
            score = lambda z: model(z, t[:256])                                # noqa: B023
            optimizer.zero_grad()
            score_matching.OBJECTIVES["denoising"](score, noisy, y).mean().backward()
            optimizer.step()
            cosine.step()
        score = lambda z: model(z, t)                                          # noqa: B023
        with torch.no_grad():
            rows = [torch.func.vjp(score, z)[1](e.expand_as(z))[0] for e in torch.eye(2)]
            curl = (rows[0][:, 1] - rows[1][:, 0]).square().mean().sqrt()      # d s_1 / dz_2 - d s_2 / dz_1
            fisher = score_matching.fisher(score, z, truth).mean()
            difference = (f"{(model.energy(z, t) + data.log_prob(z, 1.0, sigma)).std():24.3f}"
                          if name == "energy" else f"{'-':>24s}")
        print(f"{name:9s}{sum(p.numel() for p in model.parameters()):11,d}{fisher:19.3f}{curl:13.2g}{difference}")
