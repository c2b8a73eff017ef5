r"""How good samples are: distances of points and their floor, log-density (thesis 4.3.1), FID of images (4.3.2).

Read `datasets2d.py` first. Two finite samples of one distribution already differ: with 10,000 points against 50,000 the
mean distance is about 0.014. That is the floor; a result at the floor is as good as this metric can tell.

FID is the distance of two Gaussians, fitted to what the Inception network says of two sets of images. The network and
its weights are pytorch-fid's (95 MB, downloaded once), and so are the numbers. FID of few images is too high: compare
equal numbers of them only. Not here: the likelihood of a model.

    python metrics.py                       # the floor of every set, 10,000 points against 50,000
    python metrics.py samples data          # FID of two folders of images
    python metrics.py samples data.npz      # the same, with statistics that pytorch-fid or sample.py has written
"""
import argparse
import io
import math
from pathlib import Path
from unittest import mock

import numpy as np
import torch

import progress
import run
import settings


def mean_distance(x, y):
    """Euclidean distance of the means of x (n, D) and y (m, D), Eq. (4.2), in data units -> ()."""
    return (x.mean(0) - y.mean(0)).norm()


def covariance(x):
    """Covariance of x (n, D) with n - 1 in the denominator, Eq. (4.3) -> (D, D)."""
    centred = x - x.mean(0)
    return centred.T @ centred / (len(x) - 1)


def covariance_distance(x, y):
    """Frobenius norm of the difference of the covariances of x (n, D) and y (m, D), Eq. (4.5), in data units^2: ()."""
    return (covariance(x) - covariance(y)).norm()


def directions(dim, like):
    """Unit vectors (dim, n), 20 evenly spread over the half circle; of other dimensions 100 random ones."""
    if dim == 2:
        angle = torch.arange(20, device=like.device, dtype=like.dtype) / 20 * math.pi
        return torch.stack([angle.cos(), angle.sin()])
    u = torch.randn(dim, 100, generator=torch.Generator().manual_seed(0)).to(like)
    return u / u.norm(dim=0)


def ascending(x):
    """The rows of x (..., n), each in ascending order: on a CPU numpy sorts many times as fast as torch."""
    return torch.from_numpy(np.sort(x.numpy())) if x.device.type == "cpu" else x.sort().values


def sliced_wasserstein(x, y):
    """Sliced Wasserstein distance of order 2 of points x (n, D) and y (m, D), in data units: () (Bonneel et al. 2015).

    The root of the mean, over `directions`, of the squared Wasserstein distance of the projections: the mean squared
    difference of their quantiles, exact if m is a multiple of n or n of m. It sees the whole shape.
    """
    u = directions(x.shape[1], x)
    size = max(len(x), len(y))
    x, y = (ascending(p.T.contiguous())[:, torch.arange(size, device=p.device) * len(p) // size]
            for p in (x @ u, y @ u))
    return (x - y).square().mean().sqrt()


def log_density(dataset, x):
    """Mean log-density of points x (n, 2) under the dataset's exact density, in nats -> ().

    For samples as good as the data it is that of the data, minus the entropy; more means too sharp, less means off the
    data. It sees what two moments do not: a ring drawn too thin has the right mean and covariance.
    """
    return dataset.log_prob(x).mean()


DISTANCES = mean_distance, covariance_distance, sliced_wasserstein


def floor(dataset, n, m, repetitions=20, generator=None):
    """What the distances are between n and m points of the dataset itself.

    Returns {name: (mean, std)} of the three distances over the repetitions, std with n - 1.
    """
    values = {distance.__name__: [] for distance in DISTANCES}
    for _ in range(repetitions):
        x, y = dataset.sample(n, generator), dataset.sample(m, generator)
        for distance in DISTANCES:
            values[distance.__name__].append(distance(x, y))
    return {name: (torch.stack(c).mean().item(), torch.stack(c).std().item()) for name, c in values.items()}


def root(cov):
    """A factor r (D, rank) of a covariance: r r^T = cov (D, D)."""
    var, axes = torch.linalg.eigh(cov)
    kept = var > len(cov) * torch.finfo(cov.dtype).eps * var[-1]         # the others are 0 up to rounding
    return axes[:, kept] * var[kept].sqrt()


def frechet_distance(mu_x, cov_x, mu_y, cov_y):
    """Squared Frechet distance of two Gaussians, means (D,) and covariances (D, D), in float64 -> (); Eq. (4.6).

    With Sx = a a^T and Sy = b b^T the eigenvalues of Sx Sy other than 0 are those of (a^T b)(a^T b)^T: the trace of
    its root is the sum of the singular values of a^T b.
    """
    mu_x, cov_x, mu_y, cov_y = (moment.cpu().double() for moment in (mu_x, cov_x, mu_y, cov_y))   # MPS has no float64
    # singular values: of a rank below D the eigenvalues' rounding, 1e-16, is 1e-8 each after the root
    trace_root = torch.linalg.svdvals(root(cov_x).T @ root(cov_y)).sum()
    return (mu_x - mu_y).square().sum() + cov_x.trace() + cov_y.trace() - 2 * trace_root


def frechet(a, b):
    """`frechet_distance` of the Gaussians that are fitted to features a (n, D) and b (m, D) -> ()."""
    return frechet_distance(*moments(a), *moments(b))


def kid(a, b, rows=1000):
    """Kernel distance of features a (n, D) and b (m, D): MMD^2 without bias -> (), float64 (Binkowski et al. 2018).

    Its kernel is (x . y / D + 1)^3, which sees three moments. It can be below 0; of one distribution its mean is 0. So
    that of few samples is noisy and not too high. rows: at once.
    """
    def total(x, y):
        return sum(((part @ y.T / x.shape[1] + 1)**3).sum() for part in x.split(rows))
    a, b = a.cpu().double(), b.cpu().double()
    n, m, own = len(a), len(b), lambda x: ((x.square().sum(1) / x.shape[1] + 1)**3).sum()           # of i = j
    return ((total(a, a) - own(a)) / (n * (n - 1)) + (total(b, b) - own(b)) / (m * (m - 1))
            - 2 * total(a, b) / (n * m))


def covered(x, y, k=3, rows=1000):
    """Share of x (n, D) that lies in the balls around the points of y (m, D), each up to its k-th neighbour in y: ().

    Kynkaanniemi et al. 2019, Eq. (1), (2).
    """
    radius = torch.cat([torch.cdist(part, y).kthvalue(k + 1).values for part in y.split(rows)])     # 1 is itself: (m,)
    return torch.cat([(torch.cdist(part, y) <= radius).any(1) for part in x.split(rows)]).double().mean()


def precision_recall(real, fake, k=3):
    """Share of fake (n, D) within the real (m, D), as `covered` says, and of real within the fake -> two of ()."""
    return covered(fake, real, k), covered(real, fake, k)


def downloaded_weights():
    """Where torch.hub has the network's weights, or will have them."""
    from pytorch_fid.inception import FID_WEIGHTS_URL
    return Path(torch.hub.get_dir(), "checkpoints", Path(FID_WEIGHTS_URL).name)


def inception(weights=None, device="cpu", dims=2048):
    """pytorch-fid's Inception network up to its layer of 64, 192, 768 or 2,048 features, to evaluate.

    weights: a local file of them; None is pytorch-fid's own, from torch.hub's cache or else downloaded into it.
    """
    from pytorch_fid import inception as source  # here: nothing else needs it or torchvision
    url, path = source.FID_WEIGHTS_URL, weights or downloaded_weights()
    cure = f"put {url} into {downloaded_weights().parent}/, or name your copy with --inception-weights PATH"

    def read(url, progress):                                             # its own may run code in the file
        if weights is None:
            return torch.hub.load_state_dict_from_url(url, map_location="cpu", check_hash=True, weights_only=True)
        return torch.load(weights, map_location="cpu", weights_only=True)
    try:
        with mock.patch.object(source, "load_state_dict_from_url", read):
            model = source.InceptionV3([source.InceptionV3.BLOCK_INDEX_BY_DIM[dims]]).eval()
    except OSError:                                                      # URLError is one
        raise SystemExit(f"cannot read {path}{' or download it' if weights is None else ''} - {cure}") from None
    except Exception as error:                                           # torch raises many kinds
        raise SystemExit(f"{path} is damaged or not Inception's weights ({type(error).__name__}) - {cure}") from None
    model.dims = dims
    return model.to(device)


@torch.no_grad()
def features(images, model, batch_size=50):
    """What the network says of images, uint8 (n, C, H, W), C = 1 (grey) or 3 -> (n, dims), on the model's device."""
    assert images.dtype == torch.uint8 and images.ndim == 4 and images.shape[1] in (1, 3), images.shape
    device, result = next(model.parameters()).device, []
    for batch in progress.watch(images.split(batch_size), "Inception", "images", len):
        batch = batch.expand(-1, 3, -1, -1).to(device).float() / 255     # in [0, 1]; the network resizes to 299 x 299
        result.append(model(batch)[0].mean((2, 3)))                      # (B, dims, h, w) -> (B, dims)
    return torch.cat(result)


def moments(features):
    """Mean (D,) and covariance (D, D) of features (n, D), in float64 on the CPU."""
    features = features.cpu().double()
    return features.mean(0), covariance(features)


def enough_images(n, dims=2048):
    """SystemExit if n images are too few for the FID of so many features."""
    if n < dims:
        raise SystemExit(f"{n:,} are too few: with fewer than {dims:,} images the covariance of {dims:,} features is "
                         f"singular and FID is mostly bias - take at least {dims:,}, better 10,000")


def statistics(images, model, batch_size=50):
    """Mean, covariance and number of images, uint8 (n, C, H, W), as the network sees them; what `fid` compares."""
    enough_images(len(images), model.dims)
    return *moments(features(images, model, batch_size)), len(images)


def load_statistics(path, dims=2048):
    """Read the statistics in an .npz file of ours or of pytorch-fid, which does not say n: None then."""
    try:
        with np.load(path) as arrays:
            mean, cov = (torch.from_numpy(arrays[name]).double() for name in ("mu", "sigma"))
            n = int(arrays["n"]) if "n" in arrays else None
        if mean.shape != (dims,) or cov.shape != (dims, dims) or not (mean.sum() + cov.sum()).isfinite():
            raise ValueError
    except Exception:                                                    # numpy raises many kinds
        raise SystemExit(f"cannot read {path}: missing, damaged or not mu and sigma of {dims:,} features - "
                         "give another, or delete it to have it made again") from None
    return mean, cov, n


def reference_statistics(path, make_images, model, batch_size=50):
    """The statistics in the .npz file `path`; if there is none, those of make_images(), uint8 (n, C, H, W), kept there.

    pytorch-fid reads the file too. The file does not know its images or weights: one file for each set.
    """
    if not Path(path).exists():
        mean, cov, n = statistics(make_images(), model, batch_size)
        buffer = io.BytesIO()
        np.savez(buffer, mu=mean.numpy(), sigma=cov.numpy(), n=n)
        run.write(path, buffer.getbuffer())
    return load_statistics(path, model.dims)


def fid(x, y):
    """FID of two sets given by their statistics, (mean, cov, n) each, Eq. (4.6)."""
    return frechet_distance(*x[:2], *y[:2]).item()


def main(argv=None):
    parser = settings.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                             usage="python metrics.py [A B] [options], see --help")
    parser.add_argument("paths", nargs="*", metavar="A B",
                        help="two sets of images: folders, or .npz of their statistics")
    parser.add_argument("--inception-weights", metavar="PATH",
                        help="local file of the network's weights (downloaded once)")
    parser.add_argument("--dims", type=int, choices=[64, 192, 768, 2048], default=2048,
                        help="features; of FID 2048 (2048)")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda", "mps"], default="auto", help="(auto: cuda or cpu)")
    args = parser.parse_args(argv)
    if not args.paths:
        from datasets2d import DATASETS
        for name, dataset in DATASETS.items():
            distances = floor(dataset, 10_000, 50_000)
            print(f"{name:11s} " + "  ".join(f"{key} {mean:.4f} +- {std:.4f}"
                                             for key, (mean, std) in distances.items()))
        return
    if len(args.paths) != 2:
        parser.error("give two folders or .npz files for their FID, or none for the floors")
    from images import read_folder
    with run.enough_memory("fewer images"):
        data = [load_statistics(path, args.dims) if path.endswith(".npz") else read_folder(path) for path in args.paths]
        folders = [part for part in data if torch.is_tensor(part)]
        for part in folders:
            enough_images(len(part), args.dims)
        model = inception(args.inception_weights, run.device(args.device), args.dims) if folders else None
        x, y = (statistics(part, model) if torch.is_tensor(part) else part for part in data)
    a, b = (f"{path} (n = {n or 'not recorded'})" for path, (_, _, n) in zip(args.paths, (x, y)))
    print(f"FID {fid(x, y):.4f} of {a} and {b}, {args.dims} features")


if __name__ == "__main__":
    run.script(main, "type the same command to measure again")
