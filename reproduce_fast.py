"""The networks of Table 4.1 by two recipes side by side, and the sweep that the fast one was chosen from.

Part of `reproduce_beyond.py`. Read `muon.py`, `stable_targets.py` and `recipes.py` first. Both recipes of a dataset are
trained one after the other, so that the ratio of their times is one of one machine under one load.
"""
import math
import statistics

from datasets2d import FOUR
from recipes import FAST_EPOCHS, SWEEP
from reproduce_spaces import SAMPLER, nelbo_gap
from reproduce_weightings import exact_gap
from study import TARGETS, cell, floor, gaps, rows

LOSSES = "mse", "nelbo_stable"
SWEPT = dict(data=["rings"], target=["x", "eps"])


def both(study):
    """{"thesis", "fast": Runs of all sets}: 32 networks a seed each."""
    found = {"thesis": {}, "fast": {}}
    for data in FOUR:
        found["thesis"] |= study.trained("side-by-side", data=[data], fast=False)
        found["fast"] |= study.trained("side-by-side", data=[data], epochs=FAST_EPOCHS, fast=True)
    return found


def excess(one):
    """Test loss of a Run above the best possible."""
    return one.history[-1]["test_loss"] - one.history[-1]["optimum"]


def fast(study):
    """How far from the optimum both recipes end, in how much time; bound, exact NLL and samples of v with `mse`."""
    runs, seeds, ratios = both(study), range(study.args.seeds), []
    header, lines = ["data, target"], []
    for loss in LOSSES:
        header += [f"`{loss}`", "fast"]
    for data in FOUR:
        for target in TARGETS:
            line = [f"{data}, {target}"]
            for loss in LOSSES:
                thesis, quick = ([excess(of[data, target, loss, seed]) for seed in seeds] for of in runs.values())
                ratios.append(statistics.mean(quick) / statistics.mean(thesis))
                line += [cell([1000 * value for value in values]) for values in (thesis, quick)]
            lines.append(line)
    seconds = {recipe: sum(one.history[-1]["seconds"] for one in of.values()) for recipe, of in runs.items()}
    text = ["**1,000 times the test loss minus the best possible**", "", *rows(header, lines),
            f"Of {len(ratios)} test losses {sum(ratio <= 1 for ratio in ratios)} are no farther from the best possible "
            f"with the fast recipe; ratio of the distances: geometric mean "
            f"{math.exp(statistics.mean(math.log(max(ratio, 1e-9)) for ratio in ratios)):.2f}, at most "
            f"{max(ratios):.2f}. Training: {seconds['thesis'] / 60:.1f} and {seconds['fast'] / 60:.1f} minutes, a "
            f"ratio of {seconds['fast'] / seconds['thesis']:.2f}.", ""]

    lines = []
    for recipe, of in runs.items():
        of_v = {key: one for key, one in of.items() if key[1:3] == ("v", "mse")}
        nelbo = study.measured(of_v, "nelbo gap", nelbo_gap, "nelbo-gap")
        exact, samples = study.measured(of_v, "exact", exact_gap, "exact-gap"), study.sampled(of_v, *SAMPLER)
        for data in FOUR:
            keys = [(data, "v", "mse", seed) for seed in seeds]
            lines.append([f"{data}, {recipe}", cell([nelbo[key]["gap"] for key in keys]),
                          cell([exact[key]["exact gap"][0] for key in keys]),
                          cell([samples[key]["sliced_wasserstein"] for key in keys]),
                          floor(samples[keys[0]], "sliced_wasserstein"), cell(gaps([samples[key] for key in keys]))])
    lines.sort(key=lambda line: FOUR.index(line[0].split(",")[0]))
    return text + ["**`v` with `mse`**", "", *rows(
        ["data, recipe", "NELBO gap", "exact NLL gap", "sliced Wasserstein", "floor", "log-density gap"], lines),
        f"thesis: {study.args.epochs} epochs of Adam; fast: {FAST_EPOCHS} epochs of Muon, products in bf16, stable "
        f"targets, t where the loss is large. {study.args.seeds} seeds. NELBO gap: nats per dimension; exact NLL gap: "
        f"of the flow, nats. {study.args.num_samples:,} samples by {SAMPLER[1]}, {SAMPLER[0]} evaluations, grid "
        f"{SAMPLER[2]}."]


def sweep(study):
    """Distance from the optimum and time of the trainings `recipes.SWEEP`, over those of the thesis's recipe."""
    data, seeds, lines, found = SWEPT["data"], range(study.args.seeds), [], {}
    for name, (epochs, options) in SWEEP.items():
        epochs = max(1, epochs * study.args.epochs // 100)
        found[name] = epochs, options, study.trained(f"sweep-{name}", **SWEPT, epochs=epochs, fast=False)
    of_thesis = found["thesis"][2]
    seconds = lambda runs: sum(one.history[-1]["seconds"] for one in runs.values())
    for epochs, options, runs in found.values():
        words = " ".join(options if "muon" in options else ["Adam", *options])
        line = [words.replace("--optimizer muon", "Muon").replace("--", ""), str(epochs)]
        for loss in LOSSES:
            distances = [statistics.mean(excess(runs[data[0], target, loss, seed]) for seed in seeds)
                         / statistics.mean(excess(of_thesis[data[0], target, loss, seed]) for seed in seeds)
                         for target in SWEPT["target"]]
            line.append(", ".join(f"{value:.2f}" for value in distances))
        lines.append([*line, f"{seconds(runs) / seconds(of_thesis):.2f}"])
    return rows(["trained with", "epochs", *(f"distance with `{loss}`" for loss in LOSSES), "time"], lines) + [
        f"{data[0]}, targets {' and '.join(SWEPT['target'])}, {study.args.seeds} seeds. Distance: test loss minus the "
        "best possible, over that of the first row; time: of training and its tests, over that of the first row, one "
        "row after the other. Rates not said are 0.001 and decay to 0 as a cosine, batches 512, products in float32."]


RESULTS = {
    "fast":  (fast, "the networks of Table 4.1 by two recipes: distance from the optimum, time, v's likelihoods"),
    "sweep": (sweep, "what the fast recipe was chosen from: distance from the optimum and time, the rings"),
}
TABLES = tuple(RESULTS)
