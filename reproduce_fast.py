"""The table `fast`: the networks of Table 4.1 by two recipes side by side, and what the fast one does to v.

Part of `reproduce_beyond.py`. Read `muon.py` and `recipes.py` first. Both recipes of a dataset are trained one after
the other, so that the ratio of their times is one of one machine under one load.

Not here: how the recipe was found.
"""
import math
import statistics

from datasets2d import FOUR
from recipes import FAST_EPOCHS
from reproduce_spaces import SAMPLER, nelbo_gap
from reproduce_weightings import exact_gap
from study import TARGETS, cell, floor, gaps, rows

LOSSES = "mse", "nelbo_stable"


def both(study):
    """{"thesis", "fast": Runs of all sets}: 32 networks a seed each."""
    found = {"thesis": {}, "fast": {}}
    for data in FOUR:
        found["thesis"] |= study.trained("stabilised", data=[data], fast=False)
        found["fast"] |= study.trained("stabilised", data=[data], epochs=FAST_EPOCHS, fast=True)
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
        f"thesis: {study.args.epochs} epochs of Adam, batches of 512; fast: {FAST_EPOCHS} epochs of Muon, batches of "
        f"1,024, products in bf16. {study.args.seeds} seeds. NELBO gap: nats per dimension; exact NLL gap: of the "
        f"flow, nats. {study.args.num_samples:,} samples by {SAMPLER[1]}, {SAMPLER[0]} evaluations, grid {SAMPLER[2]}."]


RESULTS = {"fast": (fast, "the networks of Table 4.1 by two recipes: distance from the optimum, time, v's likelihoods")}
TABLES = ("fast",)
