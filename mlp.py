"""The network for 2D data: 7 fully connected layers with ReLU between (thesis 4.2, Fig. 4.4).

Read `targets.py` first: the network predicts any of its rows, and nothing in it depends on which.

Not here: the network for images; why there can be several in one (`stack.py`).

    python mlp.py         # the layers and the number of parameters
"""
import torch
from torch import nn
from torch.nn import functional

import ddpm
from guidance import one_hot

ACTIVATIONS = {"relu": torch.relu_, "silu": functional.silu}


class MLP(nn.Module):
    """model(z, t) -> prediction. z (B, dim) and t (B,) are concatenated; returns (B, out or dim).

    activation: relu, or silu for a network whose derivatives are used: ReLU has no second one.
    time: without it the network ignores t, as that of a score of one noise level.
    classes: how many labels there are; model(z, t, label) sees label (B,) as one number for each,
    1 for its own, and none of them where it is `guidance.NULL`, and without label.
    schedule: the one that made z, to divide z by its standard deviation where that is not 1
    (`ddpm.standardise`).
    members: M independent networks in one, each weight with a leading dimension M. The B rows
    then come in M equal blocks, one for each network, and a layer is one batched product.
    """

    def __init__(self, dim=2, width=128, layers=7, schedule=None, members=1,
                 out=None, activation="relu", time=True, classes=0):
        super().__init__()
        sizes = [dim + time + classes] + [width] * (layers - 1) + [out or dim]
        rows = [[nn.Linear(n_in, n_out) for _ in range(members)]
                for n_in, n_out in zip(sizes, sizes[1:])]
        self.weights = nn.ParameterList(
            torch.stack([layer.weight.detach() for layer in row]) for row in rows)
        self.biases = nn.ParameterList(
            torch.stack([layer.bias.detach()[None] for layer in row]) for row in rows)
        self.members, self.classes = members, classes
        self.schedule, self.activation, self.time = schedule, ACTIVATIONS[activation], time

    def forward(self, z, t, label=None):
        h = torch.cat([ddpm.standardise(z, t, self.schedule), t[:, None]], 1) if self.time else z
        if self.classes:
            h = torch.cat([h, one_hot(label, self.classes, h)], 1)
        h = h.unflatten(0, (self.members, -1))                              # (M, B / M, dim + 1)
        for i, (weight, bias) in enumerate(zip(self.weights, self.biases)):
            h = torch.baddbmm(bias, h, weight.mT)                           # (M, B / M, width)
            if i < len(self.weights) - 1:
                h = self.activation(h)
        return h.flatten(0, 1).to(z)                               # (B, out), in bf16 products too


if __name__ == "__main__":
    model = MLP()
    for weight, bias in zip(model.weights, model.biases):
        print(f"{weight.shape[2]:4d} -> {weight.shape[1]:3d}   "
              f"{weight.numel() + bias.numel():6,} parameters")
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters")
