r"""Langevin dynamics: samples from a score alone (thesis 3.2.4, Algorithm 1, and 3.2.5; slides; Song and Ermon 2019).

Read `score_matching.py` first. A point follows the score and is given noise, x <- x + step score(x) + sqrt(2 step) w:
after many small steps it is a draw of the density with this score. Three things are in the way, one cure each:

    the step    is not 0: the law is another by O(step). With the log-density at hand each step can be accepted or
                refused, so that it is exact at any step (Metropolis correction, MALA; Roberts and Tweedie 1996).
    the modes   between far ones the density is too low to cross in any time. With noise of sigma_1 > ... > sigma_K,
                large first, the modes are one, and split while it falls: `annealed`.
    the score   was never learned where there are no data. The same noise puts data there.

Not here: the samplers of diffusion models (`samplers.py`). The poster calls one of them annealed Langevin, but its
noise is sqrt(beta), and the law at one t would be p_t^2 / N(0, I) (ERRATA.md).

    python langevin.py    # two clusters of weights 0.2 and 0.8, exact score: who finds the weights
"""
import torch


def update(x, score, step, noise):
    """A step of Langevin dynamics: x, score there, noise ~ N(0, I) (B, ...), step a number -> (B, ...)."""
    return x + step * score + (2 * step)**0.5 * noise                           # Algorithm 1, line 4


def log_proposal(to, x, score, step):
    """log density of `update` from x to another point, but for a constant: (B, ...) -> (B,), in nats."""
    return -((to - x - step * score)**2).flatten(1).sum(1) / (4 * step)         # N(x + step score, 2 step)


def source(generator):
    """A function x -> noise like x, of a torch.Generator (or None), or the function itself."""
    if callable(generator):
        return generator
    return lambda x: torch.randn(x.shape, generator=generator, device=x.device, dtype=x.dtype)


class Diverged(ValueError):
    """x is not finite any more."""


def check(step, steps):
    """ValueError, one sentence, unless these can be taken."""
    if not step > 0:
        raise ValueError(f"the step of Langevin dynamics must be above 0, got {step:g}")
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")


def check_finite(finite, steps, step):
    """Diverged, one sentence, unless x was finite after all steps. finite: how many, (), a tensor."""
    if finite < steps:
        raise Diverged(f"Langevin dynamics is not finite from step {int(finite) + 1} of {steps} on - "
                       f"take a smaller step than {step:g}")


@torch.no_grad()
def langevin(score, x, step, steps, generator, log_prob=None, watch=None):
    """Algorithm 1 from x on, at one noise level: x (B, ...) -> (B, ...), `steps` evaluations of score.

    score: (B, ...) -> (B, ...); generator: a torch.Generator, or a function x -> noise like x. log_prob, (B, ...) ->
    (B,) in nats, of which score is the gradient: accepts or refuses each step, for one more evaluation of score and
    steps + 1 of log_prob. watch(i, x, accepted) is called after step i = 1, 2, ...; accepted is (B,), None without
    log_prob. ValueError: step or steps. Diverged: x is not finite, from which step on.
    """
    check(step, steps)
    noise, finite, accepted, s = source(generator), 0, None, None
    if log_prob:
        s, log_p = score(x), log_prob(x)
        if not (s.isfinite().all() and log_p.isfinite().all()):
            raise ValueError("score or log-density is not finite where Langevin dynamics starts - "
                             "train the network longer, or start elsewhere")
    for i in range(1, steps + 1):
        if not log_prob:
            x = update(x, score(x), step, noise(x))
        else:
            ahead = update(x, s, step, noise(x))
            s_ahead, log_p_ahead = score(ahead), log_prob(ahead)
            log_ratio = (log_p_ahead + log_proposal(x, ahead, s_ahead, step)
                         - log_p - log_proposal(ahead, x, s, step))
            log_u = torch.special.log_ndtr(noise(x).flatten(1)[:, 0])           # u = Phi(w) is uniform
            accepted = log_u < log_ratio                                        # not where that is nan
            x, s, log_p = (torch.where(accepted.reshape(-1, *[1] * (old.ndim - 1)), new, old)
                           for new, old in ((ahead, x), (s_ahead, s), (log_p_ahead, log_p)))
        finite = finite + x.isfinite().all()      # a count on the device, which need not wait for it
        if watch:
            watch(i, x, accepted)
    check_finite(finite, steps, step)
    return x


@torch.no_grad()
def annealed(score_at, x, sigmas, step, steps_per_level, generator, watch=None):
    """Annealed Langevin dynamics (Song and Ermon 2019, Alg. 1): x (B, ...) -> (B, ...).

    score_at(x, sigma): score of the data with noise sigma, (); sigmas: K decreasing numbers. At each it takes
    steps_per_level steps of step sigma^2: as large a part of the noise at every level. The result has the noise of the
    last, which nothing takes away. watch(i, x, None) after step i = 1, ..., K steps_per_level. ValueError as `langevin`
    and for sigmas that do not decrease.
    """
    check(step, steps_per_level)
    sigmas = torch.as_tensor(sigmas, dtype=x.dtype, device=x.device)
    if len(sigmas) < 1 or not sigmas[-1] > 0 or not (sigmas[1:] < sigmas[:-1]).all():
        raise ValueError(f"noise levels must decrease and be above 0, got {sigmas.tolist()}")
    noise, finite, i = source(generator), 0, 0
    for sigma in sigmas:
        for _ in range(steps_per_level):
            i += 1
            x = update(x, score_at(x, sigma), step * sigma**2, noise(x))
            finite = finite + x.isfinite().all()
            if watch:
                watch(i, x, None)
    check_finite(finite, i, step)
    return x


if __name__ == "__main__":
    from datasets2d import GaussianMixture
    centres = torch.tensor([[-1, 0], [1, 0], [1, 0], [1, 0], [1, 0]]).double()  # one of them four times: its weight
    data = GaussianMixture(centres, torch.tensor([0.2, 0.2]).double())
    n, sigmas = 1000, torch.logspace(0.7, -1.7, 20)                             # 5 to 0.02
    g = torch.Generator().manual_seed(0)
    score_at = lambda x, sigma: data.score(x, 1.0, sigma)
    taken = []
    rows = [
        ("the data", 0, lambda x: data.sample(n, g)),
        *[(f"langevin, step {step}{', MALA' if log_prob else ''}", steps,
           lambda x, args=(step, steps, g, log_prob): langevin(
               data.score, x, *args, lambda i, x, accepted: taken.append(accepted)))
          for step, steps, log_prob in [(0.004, 1000, None), (0.004, 5000, None), (0.02, 1000, None),
                                        (0.02, 1000, data.log_prob)]],
        *[(f"annealed, 20 levels, step {step}", 20 * steps,
           lambda x, args=(step, steps): annealed(score_at, sigmas[0] * x, sigmas, *args, g))
          for step, steps in [(0.1, 5), (0.1, 50), (0.1, 250)]],
    ]
    print(f"exact score of two clusters, {n:,} points from N(0, I)\n"
          f"{'':33s}{'evaluations':>12s}{'right mode':>12s}{'std in a mode':>15s}{'log-density':>13s}{'accepted':>10s}")
    for name, evaluations, draw in rows:
        taken.clear()
        x = draw(torch.randn(n, 2, generator=g))
        spread = (x - torch.tensor([1.0, 0.0]) * x[:, :1].sign()).square().mean().sqrt()
        accepted = f"{torch.stack(taken).double().mean():10.3f}" if name.endswith("MALA") else ""
        print(f"{name:33s}{evaluations:12,d}{(x[:, 0] > 0).double().mean():12.3f}{spread:15.3f}"
              f"{data.log_prob(x).mean():13.2f}{accepted}")
