"""Latents as a dataset of images: the folder that `latent.py` writes, for `train.py --data runs/latent-<data>`.

Read `latent.py` first. A run on latents has the digest of their autoencoder's weights in its config: it is neither
decoded with another nor gone on with on other latents.

Not here: how the folder is made (`latent.py`).
"""
from pathlib import Path

import torch

import latent
import settings
from latent import AUTOENCODER, LATENTS, digest, read, unpacked


def is_folder(data):
    """Is it the folder of an autoencoder, or of latents that have lost it?"""
    return any(Path(data, name).is_file() for name in (AUTOENCODER, LATENTS))


def load(folder):
    """The standardised latents in a folder: {"train": (N, c, h, w), "test": ...}; SystemExit if they are of another."""
    autoencoder, found = read(folder)["autoencoder"], unpacked(Path(folder, LATENTS))
    if found["digest"] != digest(autoencoder):
        raise SystemExit(f"{folder}/{LATENTS} is not of the {AUTOENCODER} beside it - make it anew: latent.py --resume")
    return found


def facts(folder):
    """What the config of a run on latents keeps of their folder."""
    found = load(folder)
    return dict(count=len(found["train"]) + len(found["test"]), digest=found["digest"])


def of_run(config):
    """`latent.read` of the autoencoder of a run; SystemExit if it is not there or another."""
    found = read(config["data"])
    if digest(found["autoencoder"]) != config["latents"]["digest"]:
        raise SystemExit(f"{settings.name(config)} was trained on latents of another autoencoder than "
                         f"{config['data']} has now - bring that one back, or train anew with another --out")
    return found


def source(config):
    """The config of the images that samples of a run on images are like: of latents those of their autoencoder."""
    return of_run(config)["config"] if "latents" in config else config


def decoder(config):
    """Of a run samples -> images in [-1, 1]: latents (B, c, h, w) -> (B, C, H, W), others as they are."""
    if "latents" not in config:
        return lambda z: z
    autoencoder = of_run(config)["autoencoder"]
    return torch.no_grad()(lambda z: latent.in_parts(autoencoder.to(z.device).decode, z.float()))
