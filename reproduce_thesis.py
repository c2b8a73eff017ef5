"""The thesis's tables and figures, those of points beside their optimum: Table 4.1, 4.2, Fig. 3.2 - 4.14, appendix.

Functions of a `study.Study` return the lines of a table, functions of a Study and a path draw a figure: see RESULTS.

Not here: what they show; that is written in results/thesis/README.md for the committed runs.
"""
import itertools
import json
import statistics
from pathlib import Path

import numpy as np
import torch

import ddpm
import losses
import metrics
import optimum
import plots
import run
import sample
import train
from datasets2d import DATASETS, FOUR
from study import STEPS, TARGETS, cell, exact_nelbo, floor, gaps, rows

IMAGE_STEPS = 500    # thesis 4.4.4
DISTANCES = "mean_distance", "covariance_distance"

# Thesis, Table 4.1: loss, mean distance, covariance distance with the NELBO, then with the weighted loss.
THESIS = {(row.split()[0], row.split()[1]): [float(number) for number in row.split()[2:]] for row in """\
    clusters   x    0.6777 0.1754 0.5746   0.4754 0.4300 0.2715
    clusters   eps  2.3636 0.0364 0.0706   0.3522 0.0634 0.1430
    clusters   v    2.5396 0.0307 0.0409   0.8264 0.0389 0.0363
    clusters   s    0.7657 0.2279 0.1498   2.6934 0.2688 0.1633
    rings      x    0.8785 0.2744 0.3807   0.4932 0.2807 0.3974
    rings      eps  2.5700 0.0914 0.1107   0.4266 0.0983 0.0366
    rings      v    2.5452 0.0459 0.0718   0.9227 0.0453 0.0088
    rings      s    0.9577 0.2254 0.1563   3.0981 0.2220 0.1637
    swiss_roll x    0.8640 0.1133 0.2645   0.4934 0.5256 0.6875
    swiss_roll eps  2.5324 0.0689 0.0941   0.4261 0.0857 0.0824
    swiss_roll v    2.4861 0.0418 0.0598   0.9171 0.0427 0.0269
    swiss_roll s    0.9493 0.1266 0.1972   3.0274 0.0893 0.1227
    waves      x    0.9104 0.1593 0.5559   0.4939 0.1869 0.6911
    waves      eps  2.6805 0.0405 0.0757   0.4500 0.0748 0.0778
    waves      v    2.6873 0.0447 0.0738   0.9411 0.0131 0.0271
    waves      s    1.0210 0.0353 0.1369   3.4165 0.0178 0.1676""".splitlines()}

# Thesis, Table 4.2: NELBO and its FID, weighted loss and its FID.
THESIS_IMAGES = {"x": (0.09, 13.54, 0.05, 16.96), "eps": (0.84, 24.26, 0.06, 13.75), "v": (0.86, 18.18, 0.12, 18.24)}


def agreement(deviations):
    """How many test losses are the thesis's, and which not. deviations: {(data, target, loss): ours / thesis - 1}."""
    far = [f"{' '.join(key)} {100 * value:+.1f} %" for key, value in deviations.items() if abs(value) > 0.05]
    return [f"{len(deviations) - len(far)} of {len(deviations)} test losses lie within 5 % of the thesis's"
            + (f"; the others: {', '.join(far)}" if 0 < len(far) < 5 else "") + ".", ""]


def table4_1(study):
    """Thesis, Table 4.1, and the exact NELBO of every network."""
    stabilised, args = study.trained("stabilised"), study.args
    results = study.sampled(stabilised, STEPS[-1])
    seeds, text = range(args.seeds), []
    for title, loss, column in (("NELBO, stabilised as in the thesis (`nelbo_stable`)", "nelbo_stable", 0),
                                ("Weighted loss (`mse`)", "mse", 3)):
        lines = []
        for (data, target), thesis in THESIS.items():
            keys = [(data, target, loss, seed) for seed in seeds]
            made, last = [results[key] for key in keys], [stabilised[key].history[-1] for key in keys]
            line = [data, target, f"{thesis[column]:.3f}", cell([h["test_loss"] for h in last]),
                    f"{last[0]['optimum']:.3f}"]
            for name, value in zip(DISTANCES, thesis[column + 1:]):
                line += [f"{value:.3f}", cell([r[name] for r in made]), floor(made[0], name)]
            lines.append([*line, cell(gaps(made))])
        text += [f"**{title}**", ""] + rows(
            ["data", "target", "test loss: thesis", "ours", "best possible", "mean dist.: thesis", "ours", "floor",
             "covar. dist.: thesis", "ours", "floor", "log-density gap"], lines)
    text += agreement({
        (data, target, loss): statistics.mean(stabilised[data, target, loss, seed].history[-1]["test_loss"]
                                              for seed in seeds) / THESIS[data, target][column] - 1
        for data, target in THESIS for loss, column in (("nelbo_stable", 0), ("mse", 3))})
    exact, more = exact_tables(study)
    text += more
    training = sum(one.history[-1]["seconds"] for runs in (stabilised, exact) for one in runs.values())
    sampling = "" if args.recorded else f", sampling {sum(r['seconds'] for r in results.values()) / 60:.1f} min"
    text += [f"{len(stabilised) + len(exact)} networks, {args.epochs} epochs, {args.seeds} seeds; training "
             f"{training / 60:.1f} min{sampling}. {args.num_samples:,} samples in {STEPS[-1]} "
             "steps against 50,000 points of the data; mean +- standard deviation over the seeds. The log-density "
             "gap, of samples to data, in nats: below 0 off the data, above 0 too sharp."]
    return text


EXACT_TABLES = [  # heading, columns: (recipe, loss, title)
    ("Exact NELBO of every model, whatever it was trained on", [
        ("stabilised", "mse", "trained with `mse`"), ("stabilised", "nelbo_stable", "with `nelbo_stable`"),
        ("exact", "nelbo", "with `nelbo`")]),
    ("The same of networks trained with exact weights, t in [0.001, 0.999] and d = 0", [
        ("plain", "mse", "`mse`, t uniform"), ("exact", "nelbo", "`nelbo`, t uniform"),
        ("logsnr", "nelbo", "`nelbo`, log-SNR uniform")]),
]


def exact_tables(study):
    """The runs with exact weights, and the two tables of the exact NELBO."""
    columns = {(recipe, loss) for _, columns in EXACT_TABLES for recipe, loss, _ in columns}
    runs = {recipe: study.trained(recipe) for recipe in dict.fromkeys(recipe for recipe, _ in sorted(columns))}
    found, errors, best = {}, [], {}
    for data, target in THESIS:
        if target == TARGETS[0]:
            best[data] = exact_nelbo(DATASETS[data].optimal_model("eps", ddpm.SCHEDULES["cosine"]), "eps", data)
        for recipe, loss in columns:
            values = [study.exact_nelbo(runs[recipe], (data, target, loss, seed), best[data])
                      for seed in range(study.args.seeds)]
            found[data, target, recipe, loss] = cell([value for value, _ in values])
            errors += [(value - best[data].mean().item(), error) for value, error in values]
    level = {data: f"{c.mean():.3f} +- {c.std().item() / len(c)**0.5:.3f}" for data, c in best.items()}
    text = []
    for title, columns in EXACT_TABLES:
        text += [f"**{title}**, nats per dimension, t in [0.001, 0.999]", ""]
        text += rows(["data", "target", *(column for _, _, column in columns), "best possible"],
                     [[data, target, *(found[data, target, recipe, loss] for recipe, loss, _ in columns), level[data]]
                      for data, target in THESIS])
    near, far = [e for gap, e in errors if gap < 1], [e / gap for gap, e in errors if gap >= 1]
    text += ["All models of a dataset are tested on the same 200,000 points, t uniform in log-SNR; the last column has "
             "the Monte Carlo error of the level, which they share. That of a model's distance from the best possible "
             "is " + " and ".join([f"at most {max(near):.4f} where this is below 1 nat"] * bool(near)
                            + [f"at most {100 * max(far):.0f} % of it elsewhere"] * bool(far))
             + ". In the first table `mse` and `nelbo_stable` were trained with t in [1e-6, 1 - 1e-6] and d = 0.01, "
             "`nelbo` with t in [0.001, 0.999] and d = 0.", ""]
    return {(recipe, *key): one for recipe in ("exact", "plain", "logsnr") for key, one in runs[recipe].items()}, text


def table4_2(study):
    """Thesis, Table 4.2: six runs of equally many steps share the budget; what is no option here goes to train.py."""
    args = study.args
    root = Path(args.runs) / f"table4.2-{Path(args.data).resolve().name}-{args.budget:g}-minutes"
    argv = ["--data", args.data, "--target", *THESIS_IMAGES, "--loss", "mse", "nelbo",
            "--minutes", str(args.budget / 6), "--out", str(root), "--device", args.device,
            "--data-dir", args.data_dir, "--resume", *args.more]
    train.main(argv)
    at_hand = args.inception_weights or metrics.downloaded_weights().exists()
    n = args.num_samples if at_hand else 64
    fid = (["--fid", *(["--inception-weights", args.inception_weights] if args.inception_weights else [])]
           if at_hand else [])
    folder = lambda target, loss: root / f"{Path(args.data).resolve().name}-{target}-{loss}-s0"
    folders = [str(folder(target, loss)) for target in THESIS_IMAGES for loss in ("mse", "nelbo")]
    sample.main(["--ckpt", *folders, "--steps", str(IMAGE_STEPS), "--num-samples", str(n), "--data-dir", args.data_dir,
                 "--device", args.device, *fid])
    lines = []
    for target, thesis in THESIS_IMAGES.items():
        last = {loss: run.open(folder(target, loss)).history[-1] for loss in ("mse", "nelbo")}
        drawn = {loss: json.loads((folder(target, loss) / "metrics.json").read_text()) for loss in last}
        fids = [f"{drawn[loss]['fid']:.2f}" if "fid" in drawn[loss] else "-" for loss in last]
        lines.append([target, f"{thesis[2]:.2f}", f"{last['mse']['test_mse']:.4f}", f"{thesis[0]:.2f}",
                      f"{last['nelbo']['test_nelbo_stable']:.4f}",
                      *(f"{last[loss]['test_nelbo']:.4f}" for loss in last),
                      f"{thesis[3]:.2f}", fids[0], f"{thesis[1]:.2f}", fids[1]])
    first = run.open(folders[0])
    config, parameters = first.config, sum(value.numel() for value in first.checkpoint["ema"].values())
    header = ["target", "weighted loss: thesis", "ours", "NELBO, thesis's units: thesis", "ours",
              "exact NELBO, trained with `mse`", "with `nelbo`", "FID, weighted: thesis", "ours", "FID, NELBO: thesis",
              "ours"]
    note = (f"{args.data}, {'x'.join(map(str, config['shape']))}, test split, averaged weights, one seed. "
            f"{parameters:,} parameters, {first.checkpoint['step']:,} steps of {config['batch_size']} images in "
            f"{config['precision']} for each of six runs, {first.checkpoint['seconds'] / 60:.1f} minutes for the "
            "first. Exact NELBO in nats per dimension, t in [0.001, 0.999]; in the thesis's units it is "
            "`nelbo_stable` (ERRATA.md, entry 8), of networks trained on the exact one. ")
    note += (f"FID of {n:,} images, {IMAGE_STEPS} ancestral steps, clipped, against the train split." if at_hand else
             "No FID: Inception's weights are not at hand, see python sample.py --help.")
    return rows(header, lines) + [note]


def fig3_2(study, path):
    t = torch.linspace(0.001, 0.999, 500, dtype=torch.float64)
    plots.over_time({name: ddpm.SCHEDULES[name].logsnr(t) for name in ("cosine", "linear", "ve")}, t, path)


def fig4_1(study, path):
    plots.scatter({name: DATASETS[name].sample(50_000, run.generator("cpu", name)) for name in FOUR}, path, 50_000)


def fig4_2(study, path):
    times, panels = [0.0, 0.1, 0.2, 0.4, 0.6, 0.8, 1.0], {}
    for name in FOUR:
        g = run.generator("cpu", name)
        x, eps = DATASETS[name].sample(2000, g), torch.randn(2000, 2, generator=g)
        for t in times:
            z = ddpm.q_sample(x, torch.full((2000,), t), eps, ddpm.SCHEDULES["cosine"])
            panels[name, f"t = {t}"] = z, ""
    plots.point_grid(panels, path)


def over_epochs(study, runs, loss, key):
    """{data: {target: (values (seeds, epochs), optimum)}} of what the history calls `key`."""
    optimum = key.replace("test", "optimum") if key != "test_loss" else "optimum"
    return {data: {target: (np.array([study.curve(runs, (data, target, loss, seed), key)
                                      for seed in range(study.args.seeds)]),
                            runs[data, target, loss, 0].history[-1][optimum]) for target in TARGETS}
            for data in FOUR}


def fig4_8(study, path):
    runs = study.trained("stabilised", ["mse"])
    plots.loss_curves({"weighted test loss": over_epochs(study, runs, "mse", "test_loss"),
                       "rescaled test loss": over_epochs(study, runs, "mse", "test_rescaled")}, path)


def fig4_9(study, path):
    runs = study.trained("stabilised", ["nelbo_stable"])
    plots.loss_curves({"stabilised NELBO": over_epochs(study, runs, "nelbo_stable", "test_loss")}, path)


def fig4_10(study, path):
    t, schedule = torch.linspace(0.001, 0.999, 500, dtype=torch.float64), ddpm.SCHEDULES["cosine"]
    plots.scalings({"exact, Table 3.2": {target: 2 * losses.weight("nelbo", target, t, schedule) for target in TARGETS},
                    "stabilised, d = 0.01": {target: losses.weight("nelbo_stable", target, t, schedule)
                                             for target in TARGETS}}, t, path)


def fig4_11(study, path):
    """Variance over samples at equal t, in 20 bins of t: E[e^2] - E[e]^2 of the squared error e."""
    variance = lambda e, t: losses.over_t(e**2, t, 1e-6) - losses.over_t(e, t, 1e-6)**2
    runs, panels = study.trained("stabilised", ["mse"]), {}
    for data, target in THESIS:
        curves = []
        for seed in range(study.args.seeds):
            one = runs[data, target, "mse", seed]
            z, t, y, _ = optimum.test_batch(one.config)
            curves.append(variance(losses.weighted_error(one.model()(z, t), y, torch.ones_like(t)), t))
        best = variance(optimum.optimal_errors(data, target, "cosine", 1e-6, 0.01), t)
        panels.setdefault(data, []).append((target, target, torch.stack(curves), best))
    plots.over_t(panels, "variance of the weighted loss", path)


def points_of(result):
    """2,000 of the points that were drawn."""
    return np.load(result["folder"] / "samples.npy")[:2000]


LOSSES = {"weighted": "mse", "NELBO": "nelbo_stable"}          # what the panels call them


def fig4_12(study, path):
    results, panels = study.sampled(study.trained("stabilised"), STEPS[-1]), {}
    for data in FOUR:
        panels[data, "data"] = DATASETS[data].sample(2000, run.generator("cpu", data)), ""
        for title, target in itertools.product(LOSSES, TARGETS):
            panels[data, f"{target}, {title}"] = points_of(results[data, target, LOSSES[title], 0]), ""
    plots.point_grid(panels, path)


def over_steps(data):
    def figure(study, path):
        runs = {key: one for key, one in study.trained("stabilised", data=[data]).items() if key[3] == 0}
        results, panels = {n: study.sampled(runs, n) for n in STEPS}, {}
        for title, target, n in itertools.product(LOSSES, TARGETS, STEPS):
            result = results[n][data, target, LOSSES[title], 0]
            panels[f"{target}, {title}", f"{n} steps"] = (
                points_of(result), "{mean_distance:.2f}, {covariance_distance:.2f}".format(**result))
        plots.point_grid(panels, path)
    return figure


def loss_over_t(data):
    def figure(study, path):
        runs, panels, last = study.trained("stabilised", ["mse"], [data]), {}, study.args.epochs
        t = optimum.test_batch(runs[data, "x", "mse", 0].config)[1]
        for target in TARGETS:
            best = losses.over_t(optimum.optimal_errors(data, target, "cosine", 1e-6, 0.01), t, 1e-6)
            keys = [(data, target, "mse", seed) for seed in range(study.args.seeds)]
            panels[target] = [(f"epoch {epoch}", target,
                               torch.tensor([study.over_t(runs, key, epoch) for key in keys]), best)
                              for epoch in sorted({1, max(1, last // 10), last})]
        plots.over_t(panels, f"weighted train loss, {data}", path)
    return figure


BELOW = "at 2 to 512 steps, mean and covariance distance below each panel"
RESULTS = {  # name: (function, what it is)
    "table4.1":  (table4_1, "loss and sample quality of every dataset, target and loss"),
    "table4.2":  (table4_2, "losses and FID of images for x, eps and v"),
    "fig3.2":    (fig3_2, "log-SNR of the three schedules"),
    "fig4.1":    (fig4_1, "the four datasets, 50,000 points each"),
    "fig4.2":    (fig4_2, "their diffusion with the cosine schedule"),
    "fig4.8":    (fig4_8, "weighted and rescaled test losses over epochs"),
    "fig4.9":    (fig4_9, "NELBO over epochs, stabilised as in the thesis"),
    "fig4.10":   (fig4_10, "SNR scalings 1/w(t), exact and stabilised"),
    "fig4.11":   (fig4_11, "variance of the weighted loss over t"),
    "fig4.12":   (fig4_12, "2,000 samples at 512 steps, every dataset, target and loss"),
    "fig4.13":   (over_steps("rings"), f"samples of the rings {BELOW}"),
    "fig4.14":   (loss_over_t("rings"), "weighted train loss over t at three epochs, rings"),
    "appendix1": (loss_over_t("clusters"), "weighted train loss over t at three epochs, clusters"),
    "appendix2": (loss_over_t("swiss_roll"), "weighted train loss over t at three epochs, Swiss roll"),
    "appendix3": (loss_over_t("waves"), "weighted train loss over t at three epochs, waves"),
    "appendix4": (over_steps("clusters"), f"samples of the clusters {BELOW}"),
    "appendix5": (over_steps("swiss_roll"), f"samples of the Swiss roll {BELOW}"),
    "appendix6": (over_steps("waves"), f"samples of the waves {BELOW}"),
}
TABLES = "table4.1", "table4.2"
