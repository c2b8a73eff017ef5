r"""The exact log-likelihood of the probability flow ODE, which turns data into noise one to one (Song et al. 2021).

Read `samplers.py` first, whose `flow` is dz/dt. The log-density of the noise, and the divergence of the flow on the way
there, give that of the data, without a bound, as a density.

Not here: the likelihood of a run (`likelihood.py`), and how grey levels get a density (`dequantise.py`).

    python flow.py      # the clusters by their exact denoiser: the log-density of a point by 8 to 256 steps
"""
import math

import torch

import samplers
from decoders import nats


def log_likelihood(model, x, *, target, schedule, steps=64, tolerance=None, probes=None, t_min=1e-3, stabiliser=0.0,
                   generator=None):
    r"""Exact log-density of data under the probability flow ODE (Song et al. 2021, Eq. 39): x (B, ...) -> (B,) in nats.

    log p(x) = log N(z_1; 0, alpha^2 + sigma^2) + integral of the divergence of dz/dt over t, from z_0 = alpha x at
    t_min to z_1 at 1 - t_min, + D log alpha of t_min, as z_0 is alpha times x. Returns it and the number of evaluations
    of the network. steps: of the classical Runge-Kutta method, four evaluations each, equal in log-SNR because what a
    network gets wrong near the ends is multiplied by dlogsnr/dt; tolerance: adaptive ones, scipy's RK45, relative and
    absolute, for each example as if it were alone. probes: None is the exact divergence, one backward pass for each
    dimension; a number is Hutchinson's estimate with so many random signs, the same at every t. ValueError: flow not
    finite, or tolerance not reached.
    """
    denoise, dimensions, evaluations = samplers.denoiser(model, target, schedule, stabiliser), x[0].numel(), 0
    like = dict(device=x.device, dtype=x.dtype)
    if probes:
        probe = 2 * torch.randint(0, 2, (probes, *x.shape), generator=generator, device=x.device).to(x) - 1
    else:
        probe = torch.eye(dimensions, **like).reshape(dimensions, 1, *x.shape[1:])

    def slope(t, state):
        """d/dt of (z, integral of the divergence): (B, D + 1) -> (B, D + 1)."""
        nonlocal evaluations
        evaluations += 1
        z, t = state[:, :-1].reshape(x.shape).detach().requires_grad_(), torch.tensor(t, **like)
        with torch.enable_grad():
            dz_dt = samplers.flow(z, denoise(z, t)[1], t, schedule)
            if not dz_dt.isfinite().all():
                raise ValueError("its flow is not finite - train it longer, or with another --loss")
            products = [e * torch.autograd.grad(dz_dt, z, e.expand(z.shape), retain_graph=True)[0] for e in probe]
        divergence = torch.stack([nats(product) for product in products]).sum(0) / (probes or 1)
        return torch.cat([dz_dt.detach().flatten(1), divergence[:, None]], 1)

    start, end = torch.tensor([t_min, 1 - t_min], **like)
    state = torch.cat([schedule.alpha(start) * x.flatten(1), x.new_zeros(len(x), 1)], 1)
    if tolerance:
        from scipy.integrate import solve_ivp  # here: nothing else needs it
        numbers = lambda state: state.cpu().double().numpy().ravel()
        tensor = lambda numbers: torch.from_numpy(numbers).reshape(len(x), -1).to(**like)
        each = tolerance / len(x)**0.5     # RK45 takes the root of a mean over all B (D + 1) numbers
        solution = solve_ivp(lambda t, state: numbers(slope(t, tensor(state))), (t_min, 1 - t_min), numbers(state),
                             rtol=each, atol=each, t_eval=[1 - t_min])
        if not solution.success:
            raise ValueError(f"its flow cannot be integrated to {tolerance:g} - "
                             "make --tolerance larger, or leave it out")
        state = tensor(solution.y)
    else:
        times = samplers.GRIDS["logsnr"](steps + 1, schedule, t_min, dtype=torch.float64).tolist()[::-1]
        for t, later in zip(times, times[1:]):
            h = later - t
            a = slope(t, state)
            b = slope(t + h / 2, state + h / 2 * a)
            c = slope(t + h / 2, state + h / 2 * b)
            d = slope(later, state + h * c)
            state = state + h / 6 * (a + 2 * b + 2 * c + d)
    var = schedule.alpha(end)**2 + schedule.sigma(end)**2
    log_p = -0.5 * (state[:, :-1]**2 / var + torch.log(2 * math.pi * var)).sum(1)
    return log_p + state[:, -1] + dimensions * schedule.alpha(start).log(), evaluations


if __name__ == "__main__":
    from datasets2d import DATASETS
    from ddpm import SCHEDULES
    data, schedule = DATASETS["clusters"], SCHEDULES["cosine"]
    x = torch.tensor([[0.7, -1.0]], dtype=torch.float64)
    print(f"log p of a point of the clusters: {data.log_prob(x).item():.5f} nats")
    for steps in 8, 16, 32, 64, 128, 256:
        found, evaluations = log_likelihood(data.optimal_model("v", schedule), x, target="v", schedule=schedule,
                                            steps=steps)
        print(f"by its flow, {steps:3d} steps, {evaluations:4d} evaluations: {found.item():.5f}")
