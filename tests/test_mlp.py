"""The network against nn.Sequential with the same weights."""
import pytest
import torch
from torch import nn
from torch.testing import assert_close

import ddpm
from mlp import MLP


def by_hand(model, m, z, t):
    """Network m of a stack as torch's own layers."""
    layers = []
    for weight, bias in zip(model.weights, model.biases):
        linear = nn.Linear(weight.shape[2], weight.shape[1], dtype=torch.float64)
        linear.weight.data, linear.bias.data = weight[m], bias[m, 0]
        layers += [linear, nn.ReLU()]
    return nn.Sequential(*layers[:-1])(torch.cat([z, t[:, None]], 1))


@pytest.mark.parametrize("members", [1, 3])
def test_seven_layers_with_relu_between_and_a_block_of_rows_for_each_member(members):
    model = MLP(width=16, members=members).double()
    assert [tuple(w.shape[1:]) for w in model.weights] == [(16, 3)] + 5 * [(16, 16)] + [(2, 16)]
    z, t = torch.randn(5 * members, 2, dtype=torch.float64), torch.rand(5 * members, dtype=torch.float64)
    expected = [by_hand(model, m, *c) for m, c in enumerate(zip(z.split(5), t.split(5)))]
    assert_close(model(z, t), torch.cat(expected))
    assert MLP().weights[0].shape == (1, 128, 3)


def test_silu_and_a_network_without_t():
    model = MLP(width=4, layers=3, activation="silu", time=False).double()
    z = torch.randn(5, 2, dtype=torch.float64)
    h = z
    for k, (weight, bias) in enumerate(zip(model.weights, model.biases)):
        h = h @ weight[0].T + bias[0, 0]
        h = h / (1 + torch.exp(-h)) if k < 2 else h
    assert_close(model(z, torch.rand(5, dtype=torch.float64)), h)


def test_initial_weights_are_those_of_linear_layers():
    """One after the other from the global generator, uniform in +-1 / sqrt(inputs), members not alike."""
    torch.manual_seed(5)
    model = MLP(width=16)
    torch.manual_seed(5)
    sizes = [3] + 6 * [16] + [2]
    for weight, bias, n_in, n_out in zip(model.weights, model.biases, sizes, sizes[1:]):
        linear = nn.Linear(n_in, n_out)
        assert torch.equal(weight[0], linear.weight) and torch.equal(bias[0, 0], linear.bias)
        assert 0.8 < weight.abs().max() * n_in**0.5 <= 1
    pair = MLP(width=16, members=2)
    assert not torch.equal(pair.weights[2][0], pair.weights[2][1])


def test_every_parameter_and_t_matter():
    model, t = MLP(width=32), torch.rand(64, requires_grad=True)
    model(torch.randn(64, 2), t).square().sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in model.parameters()) and (t.grad != 0).any()


def test_input_is_scaled_to_unit_variance_when_the_schedule_explodes():
    model, t = MLP(width=16, schedule=ddpm.SCHEDULES["ve"]).double(), torch.tensor([0.1, 0.9], dtype=torch.float64)
    z, scale = torch.randn(2, 2, dtype=torch.float64), (1 + (0.01 * 5000**t)**2).sqrt()[:, None]
    expected = model(z * scale, t)
    model.schedule = None
    assert_close(expected, model(z, t))
    assert ddpm.standardise(z, t, ddpm.SCHEDULES["cosine"]) is z
