"""Your own points: a .npy or .csv of shape (N, D), one point a row, as a dataset (not in the documents).

Read `datasets2d.py` first. Networks see the points standardised per axis, as they see the 2D datasets; samples are
given back in the file's units. A tenth of the points, drawn at random, is never trained on. Nobody knows the density
that the points were drawn from: there is no optimum, and what perfect samples would measure is estimated by drawing
from the points themselves.

Not here: the 2D datasets of the thesis, with everything known (`datasets2d.py`).

    python own_points.py points.npy       # number, dimension; mean and deviation of those to train on
"""
import functools
import hashlib
import sys
import warnings
from pathlib import Path

import numpy as np
import torch

ENDINGS = ".npy", ".csv"
FEWEST = 20                    # points in a file


def is_file_of_points(data):
    """Does a dataset's name end as a file of points does?"""
    return Path(data).suffix.lower() in ENDINGS


def read(path):
    """The points of a file -> float64 array (N, D). A first line of a .csv that is not numbers is its header.

    SystemExit if there is no such file, or it has not numbers in rows, or too few, or one that is not finite.
    """
    path = Path(path)
    try:
        if path.suffix.lower() == ".npy":
            points = np.load(path, allow_pickle=False).astype(np.float64, casting="same_kind")
        else:
            with open(path, encoding="utf-8-sig") as file:
                first = file.readline()
            try:
                header = not [float(word) for word in first.split(",")]
            except ValueError:
                header = True
            with warnings.catch_warnings(action="ignore"):               # of no data: said below
                points = np.loadtxt(path, delimiter=",", skiprows=int(header), ndmin=2, encoding="utf-8-sig")
            if header and len(points) and len(first.split(",")) != points.shape[1]:
                raise ValueError(f"a header of {len(first.split(','))} names and rows of {points.shape[1]} numbers")
    except Exception as error:                     # numpy raises many kinds
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error).split("\n")[0]
        raise SystemExit(f"cannot read the points {path} ({reason}) - "
                         "give a .npy array, or a .csv of numbers with commas between and decimal points, one point a "
                         "row") from None
    points = points[:, None] if points.ndim == 1 else points
    if points.ndim != 2 or points.shape[1] < 1:
        raise SystemExit(f"{path} has the shape {points.shape}, not (N, D) - give one point a row")
    if len(points) < FEWEST:
        raise SystemExit(f"{path} has {len(points)} points - give at least {FEWEST}")
    bad = ~np.isfinite(points).all(1)
    if bad.any():
        raise SystemExit(f"{path} has {bad.sum()} points that are not finite, the first in row {bad.argmax() + 1} - "
                         "leave them out")
    return points


@functools.cache
def split(path):
    """Points to train and to test on, float64 (n, D) each: the same random tenth is tested on in every run."""
    points = torch.from_numpy(read(path))
    order = torch.randperm(len(points), generator=torch.Generator().manual_seed(0))
    test, train = points[order].tensor_split([len(points) // 10])
    std = train.std(0)
    constant = ~((std > 1e-12 * train.abs().amax(0)) & std.isfinite())
    if constant.any():
        raise SystemExit(f"column {constant.long().argmax() + 1} of {path} is the same in all rows, or varies too "
                         "little or too much for floating point - leave it out or scale it")
    return train, test


def facts(path):
    """What a run's config keeps of a file: number of points, dimension, digest; mean and scale of those to train on."""
    train, test = split(path)
    digest = hashlib.sha256(train.numpy().tobytes() + test.numpy().tobytes()).hexdigest()[:16]
    digits = lambda values: [float(f"{value:.10g}") for value in values]           # of which no machine is in doubt
    return dict(rows=len(train) + len(test), dim=train.shape[1], digest=digest,
                mean=digits(train.mean(0)), scale=digits(train.std(0, correction=0)))


def are_facts(value):
    """Is it what `facts` gives?"""
    numbers = lambda key, low: isinstance(value[key], list) and all(
        type(number) is float and low < number < float("inf") for number in value[key])
    return (isinstance(value, dict) and value.keys() == {"rows", "dim", "digest", "mean", "scale"}
            and type(value["rows"]) is int and isinstance(value["digest"], str) and numbers("mean", -float("inf"))
            and numbers("scale", 0) and value["dim"] == len(value["mean"]) == len(value["scale"]) > 0)


def standardised(points, facts):
    """From the file's units to those of networks: (n, D) -> (n, D), on the training points of mean 0 and variance 1."""
    return (points - points.new_tensor(facts["mean"])) / points.new_tensor(facts["scale"])


def in_units_of_the_file(x, facts):
    """The inverse of `standardised`, in float64: the mean may be large beside the scale."""
    x = x.double()
    return x * x.new_tensor(facts["scale"]) + x.new_tensor(facts["mean"])


class OwnPoints:
    """A file's points as a dataset, standardised: what `datasets2d.GaussianMixture` is but for its exact density.

    SystemExit if the file is no longer that of `expected`, the facts in a run's config.
    """

    def __init__(self, path, expected):
        if facts(path)["digest"] != expected["digest"]:
            raise SystemExit(f"{path} is not the file that this run was trained on - "
                             "put that one back, or train on this one with another --out")
        self.train, self.test = (standardised(points, expected).float() for points in split(path))

    def sample(self, n, generator=None, dtype=torch.float32):
        """Draw n of the points, with replacement -> (n, D): as good as samples of their unknown density can be."""
        points = torch.cat([self.train, self.test]).to(dtype)
        return points[torch.randint(len(points), (n,), generator=generator)]


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python own_points.py points.npy")
    found = facts(sys.argv[1])
    print(f"{sys.argv[1]}: {found['rows']:,} points of dimension {found['dim']}; of the nine tenths to train on")
    for axis, (mean, scale) in enumerate(zip(found["mean"], found["scale"]), 1):
        print(f"  axis {axis}: mean {mean:.4g}, standard deviation {scale:.4g}")
