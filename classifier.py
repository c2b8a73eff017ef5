r"""A small classifier of images: the distance of samples from the data that needs no download, and their labels.

Read `images.py` and `metrics.py` first. Inception's weights are 95 MB from elsewhere, and it was trained on photos in
colour. Three convolutions, trained on the data itself by one command, give 128 features of an image and p(label | x).
Each feature has mean 0 and variance 1 over the data. In these features are measured

    frechet              distance of two Gaussians, as in FID                         Eq. (4.6)
    kid                  kernel distance without bias: 1,000 samples suffice          Binkowski et al. 2018
    knn_precision        share of samples that lie where the data are                 Kynkaanniemi et al. 2019
    knn_recall           share of the data that lies where samples are
    frechet_binarised    the first, of images that are thresholded at 0 of [-1, 1]    poster, "FID bin."
    recognised           share of samples that are given their label

against the test split, beside their floor: as many images of the train split in place of the samples. Numbers of two
classifiers cannot be compared: a classifier has a digest, and results name it. A folder's classes are its subfolders.

Not here: FID (`metrics.py`); guidance by a classifier.

    python classifier.py --data fashion_mnist           # two minutes; writes runs/classifier-fashion_mnist.pt
    python sample.py --ckpt runs/fashion_mnist-v-mse-s0 --num-samples 10000 --metrics
"""
import argparse
import math
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

import checkpoints
import images
import metrics
import progress
import run
import settings

FEATURES, STEPS, BATCH, RATE = 128, 1500, 128, 2e-3
DISTANCES = "frechet", "kid", "knn_precision", "knn_recall", "frechet_binarised"     # precision is a setting of a run


class Classifier(nn.Module):
    """model(x) -> logits. x (B, C, H, W) in [-1, 1]; returns (B, classes)."""

    def __init__(self, channels, classes):
        super().__init__()
        block = lambda n_in, n_out: [nn.Conv2d(n_in, n_out, 3, padding=1), nn.BatchNorm2d(n_out), nn.ReLU(),
                                     nn.MaxPool2d(2, ceil_mode=True)]
        self.body = nn.Sequential(*block(channels, 32), *block(32, 64), *block(64, 128), nn.AdaptiveAvgPool2d(3),
                                  nn.Flatten(), nn.Linear(9 * 128, FEATURES), nn.BatchNorm1d(FEATURES, affine=False))
        self.last = nn.Linear(FEATURES, classes)

    def features(self, x):
        """(B, C, H, W) -> (B, FEATURES)."""
        return self.body(x)

    def forward(self, x):
        return self.last(F.relu(self.features(x)))


def train(x, label, classes, flip=False, device="cpu"):
    """A trained Classifier of images uint8 (N, C, H, W) and labels (N,): the same for the same data."""
    torch.manual_seed(run.generator("cpu", 0, "classifier").initial_seed())
    model, g = Classifier(x.shape[1], classes).to(device), run.generator("cpu", 0, "batches")
    optimizer = torch.optim.Adam(model.parameters(), RATE)
    for step in progress.watch(range(STEPS), "training", "steps"):
        rows = torch.randint(len(x), (BATCH,), generator=g)
        batch = images.flip(x[rows], g) if flip else x[rows]
        optimizer.param_groups[0]["lr"] = RATE * (1 + math.cos(math.pi * step / STEPS)) / 2
        loss = F.cross_entropy(model(images.to_float(batch).to(device)), label[rows].to(device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval().requires_grad_(False)


@torch.no_grad()
def said(model, x):
    """What the classifier says of images uint8 (n, C, H, W): features (n, FEATURES) and p(label | x) (n, classes)."""
    device, found = model.last.weight.device, []
    for batch in progress.watch(x.split(500), "classifier", "images", len):
        features = model.features(images.to_float(batch).to(device))
        found.append((features.cpu(), model.last(F.relu(features)).softmax(1).cpu()))
    return [torch.cat(part) for part in zip(*found)]


def binarised(x):
    """Levels thresholded at 0 of [-1, 1]: uint8, 0 or 255."""
    return (images.to_float(x) > 0).to(torch.uint8) * 255


def seen(model, x):
    """All that `distances` needs of images: features, p(label | x), and features of the binarised images."""
    return *said(model, x), said(model, binarised(x))[0]


def distances(x, y):
    """DISTANCES of samples x to images y, both as they are `seen` -> {name: number}."""
    values = metrics.frechet(x[0], y[0]), metrics.kid(x[0], y[0]), *metrics.precision_recall(y[0], x[0])
    return {name: value.item() for name, value in zip(DISTANCES, (*values, metrics.frechet(x[2], y[2])))}


def recognised(x, label):
    """Share of samples, as they are `seen`, that are given their label, a number or (n,): {"recognised": number}."""
    return {"recognised": (x[1].argmax(1) == label).double().mean().item()}


def some(x, n):
    """n images of the train split at random, for the floor."""
    return x[torch.randperm(len(x), generator=run.generator("cpu", "floor"))[:n]]


def real(model, config, n, data_dir="data"):
    """The test split of a run's data, and n images of its train split for the floor, both as they are `seen`.

    With `label` in the config the images of that.
    """
    def split(name):
        how = dict(skip_corrupt=config["skip_corrupt"], by_name="images" in config)
        x = images.load(config["data"], name, data_dir, config["image_size"], **how)
        return x[images.labels(config["data"], name, data_dir, **how)[0] == config["label"]] if "label" in config else x
    return seen(model, split("test")), seen(model, some(split("train"), n))


def measure(model, x, test, train, label=None):
    """What is measured of samples x, uint8 (n, C, H, W), and its floor: {name: number, name_floor: number}.

    test, train: of `real`. label: of all the samples, for `recognised`.
    """
    of = lambda x: distances(x, test) | ({} if label is None else recognised(x, label))
    return of(seen(model, x)) | {f"{name}_floor": value for name, value in of(train).items()}


def show(result):
    """Print what `measure` found, beside the floor."""
    print("                      samples    floor (train split against test split)")
    for name in *DISTANCES, "recognised":
        if name in result:
            print(f"{name.replace('_', ' '):18s}{result[name]:11.4f}{result[f'{name}_floor']:9.4f}")


# The file

def place(data, folder="runs"):
    """Where the classifier of a dataset is unless it is told otherwise; folder: that of the runs."""
    return Path(folder, f"classifier-{Path(data).resolve().name}.pt")


def of_run(path, config, device="cpu"):
    """The Classifier in a file for a run's images, and what the file says of it; SystemExit if it is of others."""
    path, cure = Path(path or place(config["data"])), run.command("classifier.py", "--data", config["data"])
    if not path.exists():
        raise SystemExit(f"no classifier at {path} - train one: {cure}")
    try:
        checkpoint, _ = checkpoints.unpack(path.read_bytes())
        facts = checkpoint["classifier"]
        own, same = ((of.get("images") or of["data"], of["shape"]) for of in (facts, config))
        model = Classifier(facts["shape"][0], facts["classes"])
        model.load_state_dict(checkpoint["model"])
    except Exception:                                      # torch raises many kinds
        raise SystemExit(f"{path} is damaged or no classifier - train one: {cure}") from None
    if own != same:
        of, wanted = (f"{of['data']}, {'x'.join(map(str, of['shape']))}" for of in (facts, config))
        raise SystemExit(f"{path} is a classifier of other data ({of}) than the run's ({wanted}) - train one: {cure}")
    return model.to(device).eval().requires_grad_(False), facts


def main(argv=None):
    parser = settings.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                             usage="python classifier.py [options], see --help")
    parser.add_argument("--data", default="fashion_mnist",
                        help=f"{', '.join(images.IMAGES)} or a folder of images (fashion_mnist)")
    parser.add_argument("--data-dir", type=settings.folder, default="data", help="where the named datasets are (data)")
    parser.add_argument("--image-size", type=settings.number(int, 4, images.LARGEST), help="that of the runs (no)")
    parser.add_argument("--skip-corrupt", action="store_true", help="leave out images that cannot be read")
    parser.add_argument("--out", type=settings.file, help="the file to write (runs/classifier-<data>.pt)")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda", "mps"], default="auto", help="(auto: cuda or cpu)")
    args = parser.parse_args(argv)
    device, path = run.device(args.device), Path(args.out or place(args.data))
    checkpoints.check_writable(path.parent)
    (x, (label, classes)), (test, (truth, _)) = (
        (images.load(args.data, split, args.data_dir, args.image_size, args.skip_corrupt),
         images.labels(args.data, split, args.data_dir, args.skip_corrupt)) for split in ("train", "test"))
    model = train(x, label, classes, args.data in images.FLIPPED, device)
    of_test = seen(model, test)
    accuracy = recognised(of_test, truth)["recognised"]
    facts = dict(data=args.data, shape=list(x.shape[1:]), classes=classes, accuracy=accuracy, steps=STEPS,
                 digest=checkpoints.digest(*model.state_dict().values()),
                 **{} if args.data in images.IMAGES else dict(images=images.facts(args.data)))
    checkpoints.save(path, dict(classifier=facts, model={name: c.cpu() for name, c in model.state_dict().items()}))
    print(f"{path}: {classes} classes, {accuracy:.2%} of {len(test):,} test images are given their label, "
          f"digest {facts['digest']}; {progress.seconds():.0f} s in all")
    floor = distances(seen(model, some(x, 10_000)), of_test)
    print("floor, train split against test split: " + ", ".join(
        f"{name.replace('_', ' ')} {value:.4f}" for name, value in floor.items()))


if __name__ == "__main__":
    run.script(main, "nothing was written")
