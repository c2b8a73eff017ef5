"""The network for 2D data: 7 fully connected layers with ReLU between (thesis 4.2, Fig. 4.4).

Read `targets.py` first: the network predicts any of its rows, and nothing in it depends on which.

Not here: the network for images.

    python mlp.py         # the layers and the number of parameters
"""
import torch
from torch import nn


class MLP(nn.Module):
    """model(z, t) -> prediction. z (B, dim) and t (B,) are concatenated; returns (B, dim).

    schedule: divide z by sqrt(alpha^2 + sigma^2), its standard deviation for standardised data. That is 1 for every
    variance preserving schedule, and keeps the input of the variance exploding one (sigma up to 50) in range.
    """

    def __init__(self, dim=2, width=128, layers=7, schedule=None):
        super().__init__()
        sizes = [dim + 1] + [width] * (layers - 1) + [dim]
        self.layers = nn.ModuleList(nn.Linear(n_in, n_out) for n_in, n_out in zip(sizes, sizes[1:]))
        self.schedule = None if schedule is None or schedule.variance_preserving else schedule

    def forward(self, z, t):
        if self.schedule is not None:
            z = z * (self.schedule.alpha(t)**2 + self.schedule.sigma(t)**2).rsqrt()[:, None]
        h = torch.cat([z, t[:, None]], 1)                                                   # (B, dim + 1)
        for layer in self.layers[:-1]:
            h = layer(h).relu_()                                                            # (B, width)
        return self.layers[-1](h)                                                           # (B, dim)


if __name__ == "__main__":
    model = MLP()
    print(model)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters")
