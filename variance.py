r"""The variance of each step of a discrete chain, and the bound with it (Foundations 3 - 6; poster).

Read `losses.py` and `discrete.py` first. A model of T steps draws z_s from z_t:

    q(z_s | z_t, x) = N(A z + B x, q)           the posterior, Eq. (3.9)
    p(z_s | z_t)    = N(A z + B x_hat, v)       the model's: which v?

x is not known, only E[x | z]: so v must also have what x does around it, and the best v is
q + B^2 Var[x | z] (Bao et al. 2022), which `best` knows for the 2D datasets. VARIANCES has the
others: fixed ones, between which it lies for data of variance 1 on the average over z, and learned
ones, for which the network has twice the outputs: the prediction of its target, then `out`.

    python train.py --schedule iddpm --timesteps 1000 --target eps --loss hybrid --variance range
    python sample.py --steps 100
    python likelihood.py

Not here: the loop (`train_points.py`, `train_images.py`), the chain's own likelihood without a
bound (`importance.py`).

    python variance.py    # how far each variance is from the best: bound - entropy, clusters
"""
import torch

import ddpm
import targets
from decoders import gaussian, nats, prior, reconstruction
from discrete import Step, chain, smallest_t


def kl(mean_q, log_var_q, mean_p, log_var_p):
    """KL of N(mean_p, e^log_var_p) from N(mean_q, e^log_var_q) in nats, for each dimension.

    Foundations 3.4, in logs; its (3.5) - (3.7) have the variances swapped (ERRATA.md). expm1: where
    the variances are nearly equal, exp - 1 cancels.
    """
    ratio = log_var_q - log_var_p
    return 0.5 * (torch.expm1(ratio) - ratio + (mean_q - mean_p)**2 * torch.exp(-log_var_p))


LEAST = 1e-9           # of `direct`, as in Foundations' code; `direct` and `log` start at v = 1, out = 0


def interpolated(out, step):
    """Foundations 6.3, 6.4: out = -1 is `small`, 1 is `large`. It is not bounded (ERRATA.md)."""
    u = (out + 1) / 2
    return u * step.log_large + (1 - u) * step.log_small


# log v of a step. out: the second half of the network's output; for `best` Var[x | z].
VARIANCES = {
    "small":  lambda out, step: step.log_small,            # q, "beta tilde": the thesis's, Eq. (3.12)
    "large":  lambda out, step: step.log_large,            # beta: Foundations 6.2
    "direct": lambda out, step: (1 + out).clamp(min=LEAST).log(),     # Foundations 4.1
    "log":    lambda out, step: out,                                  # Foundations 4.3
    "range":  interpolated,
    "best":   lambda out, step: torch.logaddexp(step.log_q, 2 * step.B.log() + out.log()),
}
LEARNED = "direct", "log", "range"
OF_ANY_STEP = "small", "large", "range", "best"            # the rest knows only the steps of training


def best(data, z, s, t, schedule):
    """q + B^2 Var[x | z]: of all variances the one of the best bound, where x_hat is E[x | z].

    data: a `datasets2d.GaussianMixture`; z (B, 2), s, t (B,) or () -> (B, 2). Bao et al. 2022.
    """
    _, B, q = ddpm.posterior_coefficients(s, t, schedule)
    var = data.covariance(z, schedule.alpha(t), schedule.sigma(t))
    return ddpm.expand(q, z) + ddpm.expand(B, z)**2 * var


def log_var(name, s, t, schedule, z, out=None):
    """log v of the step from t to s, not one to x itself: s, t (), z (B, ...) -> broadcastable."""
    A, B, q = ddpm.posterior_coefficients(s, t, schedule)
    log_large = ddpm.var_ts(s, t, schedule).log()
    return VARIANCES[name](out, Step(A, B, q.log(), q.log(), log_large, torch.zeros_like(A)))


# The bound

def split(prediction, like):
    """A network's output as the prediction of its target and `out`, None if it has none of it."""
    y_hat, *out = prediction.split(like.shape[1], 1)
    return y_hat, *(out or [None])


def error_factor(step, target, t, schedule, stabiliser=0.0):
    """What an error of the target is times in the mean A z + B x_hat: (B,) -> (B,). 1 for mu."""
    alpha, sigma = schedule.alpha(t), schedule.sigma(t)
    return -step.B * sigma / targets.determinant(target, alpha, sigma, stabiliser, step[:2])


TESTED = "mean_mse", "vlb"     # what runs on a chain are tested with besides their own loss


def mean_factor(t, chain, target, stabiliser=0.0):
    """`error_factor` at the times t of a chain: (n,) -> (n,). Its square makes `mean_mse`."""
    return error_factor(chain.step(chain.index(t), t), target, t, chain.schedule, stabiliser)


def terms(error, out, step, variance, x, decoder):
    """A term of the bound in nats, for each dimension: (B, ...) -> (B, ...).

    error: of the model's mean. The KL of a step, or for the step to x itself -log p(x | z_1).
    """
    log_v = VARIANCES[variance](out, step)
    return torch.where(step.decodes > 0, decoder(x, x + error, log_v),
                       kl(torch.zeros_like(error), step.log_small, error, log_v))


def at_step(model, x, i, eps, *, chain, target, variance="small", stabiliser=0.0, data=None):
    """Step i of a model at z_t = alpha x + sigma eps: x, eps (B, ...), i (B,) in 1..T -> three.

    The error of its mean, what `variance` asks for as `out`, and the Step. model(z, t) -> the
    prediction of `target` and, for a learned variance, `out` beside it on axis 1. data: the
    mixture, for `best`.
    """
    t, schedule = chain.times.to(x)[i], chain.schedule
    z, step = ddpm.q_sample(x, t, eps, schedule), chain.step(i, x)
    alpha, sigma = ddpm.expand(schedule.alpha(t), x), ddpm.expand(schedule.sigma(t), x)
    factor = ddpm.expand(error_factor(step, target, t, schedule, stabiliser), x)
    step = Step(*(ddpm.expand(c, x) for c in step))
    a, b = targets.coefficients(target, alpha, sigma, stabiliser, step[:2])
    y_hat, out = split(model(z, t), x)
    out = data.covariance(z, alpha.flatten(), sigma.flatten()) if variance == "best" else out
    return factor * (y_hat - a * x - b * eps), out, step


def term(model, x, i, eps, *, variance="small", decoder=gaussian, **how):
    """Term i of the bound, one draw of it: x, eps (B, ...), i (B,) in 1..T -> (B,) in nats, a sum.

    how: chain, target, stabiliser and data of `at_step`.
    """
    error, out, step = at_step(model, x, i, eps, variance=variance, **how)
    return nats(terms(error, out, step, variance, x, decoder))


@torch.no_grad()
def vlb(model, x, *, target, variance, schedule, steps, t_min=None, decoder=gaussian, data=None,
        stabiliser=0.0, draws=1, generator=None):
    """All T terms of the bound on -log p(x) of each example: x (B, ...) -> dict of (B,) in nats.

    "prior", "reconstruction" and "diffusion" sum to the bound (Foundations 2.22: L_T, L_0, the
    rest). Each term is a mean over `draws` of the noise, of which "error" is the standard error
    (0 of one draw: unknown). t_min: `smallest_t`. The other arguments are those of `at_step`.
    """
    t_min = smallest_t(schedule) if t_min is None else t_min
    c, sums = chain(schedule, steps, t_min), x.new_zeros(2, draws, len(x))     # of L_0, of the rest
    noise = lambda: torch.randn(x.shape, generator=generator, device=x.device, dtype=x.dtype)
    for i in range(1, steps + 1):
        of = torch.full((len(x),), i, device=x.device)
        for k in range(draws):
            sums[int(i > 1 or not c.decodes), k] += term(
                model, x, of, noise(), chain=c, target=target, variance=variance,
                stabiliser=stabiliser, data=data, decoder=decoder)
    if not c.decodes:                                      # p(x | z_0)
        sums[0] = torch.stack([reconstruction(x, noise(), schedule.ends(t_min)[1], decoder)
                               for _ in range(draws)])
    error = sums.sum(0).std(0) / draws**0.5 if draws > 1 else torch.zeros_like(sums[0, 0])
    return {"prior": prior(x, schedule, t_min), "reconstruction": sums[0].mean(0),
            "diffusion": sums[1].mean(0), "error": error}


# Training

def columns(t, chain, target, loss, stabiliser=0.0, weight=1.0, vlb_weight=1e-3):
    """What `loss` needs of each row besides the regression, numbers in a tensor: t (n,) -> (n, 9)."""
    step = chain.step(chain.index(t), t)
    times, mean_too = {"vlb": (1.0, 1.0), "hybrid": (vlb_weight, 0.0)}.get(loss, (0.0, 0.0))
    return torch.stack([*step, error_factor(step, target, t, chain.schedule, stabiliser),
                        times * chain.steps * weight * torch.ones_like(t),
                        mean_too * torch.ones_like(t)], 1)


def loss(prediction, y, w, columns, variance, x=None, decoder=gaussian):
    """w times the squared error plus the bound, as `columns` weigh it, means over dimensions.

    prediction (B, D or 2 D, ...), y (B, D, ...), w (B,) -> (B,). `vlb` is T times the term: its mean
    over i is the bound without the prior, in nats per dimension. `hybrid` is `mse` plus vlb_weight
    times that, in which the mean is detached (Foundations 6.1). columns: those of `columns` and,
    for `best`, Var[x | z]. x: for the decoder of images.
    """
    y_hat, out = split(prediction, y)
    *step, factor, times, mean_too = (ddpm.expand(c, y) for c in columns[:, :9].unbind(1))
    out = columns[:, 9:].reshape(y.shape) if variance == "best" else out
    error = y_hat - y
    apart = mean_too * error + (1 - mean_too) * error.detach()
    bound = terms(factor * apart, out, Step(*step), variance, 0 * y if x is None else x, decoder)
    return (ddpm.expand(w, y) * error.square() + times * bound).flatten(1).mean(1)


class Mean(torch.nn.Module):
    """A network of a chain as one that predicts x, eps, v, ...: without `out`, and x for mu.

    So all samplers and likelihoods take it. names: the targets of its equal blocks of rows.
    out: keep it, on axis 1 after the prediction.
    """

    def __init__(self, network, names, chain, out=False):
        super().__init__()
        self.network, self.names, self.chain, self.out = network, names, chain, out

    def energy(self, z, t):
        """Of a network that is one: `energy.Energy.energy`."""
        return self.network.energy(z, t)

    def forward(self, z, t):
        y_hat, out = split(self.network(z, t), z)
        blocks = list(y_hat.chunk(len(self.names)))
        for m, (name, z_m, t_m) in enumerate(zip(self.names, z.chunk(len(self.names)),
                                                 t.chunk(len(self.names)))):
            if name in targets.OF_A_STEP:
                schedule = self.chain.schedule
                alpha, sigma = (ddpm.expand(c(t_m), z_m) for c in (schedule.alpha, schedule.sigma))
                step = [ddpm.expand(c, z_m) for c in self.chain.at(t_m)]
                blocks[m] = targets.to_x(name, blocks[m], z_m, alpha, sigma, step=step)
        y_hat = torch.cat(blocks)
        return torch.cat([y_hat, out], 1) if self.out and out is not None else y_hat


def chosen(config, variance, sampler="ancestral", steps=None, grid="t", t_min=None):
    """The variance with which a sampler or a bound takes the steps of a run; None: its own.

    None is returned for a sampler that has none. ValueError, one sentence, if that cannot be.
    """
    if config.get("sigma") is not None and sampler != "langevin":
        raise ValueError("its score has no t, and so no likelihood - draw samples, with --sampler langevin")
    if config.get("sigma") is None and sampler == "langevin":
        raise ValueError("its network knows many noise levels - take --sampler annealed, langevin is for "
                         "runs of --loss exact, sliced or denoising")
    own, T = config.get("variance", "small"), config.get("timesteps")
    if sampler != "ancestral":
        if own in LEARNED and variance != "none":
            raise ValueError(f"its variance {own} is learned, which sampler {sampler} does not use - "
                             "take --sampler ancestral, or say --variance none")
        return None
    variance = variance or own
    if variance in LEARNED and variance != own:
        raise ValueError(f"it has not learned a variance {variance}, but has {own} - take small or large")
    own_steps = steps in (None, T) and grid == "t" and t_min in (None, config.get("t_min"))
    if variance not in OF_ANY_STEP and not own_steps:
        raise ValueError(f"its variance {variance} is that of its own {T} steps alone - take "
                         f"--steps {T} and no --grid or --t-min, or --variance small or large")
    if variance == "best" and ("points" in config or "shape" in config):
        raise ValueError("the best variance is known for the 2D datasets alone - take small or large")
    return variance


def outputs(config):
    """How many numbers a run's network gives for each of the data: 2 with a learned variance."""
    return 2 if config.get("variance") in LEARNED else 1


def predicted(target):
    """What `Mean` makes of a network of this target."""
    return "x" if target in targets.OF_A_STEP else target


if __name__ == "__main__":
    from datasets2d import DATASETS
    data, schedule = DATASETS["clusters"], ddpm.SCHEDULES["cosine"]
    x = data.sample(5000, torch.Generator().manual_seed(0), torch.float64)
    model, entropy = data.optimal_model("v", schedule), -data.log_prob(x)
    names = ["small", "large", "best"]
    print("exact denoiser of the clusters, bound - entropy in nats\n   T" + "".join(
        f"{name:>10s}" for name in names))
    for steps in 4, 16, 64, 256:
        gaps = [sum(list(vlb(model, x, target="v", variance=name, schedule=schedule, steps=steps,
                             data=data).values())[:3]) - entropy for name in names]
        print(f"{steps:4d}" + "".join(f"{gap.mean():10.3f}" for gap in gaps))
