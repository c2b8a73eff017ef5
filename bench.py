"""How fast the training step and the sampler are, beside the loop everybody writes, in one run.

    python bench.py                                        # on the GPU if there is one, else on the CPU
    python bench.py --device cpu --width 256

Both loops train the same network on the same points with the same batch size and optimiser; rounds alternate and the
median counts. Peak memory is the process's resident set on a CPU and torch's allocations on CUDA.
"""
import argparse
import resource
import statistics
import sys
import time

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import ddpm
import run
import train
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
    parser.add_argument("--batch-size", type=run.number(int, 1, train.POINTS), default=512, help="(512)")
    parser.add_argument("--width", type=run.number(int, 1), default=128, help="of the hidden layers (128)")
    parser.add_argument("--target", choices=TARGETS, default="eps", help="of our loop (eps)")
    parser.add_argument("--rounds", type=run.number(int, 1), default=7, help="epochs of each loop (7)")
    args = parser.parse_args(argv)
    device = run.device(args.device)
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"{device}, {torch.get_num_threads()} threads"
    print(f"torch {torch.__version__}, {name}, batch {args.batch_size}, width {args.width}")

    config = vars(train.parse([f"--target={args.target}", f"--batch-size={args.batch_size}", f"--width={args.width}"]))
    data = DATASETS["rings"].sample(train.POINTS)
    ours, plain = train.build_model(config).to(device), plain_model(args.width).to(device)
    our_optimizer = train.build_optimizer(ours, config)
    plain_optimizer = torch.optim.Adam(plain.parameters(), lr=1e-3)
    loader = DataLoader(TensorDataset(data), batch_size=args.batch_size, shuffle=True, drop_last=True)
    data = data.to(device)

    loops = {"train.py": lambda: train.train_epoch(ours, our_optimizer, data, 0, config),
             "plain": lambda: plain_epoch(plain, plain_optimizer, loader, device),
             "network alone": lambda: network_epoch(ours, data, config)}
    times = {name: [] for name in loops}
    for _ in range(args.rounds + 1):
        for name, loop in loops.items():
            times[name].append(seconds(loop, device) / len(loader))
    times = {name: statistics.median(values[1:]) for name, values in times.items()}     # the first round warms up
    flop = 6 * args.batch_size * sum(p.numel() for p in ours.parameters() if p.ndim == 2)    # forward 2, backward 4
    for name, step in times.items():
        print(f"training    {name:13s} {1e3 * step:6.2f} ms/step {flop / step / 1e9:7.1f} GFLOP/s"
              f"   plain / this {times['plain'] / step:.2f}")

    n, steps = 10_000, 32
    sample = lambda: ddpm.ancestral_sample(ours, (n, 2), steps, target=args.target, schedule=ddpm.SCHEDULES["cosine"],
                                           generator=run.generator(device, 0))
    sample()
    step = statistics.median(seconds(sample, device) for _ in range(3)) / steps
    flop = 2 * n * sum(p.numel() for p in ours.parameters() if p.ndim == 2)
    print(f"sampling    {n} points  {1e3 * step:6.2f} ms/step {flop / step / 1e9:7.1f} GFLOP/s")
    peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else \
        resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    print(f"memory      {peak / 2**20:.0f} MiB at the peak")


if __name__ == "__main__":
    run.script(main, "nothing was written")
