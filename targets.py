r"""What the network predicts: x, eps, v, s, flow u, EDM's F (thesis 3.1.4 - 3.3).

Read `ddpm.py` first. Every target is one row of a table, y = a x + b eps. Together with
z = alpha x + sigma eps that is a 2x2 linear system for (x, eps), so one solve gives x_hat and
eps_hat from any prediction, for every schedule:

    det = alpha b - sigma a,    x = (b z - sigma y) / det,    eps = (alpha y - a z) / det

and an error in y is an error in x times -det / sigma, and an error in eps times det / alpha: all
that `losses.py` needs.

Not here: how the errors are weighed (`losses.py`).

    python targets.py     # a, b and the two factors of every target over t
"""
import torch

# Each row maps (alpha, sigma, d) to (a, b) of y = a x + b eps.
# d stabilises the score, -eps / sigma where d = 0 (ERRATA.md entry 8).
TARGETS = {
    "x":   lambda alpha, sigma, d: (1.0, 0.0),                          # data, 3.1.4
    "eps": lambda alpha, sigma, d: (0.0, 1.0),                          # noise, 3.1.5
    "v":   lambda alpha, sigma, d: (-sigma, alpha),                     # velocity, Eq. (3.55)
    "s":   lambda alpha, sigma, d: (0.0, -sigma / (sigma**2 + d)),      # score, Eq. (3.53)
    "u":   lambda alpha, sigma, d: (-1.0, 1.0),                         # flow (Lipman et al. 2023)
    "F":   lambda alpha, sigma, d: (sigma / (alpha**2 + sigma**2)**0.5,             # EDM's network,
                                    -alpha / (alpha**2 + sigma**2)**0.5),           # -v if 1 = r^2
    # The posterior mean A z + B x of a step of a discrete chain (Foundations 2.40, 4.1), and the
    # same for a network with a skip connection, whose output plus z it is. A and B: `variance.py`.
    "mu":      lambda alpha, sigma, d, A, B: (A * alpha + B, A * sigma),
    "mu_skip": lambda alpha, sigma, d, A, B: ((A - 1) * alpha + B, (A - 1) * sigma),
}
OF_A_STEP = "mu", "mu_skip"


def coefficients(target, alpha, sigma, stabiliser=0.0, step=None):
    """Return (a, b) of y = a x + b eps, tensors of alpha's shape.

    stabiliser is the thesis's d in the denominator of the score, -sigma eps / (sigma^2 + d); the
    others ignore it. step: (A, B), which the targets OF_A_STEP need. ValueError: an unknown
    target, or one of a step without its step.
    """
    if target not in TARGETS:
        raise ValueError(f"unknown target {target!r}: choose from {', '.join(TARGETS)}")
    if target in OF_A_STEP and step is None:
        raise ValueError(f"target {target} is the mean of a step of a discrete chain: "
                         "say of how many steps, --timesteps 1000")
    a, b = TARGETS[target](alpha, sigma, stabiliser, *(step if target in OF_A_STEP else ()))
    return a * torch.ones_like(alpha), b * torch.ones_like(alpha)


def determinant(target, alpha, sigma, stabiliser=0.0, step=None):
    """The determinant alpha b - sigma a of a target's row and z's.

    x_hat - x = -(sigma / det) (y_hat - y) and eps_hat - eps = (alpha / det) (y_hat - y).
    """
    a, b = coefficients(target, alpha, sigma, stabiliser, step)
    return alpha * b - sigma * a


def to_x(target, y, z, alpha, sigma, stabiliser=0.0, step=None):
    """x from the target (or x_hat from a prediction) y and z = alpha x + sigma eps -> y's shape.

    All are broadcastable. For eps it is (z - sigma eps) / alpha, 3.1.5; for s
    (z + sigma^2 s) / alpha, Eq. (3.49); for v alpha z - sigma v, Eq. (3.58); for mu
    (mu - A z) / B.
    """
    a, b = coefficients(target, alpha, sigma, stabiliser, step)
    return (b * z - sigma * y) / (alpha * b - sigma * a)


def to_eps(target, y, z, alpha, sigma, stabiliser=0.0):
    """eps from the target (eps_hat from a prediction) y and z = alpha x + sigma eps, as `to_x`."""
    a, b = coefficients(target, alpha, sigma, stabiliser)
    return (alpha * y - a * z) / (alpha * b - sigma * a)


if __name__ == "__main__":
    import ddpm
    t = torch.tensor([0.001, 0.1, 0.5, 0.9, 0.999])
    alpha, sigma = ddpm.SCHEDULES["cosine"].alpha(t), ddpm.SCHEDULES["cosine"].sigma(t)
    row = lambda values: " ".join(f"{v:10.4g}" for v in values)
    print(f"{'cosine schedule, t =':22s}{row(t)}")
    for target in [name for name in TARGETS if name not in OF_A_STEP]:
        a, b = coefficients(target, alpha, sigma)
        det = determinant(target, alpha, sigma)
        print(f"{target:4s}a                 {row(a)}\n    b                 {row(b)}")
        print(f"    x error / y error {row(-sigma / det)}\n"
              f"    eps err / y error {row(alpha / det)}")
