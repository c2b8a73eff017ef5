"""Images of a trained run, and the folder of files that they are drawn into.

Read `samplers.py` and `kind_images.py` first: `sample` there draws with this. Not here: what is measured of them.
"""
import json
import math
import re
import time

import torch

import guidance
import images
import invariance
import latent_data
import movie
import progress
import run
import samplers
import variance as variances
from settings import autocast


def clips(config, clip):
    """Is x_hat kept in [-1, 1]? If that is asked for, of images."""
    return clip and "latents" not in config


def draw(model, shape, steps, config, generator, t_min=1e-3, clip=True, own=None, under=None, t_max=None, **how):
    """Images (B, C, H, W), uint8; clip keeps x_hat in [-1, 1] at every step. how: sampler, grid, eta of `samplers`.

    shape: of what the model sees; latents are not clipped, and decoded. model predicts `variance.predicted` of the
    run's target; how may also have the variance of `ancestral`. own: the schedule of the Run, where it is learned.
    under, t_max: another's name, where noise is, see `invariance.py`.
    """
    target = variances.predicted(config["target"])
    model, schedule, t_min = invariance.of_run(model, target, config, t_min, under, own, t_max)
    with autocast(config, generator.device):
        x = samplers.sample(model, shape, steps, target=target, schedule=schedule, t_min=t_min, generator=generator,
                            stabiliser=config["stabiliser"], clip=1.0 if clips(config, clip) else math.inf, **how)
    return images.to_uint8(latent_data.decoder(config)(x))


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
                    steps=args.steps, **args.how, t_min=t_min, clip=clips(config, args.clip),
                    sampling_seed=args.seed, batch_size=args.batch_size, precision=config["precision"],
                    device=str(device)) | {key: config[key] for key in guidance.SAMPLING if key in config}
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
    model = guidance.of_run(model, config)
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
            decode = latent_data.decoder(config)
            frames = [*((t, decode(z)) for t, z in film.frames), (0.0, images.to_float(x[:n]))]
            movie.images([(t, first_grid(z)) for t, z in frames], folder.parent / "samples.gif")
        for name, image in zip(names[i:i + size], x):                 # the last batch is whole, too: one shape for all
            images.save_png(image, folder / name)
    if have - set(names):
        print(f"{folder} holds {len(have | set(names)):,} images: the first {n:,} count")
    return [folder / name for name in names], settings, time.perf_counter() - start


def rows(folder, labels):
    """Draw the first images of each label, in folder/label-<label>/, as a row of one grid, folder/samples.png."""
    paths = [own_images(folder / f"label-{label}" / "samples")[:8] for label in labels]
    columns = min(map(len, paths))
    paths = [path for of_label in paths for path in of_label[:columns]]
    images.save_png(images.grid(images.read(paths, paths, None, False), columns), folder / "samples.png")
    print(f"wrote samples.png to {folder}/: labels {', '.join(map(str, labels))}, a row each")
