"""The training loop for points: one network, or a stack of many at once (thesis 4.4).

`train.py` calls it; read that first, then `batches.py` and `stack.py`. Every draw is a function of (seed, step): runs
of one seed differ in their target and loss, not in their draws, and a run that was killed goes on exactly.

Not here: images (`train_images.py`).
"""
import copy
import functools
import itertools
import math
import sys
import time

import torch
from tqdm import tqdm

import adaptive
import batches
import checkpoints
import kind_points
import losses
import optimum
import progress
import run
import score_matching
import settings
import stack
import threads
import variance as variances
from adam import Adam, average
from learned_schedule import Learner, move_ends
from muon import Muon

ENDS_POINTS = 5000     # that the ends of a learned schedule are moved with, an epoch


def build_optimizer(model, config):
    """Adam in one fused kernel, or Muon; `train_epoch` sets the rate at every step. On CUDA fit to be captured."""
    parameters = list(model.parameters())
    device = parameters[0].device
    lr = torch.tensor(config["lr"], device=device) if device.type == "cuda" else config["lr"]
    if device.type == "cpu" or config.get("optimizer") == "muon":
        return (Muon if config.get("optimizer") == "muon" else Adam)(parameters, lr)
    return torch.optim.Adam(parameters, lr=lr, fused=True, capturable=device.type == "cuda")


def build_step(model, optimizer, members, variance="small", loss="mse", labels=False):
    """One step of Adam as a function: z, t, y, w of M * B rows -> weighted errors (M * B,), norms of gradients (M,).

    columns: of `variance.columns`, where the bound is in the loss, or with labels those. loss: of a score without t the
    objective of all.
    """
    parameters, objective = list(model.parameters()), score_matching.OBJECTIVES.get(loss)

    def step(z, t, y, w, *columns):
        if objective:
            errors = objective(lambda z: model(z, t), z, y)
        else:
            prediction, columns = (model(z, t, *columns), ()) if labels else (model(z, t), columns)
            errors = (variances.loss(prediction, y, w, *columns, variance) if columns
                      else losses.weighted_error(prediction, y, w))
        optimizer.zero_grad()
        errors.unflatten(0, (members, -1)).mean(1).sum().backward()    # members share nothing: a sum of separate losses
        for p in parameters:
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad     # the constant of an energy
        norms = torch.stack([torch.linalg.vector_norm(p.grad, dim=(1, 2)) for p in parameters]).square().sum(0).sqrt()
        optimizer.step()
        return errors.detach(), norms
    return step


def ready_step(model, optimizer, members, batch_size, dim=2, variance="small", columns=0, loss="mse", labels=False,
               precision="fp32"):
    """`build_step`, on CUDA captured: there the launch of its hundred small kernels would take longer than they do.

    columns: how many it is given of `variance.columns`.
    """
    step, device = build_step(model, optimizer, members, variance, loss, labels), next(model.parameters()).device
    if precision == "bf16":                # products alone; the weights stay in float32
        step = torch.autocast(device.type, torch.bfloat16, cache_enabled=False)(step)
    if device.type != "cuda":
        return threads.shared(step, device)
    rows = members * batch_size
    z, t = torch.zeros(rows, dim, device=device), torch.full((rows,), 0.5, device=device)
    of_chain = [torch.ones(rows, columns, device=device)] if columns else []
    of_chain += [torch.zeros(rows, dtype=torch.long, device=device)] * labels
    return stack.captured(step, model, optimizer, (z, t, z, t, *of_chain))


def epoch_steps(config):
    """Steps of an epoch: the last, smaller batch is left out. SystemExit if there is none."""
    n = kind_points.size(config)
    if n < config["batch_size"]:
        raise SystemExit(f"{config['data']} has {n} points to train on, less than a batch - lower --batch-size")
    return n // config["batch_size"]


def train_epoch(step, optimizer, data, epoch, configs, on_step=lambda: None, moments=None, learners=None):
    """One pass of every network of a stack over its own data, a list of (n, D), in random order.

    moments, learners: of `batches.epoch`, which are moved. step: `build_step`, perhaps captured. Returns losses
    (steps, M), the loss over t (M, 20) and norms of the gradient (steps, M), of the networks as they were in training.
    """
    shared = configs[0]
    importance, *inputs = batches.epoch(data, epoch, configs, moments, learners)            # (steps, M * B, ...)
    t, steps = inputs[1], len(importance)

    errors, norms = torch.empty_like(t), t.new_empty(steps, len(configs))
    for i in range(steps):
        done = (epoch * steps + i) / (shared["epochs"] * steps)
        rate = shared["lr"] * 0.5 * (1 + math.cos(math.pi * done))
        group = optimizer.param_groups[0]
        group["lr"] = group["lr"].fill_(rate) if torch.is_tensor(group["lr"]) else rate
        errors[i], norms[i] = step(*(c[i] for c in inputs))
        on_step()
    errors, t, importance = (c.unflatten(1, (len(configs), -1)).transpose(0, 1) for c in (errors, t, importance))
    for m, before in enumerate(moments or []):             # of the whole epoch: 50 draws of each of 1000 steps
        moments[m] = adaptive.moved(before, t[m].flatten(), (errors[m] / importance[m]).flatten(), 1.0, shared)
    for learner, *draws in zip(learners or [], t, errors):
        learner.update(*draws)
    over_t = losses.over_t(errors.flatten(1), t.flatten(1), shared["t_min"], importance=importance.flatten(1),
                           chain=losses.chain_of(shared))
    return errors.mean(2).T, over_t, norms                                                  # errors (M, steps, batch)


def train_stack(runs, device, on_step, on_epoch, on_ready=lambda: None):
    """Train runs, [(folder, config, checkpoint or None)], with equally many finished epochs to the end, as one stack.

    They differ in data, target, loss and seed only. Writes their folders after every epoch, or where that would take
    long after some seconds. A member whose loss is not finite is left at its last checkpoint. Returns a sentence for
    each of those. on_ready() is called before the first step, on_epoch(epoch, train losses, test losses) after each
    epoch with those of the members that are not left.
    """
    folders, configs, states = zip(*runs)
    shared, members = configs[0], len(runs)
    histories = [list(state["history"]) if state else [] for state in states]
    diverged = {}                          # member: the step from which its loss is not finite

    # Data live on the device, a tensor for each dataset and seed. Test points, times and noise are those of every run.
    points = {(config["data"], config["seed"]): config for config in configs}
    points = {key: kind_points.load(config, "train").to(device) for key, config in points.items()}
    data = [points[config["data"], config["seed"]] for config in configs]
    test, optima = optimum.ready(configs, device)
    moments = ([state and state["moments"].to(device) for state in states] if shared["t_density"] in adaptive.POWERS
               else None)
    learners = ([Learner(config, state and state["schedule"]) for config, state in zip(configs, states)]
                if shared["schedule"] == "learned" else None)

    def initial(config):
        torch.manual_seed(config["seed"])
        return kind_points.build_model(config).state_dict()
    model = kind_points.build_model(shared, members).to(device)
    with checkpoints.fitting(", ".join(map(str, folders))):
        model.load_state_dict(stack.join([state["model"] if state else initial(config)
                                          for config, state in zip(configs, states)]))
    ema = copy.deepcopy(model) if shared["ema"] else model
    if states[0] and shared["ema"]:
        ema.load_state_dict(stack.join([state["ema"] for state in states]))
    optimizer = build_optimizer(model, shared)
    if states[0]:
        optimizer.load_state_dict({"state": stack.join([state["optimizer"] for state in states]),
                                   "param_groups": optimizer.state_dict()["param_groups"]})
    step = ready_step(model, optimizer, members, shared["batch_size"], kind_points.dimension(shared),
                      shared["variance"], batches.has_bound(configs) * optimum.columns(shared), shared["loss"],
                      shared["labels"], shared["precision"])

    steps, saved_at, saving = epoch_steps(shared), -math.inf, 0.0
    number = itertools.count(len(histories[0]) * steps + 1)

    def after_step():
        if shared["ema"]:
            average(ema, model, shared["ema"], next(number))
        on_step()
    on_ready()
    for epoch in range(len(histories[0]), shared["epochs"]):
        start = time.perf_counter()
        train_losses, over_t, norms = train_epoch(step, optimizer, data, epoch, configs, after_step, moments, learners)
        if learners:
            some = [x[:ENDS_POINTS] for x in data]
            noise = [torch.randn(x.shape, generator=run.generator(device, config["seed"], "ends", epoch), device=device)
                     for x, config in zip(some, configs)]
            move_ends(learners, ema, some, noise, [config["target"] for config in configs])
        test_losses = test(ema)
        finite = torch.cat([train_losses, test_losses[:, :1].T]).isfinite().cpu()  # once an epoch: it waits for CUDA
        for m in (~finite.all(0)).nonzero().flatten().tolist():
            diverged.setdefault(m, epoch * steps + finite[:-1, m].long().cumprod(0).sum().item())
        if len(diverged) == members:
            break
        train_losses, test_losses, over_t = train_losses.mean(0).tolist(), test_losses.tolist(), over_t.tolist()
        norms = norms.cpu()
        seconds = time.perf_counter() - start
        for m, history in enumerate(histories):
            entry = dict(epoch=epoch + 1, step=(epoch + 1) * steps, train_loss=train_losses[m])
            for key, value, best in zip(("loss", *optimum.tests(shared)), test_losses[m], optima[m]):
                entry[f"test_{key}"], entry["optimum" if key == "loss" else f"optimum_{key}"] = value, best
            if shared["sigma"] is None:
                entry["train_loss_over_t"] = [float(f"{v:.5g}") if v == v else None for v in over_t[m]]  # no t there
            entry["gradient_norms"] = [float(f"{value:.4g}") for value in norms[:, m]]
            entry["seconds"] = round((history[-1]["seconds"] if history else 0.0) + seconds / members, 3)
            history.append(entry)

        start = time.perf_counter()
        if start - saved_at >= min(20 * saving, 15) or epoch + 1 == shared["epochs"]:
            for m, (folder, config, history) in enumerate(zip(folders, configs, histories)):
                if m in diverged:
                    continue
                run.write(folder / "metrics.jsonl", checkpoints.lines(history))
                run.save(folder / "ckpt.pt", dict(config=config, model=stack.member(model.state_dict(), m),
                                                  history=history,
                                                  optimizer=stack.member(optimizer.state_dict()["state"], m),
                                                  **{"ema": stack.member(ema.state_dict(), m)} if shared["ema"] else {},
                                                  **{"moments": moments[m].cpu()} if moments else {},
                                                  **{"schedule": learners[m].state()} if learners else {}))
            saved_at = time.perf_counter()
            saving = saved_at - start
        on_epoch(epoch + 1, *zip(*((train_losses[m], test_losses[m][0]) for m in range(members) if m not in diverged)))

    kept = lambda folder: len(run.load(folder)["history"]) if (folder / "ckpt.pt").exists() else 0
    return [f"{folders[m]}: the loss is not finite from step {step} on - lower --lr or raise --t-min; "
            f"{kept(folders[m])} finished epochs are kept" for m, step in diverged.items()]


def in_words(losses):
    """Their mean, and of several their range."""
    spread = f" ({min(losses):.4f} to {max(losses):.4f})" if len(losses) > 1 else ""
    return f"{sum(losses) / len(losses):.4f}{spread}"


def train(args, device):
    """Train all runs that the arguments of train.py ask for, as stacks."""
    import plots  # here: a stack trains without matplotlib
    configs = [config | kind_points.facts(config["data"]) for config in settings.configs(args)]
    steps = {config["data"]: epoch_steps(config) for config in configs}
    for config in configs:
        if config["loss"] == "exact" and (dim := kind_points.dimension(config)) > 4096:
            raise SystemExit(f"--loss exact takes {dim:,} backward passes a step - take --loss sliced")
    for data, points in {config["data"]: config["points"] for config in configs if "points" in config}.items():
        print(f"{data}: {points['rows']:,} points of dimension {points['dim']}, a tenth of them to test on")
    runs = run.begin(configs, args.out, args.resume, args.overwrite)
    finished = lambda run: len(run[2]["history"]) if run[2] else 0
    together = lambda run: (finished(run), repr(settings.alike(run[1])))
    unfinished = sorted((run for run in runs if finished(run) < args.epochs), key=together)
    size = args.stack or stack.size(device)
    stacks = [group[i:i + size] for group in (list(group) for _, group in itertools.groupby(unfinished, key=together))
              for i in range(0, len(group), size)]
    if len(unfinished) < len(runs):
        print(f"{len(runs) - len(unfinished)} of {len(runs)} runs are finished already")

    terminal, start = sys.stderr.isatty(), time.perf_counter()
    before = sum(finished(run) * steps[run[1]["data"]] for run in runs)
    done, failures, spent, since, shown = before, [], 0.0, start, start    # spent: seconds of training alone
    with tqdm(total=args.epochs * sum(steps[config["data"]] for config in configs), initial=before, unit="step",
              disable=not terminal, smoothing=0) as bar:
        say = bar.write if terminal else functools.partial(print, flush=True)
        for number, group in enumerate(stacks, 1):
            of_epoch = steps[group[0][1]["data"]]
            say(f"{group[0][0]}" + (f" and {len(group) - 1} more" if len(group) > 1 else "")
                + f": {args.schedule} schedule, {args.epochs} epochs of {of_epoch} steps on {device}"
                + (f", after epoch {finished(group[0])}" if finished(group[0]) else "")
                + (f"; stack {number} of {len(stacks)}" if len(stacks) > 1 else ""))

            def on_ready():
                nonlocal since
                since = time.perf_counter()
                bar.unpause()

            def on_epoch(epoch, train_losses, test_losses):
                nonlocal done, spent, since, shown
                done += of_epoch * len(group)                                                   # noqa: B023
                now = time.perf_counter()
                spent, since = spent + now - since, now
                line = f"epoch {epoch:3d}  train {in_words(train_losses)}  test {in_words(test_losses)}"
                left = spent / (done - before) * (bar.total - done)
                if terminal:
                    bar.set_description(line)
                elif len(group) == 1 or epoch == args.epochs or progress.due(start, shown):     # noqa: B023
                    shown = now
                    say(f"{line}  {progress.seconds():.0f} s, {left:.0f} s left")
            with run.enough_memory("a smaller --stack, --width or --batch-size"):
                failures += train_stack(group, device, lambda: bar.update(len(group)),          # noqa: B023
                                        on_epoch, on_ready)
    if failures:                           # the others are done
        raise SystemExit("\n".join(failures))

    for folder, config, _ in runs:
        last = (history := run.load(folder)["history"])[-1]
        if not (folder / "loss.png").exists():
            plots.loss_curve(history, config, folder / "loss.png")
        known = last["optimum"] is not None
        found = [f"test loss {last['test_loss']:.4f} "
                 + (f"(best possible {last['optimum']:.4f})" if known else "(best possible unknown)")]
        for name in optimum.tests(config)[-1:]:
            best, title, unit = f"{last[f'optimum_{name}']:.3f}" if known else "unknown", name.upper(), " nats"
            title, unit = ("Fisher divergence", "") if name == "fisher" else (title, unit)
            found.append(f"{title} {last[f'test_{name}']:.3f} ({best}){unit} per dimension")
        print(f"{folder}: {', '.join(found)}, {last['seconds']:.0f} s")
    words = "--ckpt", *(folder for folder, _, _ in runs[:3]), "--steps", args.timesteps or 512
    words += ("--sampler", "langevin") if args.sigma is not None else ()
    print(f"{progress.seconds():.0f} s in all; next: {run.command('sample.py', *words)}")
