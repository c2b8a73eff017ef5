r"""Samplers: from noise to data in so many evaluations of the network (VDM 3.7.1; slides).

Read `ddpm.py` and `targets.py` first. A sampler sees a network as a denoiser,
(z, t) -> x_hat, eps_hat, so that it is written once for every target and schedule. It goes
through a decreasing grid of times (`grids.py`), and its last step is the same for all: to
sigma = 0, without noise, that is to the x_hat of the last time. For the SDE and the probability
flow ODE of the slides, f and g^2 are `drift` and `diffusion_sq` of the schedule, w is Brownian
motion.

    ancestral  p(z_s | z_t) = q(z_s | z_t, x = x_hat), Eq. (3.12), the thesis's
    ddim       x_hat and eps_hat put together again at the next time, plus eta times the noise of
               `ancestral`
    sde        Euler-Maruyama on the reverse SDE        dz = (f z - g^2 score) dt + g dw
               or, with eta < 1 of its noise            dz = (f z - (1 + eta^2) / 2 g^2 score) dt
                                                             + eta g dw
    euler      Euler on the probability flow ODE        dz = (f z - g^2 score / 2) dt
    heun       Heun on it, second order, two evaluations a step; churn adds noise and goes back
    dpmpp ...  those that remember earlier evaluations are in `multistep.py`
    annealed   Langevin dynamics at every noise level, ten steps each (Song and Ermon 2019)

Not here: guidance (`guidance.py`); the likelihood that goes with the ODE (`likelihood.py`).

    python samplers.py    # each sampler, exact denoiser of the clusters, 4 to 64 evaluations
"""
import math

import torch

import ddpm
import discrete
import langevin
import multistep
import targets
import variance as variances
from grids import GRIDS


def ancestral(denoise, z, times, schedule, noise, variance="small", data=None):
    """Ho et al. 2020, Alg. 2; VDM 3.103; any of `variance.VARIANCES`, Eq. (3.12) has `small`."""
    for t, s in zip(times, times[1:]):
        x_hat, _, *out = denoise(z, t)
        mean, var = ddpm.posterior(z, x_hat, s, t, schedule)
        if variance == "best":
            var = variances.best(data, z, s, t, schedule)
        elif variance != "small":
            var = variances.log_var(variance, s, t, schedule, z, *out).exp()
        z = mean + var.sqrt() * noise()
    return denoise(z, times[-1])[0]


def ddim(denoise, z, times, schedule, noise, eta=0.0):
    """Song, Meng and Ermon 2021, Eq. (12). eta = 0 adds no noise, eta = 1 is `ancestral`."""
    for t, s in zip(times, times[1:]):
        x_hat, eps_hat = denoise(z, t)
        var = eta**2 * schedule.sigma(s)**2 * ddpm.one_minus_snr_ratio(s, t, schedule)  # Eq. (3.10)
        z = schedule.alpha(s) * x_hat + (schedule.sigma(s)**2 - var).sqrt() * eps_hat
        if eta:
            z = z + var.sqrt() * noise()
    return denoise(z, times[-1])[0]


def sde(denoise, z, times, schedule, noise, eta=1.0):
    """Euler-Maruyama on the reverse SDE (Anderson 1982; Song et al. 2021, Eq. 6).

    eta = 0 is `euler`; z_t has the same density for every eta (slides). The score is
    -eps_hat / sigma.
    """
    for t, s in zip(times, times[1:]):
        _, eps_hat = denoise(z, t)
        g_sq = schedule.diffusion_sq(t)
        dz_dt = schedule.drift(t) * z + (1 + eta**2) / 2 * g_sq / schedule.sigma(t) * eps_hat
        z = z + dz_dt * (s - t) + eta * (g_sq * (t - s)).sqrt() * noise()
    return denoise(z, times[-1])[0]


def flow(z, eps_hat, t, schedule):
    """dz/dt of the probability flow ODE, f z - g^2 score / 2 (Song et al. 2021, Eq. 13).

    z, eps_hat (B, ...), t () -> (B, ...).
    """
    return schedule.drift(t) * z + 0.5 * schedule.diffusion_sq(t) / schedule.sigma(t) * eps_hat


def euler(denoise, z, times, schedule, noise):
    """Euler's method on the probability flow ODE, in t."""
    for t, s in zip(times, times[1:]):
        z = z + flow(z, denoise(z, t)[1], t, schedule) * (s - t)
    return denoise(z, times[-1])[0]


def heun(denoise, z, times, schedule, noise, churn=0.0):
    """Heun's method on the probability flow ODE, in t (Karras et al. 2022, Alg. 1).

    The slope of a step is the mean of those at both its ends. churn: their S_churn (Alg. 2), noise
    that takes every step back to a sigma / alpha 1 + gamma times as large, at most the first.
    """
    gamma = min(churn / len(times), 2**0.5 - 1)
    for t, s in zip(times, times[1:]):
        if gamma:
            back = schedule.t(schedule.logsnr(t) - 2 * math.log1p(gamma)).clamp(max=times[0])
            z = (ddpm.alpha_ts(t, back, schedule) * z
                 + ddpm.var_ts(t, back, schedule).sqrt() * noise())
            t = back
        slope = flow(z, denoise(z, t)[1], t, schedule)
        ahead = z + slope * (s - t)
        z = z + (slope + flow(ahead, denoise(ahead, s)[1], s, schedule)) / 2 * (s - t)
    return denoise(z, times[-1])[0]


def annealed(denoise, z, times, schedule, noise, step_size=0.1, steps_per_level=10):
    """Annealed Langevin dynamics in x = z / alpha, of noise level sigma / alpha (`langevin.py`).

    The score of x is -eps_hat / level.
    """
    def score_at(x, level):
        t = schedule.t(-2 * level.log())
        return -denoise(schedule.alpha(t) * x, t)[1] / level
    levels, last = torch.exp(-0.5 * schedule.logsnr(times)), schedule.alpha(times[-1])
    x = z / schedule.alpha(times[0])
    if len(times) > 1:
        x = langevin.annealed(score_at, x, levels[:-1], step_size, steps_per_level,
                              lambda x: noise())
    return denoise(last * x, times[-1])[0]


SAMPLERS = {"ancestral": ancestral, "ddim": ddim, "sde": sde, "euler": euler, "heun": heun,
            **multistep.MULTISTEP, "annealed": annealed}
EVALUATIONS = {"heun": 2, "annealed": 10}  # of the network at every time but the last, else 1


def evaluations(sampler="ancestral", steps=512, steps_per_level=None, **how):
    """Evaluations that `sample` makes of so many `steps`: those of the last time are one."""
    each = steps_per_level or EVALUATIONS.get(sampler, 1)
    return (steps + each - 1) // each * each - (each - 1)


def denoiser(model, target, schedule, stabiliser=0.0, clip=math.inf):
    """The network as (z, t) -> x_hat, eps_hat, all (B, ...), t (): what the samplers see.

    eps_hat goes with z and x_hat, also where that is clipped. target: for a stack a list of
    names, one for each equal part. A network that gives `out` of a learned variance beside its
    prediction has it as a third result.
    """
    names = [target] if isinstance(target, str) else target

    def denoise(z, t):
        alpha, sigma = schedule.alpha(t), schedule.sigma(t)
        predictions, *out = model(z, t.expand(len(z))).split(z.shape[1], 1)
        x_hat = torch.cat([
            targets.to_x(name, y, z, alpha, sigma, stabiliser)
            for name, y, z in zip(names, predictions.chunk(len(names)), z.chunk(len(names)))
        ]).clamp(-clip, clip)
        return x_hat, (z - alpha * x_hat) / sigma, *out
    return denoise


@torch.no_grad()
def sample(model, shape, steps, *, target, schedule, sampler="ancestral", grid="t", t_min=1e-3,
           generator=None, stabiliser=0.0, clip=math.inf, dtype=torch.float32, **options):
    r"""Draw samples in `steps` function evaluations -> (B, ...) of `shape`.

    The last time takes one, the others as many as EVALUATIONS says. model(z, t) -> prediction of
    `target`, with z (B, ...) and the true time t (B,), however few the steps. The first z has the
    variance that standardised data have at 1 - t_min, alpha^2 + sigma^2. Draws on the generator's
    device. clip: every x_hat is kept in [-clip, clip], the range of images (Ho et al. 2020).
    options: eta of `ddim` and `sde`, churn of `heun`, variance and data (for `best`) of
    `ancestral`, step_size and steps_per_level of `annealed`, which is made for the grid logsnr. For
    a stack of M models `target` is a list of M names: all get the same draws, and it returns
    (M * B, ...). Raises ValueError if steps < 1, and for an unknown sampler or grid; grid may also
    be rescaled: the chain of `discrete.rescaled`, which has its own.
    """
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    if grid == "rescaled":                                 # t_i = i / steps of another schedule
        schedule, grid, t_min = discrete.rescaled(schedule, steps), "t", 0.0
    for kind, name, table in ("sampler", sampler, SAMPLERS), ("grid", grid, GRIDS):
        if name not in table:
            raise ValueError(f"unknown {kind} {name!r}: choose from {', '.join(table)}")
    device = generator.device if generator is not None else "cpu"
    each = options.get("steps_per_level", EVALUATIONS.get(sampler, 1))
    times = GRIDS[grid]((steps + each - 1) // each, schedule, t_min, dtype=dtype, device=device)
    members = 1 if isinstance(target, str) else len(target)
    noise = lambda: torch.cat(
        [torch.randn(shape, generator=generator, device=device, dtype=dtype)] * members)
    z = (schedule.alpha(times[0])**2 + schedule.sigma(times[0])**2).sqrt() * noise()
    return SAMPLERS[sampler](denoiser(model, target, schedule, stabiliser, clip), z, times,
                             schedule, noise, **options)


if __name__ == "__main__":
    import metrics
    from datasets2d import DATASETS
    data, schedule, numbers = DATASETS["clusters"], ddpm.SCHEDULES["cosine"], [4, 8, 16, 32, 64]
    real, model = data.sample(50_000), data.optimal_model("v", schedule)
    print("covariance distance to the clusters, 10,000 samples\n"
          f"{'evaluations':18s}" + " ".join(f"{n:6d}" for n in numbers))
    for grid in GRIDS:
        for name in SAMPLERS:
            draw = lambda n: sample(model, (10_000, 2), n, target="v", schedule=schedule,
                                    sampler=name, grid=grid)                # noqa: B023
            print(f"{name:10s} {grid:7s}" + " ".join(
                f"{metrics.covariance_distance(draw(n), real):6.3f}" for n in numbers))
    eps_model = data.optimal_model("eps", schedule)
    print("a network with an error, eps_hat + 0.1 sin 3z: mean log-density, sde in 256 evaluations,"
          " grid logsnr")
    for eta in 0, 0.25, 0.5, 1:
        x = sample(lambda z, t: eps_model(z, t) + 0.1 * torch.sin(3 * z), (10_000, 2), 256,
                   target="eps", schedule=schedule, sampler="sde", grid="logsnr", eta=eta)
        print(f"eta {eta:4g} {metrics.log_density(data, x):7.3f}")
    print(f"the data {metrics.log_density(data, real):7.3f}")
