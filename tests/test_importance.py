"""The likelihood of a chain against its closed form for Gaussian data, quadrature, and brute force over grey levels."""
import math
from types import SimpleNamespace

import pytest
import torch
from torch import distributions
from torch.testing import assert_close

import decoders
import importance
import variance
from datasets2d import DATASETS, GaussianMixture
from ddpm import SCHEDULES

F64 = torch.float64
CHAINS = ("iddpm", 0.0), ("cosine", 0.2)                        # z_0 = x, and p(x | z_0) after it


def seed(n):
    return torch.Generator().manual_seed(n)


def normal(mean, var):
    return distributions.Normal(mean, torch.as_tensor(var, dtype=F64).sqrt())


def numbers(name, t_min, T):
    """alpha and sigma of t_0 ... t_T."""
    t = t_min + (1 - 2 * t_min) * torch.arange(T + 1, dtype=F64) / T
    return SCHEDULES[name].alpha(t), SCHEDULES[name].sigma(t)


def posterior(alpha, sigma, i):
    """A, B, variance of q(z_{i-1} | z_i, x), by conditioning the Gaussian of z_{i-1}, z_i; and beta_i."""
    ratio = alpha[i] / alpha[i - 1]
    covariance = ratio * sigma[i - 1]**2
    A = covariance / sigma[i]**2
    return A, alpha[i - 1] - A * alpha[i], sigma[i - 1]**2 - A * covariance, sigma[i]**2 - ratio**2 * sigma[i - 1]**2


def fixed(name, alpha, sigma, i, covariance=0.0):
    """Variance of step i; small: that of step 2 for the step to x, where it is 0, and beta if it is the only one."""
    _, B, q, beta = posterior(alpha, sigma, i)
    if name == "small" and q == 0:
        return posterior(alpha, sigma, 2)[2] if len(alpha) > 2 else beta
    return {"small": q, "large": beta, "best": q + B**2 * covariance}[name]


@pytest.mark.parametrize("name, t_min, T, target, kind", [
    ("iddpm", 0.0, 3, "eps", "range"), ("ddpm", 0.0, 2, "mu", "log"), ("cosine", 0.05, 3, "v", "large"),
    ("ve", 0.1, 2, "x", "range"), ("iddpm", 0.0, 4, "x", "small")])
def test_a_weight_is_the_density_of_its_chain_over_that_of_its_draw(name, t_min, T, target, kind):
    """Of the z that the model sees, in order, with every density written out."""
    x, seen, ends = torch.tensor([[0.4, -1.1], [0.9, 0.2]], dtype=F64), [], []
    alpha, sigma = numbers(name, t_min, T)

    def network(z, t):
        seen.append(z)
        y = torch.sin(z) + t[:, None]
        return torch.cat([y, 0.3 * torch.cos(3 * z) - 0.5], 1) if kind in ("range", "log") else y

    def decoder(x, mean, log_var):
        ends.append((mean, log_var.exp().expand(mean.shape)))
        return decoders.gaussian(x, mean, log_var)
    found = importance.log_weights(network, x, target=target, variance=kind, schedule=SCHEDULES[name], steps=T,
                                   t_min=t_min, decoder=decoder, chains=3, generator=seed(0))
    assert found.shape == (3, 2) and found.dtype == F64
    (end, end_var), x, z = ends[0], x.repeat(3, 1), list(seen)
    if t_min:
        z.append(alpha[0] * end)
    expected = (normal(0, alpha[T]**2 + sigma[T]**2).log_prob(z[0])
                - normal(alpha[T] * x, sigma[T]**2).log_prob(z[0]))
    for step, i in enumerate(range(T, 0, -1)):
        A, B, q, beta = posterior(alpha, sigma, i)
        y, *out = network(z[step], torch.full((6,), (t_min + (1 - 2 * t_min) * i / T), dtype=F64)).split(2, 1)
        mean = y if target == "mu" else A * z[step] + B * {
            "eps": lambda: (z[step] - sigma[i] * y) / alpha[i], "x": lambda: y,              # noqa: B023
            "v": lambda: alpha[i] * z[step] - sigma[i] * y}[target]()                        # noqa: B023
        small = fixed("small", alpha, sigma, i)
        var = {"range": lambda: beta**((out[0] + 1) / 2) * small**((1 - out[0]) / 2),        # noqa: B023
               "log": lambda: out[0].exp(), "small": lambda: small, "large": lambda: beta}[kind]()   # noqa: B023
        if i == 1 and not t_min:
            assert_close(end, mean)
            assert_close(end_var, var.expand(6, 2))
            expected = expected + normal(mean, var).log_prob(x)
        else:
            expected = expected + normal(mean, var).log_prob(z[step + 1]) \
                - normal(A * z[step] + B * x, q).log_prob(z[step + 1])
    if t_min:
        expected = expected + normal(z[-1] / alpha[0], (sigma[0] / alpha[0])**2).log_prob(x)
    assert_close(found.flatten(), expected.sum(1), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name, t_min", CHAINS)
@pytest.mark.parametrize("kind", ["small", "large", "best"])
@pytest.mark.parametrize("T", [2, 3, 10])
def test_gaussian_data_have_the_likelihood_of_the_chains_own_gaussian(T, kind, name, t_min):
    """With the exact denoiser, a z, the variance of z is V <- (A + B a)^2 V + v; each axis has its own."""
    std, (alpha, sigma) = torch.tensor([0.7, 1.0], dtype=F64), numbers(name, t_min, T)
    data = GaussianMixture(torch.zeros(1, 2, dtype=F64), std)
    x = torch.tensor([[0.5, -0.3], [-0.9, 1.4]], dtype=F64)
    V = (alpha[T]**2 + sigma[T]**2) * torch.ones(2, dtype=F64)
    for i in range(T, 0, -1):
        A, B, _, _ = posterior(alpha, sigma, i)
        precision = alpha[i]**2 / sigma[i]**2 + 1 / std**2
        a = alpha[i] / sigma[i]**2 / precision
        V = (A + B * a)**2 * V + fixed(kind, alpha, sigma, i, 1 / precision)
    V = (V + sigma[0]**2) / alpha[0]**2                                    # of x around z_0 / alpha; 0 if z_0 = x
    exact = normal(0, V).log_prob(x).sum(1)
    log_w = importance.log_weights(
        data.optimal_model("eps", SCHEDULES[name]), x, target="eps", variance=kind, schedule=SCHEDULES[name], steps=T,
        t_min=t_min, data=data, chains=4000, generator=seed(1))
    found, error = importance.log_likelihood(log_w), importance.standard_error(log_w)
    assert (error < 0.12).all() and ((found - exact).abs() < 4 * error + 1e-3).all()
    if kind == "best" and not t_min:                                       # the very reverse of q but for its start
        assert (importance.effective_size(log_w) > 3990).all() and (log_w - exact).abs().max() < 0.02


@pytest.mark.parametrize("name, t_min", CHAINS)
@pytest.mark.parametrize("T", [1, 2])
@pytest.mark.parametrize("kind", ["small", "large"])
def test_a_chain_that_is_not_gaussian_by_quadrature(kind, T, name, t_min):
    """The density of z on a grid, step by step, with x_hat = tanh(2 z)."""
    grid, (alpha, sigma) = torch.linspace(-7, 7, 701, dtype=F64)[:, None], numbers(name, t_min, T)
    x, cell = torch.tensor([[-1.3], [0.2], [0.9]], dtype=F64), 0.02
    p = normal(0, alpha[T]**2 + sigma[T]**2).log_prob(grid).exp()
    for i in range(T, 0, -1):
        A, B, _, _ = posterior(alpha, sigma, i)
        to = x if i == 1 and not t_min else grid
        p = normal(A * grid + B * torch.tanh(2 * grid), fixed(kind, alpha, sigma, i)).log_prob(to.T).exp().T @ p * cell
    if t_min:
        p = normal(grid / alpha[0], (sigma[0] / alpha[0])**2).log_prob(x.T).exp().T @ p * cell
    log_w = importance.log_weights(lambda z, t: torch.tanh(2 * z), x, target="x", variance=kind, steps=T, t_min=t_min,
                                   schedule=SCHEDULES[name], chains=8000, generator=seed(2))
    error = importance.standard_error(log_w)
    assert (error < 0.1).all() and ((importance.log_likelihood(log_w) - p[:, 0].log()).abs() < 4 * error).all()


@pytest.mark.parametrize("name, t_min", CHAINS)
@pytest.mark.parametrize("kind", ["large", "range"])
def test_the_mean_of_log_w_is_minus_the_bound(name, t_min, kind):
    """Of a wrong model; and -log of the mean of K falls with K, down to that of all."""
    x = DATASETS["clusters"].sample(400, seed(0), F64)
    network = lambda z, t: torch.cat([0.8 * torch.sin(z)] + [torch.cos(z)] * (kind == "range"), 1)
    how = dict(target="x", variance=kind, schedule=SCHEDULES[name], steps=5, t_min=t_min)
    log_w = importance.log_weights(network, x, chains=64, generator=seed(1), **how)
    terms = variance.vlb(network, x, draws=32, generator=seed(2), **how)
    gap = -log_w.mean(0) - terms["prior"] - terms["reconstruction"] - terms["diffusion"]
    assert abs(gap.mean()) < 3.5 * gap.std() / 20 < 0.1
    falling = [-importance.log_likelihood(log_w.unflatten(0, (K, -1))).mean() for K in (1, 2, 4, 8, 16, 32, 64)]
    assert_close(falling[0], -log_w.mean())
    assert_close(falling[-1], -log_w.exp().mean(0).log().mean())
    assert all(a > b for a, b in zip(falling, falling[1:])) and falling[0] - falling[-1] > 0.1


@pytest.mark.parametrize("name, t_min", CHAINS)
@pytest.mark.parametrize("T", [1, 2])
def test_the_probabilities_of_the_256_levels_of_a_pixel_sum_to_1(T, name, t_min):
    x = torch.linspace(-1, 1, 256, dtype=F64).reshape(256, 1, 1, 1)
    log_w = importance.log_weights(lambda z, t: 0.6 * torch.tanh(z), x, target="x", variance="small", steps=T,
                                   t_min=t_min, schedule=SCHEDULES[name], decoder=decoders.discretised, chains=400,
                                   generator=seed(3))
    p = importance.log_likelihood(log_w).exp()
    error = (p * importance.standard_error(log_w)).square().sum().sqrt()
    assert abs(p.sum() - 1) < 4 * error < 0.1, (p.sum(), error)


def test_the_effective_size_and_the_likelihood_of_given_weights():
    """Far below what exp can hold; the document's own formulas of weights that it can."""
    equal = torch.full((7, 2), -5000.0, dtype=F64)
    assert_close(importance.effective_size(equal), torch.full((2,), 7.0, dtype=F64))
    assert_close(importance.log_likelihood(equal), torch.full((2,), -5000.0, dtype=F64))
    assert_close(importance.standard_error(equal), torch.zeros(2, dtype=F64), rtol=0, atol=1e-6)
    one = torch.tensor([[0.0], [-800.0], [-900.0], [-1000.0]], dtype=F64)
    assert_close(importance.effective_size(one).item(), 1.0)
    w = torch.rand(9, 3, generator=seed(0), dtype=F64)
    assert_close(importance.effective_size(w.log()), w.sum(0)**2 / w.square().sum(0))
    assert_close(importance.log_likelihood(w.log()), w.mean(0).log())
    assert_close(importance.standard_error(w.log()), w.std(0) / 3 / w.mean(0))
    assert_close(importance.terms(w.log())["chain"], -w.mean(0).log())


def test_the_error_and_the_bias_are_those_of_many_repetitions():
    """log w ~ N(-1/2, 1): the mean of w is 1."""
    log_w = torch.randn(200, 4000, generator=seed(0), dtype=F64) - 0.5
    found, error = importance.log_likelihood(log_w), importance.standard_error(log_w)
    assert abs(found.std() / error.square().mean().sqrt() - 1) < 0.06
    assert abs(found.mean() + error.square().mean() / 2) < 3.5 * found.std() / 4000**0.5


def gaussian_run(timesteps=4, variance="best", target="v", **config):
    """What `of_run` asks of a Run, of N(0, I) and its exact denoiser: with `best` and z_0 = x every w is p(x)."""
    data, schedule = GaussianMixture(torch.zeros(1, 2, dtype=F64), torch.ones(2, dtype=F64)), SCHEDULES["iddpm"]
    module = torch.nn.Module()
    module.forward = data.optimal_model(target, schedule, config.get("stabiliser", 0.0))
    return SimpleNamespace(target=target, schedule=schedule, kind=SimpleNamespace(dataset=lambda config: data),
                           model=lambda device, out: module,
                           config=dict(timesteps=timesteps, variance=variance, stabiliser=0.0, t_min=0.0) | config)


@pytest.mark.parametrize("batch", [1, 3, 10, 1000])
def test_a_run_in_pieces_has_every_example_in_its_place(batch, monkeypatch):
    """And says how much of it is done: one evaluation for each example, chain and step."""
    x, done = torch.randn(5, 2, generator=seed(0), dtype=F64), []
    monkeypatch.setattr(importance.progress, "counter", lambda what, total, unit: done.append(-total) or done.append)
    log_w = importance.of_run(gaussian_run(target="s", stabiliser=0.01), x, 7, batch=batch, generator=seed(1))
    assert_close(log_w, normal(0, 1).log_prob(x).sum(1).expand(7, 5))
    assert max(done) <= max(batch, 7) and sum(done) == 0 and done[0] == -5 * 7 * 4
    log_w = importance.of_run(gaussian_run(), x.float(), 7, batch=batch, generator=seed(1))       # sums in float64
    assert_close(log_w, normal(0, 1).log_prob(x).sum(1).expand(7, 5), rtol=0, atol=1e-5)


def test_a_run_has_its_own_steps_and_variance_or_others():
    x = torch.randn(3, 2, generator=seed(0), dtype=F64)
    of = lambda one, **how: importance.of_run(one, x, 5, generator=seed(1), **how)
    how = dict(target="v", schedule=SCHEDULES["iddpm"], chains=5)
    model = gaussian_run().model(None, True)
    for one, asked, expected in [
            (gaussian_run(4, "small"), {}, dict(steps=4, variance="small", t_min=0.0)),
            (gaussian_run(4, "small"), dict(steps=2, variance="large"), dict(steps=2, variance="large", t_min=0.0)),
            (gaussian_run(None, "small", t_min=1e-4), dict(steps=3), dict(steps=3, variance="small", t_min=1e-3)),
            (gaussian_run(None, "small"), dict(steps=3, t_min=0.1), dict(steps=3, variance="small", t_min=0.1))]:
        assert torch.equal(of(one, **asked), importance.log_weights(model, x, **how, generator=seed(1), **expected))
    images = x.reshape(3, 2, 1, 1).mul(127.5).round() / 127.5
    one = gaussian_run(4, "small", shape=[2, 1, 1])
    flat, one.model = one.model, lambda device, out: Flat(flat(device, out))
    expected = importance.log_weights(Flat(model), images, steps=4, variance="small", decoder=decoders.discretised,
                                      generator=seed(1), **how)
    assert torch.equal(importance.of_run(one, images, 5, generator=seed(1)), expected)
    with pytest.raises(ValueError, match="continuous time, .* a chain - say of how many steps, --steps 10"):
        of(gaussian_run(None, "small"))
    with pytest.raises(ValueError, match="has not learned a variance range"):
        of(gaussian_run(4, "small"), variance="range")
    broken = gaussian_run()
    broken.model = lambda device, out: Flat(lambda z, t: math.nan * z)
    with pytest.raises(ValueError, match="not finite - train it longer"):
        of(broken)


class Flat(torch.nn.Module):
    """A model of points for images of one pixel and two channels."""

    def __init__(self, model):
        super().__init__()
        self.points = model

    def forward(self, z, t):
        return self.points(z.flatten(1), t).reshape(z.shape)
