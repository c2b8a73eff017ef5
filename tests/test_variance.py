"""The variance of a step and the bound: quadrature, torch.distributions, autograd, brute-force sums over steps, and
chains on Gaussian data, whose bound is known for every T."""
import itertools
import math

import pytest
import torch
from scipy import stats
from test_ddpm import alpha_sigma, every_schedule
from torch import distributions
from torch.testing import assert_close

import ddpm
import decoders
import likelihood
import variance
from datasets2d import DATASETS, GaussianMixture
from ddpm import SCHEDULES
from discrete import Step, chain

F64 = torch.float64
seed = lambda n: torch.Generator().manual_seed(n)
every_variance = pytest.mark.parametrize("name", variance.VARIANCES)
TARGETS = "x", "eps", "v", "s", "u", "F", "mu", "mu_skip"
tensor = lambda *values: torch.tensor(values, dtype=F64)
# A chain whose first step is a decoder, and one that ends before x.
CHAINS = {"decodes": chain(SCHEDULES["ddpm"], 5, 0.0), "ends before": chain(SCHEDULES["cosine"], 5, 0.01)}
every_chain = pytest.mark.parametrize("of", CHAINS)


# The KL

def test_the_kl_is_that_of_quadrature_and_of_torch():
    mean_q, log_var_q, mean_p, log_var_p = tensor([0.3, -1.2, 0.0, 2.0], [-1.0, 0.4, -3.0, 0.2],
                                                  [0.1, 0.5, 0.02, -1.0], [0.7, -0.6, -3.1, 0.2])
    found = variance.kl(mean_q, log_var_q, mean_p, log_var_p)
    x = torch.linspace(-12, 14, 20_001, dtype=F64)[:, None]
    normal = lambda mean, log_var: distributions.Normal(mean, torch.exp(0.5 * log_var))
    q, p = normal(mean_q, log_var_q), normal(mean_p, log_var_p)
    log_q = q.log_prob(x)
    assert_close(found, torch.trapezoid(log_q.exp() * (log_q - p.log_prob(x)), x, dim=0), rtol=1e-8, atol=1e-12)
    assert_close(found, distributions.kl_divergence(q, p), rtol=1e-12, atol=0)
    assert_close(variance.kl(mean_p, log_var_p, mean_q, log_var_q), distributions.kl_divergence(p, q), rtol=1e-12,
                 atol=0)
    assert not torch.allclose(found, variance.kl(mean_p, log_var_p, mean_q, log_var_q), rtol=0.05)


def test_a_tiny_difference_of_variances_does_not_cancel():
    """(r^2 / 2 + r^3 / 6) / 2 of a ratio e^r near 1, in float32; exp(r) - 1 - r would be off by a tenth at r = 1e-3."""
    r = torch.tensor([1e-3, -1e-3, 3e-3])
    expected = (r.double()**2 / 2 + r.double()**3 / 6) / 2
    zero = torch.zeros(3)
    assert_close(variance.kl(zero, r, zero, zero).double(), expected, rtol=1e-3, atol=0)
    assert variance.kl(zero, zero - 7, zero, zero - 7).tolist() == [0, 0, 0]


def test_the_gradients_of_foundations_4_2_and_4_4():
    """d KL / dv = 1/2 (1/v - q/v^2 - e^2/v^2), times v for log v: its example is -2.995e6 and -299.5."""
    q, error_sq = tensor(0.01, 0.3, 0.002), tensor(0.05, 0.0, 1.0)
    v = tensor(1e-4, 0.7, 0.004).requires_grad_()
    zero = torch.zeros(3, dtype=F64)
    of_v, = torch.autograd.grad(variance.kl(zero, q.log(), error_sq.sqrt(), v.log()).sum(), v)
    log_v = v.detach().log().requires_grad_()
    of_log_v, = torch.autograd.grad(variance.kl(zero, q.log(), error_sq.sqrt(), log_v).sum(), log_v)
    v = v.detach()
    assert_close(of_v, 0.5 * (1 / v - q / v**2 - error_sq / v**2), rtol=1e-9, atol=0)
    assert_close(of_log_v, 0.5 * (1 - q / v - error_sq / v), rtol=1e-9, atol=0)
    assert_close([of_v[0].item(), of_log_v[0].item()], [-2.995e6, -299.5], rtol=1e-9, atol=0)


# The table

def test_every_variance_is_its_definition():
    """Foundations 4.1, 4.3, 4.5, 6.2 - 6.4; Bao et al. 2022. out = 0 is v = 1 for direct and log."""
    q, small, beta, B, out = tensor(0.02, 0.3), tensor(0.05, 0.3), tensor(0.09, 0.4), tensor(0.6, 0.1), tensor(0.7, 1.8)
    step = Step(tensor(0.4, 0.9), B, q.log(), small.log(), beta.log(), tensor(0, 0))
    u = (out + 1) / 2
    typed = {"small": small, "large": beta, "direct": 1 + out, "log": out.exp(), "range": beta**u * small**(1 - u),
             "best": q + B**2 * out}
    assert set(typed) == set(variance.VARIANCES)
    for name, v in typed.items():
        assert_close(variance.VARIANCES[name](out, step).exp(), v, rtol=1e-12, atol=0)
    ends = variance.VARIANCES["range"](tensor(-1, 1), step)
    assert_close(ends.exp(), tensor(small[0], beta[1]), rtol=1e-12, atol=0)
    beyond = variance.VARIANCES["range"](tensor(3, 3), step)                          # it is not bounded
    assert_close(beyond.exp(), beta**2 / small, rtol=1e-12, atol=0)
    low = variance.VARIANCES["direct"](tensor(-1, -5), step)
    assert_close(low, tensor(1e-9, 1e-9).log(), rtol=1e-9, atol=0)
    zero = tensor(0, 0)
    assert variance.VARIANCES["direct"](zero, step).tolist() == variance.VARIANCES["log"](zero, step).tolist() == [0, 0]
    decoding = step._replace(log_q=tensor(-math.inf, -math.inf))
    assert_close(variance.VARIANCES["best"](out, decoding).exp(), B**2 * out, rtol=1e-12, atol=0)
    assert variance.LEARNED == ("direct", "log", "range")
    assert [name for name in variance.VARIANCES if variance.outputs({"variance": name}) == 2] == [
        "direct", "log", "range"] and variance.outputs({}) == 1


@every_schedule
def test_the_variance_of_a_step_between_any_two_times(name):
    s, t, z = tensor(0.31), tensor(0.52), torch.randn(4, 2, generator=seed(0), dtype=F64)
    (alpha_s, sigma_s), (alpha, sigma) = alpha_sigma(name, s), alpha_sigma(name, t)
    beta = sigma**2 - (alpha / alpha_s)**2 * sigma_s**2
    q, out = beta * sigma_s**2 / sigma**2, torch.randn(4, 2, generator=seed(1), dtype=F64)
    found = lambda which: variance.log_var(which, s[0], t[0], SCHEDULES[name], z, out).exp().expand(4, 2)
    assert_close(found("small"), q.expand(4, 2), rtol=1e-6, atol=0)
    assert_close(found("large"), beta.expand(4, 2), rtol=1e-6, atol=0)
    assert_close(found("range"), beta**((out + 1) / 2) * q**((1 - out) / 2), rtol=1e-6, atol=0)
    assert_close(found("log"), out.exp(), rtol=1e-12, atol=0)


FIVE = GaussianMixture(torch.randn(5, 2, generator=seed(7), dtype=F64), tensor(0.3, 0.2))


@pytest.mark.parametrize("mixture, z", [(DATASETS["clusters"], (0.1, -0.4)), (FIVE, (0.5, 0.9))])
def test_the_best_variance_has_the_least_kl_on_average(mixture, z):
    """x given z on a fine grid: at v = best the derivative of E KL(q || N(A z + B x_hat, v)) in log v is 0."""
    schedule, s, t = SCHEDULES["cosine"], tensor(0.3), tensor(0.45)
    (alpha_s, sigma_s), (alpha, sigma) = alpha_sigma("cosine", s), alpha_sigma("cosine", t)
    axis = torch.linspace(-3.5, 3.5, 141, dtype=F64)
    x, z = torch.cartesian_prod(axis, axis), tensor(z)
    weight = (mixture.log_prob(x) - ((z - alpha * x)**2).sum(1) / (2 * sigma**2)).softmax(0)[:, None]
    gain = alpha / alpha_s * sigma_s**2 / sigma**2                                    # posterior of z_s given z_t, x
    mean = lambda x: alpha_s * x + gain * (z - alpha * x)
    q = sigma_s**2 - gain**2 * sigma**2
    v = variance.best(mixture, z, s, t, schedule)
    log_v = v.log().requires_grad_()
    kl = 0.5 * (log_v - q.log() - 1 + (q + (mean(x) - mean((weight * x).sum(0)))**2) / log_v.exp())
    slope, = torch.autograd.grad((weight * kl).sum(), log_v)
    assert_close(slope, torch.zeros_like(v), rtol=0, atol=1e-5)
    assert (v > 1.05 * q).all()
    given = mixture.covariance(z, alpha, sigma)
    assert_close(variance.log_var("best", s, t, schedule, z, given), v.log(), rtol=1e-6, atol=0)


@every_schedule
def test_the_best_variance_of_unit_gaussian_data_is_beta_and_of_constant_data_that_of_q(name):
    """Where alpha^2 + sigma^2 = 1; elsewhere beta of a step of the reverse of N(0, alpha^2 + sigma^2)."""
    s, t, z = tensor(0.2, 0.6), tensor(0.25, 0.9), torch.randn(2, 2, generator=seed(0), dtype=F64)
    (alpha_s, sigma_s), (alpha, sigma) = alpha_sigma(name, s), alpha_sigma(name, t)
    beta = sigma**2 - (alpha / alpha_s)**2 * sigma_s**2
    of = lambda std: variance.best(GaussianMixture(torch.zeros(1, 2, dtype=F64), tensor(std, std)), z, s, t,
                                   SCHEDULES[name])
    backward = beta * (alpha_s**2 + sigma_s**2) / (alpha**2 + sigma**2)               # var of z_s given z_t
    assert_close(of(1.0), backward[:, None].expand(2, 2), rtol=1e-6, atol=0)
    if SCHEDULES[name].scale is ddpm.PRESERVING:
        assert_close(backward, beta, rtol=1e-9, atol=0)
    assert_close(of(1e-9), (beta * sigma_s**2 / sigma**2)[:, None].expand(2, 2), rtol=1e-6, atol=0)


# One term, typed again

def posterior(of, i, x, z):
    """Mean and variance of q(z_s | z_t, x) from the joint Gaussian of the two, rows of a chain's steps i."""
    c = CHAINS[of]
    s, t = (c.times[i - k][:, None] for k in (1, 0))
    (alpha_s, sigma_s), (alpha, sigma) = ((c.schedule.alpha(u), c.schedule.sigma(u)) for u in (s, t))
    gain = alpha / alpha_s * sigma_s**2 / sigma**2
    return alpha_s * x + gain * (z - alpha * x), sigma_s**2 - gain**2 * sigma**2, gain


def typed_variance(name, of, i, out):
    """v of step i with `out`, where that of `best` is Var[x | z]: (B,) -> (B, 2)."""
    c = CHAINS[of]
    alpha, sigma = c.schedule.alpha(c.times), c.schedule.sigma(c.times)
    beta = sigma[i]**2 - (alpha[i] / alpha[i - 1])**2 * sigma[i - 1]**2
    q = beta * sigma[i - 1]**2 / sigma[i]**2
    gain = alpha[i] / alpha[i - 1] * sigma[i - 1]**2 / sigma[i]**2
    B = alpha[i - 1] - gain * alpha[i]
    second = sigma[2]**2 - (alpha[2] / alpha[1])**2 * sigma[1]**2
    small = torch.where(q > 0, q, second * sigma[1]**2 / sigma[2]**2)
    u, q, B, beta, small = (out + 1) / 2, *(c[:, None] for c in (q, B, beta, small))
    return {"small": small, "large": beta, "direct": 1 + out, "log": out.exp(), "range": beta**u * small**(1 - u),
            "best": q + B**2 * out}[name].expand_as(out)


def typed_term(name, of, i, x, x_hat, z, out):
    """KL of the two Gaussians of a step, for the decoding one -log N(x; x_hat, v): (B, 2), nats a dimension."""
    v = typed_variance(name, of, i, out)
    (mean, q, _), (mean_hat, _, _) = posterior(of, i, x, z), posterior(of, i, x_hat, z)
    normal = distributions.Normal
    kl = distributions.kl_divergence(normal(mean, q.clamp(min=1e-30).sqrt()), normal(mean_hat, v.sqrt()))
    return torch.where(q > 0, kl, -normal(x_hat, v.sqrt()).log_prob(x))


D = 0.01               # stabiliser of the score


def typed_target(target, of, i, x, z):
    """y of an x, or y_hat of an x_hat, with eps or eps_hat from z."""
    c = CHAINS[of]
    alpha, sigma = c.schedule.alpha(c.times[i])[:, None], c.schedule.sigma(c.times[i])[:, None]
    eps = (z - alpha * x) / sigma
    mean, _, _ = posterior(of, i, x, z)
    return {"x": x, "eps": eps, "v": alpha * eps - sigma * x, "s": -sigma * eps / (sigma**2 + D), "u": eps - x,
            "F": (sigma * x - alpha * eps) / (alpha**2 + sigma**2).sqrt(), "mu": mean, "mu_skip": mean - z}[target]


OUT = lambda z: 0.4 * torch.sin(3 * z[:, :2])
X_HAT = lambda z: torch.tanh(z) + 0.05
DATA = DATASETS["clusters"]


def case(of):
    """Steps 1..5 twice, points, noise and z."""
    i, c = torch.arange(1, 6).repeat(2), CHAINS[of]
    x, eps = torch.randn(2, 10, 2, generator=seed(0), dtype=F64)
    alpha, sigma = c.schedule.alpha(c.times[i])[:, None], c.schedule.sigma(c.times[i])[:, None]
    return i, x, eps, alpha * x + sigma * eps


def given(name, of, i, z):
    c = CHAINS[of]
    return DATA.covariance(z, c.schedule.alpha(c.times[i]), c.schedule.sigma(c.times[i])) if name == "best" else OUT(z)


@every_chain
@every_variance
def test_a_term_is_the_kl_of_two_gaussians_whatever_is_predicted(of, name):
    i, x, eps, z = case(of)
    expected = typed_term(name, of, i, x, X_HAT(z), z, given(name, of, i, z)).sum(1)
    for target in TARGETS:
        def model(z, t, target=target):
            assert torch.equal(t, CHAINS[of].times[i])
            y_hat = typed_target(target, of, i, X_HAT(z), z)
            return torch.cat([y_hat, OUT(z)], 1) if name in variance.LEARNED else y_hat
        found = variance.term(model, x, i, eps, chain=CHAINS[of], target=target, variance=name, data=DATA,
                              stabiliser=D)
        assert_close(found, expected, rtol=1e-6, atol=1e-9)


@every_chain
@every_variance
@pytest.mark.parametrize("target", ["eps", "s", "mu"])
def test_the_losses_are_sums_over_steps_written_by_hand(of, name, target):
    """vlb: T times the term, a mean over dimensions, times the importance; hybrid: vlb_weight of that beside mse."""
    i, x, eps, z = case(of)
    c, w, importance = CHAINS[of], torch.rand(10, generator=seed(3), dtype=F64), torch.rand(10, generator=seed(4),
                                                                                             dtype=F64)
    y, y_hat = typed_target(target, of, i, x, z), typed_target(target, of, i, X_HAT(z), z)
    prediction = torch.cat([y_hat, OUT(z)], 1) if name in variance.LEARNED else y_hat
    term = typed_term(name, of, i, x, X_HAT(z), z, given(name, of, i, z)).mean(1)
    regression = w * (y_hat - y).square().mean(1)
    for loss, how, share in (("vlb", {}, 5.0), ("hybrid", {}, 5e-3), ("hybrid", {"vlb_weight": 0.3}, 1.5),
                             ("vlb", {"vlb_weight": 0.3}, 5.0), ("mse", {}, 0.0)):
        columns = variance.columns(c.times[i], c, target, loss, D, importance, **how)
        columns = torch.cat([columns, given(name, of, i, z)], 1) if name == "best" else columns
        found = variance.loss(prediction, y, w, columns, name)
        assert_close(found, regression + share * importance * term, rtol=1e-6, atol=1e-9)
    assert_close(variance.columns(c.times[i], c, target, "vlb", D)[:, 7], torch.full((10,), 5.0, dtype=F64))


@pytest.mark.parametrize("name", variance.LEARNED)
def test_hybrid_teaches_the_mean_as_mse_alone_and_the_variance_by_the_bound(name):
    """Foundations 6.1: the mean is detached in the bound."""
    of, target = "decodes", "eps"
    i, x, eps, z = case(of)
    c, w = CHAINS[of], torch.ones(10, dtype=F64)
    y_hat = typed_target(target, of, i, X_HAT(z), z)

    def gradients(loss, **how):
        prediction = torch.cat([y_hat, OUT(z)], 1).requires_grad_()
        columns = variance.columns(c.times[i], c, target, loss, **how)
        weights = w * (loss != "vlb")
        return torch.autograd.grad(variance.loss(prediction, eps, weights, columns, name).mean(), prediction)[0]
    hybrid, mse, vlb = gradients("hybrid", vlb_weight=0.02), gradients("mse"), gradients("vlb")
    assert torch.equal(hybrid[:, :2], mse[:, :2]) and not mse[:, 2:].any()
    typed = [X_HAT(z).requires_grad_(), OUT(z).requires_grad_()]
    of_x_hat, of_out = torch.autograd.grad(
        5 * typed_term(name, of, i, x, typed[0], z, typed[1]).mean(1).mean(), typed)
    assert_close(vlb[:, 2:], of_out, rtol=1e-6, atol=1e-12)
    assert_close(hybrid[:, 2:], 0.02 * of_out, rtol=1e-6, atol=1e-12)
    sigma_over_alpha = (c.schedule.sigma(c.times[i]) / c.schedule.alpha(c.times[i]))[:, None]
    assert_close(vlb[:, :2], -sigma_over_alpha * of_x_hat, rtol=1e-6, atol=1e-12)     # (z - sigma eps_hat) / alpha
    assert (vlb[:, :2] != 0).all() and (vlb[:, 2:] != 0).all()


def test_the_first_term_of_images_is_the_probability_of_their_levels():
    c, x = CHAINS["decodes"], (2 * torch.randint(256, (4, 1, 2, 3), generator=seed(0)).double() / 255 - 1)
    x[0, 0, 0, :2] = tensor(-1, 1)                                                   # their bins have one side
    i, eps = torch.tensor([1, 2, 1, 4]), torch.randn(4, 1, 2, 3, generator=seed(1), dtype=F64)
    t = c.times[i]
    y_hat, out = 0.9 * eps, 0.2 * eps - 3
    columns = variance.columns(t, c, "eps", "vlb")
    found = variance.loss(torch.cat([y_hat, out], 1), eps, torch.zeros(4, dtype=F64), columns, "log", x,
                          decoders.discretised)
    z = ddpm.q_sample(x, t, eps, c.schedule)
    alpha, sigma = (ddpm.expand(f(t), x) for f in (c.schedule.alpha, c.schedule.sigma))
    x_hat = (z - sigma * y_hat) / alpha
    normal = stats.norm(x_hat.numpy(), torch.exp(out / 2).numpy())
    p = (normal.cdf(torch.where(x > 0.999, math.inf, x + 1 / 255).numpy())
         - normal.cdf(torch.where(x < -0.999, -math.inf, x - 1 / 255).numpy()))
    first = -5 * torch.from_numpy(p).log().flatten(1).mean(1)
    flat = lambda c: c.flatten(1)
    kl = 5 * typed_term("log", "decodes", i, *(flat(c) for c in (x, x_hat, z, out))).mean(1)
    assert_close(found, torch.where(i == 1, first, kl), rtol=1e-6, atol=0)
    model = lambda z, t: torch.cat([y_hat, out], 1)
    sums = variance.term(model, x, i, eps, chain=c, target="eps", variance="log", decoder=decoders.discretised)
    assert_close(sums, found * 6 / 5, rtol=1e-9, atol=0)


# The whole bound

C = 0.6                # standard deviation of Gaussian data


def signs(monkeypatch):
    """Noise of +1 and -1 in turn: with x = +-c every average of a quadratic is exact."""
    sign = itertools.cycle([1.0, -1.0])
    monkeypatch.setattr(torch, "randn", lambda shape, **like: torch.full(shape, next(sign), dtype=like["dtype"]))


def gaussian_model(schedule):
    """The exact denoiser of N(0, C^2), as v."""
    def model(z, t):
        alpha, sigma = schedule.alpha(t)[:, None], schedule.sigma(t)[:, None]
        var = alpha**2 * C**2 + sigma**2
        return (alpha * sigma * (1 - C**2)) / var * z
    return model


GAUSSIAN = GaussianMixture(torch.zeros(1, 2, dtype=F64), tensor(C, C))
X = tensor([C, -C], [-C, -C])


@pytest.mark.parametrize("schedule, t_min", [("ddpm", None), ("iddpm", 0.0), ("cosine", None), ("cosine", 0.02),
                                             ("cosine", 0.0), ("ve", None)])
@pytest.mark.parametrize("T", [1, 2, 10])
@pytest.mark.parametrize("name", ["small", "large", "best"])
def test_the_bound_of_gaussian_data_is_known_for_every_T(schedule, t_min, T, name, monkeypatch):
    """Each term in closed form; the sum with `best`, with which each step is that of the true reverse process, is the
    entropy plus the KL of z_1 from the prior and what is lost between x and z_0."""
    of = SCHEDULES[schedule]
    low = {"ddpm": 0.0, "ve": 0.0}.get(schedule, 1e-3) if t_min is None else t_min
    grid = low + (1 - 2 * low) * torch.arange(T + 1, dtype=F64) / T
    alpha, sigma = of.alpha(grid), of.sigma(grid)
    marginal = alpha**2 * C**2 + sigma**2
    mmse = C**2 * sigma**2 / marginal
    beta = sigma[1:]**2 - (alpha[1:] / alpha[:-1])**2 * sigma[:-1]**2
    q, B = beta * sigma[:-1]**2 / sigma[1:]**2, alpha[:-1] * beta / sigma[1:]**2
    decodes = sigma[0] == 0
    small = q.clone()
    if decodes:
        small[0] = q[1] if T > 1 else beta[0]
    v = {"small": small, "large": beta, "best": q + B**2 * mmse[1:]}[name]
    kl = 0.5 * (torch.log(v / q) - 1 + (q + B**2 * mmse[1:]) / v)
    nll = 0.5 * torch.log(2 * math.pi * v[0]) + 0.5 * mmse[1] / v[0] if decodes \
        else 0.5 * (1 + torch.log(2 * math.pi * sigma[0]**2 / alpha[0]**2))
    r = (alpha[-1]**2 + sigma[-1]**2).sqrt()
    prior = distributions.kl_divergence(distributions.Normal(alpha[-1] * X, sigma[-1]), distributions.Normal(0, r))
    signs(monkeypatch)
    found = variance.vlb(gaussian_model(of), X, target="v", variance=name, schedule=of, steps=T, t_min=t_min,
                         data=GAUSSIAN, draws=2)
    assert set(found) == {"prior", "reconstruction", "diffusion", "error"}
    assert_close(found["prior"], prior.sum(1), rtol=1e-6, atol=1e-12)
    assert_close(found["reconstruction"].mean(), 2 * nll, rtol=1e-6, atol=1e-12)
    assert_close(found["diffusion"].mean(), 2 * kl[decodes.long():].sum(), rtol=1e-6, atol=1e-9)
    if name == "best":
        end = distributions.kl_divergence(distributions.Normal(0, marginal[-1].sqrt()), distributions.Normal(0, r))
        start = 0.5 * torch.log(2 * math.pi * math.e * marginal[0]) - alpha[0].log()
        total = sum(found[key].mean() for key in ("prior", "reconstruction", "diffusion"))
        assert_close(total, 2 * (start + end), rtol=1e-6, atol=1e-9)


@every_variance
@every_chain
def test_the_bound_is_the_sum_of_all_terms_and_its_error_that_of_the_draws(of, name):
    """Noise in the order it is drawn in: for every step all draws."""
    c, x = CHAINS[of], torch.randn(3, 2, generator=seed(5), dtype=F64)

    def model(z, t):
        y_hat = torch.tanh(z) * t[:, None]
        return torch.cat([y_hat, OUT(z)], 1) if name in variance.LEARNED else y_hat
    how = dict(target="eps", variance=name, data=DATA)
    g, total = seed(6), torch.zeros(2, 3, 3, dtype=F64)
    noise = lambda: torch.randn(3, 2, generator=g, dtype=F64)
    for i in range(1, 6):
        for k in range(3):
            first = int(i > 1 or of == "ends before")
            total[first, k] += variance.term(model, x, torch.full((3,), i), noise(), chain=c, **how)
    if of == "ends before":
        alpha, sigma = alpha_sigma("cosine", tensor(0.01))
        total[0] = -distributions.Normal(x, sigma / alpha).log_prob(x + sigma / alpha).sum(1)
    found = variance.vlb(model, x, schedule=c.schedule, steps=5, t_min=c.times[0].item(), draws=3, generator=seed(6),
                         **how)
    assert_close(found["reconstruction"], total[0].mean(0), rtol=1e-6, atol=0)
    assert_close(found["diffusion"], total[1].mean(0), rtol=1e-9, atol=0)
    assert_close(found["error"], total.sum(0).std(0) / 3**0.5, rtol=1e-6, atol=0)
    one = variance.vlb(model, x, schedule=c.schedule, steps=2, t_min=c.times[0].item(), generator=seed(6), **how)
    assert one["error"].tolist() == [0, 0, 0]


def test_the_bound_of_images_of_a_decoding_chain_and_of_one_that_ends_before():
    """The level's probability at i = 1, or at z_0; the rest are KLs."""
    x, g = 2 * torch.randint(256, (2, 1, 2, 2), generator=seed(0)).double() / 255 - 1, seed(1)
    model, how = (lambda z, t: 0.5 * z), dict(target="eps", variance="large", steps=1, decoder=decoders.discretised)
    eps = torch.randn(x.shape, generator=g, dtype=F64)
    of, t = SCHEDULES["ddpm"], torch.ones(2, dtype=F64)
    z, (alpha, sigma) = ddpm.q_sample(x, t, eps, of), (of.alpha(t[:1]), of.sigma(t[:1]))
    expected = -decoders.log_prob_level(x, (z - 0.5 * sigma * z) / alpha, sigma).flatten(1).sum(1)   # beta = sigma^2
    found = variance.vlb(model, x, schedule=of, generator=seed(1), **how)
    assert_close(found["reconstruction"], expected, rtol=1e-6, atol=0)
    assert found["diffusion"].tolist() == [0, 0]
    later = torch.randn(x.shape, generator=g, dtype=F64)
    std = (-SCHEDULES["cosine"].logsnr(tensor(0.05)) / 2).exp()
    found = variance.vlb(model, x, schedule=SCHEDULES["cosine"], t_min=0.05, generator=seed(1), **how)
    expected = -decoders.log_prob_level(x, x + std * later, std).flatten(1).sum(1)
    assert_close(found["reconstruction"], expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", ["small", "large", "best"])
def test_all_terms_of_a_chain_are_those_that_the_bound_of_steps_draws_one_of(name, monkeypatch):
    """One row for each step: i is stratified, so that the mean over the rows is the sum over i."""
    T, x = 16, tensor([0.7, -0.4])
    how = dict(target="eps", schedule=SCHEDULES["cosine"], steps=T, t_min=0.02, data=DATA, variance=name)
    model = lambda z, t: torch.tanh(z) * t[:, None]
    monkeypatch.setattr(torch, "randn", lambda shape, **like: torch.full(shape, 0.8, dtype=like["dtype"]))
    every = variance.vlb(model, x, **how)
    drawn = likelihood.bound(model, x.expand(T, 2), draws=2, generator=seed(0), **how)
    assert_close(drawn["diffusion"].mean(), every["diffusion"][0], rtol=1e-9, atol=0)
    assert_close(drawn["reconstruction"][:1], every["reconstruction"], rtol=1e-9, atol=0)
    assert_close(drawn["prior"][:1], every["prior"], rtol=1e-12, atol=0)


def test_best_is_between_the_entropy_and_the_fixed_variances():
    """Of the exact denoiser, computed once by another hand: 3202.7, 0.432 and 0.040 nats, to 0.02 for the last two."""
    x = DATA.sample(4000, seed(0), F64)
    model, entropy = DATA.optimal_model("v", SCHEDULES["cosine"]), -DATA.log_prob(x)
    for name, known, rough in ("small", 3202.7, 20), ("large", 0.432, 0.02), ("best", 0.040, 0.02):
        parts = variance.vlb(model, x, target="v", variance=name, schedule=SCHEDULES["cosine"], steps=16, data=DATA,
                             generator=seed(1))
        gap = parts["prior"] + parts["reconstruction"] + parts["diffusion"] - entropy
        assert abs(gap.mean() - known) < 3.5 * gap.std() / 4000**0.5 + rough


def test_no_gradient_of_images_is_lost_in_float32():
    """Of any step, for means that are far off and variances from e^-20 to e^8: what is not chosen has none either."""
    c, x = CHAINS["decodes"], torch.tensor([-1.0, -0.2, 2 / 255 - 1, 1.0])[:, None, None].expand(4, 1, 5).contiguous()
    for i in 1, 3:
        for log_v in -20.0, -5.0, 0.0, 8.0:
            prediction = torch.cat([torch.tensor([-3.0, -0.5, 0.0, 0.7, 3.0]).expand(4, 1, 5),
                                    torch.full((4, 1, 5), log_v)], 1).requires_grad_()
            columns = variance.columns(c.times[[i]].float().expand(4), c, "x", "vlb")
            value = variance.loss(prediction, x, torch.zeros(4), columns, "log", x, decoders.discretised)
            slope, = torch.autograd.grad(value.sum(), prediction)
            assert value.isfinite().all() and slope.isfinite().all()


@every_variance
@every_chain
def test_bound_and_loss_are_computed_where_the_data_are(of, name):
    """On another device than the CPU; meta has no values and refuses to be mixed with it."""
    c, x, width = CHAINS[of], torch.zeros(5, 2, device="meta"), 2 if name in variance.LEARNED else 1
    parts = variance.vlb(lambda z, t: (z * t[:, None]).repeat(1, width), x, target="mu", variance=name, data=DATA,
                         schedule=c.schedule, steps=3, t_min=c.times[0].item())
    t = torch.zeros(5, device="meta")
    columns = variance.columns(t, c, "eps", "hybrid")
    columns = torch.cat([columns, DATA.covariance(x, t, t)], 1) if name == "best" else columns
    parts["loss"] = variance.loss(x.repeat(1, width), x, t, columns, name)
    assert {(value.device.type, tuple(value.shape)) for value in parts.values()} == {("meta", (5,))}


# A network of a chain

@every_chain
def test_a_network_of_the_mean_is_one_of_x(of):
    """mu = A z + B x_hat of the chain's step, and mu - z; other targets pass; each block has its own."""
    i, x, eps, z = case(of)
    t, x_hat = CHAINS[of].times[i], X_HAT(z)
    y = {name: typed_target(name, of, i, x_hat, z) for name in ("mu", "eps", "mu_skip")}
    network = lambda z, t: torch.cat(list(y.values()))
    stacked = variance.Mean(network, list(y), CHAINS[of])(z.repeat(3, 1), t.repeat(3))
    assert_close(stacked, torch.cat([x_hat, y["eps"], x_hat]), rtol=1e-6, atol=1e-6)
    assert [variance.predicted(name) for name in y] == ["x", "eps", "x"]
    pair = lambda z, t: torch.cat([y["mu"], OUT(z)], 1)
    assert_close(variance.Mean(pair, ["mu"], CHAINS[of], out=True)(z, t), torch.cat([x_hat, OUT(z)], 1), rtol=1e-6,
                 atol=1e-6)
    alone = variance.Mean(pair, ["mu"], CHAINS[of])(z, t)
    assert alone.shape == x.shape
    assert_close(alone, x_hat, rtol=1e-6, atol=1e-6)
    assert torch.equal(variance.Mean(lambda z, t: y["eps"], ["eps"], CHAINS[of], out=True)(z, t), y["eps"])


def test_a_network_of_the_mean_is_finite_at_every_time_at_which_it_may_be_asked():
    """Also before t_1, to where other grids and the flow go: x_hat there is that of the step from t_1."""
    c, z = CHAINS["ends before"], torch.tensor([[0.3, -0.7]]).expand(3, 2)
    t = torch.tensor([0.01, 0.05, 0.206])
    assert t[2].item() == pytest.approx(c.times[1].item())
    A, B = (f.item() for f in c.step(torch.tensor(1), torch.zeros((), dtype=F64))[:2])
    model = variance.Mean(lambda z, t: A * z + B * torch.tanh(z), ["mu"], c)
    assert_close(model(z, t), torch.tanh(z), rtol=1e-4, atol=1e-5)


# Which one a run's steps have

OWN = {"variance": "log", "timesteps": 100, "data": "clusters"}


def test_the_variance_of_a_run():
    assert variance.chosen({"data": "clusters"}, None) == "small"
    assert variance.chosen(OWN, None) == variance.chosen(OWN, None, steps=100) == variance.chosen(OWN, "log") == "log"
    assert variance.chosen(OWN, "large", steps=7, grid="logsnr") == "large"
    assert variance.chosen(OWN | {"variance": "range"}, None, steps=7, grid="rescaled") == "range"
    assert variance.chosen(OWN, "best", steps=7) == "best"
    for config in OWN | {"variance": "small"}, {"data": "clusters"}:
        assert variance.chosen(config, None, "ddim") is None
    assert variance.chosen(OWN, "none", "euler") is None


@pytest.mark.parametrize("config, how, message", [
    (OWN, dict(variance=None, sampler="sde"),
     "its variance log is learned, which sampler sde does not use - take --sampler ancestral, or say --variance none"),
    (OWN, dict(variance="range"), "it has not learned a variance range, but has log - take small or large"),
    ({"data": "clusters"}, dict(variance="direct"),
     "it has not learned a variance direct, but has small - take small or large"),
    (OWN, dict(variance=None, steps=50),
     "its variance log is that of its own 100 steps alone - take --steps 100 and no --grid or --t-min, "
     "or --variance small or large"),
    (OWN | {"variance": "direct"}, dict(variance=None, steps=100, grid="logsnr"),
     "its variance direct is that of its own 100 steps alone - take --steps 100 and no --grid or --t-min, "
     "or --variance small or large"),
    ({"points": {}}, dict(variance="best"),
     "the best variance is known for the 2D datasets alone - take small or large"),
    ({"shape": [1, 8, 8]}, dict(variance="best"),
     "the best variance is known for the 2D datasets alone - take small or large")])
def test_a_variance_that_cannot_be_is_one_sentence(config, how, message):
    with pytest.raises(ValueError) as error:
        variance.chosen(config, **how)
    assert str(error.value) == message
