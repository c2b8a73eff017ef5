"""Train one network on one target with one loss.

    python train.py --target eps --loss mse                # the rings, 100 epochs, about a minute on a laptop
    python train.py --data waves --target v --loss nelbo --seed 1
    python train.py --target eps --loss mse --resume       # goes on after a kill, ends in the same weights

Writes runs/<data>-<target>-<loss>-s<seed>/ with ckpt.pt, config.json, metrics.jsonl and loss.png. Noise, times and
batches are functions of (seed, step): runs of one seed differ in their target and loss, not in their draws.
"""
import argparse
import json
import math
import sys
import time
from pathlib import Path

import torch
from tqdm import tqdm

import losses
import plots
import run
from datasets2d import DATASETS
from ddpm import SCHEDULES
from mlp import MLP
from targets import TARGETS

POINTS = 50_000        # to train on, and as many fresh ones to test on (thesis 4.1.1)


def parse(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     usage="python train.py [options], see --help")
    group = parser.add_argument_group("what to train")
    group.add_argument("--data", choices=DATASETS, default="rings", help="2D set (rings)")
    group.add_argument("--target", choices=TARGETS, default="eps", help="what the network predicts (eps)")
    group.add_argument("--loss", choices=losses.LOSSES, default="mse", help="how its errors are weighed (mse)")
    group.add_argument("--schedule", choices=SCHEDULES, default="cosine", help="noise schedule (cosine)")
    group.add_argument("--t-min", type=run.number(float, 1e-6, 0.49), default=1e-3,
                       help="t is uniform in [t_min, 1 - t_min] (0.001)")
    group.add_argument("--stabiliser", type=run.number(float, 0), default=0.0,
                       help="d in the score target -sigma eps / (sigma^2 + d) (0; the thesis's numbers: 0.01)")
    group = parser.add_argument_group("how to train it")
    group.add_argument("--epochs", type=run.number(int, 1), default=100, help="passes over 50,000 points (100)")
    group.add_argument("--batch-size", type=run.number(int, 1, POINTS), default=512, help="(512)")
    group.add_argument("--lr", type=run.number(float, 0), default=1e-3, help="Adam's, decays to 0 as a cosine (0.001)")
    group.add_argument("--width", type=run.number(int, 1), default=128, help="of the hidden layers (128)")
    group.add_argument("--seed", type=run.number(int, 0, 2**62), default=0, help="of weights, data, batches and noise (0)")
    group.add_argument("--device", choices=["auto", "cpu", "cuda", "mps"], default="auto", help="(auto: cuda or cpu)")
    group = parser.add_argument_group("where the run goes")
    group.add_argument("--out", default="runs", help="folder of all runs (runs)")
    group.add_argument("--resume", action=argparse.BooleanOptionalAction, default=False, help="go on with this run")
    group.add_argument("--overwrite", action=argparse.BooleanOptionalAction, default=False, help="start it again")
    args = parser.parse_args(argv)
    if args.resume and args.overwrite:
        parser.error("--resume goes on with a run and --overwrite starts it again: choose one")
    try:
        losses.weight(args.loss, args.target, torch.tensor([0.5]), SCHEDULES[args.schedule], args.stabiliser)
    except ValueError as error:            # a loss that has no weight for this target
        parser.error(str(error))
    return args


def build_model(config):
    """The network of a run's config, with fresh weights from torch's global generator."""
    return MLP(width=config["width"], schedule=SCHEDULES[config["schedule"]])


def objective(config):
    """What `losses.loss` needs to know besides model and data."""
    return dict(target=config["target"], loss=config["loss"], schedule=SCHEDULES[config["schedule"]],
                stabiliser=config["stabiliser"])


def build_optimizer(model, config):
    """Adam in one fused kernel; `train_epoch` sets its learning rate at every step."""
    return torch.optim.Adam(model.parameters(), lr=config["lr"], fused=True)


def test_set(data):
    """The same fresh points for every seed, target and loss -> (POINTS, 2), on the CPU."""
    return DATASETS[data].sample(POINTS, run.generator("cpu", "test", data))


@torch.no_grad()
def evaluate(model, z, t, y, w, chunk=5000):
    """Mean loss over the test points, their t and noise fixed -> number."""
    chunks = zip(*(c.split(chunk) for c in (z, t, y, w)))
    return torch.cat([losses.weighted_error(model(z, t), y, w) for z, t, y, w in chunks]).mean().item()


def train_epoch(model, optimizer, data, epoch, config, on_step=lambda: None):
    """One pass over data (n, 2) in random order -> losses (steps,). Every draw is a function of (seed, step)."""
    seed, batch_size, device = config["seed"], config["batch_size"], data.device
    steps = len(data) // batch_size        # leaves out the last, smaller batch: other points each epoch
    order = torch.randperm(len(data), generator=run.generator("cpu", seed, "order", epoch)).to(device)
    g = run.generator(device, seed, "noise", epoch)
    x = data[order[:steps * batch_size]]                                                    # (steps * batch_size, 2)
    t = losses.sample_t((steps, batch_size), config["t_min"], g).flatten()
    eps = torch.randn(x.shape, generator=g, device=device)
    z, y, w = losses.regression(x, t, eps, **objective(config))

    batches = zip(*(c.split(batch_size) for c in (z, t, y, w)))
    step_losses = torch.empty(steps, device=device)
    for i, (z, t, y, w) in enumerate(batches):
        loss = losses.weighted_error(model(z, t), y, w).mean()
        optimizer.zero_grad()
        loss.backward()
        progress = (epoch * steps + i) / (config["epochs"] * steps)
        optimizer.param_groups[0]["lr"] = config["lr"] * 0.5 * (1 + math.cos(math.pi * progress))
        optimizer.step()
        step_losses[i] = loss.detach()
        on_step()
    return step_losses


def main(argv=None):
    args = parse(argv)
    device = run.device(args.device)
    config = {k: v for k, v in vars(args).items() if k not in ("out", "device", "resume", "overwrite")}
    folder = Path(args.out) / f"{args.data}-{args.target}-{args.loss}-s{args.seed}"
    ckpt = folder / "ckpt.pt"

    # A run is never silently overwritten, and never resumed with other settings.
    state = run.load(ckpt) if ckpt.exists() and not args.overwrite else None
    if state and state["config"] != config:
        changed = [f"--{k.replace('_', '-')} {v}" for k, v in state["config"].items() if config.get(k) != v]
        raise SystemExit(f"{folder} holds a run with other settings ({' '.join(changed)}) - keep both by giving this one "
                         "another folder of runs, or start it again with train.py --overwrite")
    if state and not args.resume:
        raise SystemExit(f"{folder} holds this run already - add --resume to go on with it or --overwrite to start again")
    run.write(folder / "config.json", json.dumps(config, indent=2).encode())   # before anything goes: a full disk stops here
    if args.overwrite:
        for name in "ckpt.pt", "metrics.jsonl", "loss.png", "samples.npy", "samples.png", "metrics.json":
            (folder / name).unlink(missing_ok=True)

    # Data live on the device as one tensor. Test points, times and noise are the same in every run.
    dataset = DATASETS[args.data]
    train = dataset.sample(POINTS, run.generator("cpu", args.seed, "train")).to(device)
    test, g = test_set(args.data), run.generator("cpu", "test noise")
    t, eps = losses.sample_t((POINTS,), args.t_min, g), torch.randn(test.shape, generator=g)
    z, y, w = losses.regression(test, t, eps, **objective(config))
    fixed = [c.to(device) for c in (z, t, y, w)]
    optimum = evaluate(dataset.optimal_model(args.target, SCHEDULES[args.schedule], args.stabiliser), *fixed)

    torch.manual_seed(args.seed)
    model = build_model(config).to(device)
    optimizer = build_optimizer(model, config)
    history = []
    if state:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        history = state["history"]

    steps = POINTS // args.batch_size
    print(f"{folder}: {args.target} with {args.loss} on {args.data}, {args.schedule} schedule, {args.epochs} epochs of "
          f"{steps} steps on {device}; best possible test loss {optimum:.4f}")
    if history:
        print(f"resuming after epoch {len(history)}")
    terminal = sys.stderr.isatty()
    bar = tqdm(total=args.epochs * steps, initial=len(history) * steps, unit="step", disable=not terminal)
    seconds = history[-1]["seconds"] if history else 0.0
    for epoch in range(len(history), args.epochs):
        start = time.perf_counter()
        step_losses = train_epoch(model, optimizer, train, epoch, config, on_step=bar.update)
        test_loss = evaluate(model, *fixed)
        finite = step_losses.isfinite()
        if not (finite.all() and math.isfinite(test_loss)):    # once an epoch: at every step it would wait for the GPU
            bar.close()
            raise SystemExit(f"the loss is not finite from step {epoch * steps + finite.long().cumprod(0).sum()} on - "
                             f"lower --lr or raise --t-min; {len(history)} finished epochs are kept in {folder}")
        seconds += time.perf_counter() - start
        history.append(dict(epoch=epoch + 1, step=(epoch + 1) * steps, train_loss=step_losses.mean().item(),
                            test_loss=test_loss, optimum=optimum, seconds=round(seconds, 2)))
        run.write(folder / "metrics.jsonl", "".join(json.dumps(h) + "\n" for h in history).encode())
        run.save(ckpt, dict(config=config, model=model.state_dict(), optimizer=optimizer.state_dict(), history=history))
        line = f"epoch {epoch + 1:3d}  train {history[-1]['train_loss']:.4f}  test {test_loss:.4f}"
        bar.set_description(line) if terminal else print(f"{line}  {seconds:.0f} s", flush=True)
    bar.close()

    plots.loss_curve(history, config, optimum, folder / "loss.png")
    print(f"test loss {history[-1]['test_loss']:.4f}, best possible {optimum:.4f}, {seconds:.0f} s; wrote {folder}/")
    print(f"next: python sample.py --ckpt {folder} --steps 512")


if __name__ == "__main__":
    run.script(main, "the finished epochs are kept; go on with --resume, and without --overwrite")
