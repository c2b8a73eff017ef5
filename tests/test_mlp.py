"""The network against nn.Sequential with the same weights."""
import torch
from torch import nn
from torch.testing import assert_close

import ddpm
from mlp import MLP


def test_seven_layers_with_relu_between():
    model = MLP(width=16).double()
    layers = [layer for linear in model.layers for layer in (linear, nn.ReLU())][:-1]
    assert len(model.layers) == 7 and [layer.out_features for layer in model.layers] == 6 * [16] + [2]
    z, t = torch.randn(5, 2, dtype=torch.float64), torch.rand(5, dtype=torch.float64)
    assert_close(model(z, t), nn.Sequential(*layers)(torch.cat([z, t[:, None]], 1)))
    assert MLP().layers[0].out_features == 128


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
    assert MLP(schedule=ddpm.SCHEDULES["cosine"]).schedule is None
