"""The network for images: a UNet of residual and attention blocks (thesis 4.2.1, Fig. 4.5 - 4.7).

Read `targets.py` first: the network predicts any of its rows, and nothing in it depends on which. Two presets:

    ddpm    the CIFAR-10 network of Ho et al. 2020: 128 channels times 1-2-2-2, 2 layers a block, attention at 16 x 16
            and in the middle; every layer's output is handed over to the way up. 35.7 M parameters. They drop out
            0.1 on CIFAR-10 and nothing on other sets: here that is asked for, --dropout 0.1, and 0 is the default
    thesis  4.2.1: four down, three mid and four up blocks, 6 layers a block, attention everywhere; every down block
            hands over one output. 64 channels times 1-2-2-2: the thesis does not print its channels

Not here: several in one (`stack.py`); precision and memory layout (`train_images.py`).

    python unet.py        # sizes, parameters and FLOP of both presets
"""
import math

import torch
from torch import nn
from torch.nn import functional as F

import ddpm
from guidance import one_hot

PRESETS = {
    "ddpm":   dict(channels=128, channel_mult=[1, 2, 2, 2], layers=2, mid_blocks=1, attention=[16],
                   skips="layer"),
    "thesis": dict(channels=64, channel_mult=[1, 2, 2, 2], layers=6, mid_blocks=3, attention=[32, 16, 8, 4, 2],
                   skips="block"),
}


def conv(n_in, n_out, size=3, stride=1):
    return nn.Conv2d(n_in, n_out, size, stride, padding=size // 2)


def norm(n):
    """GroupNorm with 32 groups, fewer where those had less than 4 channels: with one it would undo what time adds."""
    groups = max(g for g in range(1, 33) if n % g == 0 and (g == 1 or n >= 4 * g))
    return nn.GroupNorm(groups, n, eps=1e-6)


def zero(layer):
    """The layer, started at zero: a residual branch that ends in it is the identity at first."""
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer


class TimeEmbedding(nn.Module):
    """t (B,) -> (B, 4 * channels): sinusoids of 1000 t, linear, SiLU, linear (Fig. 4.6; Vaswani et al. 2017)."""

    def __init__(self, channels):
        super().__init__()
        self.half = channels // 2
        self.mlp = nn.Sequential(nn.Linear(2 * self.half, 4 * channels), nn.SiLU(),
                                 nn.Linear(4 * channels, 4 * channels))

    def forward(self, t):
        frequencies = torch.exp(-math.log(10_000) / (self.half - 1)
                                * torch.arange(self.half, device=t.device, dtype=t.dtype))
        angles = 1000 * t[:, None] * frequencies                                            # from 1000 t down to t / 10
        return self.mlp(torch.cat([angles.sin(), angles.cos()], 1))


class Resnet(nn.Module):
    """GroupNorm, SiLU, conv, + projected time embedding, GroupNorm, SiLU, dropout, conv, residual (Fig. 4.6)."""

    def __init__(self, n_in, n_out, embedding, dropout):
        super().__init__()
        self.norm1, self.conv1 = norm(n_in), conv(n_in, n_out)
        self.project = nn.Linear(embedding, n_out)
        self.norm2, self.dropout, self.conv2 = norm(n_out), nn.Dropout(dropout), zero(conv(n_out, n_out))
        self.shortcut = conv(n_in, n_out, 1) if n_in != n_out else nn.Identity()

    def forward(self, h, embedding):
        residual = self.conv1(F.silu(self.norm1(h)))                                        # (B, n_out, H, W)
        residual = residual + self.project(F.silu(embedding))[:, :, None, None]
        return self.shortcut(h) + self.conv2(self.dropout(F.silu(self.norm2(residual))))


def attend(q, k, v):
    """softmax(q k^T / sqrt(C)) v: (B, N, C) each -> (B, N, C)."""
    if q.is_cpu and q.dtype == torch.bfloat16:             # there the fused kernel is slower, its backward pass 3 times
        return (q @ k.mT / math.sqrt(q.shape[2])).softmax(2) @ v
    return F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None])[:, 0]         # of one head


class Attention(nn.Module):
    """GroupNorm, self-attention of all pixels with one head, residual (Fig. 4.6)."""

    def __init__(self, n):
        super().__init__()
        self.norm, self.qkv, self.out = norm(n), nn.Linear(n, 3 * n), zero(nn.Linear(n, n))

    def forward(self, h):
        pixels = self.norm(h).flatten(2).mT                                                 # (B, H W, C)
        residual = self.out(attend(*self.qkv(pixels).chunk(3, -1)))
        return h + residual.mT.unflatten(2, h.shape[2:])


class Layer(nn.Module):
    """A resnet block and, where the resolution has it, an attention block."""

    def __init__(self, n_in, n_out, embedding, attention, dropout):
        super().__init__()
        self.resnet = Resnet(n_in, n_out, embedding, dropout)
        self.attention = Attention(n_out) if attention else nn.Identity()

    def forward(self, h, embedding):
        return self.attention(self.resnet(h, embedding))


class Down(nn.Module):
    """Layers, then half the resolution unless it is the last block. Appends what it hands over to `skips`."""

    def __init__(self, n_in, n_out, embedding, attention, dropout, layers, downsample, every):
        super().__init__()
        self.layers = nn.ModuleList(
            Layer(n_out if i else n_in, n_out, embedding, attention, dropout) for i in range(layers))
        self.downsample = conv(n_out, n_out, stride=2) if downsample else None
        self.every = every                       # hand over every layer's output, or one for the whole block

    def forward(self, h, embedding, skips):
        for layer in self.layers:
            h = layer(h, embedding)
            if self.every or layer is self.layers[-1]:
                skips.append(h)
        if self.downsample is None:
            return h
        h = self.downsample(h)
        if self.every:
            skips.append(h)
        return h


class Mid(nn.Module):
    """Resnet, attention, resnet, at one resolution."""

    def __init__(self, n, embedding, dropout):
        super().__init__()
        self.first, self.second = (Layer(n, n, embedding, attends, dropout) for attends in (True, False))

    def forward(self, h, embedding):
        return self.second(self.first(h, embedding), embedding)


class Up(nn.Module):
    """Double the resolution if the way down halved it, then layers, of which the first ones take a skip each."""

    def __init__(self, n_in, n_out, embedding, attention, dropout, layers, upsample, skips):
        super().__init__()
        self.upsample = conv(n_in, n_in) if upsample else None
        inputs = [n + skip for n, skip in zip([n_in] + (layers - 1) * [n_out], skips + layers * [0])]
        self.layers = nn.ModuleList(Layer(n, n_out, embedding, attention, dropout) for n in inputs)
        self.takes = len(skips)

    def forward(self, h, embedding, skips):
        if self.upsample is not None:              # to the size of the skip: 4 x 4 may come from 7 x 7
            h = self.upsample(F.interpolate(h, size=skips[-1].shape[2:], mode="nearest"))
        for i, layer in enumerate(self.layers):
            h = layer(torch.cat([h, skips.pop()], 1) if i < self.takes else h, embedding)
        return h


class UNet(nn.Module):
    """model(z, t) -> prediction. z (B, image_channels, size, size), t (B,) in [0, 1]; returns z's shape, or out
    channels.

    attention: resolutions whose blocks attend; 16 means the block of 9 to 16 pixels, also for images of 28 x 28.
    skips: "layer" or "block", how much the way down hands over to the way up. dropout: probability with which a number
    inside a resnet block is 0 in training, from torch's global generator. schedule, classes: see `mlp.MLP`; of a label
    one vector is added to the time embedding.
    """

    def __init__(self, image_channels=3, size=32, channels=128, channel_mult=(1, 2, 2, 2), layers=2, mid_blocks=1,
                 attention=(16,), skips="layer", schedule=None, dropout=0.0, out=None, classes=0):
        super().__init__()
        every, embedding, kept = skips == "layer", 4 * channels, [channels]
        self.schedule = schedule
        self.time = TimeEmbedding(channels)
        self.input = conv(image_channels, channels)
        self.down, self.mid, self.up, levels, n = nn.ModuleList(), nn.ModuleList(), nn.ModuleList(), [], channels
        for level, multiple in enumerate(channel_mult):
            halves, attends = not every or level + 1 < len(channel_mult), any(size <= a < 2 * size for a in attention)
            n_in, n = n, multiple * channels
            self.down.append(Down(n_in, n, embedding, attends, dropout, layers, halves, every))
            levels.append((n, attends, halves))
            kept += (layers + halves) * [n] if every else [n]
            size = (size + 1) // 2
        self.mid.extend(Mid(n, embedding, dropout) for _ in range(mid_blocks))
        for n_out, attends, halves in reversed(levels):
            taken = [kept.pop() for _ in range(layers + 1 if every else 1)]
            self.up.append(Up(n, n_out, embedding, attends, dropout, layers + every, halves, taken))
            n = n_out
        self.every = every
        self.output = nn.Sequential(norm(n), nn.SiLU(), zero(conv(n, out or image_channels)))
        self.classes = classes
        if classes:                                # the last: all other weights are those of a network without
            self.label = nn.Linear(classes, embedding, bias=False)

    def forward(self, z, t, label=None):
        embedding = self.time(t)                                                            # (B, 4 * channels)
        if self.classes:
            embedding = embedding + self.label(one_hot(label, self.classes, t))
        h = self.input(ddpm.standardise(z, t, self.schedule))
        skips = [h] if self.every else []
        for block in self.down:
            h = block(h, embedding, skips)
        for block in self.mid:
            h = block(h, embedding)
        for block in self.up:
            h = block(h, embedding, skips)
        return self.output(h).to(z)                                                         # under autocast too


def flop(model, shape):
    """FLOP of one forward pass of one image of `shape` (C, H, W): two for each multiply and add."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode
    device = next(model.parameters()).device
    # torch 2.11 counts no fused attention
    with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        model(torch.zeros(1, *shape, device=device), torch.zeros(1, device=device))
    return counter.get_total_flops()


if __name__ == "__main__":
    for name, preset in PRESETS.items():
        model = UNet(**preset)
        print(f"{name}: {sum(p.numel() for p in model.parameters()):,} parameters, "
              f"{flop(model, (3, 32, 32)) / 1e9:.2f} GFLOP forward for an image of 32 x 32")
        for part in "time", "input", "down", "mid", "up", "output":
            print(f"    {part:7s} {sum(p.numel() for p in getattr(model, part).parameters()):12,}")
