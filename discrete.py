r"""The discrete chain: T steps between T + 1 times, as DDPM has it (Foundations 1, 2; slides; Ho et al. 2020).

Read `ddpm.py` and `targets.py` first. Any schedule gives a chain of T steps. With alpha^2 of its times the documents'
abar, 1 - beta_i is the ratio of two neighbours' alpha^2. Algorithms 1 and 2 of the slides are

    python train.py --schedule ddpm --timesteps 1000 --target eps --loss mse
    python sample.py --steps 1000

and --steps 100 takes every tenth step. `iddpm` is the chain of Nichol and Dhariwal. Times are t_i = i / T where the
schedule ends in a finite log-SNR, and there z_0 = x: the last step is the decoder, p(x | z_1), and has no noise when
samples are drawn. Else they divide [t_min, 1 - t_min], and p(x | z_0) comes after them.

Not here: the variance of a step (`variance.py`); how a network is trained on a chain (`losses.draw_step`).

    python discrete.py    # beta, its ratio to the posterior's, and the weights of the bound: Foundations 4.9, 5.5, 6.4
"""
import functools
import math
from typing import NamedTuple

import torch

import ddpm
import targets


class Step(NamedTuple):
    """Numbers of a step, tensors that broadcast with z: what a variance and a loss need of it."""
    A: torch.Tensor                # of q(z_s | z_t, x) = N(A z + B x, e^log_q)
    B: torch.Tensor
    log_q: torch.Tensor            # -inf for the step to x itself
    log_small: torch.Tensor        # log_q, for the step to x that of the step before it
    log_large: torch.Tensor        # log of beta = sigma^2_{t|s}
    decodes: torch.Tensor          # 1 for the step to x, else 0


class Chain:
    """T steps of a schedule between T + 1 increasing times, float64: step i goes from t_i to t_{i-1}.

    `times` (T + 1,) and `table` (T, 6), a Step a row. decodes: is z_0 = x, the first step a decoder?
    """

    def __init__(self, schedule, times):
        self.schedule, self.times, self.steps = schedule, times, len(times) - 1
        s, t = times[:-1], times[1:]
        A, B, q = ddpm.posterior_coefficients(s, t, schedule)
        log_q, log_large = q.log(), ddpm.var_ts(s, t, schedule).log()
        log_small, decodes = log_q.clone(), torch.zeros_like(log_q)
        self.decodes = q[0].item() == 0
        if self.decodes:                                   # beta tilde_1 := beta tilde_2
            log_small[0], decodes[0] = log_q[1] if self.steps > 1 else log_large[0], 1.0
        self.table = torch.stack([A, B, log_q, log_small, log_large, decodes], 1)

    def index(self, t):
        """i of the times t_i of this chain, (B,) in any precision."""
        return torch.searchsorted(self.times.to(t), t.contiguous())

    def step(self, i, like):
        """The numbers of steps i, (B,) integers in 1..T, in the precision of `like` -> Step of (B,)."""
        return Step(*self.table.to(like)[i.to(like.device) - 1].unbind(-1))

    def at(self, t):
        """(A, B) of a step of this chain's length from any time, (B,): for `targets`' OF_A_STEP.

        From times before t_1, which no step starts at, those of t_1: a shorter step would make B, which one divides
        by, as small as one likes.
        """
        late = t.cpu().double().clamp(min=self.times[1])
        early = late - (self.times[1] - self.times[0])
        return [c.to(t) for c in ddpm.posterior_coefficients(early, late, self.schedule)[:2]]


def smallest_t(schedule, t_min=1e-3):
    """t_0 of a chain: 0, or t_min where the log-SNR at t = 1 - 0 is infinite."""
    return 0.0 if math.isfinite(schedule.ends(0.0)[0]) else t_min


@functools.lru_cache(64)
def chain(schedule, steps, t_min):
    """The chain of `steps` equal steps of t in [t_min, 1 - t_min]."""
    i = torch.arange(steps + 1, dtype=torch.float64)
    return Chain(schedule, t_min + (1 - 2 * t_min) * i / steps)


def rescaled(schedule, steps):
    """Ho et al.'s chain in other steps, by `linear_betas`: known at t = i / steps alone.

    The network, which is told t, sees a little other log-SNR there than in training. ValueError for
    another schedule than ddpm.
    """
    if schedule is not ddpm.SCHEDULES["ddpm"]:
        raise ValueError("the linear betas that can be rescaled are those of schedule ddpm")
    log_alpha_sq = torch.cat([torch.zeros(1).double(), torch.log1p(-ddpm.linear_betas(steps)).cumsum(0)])

    def logsnr(t):
        value = log_alpha_sq[(t.cpu().double() * steps).round().long()].to(t)
        return value - (-torch.expm1(value)).log()

    def dlogsnr(t):
        raise ValueError("rescaled betas are known at their own steps alone and have no slope - "
                         "take sampler ancestral, ddim or dpmpp")
    return ddpm.Schedule(logsnr, dlogsnr)


def weight(i, chain, target):
    """Of the squared error of a target in term i of the bound with variance `small`: (n,) -> (n,), float64.

    1 / (2 q) for mu (Foundations 4.6), 1/2 (SNR(s) - SNR(t)) for x (5.3), that / SNR(t) for eps (5.7).
    """
    step, t = chain.step(i, chain.times), chain.times[i]
    alpha, sigma = chain.schedule.alpha(t), chain.schedule.sigma(t)
    factor = step.B * sigma / targets.determinant(target, alpha, sigma, step=step[:2])
    return factor**2 / (2 * torch.exp(step.log_small))


if __name__ == "__main__":
    i, of = torch.tensor([2, 10, 50, 100, 500, 1000]), chain(ddpm.SCHEDULES["ddpm"], 1000, 0.0)
    row = lambda values: " ".join(f"{value:9.3g}" for value in values)
    step = of.step(i, of.times)
    print(f"ddpm, T = 1000, step  {row(i)}\nsqrt(abar)            {row(of.schedule.alpha(of.times[i]))}\n"
          f"beta                  {row(step.log_large.exp())}\nbeta tilde / beta     "
          f"{row((step.log_small - step.log_large).exp())}")
    for target in "mu", "x", "eps":
        print(f"weight of {target:11s} {row(weight(i, of, target))}")
