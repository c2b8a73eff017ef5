r"""Latent diffusion: an autoencoder makes images small, and diffusion happens there (slides; Rombach et al. 2022).

Read `images.py` and `unet.py` first. Two phases:

    1. a variational autoencoder: q(z | x) = N(mean, e^log_var), from an image (C, H, W) to (3, H / 4, W / 4), and
       p(x | z) = N(decoder(z), noise^2), trained on the bound, thesis (2.15). With a small noise the KL counts little
       beside the squared error: it keeps latents from spreading without end, and no more
    2. the means of q(z | x), standardised in each channel, are a dataset like any other: every target, loss, schedule
       and sampler is that of `train.py`, which sees images of 3 channels that are no grey levels: they are not
       mirrored and not clipped, and their likelihood is a density. `sample.py` decodes

Not here: latents as a dataset of runs (`latent_data.py`); the hole problem (`reproduce_latent.py`); discrete latents.

    python latent.py                                         # what an image costs in pixels and in latents
    python latent.py --data fashion_mnist --minutes 3        # writes runs/latent-fashion_mnist/
"""
import argparse
import math
import time
from pathlib import Path

import torch
from torch import nn

import checkpoints
import images
import progress
import run
import settings
import unet

CHANNELS, DOWNSCALE = 3, 4             # of latents
AUTOENCODER, LATENTS = "autoencoder.pt", "latents.pt"
WIDTH, BATCH, RATE = 32, 128, 2e-3     # of the network; of its training
SAVE_EVERY = 60                        # seconds between two checkpoints, at least


def kl(mean, log_var):
    """KL of N(mean, e^log_var) from N(0, I): (B, ...) -> (B,) in nats."""
    return 0.5 * (mean**2 + log_var.exp() - 1 - log_var).flatten(1).sum(1)


class Autoencoder(nn.Module):
    """encoder(x) is the mean and the log-variance of q(z | x), decoder(z) the mean of p(x | z).

    What `encode` gives and `decode` takes is standardised, with mean and std of each channel of the latents, (c, 1, 1).
    """

    def __init__(self, encoder, decoder, shape=(CHANNELS, 1, 1)):
        super().__init__()
        self.encoder, self.decoder = encoder, decoder
        self.register_buffer("mean", torch.zeros(shape))
        self.register_buffer("std", torch.ones(shape))

    def posterior(self, x):
        """Mean and log-variance of q(z | x): (B, C, ...) -> two of (B, c, ...)."""
        mean, log_var = self.encoder(x).chunk(2, 1)
        return mean, log_var.clamp(-20, 20)

    def loss(self, x, eps, noise):
        """Minus the bound (2.15), without the constant of p(x | z): x (B, ...), eps like z -> (B,) in nats."""
        mean, log_var = self.posterior(x)
        z = mean + (0.5 * log_var).exp() * eps
        return (self.decoder(z) - x).square().flatten(1).sum(1) / (2 * noise**2) + kl(mean, log_var)

    def encode(self, x):
        """The mean of q(z | x), standardised: (B, C, ...) -> (B, c, ...)."""
        return (self.posterior(x)[0] - self.mean) / self.std

    def decode(self, z):
        """The mean of p(x | z) of standardised latents: (B, c, ...) -> (B, C, ...)."""
        return self.decoder(z * self.std + self.mean)

    def standardise(self, z):
        """Take mean and std of each channel from latents as the encoder gives them, (N, c, ...)."""
        z = z.transpose(0, 1).flatten(1)                                                    # (c, N ...)
        self.mean.copy_(z.mean(1).view_as(self.mean))
        self.std.copy_(z.std(1, correction=0).view_as(self.std))


class Residual(nn.Module):
    def __init__(self, n):
        super().__init__()
        self.body = nn.Sequential(nn.SiLU(), unet.conv(n, n), nn.SiLU(), unet.zero(unet.conv(n, n)))

    def forward(self, h):
        return h + self.body(h)


def convolutional(image_channels):
    """An Autoencoder of images whose sides are multiples of 4, with fresh weights from torch's global generator."""
    n, half = WIDTH, lambda n_in, n_out: nn.Conv2d(n_in, n_out, 4, stride=2, padding=1)
    double = lambda n_in, n_out: nn.Sequential(nn.Upsample(scale_factor=2), unet.conv(n_in, n_out))
    encoder = nn.Sequential(half(image_channels, n), nn.SiLU(), half(n, 2 * n), Residual(2 * n), nn.SiLU(),
                            unet.conv(2 * n, 2 * CHANNELS))
    decoder = nn.Sequential(unet.conv(CHANNELS, 2 * n), Residual(2 * n), nn.SiLU(), double(2 * n, n), nn.SiLU(),
                            double(n, image_channels))
    return Autoencoder(encoder, decoder)


# The files

def digest(model):
    """A name for an autoencoder: every weight counts."""
    return checkpoints.digest(*model.state_dict().values())


def unpacked(path):
    """What a file of this script has; SystemExit if it is not there or damaged."""
    cure = "bring it back, or make another: " + run.command("latent.py", "--help")
    if not path.is_file():
        raise SystemExit(f"{path.parent} has no {path.name} - {cure}")
    try:
        found, expected = checkpoints.unpack(path.read_bytes())
        if found["format"] != expected:
            raise ValueError("foreign")
        if path.name == AUTOENCODER:
            found["autoencoder"] = convolutional(found["config"]["shape"][0])
            found["autoencoder"].load_state_dict(found["model"])
    except Exception:                                      # torch raises many kinds
        raise SystemExit(f"{path} is damaged or not of this project - {cure}") from None
    return found


def read(folder):
    """The checkpoint in a folder: config, of the images too, step, ..., and "autoencoder"; or SystemExit."""
    return unpacked(Path(folder, AUTOENCODER))


def in_parts(function, x, size=250):
    """function(x), of so many rows at a time."""
    return torch.cat([function(part) for part in x.split(size)])


# Training

@torch.no_grad()
def reconstructions(model, x):
    """Images uint8 (N, C, H, W), through latents and back -> uint8, and the mean squared error in [-1, 1]."""
    x_hat = in_parts(lambda part: model.decode(model.encode(images.to_float(part).to(model.mean.device))).cpu(), x)
    return images.to_uint8(x_hat), (x_hat.clamp(-1, 1) - images.to_float(x)).square().mean().item()


def train(folder, config, state, device, sets, steps, minutes=math.inf):
    """Train until `steps` steps or `minutes` are done, write autoencoder and latents -> Autoencoder, step, seconds.

    sets: uint8 images to train and to test on; state: of `read`, to go on from, or None. Batches and noise are
    functions of (seed, step). SystemExit at a loss that is not finite.
    """
    torch.manual_seed(config["seed"])
    model, data, step, seconds = convolutional(config["shape"][0]).to(device), sets[0].to(device), 0, 0.0
    optimizer, size, seed = torch.optim.Adam(model.parameters(), RATE), min(BATCH, len(data)), config["seed"]
    if state:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        step, seconds = state["step"], state["seconds"]

    def save():
        run.save(Path(folder, AUTOENCODER), dict(config=config, model=model.state_dict(), step=step, seconds=seconds,
                                                 optimizer=optimizer.state_dict()))
    start, saved = time.perf_counter() - seconds, time.perf_counter()
    add = progress.counter("training", steps - step, "steps")
    while step < steps and seconds < 60 * minutes:
        epoch, i = divmod(step, len(data) // size)
        order = torch.randperm(len(data), generator=run.generator("cpu", seed, "order", epoch)).to(device)
        x = images.to_float(data[order[i * size:(i + 1) * size]])
        eps = torch.randn(size, CHANNELS, *(side // DOWNSCALE for side in x.shape[2:]), device=device,
                          generator=run.generator(device, seed, "noise", step))
        loss = model.loss(x, eps, config["noise"]).mean()
        if not loss.isfinite():
            raise SystemExit(f"{folder}: the loss is not finite at step {step} - raise --noise")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        step, seconds = step + 1, time.perf_counter() - start
        add()
        if time.perf_counter() - saved >= SAVE_EVERY:
            save()
            saved = time.perf_counter()
    with torch.no_grad():
        z = [in_parts(lambda part: model.posterior(images.to_float(part).to(device))[0], x) for x in sets]
        model.standardise(z[0])
        train, test = (((c - model.mean) / model.std).cpu() for c in z)
    save()
    run.save(Path(folder, LATENTS), dict(train=train, test=test, digest=digest(model)))
    return model, step, seconds


def show_cost():
    """What one evaluation of the network costs in pixels and in latents."""
    for C, side in (1, 28), (3, 32), (3, 256):
        for what, shape in ("pixels", (C, side, side)), ("latents", (CHANNELS, side // DOWNSCALE, side // DOWNSCALE)):
            with torch.device("meta"):                     # counts, and computes nothing
                flop = unet.flop(unet.UNet(*shape[:2], **unet.PRESETS["ddpm"]), shape)
            print(f"{what:8s}{' x '.join(map(str, shape)):13s} {math.prod(shape):7,} numbers, "
                  f"{flop / 1e9:8.2f} GFLOP an evaluation")


def main(argv=None):
    parser = settings.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                             usage="python latent.py [options], see --help")
    parser.add_argument("--data", help=f"{', '.join(images.IMAGES)} or a folder of images (none: show the cost)")
    parser.add_argument("--data-dir", type=settings.folder, default="data", help="where the named datasets are (data)")
    parser.add_argument("--image-size", type=settings.number(int, 4, images.LARGEST), help="a multiple of 4 (no)")
    parser.add_argument("--skip-corrupt", action="store_true", help="leave out images that cannot be read")
    parser.add_argument("--noise", type=settings.number(float, 1e-6, 100), default=0.05,
                        help="standard deviation of p(x | z): the larger, the more the KL counts (0.05)")
    parser.add_argument("--steps", type=settings.number(int, 1, 10**9), default=5000, help="of training (5000)")
    parser.add_argument("--minutes", type=settings.number(float, 1e-9), default=math.inf, help="or stop after so long")
    parser.add_argument("--seed", type=settings.number(int, 0, 2**62), default=0, help="of weights and draws (0)")
    parser.add_argument("--out", type=settings.folder, default="runs", help="folder of all runs (runs)")
    parser.add_argument("--resume", action="store_true", help="go on with it")
    parser.add_argument("--overwrite", action="store_true", help="start it again")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda", "mps"], default="auto", help="(auto: cuda or cpu)")
    args = parser.parse_args(argv)
    if args.resume and args.overwrite:
        parser.error("--resume goes on and --overwrite starts again: choose one")
    if args.data is None:
        return show_cost()
    device, folder = run.device(args.device), Path(args.out, f"latent-{Path(args.data).resolve().name}")
    sets = [images.load(args.data, split, args.data_dir, args.image_size, args.skip_corrupt)
            for split in ("train", "test")]
    config = {name: getattr(args, name) for name in ("data", "image_size", "skip_corrupt", "noise", "seed")}
    config |= {"shape": list(sets[0].shape[1:])} | (
        {} if args.data in images.IMAGES else {"images": images.facts(args.data)})
    if any(side % DOWNSCALE for side in config["shape"][1:]):
        raise SystemExit(f"images of {'x'.join(map(str, config['shape']))}: their sides must be multiples of "
                         f"{DOWNSCALE} - give, say, --image-size 32")
    checkpoints.lock(folder)
    try:
        state = read(folder) if (folder / AUTOENCODER).exists() and not args.overwrite else None
        if state and (state["config"] != config or not args.resume):
            raise SystemExit(f"{folder} holds an autoencoder " + (
                "already - go on with --resume or start again with --overwrite" if state["config"] == config else
                "of other images or settings - give another --out, or start again with --overwrite"))
        with run.enough_memory("a smaller --image-size"):
            model, step, seconds = train(folder, config, state, device, sets, args.steps, args.minutes)
            x_hat, error = reconstructions(model, sets[1])
    finally:
        checkpoints.unlock()
    columns = min(16, len(x_hat))
    rows = min(4, len(x_hat) // columns)
    pairs = [c[:rows * columns].unflatten(0, (rows, columns)) for c in (sets[1], x_hat)]       # a row of each in turn
    images.save_png(images.grid(torch.stack(pairs, 1).flatten(0, 2), columns), folder / "reconstructions.png")
    print(f"{folder}: {sum(p.numel() for p in model.parameters()):,} parameters, step {step:,}, {seconds:.0f} s of "
          f"training; {len(x_hat):,} test images reconstructed with mean squared error {error:.5f}, "
          f"{10 * math.log10(4 / error):.1f} dB of PSNR\nnext: " + run.command("train.py", "--data", folder))


if __name__ == "__main__":
    run.script(main, "what was saved is kept; go on with --resume")
