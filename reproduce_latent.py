"""Diffusion in a latent space, where the truth is known: the hole problem of VAEs, and a plane in 16 dimensions.

Part of `reproduce_slides.py`, which says what the functions are. Read `latent.py` and `embedded.py` first.

Holes: five clusters, a VAE with two latents (VDM 2.5, Fig. 2.4). Its prior is N(0, I); what its decoder knows is the
aggregate posterior q(z), Eq. (2.35), the mean of q(z | x) over the data. Where the first is dense and the second is not
is a hole, and the decoder says anything there. A diffusion model of z ~ q(z) is a prior without holes.

Not here: images (`reproduce_latent_images.py`).
"""
import functools
import io
import math
from pathlib import Path

import numpy as np
import torch
from torch import nn

import decoders
import embedded
import kind_points
import latent
import metrics
import own_points
import plots_latent
import reproduce_embedded
import run
import train
from datasets2d import DATASETS, FOUR, standardised
from ddpm import SCHEDULES
from study import Missing, cell, rows

FIVE = standardised(torch.tensor([[-1.5, -1.0], [-0.9, -0.1], [0.0, -0.5], [0.5, 0.6], [1.5, 0.9]],
                                 dtype=torch.float64), 0.1)
NOISES, WIDTH, STEPS, BATCH, RATE = (0.1, 0.5), 128, 3000, 512, 1e-3        # of p(x | z); of the VAE
POINTS, MIXED = 50_000, 5000           # of z ~ q(z) to train on; components of q(z) where its density is asked for
EPOCHS = 20                            # of the diffusion prior
SAMPLER = dict(steps=64, sampler="dpmpp", grid="logsnr")
PRIOR, AGGREGATE, DIFFUSION = "N(0, I)", "aggregate posterior", "diffusion prior"


# The hole problem

def vae(noise):
    """A trained VAE of FIVE with two latents and p(x | z) = N(decoder(z), noise^2)."""
    network = lambda n_in, n_out: nn.Sequential(nn.Linear(n_in, WIDTH), nn.SiLU(), nn.Linear(WIDTH, WIDTH), nn.SiLU(),
                                                nn.Linear(WIDTH, n_out))
    torch.manual_seed(0)
    model, g = latent.Autoencoder(network(2, 4), network(2, 2), 2), run.generator("cpu", "vae")
    optimizer = torch.optim.Adam(model.parameters(), RATE)
    for step in range(STEPS):
        optimizer.param_groups[0]["lr"] = RATE * (1 + math.cos(math.pi * step / STEPS)) / 2
        loss = model.loss(FIVE.sample(BATCH, g), torch.randn(BATCH, 2, generator=g), noise).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.requires_grad_(False)


def log_normal(z, mean, log_var):
    """Log-density of N(mean, e^log_var), sum over the last dimension: broadcastable -> without the last, in nats."""
    return -decoders.gaussian(z, mean, log_var).sum(-1)


def log_aggregate(z, mean, log_var, rows=500):
    """Log-density of q(z) of Eq. (2.35), a mixture of q(z | x), N(mean, e^log_var): z (B, 2), (N, 2) -> (B,)."""
    return torch.cat([log_normal(part[:, None], mean, log_var).logsumexp(1) for part in z.split(rows)]) - math.log(
        len(mean))


def diffusion_prior(study, z, noise):
    """Samples of a diffusion model that was trained on z (N, 2), a file of points, by train.py -> (n, 2)."""
    epochs, buffer = min(study.args.epochs, EPOCHS), io.BytesIO()
    path = Path(study.args.runs) / f"holes-{epochs}-epochs" / f"latents-{noise:g}.npy"
    np.save(buffer, z.numpy())
    run.write(path, buffer.getbuffer())
    train.main(["--data", str(path), "--target", "v", "--loss", "mse", "--epochs", str(epochs), "--out",
                str(path.parent), "--device", "cpu", "--resume"])
    one = run.open(path.parent / f"{path.name}-v-mse-s0")
    x = kind_points.draw(one, num_samples=study.args.num_samples, **SAMPLER)[0]
    return own_points.in_units_of_the_file(x, one.config["points"]).float()


@functools.cache
def of_holes(study, noise):
    """Of a VAE: (numbers of the latents, {source of z: numbers of its samples}, {name: points for the figure})."""
    if study.args.recorded:
        Missing()()
    model, n, g = vae(noise), study.args.num_samples, run.generator("cpu", "holes")
    data = FIVE.sample(POINTS, g)
    mean, log_var = model.posterior(data)
    draw = lambda mean, log_var: mean + (0.5 * log_var).exp() * torch.randn(mean.shape, generator=g)
    z = {PRIOR: torch.randn(n, 2, generator=g), AGGREGATE: draw(mean, log_var)[:n],
         DIFFUSION: diffusion_prior(study, draw(mean, log_var), noise)}
    of_mixture = mean[:MIXED], log_var[:MIXED]
    gap = lambda z: log_aggregate(z, *of_mixture) - log_normal(z, torch.zeros(2), torch.zeros(2))    # log q(z) / p(z)
    numbers = {"kl": gap(draw(*of_mixture)).mean().item(),
               "hole": (gap(z[PRIOR]) < -math.log(2)).double().mean().item(),
               "rates": [latent.kl(mean[:, i:i + 1], log_var[:, i:i + 1]).mean().item() for i in range(2)]}
    x = {name: model.decode(c) + noise * torch.randn(c.shape, generator=g) for name, c in z.items()}
    fresh = FIVE.sample(POINTS, g)
    low, found = FIVE.log_prob(fresh).quantile(0.001), {}
    for name, c in x.items():
        log_p = FIVE.log_prob(c)
        found[name] = {"log_density": log_p.mean().item(), "off": (log_p < low).double().mean().item(),
                       "wasserstein": metrics.sliced_wasserstein(c, fresh).item()}
    return numbers, found, {"data": data, "reconstructions": model.decode(mean), "z": z, "x": x, "mixture": of_mixture}


def holes(study):
    """What the prior of a VAE misses, and what a diffusion prior in its latent space does about it."""
    latents, samples = [], []
    floor, std = metrics.floor(FIVE, study.args.num_samples, POINTS, generator=run.generator("cpu", "floor"))[
        "sliced_wasserstein"]
    for noise in NOISES:
        key = f"five-{noise:g}", "v", "mse", 0
        if study.args.recorded:
            found = study.recorded("holes", key, "holes")
        else:
            numbers, found, _ = of_holes(study, noise)
            found = {"latents": numbers, **found}
            study.note("holes", key, holes=found)
        numbers = found["latents"]
        latents.append([f"{noise:g}", *(f"{rate:.2f}" for rate in numbers["rates"]),
                        f"{numbers['kl']:.3f}", f"{numbers['hole']:.3f}"])
        samples += [[f"{noise:g}", name, f"{of['log_density']:.2f}", f"{of['off']:.4f}", f"{of['wasserstein']:.3f}"]
                    for name, of in found.items() if name != "latents"]
    data = FIVE.sample(POINTS, run.generator("cpu", "entropy"))
    at_end = decoders.prior(data, SCHEDULES["cosine"]).mean().item()
    return rows(["noise", "mean KL of q(z_1 given x)", "of q(z_2 given x)", "KL of q(z)", "N(0, I) in holes"],
                latents) + rows(["noise", "z from", "mean log-density", "off the data", "sliced Wasserstein"],
                                samples) + [
        f"Five clusters, mean log-density {FIVE.log_prob(data).mean():.2f}; a VAE with two latents, {STEPS:,} steps of "
        f"{BATCH} points, one seed. KL from N(0, I), nats. q(z), Eq. (2.35), of {MIXED:,} points; a hole is where q(z) "
        f"< p(z) / 2. x = decoder(z) + noise, {study.args.num_samples:,} samples. Off the data: of a log-density below "
        f"that of all but one in 1,000 points of the data. Floor of the distance: {floor:.3f} +- {std:.3f}. Diffusion "
        f"prior: v with `mse`, {min(study.args.epochs, EPOCHS)} epochs of {POINTS:,} z ~ q(z), {SAMPLER['steps']} "
        f"evaluations of dpmpp. Of diffusion itself on these data the KL of q(z_1) from N(0, I) is at most "
        f"{at_end:.1e}, t = 0.999."]


def fig_holes(study, path):
    """VDM, Fig. 2.4, and a diffusion prior: a row for each noise of p(x | z)."""
    panels = {}
    for noise in NOISES:
        numbers, found, points = of_holes(study, noise)
        panels[f"noise {noise:g}"] = numbers, found, points, lambda z, points=points: log_aggregate(
            z, *points["mixture"])
    plots_latent.holes(panels, path)


# A plane in 16 dimensions

DIMENSION, TARGETS = 16, ("x", "eps", "v")


def of_plane(one, n):
    """Of n samples of a Run on a 2D set, or on it in more dimensions: distance in the plane, and from it."""
    data = DATASETS[one.config["data"]]
    x = kind_points.draw(one, num_samples=n, seed=one.config["seed"], **SAMPLER)[0]
    plane, off = (data.project(x), data.off(x)) if isinstance(data, embedded.Embedded) else (x, 0 * x)
    test = kind_points.load(dict(data=one.config["data"].split("-")[0]))
    return {"plane": metrics.sliced_wasserstein(plane, test).item(), "off": off.double().square().sum(1).mean().item(),
            "gap": data.dim * reproduce_embedded.errors(one)["gap"]}


def principal_angle(data):
    """Largest angle of the plane of an Embedded to that of the first two principal components of POINTS points."""
    x = data.sample(POINTS, run.generator("cpu", "principal"), torch.float64)
    axes = torch.linalg.eigh(metrics.covariance(x))[1][:, -2:]
    return torch.linalg.svdvals(axes - data.basis @ (data.basis.T @ axes)).max().asin().item()


def latent_16(study):
    """Diffusion in the known two latents of data in 16 dimensions, and in the 16, with equally many steps."""
    names, distances, gaps = [f"{data}-{DIMENSION}" for data in FOUR], [], []
    runs = {**study.trained("plain", None, FOUR, TARGETS), **study.trained("plain", None, names, TARGETS)}
    n = study.args.num_samples
    found = study.measured(runs, "plane", lambda one: of_plane(one, n), f"plane-{n}")
    for data, name in zip(FOUR, names):
        floor, std = kind_points.floor(dict(data=data), n)[0]["sliced_wasserstein"]
        for target in TARGETS:
            of = lambda name, what: [found[name, target, "mse", seed][what]                     # noqa: B023
                                     for seed in range(study.args.seeds)]
            off = [1e4 * value for value in of(name, "off")]
            distances.append([f"{data}, {target}", cell(of(data, "plane")), cell(of(name, "plane")),
                              f"{floor:.3f} +- {std:.3f}"])
            gaps.append([f"{data}, {target}", cell(of(data, "gap")), cell(of(name, "gap")), cell(off)])
    weights = [sum(p.numel() for p in kind_points.build_model(runs[data, "v", "mse", 0].config).parameters())
               for data in (FOUR[0], names[0])]
    spaces = "2 latents", f"{DIMENSION} dimensions"
    return ["**Sliced Wasserstein distance in the plane**", "", *rows(["data, target", *spaces, "floor"], distances),
            "**NELBO minus the best possible, nats in all dimensions together**", "",
            *rows(["data, target", *spaces, f"off the plane, {DIMENSION} dimensions, 1e-4"], gaps),
            f"`mse`, {study.args.epochs} epochs, {study.args.seeds} seeds, mean +- standard deviation; {n:,} samples "
            f"by dpmpp with {SAMPLER['steps']} evaluations on grid logsnr. In {DIMENSION} dimensions the network has "
            f"{weights[1] / weights[0]:.3f} times the weights. Off the plane: mean squared distance; of the data, and "
            f"of decoded latents, {DIMENSION - 2}e-4. The autoencoder is known here; that of principal components "
            f"would do, of {POINTS:,} points the first two are within {principal_angle(DATASETS[names[0]]):.1e} of the "
            "plane, the largest angle."]


RESULTS = {
    "holes": (holes, "VDM 2.5: a VAE's prior beside its aggregate posterior and a diffusion prior, in numbers"),
    "hole-problem": (fig_holes, "VDM, Fig. 2.4: the same as a figure"),
    "latent-16": (latent_16, "2D sets in 16 dimensions: diffusion in their two latents and in all 16"),
}
TABLES = "holes", "latent-16"
