r"""The table `eps-flows`: why flows of eps and s miss the floor that v reaches in 32 evaluations, and what mends it.

Read `targets.py` and `samplers.py` first. An error e of the prediction is -sigma e / det of x_hat and alpha e / det of
eps_hat, so a step of `ddim` from t to s moves z by

    (sigma_s alpha_t - alpha_s sigma_t) / det e

which is -sin(theta_t - theta_s) / det e, theta = arctan(sigma / alpha), where alpha^2 + sigma^2 = 1. A flow keeps it:
it has no noise that forgets, and near t = 1 it takes N(0, I) to N(0, I), point by point. det is 1 for v and alpha for
eps: the first of 32 equal steps from t = 0.999, where alpha = 0.0016, moves z by 31 e. `kept` is the sum over steps.

Mends of sampling, each an option of `kind_points.draw`:

    t_max          noise is N(0, I) at an earlier t, where standardised data nearly are that (`price`: how nearly)
    first x_hat 0  the mean of the data, as it is at zero SNR (Lin et al. 2024)
    clip           every x_hat is kept in the range of the data
    grid logsnr    many steps near t = 1

A mend of the network is an output that cannot be far off near t = 1: eps_hat = sigma z + alpha net. That net is v,

    eps = (sigma^2 + alpha^2) eps = sigma (z - alpha x) + alpha^2 eps = sigma z + alpha (alpha eps - sigma x)

and all that is left of eps or s is its loss, the `simple` or `s_space` of v: `as v`.

Not here: the samplers themselves (`multistep.py`), what t_max does (`invariance.of_run`).
"""
import itertools
import math

import torch

import ddpm
import kind_points
import run
import targets
from datasets2d import DATASETS, FOUR
from grids import GRIDS
from invariance import between
from reproduce_few import DISTANCES, WITHIN, is_as_slow, is_at_floor
from study import KEPT, cell, floor, gaps, rows

STEPS, SCHEDULE, STABILISER = 32, ddpm.SCHEDULES["cosine"], 0.01
TARGETS, AS_V = ["eps", "s", "v"], {"eps": "simple", "s": "s_space"}
AT = [0.999, 0.968, 0.9, 0.8, 0.5]                       # where errors are measured, the first two of 32 equal steps
T_MAX, EARLY, FIRST = [0.95, 0.9, 0.8, 0.7], 0.8, 0.98
SOME = ["as it is", "grid logsnr", f"t_max {EARLY}"]
MENDS = {"ddim": SOME, "unipc": SOME,
         "dpmpp": ["as it is", "grid logsnr", "clip", "first x_hat 0", *(f"t_max {t_max}" for t_max in T_MAX)]}
CAUSE = ["first step, then exact", f"exact above {EARLY}"]                      # of `dpmpp`


# The cause

def part(t_max):
    """The schedule from t_max on, its t = 1, as it is sampled from."""
    return between(SCHEDULE, *SCHEDULE.logsnr(torch.tensor([t_max, 1e-3], dtype=torch.float64)).tolist())


def kept(target, times, schedule):
    """How far `ddim` moves z at most by an error of 1 in every prediction, a number; the last step is to sigma = 0."""
    alpha, sigma = schedule.alpha(times), schedule.sigma(times)
    alpha_s, sigma_s = torch.cat([alpha[1:], alpha.new_ones(1)]), torch.cat([sigma[1:], sigma.new_zeros(1)])
    det = targets.determinant(target, alpha, sigma, STABILISER)
    return ((sigma_s * alpha - alpha_s * sigma) / det).abs().sum().item()


def price(data, t_max, points=281, largest=7.0):
    """KL of N(0, I) from z at t_max in nats, by quadrature: what t_max costs the flow of the exact denoiser."""
    line, t = torch.linspace(-largest, largest, points, dtype=torch.float64), torch.tensor(t_max, dtype=torch.float64)
    z = torch.cartesian_prod(line, line)
    log_q = data.log_prob(z, SCHEDULE.alpha(t), SCHEDULE.sigma(t))
    log_ratio = log_q + 0.5 * z.square().sum(1) + math.log(2 * math.pi)
    return ((line[1] - line[0])**2 * log_q.exp() * log_ratio).sum().item()


@torch.no_grad()
def error(one, t, n=10_000):
    """Root mean squared error of a Run's eps_hat, as to E[eps | z], of n test points at t."""
    x, t = kind_points.load(one.config)[:n], torch.tensor(t)
    z = ddpm.q_sample(x, t, torch.randn(x.shape, generator=run.generator("cpu", "errors")), SCHEDULE)
    best = DATASETS[one.config["data"]].optimal_model("eps", SCHEDULE)(z, t.expand(len(z)))
    return (one.denoiser()(z, t)[1] - best).square().mean().sqrt().item()


def options(one, way):
    """What `kind_points.draw` is told of a way, a name of MENDS or CAUSE."""
    config, d = one.config, one.config["stabiliser"]
    best = DATASETS[config["data"]].optimal_model(one.target, SCHEDULE, d)

    def of_mean(z, t):
        """The prediction whose x_hat is 0, y = a 0 + b z / sigma."""
        alpha, sigma = (ddpm.expand(c(t), z) for c in (SCHEDULE.alpha, SCHEDULE.sigma))
        return targets.coefficients(one.target, alpha, sigma, d)[1] * z / sigma
    above = lambda switch, early, late: lambda z, t: (early if t[0] > switch else late)(z, t)
    if way.startswith("t_max "):
        return dict(t_max=float(way.removeprefix("t_max ")))
    return {"as it is": {}, "grid logsnr": dict(grid="logsnr"),
            "clip": dict(clip=kind_points.load(config).abs().max().item()),
            "first x_hat 0": dict(watch=lambda model: above(FIRST, of_mean, model)),
            CAUSE[0]: dict(watch=lambda model: above(FIRST, model, best)),
            CAUSE[1]: dict(watch=lambda model: above(EARLY, best, model))}[way]


def measure(one, args, device):
    """What is measured of samples of a Run in every way, and the errors of its eps_hat."""
    found = {"errors": [error(one, t) for t in AT]}
    for sampler, mends in MENDS.items():
        for way in [*mends, *CAUSE * (sampler == "dpmpp")]:
            x = kind_points.draw(one, STEPS, args.num_samples, one.config["seed"], device, sampler=sampler,
                                 **options(one, way))[0]
            measured = kind_points.measure(one.config, x) if x.isfinite().all() else dict.fromkeys(KEPT, math.inf)
            found[f"{sampler} {way}"] = [measured[name] for name in KEPT]
    return found


# The table

def eps_flows(study, **recipe):
    """Errors, and what a flow keeps of them; every mend; the likelihoods. recipe: of `Study.trained`."""
    args, seeds = study.args, range(study.args.seeds)
    runs = study.trained("stabilised", ["mse"], FOUR, TARGETS, **recipe)
    found = study.measured(runs, "flows", lambda one: measure(one, args, study.device), f"flows-{args.num_samples}")
    as_v = study.trained("spaces", [*AS_V.values()], FOUR, ["v"], **recipe)
    of_v = {sampler: study.sampled(as_v, STEPS, sampler) for sampler in MENDS}

    def results(data, target, sampler, way):
        if way == "as v":
            return [of_v[sampler][data, "v", AS_V[target], seed] for seed in seeds]
        return [study.with_floor(data, found[data, target, "mse", seed], f"{sampler} {way}") for seed in seeds]

    lines, name = [], "sliced_wasserstein"
    for data, target in itertools.product(FOUR, TARGETS):
        errors = zip(*(found[data, target, "mse", seed]["errors"] for seed in seeds))
        drawn = [results(data, target, "dpmpp", way) for way in ("as it is", *CAUSE)]
        lines.append([data, target, *map(cell, errors), *(cell([result[name] for result in r]) for r in drawn),
                      floor(drawn[0][0], name)])
    text = ["**The cause**: root mean squared error of eps_hat at t; sliced Wasserstein distance of samples", ""]
    text += rows(["data", "target", *(f"t = {t}" for t in AT), "all of the network", *CAUSE, "floor"], lines)

    lines = [[f"{grid}, t_max {t_max}",
              *(f"{kept(target, GRIDS[grid](STEPS, part(t_max), 0.0, dtype=torch.float64), part(t_max)):.2f}"
                for target in TARGETS), *(f"{max(0, price(DATASETS[data], t_max)):.0e}" for data in FOUR)]
             for grid, t_max in (("t", 0.999), ("logsnr", 0.999), *(("t", t_max) for t_max in T_MAX))]
    text += ["**How far `ddim` moves z by an error of 1 in every prediction**; KL of N(0, I) from z at t_max, nats", ""]
    text += rows(["grid", *TARGETS, *FOUR], lines)

    def reached(target, sampler, way):
        drawn = [results(data, target, sampler, way) for data in FOUR]
        of_v = [results(data, "v", sampler, "as it is") for data in FOUR]
        return f"{sum(map(is_at_floor, drawn))} / {sum(map(is_as_slow, drawn, of_v))}"
    lines = [[sampler, way, *(reached(target, sampler, way) if way != "as v" or target in AS_V else ""
                              for target in TARGETS)]
             for sampler, mends in MENDS.items() for way in [*mends, "as v"]]
    text += ["**Of the four sets, at the floor** / and with the log-density of v", ""]
    text += rows(["sampler", "way", *TARGETS], lines)

    header = ["target", "way", *(name.replace("_", " ") for name in DISTANCES), "log-density gap"]
    for data in FOUR:
        lines = [["", "floor", *(floor(results(data, "v", "dpmpp", "as it is")[0], name) for name in DISTANCES), "0"]]
        for target in TARGETS:
            for sampler, way in [(sampler, way) for sampler, mends in MENDS.items()
                                 for way in [*mends, *["as v"] * (target in AS_V)]]:
                drawn = results(data, target, sampler, way)
                lines.append([target, f"{sampler}, {way}", *(cell([result[name] for result in drawn])
                                                             for name in DISTANCES), cell(gaps(drawn))])
        text += [f"**{data}**", ""] + rows(header, lines)

    of, lines = [study.likelihoods(runs, t_max) for t_max in (None, EARLY)], []
    for data, target in itertools.product(FOUR, TARGETS):
        each = [[likelihoods[data, target, "mse", seed] for seed in seeds] for likelihoods in of]
        lines.append([data, target, *(cell([result[name][0] for result in results])
                                      for name in ("bound gap", "exact gap") for results in each),
                      *(cell([result["exact median"] for result in results]) for results in each)])
    text += ["**Nats above the entropy**", ""] + rows(
        ["data", "target", *(f"{name}{up_to}" for name in ("bound", "exact", "exact, median")
                             for up_to in ("", f", t_max {EARLY}"))], lines)
    return text + [f"Networks with `mse`, t in [1e-6, 1 - 1e-6], d = {STABILISER}, {recipe.get('epochs', args.epochs)} "
                   f"epochs{' of the fast recipe' * bool(recipe)}, {args.seeds} seeds; as v: networks of v with "
                   f"`simple` for eps, `s_space` for s, t in [0.001, 0.999]. {STEPS} evaluations on grid `t`, "
                   f"{args.num_samples:,} samples against 50,000 points; mean +- standard deviation over the seeds. At "
                   "the floor: the mean of each of the three distances at most two standard deviations above it. With "
                   f"the log-density of v: and its gap at most {WITHIN} nats from that of v as it is. "
                   f"Likelihoods of {min(args.num_samples // 4, kind_points.POINTS):,} points."]
