"""The poster's table on images, and the thesis's Table 4.2 in small: networks of equally many steps, beside a floor.

Part of `reproduce_poster.py`. Read `kind_images.py`, `guidance.py` and `classifier.py` first: distances are those of a
small classifier, which is trained where it is missing, and no FID. The poster's s minimises the error of eps_hat, which
is the loss `simple`; one network with labels gives all guided rows. Not the poster's: w = 0, v, u, and what the
bound's own weight does.

Not here: what guidance samples from (`reproduce_guidance.py`); the thesis's own size (`reproduce.py table4.2`).
"""
import functools
import math
from pathlib import Path

import torch

import classifier
import draw_images
import guidance
import images
import kind_images
import likelihood
import reproduce_foundations_images
import reproduce_thesis
import run
import train
from checkpoints import once
from study import cell, rows

# Each system: its loss and options of train.py, with a folder of its own where those differ.
SYSTEMS = {**{f"{target}, {loss}": ("plain", target, loss) for target in reproduce_thesis.THESIS_IMAGES
              for loss in ("mse", "nelbo")},
           "u, mse": ("plain", "u", "mse"), "s, simple": ("plain", "s", "simple"),
           "s of labels": ("labels", "s", "simple"), "learned variance": ("chain", "eps", "hybrid")}
OPTIONS = {"plain": [], "labels": ["--labels"], "chain": ["--timesteps", "1000", "--variance", "range"]}
# System, w, and the poster's FID, FID of binarised images, NLL
ROWS = [("x, mse", None, "49.10", "9.89", "-"), ("eps, mse", None, "15.75", "10.13", "1.21"),
        ("s, simple", None, "78.83", "17.36", "-"), ("s of labels", 5, "74.21", "25.16", "-"),
        ("s of labels", 1, "61.91", "15.69", "-"), ("s of labels", 0, "-", "-", "-"),
        ("learned variance", None, "58.89", "14.45", "1.1"), *((name, None, "-", "-", "-") for name in (
            "v, mse", "u, mse", "x, nelbo", "eps, nelbo", "v, nelbo"))]
STEPS, BATCH = 100, 100                # of the sampler, images drawn at once
BOUNDED, DRAWS = 300, 8                # images of the bound, draws of t and noise for each
SHOWN = 16                             # images of a panel
COLUMNS = "frechet", "frechet_binarised", "kid", "knn_precision", "knn_recall"


def trained(study):
    """{(system, seed): Run}: the first gets its share of --budget, the others as many steps."""
    args, runs, steps = study.args, {}, None
    for name, (folder, target, loss) in SYSTEMS.items():
        root = Path(args.runs) / f"poster-{folder}"
        share = args.budget / len(SYSTEMS) / args.seeds
        train.main(["--data", args.data, "--target", target, "--loss", loss, "--seeds", str(args.seeds),
                    *OPTIONS[folder], "--out", str(root), "--device", args.device, "--data-dir", args.data_dir,
                    *args.more, "--resume",
                    *(["--minutes", str(share)] if steps is None else ["--train-steps", str(steps)])])
        for seed in range(args.seeds):
            runs[name, seed] = run.open(root / f"{Path(args.data).resolve().name}-{target}-{loss}-s{seed}")
        steps = steps or runs[name, 0].checkpoint["step"]
    return runs


def draw(one, w, n, steps, device):
    """Ancestral samples of a Run, uint8 (n, C, H, W), and their labels (n,), which without w are ignored."""
    learned = one.config["variance"] == "range"
    model, parts = one.model(device, out=learned), []
    label = torch.arange(n) % max(1, kind_images.classes(one.config))
    for i, part in enumerate(label.split(BATCH)):
        guided = model if w is None else guidance.of_label(guidance.guided(model, w), part.to(device))
        parts.append(draw_images.draw(
            guided, (len(part), *one.config["shape"]), steps, one.config,
            run.generator(device, one.config["seed"], "sample", i), t_min=run.smallest_t(one.config),
            **{"variance": "range"} if learned else {}).cpu())
    return torch.cat(parts), label


def measure(one, w, n, steps, device, model, real):
    """Distances of n samples of a Run to the test split in the features of a classifier; guided ones: recognised."""
    x, label = draw(one, w, n, steps, device)
    seen = classifier.seen(model, x)
    return classifier.distances(seen, real()[0]) | ({} if w is None else classifier.recognised(seen, label))


def bits(one, data_dir):
    """{"bits": the bound of a Run on test images in bits/dim, its standard error}: of a chain that of its T steps."""
    if one.config["timesteps"]:
        return {"bits": reproduce_foundations_images.measure(one, data_dir)["bounds"][one.config["variance"]]}
    x = images.to_float(kind_images.load(one.config, "test", data_dir)[:BOUNDED])
    terms, _ = likelihood.evaluate(one.model(), x, one.config, draws=DRAWS, num_ode=0, batch_size=100,
                                   generator=run.generator("cpu", "bound"))
    values = terms["bound"] / (kind_images.dimension(one.config) * math.log(2))
    return {"bits": [values.mean().item(), values.std().item() / len(values)**0.5]}


def judge(study, config):
    """The classifier of a study's images, trained where it is missing; what is known of it; () -> what it has `seen`.

    That are the test split and, for the floor, as many images of the train split as there are samples.
    """
    args, path = study.args, classifier.place(study.args.data, study.args.runs)
    if not path.exists():
        classifier.main(["--data", args.data, "--data-dir", args.data_dir, "--device", args.device, "--out", str(path)])
    model, facts = classifier.of_run(path, config, study.device)
    return model, facts, functools.cache(lambda: classifier.real(model, config, args.num_samples, args.data_dir))


def measured(study, steps):
    """(Runs, {(system, w, seed): numbers}, numbers of the floor, what is known of the classifier)."""
    args, runs, found = study.args, trained(study), {}
    model, facts, real = judge(study, runs["x, mse", 0].config)
    for seed in range(args.seeds):
        for name, w, *_ in ROWS:
            file = f"poster-{steps}-{args.num_samples}-{w}-{facts['digest'][:8]}"
            one = runs[name, seed]
            found[name, w, seed] = once(one, file, measure, w, args.num_samples, steps, study.device, model, real
                                        ) | once(one, "bits", bits, args.data_dir)
            print(f"{name}, w {w}, seed {seed}: Frechet distance {found[name, w, seed]['frechet']:.2f}", flush=True)
    test, floor = real()
    return runs, found, classifier.distances(floor, test), facts


def note(study, runs, facts, steps):
    """What all systems share, in words."""
    one = runs["x, mse", 0]
    config, n = one.config, study.args.num_samples
    return (f"{study.args.data}, {'x'.join(map(str, config['shape']))}, {study.args.seeds} seeds, mean +- standard "
            f"deviation; {one.checkpoint['step']:,} steps of {config['batch_size']} images in {config['precision']} "
            f"for each network, {sum(value.numel() for value in one.checkpoint['ema'].values()):,} parameters, "
            f"averaged weights, {config['schedule']} schedule. {n:,} samples, {steps} ancestral steps, clipped, "
            f"against the test split; features of a classifier that gives {facts['accuracy']:.1%} of the test images "
            f"their label, digest {facts['digest'][:12]}. ")


def table(study, steps=STEPS):
    """The poster's table, its rows beside ours."""
    runs, found, floor, facts = measured(study, steps)
    lines = [["train split", "-", "1.12", "0.74", "-", *(f"{floor[name]:.3g}" for name in COLUMNS), "-", "-"]]
    for name, w, *poster in ROWS:
        of = [found[name, w, seed] for seed in range(study.args.seeds)]
        shown = cell([each["recognised"] for each in of]) if "recognised" in of[0] else "-"
        lines.append([name, "-" if w is None else f"{w}", *poster,
                      *(cell([each[column] for each in of]) for column in COLUMNS), shown,
                      "-" if w else cell([each["bits"][0] for each in of])])
    error = max(each["bits"][1] for each in found.values())
    return rows(["system", "w", "poster, MNIST: FID", "binarised", "NLL", "Frechet", "binarised", "KID",
                 "precision", "recall", "recognised", "bound, bits/dim"], lines) + [
        note(study, runs, facts, steps) + "Train split: as many images of it in place of the samples. Learned "
        f"variance: eps with `hybrid`, T = 1000. Bound: without a label; {BOUNDED} test images, {DRAWS} draws each, of "
        f"the chain {reproduce_foundations_images.TESTED:,} terms; standard error at most {error:.3f}. The poster's "
        "numbers are of MNIST, in Inception's features."]


def table_of_losses(study):
    """The thesis's Table 4.2 in small: x, eps and v, the weighted loss and the bound's."""
    runs, found, floor, facts = measured(study, STEPS)
    lines, seeds = [], range(study.args.seeds)
    for target, thesis in reproduce_thesis.THESIS_IMAGES.items():
        last = {loss: [runs[f"{target}, {loss}", seed].history[-1] for seed in seeds] for loss in ("mse", "nelbo")}
        of = lambda loss, what: cell([each[f"test_{what}"] for each in last[loss]])             # noqa: B023
        frechet = {loss: cell([found[f"{target}, {loss}", None, seed]["frechet"] for seed in seeds]) for loss in last}
        lines.append([target, f"{thesis[2]:.2f}", of("mse", "mse"), f"{thesis[0]:.2f}", of("nelbo", "nelbo_stable"),
                      of("mse", "nelbo"), of("nelbo", "nelbo"), f"{thesis[3]:.2f}", frechet["mse"], f"{thesis[1]:.2f}",
                      frechet["nelbo"]])
    return rows(["target", "weighted loss: thesis", "ours", "NELBO, thesis's units: thesis", "ours",
                 "exact NELBO, trained with `mse`", "with `nelbo`", "weighted: thesis's FID", "our Frechet",
                 "NELBO: thesis's FID", "our Frechet"], lines) + [
        note(study, runs, facts, STEPS) + "Exact NELBO in nats per dimension, t in [0.001, 0.999]; in the thesis's "
        "units it is `nelbo_stable` (ERRATA.md, entry 8), of networks trained on the exact one. Floor of the Frechet "
        f"distance: {floor['frechet']:.2f}. The thesis's numbers are of CIFAR-10, its FID is of Inception's features."]


def fig_samples(study, path):
    """Samples of each row of the table, from left to right and from top to bottom; guided ones of labels 0, 1, ..."""
    runs = trained(study)
    panels = [images.grid(draw(runs[name, 0], w, SHOWN, STEPS, study.device)[0], 8) for name, w, *_ in ROWS]
    images.save_png(images.grid(torch.stack(panels), 3, border=6), path)


RESULTS = {
    "poster-images": (table, "the poster's table on images: distances and bound; --data, --budget"),
    "poster-images-500": (functools.partial(table, steps=500), "the same with 500 steps of the sampler"),
    "poster-samples": (fig_samples, "samples of each row of poster-images, three rows of the table a line"),
    "table4.2-small": (table_of_losses, "thesis, Table 4.2 in small, without Inception; --data, --budget"),
}
TABLES = "poster-images", "poster-images-500", "table4.2-small"
