"""Diffusion of images in pixels and in latents, as many minutes each (slides; Rombach et al. 2022).

Part of `reproduce_slides.py`, which says what the functions are. Read `latent.py` and `classifier.py` first.

Not here: other targets and losses; `train.py --data` takes the folder of an autoencoder's run.
"""
import math
import statistics
import time
from pathlib import Path

import torch

import classifier
import draw_images
import images
import kind_images
import latent
import latent_data
import reproduce_poster_images
import run
import settings
import train
import unet
from checkpoints import once
from study import rows

SPACES = "pixels", "latents"
SHOWN, STEPS, REPEATS = 32, 64, 5      # images of a panel, evaluations of each; times that a step is measured


def trained(study):
    """{"pixels": Run, "latents": Run}: the autoencoder gets a fifth of --budget, each of them two fifths."""
    args, root = study.args, Path(study.args.runs) / "latents-images"
    where = ["--data-dir", args.data_dir, "--out", str(root), "--device", args.device, "--resume"]
    latent.main(["--data", args.data, "--minutes", str(args.budget / 5), *where])
    name, runs = Path(args.data).resolve().name, {}
    for space, data in zip(SPACES, (args.data, str(root / f"latent-{name}"))):
        train.main(["--data", data, "--target", "v", "--loss", "mse", "--minutes", str(2 * args.budget / 5), *args.more,
                    *where])
        runs[space] = run.open(root / f"{Path(data).name}-v-mse-s0")
    return runs


def seconds_of_a_step(runs, device, repeats=REPEATS):
    """Of each Run's network, forward and backward pass of a batch and AdamW, in turn: {space: median}."""
    steps, spent = {}, {space: [] for space in runs}
    for space, one in runs.items():
        torch.manual_seed(0)
        model = kind_images.build_model(one.config).to(device)
        steps[space] = (model, torch.optim.AdamW(model.parameters()), one.config,
                        torch.randn(one.config["batch_size"], *one.config["shape"], device=device))
    for _ in range(1 + repeats):                           # the first of each warms up
        for space, (model, optimizer, config, z) in steps.items():
            start = time.perf_counter()
            with settings.autocast(config, device):
                prediction = model(z, z[:, 0, 0, 0].sigmoid())
            prediction.square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            if device.type == "cuda":
                torch.cuda.synchronize()
            spent[space].append(time.perf_counter() - start)
    return {space: statistics.median(seconds[1:]) for space, seconds in spent.items()}


def frechet(one, n, device, model, real):
    """{"frechet": the distance of n samples of a Run to the test split, in the features of a classifier}."""
    x, _ = reproduce_poster_images.draw(one, None, n, reproduce_poster_images.STEPS, device)
    return {"frechet": classifier.distances(classifier.seen(model, x), real()[0])["frechet"]}


def table(study):
    """What a step of training costs in pixels and in latents, how good samples are, and what the autoencoder loses."""
    runs, args, lines = trained(study), study.args, []
    seconds, n = seconds_of_a_step(runs, study.device), args.num_samples
    model, facts, real = reproduce_poster_images.judge(study, runs["pixels"].config)
    for space, one in runs.items():
        with torch.device("meta"):
            flop = unet.flop(kind_images.build_model(one.config), one.config["shape"])
        lines.append([space, " x ".join(map(str, one.config["shape"])), f"{flop / 1e9:.3f}",
                      f"{seconds[space]:.4f}", f"{seconds['pixels'] / seconds[space]:.1f}",
                      f"{one.checkpoint['step']:,}", "{frechet:.1f}".format(**once(
                          one, f"frechet-{n}-{facts['digest'][:8]}", frechet, n, study.device, model, real))])
    found, test = latent_data.of_run(one.config), kind_images.load(runs["pixels"].config, "test", args.data_dir)
    x_hat, error = latent.reconstructions(found["autoencoder"], test)
    of_x_hat, of_train = (classifier.distances(seen, real()[0])["frechet"]
                          for seen in (classifier.seen(model, x_hat), real()[1]))
    weights = [sum(p.numel() for p in model.parameters())
               for model in (found["autoencoder"], *map(kind_images.build_model, (runs["pixels"].config, one.config)))]
    return rows(["space", "numbers", "GFLOP an evaluation", "s a step", "pixels' over it", "steps of training",
                 "Frechet"], lines) + [
        f"{args.data}, v with `mse`, {one.config['batch_size']} images a step, networks of {weights[1]:,} and "
        f"{weights[2]:,} parameters, {2 * args.budget / 5:g} minutes of training each. A step is measured in turn, "
        f"median of {REPEATS}. Autoencoder: {weights[0]:,} parameters, {found['step']:,} steps, noise "
        f"{found['config']['noise']:g}, mean squared error of {len(test):,} test images {error:.5f} in [-1, 1], PSNR "
        f"{10 * math.log10(4 / error):.1f} dB. Frechet distance: {n:,} samples, {reproduce_poster_images.STEPS} "
        f"ancestral steps, against the test split, features of the classifier {facts['digest'][:12]}; of the "
        f"reconstructed test split {of_x_hat:.1f}, of {n:,} images of the train split {of_train:.2f}."]


def fig_samples(study, path):
    """Test images, each row over its reconstructions; samples in pixels; samples in latents, decoded."""
    runs = trained(study)
    test = kind_images.load(runs["pixels"].config, "test", study.args.data_dir)[:SHOWN // 2]
    x_hat, _ = latent.reconstructions(latent_data.of_run(runs["latents"].config)["autoencoder"], test)
    panels = [torch.stack([c.unflatten(0, (-1, 8)) for c in (test, x_hat)], 1).flatten(0, 2)]
    panels += [draw_images.draw(one.model(), (SHOWN, *one.config["shape"]), STEPS, one.config,
                                run.generator("cpu", 0, "sample"), sampler="dpmpp") for one in runs.values()]
    images.save_png(images.grid(torch.stack([images.grid(x, 8) for x in panels]), 3, border=6), path)


RESULTS = {
    "latents": (table, "images in pixels and in latents: time of a step, error of the autoencoder; --data, --budget"),
    "latents-samples": (fig_samples, "test images over their reconstructions; samples in pixels; in latents"),
}
TABLES = ("latents",)
