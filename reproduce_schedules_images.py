"""Which t to train on, on images: the bound after equally many steps with each density (VDM 4.6).

Part of `reproduce_vdm.py`. Read `likelihood.py` and `reproduce_schedules.py` first.
"""
import math
import statistics
from pathlib import Path

import torch

import images
import kind_images
import likelihood
import reproduce_schedules
import run
import train
from checkpoints import once
from recipes import RECIPES
from study import rows

TESTED, DRAWS = 1000, 4        # test images, and draws of t and noise for each


def measure(one, data_dir):
    """The bound of each test image, bits/dim, and the norm of the gradient (median, maximum) of a Run on images."""
    x = images.to_float(kind_images.load(one.config, "test", data_dir)[:TESTED])
    terms, _ = likelihood.evaluate(one.model(), x, one.config, DRAWS, num_ode=0, batch_size=250,
                                   generator=run.generator("cpu", "bound"), own=one.schedule)
    norms = [value for entry in one.history for value in entry["gradient_norms"]]
    return dict(bound=(terms["bound"] / (kind_images.dimension(one.config) * math.log(2))).tolist(),
                median=statistics.median(norms), maximum=max(norms))


def table(study):
    """The densities, trained one after the other for as many steps as the first makes in its share of --budget."""
    args, lines, steps, first = study.args, [], None, None
    for density, recipe in reproduce_schedules.DENSITIES.items():
        root = Path(args.runs) / f"images-{recipe}"
        folder = root / f"{Path(args.data).resolve().name}-v-nelbo-s0"
        train.main(["--data", args.data, "--target", "v", "--loss", "nelbo", *RECIPES[recipe][0], "--out", str(root),
                    "--device", args.device, "--data-dir", args.data_dir, *args.more,
                    *(["--minutes", str(args.budget / len(reproduce_schedules.DENSITIES))] if steps is None
                      else ["--train-steps", str(steps)]), "--resume"])
        one = run.open(folder)
        steps = one.checkpoint["step"] if steps is None else steps
        found = once(one, "schedules", measure, args.data_dir)
        bound = torch.tensor(found["bound"], dtype=torch.float64)
        first = bound if first is None else first
        cells = [f"{c.mean():.3f} +- {c.std() / len(c)**0.5:.3f}" for c in (bound, bound - first)]
        lines.append([density, cells[0], "-" if bound is first else cells[1], f"{found['median']:.3g}",
                      f"{found['maximum']:.3g}"])
    config = one.config
    return rows(["density of t", "bound, bits/dim", "minus that of t uniform", "gradient norm, median", "maximum"],
                lines) + [
        f"{args.data}, {'x'.join(map(str, config['shape']))}, v, `nelbo`, averaged weights, one seed; {steps:,} steps "
        f"of {config['batch_size']} images in {config['precision']}, "
        f"{sum(value.numel() for value in one.checkpoint['ema'].values()):,} parameters. Bound: {TESTED:,} test "
        f"images, {DRAWS} draws each, log-SNR uniform, +- its standard error over images, on the same images and noise "
        "for all; the gradient's norm is that before it is clipped to 1."]
