"""The table `few`: v in 4 to 16 function evaluations, every sampler beside the floor and the exact denoiser.

Networks of two recipes: those of the fast one are nearer to the exact denoiser.

Not here: the samplers and grids (`multistep.py`, `grids.py`), what the table shows (results/beyond/README.md).
"""
import itertools
import statistics

import ddpm
import kind_points
import metrics
import run
import samplers
from datasets2d import DATASETS, FOUR
from recipes import FAST_EPOCHS
from study import KEPT, cell, floor, gaps, rows

NUMBERS = [4, 6, 8, 10, 12, 16]
SAMPLERS = ["ancestral", "ddim", "heun", "dpmpp", "dpmpp3m", "unipc", "unipc3", "ipndm", "sde_dpmpp"]
GRIDS = ["t", "optimal"]                 # of the cosine schedule t is angle; the others need more steps (`steps`)
DISTANCES = [distance.__name__ for distance in metrics.DISTANCES]
SLOW = "ancestral", "t", 512
SHOWN = ("unipc", "optimal"), ("ipndm", "optimal")                       # of the fast recipe, each number
WAYS = [*itertools.product(SAMPLERS, GRIDS, NUMBERS), SLOW]
WITHIN = 0.05                            # nats


def way_name(sampler, grid, steps):
    """As runs.jsonl has it."""
    return f"{sampler} {grid} {steps}"


def exact(data, seed, num_samples, device):
    """What is measured of samples of the exact denoiser, with a network's noise of that seed -> {way: numbers}."""
    schedule, found = ddpm.SCHEDULES["cosine"], {}
    for sampler, grid, n in WAYS:
        x = samplers.sample(DATASETS[data].optimal_model("v", schedule), (num_samples, 2), n, target="v",
                            schedule=schedule, sampler=sampler, grid=grid,
                            generator=run.generator(device, seed, "sample")).cpu()
        measured = kind_points.measure(dict(data=data), x)
        found[way_name(sampler, grid, n)] = [measured[name] for name in KEPT]
    return found


def is_at_floor(found):
    """Are all distances at most two deviations above their floor?"""
    return all(statistics.mean(result[name] for result in found)
               <= found[0][f"{name}_floor"]["mean"] + 2 * found[0][f"{name}_floor"]["std"] for name in DISTANCES)


def is_as_slow(found, slow):
    """And is the log-density gap at most WITHIN from that of `slow`?"""
    return is_at_floor(found) and abs(statistics.mean(gaps(found)) - statistics.mean(gaps(slow))) <= WITHIN


def few(study):
    """How few evaluations, and what they give."""
    args, seeds, results = study.args, range(study.args.seeds), {}
    runs = study.trained("stabilised", ["mse"], FOUR, ["v"])
    fast = study.trained("stabilised", ["mse"], FOUR, ["v"], epochs=FAST_EPOCHS, fast=True)
    of_exact = study.measured(
        runs, "exact", lambda one: exact(one.config["data"], one.config["seed"], args.num_samples, study.device),
        f"exact-{args.num_samples}")
    for sampler, grid, n in WAYS:
        drawn, of_fast = (study.sampled(some, n, sampler, grid) for some in (runs, fast))
        for data in FOUR:
            keys = [(data, "v", "mse", seed) for seed in seeds]
            results[data, sampler, grid, n] = [[drawn[key] for key in keys], [of_fast[key] for key in keys], [
                study.with_floor(data, of_exact[key], way_name(sampler, grid, n)) for key in keys]]
    text = []
    for title, reached in {
            "At the floor": lambda data, which, *way: is_at_floor(results[data, *way][which]),
            f"And the log-density is that of {SLOW[2]} steps": lambda data, which, *way: is_as_slow(
                results[data, *way][which], results[data, *SLOW][which])}.items():
        lines = [[sampler, grid, *(" / ".join(str(sum(reached(data, which, sampler, grid, n) for data in FOUR))
                                              for which in range(3)) for n in NUMBERS)]
                 for sampler, grid in itertools.product(SAMPLERS, GRIDS)]
        text += [f"**{title}**: so many of the four sets, networks of v / of the fast recipe / exact denoiser", "",
                 *rows(["sampler", "grid", *map(str, NUMBERS)], lines)]
    header = ["evaluations", "sampler, grid", *(f"{name.replace('_', ' ')}{of}" for name in DISTANCES
                                                for of in ("", ", exact")), "log-density gap", "log-density gap, exact"]
    for data in FOUR:
        lines = [["", "floor", *(floor(results[data, *WAYS[0]][0][0], name) for name in DISTANCES for _ in (0, 1)),
                  "0", "0"]]
        for sampler, grid, n in sorted(WAYS, key=lambda way: way[2]):
            both = results[data, sampler, grid, n][::2]
            lines.append([str(n), f"{sampler}, {grid}", *(cell([result[name] for result in found])
                                                          for name in DISTANCES for found in both),
                          *(cell(gaps(found)) for found in both)])
        text += [f"**{data}**", ""] + rows(header, lines)
    lines = []
    for data, way in itertools.product(FOUR, [way for way in WAYS if way[:2] in SHOWN or way == SLOW]):
        found = results[data, *way][1]
        lines.append([data, "{}, {}".format(*way), str(way[2]), *(cell([result[name] for result in found])
                                                                  for name in DISTANCES), cell(gaps(found))])
    text += ["**Networks of the fast recipe**", "", *rows(
        ["data", "sampler, grid", "evaluations", *(name.replace("_", " ") for name in DISTANCES), "log-density gap"],
        lines)]
    return text + [f"Networks of v with `mse`, t in [1e-6, 1 - 1e-6], {args.epochs} epochs, of the fast recipe "
                   f"{FAST_EPOCHS}, {args.seeds} seeds; the exact denoiser with the same noise. {args.num_samples:,} "
                   "samples against 50,000 points of the data; mean +- standard deviation over the seeds. At the "
                   "floor: the mean of each of the three distances at most two standard deviations above it. Its "
                   f"log-density: the gap at most {WITHIN} nats from that of {SLOW[2]} ancestral steps. `heun` takes "
                   "one evaluation less than it says."]
