"""How fast training and sampling are: of points beside the loop everybody writes, of images beside other UNets.

    python bench.py                                        # points, on the GPU if there is one, else on the CPU
    python bench.py --device cpu --width 256
    python bench.py optimum                                # how long until a network is at the best possible loss
    python bench.py unet                                   # images; the UNets of diffusers and
                                                           # denoising-diffusion-pytorch join where installed

Points: all loops train the same network on the same points with the same batch size and optimiser, but `fast`, the
recipe of that name. Times are per network and step, of a stack (8, on a GPU 96; on CUDA captured) divided by their
number. Images: all networks have as many channels, blocks and layers. FLOP (two for a multiply and add; training is
three forward passes) are compared with a large product of matrices in the same precision. Rounds alternate and the
median counts. Peak memory is the resident set on a CPU and torch's allocations on CUDA. The optimum: seconds of
training and tests of one network on the rings with `mse` until its test loss is within 1 % of the best possible.
"""
import argparse
import functools
import math
import resource
import statistics
import sys
import tempfile
import time

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import kind_points
import likelihood
import losses
import run
import samplers
import settings
import stack
import train
import train_points
import unet
from datasets2d import DATASETS
from recipes import FAST, FAST_EPOCHS, MUON
from targets import OF_A_STEP, TARGETS


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
    synchronize = dict(cuda=torch.cuda.synchronize, mps=torch.mps.synchronize).get(device.type, lambda: None)
    synchronize()
    start = time.perf_counter()
    function()
    synchronize()
    return time.perf_counter() - start


def opened(config, weights):
    """A run that is in no folder."""
    return run.Run("bench", dict(config=config, model=weights, history=[]))


def ready(config, device, members=1):
    """A network with fresh weights, or a stack of them, its optimiser and its step, as train.py has them."""
    network = kind_points.build_model(config, members).to(device)
    optimizer = train_points.build_optimizer(network, config)
    return network, optimizer, train_points.ready_step(network, optimizer, members, config["batch_size"],
                                                       precision=config["precision"])


def points(args, device):
    """Training and sampling of points."""
    args.batch_size = args.batch_size or 512
    print(f"torch {torch.__version__}, {run.device_name(device)}, batch {args.batch_size}, width {args.width}")
    shape = [f"--batch-size={args.batch_size}", f"--width={args.width}"]
    config, quick = (settings.configs(train.parse([f"--target={args.target}", *shape, *of]))[0] for of in ([], FAST))
    members = settings.configs(train.parse(["--target", "x", "eps", "v", "s", "--loss", "mse", "nelbo", *shape,
                                         f"--seeds={1 if device.type == 'cpu' else 12}"]))
    stacked = f"stack of {len(members)}"
    data = DATASETS["rings"].sample(kind_points.POINTS)
    ours = kind_points.build_model(config).to(device)
    our_optimizer = train_points.build_optimizer(ours, config)
    our_step = train_points.build_step(ours, our_optimizer, 1)                   # eager, also on CUDA
    many, many_optimizer, many_step = ready(config, device, len(members))
    in_bf16 = {"bf16": config | {"precision": "bf16"}, "fast": quick}
    plain = plain_model(args.width).to(device)
    plain_optimizer = torch.optim.Adam(plain.parameters(), lr=1e-3)
    loader = DataLoader(TensorDataset(data), batch_size=args.batch_size, shuffle=True, drop_last=True)
    data = data.to(device)
    loops = {"train.py": lambda: train_points.train_epoch(our_step, our_optimizer, [data], 0, [config]),
             "plain": lambda: plain_epoch(plain, plain_optimizer, loader, device),
             "network alone": lambda: network_epoch(ours, data, config),
             stacked: lambda: train_points.train_epoch(many_step, many_optimizer, len(members) * [data], 0, members)}
    for name, of in (in_bf16 | ({"captured": config} if device.type == "cuda" else {})).items():   # as train.py does
        _, optimizer, step = ready(of, device)
        loops[name] = functools.partial(train_points.train_epoch, step, optimizer, [data], 0, [of])
    times = {name: [] for name in loops}
    for _ in range(args.rounds + 1):
        for name, loop in loops.items():
            times[name].append(seconds(loop, device))
    batch = {name: in_bf16.get(name, config)["batch_size"] for name in loops}
    times = {name: statistics.median(values[1:]) / (len(data) // batch[name]) / (len(members) if name == stacked else 1)
             for name, values in times.items()}            # the first round warms up
    flop = 6 * sum(p.numel() for p in ours.weights)        # of a point: forward 2, backward 4
    top = [ceiling(device, dtype) for dtype in (torch.float32, torch.bfloat16)]
    speed = {name: flop * batch[name] / step for name, step in times.items()}
    for name, step in times.items():
        print(f"training    {name:13s} {1e3 * step:7.3f} ms/step {speed[name] / 1e9:7.1f} GFLOP/s "
              f"{100 * speed[name] / top[name in in_bf16]:5.1f} % of the ceiling   plain / this "
              f"{speed[name] / speed['plain']:.2f}   train.py / this {speed[name] / speed['train.py']:.2f}")

    n, steps = 10_000, 32
    for name, model, configs in ("train.py", ours, [config]), (stacked, many, members):
        runs = run.Stack([opened(c, stack.member(model.state_dict(), m)) for m, c in enumerate(configs)])
        draw = lambda: kind_points.draw(runs, steps, n, device=device)                # noqa: B023 - called in this turn
        draw()
        step = statistics.median(seconds(draw, device) for _ in range(3)) / steps / len(configs)
        print(f"sampling    {name:13s} {1e3 * step:7.3f} ms/step {flop / 3e9 * n / step:7.1f} GFLOP/s   {n:,} points")
    evaluations(ours, config, n, steps, device)
    print_memory(device)


def evaluations(model, config, n, steps, device):
    """Each sampler, and the exact log-likelihood in float64, beside as many evaluations of the network alone."""
    one, times = opened(config, model.state_dict()), {}
    in_cache = stack.in_chunks(model, 1, 5000 if device.type == "cpu" else 2**20)
    z, t = torch.randn(n, 2, device=device), torch.full((n,), 0.5, device=device)

    @torch.no_grad()
    def alone():
        for _ in range(steps):
            in_cache(z, t)
    contenders = {"network alone": (alone, steps)}
    for name in samplers.SAMPLERS:
        contenders[name] = (functools.partial(kind_points.draw, one, steps, n, device=device, sampler=name),
                            samplers.evaluations(name, steps))
    for name, (function, count) in contenders.items():
        function()
        times[name] = statistics.median(seconds(function, device) for _ in range(3)) / count
        print(f"sampling    {name:13s} {n / times[name] / 1e6:7.2f} million evaluations/s   network alone / this "
              f"{times['network alone'] / times[name]:.2f}   {n:,} points, {count} evaluations")
    dtype = torch.float32 if device.type == "mps" else torch.float64
    network, x = one.model(device).to(dtype), z.to(dtype)
    objective = losses.objective(config)
    nll = lambda: [likelihood.log_likelihood(network, part, target=config["target"], schedule=objective["schedule"])[1]
                   for part in x.split(5000)]
    count = nll()[0]
    whole = statistics.median(seconds(nll, device) for _ in range(3))
    print(f"likelihood  exact         {n * count / whole / 1e6:7.2f} million evaluations/s   network alone / this "
          f"{times['network alone'] * count / whole:.2f}   {n:,} points, {count} evaluations, {whole:.1f} s")


def optimum(args, device):
    """When the test loss of a network is within 1 % of the best possible, by each recipe."""
    print(f"torch {torch.__version__}, {run.device_name(device)}, {args.target} with mse, the rings")
    first = None
    with tempfile.TemporaryDirectory() as folder:
        for name, options in {"thesis": [], "bf16": MUON[-2:], "fast": [*FAST, "--epochs", str(FAST_EPOCHS)]}.items():
            train.main(["--target", args.target, "--loss", "mse", *options, "--out", f"{folder}/{name}", "--device",
                        args.device])
            history = run.open(f"{folder}/{name}/rings-{args.target}-mse-s0").history
            reached = next((entry for entry in history if entry["test_loss"] <= 1.01 * entry["optimum"]),
                           {"seconds": math.nan, "epoch": math.nan})
            first = first or reached["seconds"]
            print(f"optimum     {name:13s} {reached['seconds']:7.1f} s, epoch {reached['epoch']} of {len(history)}   "
                  f"thesis / this {first / reached['seconds']:.2f}   at the end "
                  f"{history[-1]['test_loss'] / history[-1]['optimum']:.4f} of the best possible")


def print_memory(device):
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else resident
    print(f"memory      {peak / 2**20:.0f} MiB at the peak")


def peers(channels, multiples, layers):
    """Other libraries' UNets of like size for 32 x 32, those that are installed: {name: network}; network(z, t)."""
    networks = {}
    try:
        from diffusers import UNet2DModel
        kinds = ["Attn" if i == 1 else "" for i in range(len(multiples))]

        class Diffusers(UNet2DModel):
            def forward(self, z, t):
                return super().forward(z, 1000 * t).sample
        networks["diffusers"] = Diffusers(
            sample_size=32, block_out_channels=[channels * m for m in multiples], layers_per_block=layers,
            norm_eps=1e-6, attention_head_dim=None, down_block_types=[f"{kind}DownBlock2D" for kind in kinds],
            up_block_types=[f"{kind}UpBlock2D" for kind in reversed(kinds)])
    except ImportError:
        print("diffusers is not installed: pip install diffusers")
    try:
        from denoising_diffusion_pytorch import Unet
        attends = [i == 1 for i in range(len(multiples))]
        networks["denoising-diffusion-pytorch"] = Unet(channels, dim_mults=multiples, full_attn=attends)
    except ImportError:
        print("denoising-diffusion-pytorch is not installed: pip install denoising-diffusion-pytorch")
    return networks


def ceiling(device, dtype):
    """FLOP/s of a large product of matrices."""
    n = 8192 if device.type == "cuda" else 2048
    a, repeat = torch.randn(n, n, device=device, dtype=dtype), lambda: [a @ a for _ in range(5)]
    repeat()
    return 5 * 2 * n**3 / statistics.median(seconds(repeat, device) for _ in range(5))


def unet_train(network, optimizer, precision, z, t):
    """One step of training, the network's prediction against zero."""
    with torch.autocast(z.device.type, torch.bfloat16, enabled=precision == "bf16"):
        loss = network(z, t).square().mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


@torch.no_grad()
def unet_sample(network, optimizer, precision, z, t):
    """One evaluation, as in every step of sampling."""
    with torch.autocast(z.device.type, torch.bfloat16, enabled=precision == "bf16"):
        network(z, t)


def images(args, device):
    """Training and sampling with the UNet of `unet.PRESETS["ddpm"]`, each network in bf16 and fp32 (on CUDA tf32)."""
    batch, preset = args.batch_size or (16 if device.type == "cpu" else 128), unet.PRESETS["ddpm"]
    preset = preset | dict(channels=args.channels)
    print(f"torch {torch.__version__}, {run.device_name(device)}, batch {batch}, 32 x 32, {args.channels} channels")
    torch.set_float32_matmul_precision("high")              # tf32 on CUDA
    top = ceiling(device, torch.bfloat16)
    print(f"ceiling     bf16 product of large matrices {top / 1e12:35.2f} TFLOP/s")
    z, t = torch.randn(batch, 3, 32, 32, device=device), torch.rand(batch, device=device)
    networks = {"unet.py": unet.UNet(**preset), **peers(args.channels, preset["channel_mult"], preset["layers"])}
    contenders = {}
    for name, network in networks.items():
        flop, network = unet.flop(network, (3, 32, 32)), network.to(device)
        parameters = sum(p.numel() for p in network.parameters())
        print(f"size        {name:27s} {parameters:12,} parameters {flop / 1e9:7.2f} GFLOP forward")
        optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4, fused=True)
        for precision in "bf16", "fp32":
            ours = name == "unet.py" and device.type == "cuda"         # as train.py has it there
            ready = torch.compile(network.to(memory_format=torch.channels_last)) if ours else network
            contenders[name, precision] = ready, optimizer, precision, flop * batch
    for title, function, passes in ("training", unet_train, 3), ("sampling", unet_sample, 1):
        times = {key: [] for key in contenders}
        for _ in range(args.rounds + 1):
            for key, (network, optimizer, precision, _) in contenders.items():
                step = functools.partial(function, network, optimizer, precision, z, t)
                times[key].append(seconds(step, device))
        times = {key: statistics.median(values[1:]) for key, values in times.items()}       # the first round warms up
        speed = {key: passes * contenders[key][3] / value for key, value in times.items()}  # FLOP/s
        best = max((value for (name, _), value in speed.items() if name != "unet.py"), default=None)
        for (name, precision), value in speed.items():
            ratio = f"   this / best of the others {value / best:.2f}" if best else ""
            print(f"{title:11s} {name:27s} {precision} {batch / times[name, precision]:9.1f} images/s "
                  f"{value / 1e12:8.3f} TFLOP/s {100 * value / top:5.1f} % of the ceiling{ratio}")
    print_memory(device)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", choices=["points", "optimum", "unet"], default="points", help="(points)")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda", "mps"], default="auto", help="(auto: cuda or cpu)")
    parser.add_argument("--batch-size", type=settings.number(int, 1, kind_points.POINTS),
                        help="(points: 512; images: 16 on a CPU, else 128)")
    parser.add_argument("--width", type=settings.number(int, 1), default=128, help="of the hidden layers, points (128)")
    parser.add_argument("--target", choices=[name for name in TARGETS if name not in OF_A_STEP], default="eps",
                        help="of our loop, points (eps)")
    parser.add_argument("--channels", type=settings.number(int, 32), default=128,
                        help="of the UNets' first block (128)")
    parser.add_argument("--rounds", type=settings.number(int, 1), default=7, help="epochs or steps of each (7)")
    args = parser.parse_args(argv)
    {"points": points, "optimum": optimum, "unet": images}[args.what](args, run.device(args.device))


if __name__ == "__main__":
    run.script(main, "nothing was written")
