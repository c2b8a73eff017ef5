"""The training loop for pictures: AdamW with warm-up, clipped gradients, EMA, bf16, several GPUs (thesis 4.4.4).

`train.py` calls it; read that first, then `unet.py` and `images.py`. Loss, target and schedule are those of the points. What
step i trains on, its pictures, flips, times and noise, is a function of (seed, i): a run that was killed goes on exactly,
and N processes, each with its part of the batch, do what one does with all of it.

Not here: sampling and FID (`sample.py`, `metrics.py`).
"""
import contextlib
import copy
import functools
import json
import math
import os
import time

import torch
from torch import distributed
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import get_ema_multi_avg_fn

import ddpm
import images
import losses
import run
import samplers
import unet

JUDGED = 250          # test pictures at once
GRID_STEPS = 100      # of the sampler that draws a grid during training
SAVE_EVERY = 60       # seconds between two checkpoints, at least


def build_model(config):
    """The network of a run's config, with fresh weights from torch's global generator."""
    (channels, *size), network = config["shape"], {key: config[key] for key in unet.PRESETS["ddpm"]}
    return unet.UNet(channels, max(size), schedule=ddpm.SCHEDULES[config["schedule"]], **network)


def processes(device=torch.device("cpu")):
    """Rank and number of the processes that torchrun started; 0 and 1 without it. Joins them at the first call, for a device."""
    if "WORLD_SIZE" not in os.environ:
        return 0, 1
    if not distributed.is_initialized():
        distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return distributed.get_rank(), distributed.get_world_size()


def ema_decay(decay, step):
    """Decay of the exponential moving average after `step` steps: (1 + step) / (10 + step) until it reaches `decay`.

    So the average forgets the first, random weights at once, whatever the length of the run.
    """
    return min(decay, (1 + step) / (10 + step))


def autocast(config, device):
    """Where the config asks for it, matrix products and convolutions in bf16."""
    return torch.autocast(device.type, torch.bfloat16, enabled=config["precision"] == "bf16")


@functools.lru_cache(2)
def order(seed, epoch, n, device):
    """In which an epoch goes through the pictures."""
    return torch.randperm(n, generator=run.generator("cpu", seed, "order", epoch)).to(device)


def batch(pictures, step, config):
    """The whole batch of a step: x in [-1, 1] and eps (B, C, H, W), t and its importance (B,), on the device of the pictures.

    An epoch goes through the pictures in an order of its own and leaves out the last, smaller batch.
    """
    size, seed, device = config["batch_size"], config["seed"], pictures.device
    epoch, i = divmod(step, len(pictures) // size)
    g = run.generator(device, seed, "noise", step)
    x = pictures[order(seed, epoch, len(pictures), device)[i * size:(i + 1) * size]]
    x = images.to_float(images.flip(x, g) if config["flip"] else x)
    t, importance = losses.draw_t((size,), ddpm.SCHEDULES[config["schedule"]], config["t_min"], config["t_density"], g)
    return x, t, torch.randn(x.shape, generator=g, device=device), importance


def judges(config):
    """Names of the losses that every run is tested with, whatever it trains on: all that have a weight for its target."""
    names = []
    for name in losses.LOSSES:
        with contextlib.suppress(ValueError):
            losses.weight(name, config["target"], torch.tensor([0.5]), ddpm.SCHEDULES[config["schedule"]])
            names.append(name)
    return names


@torch.no_grad()
def evaluate(model, pictures, config, device):
    """Test losses of a network, without autocast: {"test_loss": ..., "test_mse": ..., ...}, means over the pictures.

    pictures: uint8, on the CPU. Their t and noise are the same in every run. Each process does its share.
    """
    (rank, world), g, n = processes(), run.generator("cpu", "test noise"), len(pictures)
    objective, names = losses.objective(config), judges(config)
    weight = lambda name, t: losses.weight(name, config["target"], t, objective["schedule"], config["stabiliser"])
    shuffled = torch.randperm(n, generator=g)        # t rises with the row: without this with the class of sorted pictures
    times, total = losses.sample_t((n,), config["t_min"], g), torch.zeros(len(names) + 1, device=device)
    for i, (rows, t) in enumerate(zip(shuffled.split(JUDGED), times.split(JUDGED))):
        x = images.to_float(pictures[rows])
        eps = torch.randn(x.shape, generator=g)
        if i % world == rank:
            x, t, eps = x.to(device), t.to(device), eps.to(device)
            z, y, own = losses.regression(x, t, eps, **objective)
            errors = losses.weighted_error(model(z, t), y, torch.ones_like(t))
            total += (torch.stack([own, *(weight(name, t) for name in names)]) * errors).sum(1)
    if world > 1:
        distributed.all_reduce(total)
    return dict(zip(["test_loss", *(f"test_{name}" for name in names)], (total / n).tolist()))


def draw(model, shape, steps, config, generator, t_min=1e-3, clip=True, **how):
    """Pictures (B, C, H, W), uint8; clip keeps x_hat in [-1, 1] at every step. how: sampler, grid and eta of `samplers`."""
    objective = losses.objective(config)
    with autocast(config, generator.device):
        x = samplers.sample(model, shape, steps, target=objective["target"], schedule=objective["schedule"], t_min=t_min,
                            generator=generator, stabiliser=objective["stabiliser"], clip=1.0 if clip else math.inf, **how)
    return images.to_uint8(x)


def train_run(folder, config, state, device, model, sets, steps, minutes=math.inf, test_every=2000, grid_every=10_000,
              compiled=False, on_step=lambda *facts: None):
    """Train one network on pictures until it has done `steps` steps or `minutes`; returns its last history entry.

    sets: uint8 pictures to train and to test on. state: checkpoint to go on from, or None. on_step(step, loss, seconds) is
    called at every step, on the first process. Writes ckpt.pt and metrics.jsonl at every test and between them about once a
    minute; samples-<step>.png every `grid_every` steps and at the end. The history is of the averaged weights but for the
    losses in training. SystemExit at the first loss that is not finite, with the last checkpoint kept.
    """
    rank, world = processes()
    channels_last = {"memory_format": torch.channels_last} if device.type == "cuda" else {}    # on a CPU GroupNorm is slow in it
    model, objective = model.to(**channels_last), losses.objective(config)
    pictures, test = sets[0].to(device), sets[1]
    optimizer = torch.optim.AdamW(model.parameters(), lr=config["lr"], fused=True)
    ema = copy.deepcopy(model)
    step, history, recent, seconds = 0, [], [], 0.0        # recent: (loss, norm of the gradient, errors, t, importance) since the last test
    if state:
        for part, key in (model, "model"), (ema, "ema"), (optimizer, "optimizer"):
            part.load_state_dict(state[key])
        step, history, seconds = state["step"], list(state["history"]), state["seconds"]
        for weight, moments in optimizer.state.items():    # in the memory layout of this device
            moments |= {key: torch.empty_like(weight).copy_(moments[key]) for key in ("exp_avg", "exp_avg_sq")}
        recent = list(zip(*(column.to(device) for column in state["recent"])))
        if recent and len(recent[0][2]) != config["batch_size"] // world:
            recent = []                                    # of another number of processes: their parts have other sizes
    average, mine = list(ema.parameters()), slice(rank, None, world)
    network = DistributedDataParallel(model) if world > 1 else model
    network = torch.compile(network) if compiled else network

    def columns():
        return [torch.stack(column) for column in zip(*recent)]

    def check():
        bad = (~torch.stack(columns()[:2]).isfinite().all(0)).nonzero() if recent else []    # a bad gradient spoils the weights
        if len(bad):
            raise SystemExit(f"{folder}: the loss is not finite at step {step - len(recent) + bad[0].item()} - lower --lr or "
                             "raise --t-min; what was saved before is kept")

    def save():
        if rank == 0:
            run.write(folder / "metrics.jsonl", "".join(json.dumps(h) + "\n" for h in history).encode())
            run.save(folder / "ckpt.pt", dict(config=config, model=model.state_dict(), ema=ema.state_dict(), step=step,
                                              optimizer=optimizer.state_dict(), history=history, seconds=seconds,
                                              recent=[column.cpu() for column in columns()]))

    start, saved = time.perf_counter() - seconds, time.perf_counter()
    over = bool(history) and (step >= steps or seconds >= 60 * minutes)
    while not over:
        x, t, eps, importance = batch(pictures, step, config)
        z, y, w = losses.regression(x, t, eps, **objective)
        z, y, w, t, importance = (c[mine] for c in (z, y, w * importance, t, importance))
        optimizer.param_groups[0]["lr"] = config["lr"] * min(1, (step + 1) / config["warmup"])
        with autocast(config, device):
            y_hat = network(z, t)
        errors = losses.weighted_error(y_hat, y, w)
        loss = errors.mean()
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config["clip_norm"])
        optimizer.step()
        step += 1
        get_ema_multi_avg_fn(ema_decay(config["ema"], step))(average, list(model.parameters()), None)

        recent.append((loss.detach(), norm.detach(), errors.detach(), t, importance))
        seconds = time.perf_counter() - start
        over = step == steps or seconds >= 60 * minutes
        if world > 1 and minutes < math.inf:                # the clock of the first process counts for all
            flag = torch.tensor(float(over), device=device)
            distributed.broadcast(flag, 0)
            over = bool(flag)
        if rank == 0:
            on_step(step, loss.detach(), seconds)
        due = time.perf_counter() - saved >= SAVE_EVERY
        if step % test_every == 0 or over:
            check()
            loss, norm, errors, t, importance = columns()
            if world > 1:
                distributed.all_reduce(loss)
            entry = dict(step=step, epoch=step * config["batch_size"] / len(pictures), train_loss=loss.mean().item() / world,
                         gradient_norm=norm.mean().item(), **evaluate(ema, test, config, device))
            over_t = losses.over_t(errors.flatten(), t.flatten(), config["t_min"], importance=importance.flatten()).tolist()
            entry["train_loss_over_t"] = [float(f"{value:.5g}") if value == value else None for value in over_t]      # nan where no t fell
            seconds = time.perf_counter() - start
            history.append(entry | dict(seconds=round(seconds, 3)))
            recent, due = [], True
        if due:
            check()
            save()
            saved = time.perf_counter()
        if rank == 0 and (step % grid_every == 0 or over):
            samples = draw(ema, (64, *pictures.shape[1:]), GRID_STEPS, config, run.generator(device, config["seed"], "grid"),
                           max(config["t_min"], 1e-3))
            images.save_png(images.grid(samples.cpu(), 8), folder / f"samples-{step}.png")
    return history[-1]
