"""What an epoch of training points is given: every batch of every network of a stack, drawn at once.

`train_points.py` calls it; read `losses.py` and `stack.py` first. Every draw is a function of (seed, epoch).

Not here: the loop (`train_points.py`).
"""
import torch

import adaptive
import ddpm
import kind_points
import losses
import optimum
import run
import stack
import variance as variances
from guidance import dropped
from stable_targets import given_batches


def has_bound(configs):
    """Is the bound of a chain in the loss of one of a stack?"""
    return any(config["loss"] in losses.OF_A_CHAIN for config in configs)


def permutation(n, seed, number):
    """The order of n points in an epoch."""
    return torch.randperm(n, generator=run.generator("cpu", seed, "order", number))


def labels(config, number, device):
    """What the network of a run with labels sees of the points of an epoch, some NULL: [(n,)]; of another run []."""
    if not config.get("labels"):
        return []
    label, seed = kind_points.pairs(config, "train")[1], config["seed"]
    label = dropped(label[permutation(len(label), seed, number)], run.generator("cpu", seed, "labels", number))
    return [label[:len(label) // config["batch_size"] * config["batch_size"]].to(device)]


def epoch(data, number, configs, moments=None, learners=None):
    """Importance, z, t, y, w and perhaps `variance.columns`, or labels, of an epoch: a list of (steps, M * B, ...).

    data: of every network, a list of (n, D); number: of the epoch. Members of one set and seed share every draw, but
    for times drawn with their own moments, a list of `adaptive.moved`'s, or by their own `learned_schedule.Learner`.
    """
    device, chain, batch_size = data[0].device, losses.chain_of(configs[0]), configs[0]["batch_size"]
    steps = len(data[0]) // batch_size     # leaves out the last, smaller batch: other points each epoch
    draws, times = {}, []
    for m, (x, config) in enumerate(zip(data, configs)):
        seed = config["seed"]
        times.append((seed, config["data"], m if moments or learners else None))
        if (key := times[-1]) not in draws:
            order = permutation(len(x), seed, number).to(device)
            g = run.generator(device, seed, "noise", number)
            x = x[order[:steps * batch_size]]                                               # (steps * batch_size, D)
            t, importance = (learners[m].draw((steps, batch_size), g) if learners else
                             adaptive.draw((steps, batch_size), config, moments[m] if moments else None, g))
            t, eps = t.flatten(), torch.randn(x.shape, generator=g, device=device)
            if config.get("stable_targets"):
                x, eps = given_batches(x, t, eps, batch_size, ddpm.fixed(config["schedule"]))
            draws[key] = x, t, eps, importance.flatten()
    made = []
    for key, config in zip(times, configs):
        x, t, eps, importance = draws[key]
        z, y, w = losses.regression(x, t, eps, **losses.objective(config))
        of_chain = [torch.cat([variances.columns(
            t, chain, config["target"], config["loss"], config["stabiliser"], importance, config["vlb_weight"]),
            *optimum.given(config, z, t)], 1)] if has_bound(configs) else []
        made.append((importance, z, t, y, w * importance, *of_chain, *labels(config, number, device)))
    return [stack.interleave(c, batch_size) for c in zip(*made)]
