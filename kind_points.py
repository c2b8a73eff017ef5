"""Points as a kind of data: what a run on them loads, builds, is tested with, draws and measures (thesis 4.1.1, 4.3.1).

`kind_images.py` has the same verbs for images; scripts choose one of the two files once and call

    load         the data of a run's config                  draw         samples of a trained run
    build_model  the network of a config                     measure      how far samples are from the data
    weights      of a checkpoint, for that network           sample       all that sample.py does for these runs

Read `datasets2d.py`, `mlp.py` and `metrics.py` first. Not here: the loop (`train_points.py`).
"""
import functools
import io
import json
import time
from types import SimpleNamespace

import numpy as np
import torch

import cache
import ddpm
import guidance
import invariance
import langevin
import metrics
import movie
import own_points
import progress
import run
import samplers
import settings
import stack
import tables
import threads
import variance as variances
from datasets2d import DATASETS
from energy import Energy
from mlp import MLP

POINTS = 50_000                   # to train on, and as many fresh ones to test on (thesis 4.1.1)
MEASURED = "mean_distance", "covariance_distance", "sliced_wasserstein", "log_density"     # of samples
LIKELIHOOD = dict(num=10_000, batch_size=5000, draws=100, num_ode=None, probes=None)     # defaults; None is all, exact


def dataset(config):
    """Of a run: a 2D mixture with its exact density, of one label if it has `label`; or the points of a file."""
    if "points" in config:
        return own_points.OwnPoints(config["data"], config["points"])
    return DATASETS[config["data"]].given(config["label"]) if "label" in config else DATASETS[config["data"]]


def facts(data):
    """What the config of a run on this data has besides settings: the facts of a file of points."""
    return {"points": own_points.facts(data)} if own_points.is_file_of_points(data) else {}


def size(config):
    """Number of points to train on."""
    return len(load(config, "train")) if "points" in config else POINTS


def dimension(config):
    """D, 2 but for points of a file and embedded ones."""
    return config["points"]["dim"] if "points" in config else DATASETS[config["data"]].dim


def classes(config):
    """How many labels the network of a run knows."""
    return DATASETS[config["data"]].classes if config.get("labels") else 0


def load(config, split="test"):
    """The points of a run -> (n, D), on the CPU; the test split is the same for every seed, target and loss.

    n is POINTS, and for points of a file, which are standardised, what is in it; with `label` those of the label.
    """
    if "points" in config:
        return getattr(dataset(config), split)
    x, label = pairs(config, split)
    return x[label == config["label"]] if "label" in config else x


def pairs(config, split="test"):
    """All the points of `load` and their labels -> (n, 2), (n,) or None."""
    key = (config["seed"], "train") if split == "train" else ("test", config["data"])
    return DATASETS[config["data"]].sample_pairs(POINTS, run.generator("cpu", *key))


def build_model(config, members=1):
    """The network of a run's config, or a stack of such, with fresh weights from torch's global generator."""
    of_energy, without_t = config.get("energy"), config.get("sigma") is not None
    schedule = ddpm.fixed(config["schedule"])
    network = MLP(dimension(config), config["width"], schedule=None if without_t else schedule, members=members,
                  out=1 if of_energy else dimension(config) * variances.outputs(config),
                  activation=config.get("activation", "relu"), time=not without_t,
                  classes=classes(config))
    return Energy(network, config["target"], schedule) if of_energy else network


def weights(checkpoint):
    """The trained weights, averaged ones with --ema."""
    return checkpoint["ema" if checkpoint["config"].get("ema") else "model"]


def in_chunks(model, members=1, config=None):
    """A network or stack as one that is given 5,000 rows at a time on a CPU: activations then fit in its cache.

    config: of its run, which may say that it is guided, and that products are in bf16.
    """
    device, config = next(model.parameters()).device, config or {}
    return stack.in_chunks(settings.autocast(config, device)(guidance.of_run(model, config)), members,
                           5000 if device.type == "cpu" else 2**20)


def draw(runs, steps, num_samples=10_000, seed=0, device="cpu", t_min=None, under=None, t_max=None,
         watch=lambda model: model, **how):
    """Samples of a Run or Stack -> (M, num_samples, D), on the CPU; all members get the same noise.

    how: sampler, grid and eta of `samplers.sample`, where they are not the default, and the variance where it is not
    the runs' own. under, t_max: another schedule's name, where noise is, see `invariance.py`. watch: of a film of it.
    """
    members, variance = len(runs.members), variances.chosen(
        runs.config, how.pop("variance", None), how.get("sampler", "ancestral"), steps, how.get("grid", "t"), t_min)
    if variance:
        how |= dict(variance=variance, data=of_blocks([run.config for run in runs.members], variance))
    if how.get("sampler") == "langevin":
        return draw_langevin(runs, steps, num_samples, seed, device, how.get("step_size", 1e-3), how.get("metropolis"))
    evaluations = samplers.evaluations(steps=steps, **how)
    add = progress.counter(f"drawing {num_samples:,} samples" + (f" of {members} runs" if members > 1 else ""),
                           evaluations, "evaluations")
    model = watch(progress.counted(threads.shared(
        in_chunks(runs.model(device, out=variance in variances.LEARNED), members, runs.config), device), add))
    names, t_min = [run.target for run in runs.members], run.smallest_t(runs.config, t_min, **how)
    model, schedule, t_min = invariance.of_run(model, names, runs.config, t_min, under, runs.schedule, t_max)
    samples = samplers.sample(model, (num_samples, dimension(runs.config)), steps, target=names, schedule=schedule,
                              t_min=t_min, generator=run.generator(device, seed, "sample"),
                              stabiliser=runs.config["stabiliser"], **how)
    return samples.unflatten(0, (members, -1)).cpu()


def draw_langevin(runs, steps, num_samples, seed, device, step_size, metropolis=False):
    """`draw` of scores without t, by Langevin dynamics from N(0, I) (thesis, Algorithm 1).

    metropolis: with its correction, of energies. `langevin.Diverged`: the steps are too large.
    """
    g, members, network = run.generator(device, seed, "sample"), len(runs.members), runs.model(device)
    noise = lambda: torch.randn(num_samples, dimension(runs.config), generator=g, device=device).repeat(members, 1)
    model = threads.shared(in_chunks(network, members), device)
    log_prob = (lambda x: -network.energy(x, x[:, 0])) if metropolis else None
    with torch.no_grad():
        x = langevin.langevin(lambda x: model(x, x[:, 0]), noise(), step_size, steps,
                              lambda x: noise(), log_prob)
    return x.unflatten(0, (members, -1)).cpu()


def of_blocks(configs, variance):
    """What `best` asks for Var[x | z], of equal blocks of z, one for each config; else None."""
    if variance != "best":
        return None
    sets = [dataset(config) for config in configs]
    return SimpleNamespace(covariance=lambda z, alpha, sigma: torch.cat(
        [data.covariance(block, alpha, sigma) for data, block in zip(sets, z.chunk(len(sets)))]))


def floor(config, n):
    """What the distances and the mean log-density (nats) of n perfect samples are: metrics.floor's dict, number."""
    return floors(config["data"], n, json.dumps(config.get("points")), config.get("label"))


@functools.cache
def floors(data, n, points, label=None):
    config = dict(data=data) | ({"points": json.loads(points)} if points != "null" else {})
    config |= {} if label is None else {"label": label}
    source, real = dataset(config), load(config)
    return cache.kept(lambda: (metrics.floor(source, n, len(real), generator=run.generator("cpu", "floor")),
                               None if points != "null" else metrics.log_density(source, real).item()),
                      f"floor of {n:,} samples of {data}", *vars(source).values(), n, real)


def measure(config, samples):
    """Distances of samples (n, D) to test points, and their mean log-density where the data have one, with the data's.

    Points of a file are measured standardised.
    """
    result, real = {}, load(config)
    distances, log_density = floor(config, len(samples))
    for distance in metrics.DISTANCES:
        name, (mean, std) = distance.__name__, distances[distance.__name__]
        result[name], result[f"{name}_floor"] = distance(samples, real).item(), {"mean": mean, "std": std}
    if log_density is not None:
        result |= {"log_density": metrics.log_density(dataset(config), samples).item(), "log_density_data": log_density}
    return result


def in_units(config, x):
    """Points as their dataset has them: those of a file are standardised for the network."""
    return own_points.in_units_of_the_file(x, config["points"]) if "points" in config else x


def describe(one, samples, **facts):
    """Measure samples of a Run, and write down what they are, for metrics.json. SystemExit if they are not finite."""
    if not samples.isfinite().all():
        raise SystemExit(f"{one.name} gives samples that are not finite - train it longer, or with another --loss")
    last = one.history[-1]
    return {**one.config, "epochs_trained": len(one.history), "test_loss": last["test_loss"],
            "optimum": last["optimum"], "num_samples": len(samples), **facts, **measure(one.config, samples)}


def save(out, one, samples, **facts):
    """Measure samples of a Run, write samples.npy and metrics.json, and return what is in the latter.

    Those of a network trained on a file are in its units.
    """
    result = describe(one, samples, **facts)
    buffer = io.BytesIO()
    np.save(buffer, in_units(one.config, samples).numpy())
    run.write(out / "samples.npy", buffer.getbuffer())
    run.write(out / "metrics.json", json.dumps(result, indent=2).encode())
    return result


def show(one, result, args):
    """Print what was measured of the samples of one Run, what `save` returned."""
    print("{}: {num_samples} samples in {steps} steps, {}, {seconds:.1f} s on {device}"
          .format(one.folder, args.in_words + guidance.towards(result), **result))
    print("                      samples    floor (data against data)")
    for key in MEASURED[:-1]:
        print("{:20s} {:8.4f}    {mean:.4f} +- {std:.4f}".format(key.replace("_", " "), result[key],
                                                                 **result[f"{key}_floor"]))
    print("mean log-density     {log_density:8.4f}   {log_density_data:.4f} nats of the data itself"
          .format(**result) if "log_density" in result else
          "mean log-density      unknown: distances are of standardised points, the floor is resampled")


def table_rows(one, result):
    """What was measured of one Run as a row of a table, and what perfect samples have as another."""
    facts = {key: result.get(key) for key in (
        "steps", "sampler", "grid", "eta", "variance", "num_samples", "sampling_seed")}
    facts |= {key: result[key] for key in (
        "under", "t_max", "step_size", "steps_per_level", "metropolis", *guidance.SAMPLING) if key in result}
    best = [*(result[f"{key}_floor"]["mean"] for key in MEASURED[:-1]), result.get("log_density_data")]
    names = [name.replace("_", " ") for name in MEASURED]
    return ({"run": str(one.folder), **dict(zip(names, map(result.get, MEASURED))), **facts},
            {"run": f"floor, {one.config['data']}", **dict(zip(names, best)), **facts})


def sample(chosen, args, device):
    """Draw samples of chosen runs, [(Run, folder for the results)], in stacks, measure, print, write and show them.

    Of several runs one table is printed, with what perfect samples have: the floor.
    """
    import plots  # here: a run opens without matplotlib
    n, start, done, places, lines, floor_lines = (args.num_samples or 10_000, time.perf_counter(), 0,
                                                  {id(one): out for one, out in chosen}, {}, {})
    for group in run.stacks([one for one, _ in chosen], device):
        before, members = time.perf_counter(), len(group.members)
        film = movie.Film(group.schedule, args.steps, lambda z: z.unflatten(0, (members, -1))[:, :movie.POINTS])  # noqa: B023
        with run.enough_memory("a smaller --num-samples, or fewer runs at once"):
            samples = draw(group, args.steps, n, args.seed, device, args.t_min,
                           **dict(watch=film.watch) if args.movie else {}, **args.how)
        seconds = (time.perf_counter() - before) / members
        done += members
        for m, (one, x) in enumerate(zip(group.members, samples)):
            out, config = places[id(one)], one.config
            variance = variances.chosen(config, args.variance, args.sampler, args.steps, args.grid, args.t_min)
            result = save(out, one, x, steps=args.steps, **args.how | {"variance": variance}, sampling_seed=args.seed,
                          device=str(device), seconds=seconds)
            if len(chosen) == 1:
                show(one, result, args)
            lines[id(one)], floor_lines[f"floor, {config['data']}"] = table_rows(one, result)
            title = "{target}, {loss}, {steps} steps".format(**result) + guidance.towards(config)
            real = load(config, "train" if "points" in config else "test")
            plots.scatter({f"{config['data']}, data": in_units(config, real), title: in_units(config, x)},
                          out / "samples.png", limits=None if "points" in config else (-3, 3))
            if args.movie:
                movie.points([*((t, z[m]) for t, z in film.frames), (0.0, x[:movie.POINTS])], real,
                             (f"{config['data']}, data", title), plots.COLOURS.get(config["target"], "black"),
                             out / "samples.gif")
            else:
                (out / "samples.gif").unlink(missing_ok=True)            # it would be of other samples
            print(f"wrote samples.npy, samples.png{', samples.gif' * args.movie} and metrics.json to {out}/; "
                  f"{progress.seconds():.1f} s in all")
        if done < len(chosen):
            left = (time.perf_counter() - start) / done * (len(chosen) - done)
            print(f"{done} of {len(chosen)} runs, {left:.0f} s left", flush=True)
    tables.show([*(lines[id(one)] for one, _ in chosen), *floor_lines.values()] if len(chosen) > 1
                else [*lines.values()], args.csv, ["run", *(name.replace("_", " ") for name in MEASURED)])


def test_examples(config, num, device, data_dir=None):
    """What likelihood.py tests a run on: num test points, in float64, which nothing overflows (MPS has none)."""
    x = load(config)[:num].to(device)
    return x if x.device.type == "mps" else x.double()


def surprise(config):
    """-log p(x) of every test point under the data's own density, in nats: its mean is the entropy; None if unknown."""
    if "points" in config:
        return None
    return -DATASETS[config["data"]].log_prob(load(config).double())
