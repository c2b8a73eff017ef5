"""Three targets in three loss spaces on images, with equally many steps.

Part of `reproduce_vdm.py`, which says what the functions are. Read `kind_images.py` and `reproduce_spaces.py` first.

Not here: the size of the paper whose question this is (Li and He 2025); that takes GPUs.
"""
import math
from pathlib import Path

import torch

import draw_images
import images
import kind_images
import likelihood
import losses
import run
import train
from checkpoints import once
from decoders import discretised
from study import rows

SPACES = {"x": "rescaled", "eps": "simple", "v": "v_space"}
TESTED, BOUNDED, DRAWS = 2000, 300, 8          # images of the losses, images of the bound, draws of each
SHOWN, STEPS = 12, 32                          # images of a run in the figure, evaluations of each


def trained(study):
    """The nine runs, {(target, loss): Run}: the first gets its share of --budget, the others as many steps."""
    args = study.args
    root = Path(args.runs) / "images-spaces"
    train.main(["--data", args.data, "--target", *SPACES, "--loss", *SPACES.values(), "--out", str(root), "--device",
                args.device, "--data-dir", args.data_dir, "--minutes", str(args.budget / 9), *args.more, "--resume"])
    return {(target, loss): run.open(root / f"{Path(args.data).resolve().name}-{target}-{loss}-s0")
            for target in SPACES for loss in SPACES.values()}


@torch.no_grad()
def test_losses(one, x):
    """The loss of a Run in every space, {name: number}: one error of its target, times three weights. x (n, C, H, W).

    t and noise are the same for all runs; t is uniform in [0.001, 0.999].
    """
    model, total, g = one.model(), dict.fromkeys(SPACES, 0.0), run.generator("cpu", "spaces")
    times, order = losses.sample_t((len(x),), 1e-3, g), torch.randperm(len(x), generator=g)
    for i, t in zip(order.split(kind_images.TESTED), times.split(kind_images.TESTED)):
        z, y, _ = losses.regression(x[i], t, torch.randn(x[i].shape, generator=g), **losses.objective(one.config))
        errors = losses.weighted_error(model(z, t), y, torch.ones_like(t))
        for name, loss in SPACES.items():
            total[name] += (losses.weight(loss, one.config["target"], t, one.schedule) * errors).sum().item()
    return {name: value / len(x) for name, value in total.items()}


def saved(one, x):
    """Variance of the bound's draws of t and noise without the control variate over that with it. x (n, C, H, W)."""
    var = [likelihood.bound(one.model(), x, target=one.config["target"], schedule=one.schedule, decoder=discretised,
                            draws=DRAWS, t_min=one.config["t_min"], control=control,
                            generator=run.generator("cpu", "control"))["error"].square().mean()
           for control in (False, True)]
    return (var[0] / var[1]).item()


def measure(one, data_dir):
    """The three losses, the bound, bits/dim with its standard error over images, and `saved`, of a Run on images."""
    x = images.to_float(kind_images.load(one.config, "test", data_dir))
    terms, _ = likelihood.evaluate(one.model(), x[:BOUNDED], one.config, draws=DRAWS, num_ode=0, batch_size=100,
                                   generator=run.generator("cpu", "bound"))
    bits = terms["bound"] / (kind_images.dimension(one.config) * math.log(2))
    return dict(losses=test_losses(one, x[:TESTED]), bound=[bits.mean().item(), (bits.std() / len(bits)**0.5).item()],
                saved=saved(one, x[:BOUNDED]))


def table(study):
    """Fashion-MNIST or other images: the losses in three spaces and the bound of nine runs."""
    args, lines, runs = study.args, [], trained(study)
    for (target, loss), one in runs.items():
        found = once(one, "spaces", measure, args.data_dir)
        lines.append([target, f"{loss}", *(f"{value:.4g}" for value in found["losses"].values()),
                      "{:.3f} +- {:.3f}".format(*found["bound"]), f"{found['saved']:.1f}"])
    config = one.config
    return rows(["target", "trained with", *(f"{name}-space, `{loss}`" for name, loss in SPACES.items()),
                 "bound, bits/dim", "control saves"], lines) + [
        f"{args.data}, {'x'.join(map(str, config['shape']))}, averaged weights, one seed; {one.checkpoint['step']:,} "
        f"steps of {config['batch_size']} images in {config['precision']}, "
        f"{sum(value.numel() for value in one.checkpoint['ema'].values()):,} parameters, {config['schedule']} "
        f"schedule. Losses of {TESTED:,} test images, t uniform in [0.001, 0.999]: the three of a row are one error, "
        f"weighed in three ways. Bound: {BOUNDED} test images, {DRAWS} draws each, +- standard error over images. "
        "control saves: the variance of a draw of the bound without control variate (`control.py`) over that with it."]


def fig_samples(study, path):
    """Samples of the nine runs: a row a target, from left to right the loss in x-, eps- and v-space."""
    runs, grids = trained(study), []
    for one in runs.values():
        x = draw_images.draw(one.model(), (SHOWN, *one.config["shape"]), STEPS, one.config,
                             run.generator("cpu", 0, "sample"), sampler="dpmpp")
        grids.append(images.grid(x, 4))
    images.save_png(images.grid(torch.stack(grids), len(SPACES), border=6), path)


RESULTS = {
    "spaces-images": (table, "three targets in three loss spaces on images: losses and bound; --data, --budget"),
    "spaces-images-samples": (fig_samples, "samples of the same, a row a target, a column a loss space"),
}
