"""Three theorems of VDM where both sides are known: one bound for all schedules, noise as augmentation, T -> 2T.

Part of `reproduce_vdm.py`, which says what the functions are. Read `invariance.py` and `weightings.py` first. Chapters
4.3 and A.3.2 - A.4; 4.7; 3.9.
"""
import functools
import math

import torch

import discrete
import invariance
import kind_points
import likelihood
import losses
import metrics
import plots_theorems
import run
import samplers
import weightings
from datasets2d import DATASETS
from ddpm import SCHEDULES
from study import KEPT, cell, floor, gaps, rows

F64 = torch.float64
SETS, SHOWN = ("clusters", "rings"), ("cosine", "linear", "flow", "ve", "edm")
LOW, HIGH = -9.0, 9.0                  # log-SNRs, the ends of all schedules in the tables
POINTS, BATCH = 100_000, 1000          # draws, and those over which t is stratified
EVALUATIONS = 64                       # of samples
TRAINED = dict(recipe="plain", chosen=["mse"], data=SETS, target=["v"])


# One bound for all schedules

@functools.cache
def draws(data):
    """x (n, 2), t (n,) uniform, eps (n, 2): the same for every schedule and network, float32."""
    g = run.generator("cpu", "invariance", data)
    x, t = DATASETS[data].sample(POINTS, g), losses.sample_t((POINTS // BATCH, BATCH), 0.0, g).flatten()
    return x, t, torch.randn(x.shape, generator=g)


@torch.no_grad()
def bounds(model, own, data, like, learned):
    """Diffusion term of a network of v under every schedule -> {name: [nats, its standard error, std / mean]}.

    std / mean is that of one draw, the error that of independent batches. like: the dtype. learned: a schedule.
    """
    found, (x, t, eps) = {}, (c.to(like) for c in draws(data))
    for name, schedule in [*((name, SCHEDULES[name]) for name in SHOWN), ("learned", learned)]:
        other = invariance.between(schedule, LOW, HIGH)
        network = invariance.under(model, "v", own, other)
        terms = torch.cat([2 * losses.loss(network, *some, target="v", loss="nelbo", schedule=other)
                           for some in zip(x.split(10 * BATCH), t.split(10 * BATCH), eps.split(10 * BATCH))]).double()
        batches = terms.unflatten(0, (-1, BATCH)).mean(1)
        found[name] = [batches.mean().item(), (batches.std() / len(batches)**0.5).item(),
                       (terms.std() / terms.mean()).item()]
    return found


def invariance_table(study):
    """VDM 4.3: the bound of one network under every schedule with the same ends, and the variance of one draw of it."""
    own, lines = SCHEDULES["cosine"], []
    learned = study.trained("learned", data=SETS, target=["v"])
    exact = study.measured({key: learned[key] for key in learned if key[3] == 0}, "invariance", lambda one: bounds(
        DATASETS[one.config["data"]].optimal_model("v", own), own, one.config["data"], F64, one.schedule))
    trained = study.measured(study.trained(**TRAINED), "invariance", lambda one: bounds(
        one.model(), own, one.config["data"], torch.float32,
        learned[one.config["data"], "v", "nelbo", one.config["seed"]].schedule))
    for data in SETS:
        for name in (*SHOWN, "learned"):
            nats, error, spread = exact[data, "v", "nelbo", 0][name]
            of_seeds = [trained[data, "v", "mse", seed][name] for seed in range(study.args.seeds)]
            difference = [of[name][0] - of["cosine"][0] for of in (
                trained[data, "v", "mse", seed] for seed in range(study.args.seeds))]
            lines.append([data, name, f"{nats:.3f} +- {error:.3f}", f"{spread:.2f}",
                          cell([found[0] for found in of_seeds]), f"{max(found[1] for found in of_seeds):.3f}",
                          "-" if name == "cosine" else cell(difference), cell([found[2] for found in of_seeds])])
    truth = {data: " +- ".join(f"{value:.3f}" for value in information(data)) for data in SETS}
    return rows(["data", "schedule", "exact denoiser, nats", "std of one draw / mean", "trained v, nats",
                 "Monte Carlo error, at most", "minus that with cosine", "std of one draw / mean"], lines) + [
        f"The diffusion term, log-SNR from {LOW:g} to {HIGH:g} under every schedule, t uniform, {POINTS:,} draws "
        f"(stratified in {POINTS // BATCH} batches, whose means give the error), the same for all. Of the exact "
        "denoiser it is what z of the least noise says of x minus what that of the most does, here by entropies: "
        + ", ".join(f"{value} ({data})" for data, value in truth.items())
        + f". Trained: `mse` of v with cosine, {study.args.epochs} epochs, {study.args.seeds} seeds, mean +- standard "
        "deviation over them. learned: what `--schedule learned` with `nelbo` found in as many epochs with the same "
        "seed (exact: seed 0)."]


@functools.cache
def information(data, n=20_000):
    """I(x; z) at HIGH minus that at LOW by the density of z, with its standard error: what 1/2 int E|error|^2 is."""
    g = run.generator("cpu", "information", data)
    x, eps = DATASETS[data].sample(n, g, F64), torch.randn(n, 2, generator=g, dtype=F64)
    terms = noisy_bound(DATASETS[data], x, eps, torch.full((n,), HIGH, dtype=F64))
    return terms.mean().item(), (terms.std() / n**0.5).item()


def samples_table(study):
    """VDM A.47: samples of networks trained with cosine under other schedules."""
    n, lines = study.args.num_samples, []

    def measure(one):
        found = {}
        for grid in "t", "logsnr":
            for name in SHOWN:
                x = kind_points.draw(one, EVALUATIONS, n, one.config["seed"], study.device, under=name,
                                     sampler="dpmpp", grid=grid)[0]
                first = x if name == SHOWN[0] else first                             # noqa: F821 - cosine comes first
                result = kind_points.measure(one.config, x)
                found[f"{grid} {name}"] = [result[key] for key in KEPT] + [(x - first).abs().max().item()]
        return found
    found = study.measured(study.trained(**TRAINED), "under", measure, f"under-{n}")
    for data in SETS:
        seeds = [found[data, "v", "mse", seed] for seed in range(study.args.seeds)]
        for grid, names in ("t", SHOWN), ("logsnr", SHOWN[:1]):
            for name in names:
                results = [study.with_floor(data, of, f"{grid} {name}") for of in seeds]
                apart = max(of[f"{grid} {other}"][-1] for of in seeds for other in (
                    [name] if grid == "t" else SHOWN))
                lines.append([data, grid, name if grid == "t" else "all", *(
                    cell([result[key] for result in results]) for key in KEPT[:-1]), cell(gaps(results)),
                    f"{apart:.1g}" if apart else "0"])
        lines.append([data, "floor", "", *(floor(results[0], key) for key in KEPT[:-1]), "0", ""])
    return rows(["data", "steps equal in", "schedule", "mean distance", "covariance distance", "sliced Wasserstein",
                 "log-density gap", "farthest from cosine's points"], lines) + [
        f"Networks of v, `mse` with cosine, {study.args.epochs} epochs, {study.args.seeds} seeds, mean +- standard "
        f"deviation; sampler dpmpp, {EVALUATIONS} evaluations, {n:,} samples, the same noise for all schedules, all "
        "between the log-SNRs of cosine at t = 0.001 and 0.999. In equal steps of log-SNR all schedules give the same "
        "points but for rounding (float32): the row has cosine's."]


ENDS = [(-12.9, 12.9), (-12.9, 8.0), (-12.9, 5.0), (-12.9, 3.0), (-6.0, 12.9), (-3.0, 12.9), (-1.0, 12.9)]


def edges(study, n=5000):
    """VDM A.39 - A.42: what the two ends of a schedule cost, with the exact denoiser of the clusters."""
    data, lines, g = DATASETS["clusters"], [], run.generator("cpu", "edges")
    real, least = (kind_points.load(dict(data="clusters")),
                   kind_points.floor(dict(data="clusters"), study.args.num_samples)[0]["sliced_wasserstein"])
    x, eps = data.sample(POINTS, g, F64), torch.randn(POINTS, 2, generator=g, dtype=F64)
    for low, high in ENDS:
        terms = []
        for name in "cosine", "ve":
            alpha, sigma = (c(torch.tensor(high, dtype=F64)) for c in SCHEDULES[name].scale[:2])
            term = data.log_prob(x) - data.log_prob(alpha * x + sigma * eps, alpha, sigma)
            terms.append(f"{term.mean():.3f}")
        part = invariance.between(SCHEDULES["cosine"], low, high)
        model, how = data.optimal_model("v", part), dict(target="v", schedule=part, t_min=0.0)
        found = likelihood.bound(model, x[:n], draws=50, generator=run.generator("cpu", "edges", 1), **how)
        bound = found["prior"] + found["reconstruction"] + found["diffusion"] + data.log_prob(x[:n])
        drawn = samplers.sample(model, (study.args.num_samples, 2), EVALUATIONS, sampler="dpmpp", grid="logsnr",
                                generator=run.generator("cpu", "edges", 2), **how)
        gap = metrics.log_density(data, drawn) - metrics.log_density(data, real)
        lines.append([f"{low:g}", f"{high:g}", *terms, f"{found['prior'].mean():.4f}",
                      f"{bound.mean():.3f} +- {bound.std() / n**0.5:.3f}",
                      f"{metrics.sliced_wasserstein(drawn, real):.3f}", f"{gap:.3f}"])
    return rows(["log-SNR from", "to", "E log q(x) / q(z_0): cosine", "ve", "KL of the prior", "bound - entropy",
                 "samples: sliced Wasserstein", "log-density gap"], lines) + [
        "The exact denoiser of the clusters, nats for two dimensions; cosine but for the column ve. "
        f"E log q(x) / q(z_0), {POINTS:,} points, is what Eq. (A.41) cancels; the bound has the Gaussian "
        f"decoder of `likelihood.py`, {n:,} points. Samples: dpmpp, {EVALUATIONS} evaluations equal in log-SNR, "
        f"{study.args.num_samples:,} of them; floor of the distance {least[0]:.3f} +- {least[1]:.3f}."]


# Noise as augmentation

NODES = torch.linspace(LOW, HIGH, 181, dtype=F64)
WEIGHTS = {"nelbo": ("nelbo", "v"), "sigmoid": ("sigmoid", "v"), "mse of v": ("mse", "v"), "mse of x": ("mse", "x"),
           "mse of eps": ("mse", "eps")}
# data, denoiser, whose exact denoiser it is, its factor, points
CASES = [("clusters", "exact", "clusters", 1.0, 20_000), ("clusters", "1.1 eps_hat", "clusters", 1.1, 20_000),
         ("rings", "exact", "rings", 1.0, 1000), ("rings", "that of the clusters", "clusters", 1.0, 20_000)]


def error(denoiser, factor, x, eps, logsnr):
    """Squared error of factor times eps_hat, a sum over both dimensions: x, eps (n, 2), logsnr (n,) -> (n,)."""
    alpha, sigma = (c(logsnr) for c in SCHEDULES["cosine"].scale[:2])
    z = alpha[:, None] * x + sigma[:, None] * eps
    eps_hat = -sigma[:, None] * denoiser.score(z, alpha, sigma)
    return (factor * eps_hat - eps).square().sum(1)


def noisy_bound(p, x, eps, logsnr):
    """log q(z | x) / p(z) of noisy data minus that at LOW, p the model's density: (n,) nats, mean L(lambda), 4.158."""
    def ratio(logsnr):
        alpha, sigma = (c(logsnr) for c in SCHEDULES["cosine"].scale[:2])
        z = alpha[:, None] * x + sigma[:, None] * eps
        return -2 * sigma.log() - p.log_prob(z, alpha, sigma)             # and |eps|^2 / 2, which cancels
    return ratio(logsnr) - ratio(torch.full_like(logsnr, LOW))


@functools.cache
def sides(data, of, factor, n):
    """Both sides of VDM 4.145 for every row of WEIGHTS -> {name: {side: (mean, standard error)}}, and both shares."""
    g, denoiser, schedule = run.generator("cpu", "sides", data, of), DATASETS[of], SCHEDULES["cosine"]
    new = lambda n: (DATASETS[data].sample(n, g, F64), torch.randn(n, 2, generator=g, dtype=F64))
    uniform = lambda n: losses.sample_t((n,), 0.0, g, F64)
    x, eps = new(n)
    h = 0.5 * torch.stack([error(denoiser, factor, x, eps, logsnr.expand(n)) for logsnr in NODES])
    bound = torch.cat([torch.zeros(1, n), torch.cumulative_trapezoid(h, NODES, dim=0)])       # L(lambda) of each x
    times, found = schedule.t(torch.tensor([HIGH, LOW], dtype=F64)), {}
    n, cut = 10 * n, 2000
    mean = lambda values: (values.mean().item(), (values.std() / len(values)**0.5).item())
    for name, (loss, target) in WEIGHTS.items():
        w, w_fine = (weightings.implied(loss, target, schedule, logsnr) for logsnr in (
            NODES, torch.linspace(LOW, HIGH, cut + 1, dtype=F64)))
        x, eps = new(n)
        t = times[0] + (times[1] - times[0]) * uniform(n)
        loss_at_t = losses.weight(loss, target, t, schedule) * losses.translate("eps", target, t, schedule)
        right, ends = weightings.augmented(w, bound.mean(1))
        share = weightings.negative(w)
        u = uniform(n)
        logsnr, p_w = LOW + (HIGH - LOW) * u, -cut * w_fine.diff()[(cut * u).long().clamp(max=cut - 1)]
        earlier, any_one = LOW + (logsnr - LOW) * torch.rand(n, generator=g, dtype=F64), LOW + (HIGH - LOW) * uniform(n)
        at_end = w[-1] * (HIGH - LOW) / 2 * error(denoiser, factor, x, eps, any_one)
        found[name] = {
            "left, quadrature": mean(torch.trapezoid(w[:, None] * h, NODES, dim=0)),
            "left, Monte Carlo": mean((times[1] - times[0]) * loss_at_t * error(
                denoiser, factor, x, eps, schedule.logsnr(t))),
            "right, quadrature": (right + ends).item(),
            "right, Monte Carlo": mean(p_w * (logsnr - LOW) / 2 * error(denoiser, factor, x, eps, earlier) + at_end),
            "log-density": mean(p_w * noisy_bound(denoiser, x, eps, logsnr) + w[-1] * noisy_bound(
                denoiser, x, eps, torch.full((n,), HIGH, dtype=F64))) if factor == 1 else None,
            "ends": (ends / (right + ends)).item(), "rises": 0.0 if math.isnan(share) else share}
    return found


def augmentation(study):
    """VDM 4.131 - 4.164: the weighted loss and the bound of noisy data, both sides."""
    lines, text = [], lambda value: "-" if value is None else "{:.3f} +- {:.3f}".format(*value)
    for data, denoiser, *how in CASES:
        for name, of in sides(data, *how).items():
            lines.append([data, denoiser, name, *(text(of[side]) for side in ("left, quadrature", "left, Monte Carlo")),
                          f"{of['right, quadrature']:.3f}", text(of["right, Monte Carlo"]), text(of["log-density"]),
                          f"{100 * of['ends']:.1f} %", f"{100 * of['rises']:.0f} %"])
    return rows(["data", "denoiser", "loss", "L_w: quadrature", "Monte Carlo", "by parts: quadrature", "Monte Carlo",
                 "by -log p of noisy data", "of that w(lambda_max) L(0)", "mass of p_w below 0"], lines) + [
        f"Cosine, log-SNR from {LOW:g} to {HIGH:g}, nats for two dimensions, +- standard error. L_w: 1/2 integral of w "
        "times the error of eps_hat, Monte Carlo: the loss of `losses.py` with t uniform. By parts, Eq. (4.145): "
        "integral of p_w L(lambda), plus the end w(lambda_max) L(0); Monte Carlo: log-SNR uniform, and a second one "
        "below it for L. -log p: L(lambda) by the exact log-density of noisy data under the model whose "
        "denoiser it is, Eq. (4.158); 1.1 eps_hat is that of none. Both are without the prior's KL at log-SNR "
        f"{LOW:g}."]


# T -> 2T

STEPS = 2**torch.arange(13)
OFFSET, FROM = 0.5, 4.0                # of the wrong denoiser: x_hat is off by up to so much above this log-SNR
DENOISERS = {"exact": lambda logsnr: 0 * logsnr, "offset": lambda logsnr: 2 * OFFSET**2 * torch.sigmoid(logsnr - FROM)}


@functools.cache
def least_error(data, n=1000):
    """log-SNR (m,) and E|x - E[x | z]|^2 there, a sum over both dimensions."""
    g, logsnr = run.generator("cpu", "doubling", data), torch.linspace(-13, 13, 131, dtype=F64)
    x, eps = DATASETS[data].sample(n, g, F64), torch.randn(n, 2, generator=g, dtype=F64)
    found = []
    for alpha, sigma in zip(*(c(logsnr) for c in SCHEDULES["cosine"].scale[:2])):
        found.append(DATASETS[data].covariance(alpha * x + sigma * eps, alpha, sigma).sum(1).mean())
    return logsnr, torch.stack(found)


def loss_of(steps, schedule, data, extra, t_min=1e-3):
    """L_T, Eq. (3.105), T = steps, of a denoiser with this squared error besides the least: in nats, a number."""
    times = discrete.chain(schedule, steps, t_min).times
    snr, (nodes, errors), logsnr = schedule.snr(times), least_error(data), schedule.logsnr(times[1:])
    i = torch.searchsorted(nodes, logsnr).clamp(1, len(nodes) - 1)
    part = (logsnr - nodes[i - 1]) / (nodes[i] - nodes[i - 1])
    error = torch.exp((1 - part) * errors[i - 1].log() + part * errors[i].log()) + extra(logsnr)
    return 0.5 * ((snr[:-1] - snr[1:]) * error).sum()


def changes(schedule, data):
    """{denoiser: L_T - L_2T of each T in STEPS}, lists."""
    return {name: [(loss_of(T, schedule, data, extra) - loss_of(2 * T, schedule, data, extra)).item()
                   for T in STEPS.tolist()] for name, extra in DENOISERS.items()}


def fig_doubling(study, path):
    """VDM 3.105 - 3.111: L_T - L_2T over T; learned: seed 0."""
    learned = study.trained("learned", data=SETS, target=["v"])
    learned = study.measured({key: learned[key] for key in learned if key[3] == 0}, "doubling",
                             lambda one: changes(one.schedule, one.config["data"]))
    panels = {data: {(name, denoiser): (STEPS, torch.tensor(change)) for name, of in {
        "cosine": changes(SCHEDULES["cosine"], data), "learned": learned[data, "v", "nelbo", 0]}.items()
        for denoiser, change in of.items()} for data in SETS}
    plots_theorems.doubling(panels, path)


RESULTS = {
    "invariance": (invariance_table, "the bound of one network under every schedule, and the variance of a draw of it"),
    "invariance-samples": (samples_table, "samples of networks trained with cosine under other schedules"),
    "edges": (edges, "VDM A.39 - A.42: what the ends of a schedule cost"),
    "augmentation": (augmentation, "weighted losses as bounds of data with noise added, both sides"),
    "doubling": (fig_doubling, "VDM 3.105 - 3.111: L_T - L_2T over T; dashed: a denoiser for which it is not so"),
}
TABLES = "invariance", "invariance-samples", "edges", "augmentation"
