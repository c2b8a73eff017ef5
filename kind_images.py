"""Images as a kind of data: what a run on them loads, builds, is tested with, draws, measures (thesis 4.1.2 - 4.3.2).

`kind_points.py` has the same verbs for points, and says what they are.
Read `images.py`, `unet.py` and `metrics.py` first.

Not here: the loop (`train_images.py`).
"""
import contextlib
import hashlib
import json
import math
import re
import time
from pathlib import Path

import torch
from torch import distributed

import ddpm
import images
import invariance
import losses
import metrics
import movie
import progress
import run
import samplers
import tables
import unet
import variance as variances
from decoders import discretised

TESTED = 250          # test images at once
LIKELIHOOD = dict(num=500, batch_size=50, draws=16, num_ode=16, probes=1, dequantisation="uniform")    # likelihood.py


def load(config, split="test", data_dir="data"):
    """The images of a run -> uint8 (N, C, H, W), on the CPU. Mistakes end in SystemExit."""
    return images.load(config["data"], split, data_dir, config["image_size"], config["skip_corrupt"],
                       by_name="images" in config)


def known(folder, config, args):
    """The config of a run, of a folder of images, as its checkpoint has it: older ones do not say which images.

    SystemExit if the checkpoint was trained on others than the folder has now.
    """
    if args.overwrite or "images" not in config or not (folder / "ckpt.pt").exists():
        return config
    before, now = run.load(folder)["config"].get("images"), config["images"]
    if before and before != now:
        raise SystemExit(f"{folder} was trained on {before['count']:,} images of a folder that now has "
                         f"{now['count']:,}, or others - bring the old ones back, or train anew with another --out")
    return config if before else {key: value for key, value in config.items() if key != "images"}


def build_model(config, members=1):
    """The network of a run's config, with fresh weights from torch's global generator."""
    if members > 1:
        raise SystemExit("runs on images cannot be one stack - open them one by one")
    (channels, *size), network = config["shape"], {key: config[key] for key in unet.PRESETS["ddpm"]}
    return unet.UNet(channels, max(size), schedule=ddpm.fixed(config["schedule"]), dropout=config["dropout"],
                     out=channels * variances.outputs(config), **network)


def dimension(config):
    """D, the number of grey levels of an image."""
    return math.prod(config["shape"])


def weights(checkpoint):
    """The averaged weights (EMA): those that are tested and drawn with."""
    return checkpoint["ema"]


def autocast(config, device):
    """Where the config asks for it, matrix products and convolutions in bf16."""
    return torch.autocast(device.type, torch.bfloat16, enabled=config["precision"] == "bf16")


TESTS = "mse", "rescaled", "nelbo", "nelbo_stable"         # what every run is tested with, whatever it trains on


def test_losses(config):
    """Names of the losses TESTS that have a weight for the run's target."""
    names = []
    for name in TESTS:
        with contextlib.suppress(ValueError):
            losses.weight(name, config["target"], torch.tensor([0.5]), ddpm.fixed(config["schedule"]))
            names.append(name)
    return names


def loss(prediction, x, t, y, w, config, importance=1.0):
    """The loss of each image in training, w that of its squared error: (B, C, H, W), t, w (B,) -> (B,)."""
    if config["loss"] not in losses.OF_A_CHAIN:
        return losses.weighted_error(variances.split(prediction, y)[0], y, w)
    columns = variances.columns(t, losses.chain_of(config), config["target"], config["loss"], config["stabiliser"],
                                importance, config["vlb_weight"])
    return variances.loss(prediction, y, w, columns, config["variance"], x, discretised)


@torch.no_grad()
def test(model, data, config, device):
    """Test losses of a network, without autocast: {"test_loss": ..., "test_mse": ..., ...}, means over the images.

    data: uint8, on the CPU. Their t and noise are the same in every run. Each process does its share. Of a chain, at
    its own times, the other losses are the error of the posterior mean and the bound without the prior, nats per
    dimension.
    """
    (rank, world), g, n = run.processes(), run.generator("cpu", "test noise"), len(data)
    objective, chain = losses.objective(config), losses.chain_of(config)
    names = variances.TESTED if chain else test_losses(config)
    weight = lambda name, t: losses.weight(name, config["target"], t, objective["schedule"], config["stabiliser"])
    shuffled = torch.randperm(n, generator=g)        # else t rises with the row: with the class, in sorted images
    times = losses.draw_step((n,), chain, generator=g)[0] if chain else losses.sample_t((n,), config["t_min"], g)
    total = torch.zeros(len(names) + 1, device=device)
    batches = list(zip(shuffled.split(TESTED), times.split(TESTED)))
    for i, (rows, t) in enumerate(progress.watch(batches, "testing", "images", lambda batch: len(batch[0]))):
        x = images.to_float(data[rows])
        eps = torch.randn(x.shape, generator=g)
        if i % world == rank:
            x, t, eps = x.to(device), t.to(device), eps.to(device)
            z, y, own = losses.regression(x, t, eps, **objective)
            prediction = model(z, t)
            errors = losses.weighted_error(variances.split(prediction, y)[0], y, torch.ones_like(t))
            if chain:
                factor = variances.mean_factor(t, chain, config["target"], config["stabiliser"])
                total += torch.stack([loss(prediction, x, t, y, own, config), factor**2 * errors,
                                      loss(prediction, x, t, y, 0 * own, config | {"loss": "vlb"})]).sum(1)
            else:
                total += (torch.stack([own, *(weight(name, t) for name in names)]) * errors).sum(1)
    if world > 1:
        distributed.all_reduce(total)
    return dict(zip(["test_loss", *(f"test_{name}" for name in names)], (total / n).tolist()))


def draw(model, shape, steps, config, generator, t_min=1e-3, clip=True, own=None, under=None, t_max=None, **how):
    """Images (B, C, H, W), uint8; clip keeps x_hat in [-1, 1] at every step. how: sampler, grid, eta of `samplers`.

    model predicts `variance.predicted` of the run's target; how may also have the variance of `ancestral`. own: the
    schedule of the Run, where it is learned. under, t_max: another's name, where noise is, see `invariance.py`.
    """
    target = variances.predicted(config["target"])
    model, schedule, t_min = invariance.of_run(model, target, config, t_min, under, own, t_max)
    with autocast(config, generator.device):
        x = samplers.sample(model, shape, steps, target=target, schedule=schedule, t_min=t_min, generator=generator,
                            stabiliser=config["stabiliser"], clip=1.0 if clip else math.inf, **how)
    return images.to_uint8(x)


def first_grid(z):
    """The first images of (B, C, H, W), in [-1, 1] or noise, as a frame of a film: 64 where they are small."""
    columns = max(1, min(8, 320 // z.shape[3]))
    return images.grid(images.to_uint8(z[:columns**2]), columns)


def own_images(folder):
    """The images in a folder that `draw_folder` wrote: 00000.png ... beside its settings.json. Others are foreign."""
    if not (folder / "settings.json").exists():
        return []
    return sorted(path for path in folder.glob("*.png") if re.fullmatch(r"\d{5,}\.png", path.name))


def drawn_with(folder):
    """The settings that a folder's images were drawn with; nothing if there is no settings.json or it is damaged."""
    try:
        return dict(json.loads((folder / "settings.json").read_text()))
    except (OSError, ValueError, TypeError):
        return {}


def draw_folder(folder, one, n, args, device):
    """Write n images as folder/00000.png ... -> their paths, settings, seconds.

    Each batch has its own noise: what is there is not drawn again, and images beyond the n stay. With --overwrite those
    of other settings are deleted, and never a file that this function did not write.
    """
    config = one.config
    t_min = run.smallest_t(config, args.t_min, **args.how)
    settings = dict(run=one.name, step=one.checkpoint["step"],
                    test_loss=one.history[-1]["test_loss"] if one.history else None,
                    steps=args.steps, **args.how, t_min=t_min, clip=args.clip,
                    sampling_seed=args.seed, batch_size=args.batch_size, precision=config["precision"],
                    device=str(device))
    present, names = own_images(folder), [f"{i:05d}.png" for i in range(n)]
    if present and {"device": str(device)} | drawn_with(folder) != settings:     # older ones do not say which device
        if not args.overwrite:
            raise SystemExit(f"{folder} holds {len(present)} images of other settings, see settings.json there - "
                             "keep them by giving these another --out, or delete them with --overwrite")
        for path in present:
            path.unlink()
        present = []
    have = {path.name for path in present}
    foreign = [name for name in names if name not in have and (folder / name).exists()]
    if foreign:
        raise SystemExit(f"{folder / foreign[0]} was not drawn by sample.py and is in the way - move it, or give "
                         "another --out")
    run.write(folder / "settings.json", json.dumps(settings, indent=2).encode())

    variance = variances.chosen(config, args.variance, args.sampler, args.steps, args.grid, args.t_min)
    model, size = one.model(device, out=variance in variances.LEARNED), args.batch_size
    how = {key: value for key, value in args.how.items() if key != "variance"} | (
        {"variance": variance} if variance else {})
    if device.type == "cuda":
        model = model.to(memory_format=torch.channels_last)
        model = torch.compile(model) if n >= 2048 else model          # compiling takes a minute
    missing = [i for i in range(0, n, size) if not have.issuperset(names[i:i + size]) or args.movie and i == 0]
    film = movie.Film(one.schedule, args.steps, lambda z: z[:min(n, 64)])
    start = time.perf_counter()
    add = progress.counter(f"drawing {n:,} images", len(missing) * args.steps, "evaluations")
    for i in missing:
        generator = run.generator(device, args.seed, "sample", i)
        watched = progress.counted(film.watch(model) if args.movie and i == 0 else model, add)
        x = draw(watched, (size, *config["shape"]), args.steps, config, generator, t_min, args.clip, one.schedule,
                 **how).cpu()
        if args.movie and i == 0:
            frames = [*film.frames, (0.0, images.to_float(x[:n]))]
            movie.images([(t, first_grid(z)) for t, z in frames], folder.parent / "samples.gif")
        for name, image in zip(names[i:i + size], x):                 # the last batch is whole, too: one shape for all
            images.save_png(image, folder / name)
    if have - set(names):
        print(f"{folder} holds {len(have | set(names)):,} images: the first {n:,} count")
    return [folder / name for name in names], settings, time.perf_counter() - start


def digest(*parts):
    """Eight hexadecimal digits for the content of tensors, of which all bytes count, and of other things."""
    sha = hashlib.sha256()
    for part in parts:
        sha.update(part.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data
                   if torch.is_tensor(part) else repr(part).encode(errors="surrogateescape"))
    return sha.hexdigest()[:8]


def reference(config, network, args):
    """Inception's statistics of the data that a run was trained on, computed once for these images and this network.

    Of a folder path, names, sizes and times of change stand for the images, else reading them would take long; a named
    set is always the same. Of the network every weight counts, whatever file it came from.
    """
    data, size = config["data"], "x".join(map(str, config["shape"]))
    name = data
    if data not in images.IMAGES:
        files = [(path, stat.st_size, stat.st_mtime_ns) for path in images.find(str(Path(data).resolve()))
                 for stat in [Path(path).stat()]]
        name = f"{Path(data).resolve().name}-{digest(files, config['skip_corrupt'], 'images' in config)}"
    path = Path(args.data_dir) / (f"inception-{name}-{args.fid_split}-{size}-"
                                  f"{digest(*network.state_dict().values())}.npz")
    return metrics.reference_statistics(path, lambda: load(config, args.fid_split, args.data_dir), network)


def measure(paths, network, statistics):
    """FID of images in files to the statistics of the data."""
    return metrics.fid(metrics.statistics(images.read(paths, paths, None, False), network), statistics)


def sample(chosen, args, device):
    """Draw images of chosen runs, [(Run, folder for the results)], one by one, and measure their FID if asked to."""
    n = args.num_samples or 64
    args.batch_size = args.batch_size or (64 if device.type == "cpu" else 250)
    if args.fid:
        metrics.enough_images(n)                                      # before any is drawn
        network = metrics.inception(args.inception_weights, device)
    lines = []
    for one, out in chosen:
        if args.fid:
            statistics = reference(one.config, network, args)
        with run.enough_memory("a smaller --batch-size"):
            paths, settings, seconds = draw_folder(out / "samples", one, n, args, device)
        images.save_png(images.grid(images.read(paths[:64], paths[:64], None, False), 8), out / "samples.png")
        result = {**one.config, **settings, "weights": "EMA", "num_samples": n}
        print(f"{one.folder}: {n:,} images in {args.steps} steps, {args.in_words}, in {seconds:.1f} s on {device}")
        if args.fid:
            fid = measure(paths, network, statistics)
            result |= dict(fid=fid, fid_split=args.fid_split, fid_reference=statistics[2])
            print(f"FID {fid:.3f}: {n:,} samples (EMA, {args.in_words}, {args.steps} steps"
                  f"{', clipped' if args.clip else ''}) against {statistics[2]:,} images of {one.config['data']}, "
                  f"{args.fid_split} split")
        run.write(out / "metrics.json", json.dumps(result, indent=2).encode())
        if not args.movie:
            (out / "samples.gif").unlink(missing_ok=True)                # it would be of other samples
        print(f"wrote samples/, samples.png{', samples.gif' * args.movie} and metrics.json to {out}/; "
              f"{progress.seconds():.1f} s in all")
        lines.append({"run": str(one.folder), "images": n, "steps": args.steps, **args.how, "fid": result.get("fid"),
                      "test loss": result["test_loss"], "seconds": round(seconds, 1)})
    tables.show(lines, args.csv)


def test_examples(config, num, device, data_dir="data"):
    """What likelihood.py tests a run on: num test images in random order, as float levels in [-1, 1]."""
    x = load(config, "test", data_dir)
    order = torch.randperm(len(x), generator=run.generator("cpu", "likelihood"))       # else of the first classes alone
    return images.to_float(x[order[:num]]).to(device)


def surprise(config):
    """Of images -log p(x) under the data's own density is not known."""
    return None
