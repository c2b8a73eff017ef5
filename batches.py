"""What an epoch of training points is given: every batch of every network of a stack, drawn at once.

`train_points.py` calls it; read `losses.py` and `stack.py` first. Every draw is a function of (seed, epoch).

Not here: the loop (`train_points.py`).
"""
import torch

import losses
import optimum
import run
import stack
import variance as variances
from ddpm import SCHEDULES


def has_bound(configs):
    """Is the bound of a chain in the loss of one of a stack?"""
    return any(config["loss"] in losses.OF_A_CHAIN for config in configs)


def epoch(data, number, configs, moments=None, learners=None):
    """Importance, z, t, y, w and perhaps `variance.columns` of an epoch -> a list of (steps, M * B, ...).

    data: of every network, a list of (n, D); number: of the epoch. Members of one set and seed share every draw, but
    for times drawn with their own moments, a list of `losses.draw_step`'s, or by their own `learned_schedule.Learner`.
    """
    device, chain, batch_size = data[0].device, losses.chain_of(configs[0]), configs[0]["batch_size"]
    steps = len(data[0]) // batch_size     # leaves out the last, smaller batch: other points each epoch
    draws, times = {}, []
    for m, (x, config) in enumerate(zip(data, configs)):
        seed = config["seed"]
        times.append((seed, config["data"], m if moments or learners else None))
        if (key := times[-1]) not in draws:
            order = torch.randperm(len(x), generator=run.generator("cpu", seed, "order", number)).to(device)
            g = run.generator(device, seed, "noise", number)
            x = x[order[:steps * batch_size]]                                               # (steps * batch_size, D)
            t, importance = (
                losses.draw_step((steps, batch_size), chain, moments[m] if moments else None, g) if chain else
                learners[m].draw((steps, batch_size), g) if learners else
                losses.draw_t((steps, batch_size), SCHEDULES[config["schedule"]], config["t_min"],
                              config["t_density"], g))
            draws[key] = x, t.flatten(), torch.randn(x.shape, generator=g, device=device), importance.flatten()
    made = []
    for key, config in zip(times, configs):
        x, t, eps, importance = draws[key]
        z, y, w = losses.regression(x, t, eps, **losses.objective(config))
        of_chain = [torch.cat([variances.columns(
            t, chain, config["target"], config["loss"], config["stabiliser"], importance, config["vlb_weight"]),
            *optimum.given(config, z, t)], 1)] if has_bound(configs) else []
        made.append((importance, z, t, y, w * importance, *of_chain))
    return [stack.interleave(c, batch_size) for c in zip(*made)]
