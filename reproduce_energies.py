"""Energies beside the exact -log p, and what it costs to have one: curl, time, samples, likelihood (VDM 4.20 - 4.24).

Part of `reproduce_slides.py`, which says what the functions are. Read `energy.py` first.
"""
import torch

import kind_points
import likelihood
import plots_slides
import run
import tables
from datasets2d import DATASETS
from metrics import DISTANCES
from reproduce_scores import budget, trained
from study import Missing, cell, floor, gaps, rows

SETS, TIMES, TESTED = ("clusters", "rings"), (0.02, 0.1, 0.5), 5000
SAMPLE_STEPS, FLOW_POINTS, ODE_STEPS = 128, 500, 64


def relative_curl(field, z):
    """Root mean square of the curl, ds_1/dz_2 - ds_2/dz_1, over that of an entry of the Jacobian; z (B, 2)."""
    _, backward = torch.func.vjp(field, z)
    jacobian = torch.stack([backward(torch.eye(2).to(z)[d].expand_as(z))[0] for d in range(2)], 1)
    curl = jacobian[:, 0, 1] - jacobian[:, 1, 0]
    return (curl.square().mean() / jacobian.square().mean()).sqrt().item()


def points_at(one, t):
    """z of test points at a time, and the coefficients."""
    x = kind_points.load(one.config)[:TESTED]
    alpha, sigma = (c.item() for c in (one.schedule.alpha(torch.tensor(t)), one.schedule.sigma(torch.tensor(t))))
    return alpha * x + sigma * torch.randn(x.shape, generator=run.generator("cpu", "energies", t)), alpha, sigma


def of_run(one):
    """Of a run: curl, and of an energy the standard deviation of E + log p over the data, at TIMES; the flow's gap.

    In nats. The gap is that of the exact likelihood of the probability flow ODE to the data's own, of the same points.
    """
    model, found, data = one.model(), {"curl": [], "nats": []}, DATASETS[one.config["data"]]
    for t in TIMES:
        z, alpha, sigma = points_at(one, t)
        at = torch.full((len(z),), t)
        found["curl"].append(relative_curl(lambda z: model(z, at), z))                          # noqa: B023
        if one.config["energy"]:
            with torch.no_grad():
                difference = model.energy(z, at) + data.log_prob(z, alpha, sigma)
            found["nats"].append(difference.std().item())
    x = kind_points.test_examples(one.config, FLOW_POINTS, torch.device("cpu"))
    log_p, _ = likelihood.log_likelihood(one.model().double(), x, target=one.target, schedule=one.schedule,
                                         steps=ODE_STEPS, stabiliser=one.config["stabiliser"])
    return found | {"flow": tables.mean_and_error(data.log_prob(x) - log_p)}


def energies(study):
    """The plain network beside one whose output is an energy."""
    lines, errors = [], []
    networks = {title: trained(study, recipe, "mse", "eps", SETS)
                for title, recipe in (("plain", "silu"), ("energy", "energy"))}
    for data in SETS:
        for title, runs in networks.items():
            runs = {key: one for key, one in runs.items() if key[0] == data}
            found = list(study.measured(runs, "energy", of_run).values())
            samples = list(study.sampled(runs, SAMPLE_STEPS).values())
            errors += [result["flow"][1] for result in found]
            steps = [len(one.history) * (kind_points.POINTS // one.config["batch_size"]) for one in runs.values()]
            lines.append([data, title, *(cell([result["nats"][k] for result in found]) if found[0]["nats"] else "-"
                                         for k in range(len(TIMES))),
                          *("{:.1e}".format(sum(result["curl"][k] for result in found) / len(found))
                            for k in range(len(TIMES))),
                          cell([1e3 * one.history[-1]["seconds"] / n for one, n in zip(runs.values(), steps)]),
                          *(cell([result[name.__name__] for result in samples]) for name in DISTANCES[1:]),
                          cell(gaps(samples)), cell([result["flow"][0] for result in found])])
        lines.append([data, "floor", *["-"] * (2 * len(TIMES) + 1),
                      *(floor(samples[0], name.__name__) for name in DISTANCES[1:]), "0", "0"])
    return rows(["data", "network", *(f"E + log p, t = {t}" for t in TIMES), *(f"curl, t = {t}" for t in TIMES),
                 "ms a step", "covar. dist.", "sliced Wasserstein", "log-density gap", "flow: NLL - entropy"],
                lines) + [
        f"eps with `mse`, cosine, SiLU in both, {budget(study)}, {study.args.seeds} seeds, mean +- standard deviation. "
        f"E + log p: its standard deviation over {TESTED:,} test points at that time, in nats, 0 for the exact energy. "
        "Curl of the field: root mean square over that of an entry of the Jacobian, float32. ms a step: of training, "
        f"of one network in a stack. {study.args.num_samples:,} samples by `ancestral` in {SAMPLE_STEPS} steps; the "
        "log-density gap, of samples to data, in nats. Flow: exact likelihood of the probability flow ODE, "
        f"{FLOW_POINTS} test points, in nats, with a standard error of at most {max(errors):.3f}."]


def fig_planes(study, path, n=121, limit=2.6):
    """E of seed 0 beside the exact -log p over the plane, both from their least value."""
    if study.args.recorded:
        Missing()()
    line, panels = torch.linspace(-limit, limit, n), {}
    z = torch.stack(torch.meshgrid(line, line, indexing="xy"), -1).flatten(0, 1)
    for data in SETS:
        one = trained(study, "energy", "mse", "eps", SETS)[data, "eps", "mse", 0]
        model = one.model()
        for t in TIMES:
            on_data, alpha, sigma = points_at(one, t)
            exact = lambda z: -DATASETS[data].log_prob(z.double(), alpha, sigma).float()        # noqa: B023
            learned = lambda z: model.energy(z, torch.full((len(z),), t))                       # noqa: B023
            shift = (learned(on_data) - exact(on_data)).mean()
            least = exact(z).min()
            panels[f"{data}, t = {t}"] = {"-log p, exact": (exact(z) - least).unflatten(0, (n, n)).numpy(),
                                         "E, learned": (learned(z) - shift - least).unflatten(0, (n, n)).numpy()}
    plots_slides.energies(panels, limit, path)
