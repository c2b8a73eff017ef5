"""The variance of a step: learned beside the best, in the bound, in the chain's own likelihood and in samples.

Part of `reproduce_foundations.py`, which says what the functions are. Read `variance.py` and `importance.py` first.

Not here: the tables of Foundations, which compare means, variances and losses at T = 1000.
"""
import functools
import itertools
import math

import torch

import ddpm
import discrete
import importance
import kind_points
import losses
import plots_chain
import run
import tables
import variance as variances
from datasets2d import DATASETS, FOUR
from decoders import gaussian, prior, reconstruction
from study import CHAINS, Missing, cell, gaps, rows

EPOCHS, DRAWS = 30, 200_000            # of training; of a term of the bound, for each network
SETS = "clusters", "rings"             # where steps are few and variances are compared
EXACT = "small", "large", "best"       # variances for the exact denoiser
FEWER = 25, 50, 100                    # steps of a chain of 1000
DISTANCES = "mean_distance", "covariance_distance", "sliced_wasserstein"


def bits(nats):
    """Nats of a 2D point as bits per dimension."""
    return nats / (2 * math.log(2))


@torch.no_grad()
def bound(model, x, *, chain, target, variance, data=None, decoder=gaussian, stabiliser=0.0, t_min=0.0, draws=None,
          pilot=32, generator=None):
    """The bound on -log p, a mean over data x, and its standard error, in nats, of so many drawn terms.

    Term i is drawn with a probability in proportion to the root of its mean square, which a few terms of every i show
    before: most of the bound is in the first steps.
    """
    how = dict(chain=chain, target=target, variance=variance, data=data, decoder=decoder, stabiliser=stabiliser)
    draws = draws or DRAWS

    def terms(i):
        found = []
        for part in i.split(20_000 if x.ndim == 2 else 250):
            some = x[torch.randint(len(x), (len(part),), generator=generator)]
            eps = torch.randn(some.shape, generator=generator, dtype=x.dtype)
            found.append(variances.term(model, some, part, eps, **how))
        return torch.cat(found)
    every = torch.arange(1, chain.steps + 1).repeat(pilot)
    moments = terms(every).double().square().unflatten(0, (pilot, -1)).mean(0)
    t, weight = losses.draw_step((draws,), chain, moments, generator)
    values = (chain.steps * weight * terms(chain.index(t))).double()
    ends = prior(x.double(), chain.schedule, t_min).mean().item()
    if not chain.decodes:              # p(x | z_0)
        eps = torch.randn(x.shape, generator=generator, dtype=x.dtype)
        ends += reconstruction(x, eps, chain.schedule.ends(t_min)[1], decoder).double().mean().item()
    return ends + values.mean().item(), values.std().item() / draws**0.5


def bound_of_run(one, names):
    """{variance: (bound, its error)} of a Run on points."""
    config, x = one.config, kind_points.load(one.config)
    model = kind_points.in_chunks(one.model(out=True))
    return {name: bound(model, x, chain=losses.chain_of(config), target=one.target, variance=name,
                        data=DATASETS[config["data"]], t_min=config["t_min"],
                        generator=run.generator("cpu", "bound")) for name in names}


@functools.cache
def exact_bound(data, schedule, steps, variance):
    """The same of the exact denoiser, in float64."""
    mixture, schedule = DATASETS[data], ddpm.SCHEDULES[schedule]
    x = kind_points.load(dict(data=data)).double()
    return bound(mixture.optimal_model("x", schedule), x, chain=discrete.chain(schedule, steps, 0.0), target="x",
                 variance=variance, data=mixture, draws=DRAWS // 4, generator=run.generator("cpu", "bound"))


def entropy(data):
    return -DATASETS[data].log_prob(kind_points.load(dict(data=data)).double()).mean().item()


def trained(study, recipe, loss, target, data=FOUR):
    return study.trained(recipe, [loss], list(data), [target], min(study.args.epochs, EPOCHS))


def of_steps(study, T, name, loss, target="v"):
    """Networks of the chain of T steps of schedule iddpm, on SETS."""
    return trained(study, f"steps-{T}-{name}", loss, target, SETS)


LEARNT = [("small", "mse", ["small", "large", "best"]), ("log", "hybrid", ["log"]), ("range", "hybrid", ["range"])]


def learned(study):
    """The bound with every variance at four numbers of steps, and how much of the gain the range gets."""
    lines, errors = [], []
    for target, data, T in itertools.product(("v", "eps"), SETS, CHAINS):
        found, line = {}, [target, data, str(T)]
        for name, loss, names in LEARNT:
            runs = of_steps(study, T, name, loss, target)
            results = study.measured(runs, "bound", lambda one: bound_of_run(one, names))    # noqa: B023
            for of in names:
                values = [results[data, target, loss, seed][of] for seed in range(study.args.seeds)]
                found[of] = [value - entropy(data) for value, _ in values]
                errors += [error for _, error in values]
        exact = [exact_bound(data, "iddpm", T, name)[0] - entropy(data) for name in EXACT]
        share = [(s - r) / (s - b) for s, r, b in zip(found["small"], found["range"], found["best"])]
        lines.append([*line, *(cell(found[name]) for name in ("small", "large", "log", "range", "best")), cell(share),
                      *(f"{value:.3f}" for value in exact)])
    return rows(["target", "data", "T", "small", "large", "log", "range", "best", "share of the gain: range",
                 "exact, small", "exact, large", "exact, best"], lines) + [
        "Bound minus entropy in nats, two dimensions together. Schedule iddpm, "
        f"{min(study.args.epochs, EPOCHS)} epochs, {study.args.seeds} seeds, mean +- standard deviation; `mse` for "
        "small, large and best (q + B^2 Var[x | z] of the data), `hybrid` for log and range; a network for each T. "
        f"Monte Carlo error at most {max(errors):.3f}. The share is (small - range) / (small - best). exact: the exact "
        "denoiser."]


def samples(study):
    """Samples of the chains in their own steps with each variance, beside the floor."""
    lines = []
    for data, T in itertools.product(SETS, CHAINS):
        for name, loss, names in LEARNT:
            runs = {key: one for key, one in of_steps(study, T, name, loss).items() if key[0] == data}
            for of in names:
                found = list(study.sampled(runs, T, variance=None if of == name else of).values())
                lines.append([data, str(T), of, *(cell([result[d] for result in found]) for d in DISTANCES),
                              cell(gaps(found))])
        floors, _ = kind_points.floor(dict(data=data), study.args.num_samples)
        lines.append([data, "floor", "", *("{:.3f} +- {:.3f}".format(*floors[d]) for d in DISTANCES), "0"])
    text = ["**Each chain in its own T steps**, schedule iddpm, v", ""] + rows(
        ["data", "T", "variance", "mean distance", "covar. dist.", "sliced Wasserstein", "log-density gap"], lines)
    lines = []
    for data, n, (grid, title), of in itertools.product(SETS, FEWER, (("t", "skip"), ("rescaled", "rescale")),
                                                        ("small", "large")):
        runs = trained(study, "chain-small", "mse", "eps", [data])
        found = list(study.sampled(runs, n, "ancestral", grid, None if (grid, of) == ("t", "small") else of).values())
        lines.append([data, str(n), title, of, *(cell([result[d] for result in found]) for d in DISTANCES),
                      cell(gaps(found))])
    text += ["**Fewer steps of a chain of T = 1000**, schedule ddpm, eps with `mse`: every so many steps (Nichol and "
             "Dhariwal), or beta rescaled (Foundations 1.25)", ""] + rows(
        ["data", "steps", "how", "variance", "mean distance", "covar. dist.", "sliced Wasserstein",
         "log-density gap"], lines)
    return text + [f"{study.args.num_samples:,} samples against 50,000 points, {study.args.seeds} seeds, mean +- "
                   "standard deviation. The log-density gap, of samples to data, in nats: below 0 off the data, above "
                   "0 too sharp."]




CHAINS_DRAWN, TESTED = 1000, 200       # of importance sampling, for each of so many points
OWN = [(T, name) for T in (10,) for name in ("small", "large", "range", "best")]


def own_of(model, data, T, target, variance, dtype):
    """{"bound", "own": gap to the entropy of the same points, its standard error over them; "size"}, in nats."""
    mixture = DATASETS[data]
    x = kind_points.load(dict(data=data))[:TESTED].to(dtype)
    with torch.no_grad():
        log_w = importance.log_weights(model, x, target=target, variance=variance, schedule=ddpm.SCHEDULES["iddpm"],
                                       steps=T, data=mixture, chains=CHAINS_DRAWN,
                                       generator=run.generator("cpu", "importance")).double()
    surprise = -mixture.log_prob(x.double())
    return {"bound": tables.mean_and_error(-log_w.mean(0) - surprise),
            "own": tables.mean_and_error(-importance.log_likelihood(log_w) - surprise),
            "size": importance.effective_size(log_w).median().item()}


def own(study):
    """The likelihood of the chain itself beside its bound and the flow's: exact denoiser and trained networks."""
    lines, args = [], study.args
    with_error = lambda found: "{:.3f} +- {:.3f}".format(*found)
    for data, (T, variance) in itertools.product(SETS, OWN):
        mixture = DATASETS[data]
        exact = own_of(mixture.optimal_model("x", ddpm.SCHEDULES["iddpm"]), data, T, "x", variance, torch.float64
                       ) if variance != "range" else None
        recipe, loss = (variance, "hybrid") if variance == "range" else ("small", "mse")
        runs = {key: one for key, one in of_steps(study, T, recipe, loss).items() if key[0] == data}
        found = list(study.measured(runs, f"own-{variance}", lambda one: own_of(             # noqa: B023
            kind_points.in_chunks(one.model(out=True)), data, T, one.target, variance, torch.float32)).values())  # noqa: B023
        flow = [result["exact gap"][0] for result in study.likelihoods(runs).values()]
        lines.append([data, str(T), variance,
                      *([with_error(exact["bound"]), with_error(exact["own"]), f"{exact['size']:.0f}"] if exact
                        else ["-"] * 3),
                      *(cell([result[name][0] for result in found]) for name in ("bound", "own")),
                      f"{min(result['size'] for result in found):.0f}", cell(flow)])
    return rows(["data", "T", "variance", "exact: bound", "chain itself", "chains that count", "trained: bound",
                 "chain itself", "chains that count", "flow"], lines) + [
        f"Nats above the entropy of the same {TESTED} points, two dimensions together; {CHAINS_DRAWN:,} chains for "
        "each point. Schedule iddpm, v. exact: +- standard error over the points. trained: "
        f"{min(args.epochs, EPOCHS)} epochs, {args.seeds} seeds, mean +- standard deviation over them. Chains that "
        "count: the effective number, the median over the points, of the trained the least of the seeds. The flow's is "
        f"that of the first {min(args.num_samples // 4, kind_points.POINTS):,} test points."]


def place(log_v, step):
    """u of Foundations 6.3: 0 where v is small, 1 where it is large."""
    return (log_v - step.log_small) / (step.log_large - step.log_small)


@torch.no_grad()
def fig_variances(study, path, draws=500):
    """u of learned and best variances over t, seed 0."""
    if study.args.recorded:
        Missing()()
    panels = {}
    for data, T in itertools.product(SETS, CHAINS):
        mixture, of = DATASETS[data], discrete.chain(ddpm.SCHEDULES["iddpm"], T, 0.0)
        networks = {name: of_steps(study, T, name, "hybrid")[data, "v", "hybrid", 0].model(out=True)
                    for name in ("log", "range")}
        g, found = run.generator("cpu", "figure"), {}
        steps = torch.unique(torch.linspace(2, T, min(T - 1, 60)).round().long())
        for i in steps.tolist():
            x = mixture.sample(draws, g)
            t = of.times.float()[i].expand(draws)
            z = ddpm.q_sample(x, t, torch.randn(x.shape, generator=g), of.schedule)
            step = discrete.Step(*(c[:, None] for c in of.step(torch.full((draws,), i), z.double())))
            alpha, sigma = of.schedule.alpha(of.times[i]), of.schedule.sigma(of.times[i])
            values = {"best": variances.VARIANCES["best"](mixture.covariance(z.double(), alpha, sigma), step)}
            values |= {name: variances.VARIANCES[name](variances.split(network(z, t), z)[1].double(), step)
                       for name, network in networks.items()}
            for name, log_v in values.items():
                u, ends = place(log_v, step).flatten(), torch.tensor([0.05, 0.95]).double()
                found.setdefault(name, []).append([u.mean().item(), *u.quantile(ends).tolist()])
        panels[data, T] = {name: (of.times[steps].tolist(), *zip(*values)) for name, values in found.items()}
    plots_chain.variances(panels, path)


def fig_plane(study, path, T=1000, n=121):
    """u of the best variance over the plane, where it is largest among points that occur, and most often above 2."""
    line, panels = torch.linspace(-3, 3, n, dtype=torch.float64), {}
    z = torch.stack(torch.meshgrid(line, line, indexing="xy"), -1).flatten(0, 1)
    for data in SETS:
        mixture, of, g = DATASETS[data], discrete.chain(ddpm.SCHEDULES["iddpm"], T, 0.0), run.generator("cpu", "plane")

        def u(z, i):
            step = discrete.Step(*of.step(torch.tensor([i]), z)[:6])                         # noqa: B023
            var = mixture.covariance(z, of.schedule.alpha(of.times[i]), of.schedule.sigma(of.times[i]))   # noqa: B023
            return place(variances.VARIANCES["best"](var, step), step)[:, 0]
        x, eps = mixture.sample(2000, g, torch.float64), torch.randn(2000, 2, generator=g, dtype=torch.float64)
        outside = {}
        for i in range(20, T, 20):
            there = u(ddpm.q_sample(x, of.times[i].expand(2000), eps, of.schedule), i)
            outside[i] = there.max().item(), (there > 2).double().mean().item(), (there > 1).double().mean().item()
        for i in sorted({max(outside, key=lambda i: outside[i][k]) for k in range(2)}):      # noqa: B023
            title = f"{data}, t = {i / T:g}\n{100 * outside[i][2]:.0f} % of z above 1, largest {outside[i][0]:.1f}"
            panels[title] = u(z, i).reshape(n, n).numpy()
    plots_chain.planes(panels, path)
