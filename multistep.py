r"""Samplers that remember earlier evaluations: more from every one, where evaluations are few.

Read `samplers.py` first: these are rows of its table. With lambda = log(alpha / sigma) = logsnr / 2
the probability flow ODE has the solution (Lu et al. 2022, Eq. 9; the integral is over lambda)

    z_s = sigma_s / sigma_t z_t + sigma_s int_t^s e^lambda x_hat dlambda

so that x_hat alone is unknown. `step` takes it as a polynomial through remembered values:

    dpmpp      DPM-Solver++(2M): a line through two, by its value in the middle of the step
    dpmpp3m    three values, third order; the code that is around under this name takes half of
               their curvature, and is of second
    unipc      UniPC-2: dpmpp, and when x_hat at the end of a step is known, the step once more with
               it, at no further evaluation; `unipc3` remembers one more
    ipndm      Adams-Bashforth on eps_hat over sigma / alpha, with the weights of equal steps
    sde_dpmpp  SDE-DPM-Solver++(2M): `ancestral` with the x_hat that dpmpp takes; noise forgets the
               errors of early steps, which a flow keeps

Where history is missing, at first, they are of lower order.

    python multistep.py    # the clusters, exact denoiser: distance to where the flow goes
"""
import math

import torch

import ddpm


def half(logsnr):
    """lambda, a number."""
    return logsnr.item() / 2


def step(z, t, s, known, schedule):
    """z at s from z at t, x_hat a polynomial in lambda through known, {lambda: x_hat (B, ...)}.

    With r from 0 to 1 in the step, h long, the weights of the values are those that are right for
    r^i, i = 0, 1, ... (Zhao et al. 2023). Of two values the line's in the middle counts (Lu et al.
    2022, Alg. 2; Zhao et al. with B(h) = e^h - 1, bh2).
    """
    start, h = half(schedule.logsnr(t)), half(schedule.logsnr(s)) - half(schedule.logsnr(t))
    if h == 0:                 # in float32 neighbouring times near the ends can be the same
        return z
    integrals = [-math.expm1(-h)]                         # of h e^(h (r - 1)) r^i over r, by parts
    for i in range(1, len(known)):
        integrals.append(1 - i / h * integrals[-1] if len(known) > 2 else integrals[0] / 2)
    r = (torch.tensor([*known], dtype=torch.float64) - start) / h
    powers = r ** torch.arange(len(r))[:, None]
    weights = torch.linalg.solve(powers, torch.tensor(integrals, dtype=torch.float64)).tolist()
    x_integral = sum(weight * x_hat for weight, x_hat in zip(weights, known.values()))
    return schedule.sigma(s) / schedule.sigma(t) * z + schedule.alpha(s) * x_integral


def dpmpp(denoise, z, times, schedule, noise, order=2):
    """DPM-Solver++(2M) (Lu et al. 2022, Alg. 2); with order 3 UniP-3 of Zhao et al. 2023."""
    known = {}
    for t, s in zip(times, times[1:]):
        known = dict([*known.items(), (half(schedule.logsnr(t)), denoise(z, t)[0])][-order:])
        z = step(z, t, s, known, schedule)
    return denoise(z, times[-1])[0]


def dpmpp3m(denoise, z, times, schedule, noise):
    """The same of third order."""
    return dpmpp(denoise, z, times, schedule, noise, order=3)


def unipc(denoise, z, times, schedule, noise, order=2):
    """UniPC (Zhao et al. 2023), of data prediction: a predictor, corrected by what it finds."""
    known, before = {}, None
    for t, s in zip(times, times[1:]):
        found = {half(schedule.logsnr(t)): denoise(z, t)[0]}
        if before:
            z = step(*before, t, known | found, schedule)                                   # UniC
        known = dict([*(known | found).items()][-order:])
        before = z, t
        z = step(z, t, s, known, schedule)                                                  # UniP
    return denoise(z, times[-1])[0]


def unipc3(denoise, z, times, schedule, noise):
    """The same with one more value remembered."""
    return unipc(denoise, z, times, schedule, noise, order=3)


ADAMS_BASHFORTH = [1], [3/2, -1/2], [23/12, -16/12, 5/12], [55/24, -59/24, 37/24, -9/24]


def ipndm(denoise, z, times, schedule, noise):
    """d(z / alpha) = eps_hat d(sigma / alpha) by four values (Zhang and Chen 2023, iPNDM).

    The weights are those of equal steps: on another grid it is of second order, with small errors.
    """
    known = []
    for t, s in zip(times, times[1:]):
        known = [denoise(z, t)[1], *known][:4]
        eps = sum(weight * e for weight, e in zip(ADAMS_BASHFORTH[len(known) - 1], known))
        level_t, level_s = (torch.exp(-0.5 * schedule.logsnr(time)) for time in (t, s))
        z = schedule.alpha(s) * (z / schedule.alpha(t) + (level_s - level_t) * eps)
    return denoise(z, times[-1])[0]


def sde_dpmpp(denoise, z, times, schedule, noise):
    """SDE-DPM-Solver++(2M) (Lu et al. 2022): its first step is one of `ancestral`."""
    previous = None
    for t, s in zip(times, times[1:]):
        x_hat = ahead = denoise(z, t)[0]
        h = half(schedule.logsnr(s)) - half(schedule.logsnr(t))
        if previous:                                       # x_hat in the middle of the step
            x_before, h_before = previous
            ahead = x_hat + h / (2 * h_before) * (x_hat - x_before)
        if h > 0:
            previous = x_hat, h
        mean, var = ddpm.posterior(z, ahead, s, t, schedule)
        z = mean + var.sqrt() * noise()
    return denoise(z, times[-1])[0]


MULTISTEP = {function.__name__: function
             for function in (dpmpp, dpmpp3m, unipc, unipc3, ipndm, sde_dpmpp)}


if __name__ == "__main__":
    import samplers
    from datasets2d import DATASETS
    schedule, numbers = ddpm.SCHEDULES["cosine"], [4, 8, 16, 32, 64]
    model = DATASETS["clusters"].optimal_model("v", schedule)
    draw = lambda sampler, n: samplers.sample(
        model, (2000, 2), n, target="v", schedule=schedule, sampler=sampler, dtype=torch.float64,
        generator=torch.Generator().manual_seed(0))
    end = draw("unipc3", 1024)
    print("root mean squared distance to the end of the flow, grid t, standardised data\n"
          f"{'evaluations':12s}" + " ".join(f"{n:8d}" for n in numbers))
    for name in "ddim", "heun", *(name for name in MULTISTEP if name != "sde_dpmpp"):
        print(f"{name:12s}" + " ".join(
            f"{(draw(name, n) - end).square().sum(1).mean().sqrt():8.5f}" for n in numbers))
