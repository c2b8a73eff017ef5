"""A 2D set in a plane of D dimensions: is it the target or the loss space that survives, beside what is possible?

Part of `reproduce_vdm.py`, which says what the functions are. Read `embedded.py` and `reproduce_spaces.py` first.

Not here: images (`reproduce_spaces_images.py`).
"""
import functools

import torch

import ddpm
import kind_points
import losses
import metrics
import plots_spaces
import run
import targets
from datasets2d import DATASETS
from study import cell, rows

EPOCHS, WIDTH = 8, 256                 # of the recipe
PLANE, DIMENSIONS = "swiss_roll", (2, 8, 32, 128, 512)
SPACES = {"x": "rescaled", "eps": "simple", "v": "v_space"}
TESTED = 10_000                        # points


def name_of(dim):
    return f"{PLANE}-{dim}"


def trained(study):
    return study.trained("embedded", None, [name_of(dim) for dim in DIMENSIONS], [*SPACES],
                         min(study.args.epochs, EPOCHS))


@functools.cache
def test_points(data, density):
    """z (TESTED, D), t, x and the exact x_hat and eps_hat; density: what is uniform, t or logsnr."""
    schedule, g = ddpm.SCHEDULES["cosine"], run.generator("cpu", "embedded", data, density)
    x = DATASETS[data].sample(TESTED, g)
    t = losses.draw_t((TESTED,), schedule, 1e-3, density, g, torch.float64)[0].float()
    z = ddpm.q_sample(x, t, torch.randn(x.shape, generator=g), schedule)
    return z, t, x, *(DATASETS[data].optimal_model(name, schedule)(z, t) for name in ("x", "eps"))


@torch.no_grad()
def errors(one):
    """Of a Run: NELBO minus the best possible, nats per dimension; the error of x_hat, t uniform, sums over dimensions.

    excess: |x_hat - E[x | z]|^2, and best: |E[x | z] - x|^2; together they are the error.
    """
    schedule, model, found = ddpm.SCHEDULES["cosine"], kind_points.in_chunks(one.model()), {}
    for density in "uniform", "logsnr":
        z, t, x, best_x, best_eps = test_points(one.config["data"], density)
        alpha, sigma = (ddpm.expand(c, z) for c in (schedule.alpha(t), schedule.sigma(t)))
        prediction = model(z, t)
        if density == "uniform":
            x_hat = targets.to_x(one.target, prediction, z, alpha, sigma)
            found |= {"excess": (x_hat - best_x).double().square().sum(1).mean().item(),
                      "best": (best_x - x).double().square().sum(1).mean().item()}
        else:
            low, high = schedule.ends(1e-3)
            eps_hat = targets.to_eps(one.target, prediction, z, alpha, sigma)
            error = (eps_hat - best_eps).double().square().mean()
            found["gap"] = (0.5 * (high - low) / (1 - 2e-3) * error).item()
    return found


def of_samples(one, n):
    """Of n samples of a Run: sliced Wasserstein distance in the plane, mean squared distance from the plane."""
    data = DATASETS[one.config["data"]]
    x = kind_points.draw(one, 64, n, one.config["seed"], sampler="dpmpp", grid="logsnr")[0]
    if not x.isfinite().all():
        return {"plane": None, "off": None}
    return {"plane": metrics.sliced_wasserstein(data.project(x), kind_points.load(dict(data=PLANE))).item(),
            "off": data.off(x).double().square().sum(1).mean().item()}


def measured(study):
    """What is measured of every network -> {key: dict}."""
    n = study.args.num_samples // 4
    return study.measured(trained(study), "embedded", lambda one: errors(one) | of_samples(one, n), f"embedded-{n}")


MEASURES = {"Error of x_hat above the best possible, divided by it": lambda found: found["excess"] / found["best"],
            "NELBO minus the best possible, nats per dimension": lambda found: found["gap"],
            "Sliced Wasserstein distance in the plane": lambda found: found["plane"],
            "Mean squared distance of samples from the plane": lambda found: found["off"]}


def of_perfect(study, title, dim):
    """The measure of the exact denoiser, or of points of the data."""
    if "plane" not in title:
        return 0.0
    floors, _ = kind_points.floor(dict(data=PLANE), study.args.num_samples // 4)
    return floors["sliced_wasserstein"][0] if title.startswith("Sliced") else (dim - 2) * 1e-4


def embedded(study):
    """Three targets in three loss spaces over D: error, NELBO, samples in the plane and off it."""
    found, text = measured(study), []
    for title, value in MEASURES.items():
        lines = [[f"{dim}, {target}",
                  *(cell([value(found[name_of(dim), target, loss, seed]) for seed in range(study.args.seeds)])
                    for loss in SPACES.values()), f"{of_perfect(study, title, dim):.3g}"]
                 for dim in DIMENSIONS for target in SPACES]
        text += [f"**{title}**", "",
                 *rows(["D, target", *(f"{name}-space, `{loss}`" for name, loss in SPACES.items()), "best possible"],
                       lines)]
    best = [found[name_of(dim), "x", "rescaled", 0]["best"] for dim in DIMENSIONS]
    return text + [
        f"{PLANE} in a plane of D dimensions and noise of 0.01 off it, width {WIDTH}, "
        f"{min(study.args.epochs, EPOCHS)} epochs of 50,000 points, {study.args.seeds} seeds, mean +- standard "
        f"deviation. Errors on {TESTED:,} points; the best possible error of x_hat, a sum over dimensions and mean "
        f"over t, is {', '.join(f'{value:.3f}' for value in best)}. {study.args.num_samples // 4:,} samples by dpmpp "
        "with 64 evaluations on grid logsnr."]


def fig_embedded(study, path):
    """Error of x_hat and samples in the plane over D, a line a target, a column a loss space."""
    found, panels = measured(study), {}
    for title in list(MEASURES)[:3:2]:
        for name, loss in SPACES.items():
            curves = {target: [[float("nan") if (value := MEASURES[title](
                found[name_of(dim), target, loss, seed])) is None else value for dim in DIMENSIONS]
                for seed in range(study.args.seeds)] for target in SPACES}
            panels[title.replace(", divided", ",\ndivided").replace("distance in", "distance\nin"),
                   f"loss in {name}-space"] = curves, of_perfect(study, title, 2) or None
    plots_spaces.over_dimension(panels, DIMENSIONS, path)


RESULTS = {
    "embedded": (embedded, "a 2D set in a plane of up to 512 dimensions: three targets in three loss spaces"),
    "embedded-over-dimension": (fig_embedded, "the same over the dimension"),
}
