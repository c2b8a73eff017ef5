"""Foundations, Tables 5.1 and 6.1, on images: the same ten configurations and two more, with equally many steps.

Part of `reproduce_foundations.py`. Read `kind_images.py` and `reproduce_variances.bound` first.

Not here: the document's own size; that is `--data cifar10 --budget 2000` on a GPU, with the default network.
"""
import math
import statistics
from pathlib import Path

import images
import kind_images
import losses
import reproduce_variances
import run
import train
from checkpoints import once
from decoders import discretised
from study import rows

TESTED = 4000          # terms of the bound, for each network


def measure(one, data_dir, draws=TESTED):
    """Mean MSE, bound with its error (bits/dim), norm of the gradient (median, maximum) of a Run on images."""
    config, last = one.config, one.history[-1]
    x = images.to_float(kind_images.load(config, "test", data_dir))
    bits = kind_images.dimension(config) * math.log(2)
    names = ["small", "large"] if config["variance"] == "small" else [config["variance"]]
    model, chain = one.model(out=True), losses.chain_of(config)
    bounds = {name: [value / bits for value in reproduce_variances.bound(
        model, x, chain=chain, target=one.target, variance=name, decoder=discretised, t_min=config["t_min"],
        draws=draws, pilot=1, generator=run.generator("cpu", "bound"))] for name in names}
    norms = [value for entry in one.history for value in entry["gradient_norms"]]
    return dict(mean_mse=last["test_mean_mse"], bounds=bounds, median=statistics.median(norms), maximum=max(norms))


def table(study, configurations):
    """The configurations, trained one after the other for as many steps as the first makes in its share of --budget."""
    args, lines, steps = study.args, [], None
    for mean, variance, loss, target, recipe, ours, *document in configurations:
        name = recipe.removeprefix("chain-")
        root = Path(args.runs) / f"images-{recipe}"
        folder = root / f"{Path(args.data).resolve().name}-{target}-{ours}-s0"
        share = str(args.budget / len(configurations))
        train.main(["--data", args.data, "--schedule", "ddpm", "--timesteps", "1000", "--variance", name,
                    "--target", target, "--loss", ours, "--out", str(root), "--device", args.device,
                    "--data-dir", args.data_dir, *args.more,
                    *(["--minutes", share] if steps is None else ["--train-steps", str(steps)]), "--resume"])
        one = run.open(folder)
        steps = one.checkpoint["step"] if steps is None else steps
        found = once(one, "foundations", measure, args.data_dir)
        cells = [f"{value:.3g} +- {error:.1g}" for value, error in found["bounds"].values()]
        lines.append([mean, variance, loss, *document, f"{found['mean_mse']:.3g}", *(cells + ["-"])[:2],
                      f"{found['median']:.3g}", f"{found['maximum']:.3g}"])
    config = one.config
    return rows(["mean", "variance", "loss", "CIFAR-10: mean MSE", "NLL", "mean MSE", "NLL, own or small", "NLL, large",
                 "gradient norm, median", "maximum"], lines) + [
        f"{args.data}, {'x'.join(map(str, config['shape']))}, averaged weights, one seed; {steps:,} steps of "
        f"{config['batch_size']} images in {config['precision']}, "
        f"{sum(value.numel() for value in one.checkpoint['ema'].values()):,} parameters, schedule ddpm, T = 1000. NLL "
        f"is the bound in bits/dim with its Monte Carlo error, {TESTED:,} terms of test images; the gradient's norm is "
        "that before it is clipped to 1. CIFAR-10: the document's numbers."]
