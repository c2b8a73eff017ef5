r"""How errors are weighed: weighted loss, rescaled loss, NELBO (Eq. 3.13 - 3.64, Table 3.2).

Read `ddpm.py` and `targets.py` first. A loss is one weight as a function of t for each target:

    loss = E_{x, eps, t} [ weight(t) * mean over dimensions of (y_hat - y)^2 ]

with t ~ U(t_min, 1 - t_min). The weight multiplies each sample's error, inside the expectation:
as a factor on the mean, as (3.13) and (3.62) are printed, it would be another number. Errors are
means over dimensions, so a NELBO is in nats per dimension.

Not here: prior and reconstruction terms of the bound (Eq. 3.6); the losses here are its diffusion
term. `weightings.py` has more weights, and says what each is as one of log-SNR.

    python losses.py      # the weight of every loss and target over t
"""
import torch

import ddpm
import discrete
import score_matching
import targets
import variance
import weightings

STABLE_D = 0.01        # the thesis's stabiliser, inferred from its Table 4.1: ERRATA.md entry 8


def mse(target, alpha, sigma, det, dlogsnr):
    """Weighted loss, the plain squared error of the target: Eq. (3.24), (3.27), (3.52), (3.61)."""
    return torch.ones_like(det)


def rescaled(target, alpha, sigma, det, dlogsnr):
    """Rescaled loss, the error of x_hat whatever is predicted: Eq. (3.62) - (3.64).

    (sigma / det)^2 is 1 for x, sigma^2 / alpha^2 for eps, sigma^2 for v (alpha^2 + sigma^2 = 1),
    sigma^4 / alpha^2 for s.
    """
    return (sigma / det)**2


def nelbo(target, alpha, sigma, det, dlogsnr):
    """NELBO: -1/2 SNR'(t) on the error of x_hat, Eq. (3.20).

    That is -1/2 dlogsnr/dt on the error of eps_hat, Eq. (3.26). SNR' = SNR dlogsnr and
    alpha^2 = SNR sigma^2, so it is -1/2 SNR' (sigma / det)^2 for any target. The rows of
    Table 3.2, which are twice this (ERRATA.md entry 3), for alpha^2 + sigma^2 = 1:
        x    det = -sigma           -SNR'                      (3.21)
        eps  det = alpha            -SNR' / SNR                (3.26)
        s    det = -alpha / sigma   -SNR' sigma^4 / alpha^2    (3.51)
        v    det = 1                -SNR' sigma^2              (3.60)
    """
    return -0.5 * dlogsnr * (alpha / det)**2


def nelbo_stable(target, alpha, sigma, det, dlogsnr):
    """The weights that explain the thesis's NELBO column (ERRATA.md entry 8).

    They are 2 / pi times nelbo on the cosine schedule, with d in the denominator: four different
    functionals, comparable with the thesis's Table 4.1 and not with each other. For x, eps, v, s.
    """
    rows = {"x": alpha / (sigma**3 + STABLE_D), "eps": 1 / (alpha * sigma + STABLE_D),
            "v": alpha / (sigma + STABLE_D),    "s": sigma / (alpha + STABLE_D)}
    if target not in rows:
        raise ValueError(f"nelbo_stable has no weight for target {target!r}: "
                         f"choose from {', '.join(rows)}")
    return rows[target]


def vlb(target, alpha, sigma, det, dlogsnr):
    """The bound of a discrete chain: no weight of an error, but a term of `variance.loss`."""
    return torch.zeros_like(det)


def multi_scale(target, alpha, sigma, det, dlogsnr):
    """Scores of many noise levels, the steps of a chain: Eq. (3.45), each weighted by sigma_i^2.

    For s of schedule `ve` that is half the error of sigma s_hat, for any target of eps_hat
    (Song and Ermon 2019, Eq. 6). `score_matching.multi_scale` divided by D.
    """
    return 0.5 * (alpha / det)**2


def v_space(target, alpha, sigma, det, dlogsnr):
    """The error of v_hat whatever is predicted, as `rescaled` is that of x_hat."""
    return ((alpha**2 + sigma**2) / det)**2


def u_space(target, alpha, sigma, det, dlogsnr):
    """The error of u_hat whatever is predicted: of flow matching on schedule `flow`."""
    return ((alpha + sigma) / det)**2


def s_space(target, alpha, sigma, det, dlogsnr):
    """The error of s_hat whatever is predicted."""
    return (alpha / sigma / det)**2


LOSSES = {"mse": mse, "rescaled": rescaled, "nelbo": nelbo, "nelbo_stable": nelbo_stable,
          "vlb": vlb, "hybrid": mse,       # hybrid: and a little of vlb, Foundations 6.1
          "multi_scale": multi_scale, "v_space": v_space, "u_space": u_space, "s_space": s_space,
          **weightings.ROWS}               # simple (of eps_hat), sigmoid, min_snr, p2, edm, ...
COSINE_ONLY = "nelbo_stable",
OF_A_CHAIN = "vlb", "hybrid"


def weight(loss, target, t, schedule, stabiliser=0.0, chain=None):
    """Weight of the target's squared error at time t: (B,) -> (B,).

    Raises ValueError for an unknown loss or target, a schedule that the loss is not made for, or a
    loss or target of a discrete chain without one (`discrete.chain`).
    """
    if loss not in LOSSES:
        raise ValueError(f"unknown loss {loss!r}: choose from {', '.join(LOSSES)}")
    if loss in COSINE_ONLY and schedule is not ddpm.SCHEDULES["cosine"]:
        raise ValueError(f"{loss} has weights for the cosine schedule alone")
    if loss in (*OF_A_CHAIN, "multi_scale") and chain is None:
        raise ValueError(f"loss {loss} is of a discrete chain: "
                         "say of how many steps, --timesteps 1000")
    alpha, sigma = schedule.alpha(t), schedule.sigma(t)
    det = targets.determinant(target, alpha, sigma, stabiliser, step_of(chain, t))
    return LOSSES[loss](target, alpha, sigma, det, schedule.dlogsnr(t))


def translate(source, to, t, schedule):
    """The factor that makes the squared error of target `source` that of target `to`: (B,) -> (B,).

    (det_to / det_source)^2 for one network's prediction, whatever it is: VDM Table 4.3, for every
    pair and schedule. For alpha^2 + sigma^2 = 1 (v to eps is printed 1 / alpha^2, ERRATA.md):
        eps to x  sigma^2 / alpha^2    v to x    sigma^2    v to eps  alpha^2
    """
    alpha, sigma = schedule.alpha(t), schedule.sigma(t)
    det = {name: targets.determinant(name, alpha, sigma) for name in (source, to)}
    return (det[to] / det[source])**2


def step_of(chain, t):
    """(A, B) of the steps of a chain that start at its times t, for a target that needs them."""
    return None if chain is None else chain.step(chain.index(t), t)[:2]


def chain_of(config):
    """The discrete chain that a run is trained on; None: continuous time."""
    return config.get("timesteps") and discrete.chain(
        ddpm.fixed(config["schedule"]), config["timesteps"], config["t_min"])


def objective(config):
    """The arguments of `loss` besides model and data, from the config of a run."""
    found = dict(target=config["target"], loss=config["loss"],
                 schedule=ddpm.fixed(config["schedule"]), stabiliser=config["stabiliser"])
    return found | ({"chain": chain_of(config)} if config.get("timesteps") else {}) | (
        {"sigma": config["sigma"]} if config.get("sigma") is not None else {})


def regression(x, t, eps, *, target, loss, schedule, stabiliser=0.0, chain=None, sigma=None):
    """The weighted regression that training is: inputs z (and t), targets y, weights w.

    x, eps, z = alpha x + sigma eps and y = a x + b eps are (B, ...), t and w are (B,). They are
    the same for every network, so that training computes them for many batches at once. chain: its
    times t are. sigma: of a score without t, which gets `score_matching.batch`, all weights 1.
    """
    if sigma is not None:
        return *score_matching.batch(x, eps, loss, sigma), torch.ones_like(t)
    alpha, sigma, step = schedule.alpha(t), schedule.sigma(t), step_of(chain, t)
    a, b = (ddpm.expand(c, x) for c in targets.coefficients(target, alpha, sigma, stabiliser, step))
    return (ddpm.q_sample(x, t, eps, schedule), a * x + b * eps,
            weight(loss, target, t, schedule, stabiliser, chain))


def weighted_error(y_hat, y, w):
    """w times the squared error of a prediction, a mean over dimensions.

    y_hat, y (B, ...), w (B,) -> (B,).
    """
    assert y_hat.shape == y.shape, (f"the model returned {tuple(y_hat.shape)}, "
                                    f"the target is {tuple(y.shape)}")
    return w * (y_hat - y).square().flatten(1).mean(1)


def loss(model, x, t, eps, *, target, loss, schedule, stabiliser=0.0):
    """Weighted squared error of each sample, a mean over dimensions: x, eps (B, ...), t -> (B,).

    model(z, t) -> prediction of `target`, of z's shape. The mean over the batch is the loss; for
    `nelbo` it is the diffusion term of the bound in nats per dimension, divided by the length
    1 - 2 t_min of the range of t.
    """
    z, y, w = regression(x, t, eps, target=target, loss=loss, schedule=schedule,
                         stabiliser=stabiliser)
    return weighted_error(model(z, t), y, w)


def discrete_loss(model, x, i, eps, *, steps, target, schedule, t_min=1e-3, **how):
    """Diffusion loss L_T of T = steps, Eq. (3.18): one term i of its sum for each sample, times T.

    x, eps (B, ...), i (B,) integers in 1..steps, uniform -> (B,). The mean over the batch
    estimates L_T / D in nats per dimension on the grid t_i = t_min + (1 - 2 t_min) i / T. how:
    stabiliser, variance (`small`), data and decoder of `variance.term`. With `small` it is
    1/2 (SNR(s) - SNR(t)) on the error of x_hat and tends to (1 - 2 t_min) times the mean of the
    continuous `nelbo` loss as T grows, from above, Eq. (3.19) - (3.20).
    """
    chain = discrete.chain(schedule, steps, t_min)
    nats = variance.term(model, x, i, eps, chain=chain, target=target, **how)
    return steps / x[0].numel() * nats


def over_t(errors, t, t_min=1e-3, bins=20, importance=None, chain=None):
    """Mean error in each of `bins` equal pieces of [t_min, 1 - t_min].

    errors, t (..., n) -> (..., bins). importance (..., n): that of `draw_t`, which the errors
    have as a factor; None where t is uniform. A time of a chain between two pieces is of the
    earlier one, through which its step goes.
    """
    t = t if chain is None else t - 0.01 * (1 - 2 * t_min) / chain.steps    # beyond rounding
    k = ((t - t_min) / (1 - 2 * t_min) * bins).long().clamp(0, bins - 1)
    zeros = errors.new_zeros(*errors.shape[:-1], bins)
    counts = torch.ones_like(errors) if importance is None else importance
    return zeros.scatter_add(-1, k, errors) / zeros.scatter_add(-1, k, counts)


def sample_t(shape, t_min=1e-3, generator=None, dtype=torch.float32):
    """Draw t ~ U(t_min, 1 - t_min), stratified over the batch.

    One uniform draw u, and t_i from (u + i / B) mod 1. Shape (B,), or (..., B) for independent
    batches. Each t alone is uniform, and together those of a batch cover the range evenly: the
    loss has the same mean and less variance (Kingma et al. 2021).
    """
    device = generator.device if generator is not None else "cpu"
    u = torch.rand((*shape[:-1], 1), generator=generator, device=device, dtype=dtype)
    u = (u + torch.arange(shape[-1], device=device, dtype=dtype) / shape[-1]) % 1
    return t_min + (1 - 2 * t_min) * u


T_DENSITIES = "uniform", "logsnr", "adaptive", "loss_aware"          # the latter two: adaptive.py


def bin_of(u, p):
    """Bins drawn by u in [0, 1): i, where in it, in [0, 1), and its probability, all of u's shape.

    That is proportional to p (n,), and a thousandth uniform.
    """
    p = p.cpu().to(u.dtype)
    p = 0.999 * p / p.sum() + 0.001 / len(p)
    ends, p = p.cumsum(0).to(u.device), p.to(u.device)
    i = torch.searchsorted(ends, u).clamp(max=len(p) - 1)
    return i, (1 - (ends[i] - u) / p[i]).clamp(0, 1), p[i]


def draw_step(shape, chain, moments=None, generator=None, dtype=torch.float32):
    """Draw times of a chain -> t, its importance 1 / (T p(i)); i uniform, stratified as `sample_t`.

    moments (T,): p(i) is proportional to the root of the mean square of term i of the loss, what
    gives the mean over i the least variance (Nichol and Dhariwal 2021, Eq. 18), and a thousandth
    uniform.
    """
    u = sample_t(shape, 0.0, generator, dtype)
    i, _, p = bin_of(u, torch.ones(chain.steps) if moments is None else moments.sqrt())
    return chain.times.to(u)[i + 1], 1 / (chain.steps * p)


def draw_t(shape, schedule, t_min=1e-3, density="uniform", generator=None, dtype=torch.float32):
    """Draw t with t itself or log-SNR uniform between t_min and 1 - t_min -> t, its importance.

    Both are of `shape`. The importance is 1 / (p(t) (1 - 2 t_min)): a mean of anything times it
    is the mean over t uniform, whatever the density p. With log-SNR uniform and the loss `nelbo`
    weight times importance is a constant on the squared error of eps_hat, and most of the loss's
    variance is gone (VDM 4.6, Eq. 4.123). Stratified over the last axis, see `sample_t`.
    """
    if density not in T_DENSITIES[:2]:
        raise ValueError(f"unknown density of t {density!r}: "
                         f"choose from {', '.join(T_DENSITIES[:2])}")
    if density == "uniform":
        t = sample_t(shape, t_min, generator, dtype)
        return t, torch.ones_like(t)
    low, high = schedule.ends(t_min)
    t = schedule.t(low + (high - low) * sample_t(shape, 0.0, generator, dtype))
    return t, (high - low) / (-schedule.dlogsnr(t) * (1 - 2 * t_min))


if __name__ == "__main__":
    t = torch.tensor([0.001, 0.01, 0.1, 0.5, 0.9, 0.99, 0.999])
    row = lambda values: " ".join(f"{v:9.4g}" for v in values)
    print(f"{'cosine schedule, t =':20s} {row(t)}")
    for name in [name for name in LOSSES if name not in (*OF_A_CHAIN, "multi_scale")]:
        for target in "x", "eps", "v", "s":
            print(f"{name:13s} {target:6s} "
                  f"{row(weight(name, target, t, ddpm.SCHEDULES['cosine']))}")
    names = [name for name in targets.TARGETS if name not in targets.OF_A_STEP]
    print("\nsquared error of the row = factor times that of the column, cosine, t = 0.1\n      "
          + " ".join(f"{name:>9s}" for name in names))
    for to in names:
        print(f"{to:6s}" + row(torch.stack([translate(
            source, to, t[2], ddpm.SCHEDULES["cosine"]) for source in names])))
