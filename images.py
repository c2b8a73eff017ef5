"""Sets of images, decoded once and kept as one uint8 tensor (N, C, H, W) (thesis 4.1.2, Fig. 4.3).

A set is a row of IMAGES, fetched by torchvision into --data-dir, or any folder of images. The network sees floats in
[-1, 1], made batch by batch: uint8 is a quarter of the memory, so all of CIFAR-10 (184 MB) fits on a GPU.

Not here: how training draws its batches (`train_images.py`), and what labels are for (`guidance.py`, `classifier.py`).

    python images.py                       # CIFAR-10: 100 random images, images.png; mean and standard deviation
    python images.py photos --image-size 64
"""
import argparse
import contextlib
import functools
import glob
import hashlib
import io
import os
import socket
import sys
import warnings
from collections import Counter
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps

import progress
import run
import settings

IDX = "-ubyte.gz, ".join(["train-images-idx3", "train-labels-idx1",
                          "t10k-images-idx3", "t10k-labels-idx1"]) + "-ubyte.gz"
IMAGES = {  # torchvision's class, the folder under --data-dir where it looks for its files, the files, their address
    "cifar10":       ("CIFAR10", "", "cifar-10-python.tar.gz", "https://www.cs.toronto.edu/~kriz"),
    "fashion_mnist": ("FashionMNIST", "FashionMNIST/raw", IDX,
                      "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com"),
    "mnist":         ("MNIST", "MNIST/raw", IDX, "https://ossci-datasets.s3.amazonaws.com/mnist"),
}
FLIPPED = {"cifar10"}       # mirrored in training unless --no-flip: digits and shoes are not, nor what is not known
LARGEST = 4096              # pixels of a side that images are scaled to
ENDINGS = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm", ".pgm")
GREY = ("1", "L", "LA", "La", "I", "I;16", "I;16L", "I;16B", "I;16N")       # PIL's modes; I has 16 bits here


def to_float(x):
    """uint8 levels 0 ... 255 -> float32 in [-1, 1], both ends exact; what is float already, latents, as it is."""
    return x if x.is_floating_point() else x.float() / 127.5 - 1


def to_uint8(x):
    """The inverse of to_float: the nearest level; what is outside [-1, 1] goes to the nearer end."""
    return ((x.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def flip(x, generator):
    """Mirror each image of a batch (B, C, H, W) left to right with probability 1/2."""
    mirrored = torch.rand(len(x), generator=generator, device=generator.device).to(x.device) < 0.5              # (B,)
    return torch.where(mirrored[:, None, None, None], x.flip(3), x)


@functools.cache
def note(sentence):
    """Say a sentence on stderr, once."""
    print(sentence, file=sys.stderr)


def find(folder):
    """Paths of all images under a folder, sorted; follows links, leaves out names that begin with a dot.

    Only what is a file: reading a pipe would wait for ever. Files of other endings are counted in a line on stderr.
    """
    if not os.path.isdir(folder):
        raise SystemExit(f"no folder of images at {folder} - give the path of one, or one of {', '.join(IMAGES)}")
    there = [name for name in glob.glob("**", root_dir=folder, recursive=True) if not os.path.isdir(f"{folder}/{name}")]
    names = sorted(name for name in there if name.lower().endswith(ENDINGS) and os.path.isfile(f"{folder}/{name}"))
    if not names:
        raise SystemExit(f"no images under {folder} - put some there, "
                         f"their names must end in one of {' '.join(ENDINGS)}")
    left_out = Counter(Path(name).suffix.lower() or "no ending" for name in set(there) - set(names))
    if left_out:
        kinds = ", ".join(f"{n} {ending}" for ending, n in sorted(left_out.items()))
        note(f"left out of {folder}: {kinds} - images are files that end in one of {' '.join(ENDINGS)}")
    return [f"{folder}/{name}" for name in names]


def name_hash(name):
    """A number in [0, 1) that is a function of the name alone."""
    return int.from_bytes(hashlib.sha256(name.encode(errors="surrogateescape")).digest()[:6], "big") / 2**48


def facts(folder):
    """Count and digest of the names of a folder's images, for a run's config: resuming needs the same ones."""
    names = [os.path.relpath(path, folder) for path in find(folder)]
    return dict(count=len(names), digest=hashlib.sha256("\0".join(names).encode(errors="surrogateescape")).hexdigest())


def is_grey(path):
    """Does the header say that an image has no colour? True if it cannot be read: that decode() will say."""
    with contextlib.suppress(Exception), Image.open(path) as image:
        return image.mode in GREY
    return True


def decode(path, mode, image_size):
    """One image, upright, of mode L or RGB -> uint8 (C, H, W). PIL raises many kinds of error if it is corrupt."""
    with Image.open(path) as image:
        ImageOps.exif_transpose(image, in_place=True)
        if image.mode.startswith("I"):
            image = Image.fromarray((np.asarray(image) >> 8).clip(0, 255).astype(np.uint8))
        image = image.convert(mode)
    if image_size is not None:
        W, H = image.size
        side = min(H, W)
        left, top = (W - side) // 2, (H - side) // 2
        image = image.resize((image_size, image_size), Image.Resampling.BICUBIC,           # PIL's is antialiased
                                 box=(left, top, left + side, top + side))
    return np.atleast_3d(np.asarray(image)).transpose(2, 0, 1)


def readable(paths, mode, image_size, skip_corrupt):
    """Yield path and image (C, H, W) of each that can be decoded; SystemExit at another, or count it and go on."""
    skipped = 0
    for path in progress.watch(paths, "reading", "images"):
        try:
            image = decode(path, mode, image_size)
        except Exception as error:
            if not skip_corrupt:
                raise SystemExit(f"cannot read the image {path} ({error}) - mend or delete it, "
                                 "or leave out all such with --skip-corrupt") from None
            skipped += 1
        else:
            yield path, image
    if skipped:
        print(f"skipped {skipped} of {len(paths)} images that cannot be read", file=sys.stderr)


def read(paths, whole, image_size, skip_corrupt):
    """The images `paths` of the set `whole`, by which all splits have one C and one size -> uint8 (N, C, H, W)."""
    grey = all(map(is_grey, progress.watch(whole, "looking for colour", "images")))
    how = "L" if grey else "RGB", image_size, skip_corrupt
    first, like = next(readable(whole, *how), (None, np.empty(0)))
    try:
        x, n = np.empty((len(paths), *like.shape), np.uint8), 0
    except MemoryError:
        raise SystemExit(f"not enough memory for {len(paths):,} images of {'x'.join(map(str, like.shape))} - "
                         "give a smaller --image-size, or fewer") from None
    for n, (path, image) in enumerate(readable(paths, *how), 1):
        if image.shape != like.shape:
            (_, h, w), (_, H, W) = like.shape, image.shape
            raise SystemExit(f"images of mixed sizes: {first} is {w} x {h} and {path} is {W} x {H} - "
                             "cut and resize all of them with, say, --image-size 32")
        x[n - 1] = image
    if n == 0:
        raise SystemExit(f"none of the {len(paths)} images, {paths[0]} ..., can be read - "
                         "mend them or give another folder")
    return torch.from_numpy(x[:n])


def read_folder(folder, image_size=None, skip_corrupt=False):
    """All images under a folder, sorted by path -> uint8 (N, C, H, W), C = 1 if all are grey, else 3 (RGB).

    With image_size the square in the middle, resized; without, all must have one size. 16-bit grey is divided by 256,
    transparency ignored. SystemExit if there is no image, or sizes differ, or one is corrupt and not to be skipped.
    """
    paths = find(folder)
    return read(paths, paths, image_size, skip_corrupt)


def fetched(data, split, data_dir):
    """A named set, torchvision's object. SystemExit if it cannot be fetched or is damaged."""
    from torchvision import datasets  # here: runs on points need not wait a second for it
    kind, where, files, address = IMAGES[data]
    socket.setdefaulttimeout(10)                    # seconds; torchvision would wait minutes for a silent network
    try:
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings(action="ignore"):
            return getattr(datasets, kind)(data_dir, train=split == "train", download=True)
    except Exception as error:                      # many kinds: of the network, the disk, or a damaged file
        reason = [type(error).__name__, *str(error).splitlines()][-1]
        raise SystemExit(f"cannot read {data} ({reason}) - remove what is damaged in {Path(data_dir) / where} and "
                         f"put there, from {address}: {files}; or choose another --data-dir") from None


def fetch(data, split, data_dir):
    """The images of a named set -> uint8 (N, C, H, W)."""
    x = torch.as_tensor(fetched(data, split, data_dir).data)                                # (N, H, W[, C])
    return (x[:, None] if x.ndim == 3 else x.permute(0, 3, 1, 2)).contiguous()


def in_splits(data):
    """Has a folder the subfolders train and test?"""
    return all(Path(data, name).is_dir() for name in ("train", "test"))


def split_paths(data, split, by_name=True):
    """Paths of a split of a folder, and of all its images; what a split is says `load`."""
    whole = find(data)
    if in_splits(data):
        paths = find(f"{data}/{split}")
    else:
        order, n = torch.randperm(len(whole), generator=run.generator("cpu", "split")).tolist(), len(whole) // 10
        if by_name:
            hashes = [name_hash(os.path.relpath(path, data)) for path in whole]
            order, n = sorted(range(len(whole)), key=hashes.__getitem__), sum(h < 0.1 for h in hashes)
        n = min(max(1, n), len(whole) - 1)
        paths = [whole[i] for i in sorted(order[:n] if split == "test" else order[n:])]
    if len(whole) < 2:
        raise SystemExit(f"a single image, {whole[0]} - two are needed at least, one to train on and one to test")
    return paths, whole


def load(data, split, data_dir="data", image_size=None, skip_corrupt=False, by_name=True):
    """The split train or test of a set in IMAGES, or of a folder -> uint8 (N, C, H, W), CPU; SystemExit at a mistake.

    The splits of a folder are its subfolders train and test. Without them about a tenth is the test split, those whose
    name has a hash below 0.1 (at least one, not all): in a folder that grows no image changes sides. by_name=False: a
    fixed random tenth of their numbers, the split of runs whose config does not say which images the folder had.
    """
    assert split in ("train", "test")
    if (image_size or 0) > LARGEST:
        raise SystemExit(f"images of {image_size} x {image_size} pixels are too large - "
                         f"give an --image-size of at most {LARGEST}")
    if data in IMAGES:
        x = fetch(data, split, data_dir)
        return x if image_size is None else F.interpolate(x, (image_size, image_size), mode="bicubic", antialias=True)
    return read(*split_paths(data, split, by_name), image_size, skip_corrupt)


def labels(data, split, data_dir="data", skip_corrupt=False, by_name=True):
    """The label of each image of `load` -> (N,), and the number of classes; SystemExit if there are none.

    The classes of a folder are its subfolders, or those of train and test together, in the order of their names.
    """
    if data in IMAGES:
        found = fetched(data, split, data_dir)
        return torch.as_tensor(found.targets), len(found.classes)
    (paths, whole), deep = split_paths(data, split, by_name), in_splits(data)
    of = {path: Path(path).relative_to(data).parts[:-1] for path in whole}
    names = sorted({parts[deep:][:1] for parts in of.values() if not deep or parts[:1] in (("train",), ("test",))})
    if () in names or len(names) < 2:
        raise SystemExit(f"{data} has no labels: each class needs a subfolder of its own - move its images there")
    if skip_corrupt:
        paths = [path for path, _ in readable(paths, "L", None, True)]
    return torch.tensor([names.index(of[path][deep:][:1]) for path in paths]), len(names)


def grid(x, columns, border=2):
    """Images uint8 (N, C, H, W) in rows, white between and around them -> (C, H', W')."""
    columns = min(columns, len(x))
    rows = -(-len(x) // columns)
    x = F.pad(x, (border, 0, border, 0, 0, 0, 0, rows * columns - len(x)), value=255)   # above, left; empty places
    x = x.unflatten(0, (rows, columns)).permute(2, 0, 3, 1, 4)                          # (C, rows, H, columns, W)
    return F.pad(x.flatten(3).flatten(1, 2), (0, border, 0, border), value=255)


def save_png(x, path):
    """Write one image uint8 (C, H, W), grey or RGB, as PNG, without loss, whole or not at all."""
    buffer = io.BytesIO()
    Image.fromarray(x.cpu().permute(1, 2, 0).squeeze(2).numpy()).save(buffer, format="png")
    run.write(path, buffer.getbuffer())


def main(argv=None):
    parser = settings.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", nargs="?", default="cifar10",
                        help=f"{', '.join(IMAGES)} or a folder of images (cifar10)")
    parser.add_argument("--data-dir", default="data", help="where the named datasets are or go (data)")
    parser.add_argument("--image-size", type=settings.number(int, 1, LARGEST), help="cut to squares and resize (no)")
    parser.add_argument("--skip-corrupt", action=argparse.BooleanOptionalAction, default=False,
                        help="leave out images that cannot be read (no)")
    args = parser.parse_args(argv)
    for split in "test", "train":
        x = load(args.data, split, args.data_dir, args.image_size, args.skip_corrupt)
        N, C, H, W = x.shape
        std, mean = torch.stack([torch.stack(torch.std_mean(to_float(x[:, c]))) for c in range(C)], 1).tolist()
        print(f"{args.data}, {split}: N = {N}, C = {C}, H = {H}, W = {W}; in [-1, 1] each channel has mean "
              + " ".join(f"{m:.4f}" for m in mean) + ", standard deviation " + " ".join(f"{s:.4f}" for s in std))
    chosen = torch.randperm(N, generator=run.generator("cpu", "figure"))[:100]
    save_png(grid(x[chosen], 10), "images.png")
    print(f"wrote images.png, {len(chosen)} random images of the train split")


if __name__ == "__main__":
    run.script(main, "type the same command again")
