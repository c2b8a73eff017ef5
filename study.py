"""Many runs and what is measured of them: trained, sampled and tested once, kept in files, never made twice.

`reproduce.py` makes one Study of a call and hands it to every table and figure. Runs are kept under --runs, in a folder
for each recipe; samples and likelihoods beside their run. What a table or figure used of a run is one line of
runs.jsonl in the folder of its results: with --recorded they are made from those lines alone, without a network.

Not here: the tables and figures (`reproduce_thesis.py`, `reproduce_beyond.py`).
"""
import functools
import json
import math
import statistics
import time
from pathlib import Path
from types import SimpleNamespace

import torch

import ddpm
import kind_points
import likelihood
import losses
import metrics
import run
import settings
import tables
import targets
import train
from checkpoints import once, outdated
from datasets2d import DATASETS, FOUR
from recipes import CHAINS, RECIPES  # noqa: F401 - of the tables
from recipes import fast as fast_options

TARGETS = ["x", "eps", "v", "s"]
STEPS = [2, 4, 8, 16, 32, 64, 128, 256, 512]      # of samplers
DRAWS, ODE_STEPS = 100, 64     # of the bound and of the flow
KEPT = "mean_distance", "covariance_distance", "sliced_wasserstein", "log_density"      # of samples, in runs.jsonl


def round_off(value):
    """Numbers to eight significant digits, all that float32 has: what runs.jsonl keeps."""
    if isinstance(value, dict):
        return {key: round_off(v) for key, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [round_off(v) for v in value]
    return float(f"{value:.8g}") if isinstance(value, float) else value


def line_name(recipe, key):
    """What runs.jsonl calls a run: its recipe and its folder."""
    return "{}/{}-{}-{}-s{}".format(recipe, *key)


class Missing:
    """Stands for networks and samples where a study has only recorded numbers: every use ends in one sentence."""

    def __call__(self, *args):
        raise SystemExit("this is not in runs.jsonl, it needs the networks themselves - leave out --recorded")

    __truediv__ = __call__


class Study:
    """Runs of all datasets and targets with --seeds seeds, and their numbers. args: of reproduce.py."""

    def __init__(self, args, records=()):
        self.args, self.device = args, run.device(args.device)
        self.records = {record["run"]: record for record in records}     # what was found before
        self.used = {}                                                     # what this result uses

    def note(self, recipe, key, **numbers):
        """Keep numbers of a run for runs.jsonl."""
        if self.args.recorded:
            return
        name = line_name(recipe, key)
        entry = self.used.setdefault(name, {"run": name})
        for part, value in numbers.items():
            value = round_off(value)
            entry[part] = entry.get(part, {}) | value if isinstance(value, dict) else value

    def recorded(self, recipe, key, part):
        """Numbers of a run from runs.jsonl; SystemExit if it has none."""
        name = line_name(recipe, key)
        if part not in self.records.get(name, {}):
            raise SystemExit(f"no {part} of {name} in runs.jsonl - leave out --recorded to train what is missing")
        return self.records[name][part]

    def trained(self, recipe, chosen=None, data=FOUR, target=TARGETS, epochs=None, fast=None):
        """Train what is missing of a recipe's losses, or the chosen ones -> {(data, target, loss, seed): Run}.

        fast: with the options of `recipes.fast`; None: if --recipe says so.
        """
        (options, names), args = RECIPES[recipe], self.args
        epochs = epochs or args.epochs
        if args.recipe == "fast" if fast is None else fast:
            options, recipe = fast_options(options), f"{recipe}-fast"
        root = Path(args.runs) / f"{recipe}-{epochs}-epochs"
        argv = ["--data", *data, "--target", *target, "--loss", *(chosen or names), *options,
                "--seeds", str(args.seeds), "--epochs", str(epochs), "--out", str(root),
                "--device", args.device, "--resume"]
        configs = settings.configs(train.parse(argv))
        keys = [tuple(config[name] for name in settings.NAMES) for config in configs]
        if args.recorded:
            return {key: self.from_record(recipe, key, config) for key, config in zip(keys, configs)}
        folders = [root / settings.name(config) for config in configs]
        opened = [run.open(folder) for folder in folders if (folder / "ckpt.pt").exists()]
        if len(opened) < len(folders) or any(len(one.history) != epochs for one in opened):
            train.main(argv)
            opened = [run.open(folder) for folder in folders]
        runs = dict(zip(keys, opened))
        for key, one in runs.items():
            one.recipe, last = recipe, one.history[-1]
            self.note(recipe, key, config=one.config, seconds=last["seconds"],
                      torch=one.checkpoint.get("torch", str(torch.__version__)), machine=run.device_name(self.device),
                      curves={"test_loss": [h["test_loss"] for h in one.history]},
                      optimum={name: last[name] for name in last if name.startswith("optimum")})
        return runs

    def from_record(self, recipe, key, config):
        """What tables and curves need of a run, from its line."""
        curves, optimum = self.recorded(recipe, key, "curves"), self.recorded(recipe, key, "optimum")
        history = [dict(zip(curves, values)) | optimum for values in zip(*curves.values())]
        for epoch, values in self.records[line_name(recipe, key)].get("over_t", {}).items():
            history[int(epoch) - 1]["train_loss_over_t"] = values
        history[-1]["seconds"] = self.recorded(recipe, key, "seconds")
        return SimpleNamespace(config=config, history=history, recipe=recipe, folder=Missing(), model=Missing())

    def curve(self, runs, key, name):
        """What the history of a run calls `name`, over epochs."""
        values = [entry[name] for entry in runs[key].history]
        self.note(runs[key].recipe, key, curves={name: values})
        return values

    def over_t(self, runs, key, epoch):
        """The train loss over t at an epoch of a run -> 20 numbers."""
        values = runs[key].history[epoch - 1]["train_loss_over_t"]
        self.note(runs[key].recipe, key, over_t={str(epoch): values})
        return values

    def sampled(self, runs, steps, sampler="ancestral", grid="t", variance=None):
        """Draw what is missing of the samples of runs -> {key: metrics.json}, in <run>/steps-<steps>/.

        The points are kept there too for the thesis's sampler. Other samplers, grids and variances than the run's own
        are in the folder's name.
        """
        args, thesis = self.args, (sampler, grid, variance) == ("ancestral", "t", None)
        how = " ".join([sampler, grid, str(steps), *[variance][:bool(variance)]])
        if args.recorded:
            return {key: self.with_floor(key[0], self.recorded(one.recipe, key, "samples"), how)
                    for key, one in runs.items()}
        folder = lambda key: runs[key].folder / "-".join(
            [f"steps-{steps}"] + [str(args.num_samples)] * (args.num_samples != 10_000)
            + [sampler, grid] * (not thesis) + [variance] * bool(variance))

        def current(key):
            made = folder(key) / "metrics.json"
            return (made.exists() and made.stat().st_mtime >= (runs[key].folder / "ckpt.pt").stat().st_mtime
                    and metrics.DISTANCES[-1].__name__ in made.read_text())      # else of a version that measured less
        start, done, missing = time.perf_counter(), 0, [key for key in runs if not current(key)]
        for seed in sorted({key[3] for key in missing}):     # the sampling noise differs between seeds too
            keys = {id(runs[key]): key for key in missing if key[3] == seed}
            for group in run.stacks([runs[key] for key in keys.values()], self.device):
                before = time.perf_counter()
                points = kind_points.draw(group, steps, args.num_samples, seed, self.device, sampler=sampler, grid=grid,
                                          variance=variance)
                facts = dict(steps=steps, sampler=sampler, grid=grid, sampling_seed=seed, device=str(self.device),
                             seconds=(time.perf_counter() - before) / len(group.members))
                for one, x in zip(group.members, points):
                    made = folder(keys[id(one)])
                    if not x.isfinite().all():             # of a table of many this is a result, too
                        lost = {**one.config, **facts, **dict.fromkeys(KEPT)}
                        run.write(made / "metrics.json", json.dumps(lost, indent=2).encode())
                    elif thesis:
                        kind_points.save(made, one, x, **facts)
                    else:
                        run.write(made / "metrics.json",
                                  json.dumps(kind_points.describe(one, x, **facts), indent=2).encode())
                done += len(group.members)
                left = (time.perf_counter() - start) / done * (len(missing) - done)
                print(f"sampling, {how}: {done} of {len(missing)} networks, "
                      f"{left:.0f} s left", flush=True)
        results = {key: {**json.loads((folder(key) / "metrics.json").read_text()), "folder": folder(key)}
                   for key in runs}
        for key, result in results.items():
            self.note(runs[key].recipe, key, samples={how: [result[name] for name in KEPT]})
        return results

    def with_floor(self, data, samples, how):
        """metrics.json of samples from a record, which has no floor: that is the dataset's."""
        if how not in samples:
            raise SystemExit(f"no samples '{how}' in runs.jsonl - leave out --recorded to draw what is missing")
        floors, log_density = kind_points.floor(dict(data=data), self.args.num_samples)
        return (dict(zip(KEPT, samples[how]))
                | {f"{name}_floor": {"mean": mean, "std": std} for name, (mean, std) in floors.items()}
                | {"log_density_data": log_density, "folder": Missing()})

    def likelihoods(self, runs, t_max=None):
        """Measure what is missing of the likelihoods of runs -> {key: {name: (mean, error)}}, in <run>/likelihood-*.

        t_max: of `invariance.of_run`.
        """
        n = min(self.args.num_samples // 4, kind_points.POINTS)

        def measure(one):
            config = one.config
            x = kind_points.test_examples(config, n, self.device)
            model = one.model(self.device, out=True).to(x.dtype)
            terms, _ = likelihood.evaluate(model, x, config, 2 if config.get("timesteps") else DRAWS,
                                           ode_steps=ODE_STEPS, generator=run.generator(self.device, "likelihood"),
                                           own=one.schedule, t_max=t_max)
            terms["entropy"] = -DATASETS[config["data"]].log_prob(x.cpu())
            gaps = {f"{name} gap": terms[name] - terms["entropy"] for name in ("bound", "exact")}
            return ({name: tables.mean_and_error(values) for name, values in (terms | gaps).items()}
                    | {"exact median": gaps["exact gap"].median().item(),
                       "lost": (gaps["exact gap"] > 100).sum().item()})
        part, until = ("likelihood", "") if t_max is None else (f"likelihood, t_max {t_max}", f"-{t_max}")
        return self.measured(runs, part, measure, f"likelihood-{n}-{DRAWS}-{ODE_STEPS}{until}")

    def measured(self, runs, part, measure, file=None):
        """What measure(Run) -> dict finds, where it is missing -> {key: dict}, in <run>/<file or part>.json."""
        if self.args.recorded:
            return {key: self.recorded(one.recipe, key, part) for key, one in runs.items()}
        start, file = time.perf_counter(), file or part
        left = [one for one in runs.values() if outdated(one.folder / f"{file}.json")]
        for done, one in enumerate(left, 1):
            once(one, file, measure)
            seconds = (time.perf_counter() - start) / done * (len(left) - done)
            print(f"{part}: {done} of {len(left)} networks, {seconds:.0f} s left", flush=True)
        results = {key: once(one, file, measure) for key, one in runs.items()}
        for key, result in results.items():
            self.note(runs[key].recipe, key, **{part: result})
        return results

    def exact_nelbo(self, runs, key, best):
        """Exact NELBO of a run on `nelbo_points` -> its mean, the standard error of mean minus optimum.

        best: the terms of the optimum.
        """
        if self.args.recorded:
            return self.recorded(runs[key].recipe, key, "nelbo")
        model = runs[key].model()
        model = kind_points.in_chunks(model.network if "schedule" in runs[key].checkpoint else model)    # on its clock
        terms = exact_nelbo(model, key[1], key[0], runs[key].config["stabiliser"])
        result = [terms.mean().item(), ((terms - best).std() / len(best)**0.5).item()]
        self.note(runs[key].recipe, key, nelbo=result)
        return result


@functools.cache
def nelbo_points(data, t_min=1e-3):
    """The 200,000 points on which every model of a dataset is tested: z, t (uniform in log-SNR), eps, and a factor.

    The exact NELBO, the mean of -1/2 dlogsnr/dt (eps_hat - eps)^2 over t ~ U(t_min, 1 - t_min), is the factor times the
    mean of the squared error alone when log-SNR is uniform: the weight is gone, and most of the variance (VDM 4.6).
    """
    schedule, g = ddpm.SCHEDULES["cosine"], run.generator("cpu", "judge", data)
    x = DATASETS[data].sample(4 * kind_points.POINTS, g)
    t = losses.draw_t((len(x),), schedule, t_min, "logsnr", g, torch.float64)[0].float()
    eps, (low, high) = torch.randn(x.shape, generator=g), schedule.ends(t_min)
    return ddpm.q_sample(x, t, eps, schedule), t, eps, 0.5 * (high - low) / (1 - 2 * t_min)


@torch.no_grad()
def exact_nelbo(model, target, data, stabiliser=0.0):
    """Terms whose mean is the exact NELBO of any model in nats per dimension -> (200,000,)."""
    (z, t, eps, factor), schedule = nelbo_points(data), ddpm.SCHEDULES["cosine"]
    alpha, sigma = ddpm.expand(schedule.alpha(t), z), ddpm.expand(schedule.sigma(t), z)
    eps_hat = targets.to_eps(target, model(z, t), z, alpha, sigma, stabiliser)
    return factor * (eps_hat - eps).square().mean(1)


# Cells of tables, and Markdown

def cell(values):
    """Mean and, of more than one seed, standard deviation (n - 1). None, infinite: samples of a seed that diverge."""
    lost = sum(value is None or not math.isfinite(value) for value in values)
    if lost:
        return f"diverges, {lost} of {len(values)}"
    mean = statistics.mean(values)
    form = ".3f" if abs(mean) < 100 else ".0f" if abs(mean) < 1e6 else ".0e"
    return f"{mean:{form}}" + (f" +- {statistics.stdev(values):{form}}" if len(values) > 1 else "")


def gaps(results):
    """Mean log-density of samples under the data's density minus that of the data, in nats: above 0 is too sharp."""
    return [found["log_density"] and found["log_density"] - found["log_density_data"] for found in results]


def floor(result, name):
    """The floor of a distance as a cell."""
    return "{mean:.3f} +- {std:.3f}".format(**result[f"{name}_floor"])


def rows(header, lines):
    """A Markdown table."""
    return ["| " + " | ".join(row) + " |" for row in [header, ["---"] * len(header), *lines]] + [""]
