r"""Muon: momentum made orthogonal, for the inner weights of the network (Jordan et al. 2024).

Read `adam.py` and `train_points.py` first. The momentum M = U S V' of a weight matrix has a few large singular values
and many small ones, so a step along it changes little but the first. Muon steps along U V' instead, with which all
directions count alike. No singular values are computed: with x = M / |M| three times

    x <- a x + (b A + c A A) x,      A = x x'

which is a polynomial of each singular value that brings all but the smallest near 1. First and last layer and the
biases are Adam's. Steps are dearer by these 9 products of weights, in bfloat16 where the processor has it, and fewer
are needed.

Not here: how many fewer (`reproduce_fast.py`).

    python muon.py        # singular values before and after
"""
import torch

from adam import Adam

COEFFICIENTS, ROUNDS = (3.4445, -4.7750, 2.0315), 3                 # Jordan et al.: 5
MOMENTUM, RATIO = 0.95, 20.0           # RATIO: a step of Muon for the learning rate 1 of Adam


def precision(device):
    """In which the products are fast: they need to be only roughly right."""
    return torch.bfloat16 if device.type == "cuda" or torch.ops.mkldnn._is_mkldnn_bf16_supported() else torch.float32


def orthogonal(m, dtype=None):
    """U V' of matrices (M, n, n), with singular values within 0.33 of 1 where those of M are above 0.02 |M|."""
    a, b, c = COEFFICIENTS
    x = (m / (m.norm(dim=(-2, -1), keepdim=True) + 1e-12)).to(dtype)
    for _ in range(ROUNDS):
        A = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(A, A, A, beta=b, alpha=c), x, beta=a)
    return x.to(m.dtype)


class Muon(Adam):
    """Of a stack's parameters (M, out, in): square ones by Muon, with Nesterov's momentum, the others by Adam.

    The momentum has the name of Adam's, `exp_avg`, so that a checkpoint is one of either.
    """

    def __init__(self, parameters, lr):
        super().__init__(parameters, lr)
        self.inner = [i for i, p in enumerate(parameters) if p.shape[1] == p.shape[2]]
        self.others = [i for i in range(len(parameters)) if i not in self.inner]
        self.dtype = precision(parameters[0].device)

    @torch.no_grad()
    def step(self):
        parameters, rate = self.param_groups[0]["params"], self.param_groups[0]["lr"]
        self.update(self.others)
        for i in self.inner:
            gradient = parameters[i].grad
            momentum = self.state[i]["exp_avg"].lerp_(gradient, 1 - MOMENTUM)
            parameters[i] -= RATIO * rate * orthogonal(gradient.lerp(momentum, MOMENTUM), self.dtype)


if __name__ == "__main__":
    g = torch.randn(128, 128, generator=torch.Generator().manual_seed(0)) @ torch.diag(torch.logspace(0, -3, 128))
    show = lambda m: " ".join(f"{s:.3g}" for s in torch.linalg.svdvals(m)[::18])
    print(f"singular values of a momentum of norm 1   {show(g / g.norm())}\n"
          f"of the step                               {show(orthogonal(g))}")
