"""FID against pytorch-fid on the same images and weights, its distance against closed forms, and ways to get no FID."""
import os
import pickle
import subprocess
import sys
import types
import urllib.error
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import scipy.linalg
import torch
import torchvision
from PIL import Image
from pytorch_fid import fid_score
from pytorch_fid import inception as source
from torch.testing import assert_close

import metrics

pytestmark = pytest.mark.filterwarnings("ignore:The `disp`:DeprecationWarning", "ignore:Matrix is singular")
ROOT = Path(__file__).parent.parent
NAME = "pt_inception-2015-12-05-6726825d.pth"
URL = f"https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/{NAME}"


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def rotation(size, seed):
    return torch.linalg.qr(normal(size, size, seed=seed))[0]


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """A torch.hub cache with random weights of pytorch-fid's network; activations grow, so FID is well above 1."""
    root, inception3 = tmp_path_factory.mktemp("torch"), torchvision.models.Inception3
    with mock.patch.object(source, "load_state_dict_from_url"), mock.patch.object(inception3, "load_state_dict"):
        network = source.fid_inception_v3()
    g = torch.Generator().manual_seed(0)
    for module in network.modules():
        if isinstance(module, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(module.weight, generator=g)
        if isinstance(module, torch.nn.BatchNorm2d):                     # so that train() and eval() differ
            module.running_mean.normal_(0, 0.3, generator=g)
            module.running_var.uniform_(0.2, 0.6, generator=g)
    (root / "hub/checkpoints").mkdir(parents=True)
    torch.save(network.state_dict(), root / "hub/checkpoints" / NAME)
    with mock.patch.dict(os.environ, TORCH_HOME=str(root)):
        yield root / "hub/checkpoints" / NAME


@pytest.fixture(scope="module")
def model(hub):
    return metrics.inception(dims=64)


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    """Two folders of PNGs, 66 grey and 70 in colour, and their images as `images.read_folder` gives them."""
    g, result = torch.Generator().manual_seed(1), {}
    for name, shape in ("grey", (66, 1, 28, 28)), ("colour", (70, 3, 32, 24)):
        folder = tmp_path_factory.mktemp(name)
        level = torch.rand(shape[:2], generator=g)[..., None, None] * 128       # each image has its brightness
        result[folder] = (level + 128 * torch.rand(shape, generator=g)).to(torch.uint8)
        for i, image in enumerate(result[folder]):
            Image.fromarray(image.permute(1, 2, 0).squeeze(2).numpy()).save(folder / f"{i:03d}.png")
    return result


@pytest.fixture(scope="module")
def reference(hub, sets):
    """What pytorch-fid gives for the two folders."""
    return fid_score.calculate_fid_given_paths([str(path) for path in sets], 4, "cpu", 64, num_workers=0)


@pytest.fixture
def read_folder(sets, monkeypatch):
    stand_in = types.ModuleType("images")
    stand_in.read_folder = lambda path: sets[Path(path)]
    monkeypatch.setitem(sys.modules, "images", stand_in)


def test_frechet_distance_of_commuting_gaussians():
    """Sx = q diag(s^2) q^T, Sy = q diag(r^2) q^T: the distance is |mu_x - mu_y|^2 + sum (s - r)^2."""
    q, s, r = rotation(6, 1), torch.arange(1.0, 7.0, dtype=torch.float64), torch.tensor([3.0, 0, 2, 5, 1, 4]).double()
    mu_x, mu_y = normal(6, seed=2), normal(6, seed=3)
    distance = metrics.frechet_distance(mu_x, q * s**2 @ q.T, mu_y, q * r**2 @ q.T)
    assert distance.dtype == torch.float64 and distance.shape == ()
    assert_close(distance, (mu_x - mu_y).square().sum() + (s - r).square().sum())


def test_frechet_distance_of_gaussians_that_do_not_commute():
    """The map x -> m x with m symmetric and positive is optimal from N(0, S) to N(0, m S m):
    Tr (Sx Sy)^(1/2) = Tr (S m)."""
    a, b = normal(6, 6, seed=4), normal(6, 6, seed=5)
    cov, m, zero = a @ a.T, b @ b.T + torch.eye(6).double(), torch.zeros(6).double()
    other = m @ cov @ m
    assert (cov @ other - other @ cov).norm() > 1
    distance = metrics.frechet_distance(zero, cov, zero, other)
    change = m - torch.eye(6).double()                                   # the mean of |m x - x|^2 over x ~ N(0, S)
    assert_close(distance, (change @ cov @ change).trace())
    by_hand = np.trace(cov + other) - 2 * np.trace(scipy.linalg.sqrtm((cov @ other).numpy()).real)
    assert_close(distance.item(), float(by_hand))
    assert_close(metrics.frechet_distance(zero, other, zero, cov), distance)
    x, y = (normal(4, seed=6), torch.cov(normal(4, 9, seed=7))), (normal(4, seed=8), torch.cov(normal(4, 9, seed=9)))
    reference = fid_score.calculate_frechet_distance(*(moment.numpy() for moment in (*x, *y)))
    assert_close(metrics.frechet_distance(*x, *y).item(), float(reference))


def test_frechet_distance_of_covariances_of_low_rank():
    """Fewer points than dimensions: Tr (Sx Sy)^(1/2) is the nuclear norm of the points' products, no covariance
    formed."""
    x, y = normal(40, 300, seed=1), 2 * normal(1000, 300, seed=2) @ rotation(300, 3)
    a, b = x - x.mean(0), y - y.mean(0)
    trace_root = torch.linalg.matrix_norm(a @ b.T, "nuc") / (39 * 999)**0.5
    reference = (x.mean(0) - y.mean(0)).square().sum() + a.square().sum() / 39 + b.square().sum() / 999 - 2 * trace_root
    assert_close(metrics.frechet_distance(*metrics.moments(x), *metrics.moments(y)), reference, rtol=1e-11, atol=0)
    for points in x, y, torch.ones(5, 3):                                # the last: all alike, covariance 0
        mu, cov = metrics.moments(points)
        assert abs(metrics.frechet_distance(mu, cov, mu, cov)) < 1e-12 * (1 + cov.trace())


def test_moments_are_numpys():
    mean, cov = metrics.moments(1000 + normal(9, 3).float())
    x = (1000 + normal(9, 3).float()).double().numpy()                   # float64 before the means are taken off
    assert_close(mean, torch.from_numpy(x.mean(0)), rtol=1e-14, atol=0)
    assert_close(cov, torch.from_numpy(np.cov(x, rowvar=False)), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dims", [64, 768])
def test_features_are_pytorch_fids(hub, sets, dims):
    network = metrics.inception(str(hub), dims=dims)
    for folder, images in sets.items():
        files = sorted(folder.glob("*.png"))[:3]                        # batches of 2 and 1
        reference = fid_score.get_activations(files, source.InceptionV3([source.InceptionV3.BLOCK_INDEX_BY_DIM[dims]]),
                                              batch_size=3, dims=dims, num_workers=0)
        result = metrics.features(images[:3], network, batch_size=2)
        assert result.shape == (3, dims) and not result.requires_grad
        assert_close(result, torch.from_numpy(reference).float(), rtol=1e-4, atol=1e-4)


def test_fid_of_two_folders_is_pytorch_fids(hub, sets, reference, read_folder, tmp_path, capsys):
    (a, b), weights = map(str, sets), tmp_path / "w.pth"
    weights.write_bytes(hub.read_bytes())
    with mock.patch.object(torch.hub, "load_state_dict_from_url", side_effect=AssertionError):
        metrics.main([a, b, "--dims", "64", "--device", "cpu", "--inception-weights", str(weights)])
    out = capsys.readouterr().out
    value = float(out.split()[1])
    assert reference > 10 and abs(value - reference) < 1e-3 and abs(value / reference - 1) < 1e-3
    assert f"{a} (n = 66)" in out and f"{b} (n = 70)" in out and "64 features" in out


def test_reference_statistics_are_made_once_for_us_and_pytorch_fid(model, sets, reference, tmp_path, capsys,
                                                                   monkeypatch):
    grey, colour = sets.values()
    path, calls = tmp_path / "new/grey.npz", []
    x, again = (metrics.reference_statistics(path, lambda: calls.append(1) or grey, model, 4) for _ in range(2))
    assert calls == [1] and x[2] == again[2] == 66 and [file.name for file in path.parent.iterdir()] == ["grey.npz"]
    for ours, theirs in zip(x, again):
        assert_close(ours, theirs, rtol=0, atol=0)
    y = metrics.statistics(colour, model, 4)
    assert abs(metrics.fid(x, y) - reference) < 1e-3 and abs(metrics.fid(x, y) / reference - 1) < 1e-3
    np.savez(tmp_path / "colour.npz", mu=y[0], sigma=y[1])               # as pytorch-fid does, without n
    files = [str(path), str(tmp_path / "colour.npz")]
    assert abs(fid_score.calculate_fid_given_paths(files, 4, "cpu", 64) - reference) < 1e-3
    monkeypatch.setattr(metrics, "inception", None)                      # two files of statistics need no network
    metrics.main([*files, "--dims", "64"])
    out = capsys.readouterr().out
    assert abs(float(out.split()[1]) - reference) < 1e-3
    assert f"{path} (n = 66)" in out and "colour.npz (n = not recorded)" in out


def test_bad_statistics_end_in_one_sentence(model, tmp_path):
    path, mean, cov = tmp_path / "x.npz", np.zeros(64), np.eye(64)
    bad = [(mean, cov[:2]), (mean[:2], cov[:2, :2]), (mean[:2], cov), (mean, cov + np.nan), (mean + np.inf, cov),
           (np.array(None), cov)]
    for arrays in {"mu": mean}, *({"mu": mu, "sigma": sigma} for mu, sigma in bad):
        np.savez(path, **arrays)
        with pytest.raises(SystemExit, match="x.npz: missing, damaged or not mu and sigma of 64 features - .*delete"):
            metrics.reference_statistics(path, None, model)
    np.savez(path, mu=mean, sigma=cov)
    assert metrics.load_statistics(path, 64)[2] is None
    for content in b"", path.read_bytes()[:-100], b"not a zip file":
        path.write_bytes(content)
        with pytest.raises(SystemExit, match="x.npz"):
            metrics.reference_statistics(path, None, model)
    with pytest.raises(SystemExit, match="y.npz: missing"):
        metrics.main([str(tmp_path / "y.npz"), str(path)])


def test_too_few_images_are_refused(model, tmp_path):
    metrics.enough_images(2048)
    with pytest.raises(SystemExit, match="2,047 are too few: .* 2,048 features is singular and FID is mostly bias - "
                                         "take"):
        metrics.enough_images(2047)
    images = torch.zeros(63, 1, 4, 4, dtype=torch.uint8)
    with pytest.raises(SystemExit, match="63 are too few"):              # of the model's 64 features
        metrics.statistics(images, model)
    with pytest.raises(SystemExit, match="63 are too few"):
        metrics.reference_statistics(tmp_path / "x.npz", lambda: images, model)
    assert not any(tmp_path.iterdir())


def test_no_network_and_no_file_end_in_one_sentence(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    place = tmp_path / "hub/checkpoints"

    def no_network(url, *args, **kwargs):
        raise urllib.error.URLError("no route to host")
    monkeypatch.setattr(torch.hub, "urlopen", no_network)
    with pytest.raises(SystemExit) as no_download:
        metrics.inception()
    with pytest.raises(SystemExit) as no_file:
        metrics.inception(tmp_path / "mine.pth")
    cure = f"put {URL} into {place}/, or name your copy with --inception-weights PATH"
    assert str(no_download.value) == f"cannot read {place / NAME} or download it - {cure}"
    assert str(no_file.value) == f"cannot read {tmp_path / 'mine.pth'} - {cure}"


def test_damaged_weights_end_in_one_sentence_and_run_nothing(hub, tmp_path, monkeypatch):
    class Evil:
        def __reduce__(self):
            return (tmp_path / "ran").touch, ()
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    cached = tmp_path / "hub/checkpoints" / NAME
    cached.parent.mkdir(parents=True)
    good = torch.load(hub, weights_only=True)
    torch.save({key: value for key, value in good.items() if "Mixed_5b" not in key}, tmp_path / "part.pth")
    torch.save([1.0], tmp_path / "list.pth")
    for content in (b"", hub.read_bytes()[:-1000], b"<html>", pickle.dumps(Evil(), 2), *(
            (tmp_path / name).read_bytes() for name in ("part.pth", "list.pth"))):
        for path in cached, tmp_path / "mine.pth":
            path.write_bytes(content)
            with pytest.raises(SystemExit, match=f"{path} is damaged or not Inception's weights .* - put {URL} into"):
                metrics.inception(None if path == cached else str(path))
    assert not (tmp_path / "ran").exists()
    cached.unlink()                                                      # a download cut short: its hash is wrong
    (tmp_path / "part.pth").rename(tmp_path / NAME)
    monkeypatch.setattr(source, "FID_WEIGHTS_URL", (tmp_path / NAME).as_uri())
    with pytest.raises(SystemExit, match="is damaged"):
        metrics.inception()
    assert not cached.exists()


def test_command_line(capsys, sets, hub, read_folder, monkeypatch):
    for arguments in ["one"], ["a", "b", "c"], ["a.npz", "b.npz", "--dims", "65"]:
        with pytest.raises(SystemExit) as stop:
            metrics.main(arguments)
        assert stop.value.code == 2
    with pytest.raises(SystemExit, match="66 are too few"):              # 2,048 is what the command wants
        metrics.main([*map(str, sets), "--device", "cpu"])
    with monkeypatch.context() as patch:                                # said before Inception is loaded, or downloaded
        patch.setattr(metrics, "inception", None)
        with pytest.raises(SystemExit, match="nowhere.npz: missing"):
            metrics.main([str(next(iter(sets))), "nowhere.npz", "--device", "cpu", "--dims", "64"])
        with pytest.raises(SystemExit, match="66 are too few"):
            metrics.main([*map(str, sets), "--device", "cpu"])
    capsys.readouterr()
    metrics.main([])
    assert capsys.readouterr().out.count("mean_distance") == 5


def test_only_fid_loads_pytorch_fid():
    code = "import sys, metrics, sample; assert not {'pytorch_fid', 'torchvision'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_small_variances_beside_large_ones_count():
    """N(0, q diag(s^2) q^T) again: 40 variances of 1 and 4 beside one of 1e8, a feature far louder than the rest."""
    q = rotation(41, 11)
    s, r = (torch.cat([torch.tensor([1e4]), torch.full((40,), std)]).double() for std in (1.0, 2.0))
    distance = metrics.frechet_distance(torch.zeros(41), q * s**2 @ q.T, torch.zeros(41), q * r**2 @ q.T)
    assert_close(distance.item(), 40.0, rtol=1e-4, atol=0)
