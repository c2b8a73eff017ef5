"""Images as a kind of data: what a run on them loads, builds, is tested with, draws, measures (thesis 4.1.2 - 4.3.2).

`kind_points.py` has the same verbs for points, and says what they are.
Read `images.py`, `unet.py` and `metrics.py` first.

Not here: the loop (`train_images.py`), how samples are drawn (`draw_images.py`), a distance without Inception
(`classifier.py`).
"""
import contextlib
import json
import math
from pathlib import Path

import torch
from torch import distributed

import checkpoints
import classifier
import ddpm
import guidance
import images
import latent_data
import losses
import metrics
import progress
import run
import tables
import unet
import variance as variances
from decoders import discretised, gaussian
from draw_images import draw_folder

TESTED = 250          # test images at once
LIKELIHOOD = dict(num=500, batch_size=50, draws=16, num_ode=16, probes=1, dequantisation="uniform")    # likelihood.py


def load(config, split="test", data_dir="data"):
    """The images of a run -> uint8 (N, C, H, W), or its latents, float, on the CPU. Mistakes end in SystemExit."""
    if "latents" in config:
        latent_data.of_run(config)
        return latent_data.load(config["data"])[split]
    return images.load(config["data"], split, data_dir, config["image_size"], config["skip_corrupt"],
                       by_name="images" in config)


def facts(name):
    """What the config of a run on this data has besides settings: which images a folder has, or which latents."""
    if name in images.IMAGES:
        return {}
    return {"latents": latent_data.facts(name)} if latent_data.is_folder(name) else {"images": images.facts(name)}


def splits(name, args, by_name=True):
    """The images of the arguments' data to train and to test on, with --labels also their labels, and how many classes.

    Of several processes the first downloads and decodes before the others.
    """
    rank, world = run.processes()
    for turn in range(2):
        if turn == min(rank, 1):
            latents = latent_data.load(name) if latent_data.is_folder(name) else None
            sets = [latents[split] if latents else
                    images.load(name, split, args.data_dir, args.image_size, args.skip_corrupt, by_name)
                    for split in ("train", "test")]
            labels = [images.labels(name, split, args.data_dir, args.skip_corrupt, by_name)
                      for split in ("train", "test") if args.labels]
        if world > 1:
            distributed.barrier()
    if len(sets[0]) < args.batch_size:
        raise SystemExit(f"{name} has {len(sets[0])} images to train on, less than a batch - lower --batch-size")
    return [*sets, *(label for label, _ in labels)], dict(classes=labels[0][1]) if labels else {}


def known(folder, config, args):
    """The config of a run, of a folder of images, as its checkpoint has it: older ones do not say which images.

    SystemExit if the checkpoint was trained on others than the folder has now, or on other latents.
    """
    if args.overwrite or not {"images", "latents"} & config.keys() or not (folder / "ckpt.pt").exists():
        return config
    if "latents" in config:
        latent_data.source(run.load(folder)["config"])
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
                     out=channels * variances.outputs(config), classes=classes(config), **network)


def classes(config):
    """How many labels the network of a run knows."""
    return config.get("classes", 0)


def dimension(config):
    """D, how many grey levels an image has, or latents numbers."""
    return math.prod(config["shape"])


def weights(checkpoint):
    """The averaged weights (EMA): those that are tested and drawn with."""
    return checkpoint["ema"]


TESTS = "mse", "rescaled", "nelbo", "nelbo_stable"         # what every run is tested with, whatever it trains on


def test_losses(config):
    """Names of the losses TESTS that have a weight for the run's target."""
    names = []
    for name in TESTS:
        with contextlib.suppress(ValueError):
            losses.weight(name, config["target"], torch.tensor([0.5]), ddpm.fixed(config["schedule"]))
            names.append(name)
    return names


def decoder(config):
    """Of grey levels the probability of their bins; latents have none, and a density."""
    return gaussian if "latents" in config else discretised


def loss(prediction, x, t, y, w, config, importance=1.0):
    """The loss of each image in training, w that of its squared error: (B, C, H, W), t, w (B,) -> (B,)."""
    if config["loss"] not in losses.OF_A_CHAIN:
        return losses.weighted_error(variances.split(prediction, y)[0], y, w)
    columns = variances.columns(t, losses.chain_of(config), config["target"], config["loss"], config["stabiliser"],
                                importance, config["vlb_weight"])
    return variances.loss(prediction, y, w, columns, config["variance"], x, decoder(config))


@torch.no_grad()
def test(model, data, config, device, labels=None):
    """Test losses of a network, without autocast: {"test_loss": ..., "test_mse": ..., ...}, means over the images.

    data: uint8 or latents, on the CPU; labels: theirs, of a run with labels. Their t and noise are the same in every
    run. Each process does its share. Of a chain, at its own times, the other losses are the error of the posterior mean
    and the bound without the prior, nats per dimension.
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
            prediction = model(z, t, *([] if labels is None else [labels[rows].to(device)]))
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
        name = f"{Path(data).resolve().name}-{checkpoints.digest(files, config['skip_corrupt'], 'images' in config)}"
    path = Path(args.data_dir) / (f"inception-{name}-{args.fid_split}-{size}-"
                                  f"{checkpoints.digest(*network.state_dict().values())}.npz")
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
    args.metrics = args.metrics or args.classifier is not None
    if args.metrics:
        metrics.enough_images(n, classifier.FEATURES)
    sources = [latent_data.source(one.config) for one, _ in chosen]
    known = [classifier.of_run(args.classifier, source, device) if args.metrics else None for source in sources]
    lines = []
    for (one, out), source, of_run in zip(chosen, sources, known):
        if args.metrics:
            real = classifier.real(of_run[0], source, n, args.data_dir)
        if args.fid:
            statistics = reference(source, network, args)
        with run.enough_memory("a smaller --batch-size"):
            paths, settings, seconds = draw_folder(out / "samples", one, n, args, device)
        images.save_png(images.grid(images.read(paths[:64], paths[:64], None, False), 8), out / "samples.png")
        result = {**one.config, **settings, "weights": "EMA", "num_samples": n}
        print(f"{one.folder}: {n:,} images in {args.steps} steps, {args.in_words}{guidance.towards(one.config)}, "
              f"in {seconds:.1f} s on {device}")
        if args.fid:
            fid = measure(paths, network, statistics)
            result |= dict(fid=fid, fid_split=args.fid_split, fid_reference=statistics[2])
            print(f"FID {fid:.3f}: {n:,} samples (EMA, {args.in_words}, {args.steps} steps"
                  f"{', clipped' if settings['clip'] else ''}) against {statistics[2]:,} images of {source['data']}, "
                  f"{args.fid_split} split")
        if args.metrics:
            x = images.read(paths, paths, None, False)
            result |= classifier.measure(of_run[0], x, *real, one.config.get("label")) | {"classifier": of_run[1]}
            classifier.show(result)
        run.write(out / "metrics.json", json.dumps(result, indent=2).encode())
        if not args.movie:
            (out / "samples.gif").unlink(missing_ok=True)                # it would be of other samples
        print(f"wrote samples/, samples.png{', samples.gif' * args.movie} and metrics.json to {out}/; "
              f"{progress.seconds():.1f} s in all")
        lines.append({"run": str(one.folder), "images": n, "steps": args.steps, **args.how, "fid": result.get("fid"),
                      **{name: result[name] for name in (*classifier.DISTANCES, "recognised") if name in result},
                      "test loss": result["test_loss"], "seconds": round(seconds, 1)})
    tables.show(lines, args.csv)


def test_examples(config, num, device, data_dir="data"):
    """What likelihood.py tests a run on: num test images in random order, as float levels in [-1, 1], or latents."""
    x = load(config, "test", data_dir)
    order = torch.randperm(len(x), generator=run.generator("cpu", "likelihood"))       # else of the first classes alone
    return images.to_float(x[order[:num]]).to(device)


def surprise(config):
    """Of images -log p(x) under the data's own density is not known."""
    return None
