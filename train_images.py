"""The training loop for images: AdamW with warm-up, clipped gradients, EMA, bf16, several GPUs (thesis 4.4.4).

`train.py` calls it; read that first, then `unet.py` and `images.py`. Loss, target and schedule are those of the points.
What step i trains on, its images, flips, times, noise and dropout, is a function of (seed, i): a run that was killed
goes on exactly, and N processes, each with its part of the batch, do what one does with all of it (dropout's draws are
a process's own).

Not here: sampling and FID (`sample.py`, `metrics.py`).
"""
import copy
import functools
import math
import os
import time
from pathlib import Path

import torch
from torch import distributed
from torch.nn.parallel import DistributedDataParallel

import adaptive
import checkpoints
import draw_images
import guidance
import images
import kind_images
import learned_schedule
import losses
import progress
import run
import settings
import variance as variances
from adam import average

GRID_STEPS = 100      # of the sampler that draws a grid during training
SAVE_EVERY = 60       # seconds between two checkpoints, at least


@functools.lru_cache(2)
def order(seed, epoch, n, device):
    """In which an epoch goes through the images."""
    return torch.randperm(n, generator=run.generator("cpu", seed, "order", epoch)).to(device)


def batch(data, step, config, moments=None, learner=None, labels=None):
    """The whole batch of a step: x in [-1, 1] and eps (B, C, H, W), t and its importance (B,), on the images' device.

    moments: of `adaptive.moved`, where the loss says which t are drawn; learner: of a learned schedule, which does.
    labels: of the data (N,), those of the batch come last, some NULL.
    An epoch goes through the images in an order of its own and leaves out the last, smaller batch.
    """
    size, seed, device = config["batch_size"], config["seed"], data.device
    epoch, i = divmod(step, len(data) // size)
    g = run.generator(device, seed, "noise", step)
    rows = order(seed, epoch, len(data), device)[i * size:(i + 1) * size]
    x = data[rows]
    x = images.to_float(images.flip(x, g) if config["flip"] else x)
    t, importance = learner.draw((size,), g) if learner else adaptive.draw((size,), config, moments, g)
    label = [] if labels is None else [guidance.dropped(labels[rows], run.generator(device, seed, "labels", step))]
    return x, t, torch.randn(x.shape, generator=g, device=device), importance, *label


def train_run(folder, config, state, device, model, sets, steps, minutes=math.inf, test_every=2000, grid_every=10_000,
              compiled=False, on_step=lambda *facts: None):
    """Train one network on images until it has done `steps` steps or `minutes`; returns its last history entry.

    sets: uint8 images to train and to test on, and of a run with labels those. state: checkpoint to go on from, or
    None. on_step(step, loss, seconds, took) is called at every step, on the first process; took: seconds of the last
    "test" and "grid", and of "all" of them in this call. Writes ckpt.pt and metrics.jsonl at every test and between
    them about once a minute; samples-<step>.png every `grid_every` steps and at the end. The history is of the averaged
    weights but for the losses in training. SystemExit at the first loss that is not finite, with the last checkpoint
    kept.
    """
    rank, world = run.processes()
    # on a CPU GroupNorm is slow in it
    channels_last = {"memory_format": torch.channels_last} if device.type == "cuda" else {}
    model, objective = model.to(**channels_last), losses.objective(config)
    data, labels = sets[0].to(device), [label.to(device) for label in sets[2:3]]
    optimizer = torch.optim.AdamW(model.parameters(), lr=config["lr"], fused=True)
    ema = copy.deepcopy(model).eval()
    # recent: (loss, norm of the gradient, errors, t, importance) since the last test
    step, history, recent, seconds, chain = 0, [], [], 0.0, losses.chain_of(config)
    aware, moments = config["t_density"] in adaptive.POWERS, None
    learner = learned_schedule.Learner(config, state and state["schedule"]) if config["schedule"] == "learned" else None
    if state:
        adam = {"state": state["optimizer"]["state"], "param_groups": optimizer.state_dict()["param_groups"]}
        moments = state["moments"].to(device) if aware else None
        with checkpoints.fitting(folder):
            for part, values in (model, state["model"]), (ema, state["ema"]), (optimizer, adam):
                part.load_state_dict(values)
        step, history, seconds = state["step"], list(state["history"]), state["seconds"]
        for weight, kept in optimizer.state.items():       # in the memory layout of this device
            kept |= {key: torch.empty_like(weight).copy_(kept[key]) for key in ("exp_avg", "exp_avg_sq")}
        recent = list(zip(*(column.to(device) for column in state["recent"])))
        if recent and len(recent[0][2]) != config["batch_size"] // world:
            recent = []                                    # of another number of processes: their parts differ in size
    mine = slice(rank, None, world)
    network = DistributedDataParallel(model) if world > 1 else model
    network = torch.compile(network) if compiled else network

    def columns():
        return [torch.stack(column) for column in zip(*recent)]

    def check():                                           # a bad gradient spoils the weights
        bad = (~torch.stack(columns()[:2]).isfinite().all(0)).nonzero() if recent else []
        if len(bad):
            raise SystemExit(f"{folder}: the loss is not finite at step {step - len(recent) + bad[0].item()} - "
                             "lower --lr or raise --t-min; what was saved before is kept")

    def save():
        if rank == 0:
            run.write(folder / "metrics.jsonl", checkpoints.lines(history))
            run.save(folder / "ckpt.pt", dict(config=config, model=model.state_dict(), ema=ema.state_dict(), step=step,
                                              optimizer=optimizer.state_dict(), history=history, seconds=seconds,
                                              recent=[column.cpu() for column in columns()],
                                              **{"moments": moments.cpu()} if aware else {},
                                              **{"schedule": learner.state()} if learner else {}))

    took = dict(test=None, grid=None, all=0.0)

    def finished(part, since):
        took[part] = time.perf_counter() - since
        took["all"] += took[part]

    start, saved = time.perf_counter() - seconds, time.perf_counter()
    over = bool(history) and (step >= steps or seconds >= 60 * minutes)
    while not over:
        x, t, eps, importance, *label = batch(data, step, config, moments, learner, *labels)
        z, y, w = losses.regression(x, t, eps, **objective)
        x, z, y, w, t, importance, *label = (c[mine] for c in (x, z, y, w * importance, t, importance, *label))
        optimizer.param_groups[0]["lr"] = config["lr"] * min(1, (step + 1) / config["warmup"])
        torch.manual_seed(run.generator("cpu", config["seed"], "dropout", step, rank).initial_seed())
        with settings.autocast(config, device):
            prediction = network(z, t, *label)
        errors = kind_images.loss(prediction, x, t, y, w, config, importance)
        loss = errors.mean()
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config["clip_norm"])
        optimizer.step()
        step += 1
        average(ema, model, config["ema"], step)

        if aware:
            moments = adaptive.moved(moments, t, errors.detach() / importance, 0.1, config)
        if learner:
            learner.update(t[None], errors[None])
            if step % learned_schedule.ENDS_EVERY == 0:
                learned_schedule.move_ends([learner], ema, [x], [eps], [config["target"]],
                                           kind_images.decoder(config))
        recent.append((loss.detach(), norm.detach(), errors.detach(), t, importance))
        seconds = time.perf_counter() - start
        over = step >= steps or seconds >= 60 * minutes
        if world > 1 and minutes < math.inf:                # the clock of the first process counts for all
            flag = torch.tensor(float(over), device=device)
            distributed.broadcast(flag, 0)
            over = bool(flag)
        if rank == 0:
            on_step(step, loss.detach(), seconds, took)
        due = time.perf_counter() - saved >= SAVE_EVERY
        if step % test_every == 0 or over:
            since = time.perf_counter()
            check()
            loss, norm, errors, t, importance = columns()
            if world > 1:
                distributed.all_reduce(loss)
            entry = dict(step=step, epoch=step * config["batch_size"] / len(data),
                         train_loss=loss.mean().item() / world, gradient_norm=norm.mean().item(),
                         gradient_norms=[float(f"{value:.4g}") for value in norm.tolist()],
                         **kind_images.test(ema, sets[1], config, device, *sets[3:]))
            over_t = losses.over_t(errors.flatten(), t.flatten(), config["t_min"], importance=importance.flatten(),
                                   chain=chain).tolist()
            # nan where no t fell
            entry["train_loss_over_t"] = [float(f"{value:.5g}") if value == value else None for value in over_t]
            seconds = time.perf_counter() - start
            history.append(entry | dict(seconds=round(seconds, 3)))
            recent, due = [], True
            finished("test", since)
        if due:
            check()
            save()
            saved = time.perf_counter()
        if rank == 0 and (step % grid_every == 0 or over):
            since = time.perf_counter()
            evaluated = progress.counter("drawing a grid", GRID_STEPS, "evaluations")
            network_of_x = ema if chain is None else variances.Mean(ema, [config["target"]], chain)
            samples = draw_images.draw(progress.counted(network_of_x, evaluated), (64, *data.shape[1:]), GRID_STEPS,
                                       config, run.generator(device, config["seed"], "grid"), run.smallest_t(config))
            images.save_png(images.grid(samples.cpu(), 8), folder / f"samples-{step}.png")
            finished("grid", since)
    return history[-1]


def seconds_left(step, steps, per_step, took, config, tested, test_every, grid_every):
    """Of a run after `step` steps of `per_step` seconds: other steps, tests and grids -> seconds, of the last two.

    Before the first test or grid there is an estimate: a step costs an image what three evaluations do.
    """
    per_image = per_step / (3 * config["batch_size"])
    test = took["test"] or tested * per_image
    grid = took["grid"] or 64 * GRID_STEPS * per_image
    times = lambda every: -(-steps // every) - (step - 1) // every     # at multiples from this step on, and the end
    return (steps - step) * per_step + times(test_every) * test + times(grid_every) * grid, test + grid


def reporter(which, config, steps, minutes, tested, test_every, grid_every):
    """A function to be called at every step that shows loss, speed and time left now and then.

    which: words for the run; tested: its number of test images.
    """
    start = shown = time.perf_counter()
    first = before = None

    def on_step(step, loss, seconds, took):
        nonlocal first, start, shown, before
        if first is None:                                  # of the first step, which warms up, the clock does not run
            first, start, before = step, time.perf_counter(), took["all"]
        elif progress.due(start, shown):
            shown = time.perf_counter()
            per_step = (shown - start - (took["all"] - before)) / (step - first)
            left, end = seconds_left(step, steps, per_step, took, config, tested, test_every, grid_every)
            left = min(left, max(0, 60 * minutes - seconds) + end)
            progress.say(f"{which}step {step:,} of {steps:,}  loss {loss.item():.4f}  {1 / per_step:.2f} steps/s  "
                         f"{config['batch_size'] / per_step:.0f} images/s  {left:.0f} s left")
    return on_step


def train(args, device):
    """Train all runs that the arguments of train.py ask for, one by one; in every process that torchrun started."""
    rank, world = run.processes(device)
    if world > 1 and device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    if (args.t_density in adaptive.POWERS or args.schedule == "learned") and world > 1:
        own = "--schedule learned" if args.schedule == "learned" else f"--t-density {args.t_density}"
        raise SystemExit(f"{own} is for one process, each would draw other times - leave it out")
    if args.batch_size % world:
        raise SystemExit(f"--batch-size {args.batch_size} cannot be divided among {world} processes - "
                         "make it a multiple")
    precision = args.precision if args.precision != "auto" else "bf16" if device.type == "cuda" else "fp32"

    splits = functools.cache(lambda name, by_name: kind_images.splits(name, args, by_name))
    runs, names = [], list(dict.fromkeys(args.data))
    for name in names:
        facts = kind_images.facts(name)
        sets, classes = splits(name, "images" in facts)
        args.data, shape = [name], list(sets[0].shape[1:])
        flip = name in images.FLIPPED if args.flip is None else args.flip
        runs += settings.configs(args, shape=shape, flip=flip, precision=precision, **classes, **facts)
    runs = [kind_images.known(Path(args.out) / settings.name(config), config, args) for config in runs]
    if rank == 0:                                          # before any is trained
        run.check(runs, args.out, args.resume, args.overwrite)
    limit = dict(minutes=args.minutes)                     # of the first run, then its number of steps
    for number, config in enumerate(runs, 1):
        data, _ = splits(config["data"], "images" in config)
        if rank == 0:
            (folder, _, state), = run.begin([config], args.out, args.resume, args.overwrite)
        if world > 1:
            distributed.barrier()
        if rank > 0:
            folder = Path(args.out) / settings.name(config)
            state = run.load(folder) if args.resume and (folder / "ckpt.pt").exists() else None
        steps = min(limit.get("steps", args.epochs * (len(data[0]) // args.batch_size)), args.train_steps)
        with run.enough_memory("a smaller --batch-size, --channels or --image-size"):
            torch.manual_seed(config["seed"])
            model = kind_images.build_model(config).to(device)
            if rank == 0:
                print(f"{folder}: {sum(p.numel() for p in model.parameters()):,} parameters, {len(data[0]):,} images "
                      f"of {'x'.join(map(str, config['shape']))}{', half of them mirrored' * config['flip']}, "
                      f"{steps:,} steps in {precision} on "
                      f"{run.device_name(device)}" + (f", after step {state['step']:,}" if state else ""), flush=True)
            last = train_run(folder, config, state, device, model, data, steps, limit["minutes"],
                             args.test_every, args.grid_every,
                             args.compile if args.compile is not None else device.type == "cuda",
                             reporter(f"run {number} of {len(runs)}: " if len(runs) > 1 else "", config, steps,
                                      limit["minutes"], len(data[1]), args.test_every, args.grid_every))
        progress.say("")
        if args.minutes < math.inf:                        # so that runs of one call are trained equally long
            limit = dict(minutes=math.inf, steps=last["step"])
        if rank == 0:
            tests = ", ".join(f"{key.removeprefix('test_')} {value:.4g}" for key, value in last.items()
                              if key.startswith("test_"))
            print(f"{folder}: step {last['step']:,}, test losses of the averaged weights: {tests}; "
                  f"{last['seconds']:.0f} s of training, {progress.seconds():.0f} s in all")
    if rank == 0:
        print("next: " + run.command("sample.py", "--ckpt", folder, "--steps", args.timesteps or 500))
    if world > 1:                                          # together: one that left earlier would abort at exit
        distributed.barrier()
        distributed.destroy_process_group()
