"""The UNet: its blocks typed a second time, its size, where it attends, and that all of it learns."""
import math

import pytest
import torch
from torch.nn import functional as F
from torch.testing import assert_close

import ddpm
import unet


def randomised(model, seed=0):
    """The model in float64 with random weights everywhere: nothing starts at zero."""
    g = torch.Generator().manual_seed(seed)
    model = model.double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=g, dtype=torch.float64)
                            / math.sqrt(parameter[0].numel()))
    return model


def conv(layer, h, stride=1):
    return F.conv2d(h, layer.weight, layer.bias, stride, padding=layer.weight.shape[2] // 2)


def norm(layer, h, groups):
    """GroupNorm typed again."""
    grouped = h.reshape(len(h), groups, -1)
    grouped = (grouped - grouped.mean(2, keepdim=True)) / (grouped.var(2, correction=0, keepdim=True) + 1e-6).sqrt()
    return grouped.reshape(h.shape) * layer.weight[:, None, None] + layer.bias[:, None, None]


def silu(h):
    return h / (1 + torch.exp(-h))


def embed(block, t, channels):
    """Time embedding typed again: sin and cos of 1000 t / 10000^(i / (half - 1))."""
    half = channels // 2
    angles = torch.stack([1000 * t / 10_000**(i / (half - 1)) for i in range(half)], 1)
    h = torch.cat([torch.sin(angles), torch.cos(angles)], 1)
    return silu(h @ block.mlp[0].weight.T + block.mlp[0].bias) @ block.mlp[2].weight.T + block.mlp[2].bias


def resnet(block, h, embedding):
    residual = conv(block.conv1, silu(norm(block.norm1, h, h.shape[1] // 4)))
    residual = residual + (silu(embedding) @ block.project.weight.T + block.project.bias)[:, :, None, None]
    residual = conv(block.conv2, silu(norm(block.norm2, residual, residual.shape[1] // 4)))
    return residual + (h if residual.shape[1] == h.shape[1] else conv(block.shortcut, h))


def attention(block, h):
    """Self-attention of the pixels, typed again with an explicit softmax."""
    B, C, H, W = h.shape
    pixels = norm(block.norm, h, C // 4).reshape(B, C, H * W).transpose(1, 2)
    q, k, v = (pixels @ w.T + b for w, b in zip(block.qkv.weight.chunk(3), block.qkv.bias.chunk(3)))
    weights = torch.softmax(q @ k.transpose(1, 2) / math.sqrt(C), -1)
    return h + ((weights @ v) @ block.out.weight.T + block.out.bias).transpose(1, 2).reshape(B, C, H, W)


def layer(block, h, embedding, attends):
    h = resnet(block.resnet, h, embedding)
    return attention(block.attention, h) if attends else h


def middle(model, h, embedding):
    for block in model.mid:
        h = attention(block.first.attention, resnet(block.first.resnet, h, embedding))
        h = resnet(block.second.resnet, h, embedding)
    return h


def double(block, h, size):
    """Every pixel becomes 2 x 2, cut to the size where that is odd; then the conv."""
    H, W = size
    rows, columns = (torch.arange(n) * old // n for n, old in zip((H, W), h.shape[2:]))
    return conv(block.upsample, h[:, :, rows][:, :, :, columns])


def ddpm_network(model, z, t, attends):
    """Two blocks of two layers as in Ho et al. 2020: each output of the way down goes to a layer of the way up."""
    embedding = embed(model.time, t, 8)
    h0 = conv(model.input, z)
    h1 = layer(model.down[0].layers[0], h0, embedding, attends[0])
    h2 = layer(model.down[0].layers[1], h1, embedding, attends[0])
    h3 = conv(model.down[0].downsample, h2, stride=2)
    h4 = layer(model.down[1].layers[0], h3, embedding, attends[1])
    h5 = layer(model.down[1].layers[1], h4, embedding, attends[1])
    h = middle(model, h5, embedding)
    for i, skip in enumerate([h5, h4, h3]):
        h = layer(model.up[0].layers[i], torch.cat([h, skip], 1), embedding, attends[1])
    h = double(model.up[1], h, h2.shape[2:])
    for i, skip in enumerate([h2, h1, h0]):
        h = layer(model.up[1].layers[i], torch.cat([h, skip], 1), embedding, attends[0])
    return conv(model.output[2], silu(norm(model.output[0], h, 2)))


def thesis_network(model, z, t):
    """Fig. 4.7 with two blocks of two layers: every down block halves, every up block doubles and takes one output."""
    embedding = embed(model.time, t, 8)
    h, outputs = conv(model.input, z), []
    for block in model.down:
        for i in range(2):
            h = layer(block.layers[i], h, embedding, True)
        outputs.append(h)
        h = conv(block.downsample, h, stride=2)
    h = middle(model, h, embedding)
    for block in model.up:
        skip = outputs.pop()
        h = torch.cat([double(block, h, skip.shape[2:]), skip], 1)
        for i in range(2):
            h = layer(block.layers[i], h, embedding, True)
    return conv(model.output[2], silu(norm(model.output[0], h, 2)))


@pytest.mark.parametrize("size, channels", [(8, 3), (7, 1)])
def test_ddpm_is_the_network_typed_again(size, channels):
    model = randomised(unet.UNet(channels, size, channels=8, channel_mult=[1, 2], layers=2, attention=[4]))
    z, t = torch.randn(2, channels, size, size, dtype=torch.float64), torch.tensor([0.1, 0.9], dtype=torch.float64)
    assert_close(model(z, t), ddpm_network(model, z, t, [False, True]))


@pytest.mark.parametrize("size", [8, 6])
def test_thesis_is_the_network_typed_again(size):
    model = randomised(unet.UNet(3, size, channels=8, channel_mult=[1, 2], layers=2, mid_blocks=3, attention=[8, 4],
                                 skips="block"))
    z, t = torch.randn(2, 3, size, size, dtype=torch.float64), torch.tensor([0.001, 0.5], dtype=torch.float64)
    assert len(model.mid) == 3
    assert_close(model(z, t), thesis_network(model, z, t))


def test_presets_have_the_size_that_is_stated():
    model = unet.UNet(**unet.PRESETS["ddpm"])
    assert sum(p.numel() for p in model.parameters()) == 35_746_307        # google/ddpm-cifar10-32 in diffusers
    assert abs(unet.flop(model, (3, 32, 32)) / 12.444e9 - 1) < 0.02        # that network's, by the same counter
    thesis = unet.UNet(**unet.PRESETS["thesis"])
    assert [len(part) for part in (thesis.down, thesis.mid, thesis.up)] == [4, 3, 4]       # 4.2
    blocks = [*thesis.down, *thesis.up]
    assert all(len(block.layers) == 6 for block in blocks)                                 # 4.2.1
    assert all(isinstance(layer.attention, unet.Attention) for block in blocks for layer in block.layers)
    assert [block.layers[0].resnet.conv1.out_channels for block in blocks] == [64, *6 * [128], 64]
    assert {layer.resnet.conv2.out_channels for mid in thesis.mid for layer in (mid.first, mid.second)} == {128}


@pytest.mark.parametrize("n, groups", [(128, 32), (384, 32), (64, 16), (32, 8), (8, 2), (6, 1), (11, 1), (36, 9)])
def test_groups_of_the_norm(n, groups):
    assert unet.norm(n).num_groups == groups


def test_flop_of_a_convolution():
    class Conv(torch.nn.Conv2d):
        def forward(self, z, t):
            return super().forward(z)
    assert unet.flop(Conv(3, 5, 3, padding=1), (3, 8, 8)) == 2 * 3 * 5 * 9 * 64


def test_ddpm_is_the_network_of_diffusers():
    """The same numbers from the same weights. Runs where diffusers is installed."""
    diffusers = pytest.importorskip("diffusers")
    ours = randomised(unet.UNet(**unet.PRESETS["ddpm"]))
    theirs = diffusers.UNet2DModel(
        sample_size=32, block_out_channels=(128, 256, 256, 256), layers_per_block=2, attention_head_dim=None,
        norm_eps=1e-6, down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
        flip_sin_to_cos=False, freq_shift=1,
        up_block_types=("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"), downsample_padding=1).double()
    pairs = [(ours.input, theirs.conv_in), (ours.time.mlp[0], theirs.time_embedding.linear_1),
             (ours.time.mlp[2], theirs.time_embedding.linear_2), (ours.output[0], theirs.conv_norm_out),
             (ours.output[2], theirs.conv_out)]

    def add(layer, resnet, attention=None):
        own = layer.resnet
        pairs.extend([(own.norm1, resnet.norm1), (own.conv1, resnet.conv1), (own.project, resnet.time_emb_proj),
                      (own.norm2, resnet.norm2), (own.conv2, resnet.conv2)])
        if resnet.conv_shortcut is not None:
            pairs.append((own.shortcut, resnet.conv_shortcut))
        if attention is not None:
            pairs.extend([(layer.attention.norm, attention.group_norm), (layer.attention.out, attention.to_out[0])])
            for i, linear in enumerate([attention.to_q, attention.to_k, attention.to_v]):
                with torch.no_grad():
                    linear.weight.copy_(layer.attention.qkv.weight.chunk(3)[i])
                    linear.bias.copy_(layer.attention.qkv.bias.chunk(3)[i])
    for own, other in [*zip(ours.down, theirs.down_blocks), *zip(ours.up, theirs.up_blocks)]:
        attentions = getattr(other, "attentions", None) or 3 * [None]
        for layer, resnet, attention in zip(own.layers, other.resnets, attentions):
            add(layer, resnet, attention)
    for own, other in zip(ours.down[:-1], theirs.down_blocks):
        pairs.append((own.downsample, other.downsamplers[0].conv))
    for own, other in zip(ours.up[1:], theirs.up_blocks):
        pairs.append((own.upsample, other.upsamplers[0].conv))
    add(ours.mid[0].first, theirs.mid_block.resnets[0], theirs.mid_block.attentions[0])
    add(ours.mid[0].second, theirs.mid_block.resnets[1])
    for own, other in pairs:
        other.load_state_dict(own.state_dict())
    z, t = torch.randn(2, 3, 32, 32, dtype=torch.float64), torch.tensor([0.2, 0.7], dtype=torch.float64)
    # diffusers makes its sinusoids in float32
    assert_close(ours(z, t), theirs(z, 1000 * t).sample, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("preset", unet.PRESETS)
@pytest.mark.parametrize("shape", [(3, 32, 32), (1, 28, 28)])
def test_the_gradient_reaches_every_parameter(preset, shape):
    model = randomised(unet.UNet(shape[0], shape[1], **unet.PRESETS[preset] | dict(channels=8, layers=2)))
    z, t = torch.randn(2, *shape, dtype=torch.float64), torch.tensor([0.3, 0.6], dtype=torch.float64)
    prediction = model(z, t)
    assert prediction.shape == z.shape
    (prediction * torch.randn_like(z)).sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in model.parameters())


def test_it_starts_at_zero_and_its_blocks_as_the_identity():
    model = unet.UNet(3, 16, channels=8, channel_mult=[1, 2], layers=1, attention=[16, 8])
    h, embedding = torch.randn(2, 8, 16, 16), torch.randn(2, 32)
    assert torch.equal(model(torch.randn(2, 3, 16, 16), torch.rand(2)), torch.zeros(2, 3, 16, 16))
    assert torch.equal(model.down[0].layers[0](h, embedding), h)
    assert model.down[0].layers[0].attention.qkv.weight.abs().max() > 0    # only the last of a branch is zero


@pytest.mark.parametrize("size, attention, levels", [
    (32, [16], [False, True, False, False]), (28, [16], [False, True, False, False]), (32, [0], 4 * [False]),
    (28, [4, 28], [True, False, False, True]), (32, [32, 8], [True, False, True, False]),
    (16, [15], [False, True, False, False]), (28, [3], 4 * [False])])
def test_where_it_attends(size, attention, levels):
    model = unet.UNet(1, size, channels=8, attention=attention)
    attends = lambda block: {isinstance(layer.attention, unet.Attention) for layer in block.layers}
    assert [attends(block) for block in model.down] == [{level} for level in levels]
    assert [attends(block) for block in model.up] == [{level} for level in reversed(levels)]


def test_every_image_is_alone_and_time_matters():
    model = randomised(unet.UNet(1, 8, channels=8, channel_mult=[1, 2], layers=1, attention=[8]))
    z, t = torch.randn(3, 1, 8, 8, dtype=torch.float64), torch.tensor([0.001, 0.5, 0.999], dtype=torch.float64)
    alone = torch.cat([model(z[i:i + 1], t[i:i + 1]) for i in range(3)])
    assert_close(model(z, t), alone)
    assert (model(z, t.flip(0)) - alone)[0].abs().max() > 1e-3


def test_precision_in_is_precision_out_and_exploding_noise_is_scaled():
    model = unet.UNet(1, 8, channels=8, channel_mult=[1], layers=1)
    with torch.autocast("cpu", torch.bfloat16):
        assert model(torch.randn(2, 1, 8, 8), torch.rand(2)).dtype == torch.float32
    schedule, t = ddpm.SCHEDULES["ve"], torch.tensor([0.1, 0.9], dtype=torch.float64)
    exploding = randomised(unet.UNet(1, 8, channels=8, channel_mult=[1], layers=1, schedule=schedule))
    plain = randomised(unet.UNet(1, 8, channels=8, channel_mult=[1], layers=1))
    z = torch.randn(2, 1, 8, 8, dtype=torch.float64)
    scale = (1 + schedule.sigma(t)**2).sqrt()[:, None, None, None]
    assert_close(exploding(z * scale, t), plain(z, t))


@pytest.mark.parametrize("dtype, error", [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 0.03)])
def test_attention_is_right_in_every_precision(dtype, error):
    """Written out in bf16 on a CPU, fused elsewhere: both are that in float64 but for rounding, slopes too."""
    g = torch.Generator().manual_seed(0)
    q, k, v = (c.requires_grad_() for c in 2 * torch.randn(3, 2, 9, 5, generator=g, dtype=torch.float64))
    expected = torch.stack([torch.softmax(q[i] @ k[i].T / 5**0.5, 1) @ v[i] for i in range(2)])
    weight = torch.randn(expected.shape, generator=g, dtype=torch.float64)
    slopes = torch.autograd.grad((expected * weight).sum(), (q, k, v))
    y = unet.attend(q.to(dtype), k.to(dtype), v.to(dtype))
    assert y.dtype == dtype
    assert (y - expected).square().mean().sqrt() < error
    for slope, exact in zip(torch.autograd.grad((y * weight).sum(), (q, k, v)), slopes):
        assert (slope - exact).square().mean().sqrt() < 2 * error * exact.square().mean().sqrt()
