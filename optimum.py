"""What a run on points is tested with, and the best that any network could do there: the exact denoiser's losses.

Read `losses.py`, `variance.py` and `kind_points.py` first. Test points, their times and noise are fixed: the same for
every seed, target and loss.

Not here: samples and their floor (`metrics.py`), likelihoods and the entropy (`likelihood.py`).
"""
import functools

import torch

import cache
import guidance
import kind_points
import losses
import run
import score_matching
import stack
import targets
import variance as variances
from datasets2d import DATASETS
from ddpm import fixed

TESTS = "rescaled", "nelbo"       # also measured at every epoch: the same two for every run, whatever it is trained on
TESTED_T_MIN = 1e-3               # their range of t, unless training has a smaller one


def test_batch(config):
    """The test points of a run, their t and noise fixed: z (n, D), t (n,), y (n, D), weights (n, 3), n = POINTS.

    If there are fewer they are repeated. t is uniform, whatever density training has. The means of weights times
    squared error are the run's own test loss, on its own range of t, and then the exact losses TESTS on t_min = 1e-3:
    points outside of that range have weight 0 there, and those inside a little more. Of a chain, at its own times, they
    are the error of the posterior mean and nothing: the bound is no weighted error, see `test`.
    """
    config = {"t_min": TESTED_T_MIN, "schedule": "cosine", "stabiliser": 0.0} | config
    x, g, chain = kind_points.load(config), run.generator("cpu", "test noise"), losses.chain_of(config)
    x = x.repeat(-(-kind_points.POINTS // len(x)), 1)[:kind_points.POINTS]
    t = (losses.draw_step((kind_points.POINTS,), chain, generator=g)[0] if chain
         else losses.sample_t((kind_points.POINTS,), config["t_min"], g))
    eps = torch.randn(x.shape, generator=g)
    z, y, w = losses.regression(x, t, eps, **losses.objective(config))
    if config.get("sigma") is not None:
        return z, t, y, w
    if chain:
        factor = variances.mean_factor(t, chain, config["target"], config["stabiliser"])
        return z, t, y, torch.stack([w, factor**2, torch.zeros_like(w)], 1)
    t_min = max(config["t_min"], TESTED_T_MIN)
    inside = ((t >= t_min) & (t <= 1 - t_min)).float()
    tests = [inside / inside.mean() * losses.weight(name, config["target"], t, fixed(config["schedule"]),
                                                    config["stabiliser"])
             for name in TESTS]
    return z, t, y, torch.stack([w, *tests], 1)


def test_terms(config, z, t):
    """`variance.columns` of the test points of a run on a chain, for the bound alone; None of another run."""
    chain = losses.chain_of(config)
    return chain and torch.cat([variances.columns(t, chain, config["target"], "vlb", config["stabiliser"]),
                                *given(config, z, t)], 1)


def given(config, z, t):
    """What `variance.loss` is given for the variance `best` besides columns: [Var[x | z]]; else []."""
    if config["variance"] != "best":
        return []
    schedule = fixed(config["schedule"])
    return [kind_points.dataset(config).covariance(z, schedule.alpha(t), schedule.sigma(t))]


def tests(config):
    """What a run is tested with besides its loss: the two losses TESTS, of a chain the mean's error and the bound.

    Of a score without t the Fisher divergence to the true score, Eq. (3.30), per dimension, where that is known.
    """
    if config["sigma"] is not None:
        return ("fisher",) * ("points" not in config)
    return variances.TESTED if config["timesteps"] else TESTS


def columns(config):
    """How many numbers besides the regression a run on a chain has in each row: `variance.columns` and `given`."""
    return 9 + kind_points.dimension(config) * (config["variance"] == "best")


def share_of_bound(config):
    """How much of the bound is in the three tests of a run on a chain: (3,)."""
    return torch.tensor([{"vlb": 1.0, "hybrid": config["vlb_weight"]}.get(config["loss"], 0.0), 0.0, 1.0])


@functools.cache
def optimal_predictions(data, schedule, t_min, timesteps=None, labels=False):
    """x_hat and eps_hat of the exact denoiser at a run's test points, (POINTS, 2) each: made once for all targets.

    Of a chain also Var[x | z]. labels: of the denoiser that knows the label of each point.
    """
    z, t, *_ = test_batch(dict(data=data, target="x", loss="mse", schedule=schedule, t_min=t_min, stabiliser=0.0,
                               timesteps=timesteps))
    mixture, schedule = DATASETS[data], fixed(schedule)
    alpha, sigma = schedule.alpha(t), schedule.sigma(t)
    if labels:
        label = kind_points.pairs(dict(data=data))[1]
        return cache.kept(lambda: [guidance.exact(mixture, target, schedule)(z, t, label) for target in ("x", "eps")],
                          f"optimum of {data} with labels", *vars(mixture).values(), z, t, alpha, sigma, "labels")

    def compute():
        x_hat, score = mixture.denoise_and_score(z, alpha, sigma)
        return [x_hat, -sigma[:, None] * score] + ([mixture.covariance(z, alpha, sigma)] if timesteps else [])
    kept = cache.kept if mixture.dim == 2 else lambda compute, *_: compute()       # 200 MB in 512 dimensions
    return kept(compute, f"optimum of {data}", *vars(mixture).values(), z, t, alpha, sigma,
                *[timesteps][:bool(timesteps)])


@functools.cache
def optimal_errors(data, target, schedule, t_min, stabiliser, timesteps=None, labels=False):
    """Squared error of the exact denoiser at the test points of a run, a mean over dimensions -> (POINTS,)."""
    config = dict(data=data, target=target, loss="mse", schedule=schedule, t_min=t_min, stabiliser=stabiliser,
                  timesteps=timesteps)
    _, t, y, _ = test_batch(config)
    alpha, sigma = fixed(schedule).alpha(t)[:, None], fixed(schedule).sigma(t)[:, None]
    step = losses.step_of(losses.chain_of(config), t[:, None])
    a, b = targets.coefficients(target, alpha, sigma, stabiliser, step)
    x_hat, eps_hat, *_ = optimal_predictions(data, schedule, t_min, timesteps, labels)
    return losses.weighted_error(a * x_hat + b * eps_hat, y, torch.ones_like(t))


def optimum(config, weights):
    """The three losses of `test_batch` for the exact denoiser, the best there can be; None of points of a file.

    Of a learned variance the bound has the best one, q + B^2 Var[x | z].
    """
    if "points" in config:
        return [None] * weights.shape[1]
    of = [config.get(key) for key in ("data", "target", "schedule", "t_min", "stabiliser", "timesteps", "labels")]
    found = (weights * optimal_errors(*of)[:, None]).mean(0)
    if config.get("timesteps"):
        variance = "best" if config["variance"] in variances.LEARNED else config["variance"]
        found += optimal_bound(of[0], of[2], of[3], of[5], variance) * share_of_bound(config)
    return found.tolist()


@functools.cache
def optimal_bound(data, schedule, t_min, timesteps, variance):
    """The bound without the prior, in nats per dimension, of the exact denoiser at the test points of a run."""
    config = dict(data=data, target="x", loss="mse", schedule=schedule, t_min=t_min, stabiliser=0.0,
                  timesteps=timesteps, variance="small")
    z, t, x, _ = test_batch(config)
    x_hat, _, covariance = optimal_predictions(data, schedule, t_min, timesteps)
    columns = torch.cat([test_terms(config, z, t), covariance], 1)
    return variances.loss(*(c.double() for c in (x_hat, x, 0 * t, columns)), variance).mean()


@functools.cache
def test_scores(data, loss, sigma):
    """Of a score without t: test points z, what the loss needs of each, y, the true score, and its loss, a number."""
    config = dict(data=data, target="s", loss=loss, sigma=sigma)
    z, _, y, _ = test_batch(config)
    truth = lambda z: DATASETS[data].score(z, 1.0, sigma)
    found = cache.kept(lambda: [truth(z), score_matching.OBJECTIVES[loss](truth, z, y).mean()],
                       f"score of {data}", *vars(DATASETS[data]).values(), z, y, loss)
    return z, y, *found


def ready(configs, device):
    """A function of a stack's model that tests it -> (M, 1 + tests), and the same of the best possible, M lists."""
    shared = configs[0]
    if shared["sigma"] is not None:
        return ready_scores(configs, device)
    batches = [test_batch(config) for config in configs]
    terms = [test_terms(config, *batch[:2]) for config, batch in zip(configs, batches)]
    optima = [optimum(config, batch[3]) for config, batch in zip(configs, batches)]
    *inputs, weights = zip(*batches)
    inputs = [stack.interleave(c, 625).to(device) for c in inputs]         # small batches: activations fit in the cache
    weights = torch.stack(weights).to(device)                                               # (M, POINTS, 3)
    of_chain = [] if terms[0] is None else [
        stack.interleave(terms, 625).to(device),
        torch.stack([share_of_bound(config) for config in configs]).to(device), shared["variance"]]
    labels = [stack.interleave([kind_points.pairs(config)[1] for config in configs], 625).to(device)
              ] if shared["labels"] else []
    return lambda model: test(model, *inputs, weights, *of_chain, labels=labels), optima


def ready_scores(configs, device):
    """`ready` for scores without t."""
    members, objective = len(configs), score_matching.OBJECTIVES[configs[0]["loss"]]
    if "points" in configs[0]:             # of a file the true score is not known
        batches, optima = [test_batch(config)[0:3:2] for config in configs], [[None]] * members
    else:
        *batches, optima = zip(*(test_scores(config["data"], config["loss"], config["sigma"]) for config in configs))
        batches, optima = zip(*batches), [[best.item(), 0.0] for best in optima]
    inputs = [stack.interleave(c, 625).to(device) for c in zip(*batches)]

    @torch.no_grad()
    def test(model):
        score, found = lambda z: model(z, z[:, 0]), []
        for z, y, *truth in zip(*inputs):
            found.append(torch.stack([objective(score, z, y), *(
                score_matching.fisher(score, z, s) / z.shape[1] for s in truth)], 1))
        return torch.stack(found).unflatten(1, (members, -1)).mean((0, 2))
    return test, optima


@torch.no_grad()
def test(model, z, t, y, weights, terms=None, shares=None, variance="small", labels=()):
    """Mean of weights times squared error for every network of a stack: weights (M, n, 3) -> (M, 3).

    z, t, y: batches from `stack.interleave` that together have all n points of every member. terms, of a chain: batches
    of `test_terms`; shares (M, 3): how much of the bound there is in each mean. labels: [batches], of a run with them.
    """
    errors = [[], []]
    for i in range(len(t)):
        prediction = model(z[i], t[i], *(c[i] for c in labels))
        errors[0].append(losses.weighted_error(variances.split(prediction, y[i])[0], y[i], torch.ones_like(t[i])))
        if terms is not None:
            errors[1].append(variances.loss(prediction, y[i], torch.zeros_like(t[i]), terms[i], variance))
    by_member = lambda c: torch.stack(c).unflatten(1, (len(weights), -1)).transpose(0, 1).flatten(1)       # (M, n)
    found = (weights * by_member(errors[0])[..., None]).mean(1)
    return found if terms is None else found + shares * by_member(errors[1]).mean(1, keepdim=True)
