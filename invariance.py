r"""One network under every schedule: the bound does not depend on it (VDM 4.3, A.4, A.3.2).

Read `losses.py` and `samplers.py` first. At equal log-SNR the z of two schedules A and B differ by a factor, and so a
network that was trained under A can be used under B:

    z_A = alpha_A / alpha_B z_B                                                              VDM A.45
    x_hat_B(z_B) = x_hat_A(alpha_A / alpha_B z_B)                                            VDM A.47

told A's time of that log-SNR. x_hat and eps_hat are the same; v, u, s and F are not, as their coefficients are those of
the schedule, so a prediction is taken apart under A and put together under B. If both have the same log-SNR at their
ends the models are equal, A.48, and so are their bounds in continuous time: the integral over log-SNR has no schedule
in it. What one draw of t costs in variance does depend on it.

Equal ends are made, not found: a run is used under B between the log-SNRs that A has at t_min and 1 - t_min, which is
what its network was trained on, never beyond. Where B ends before, ve, linear and ddpm do, its formula goes on.

    python sample.py --schedule ve
    python likelihood.py --schedule flow

Not here: what the two ends cost (`decoders.py`); networks trained under several schedules, which are not one.

    python invariance.py  # the bound of one denoiser under every schedule, and how much a draw of it varies
"""
import torch

import ddpm
import targets
from ddpm import SCHEDULES, Schedule, expand


def time(schedule, logsnr):
    """The t of a log-SNR, numbers, also before t = 0 and after t = 1, by a schedule's own formula."""
    ends = schedule.logsnr(torch.tensor([0.0, 1.0], dtype=torch.float64))
    first, last = (-1.0 if ends[0] < logsnr else 0.0), (2.0 if ends[1] > logsnr else 1.0)
    longer = Schedule(lambda t: schedule.logsnr(first + (last - first) * t), schedule.dlogsnr)
    return first + (last - first) * longer.t(torch.tensor(logsnr, dtype=torch.float64)).item()


def between(schedule, low, high):
    """The part of a schedule between two log-SNRs: `high` at its t = 0, `low` at its t = 1.

    In float64 on the CPU: where edm has log-SNR -12.9, 1 - t is 1e-10.
    """
    start, length = time(schedule, high), time(schedule, low) - time(schedule, high)
    there = lambda t: start + length * t.cpu().double()
    return Schedule(lambda t: schedule.logsnr(there(t)).to(t),
                    lambda t: length * schedule.dlogsnr(there(t)).to(t), schedule.scale)


def under(model, target, own, other, stabiliser=0.0):
    """A network of schedule `own` as one of `other`: model(z, t) -> prediction of the same target, under `other`.

    z (B, ...), t (B,) of `other`. target: for a stack a list of names, one for each equal block. A log-SNR that `own`
    does not have in [0, 1] is taken for its end.
    """
    names = [target] if isinstance(target, str) else target

    def of_other(z, t):
        times, index = t.unique(return_inverse=True)                       # each is looked for once
        logsnr = other.logsnr(times)
        alpha_A, sigma_A, alpha_B, sigma_B = (
            expand(c(logsnr)[index], z) for scale in (own.scale, other.scale) for c in (scale.alpha, scale.sigma))
        z = alpha_A / alpha_B * z                                                            # A.45
        y, parts = model(z, own.t(logsnr)[index]), []
        for name, *block in zip(names, *(c.chunk(len(names)) for c in (y, z, alpha_A, sigma_A, alpha_B, sigma_B))):
            x_hat = targets.to_x(name, *block[:4], stabiliser)                               # A.47
            eps_hat = targets.to_eps(name, *block[:4], stabiliser)
            a, b = targets.coefficients(name, *block[4:], stabiliser)
            parts.append(a * x_hat + b * eps_hat)
        return torch.cat(parts)
    return of_other


def check(config, name, t_max=None):
    """ValueError, one sentence, if a run cannot be used under another schedule, or up to another t.

    name: of SCHEDULES, or None.
    """
    if name is not None and name not in SCHEDULES:
        raise ValueError(f"unknown schedule {name!r}: choose from {', '.join(SCHEDULES)}")
    if (name or t_max) and config.get("timesteps"):
        raise ValueError("its network knows the times of a chain alone - leave out --schedule and --t-max, or train "
                         "without --timesteps")
    if (name or t_max) and config.get("sigma") is not None:
        raise ValueError("its score has no t, and so no schedule - leave out --schedule and --t-max")


def of_run(model, target, config, t_min, name=None, own=None, t_max=None):
    """The network of a run under the schedule called `name` -> model, schedule and t_min to sample or to test it with.

    t_min: the ends under its own schedule, where the other's are put; its own t_min is then 0. None: as it is. own: the
    schedule of the Run, where it is learned. t_max: its time where noise is N(0, I), in place of 1 - t_min.
    """
    check(config, name, t_max)
    own = own or ddpm.fixed(config["schedule"])
    if name is None and t_max is None:
        return model, own, t_min
    low, high = own.ends(t_min)
    low = low if t_max is None else own.logsnr(torch.tensor(t_max, dtype=torch.float64)).item()
    other = between(SCHEDULES[name] if name else own, low, high)
    return under(model, target, own, other, config["stabiliser"]), other, 0.0


if __name__ == "__main__":
    import losses
    from datasets2d import DATASETS
    data, own = DATASETS["clusters"], SCHEDULES["cosine"]
    g = torch.Generator().manual_seed(0)
    n, like = 100_000, dict(generator=g, dtype=torch.float64)
    x, eps, t = data.sample(n, **like), torch.randn(n, 2, **like), losses.sample_t((n,), 0.0, **like)
    print("v of the clusters' exact denoiser, made for cosine; log-SNR from -9 to 9, 100,000 draws of t uniform\n"
          "schedule   diffusion term   std of one draw / mean   largest |difference| to its own v")
    few = x[:1000], t[:1000], eps[:1000]
    for name in SCHEDULES:
        other = between(SCHEDULES[name], -9.0, 9.0)
        model, truth = under(data.optimal_model("v", own), "v", own, other), data.optimal_model("v", other)
        draws = 2 * losses.loss(model, x, t, eps, target="v", loss="nelbo", schedule=other)
        z = ddpm.q_sample(*few, other)
        print(f"{name:8s} {draws.mean():10.3f} nats {draws.std() / draws.mean():18.2f}"
              f"{(model(z, few[1]) - truth(z, few[1])).abs().max():28.1e}")
