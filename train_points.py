"""The training loop for points: one network, or a stack of many at once (thesis 4.4).

`train.py` calls it; read that first, then `losses.py` and `stack.py`. Every draw is a function of (seed, step): runs of one
seed differ in their target and loss, not in their draws, and a run that was killed goes on exactly.

Not here: pictures (`train_images.py`).
"""
import functools
import json
import math
import time

import torch

import losses
import run
import stack
import targets
from datasets2d import DATASETS
from ddpm import SCHEDULES
from mlp import MLP

POINTS = 50_000        # to train on, and as many fresh ones to test on (thesis 4.1.1)
JUDGES = "rescaled", "nelbo"     # also measured at every epoch: the same two for every run, whatever it is trained on
JUDGED_T_MIN = 1e-3              # their range of t, unless training has a smaller one


def build_model(config, members=1):
    """The network of a run's config, or a stack of such, with fresh weights from torch's global generator."""
    return MLP(width=config["width"], schedule=SCHEDULES[config["schedule"]], members=members)


def build_optimizer(model, config):
    """Adam in one fused kernel; `train_epoch` sets its learning rate at every step. On CUDA fit to be captured."""
    parameters = list(model.parameters())
    cuda = parameters[0].is_cuda
    lr = torch.tensor(config["lr"], device=parameters[0].device) if cuda else config["lr"]
    return torch.optim.Adam(parameters, lr=lr, fused=True, capturable=cuda)


def test_set(data):
    """The same fresh points for every seed, target and loss -> (POINTS, 2), on the CPU."""
    return DATASETS[data].sample(POINTS, run.generator("cpu", "test", data))


def test_batch(config):
    """The test points of a run, their t and noise fixed: z (n, 2), t (n,), y (n, 2), weights (n, 3), n = POINTS.

    The means of weights times squared error are its own test loss, on its own range of t, and then the exact losses JUDGES
    on t_min = 1e-3: points outside of that range have weight 0 there, and those inside a little more.
    """
    x, g = test_set(config["data"]), run.generator("cpu", "test noise")
    t, eps = losses.sample_t((POINTS,), config["t_min"], g), torch.randn(x.shape, generator=g)
    z, y, w = losses.regression(x, t, eps, **losses.objective(config))
    t_min = max(config["t_min"], JUDGED_T_MIN)
    inside = ((t >= t_min) & (t <= 1 - t_min)).float()
    judges = [inside / inside.mean() * losses.weight(judge, config["target"], t, SCHEDULES[config["schedule"]],
                                                     config["stabiliser"]) for judge in JUDGES]
    return z, t, y, torch.stack([w, *judges], 1)


@functools.cache
def optimal_predictions(data, schedule, t_min):
    """x_hat and eps_hat of the exact denoiser at the test points of a run, (POINTS, 2) each: made once for all targets."""
    z, t, *_ = test_batch(dict(data=data, target="x", loss="mse", schedule=schedule, t_min=t_min, stabiliser=0.0))
    return [DATASETS[data].optimal_model(target, SCHEDULES[schedule])(z, t) for target in ("x", "eps")]


@functools.cache
def optimal_errors(data, target, schedule, t_min, stabiliser):
    """Squared error of the exact denoiser at the test points of a run, a mean over dimensions -> (POINTS,)."""
    _, t, y, _ = test_batch(dict(data=data, target=target, loss="mse", schedule=schedule, t_min=t_min, stabiliser=stabiliser))
    alpha, sigma = SCHEDULES[schedule].alpha(t)[:, None], SCHEDULES[schedule].sigma(t)[:, None]
    a, b = targets.coefficients(target, alpha, sigma, stabiliser)
    x_hat, eps_hat = optimal_predictions(data, schedule, t_min)
    return losses.weighted_error(a * x_hat + b * eps_hat, y, torch.ones_like(t))


def optimum(config, weights):
    """The three losses of `test_batch` for the exact denoiser, the best there can be -> (3,)."""
    errors = optimal_errors(*(config[key] for key in ("data", "target", "schedule", "t_min", "stabiliser")))
    return (weights * errors[:, None]).mean(0)


@torch.no_grad()
def evaluate(model, z, t, y, weights):
    """Mean of weights times squared error for every network of a stack: weights (M, n, 3) -> (M, 3).

    z, t, y: batches from `stack.interleave` that together have all n points of every member.
    """
    errors = torch.stack([losses.weighted_error(model(*c[:2]), c[2], torch.ones_like(c[1])) for c in zip(z, t, y)])
    errors = errors.unflatten(1, (len(weights), -1)).transpose(0, 1).flatten(1)                 # (M, n)
    return (weights * errors[..., None]).mean(1)


def build_step(model, optimizer, members):
    """One step of Adam as a function: z, t, y, w of M * B rows -> their weighted errors (M * B,)."""
    def step(z, t, y, w):
        errors = losses.weighted_error(model(z, t), y, w)
        optimizer.zero_grad()
        errors.unflatten(0, (members, -1)).mean(1).sum().backward()    # members share nothing: a sum of M separate losses
        optimizer.step()
        return errors.detach()
    return step


def ready_step(model, optimizer, members, batch_size):
    """`build_step`, on CUDA captured: there the launch of its hundred small kernels would take longer than they do."""
    step, device = build_step(model, optimizer, members), next(model.parameters()).device
    if device.type != "cuda":
        return step
    z, t = torch.zeros(members * batch_size, 2, device=device), torch.full((members * batch_size,), 0.5, device=device)
    return stack.captured(step, model, optimizer, (z, t, z, t))


def train_epoch(step, optimizer, data, epoch, configs, on_step=lambda: None):
    """One pass of every network of a stack over its own data, a list of (n, 2), in random order.

    Every draw is a function of (seed, step), and members of one set and seed share it. step: `build_step`, perhaps captured.
    Returns losses (steps, M) and the loss over t (M, 20), both of the networks as they were in training.
    """
    shared, device = configs[0], data[0].device
    batch_size = shared["batch_size"]
    steps = len(data[0]) // batch_size     # leaves out the last, smaller batch: other points each epoch
    draws = {}
    for x, config in zip(data, configs):
        key = seed, _ = config["seed"], config["data"]
        if key not in draws:
            order = torch.randperm(len(x), generator=run.generator("cpu", seed, "order", epoch)).to(device)
            g = run.generator(device, seed, "noise", epoch)
            x = x[order[:steps * batch_size]]                                               # (steps * batch_size, 2)
            t, importance = losses.draw_t((steps, batch_size), SCHEDULES[config["schedule"]], config["t_min"], config["t_density"], g)
            draws[key] = x, t.flatten(), torch.randn(x.shape, generator=g, device=device), importance.flatten()
    batches = []
    for config in configs:
        x, t, eps, importance = draws[config["seed"], config["data"]]
        z, y, w = losses.regression(x, t, eps, **losses.objective(config))
        batches.append((z, t, y, w * importance, importance))
    z, t, y, w, importance = (stack.interleave(c, batch_size) for c in zip(*batches))       # (steps, M * batch_size, ...)

    errors = torch.empty_like(t)
    for i in range(steps):
        progress = (epoch * steps + i) / (shared["epochs"] * steps)
        rate = shared["lr"] * 0.5 * (1 + math.cos(math.pi * progress))
        group = optimizer.param_groups[0]
        group["lr"] = group["lr"].fill_(rate) if torch.is_tensor(group["lr"]) else rate
        errors[i] = step(z[i], t[i], y[i], w[i])
        on_step()
    errors, t, importance = (c.unflatten(1, (len(configs), -1)).transpose(0, 1) for c in (errors, t, importance))
    over_t = losses.over_t(errors.flatten(1), t.flatten(1), shared["t_min"], importance=importance.flatten(1))
    return errors.mean(2).T, over_t                                                         # errors are (M, steps, batch_size)


def train_stack(runs, device, on_step, on_epoch):
    """Train runs with equally many finished epochs to the end, as one stack. runs: [(folder, config, checkpoint or None)].

    They differ in data, target, loss and seed only. Writes their folders after every epoch, or where that would take long
    after some seconds. A member whose loss is not finite is left at its last checkpoint. Returns a sentence for each of those.
    on_epoch(epoch, mean train loss, mean test loss).
    """
    folders, configs, states = zip(*runs)
    shared, members = configs[0], len(runs)
    histories = [list(state["history"]) if state else [] for state in states]
    diverged = {}                          # member: the step from which its loss is not finite

    # Data live on the device, one tensor for each set and seed. Test points, times and noise are the same in every run.
    keys = [(config["data"], config["seed"]) for config in configs]
    points = {(data, seed): DATASETS[data].sample(POINTS, run.generator("cpu", seed, "train")).to(device)
              for data, seed in dict.fromkeys(keys)}
    data = [points[key] for key in keys]
    tests = [test_batch(config) for config in configs]
    optima = [optimum(config, test[3]).tolist() for config, test in zip(configs, tests)]
    *inputs, weights = zip(*tests)
    inputs = [stack.interleave(c, 625).to(device) for c in inputs]         # small batches: activations fit in the cache
    weights = torch.stack(weights).to(device)                                               # (M, POINTS, 3)

    def initial(config):
        torch.manual_seed(config["seed"])
        return build_model(config).state_dict()
    model = build_model(shared, members).to(device)
    model.load_state_dict(stack.join([state["model"] if state else initial(config)
                                      for config, state in zip(configs, states)]))
    optimizer = build_optimizer(model, shared)
    if states[0]:
        optimizer.load_state_dict({"state": stack.join([state["optimizer"] for state in states]),
                                   "param_groups": optimizer.state_dict()["param_groups"]})
    step = ready_step(model, optimizer, members, shared["batch_size"])

    steps, saved_at, saving = POINTS // shared["batch_size"], -math.inf, 0.0
    for epoch in range(len(histories[0]), shared["epochs"]):
        start = time.perf_counter()
        train_losses, over_t = train_epoch(step, optimizer, data, epoch, configs, on_step)
        test_losses = evaluate(model, *inputs, weights)
        finite = torch.cat([train_losses, test_losses[:, :1].T]).isfinite().cpu()  # once an epoch: each step would wait for CUDA
        for m in (~finite.all(0)).nonzero().flatten().tolist():
            diverged.setdefault(m, epoch * steps + finite[:-1, m].long().cumprod(0).sum().item())
        if len(diverged) == members:
            break
        train_losses, test_losses, over_t = train_losses.mean(0).tolist(), test_losses.tolist(), over_t.tolist()
        seconds = time.perf_counter() - start
        for m, history in enumerate(histories):
            entry = dict(epoch=epoch + 1, step=(epoch + 1) * steps, train_loss=train_losses[m])
            for key, value, best in zip(("loss", *JUDGES), test_losses[m], optima[m]):
                entry[f"test_{key}"], entry["optimum" if key == "loss" else f"optimum_{key}"] = value, best
            entry["train_loss_over_t"] = [float(f"{value:.5g}") for value in over_t[m]]
            entry["seconds"] = round((history[-1]["seconds"] if history else 0.0) + seconds / members, 3)
            history.append(entry)

        start = time.perf_counter()
        if start - saved_at >= min(20 * saving, 15) or epoch + 1 == shared["epochs"]:
            for m, (folder, config, history) in enumerate(zip(folders, configs, histories)):
                if m in diverged:
                    continue
                run.write(folder / "metrics.jsonl", "".join(json.dumps(h) + "\n" for h in history).encode())
                run.save(folder / "ckpt.pt", dict(config=config, model=stack.member(model.state_dict(), m), history=history,
                                                  optimizer=stack.member(optimizer.state_dict()["state"], m)))
            saved_at = time.perf_counter()
            saving = saved_at - start
        on_epoch(epoch + 1, sum(train_losses) / members, sum(losses[0] for losses in test_losses) / members)

    kept = lambda folder: len(run.load(folder)["history"]) if (folder / "ckpt.pt").exists() else 0
    return [f"{folders[m]}: the loss is not finite from step {step} on - lower --lr or raise --t-min; {kept(folders[m])} "
            "finished epochs are kept" for m, step in diverged.items()]
