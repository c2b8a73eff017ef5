"""Energies against quadratic ones, the log-density of mixtures, and autograd by hand."""
import math

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import langevin
import likelihood
import samplers
import score_matching
from datasets2d import DATASETS
from ddpm import SCHEDULES
from energy import Energy

F64 = torch.float64
CLUSTERS = DATASETS["clusters"]
SCHEDULE = SCHEDULES["cosine"]


def normal(*shape, n=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(n), dtype=F64)


class Smooth(nn.Module):
    """A small network of z (B, 2) and t (B,)."""

    def __init__(self, out):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(3, 16), nn.SiLU(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, out))
        self.double()

    def forward(self, z, t):
        return self.layers(torch.cat([z, t[:, None]], 1))


def quadratic(c, schedule):
    """The energy of z for data N(0, c^2), as a network: |z|^2 / (2 (alpha^2 c^2 + sigma^2)) + a number of t."""
    def network(z, t):
        var = schedule.alpha(t)**2 * c**2 + schedule.sigma(t)**2
        return (z.flatten(1).square().sum(1) / (2 * var) + torch.sin(9 * t))[:, None]
    return network


@pytest.mark.parametrize("shape", [(2,), (3, 1, 2)])
@pytest.mark.parametrize("name", ["cosine", "ve"])
def test_of_gaussian_data_predictions_are_the_score_and_the_noise(name, shape):
    """Near both ends of t, each row at its own."""
    c, schedule, t = 0.6, SCHEDULES[name], torch.tensor([1e-3, 0.02, 0.5, 0.98, 0.999], dtype=F64)
    z = normal(5, *shape)
    sigma = torch.exp(-0.5 * schedule.logsnr(t))                               # sigma / alpha
    if name == "cosine":
        alpha, sigma = torch.cos(math.pi / 2 * t), torch.sin(math.pi / 2 * t)
    else:
        alpha = torch.ones_like(t)
    column = lambda c: c.reshape(-1, *[1] * len(shape))
    score = -z / column(alpha**2 * c**2 + sigma**2)
    network = quadratic(c, schedule)
    assert_close(Energy(network)(z, t), score, rtol=1e-6, atol=0)
    assert_close(Energy(network, "s")(z, t), score, rtol=1e-6, atol=0)
    assert_close(Energy(network, "eps", schedule)(z, t), -column(sigma) * score, rtol=1e-6, atol=0)
    assert_close(Energy(network).energy(z, t), network(z, t)[:, 0])


def test_of_a_mixture_they_are_those_of_its_denoiser_and_samplers_and_likelihood_take_them():
    """The network is -log p of the noisy clusters: so the ODE's density must be that of `log_prob`."""
    network = lambda z, t: -CLUSTERS.log_prob(z, SCHEDULE.alpha(t), SCHEDULE.sigma(t))[:, None]
    z, t = normal(20, 2), torch.linspace(0.01, 0.99, 20, dtype=F64)
    for target in "s", "eps":
        model = Energy(network, target, SCHEDULE)
        assert_close(model(z, t), CLUSTERS.optimal_model(target, SCHEDULE)(z, t))
        with torch.no_grad():
            assert_close(model(z, t), CLUSTERS.optimal_model(target, SCHEDULE)(z, t))
        draw = lambda model: samplers.sample(model, (8, 2), 6, target=target, schedule=SCHEDULE,   # noqa: B023
                                             generator=torch.Generator().manual_seed(0), dtype=F64)
        assert_close(draw(model), draw(CLUSTERS.optimal_model(target, SCHEDULE)))
        x = CLUSTERS.sample(6, torch.Generator().manual_seed(1), F64)
        log_p, _ = likelihood.log_likelihood(model, x, target=target, schedule=SCHEDULE, steps=32)
        assert_close(log_p, CLUSTERS.log_prob(x), rtol=0, atol=0.02)


def test_the_energy_is_the_sum_of_what_the_network_gives():
    z, t = normal(4, 1, 3, 3), torch.rand(4, dtype=F64)
    model = Energy(lambda z, t: z**3)
    assert_close(model.energy(z, t), z.pow(3).sum((1, 2, 3)))
    assert_close(model(z, t), -3 * z**2)


@pytest.mark.parametrize("target", ["s", "eps"])
def test_gradients_reach_the_network_and_are_autograds(target):
    network, z, t = Smooth(1), normal(6, 2), torch.linspace(0.1, 0.9, 6, dtype=F64)
    y, weights = normal(6, 2, n=1), list(network.parameters())
    by_hand = z.clone().requires_grad_()
    grad, = torch.autograd.grad(network(by_hand, t).sum(), by_hand, create_graph=True)
    factor = -torch.ones_like(t) if target == "s" else torch.sin(math.pi / 2 * t)
    prediction = factor[:, None] * grad
    model = Energy(network, target, SCHEDULE)
    assert_close(model(z, t), prediction)
    expected = torch.autograd.grad((prediction - y).square().mean(), weights, allow_unused=True, materialize_grads=True)
    got = torch.autograd.grad((model(z, t) - y).square().mean(), weights, allow_unused=True, materialize_grads=True)
    assert_close(got, expected)
    assert max(g.abs().max() for g in got) > 1e-3
    with torch.no_grad():
        assert_close(model(z, t), prediction)
        assert not model(z, t).requires_grad
    assert {name.split(".")[0] for name in model.state_dict()} == {"network"}


def test_its_field_has_no_curl_where_that_of_a_free_network_has():
    """d s_2 / dz_1 - d s_1 / dz_2, by forward derivatives."""
    z, t = normal(50, 2), torch.rand(50, dtype=F64)

    def curl(model):
        d1, d2 = (torch.func.jvp(lambda z: model(z, t), (z,), (e.expand_as(z),))[1] for e in torch.eye(2, dtype=F64))
        return (d1[:, 1] - d2[:, 0]).abs().max().item()
    assert curl(Energy(Smooth(1))) < 1e-12
    assert curl(Energy(Smooth(1), "eps", SCHEDULE)) < 1e-12
    assert curl(Smooth(2)) > 1e-2


def test_derivatives_of_its_field_are_second_derivatives_of_the_energy():
    """By torch.func's vmap and jacrev, by likelihood's backward passes, and in exact score matching."""
    network, z, t = Smooth(1), normal(7, 2), torch.rand(7, dtype=F64)
    model = Energy(network)
    hessian = torch.stack([torch.autograd.functional.hessian(lambda z: network(z[None], t[None]).sum(), row)  # noqa: B023
                           for row, t in zip(z, t)])
    one = lambda z, t: model(z[None], t[None])[0]
    assert_close(torch.func.vmap(torch.func.jacrev(one))(z, t), -hessian)
    exact = score_matching.exact(lambda z: model(z, t), z)
    assert_close(exact, 0.5 * model(z, t).square().sum(1) - hessian.diagonal(dim1=1, dim2=2).sum(1))
    weights = list(network.parameters())
    expected = torch.autograd.grad(exact.mean(), weights, allow_unused=True, materialize_grads=True)
    assert all(g.isfinite().all() for g in expected) and max(g.abs().max() for g in expected) > 1e-3
    leaf = z.clone().requires_grad_()
    backward = torch.stack([torch.autograd.grad(model(leaf, t)[:, i].sum(), leaf)[0] for i in (0, 1)], 1)
    assert_close(backward, -hessian)


def test_its_log_density_serves_the_metropolis_correction():
    """Of N(0, c^2) with noise, at a step so large that without it the variance would be 1.67 times."""
    c, t = 0.6, torch.full((50_000,), 0.3, dtype=F64)
    var = (SCHEDULE.alpha(t)**2 * c**2 + SCHEDULE.sigma(t)**2)[0].item()
    model = Energy(quadratic(c, SCHEDULE))
    x = langevin.langevin(lambda z: model(z, t), normal(50_000, 1), 0.8 * var, 20,
                          torch.Generator().manual_seed(0), lambda z: -model.energy(z, t))
    assert_close(x.var().item(), var, rtol=0.03, atol=0)


def test_other_targets_are_refused_and_eps_without_a_schedule():
    for target in "x", "v":
        with pytest.raises(ValueError, match=f"predicts s or eps, .* not {target} - take --target s or eps"):
            Energy(Smooth(1), target, SCHEDULE)
    with pytest.raises(ValueError, match="needs the schedule"):
        Energy(Smooth(1), "eps")
