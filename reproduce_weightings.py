"""Weightings times targets: is one weighting best for likelihood and samples, and what is left of the target?

Part of `reproduce_vdm.py`, which says what the functions are. Every loss has one w(log-SNR) and t is uniform on the
cosine schedule, so that x, eps and v are trained on one functional with one density of log-SNR: only the
parameterisation differs. Read `weightings.py` and `reproduce_spaces.py` first.

Not here: which weight is which (`python weightings.py`).
"""
import math
import statistics

import likelihood
import reproduce_spaces
import tables
from datasets2d import DATASETS, FOUR
from kind_points import test_examples
from study import cell, floor, rows

TARGETS = "x", "eps", "v"
OF_WEIGHTINGS = "nelbo", "sigmoid", "min_snr", "p2", "edm", "edm_monotonic"     # of the recipe; the others of `spaces`
LOSSES = (*OF_WEIGHTINGS, "simple", "v_space", "u_space", "rescaled")
FALLS = {"nelbo", "sigmoid", "edm_monotonic", "v_space", "u_space", "rescaled"}         # w nowhere rises with log-SNR
TESTED, ODE_STEPS = 1000, 32           # points of the flow


def exact_gap(one):
    """-log p of a Run's flow minus that of the data on the same test points, nats: its mean and standard error."""
    x = test_examples(one.config, TESTED, "cpu").float()
    try:
        log_p, _ = likelihood.log_likelihood(one.model(), x, target=one.target, schedule=one.schedule, steps=ODE_STEPS,
                                             stabiliser=one.config["stabiliser"])
    except ValueError:                     # of a table of many this is a result, too
        return {"exact gap": [None, None]}
    return {"exact gap": tables.mean_and_error(DATASETS[one.config["data"]].log_prob(x) - log_p)}


OF_SAMPLES = {"mean distance": "mean_distance", "covariance distance": "covariance_distance",
              "sliced Wasserstein": "sliced_wasserstein"}
MEASURES = "NELBO gap", "exact NLL gap", *OF_SAMPLES


def measured(study):
    """{measure: {key: number}} of all networks, and all that was measured of their samples."""
    runs = (study.trained("weightings", None, FOUR, [*TARGETS])
            | reproduce_spaces.trained(study, TARGETS, [name for name in LOSSES if name not in OF_WEIGHTINGS]))
    gaps, samples = reproduce_spaces.measured(study, runs)
    exact = study.measured(runs, "exact", exact_gap, f"exact-{TESTED}-{ODE_STEPS}")
    return {"NELBO gap": {key: found["gap"] for key, found in gaps.items()},
            "exact NLL gap": {key: found["exact gap"][0] for key, found in exact.items()},
            **{title: {key: found[name] for key, found in samples.items()} for title, name in OF_SAMPLES.items()}
            }, samples


def over_sets(study, values, target, loss):
    """Of each seed the mean over the four sets; infinite if one of them diverges."""
    return [statistics.mean(math.inf if (value := values[data, target, loss, seed]) is None else value
                            for data in FOUR) for seed in range(study.args.seeds)]


def names(losses):
    return [f"`{loss}`" + ("" if loss in FALLS else " (rises)") for loss in losses]


def best_of(values):
    """The names whose mean is least, and those that the seeds do not tell from it. values: {name: of the seeds}.

    Not told apart: the means differ by less than the root of the sum of both variances.
    """
    values = {name: [math.inf if value is None else value for value in c] for name, c in values.items()}
    mean = {name: statistics.mean(c) for name, c in values.items()}
    var = {name: statistics.variance(c) if len(c) > 1 and math.isfinite(mean[name]) else 0.0
           for name, c in values.items()}
    first = min(mean, key=mean.get)
    return [first, *(name for name in sorted(mean, key=mean.get)
                     if name != first and mean[name] - mean[first] < (var[name] + var[first])**0.5)]


def target_left(study, values, loss):
    """Largest over least of the three targets' means over sets and seeds: 1 if nothing is left of the target."""
    return worst_over_best([statistics.mean(over_sets(study, values, target, loss)) for target in TARGETS])


def seeds_left(study, values, loss):
    """The same of the seeds of a target, mean over the targets: how far from 1 chance alone is."""
    found = [over_sets(study, values, target, loss) for target in TARGETS]
    return statistics.mean(map(worst_over_best, found))


def worst_over_best(values):
    """Of gaps or distances; infinite where the best is at the optimum, 0, or by chance below it."""
    return max(values) / min(values) if min(values) > 0 else math.inf


def ratio(value):
    """As a cell of a table: fewer digits of a large one, as in `study.cell`."""
    return "-" if not math.isfinite(value) else f"{value:.2f}" if abs(value) < 100 else f"{value:.0f}" \
        if abs(value) < 1e6 else f"{value:.0e}"


def weightings(study):
    """Ten losses and three targets: likelihoods and samples, which loss is best, what is left of the target."""
    found, samples = measured(study)
    text, seeds = [], range(study.args.seeds)
    for target in TARGETS:
        lines = [[name, *(cell(over_sets(study, found[measure], target, loss)) for measure in MEASURES)]
                 for name, loss in zip(names(LOSSES), LOSSES)]
        text += [f"**{target}, mean over the four sets**", "", *rows(["loss", *MEASURES], lines)]
    lines = []
    for data in FOUR:
        for target in TARGETS:
            best = [best_of({loss: [found[measure][data, target, loss, seed] for seed in seeds] for loss in LOSSES})
                    for measure in MEASURES]
            everywhere = [loss for loss in LOSSES if all(loss in of for of in best)]
            lines.append([f"{data}, {target}" + (f": {', '.join(everywhere)} in all" if everywhere else ""),
                          *(of[0] + (f" ({', '.join(of[1:])})" if of[1:] else "") for of in best)])
    text += ["**The best loss, and in brackets those that the seeds do not tell from it**", "",
             *rows(["data, target", *MEASURES], lines)]
    lines = [[name, *("{} ({})".format(ratio(target_left(study, found[measure], loss)),
                                       ratio(seeds_left(study, found[measure], loss))) for measure in MEASURES)]
             for name, loss in zip(names(LOSSES), LOSSES)]
    text += ["**What is left of the target: the worst target's number over the best's, in brackets the same of seeds**",
             "", *rows(["loss", *MEASURES], lines)]
    floors = "; ".join("{}: {}".format(data, ", ".join(floor(samples[data, "x", "nelbo", 0], name)
                                                for name in OF_SAMPLES.values())) for data in FOUR)
    return text + [
        f"{study.args.seeds} seeds, mean +- standard deviation, {study.args.epochs} epochs, cosine schedule, t uniform."
        " The targets of a row have one w(log-SNR) and one density of log-SNR. rises: its w does somewhere, with "
        "log-SNR. NELBO gap: to the exact denoiser, nats per dimension, 200,000 points. Exact NLL gap: -log p of the "
        f"flow minus that of the data, nats, {TESTED:,} points. {study.args.num_samples:,} samples by dpmpp with 64 "
        f"evaluations on grid logsnr; perfect samples have, in the columns' order: {floors}. Told apart: means that "
        "differ by more than the root of the sum of both variances."]


RESULTS = {"weightings": (weightings, "ten losses times three targets: likelihoods, samples, what the target adds")}
