"""How fast training and sampling are, alone and as a stack, beside the loop everybody writes, in one run.

    python bench.py                                        # on the GPU if there is one, else on the CPU
    python bench.py --device cpu --width 256

All loops train the same network on the same points with the same batch size and optimiser; rounds alternate and the
median counts. Times are per network and step: that of a stack (8, on a GPU 96; on CUDA captured) is divided by
their number. Peak memory is the process's resident set on a CPU and torch's allocations on CUDA.
"""
import argparse
import resource
import statistics
import sys
import time

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import run
import sample
import stack
import train
import train_points
from datasets2d import DATASETS
from targets import TARGETS


def plain_epoch(model, optimizer, loader, device):
    """The loop everybody writes: DataLoader, eps-prediction, mean squared error, cosine schedule."""
    for x, in loader:
        x = x.to(device)
        t = torch.rand(len(x), 1, device=device)
        eps = torch.randn_like(x)
        z = torch.cos(torch.pi / 2 * t) * x + torch.sin(torch.pi / 2 * t) * eps
        loss = nn.functional.mse_loss(model(torch.cat([z, t], 1)), eps)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def plain_model(width):
    sizes = [3] + 6 * [width]
    hidden = [layer for pair in zip(sizes, sizes[1:]) for layer in (nn.Linear(*pair), nn.ReLU())]
    return nn.Sequential(*hidden, nn.Linear(width, 2))


def network_epoch(model, data, config):
    """Forward and backward of the network alone, at as many steps as an epoch: the floor of eager loops."""
    for x in data.split(config["batch_size"])[:len(data) // config["batch_size"]]:
        model.zero_grad()
        model(x, x[:, 0]).sum().backward()


def seconds(function, device):
    """Wall time of one call, with the device's queue empty before and after."""
    synchronize = {"cuda": torch.cuda.synchronize, "mps": torch.mps.synchronize}.get(device.type, lambda: None)
    synchronize()
    start = time.perf_counter()
    function()
    synchronize()
    return time.perf_counter() - start


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["auto", "cpu", "cuda", "mps"], default="auto", help="(auto: cuda or cpu)")
    parser.add_argument("--batch-size", type=run.number(int, 1, train_points.POINTS), default=512, help="(512)")
    parser.add_argument("--width", type=run.number(int, 1), default=128, help="of the hidden layers (128)")
    parser.add_argument("--target", choices=TARGETS, default="eps", help="of our loop (eps)")
    parser.add_argument("--rounds", type=run.number(int, 1), default=7, help="epochs of each loop (7)")
    args = parser.parse_args(argv)
    device = run.device(args.device)
    print(f"torch {torch.__version__}, {run.device_name(device)}, batch {args.batch_size}, width {args.width}")

    shape = [f"--batch-size={args.batch_size}", f"--width={args.width}"]
    config, = train.configs(train.parse([f"--target={args.target}", *shape]))
    members = train.configs(train.parse(["--target", "x", "eps", "v", "s", "--loss", "mse", "nelbo", *shape,
                                         f"--seeds={1 if device.type == 'cpu' else 12}"]))
    stacked = f"stack of {len(members)}"
    data = DATASETS["rings"].sample(train_points.POINTS)
    ours, plain = train_points.build_model(config).to(device), plain_model(args.width).to(device)
    many = train_points.build_model(config, len(members)).to(device)
    our_optimizer, many_optimizer = train_points.build_optimizer(ours, config), train_points.build_optimizer(many, config)
    plain_optimizer = torch.optim.Adam(plain.parameters(), lr=1e-3)
    loader = DataLoader(TensorDataset(data), batch_size=args.batch_size, shuffle=True, drop_last=True)
    data = data.to(device)
    our_step = train_points.build_step(ours, our_optimizer, 1)
    many_step = train_points.ready_step(many, many_optimizer, len(members), args.batch_size)

    loops = {"train.py": lambda: train_points.train_epoch(our_step, our_optimizer, [data], 0, [config]),     # eager, also on CUDA
             "plain": lambda: plain_epoch(plain, plain_optimizer, loader, device),
             "network alone": lambda: network_epoch(ours, data, config),
             stacked: lambda: train_points.train_epoch(many_step, many_optimizer, len(members) * [data], 0, members)}
    if device.type == "cuda":                               # what train.py does with one network there
        alone = train_points.build_model(config).to(device)
        alone_optimizer = train_points.build_optimizer(alone, config)
        alone_step = train_points.ready_step(alone, alone_optimizer, 1, args.batch_size)
        loops["captured"] = lambda: train_points.train_epoch(alone_step, alone_optimizer, [data], 0, [config])
    times = {name: [] for name in loops}
    for _ in range(args.rounds + 1):
        for name, loop in loops.items():
            times[name].append(seconds(loop, device) / len(loader) / (len(members) if name == stacked else 1))
    times = {name: statistics.median(values[1:]) for name, values in times.items()}     # the first round warms up
    flop = 6 * args.batch_size * sum(p.numel() for p in ours.weights)    # forward 2, backward 4
    for name, step in times.items():
        print(f"training    {name:13s} {1e3 * step:7.3f} ms/step {flop / step / 1e9:7.1f} GFLOP/s"
              f"   plain / this {times['plain'] / step:.2f}   train.py / this {times['train.py'] / step:.2f}")

    n, steps = 10_000, 32
    for name, model, configs in ("train.py", ours, [config]), (stacked, many, members):
        states = [{"config": c, "model": stack.member(model.state_dict(), m)} for m, c in enumerate(configs)]
        draw = lambda: sample.draw(states, steps, n, device=device)
        draw()
        step = statistics.median(seconds(draw, device) for _ in range(3)) / steps / len(states)
        print(f"sampling    {name:13s} {1e3 * step:7.3f} ms/step {flop / 3 / args.batch_size * n / step / 1e9:7.1f} GFLOP/s"
              f"   {n:,} points")
    peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else \
        resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    print(f"memory      {peak / 2**20:.0f} MiB at the peak")


if __name__ == "__main__":
    run.script(main, "nothing was written")
