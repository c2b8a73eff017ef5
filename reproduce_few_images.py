"""Images in few function evaluations: v and eps beside the exact flow and ancestral steps, from one first noise.

Part of `reproduce_beyond.py`. Read `reproduce_few.py` and `reproduce_spaces_images.py` first, whose networks these are:
on the cosine schedule `mse` of v is `v_space` and that of eps is `simple`.

Not here: how good the images are, which takes thousands of them (`metrics.py`).
"""
import itertools

import torch

import draw_images
import images
import reproduce_spaces_images
import run
from checkpoints import once
from study import rows

TARGETS = {"v": "v_space", "eps": "simple"}
SAMPLERS, GRIDS, NUMBERS = ["ddim", "dpmpp", "unipc", "ipndm", "sde_dpmpp"], ["t", "logsnr"], [8, 16, 32]
FLOW, ANCESTRAL = ("dpmpp", "logsnr", 500), ("ancestral", "t", 500)
DRAWN, SHOWN = 32, 8                   # images of a way, those of them in the figure


def draw(one, sampler, grid, n, count=DRAWN):
    """Images (count, C, H, W), uint8, of a Run in n evaluations; the first noise is the same for all."""
    return draw_images.draw(one.model(), (count, *one.config["shape"]), n, one.config,
                            run.generator("cpu", 0, "sample"), sampler=sampler, grid=grid)


def distance(a, b):
    """Root mean square of the difference of images, in grey levels of 255."""
    return (a.float() - b.float()).square().mean().sqrt().item()


def measure(one):
    """{"sampler grid n": distance to the flow's image of the same noise}, and that to the flow's of another noise."""
    flow = draw(one, *FLOW)
    found = {"other noise": distance(flow, flow.roll(1, 0)), "ancestral": distance(flow, draw(one, *ANCESTRAL))}
    return found | {f"{sampler} {grid} {n}": distance(flow, draw(one, sampler, grid, n))
                    for sampler, grid, n in itertools.product(SAMPLERS, GRIDS, NUMBERS)}


def measured(study):
    """{target: (Run, what `measure` found)}."""
    runs, found = reproduce_spaces_images.trained(study), {}
    for target, loss in TARGETS.items():
        one = runs[target, loss]
        found[target] = one, once(one, "few", measure)
    return found


def best(found, n):
    """(sampler, grid) of the least distance with n evaluations."""
    return min(itertools.product(SAMPLERS, GRIDS), key=lambda way: found[" ".join([*way, str(n)])])


def table(study):
    """How far the images of few evaluations are from those of the flow."""
    found = measured(study)
    lines = [[target, sampler, grid, *(f"{of[f'{sampler} {grid} {n}']:.1f}" for n in NUMBERS)]
             for target, (_, of) in found.items() for sampler, grid in itertools.product(SAMPLERS, GRIDS)]
    scale = "; ".join(f"{target}: {of['other noise']:.1f} to the flow's of another noise, {of['ancestral']:.1f} to "
                      f"{ANCESTRAL[2]} ancestral steps" for target, (_, of) in found.items())
    one, _ = found["v"]
    return rows(["target", "sampler", "grid", *map(str, NUMBERS)], lines) + [
        f"{study.args.data}, networks of `spaces-images`, `mse`, {one.checkpoint['step']:,} steps, one seed. Root mean "
        f"square distance in grey levels of {DRAWN} images to those of the same network and first noise by the flow "
        f"({FLOW[0]}, grid {FLOW[1]}, {FLOW[2]} evaluations). The scale: {scale}. x_hat is kept in [-1, 1]."]


def fig(study, path):
    """A block a target; rows: 8, 16, 32 evaluations by the best way, the flow, ancestral steps; a column a noise."""
    blocks = []
    for one, of in measured(study).values():
        ways = [(*best(of, n), n) for n in NUMBERS] + [FLOW, ANCESTRAL]
        blocks.append(images.grid(torch.cat([draw(one, *way, count=SHOWN) for way in ways]), SHOWN))
    images.save_png(images.grid(torch.stack(blocks), len(blocks), border=6), path)


RESULTS = {
    "few-images": (table, "images in 8, 16 and 32 evaluations, how far from the flow's; --data, --budget"),
    "few-images-samples": (fig, "v and eps: 8, 16, 32 evaluations, the flow, ancestral steps, from one first noise"),
}
TABLES = ("few-images",)
