r"""The chain's own likelihood, without a bound, by importance sampling (Foundations 1.29 - 1.30, 2.1).

Read `variance.py` first. A model of T steps has a likelihood, p(x) = E_q[w], of which K chains
z_T ~ q(z_T | x), z_s ~ q(z_s | z_t, x) give an estimate without bias:

    w = p(z_T) p(z_s | z_t) ... p(x | z_1) / (q(z_T | x) q(z_s | z_t, x) ...),    log of their mean

-log w of one chain has the bound as its mean, since -log E[w] <= E[-log w]. Foundations 2.3 has
them equal (ERRATA.md). The mean of -log(mean of K) is an upper bound, too, which falls as K grows,
to -log p(x) (Burda et al. 2016). So it tells how much of a bound is the model's and how much is the
bound's slack. The estimate is as good as its effective size: K where all w are equal, 1 where one
of them is all.

    python likelihood.py --steps 10 --variance small --chains 1000

Not here: the likelihood of the probability flow ODE, another model of the same network
(`likelihood.py`).

    python importance.py  # the ranking of `small` and `large` turns round: 10 steps, clusters
"""
import math

import torch

import progress
import run
import threads
import variance as variances
from decoders import discretised, gaussian, nats
from discrete import chain, smallest_t


@torch.no_grad()
def log_weights(model, x, *, target, variance, schedule, steps, t_min=None, data=None,
                decoder=gaussian, stabiliser=0.0, chains=100, generator=None):
    """log w of so many chains for each example: x (n, ...) -> (chains, n), float64, CPU, in nats.

    The arguments are those of `variance.vlb`, and minus the mean of log w is its bound on the
    average.
    """
    t_min = smallest_t(schedule) if t_min is None else t_min
    c, n = chain(schedule, steps, t_min), len(x)
    x = x.repeat(chains, *[1] * (x.ndim - 1))                               # (chains * n, ...)
    noise = lambda: torch.randn(x.shape, generator=generator, device=x.device, dtype=x.dtype)
    alpha, sigma = schedule.alpha(c.times).to(x), schedule.sigma(c.times).to(x)      # (T + 1,)
    zero, total = torch.zeros_like(x), lambda log_p: nats(log_p).cpu().double()

    eps = noise()                                          # of z_T = alpha x + sigma eps
    log_w = total(gaussian(sigma[-1] * eps, zero, 2 * sigma[-1].log())
                  - gaussian(alpha[-1] * x + sigma[-1] * eps, zero, (alpha**2 + sigma**2)[-1].log()))
    for i in range(steps, 0, -1):
        error, out, step = variances.at_step(
            model, x, torch.full((len(x),), i, device=x.device), eps, chain=c, target=target,
            variance=variance, stabiliser=stabiliser, data=data)
        log_v = variances.VARIANCES[variance](out, step)
        if i == 1 and c.decodes:                                            # p(x | z_1)
            return (log_w - total(decoder(x, x + error, log_v))).unflatten(0, (chains, n))
        delta = torch.exp(0.5 * step.log_q) * noise()      # z_s = A z + B x + delta
        log_w += total(gaussian(delta, zero, step.log_q) - gaussian(delta, error, log_v))
        eps = (step.A * sigma[i] * eps + delta) / sigma[i - 1]              # A alpha_t + B = alpha_s
    log_var = 2 * (sigma[0] / alpha[0]).log()                               # p(x | z_0)
    return (log_w - total(decoder(x, x + sigma[0] / alpha[0] * eps, log_var))).unflatten(
        0, (chains, n))


def log_likelihood(log_w):
    """log of the mean of w over K chains, an estimate of log p(x): (K, ...) -> (...), in nats."""
    return log_w.logsumexp(0) - math.log(len(log_w))


def effective_size(log_w):
    """(sum of w)^2 / sum of w^2: (K, ...) -> (...), between 1 and K."""
    return torch.exp(2 * log_w.logsumexp(0) - (2 * log_w).logsumexp(0))


def standard_error(log_w):
    """Of `log_likelihood`, from its K >= 2 chains, about: (K, ...) -> (...), in nats.

    By the delta method it is that of the mean of w over the mean of w. log is concave: half the
    square of it is what -log p is too large by, on the average. Both are right while they are
    small. They are 1 and 1/2 where one w is all, whatever is missing.
    """
    K = len(log_w)
    return ((K / effective_size(log_w) - 1).clamp(min=0) / (K - 1)).sqrt()


def terms(log_w):
    """What `tables.likelihood` shows of the chains: log w (K, n) -> dict of (n,), -log p in nats."""
    return {"chain": -log_likelihood(log_w), "chain error": standard_error(log_w),
            "effective size": effective_size(log_w)}


def steps_of(config, steps=None):
    """T of the chain of a run's config, or as asked. ValueError, one sentence, if it has none."""
    if not (steps or config["timesteps"]):
        raise ValueError("it was trained in continuous time, and --chains is of a chain - "
                         "say of how many steps, --steps 10")
    return steps or config["timesteps"]


def of_run(one, x, chains, steps=None, variance=None, t_min=None, batch=5000, generator=None):
    """log w of a Run's chain for data x, as `likelihood.evaluate` takes them -> (chains, n).

    Of its own steps and variance or of others, as `variance.chosen` allows; of a run that was not
    trained on a chain, on [t_min, 1 - t_min]. batch: examples times chains at once. ValueError, one
    sentence, if that cannot be, or if they are not finite.
    """
    config, T = one.config, steps_of(one.config, steps)
    levels = x.ndim > 2 and "latents" not in config
    variance = variances.chosen(config, variance, steps=steps)
    t_min = config["t_min"] if config["timesteps"] else run.smallest_t(config, t_min, "flow")
    network = threads.shared(one.model(x.device, out=True).to(x.dtype), x.device)
    add = progress.counter("chains", chains * len(x) * T, "evaluations, one an example")

    def model(z, t):
        prediction = network(z, t)
        add(len(z))
        return prediction
    sizes = [min(batch, chains - first) for first in range(0, chains, batch)]
    log_w = torch.cat([torch.cat([
        log_weights(model, rows, target=one.target, variance=variance, schedule=one.schedule,
                    steps=T, t_min=t_min, stabiliser=config["stabiliser"], chains=size,
                    data=one.kind.dataset(config) if variance == "best" else None,
                    decoder=discretised if levels else gaussian, generator=generator)
        for size in sizes]) for rows in x.split(max(1, batch // chains))], 1)
    if not log_w.isfinite().all():
        raise ValueError("its chains have weights that are not finite - train it longer, or with "
                         "another --loss or --variance")
    return log_w


if __name__ == "__main__":
    from datasets2d import DATASETS, GaussianMixture
    from ddpm import SCHEDULES
    schedule, T, n, K = SCHEDULES["iddpm"], 10, 600, 1000
    normal = GaussianMixture(torch.zeros(1, 2).double(), torch.ones(2).double())
    c = chain(schedule, T, 0.0)

    def law(variance):
        """Variance of the chain's x: of N(0, 1) the denoiser is alpha z, V <- (A + B alpha)^2 V + v."""
        V, alpha = 1.0, schedule.alpha(c.times)
        for i in range(T, 0, -1):
            step = c.step(torch.tensor(i), alpha)
            v = variances.VARIANCES[variance](None, step).exp()
            V = (step.A + step.B * alpha[i])**2 * V + v
        return V
    print(f"exact denoiser, iddpm, T = {T}: -log p(x) - entropy in nats, its standard error over "
          f"{n} points")
    print(f"{'':17s}{'bound':>15s}" + "".join(f"{f'{k} chains':>15s}" for k in (10, 100, K))
          + "     exact   effective size   error, bias of the chains")
    for name, data in ("N(0, I)", normal), ("clusters", DATASETS["clusters"]):
        for variance in "small", "large":
            g = torch.Generator().manual_seed(0)
            x = data.sample(n, g, torch.float64)
            log_w = log_weights(data.optimal_model("v", schedule), x, target="v", variance=variance,
                                schedule=schedule, steps=T, chains=K, generator=g)
            gaps = [data.log_prob(x) - log_likelihood(log_w.unflatten(0, (k, -1))).mean(0)
                    for k in (1, 10, 100, K)]
            cells = [f"{gap.mean():7.3f} +-{gap.std() / n**0.5:6.3f}" for gap in gaps]
            exact = (gaussian(x, 0 * x, law(variance).log()).sum(1) + data.log_prob(x)).mean()
            of_chains = standard_error(log_w).square()
            print(f"{name:9s} {variance:7s}{''.join(cells)} "
                  + (f"{exact:z9.3f}" if data is normal else 9 * " ")
                  + f"{effective_size(log_w).mean():11.0f} of {K}"
                  f"{of_chains.sum().sqrt() / n:13.4f}, {of_chains.mean() / 2:.4f}")
