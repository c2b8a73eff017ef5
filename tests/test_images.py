"""Datasets of images: every value, axis and split against what was written by hand, every mistake a user can make."""
import hashlib
import io
import os
import pickle
import runpy
import struct
import sys
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import images
import run

ROOT = Path(__file__).parent.parent
RNG = np.random.default_rng(0)


def image(H, W, C=3):
    """A random image (H, W, C), (H, W) for C = 1: not symmetric in any way."""
    return RNG.integers(0, 256, (H, W, C) if C > 1 else (H, W), dtype=np.uint8)


def put(path, x):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(x).save(path)
    return path


def chw(x):
    """(H, W[, C]) numpy -> (C, H, W) tensor, written as a loop."""
    x = x if x.ndim == 3 else x[:, :, None]
    return torch.stack([torch.from_numpy(x[:, :, c].copy()) for c in range(x.shape[2])])


def keys(x):
    return [p.numpy().tobytes() for p in x]


def no_network(*args, **kwargs):
    raise urllib.error.URLError("Temporary failure in name resolution")


def idx(folder, x, split):
    """The four bytes, the sizes and the values of Yann LeCun's format, images and labels."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{split}-images-idx3-ubyte").write_bytes(struct.pack(">4B3I", 0, 0, 8, 3, *x.shape) + x.tobytes())
    (folder / f"{split}-labels-idx1-ubyte").write_bytes(struct.pack(">4BI", 0, 0, 8, 1, len(x)) + bytes(len(x)))


def cifar(folder, monkeypatch):
    """Six batches of 4 images: rows of 3072 values, 1024 red ones, row by row, then green, then blue."""
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda path, md5: os.path.isfile(path))
    folder.mkdir(parents=True)
    batches = {name: RNG.integers(0, 256, (4, 3072), dtype=np.uint8)
               for name in [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]}
    for name, x in batches.items():
        (folder / name).write_bytes(pickle.dumps({"data": x, "labels": [0] * 4}))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": []}))
    return batches


def test_the_levels_span_minus_1_to_1_and_come_back():
    x = torch.arange(256).to(torch.uint8)
    y = images.to_float(x)
    assert y.dtype == torch.float32 and y[0] == -1 and y[255] == 1
    torch.testing.assert_close(y.double(), torch.linspace(-1, 1, 256, dtype=torch.float64), atol=1e-7, rtol=0)
    assert torch.equal(images.to_uint8(y), x) and images.to_uint8(y).dtype == torch.uint8
    assert torch.equal(images.to_uint8(y.double() + 0.49 * 2 / 255), x) \
        and torch.equal(images.to_uint8(y - 0.49 * 2 / 255), x)
    assert images.to_uint8(torch.tensor([-9.0, -1.01, 1.01, 9.0])).tolist() == [0, 0, 255, 255]


def test_flip_mirrors_about_half_left_to_right():
    x = torch.from_numpy(RNG.integers(0, 256, (4000, 3, 2, 5), dtype=np.uint8))
    y = images.flip(x, run.generator("cpu", 1))
    mirrored = torch.tensor([bool((b != a).any()) for a, b in zip(x, y)])
    for a, b in zip(x[mirrored][:50], y[mirrored][:50]):
        assert all(torch.equal(b[:, :, i], a[:, :, 4 - i]) for i in range(5))
    assert abs(mirrored.float().mean() - 0.5) < 0.04                          # 5 standard deviations
    assert torch.equal(y, images.flip(x, run.generator("cpu", 1))) and y.dtype == torch.uint8
    assert not torch.equal(y, images.flip(x, run.generator("cpu", 2)))


@pytest.mark.parametrize("name, folder", [("fashion_mnist", "FashionMNIST/raw"), ("mnist", "MNIST/raw")])
def test_grey_sets_are_what_their_files_say(tmp_path, name, folder, monkeypatch, capsys):
    monkeypatch.setattr(urllib.request, "urlopen", no_network)
    sets = {"train": RNG.integers(0, 256, (12, 28, 28), dtype=np.uint8),
            "test": RNG.integers(0, 256, (5, 28, 28), dtype=np.uint8)}
    idx(tmp_path / folder, sets["train"], "train")
    idx(tmp_path / folder, sets["test"], "t10k")
    for split, expected in sets.items():
        x = images.load(name, split, tmp_path)
        assert x.shape == (len(expected), 1, 28, 28) and x.dtype == torch.uint8 and x.is_contiguous()
        assert torch.equal(x[:, 0], torch.from_numpy(expected))
    small = images.load(name, "test", tmp_path, image_size=14)
    for a, b in zip(small, sets["test"]):
        expected = np.asarray(Image.fromarray(b).resize((14, 14), Image.Resampling.BICUBIC)).astype(int)
        assert np.abs(a[0].numpy() - expected).max() <= 1
    assert capsys.readouterr() == ("", "")


def test_cifar10_is_what_its_files_say(tmp_path, monkeypatch, capsys):
    batches = cifar(tmp_path / "cifar-10-batches-py", monkeypatch)
    x = images.load("cifar10", "train", str(tmp_path))
    assert x.shape == (20, 3, 32, 32) and x.dtype == torch.uint8 and x.is_contiguous()
    for i, c, h, w in (0, 0, 0, 1), (0, 0, 1, 0), (5, 1, 3, 30), (19, 2, 31, 7):
        assert x[i, c, h, w] == batches[f"data_batch_{i // 4 + 1}"][i % 4, 1024 * c + 32 * h + w]
    test = images.load("cifar10", "test", str(tmp_path))
    assert torch.equal(test.flatten(1), torch.from_numpy(batches["test_batch"]))
    assert images.load("cifar10", "test", str(tmp_path), image_size=48).shape == (4, 3, 48, 48)
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("name, files, address", [
    ("cifar10", "/cifar-10-python.tar.gz", "https://www.cs.toronto.edu/~kriz: cifar-10-python.tar.gz"),
    ("fashion_mnist", "/FashionMNIST/raw/train-images-idx3-ubyte.gz",
     "http://fashion-mnist.s3-website.*: train-images-idx3"),
    ("mnist", "/MNIST/raw/train-images-idx3-ubyte.gz",
     "https://ossci-datasets.*/mnist: .*, t10k-labels-idx1-ubyte.gz")])
@pytest.mark.parametrize("damaged", [False, True])
def test_without_a_network_one_sentence_says_what_goes_where(tmp_path, name, files, address, damaged, monkeypatch,
                                                             capsys):
    monkeypatch.setattr(urllib.request, "urlopen", no_network)
    if damaged:
        Path(f"{tmp_path}{files}").parent.mkdir(parents=True, exist_ok=True)
        Path(f"{tmp_path}{files}").write_bytes(b"half an archive")
    with pytest.raises(SystemExit, match=f"cannot read {name} .*name resolution.* {tmp_path}.*put there, "
                                         f"from {address}.*; or choose another --data-dir") as stop:
        images.load(name, "train", tmp_path)
    assert f"in {Path(f'{tmp_path}{files}').parent} and" in str(stop.value) and "\n" not in str(stop.value)
    assert capsys.readouterr() == ("", "")


def test_a_file_unpacked_by_half_is_one_sentence(tmp_path):
    idx(tmp_path / "MNIST/raw", np.zeros((3, 28, 28), np.uint8), "train")
    idx(tmp_path / "MNIST/raw", np.zeros((3, 28, 28), np.uint8), "t10k")
    path = tmp_path / "MNIST/raw/train-images-idx3-ubyte"
    for length in 1000, 10, 0:
        path.write_bytes(path.read_bytes()[:length])
        with pytest.raises(SystemExit, match=r"cannot read mnist \(..+\) - remove what is damaged in .*MNIST/raw and "
                                             "put there"):
            images.load("mnist", "train", tmp_path)


def test_a_folder_is_read_in_the_order_of_its_paths_with_rows_first_and_red_first(tmp_path):
    truth = {name: image(3, 5) for name in ("b/2.png", "a/9.PNG", "c.bmp", "a/x/y/10.ppm", "b/1.webp")}
    for name, x in truth.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(x).save(tmp_path / name, **({"lossless": True} if name.endswith("webp") else {}))
    (tmp_path / "a/notes.txt").write_text("not an image")
    (tmp_path / "a/._9.png").write_text("what a Mac leaves behind")
    x = images.read_folder(tmp_path)
    assert x.shape == (5, 3, 3, 5) and x.dtype == torch.uint8
    for a, name in zip(x, sorted(truth)):
        assert torch.equal(a, chw(truth[name]))
    put(tmp_path / "red.png", np.full((3, 5, 3), [255, 7, 0], np.uint8))
    assert images.read_folder(str(tmp_path))[-1][:, 0, 0].tolist() == [255, 7, 0]


def test_linked_folders_count(tmp_path):
    put(tmp_path / "elsewhere/1.png", image(4, 4))
    (tmp_path / "set").mkdir()
    (tmp_path / "set/cats").symlink_to(tmp_path / "elsewhere")
    assert len(images.read_folder(tmp_path / "set")) == 1


def test_grey_stays_grey_until_one_image_has_colour(tmp_path):
    grey, bits, deep = image(4, 6, 1), image(4, 6, 1) > 127, RNG.integers(0, 2**16, (4, 6), dtype=np.uint16)
    put(tmp_path / "1.png", grey)
    put(tmp_path / "2.png", bits)
    put(tmp_path / "3.png", deep)
    Image.fromarray(np.stack([grey, bits * np.uint8(255)], 2), "LA").save(tmp_path / "4.png")
    Image.fromarray(deep).save(tmp_path / "5.pgm")
    expected = [grey, bits * np.uint8(255), (deep // 256).astype(np.uint8), grey, (deep // 256).astype(np.uint8)]
    x = images.read_folder(tmp_path)
    assert x.shape == (5, 1, 4, 6)
    assert all(torch.equal(a, chw(b)) for a, b in zip(x, expected))
    colour = image(4, 6)
    put(tmp_path / "6.png", colour)
    x = images.read_folder(tmp_path)
    assert x.shape == (6, 3, 4, 6) and torch.equal(x[5], chw(colour))
    assert all(torch.equal(a, chw(b).expand(3, 4, 6)) for a, b in zip(x, expected))
    for split in "train", "test":                                             # one colour image, one C for both splits
        assert images.load(tmp_path, split).shape[1] == 3


def test_photos_are_turned_upright(tmp_path):
    x = image(3, 5)
    exif = Image.Exif()
    exif[0x0112] = 6                                                          # turn by 90 degrees clockwise
    Image.fromarray(x).save(tmp_path / "1.png", exif=exif)
    assert torch.equal(images.read_folder(tmp_path)[0], chw(np.rot90(x, -1)))


def test_the_square_in_the_middle_is_cut_and_resized(tmp_path):
    wide, tall = image(4, 11), image(9, 4)
    put(tmp_path / "1.png", wide)
    put(tmp_path / "2.png", tall)
    x = images.read_folder(tmp_path, image_size=4)
    assert torch.equal(x[0], chw(wide[:, 3:7])) and torch.equal(x[1], chw(tall[2:6]))
    board = (np.indices((16, 20)).sum(0) % 2 * 255).astype(np.uint8)       # grey from afar: not so without antialiasing
    put(tmp_path / "board/1.png", board)
    x = images.read_folder(tmp_path / "board", image_size=4)
    assert x.shape == (1, 1, 4, 4) and (x.float() - 127.5).abs().max() < 12
    assert images.read_folder(tmp_path, image_size=7).shape == (3, 3, 7, 7)


def below_a_tenth(name):
    """Is sha256 of a name, as a number in [0, 1), below 0.1?"""
    return int(hashlib.sha256(name.encode()).hexdigest(), 16) / 16**64 < 0.1


def test_the_test_split_of_a_folder_is_a_tenth_by_the_hash_of_each_name_and_no_image_changes_sides(tmp_path):
    names = [f"{'abc'[i % 3]}/{i}.png" for i in range(400)]
    truth = {name: image(2, 3) for name in names}
    split = {}
    for n in 150, 400:                                                      # the folder grows
        for name in names[:n]:
            put(tmp_path / "set" / name, truth[name])
        for part in "train", "test":
            split[n, part] = keys(images.load(tmp_path / "set", part))
            expected = [name for name in sorted(names[:n]) if below_a_tenth(name) == (part == "test")]
            assert split[n, part] == keys([chw(truth[name]) for name in expected])
    assert 20 < len(split[400, "test"]) < 60
    assert all(set(split[150, part]) < set(split[400, part]) for part in ("train", "test"))
    (tmp_path / "set").rename(tmp_path / "moved")
    assert keys(images.load(f"{tmp_path}/moved/", "test")) == split[400, "test"]


@pytest.mark.parametrize("names", [["0.png", "6.png", "8.png"], ["1.png", "2.png", "3.png"]])
def test_a_small_folder_has_both_splits(tmp_path, names):
    """By their hashes all of the first would be test images, and none of the second."""
    assert {below_a_tenth(name) for name in names} == {"0.png" in names}
    for name in names:
        put(tmp_path / name, image(2, 3))
    train, test = (keys(images.load(tmp_path, part)) for part in ("train", "test"))
    assert train and test and sorted(train + test) == sorted(keys(images.read_folder(tmp_path)))


def test_older_runs_have_a_fixed_random_tenth_as_their_test_split(tmp_path):
    for i in range(45):
        put(tmp_path / f"{'abc'[i % 3]}/{i}.png", image(2, 3))
    train, test = (images.load(tmp_path, part, by_name=False) for part in ("train", "test"))
    whole, order = images.read_folder(tmp_path), torch.randperm(45, generator=run.generator("cpu", "split"))
    assert (len(train), len(test)) == (41, 4)
    assert sorted(keys(train) + keys(test)) == sorted(keys(whole)) and len(set(keys(whole))) == 45
    assert torch.equal(test, whole[order[:4].sort().values]) and order[:4].tolist() != order[:4].sort().values.tolist()


def test_the_facts_of_a_folder_are_those_of_its_names(tmp_path):
    for i in range(5):
        put(tmp_path / f"set/a/{i}.png", image(2, 3))
    before = images.facts(tmp_path / "set")
    assert before["count"] == 5 and images.facts(f"{tmp_path}/set/") == before
    (tmp_path / "set").rename(tmp_path / "moved")
    assert images.facts(str(tmp_path / "moved")) == before
    (tmp_path / "moved/a/4.png").rename(tmp_path / "moved/4.png")
    renamed = images.facts(tmp_path / "moved")
    assert renamed["count"] == 5 and renamed["digest"] != before["digest"]
    put(tmp_path / "moved/a/4.png", image(2, 3))
    assert images.facts(tmp_path / "moved")["count"] == 6


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_only_files_are_read_and_what_is_left_out_is_counted_once(tmp_path, capsys):
    x = image(2, 3)
    put(tmp_path / "1.png", x)
    os.mkfifo(tmp_path / "pipe.png")                                         # opening it would wait for ever
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "broken.png").symlink_to(tmp_path / "nowhere")
    for name in "a.gif", "b.GIF", "notes.txt", "README", "folder.png/c.gif":
        (tmp_path / name).write_bytes(b"")
    (tmp_path / ".hidden").write_bytes(b"")
    for _ in range(2):
        assert keys(images.read_folder(tmp_path)) == keys([chw(x)])
    assert capsys.readouterr().err == (f"left out of {tmp_path}: 3 .gif, 2 .png, 1 .txt, 1 no ending - images are "
                                       f"files that end in one of {' '.join(images.ENDINGS)}\n")


def test_what_is_too_large_or_too_long_is_one_sentence(tmp_path, monkeypatch):
    put(tmp_path / "1.png", image(2, 3))
    put(tmp_path / "2.png", image(2, 3))
    monkeypatch.setattr(images, "fetch", lambda *args: torch.zeros(1, 1, 2, 2, dtype=torch.uint8))
    for data in tmp_path, "mnist":
        with pytest.raises(SystemExit, match="4097 x 4097 pixels are too large - give an --image-size of at most 4096"):
            images.load(data, "train", image_size=4097)
    with pytest.raises(SystemExit, match="no folder of images at xxx"):
        images.load("x" * 5000, "train")

    def full(*args):
        raise MemoryError
    with monkeypatch.context() as patch:
        patch.setattr(np, "empty", lambda shape, *how: full() if shape else np.zeros(0))
        with pytest.raises(SystemExit, match="not enough memory for 2 images of 3x2x3 - give a smaller"):
            images.read_folder(tmp_path)


def test_subfolders_train_and_test_are_the_splits(tmp_path):
    truth = {name: image(2, 3) for name in ("train/a/1.png", "train/b/2.png", "test/a/3.png")}
    for name, x in truth.items():
        put(tmp_path / name, x)
    assert keys(images.load(tmp_path, "train")) == keys([chw(truth["train/a/1.png"]), chw(truth["train/b/2.png"])])
    assert keys(images.load(tmp_path, "test")) == keys([chw(truth["test/a/3.png"])])
    put(tmp_path / "train/a/1.png", image(4, 4))
    put(tmp_path / "train/b/2.png", image(4, 4))                            # each split has one size, but not the same
    with pytest.raises(SystemExit, match="mixed sizes: .*test/a/3.png is 3 x 2 and .*train/a/1.png is 4 x 4 - "
                                         ".*--image-size"):
        images.load(tmp_path, "train")


def test_mistakes_with_folders_are_one_sentence(tmp_path):
    with pytest.raises(SystemExit, match="no folder of images at .*/photos - give .* one of cifar10, fashion_mnist, "
                                         "mnist"):
        images.load(tmp_path / "photos", "train")
    with pytest.raises(SystemExit, match=f"no images under {tmp_path} - put some there, .* .jpg .jpeg .png"):
        images.read_folder(tmp_path)
    put(tmp_path / "1.png", image(2, 3))
    with pytest.raises(SystemExit, match="a single image, .*/1.png - two are needed"):
        images.load(tmp_path, "train")
    put(tmp_path / "2.png", image(3, 3))
    with pytest.raises(SystemExit, match="mixed sizes: .*/1.png is 3 x 2 and .*/2.png is 3 x 3 - .*--image-size"):
        images.read_folder(tmp_path)
    assert images.read_folder(tmp_path, image_size=2).shape == (2, 3, 2, 2)


@pytest.mark.parametrize("kind", ["text", "empty", "half a jpeg", "half a png", "a png with a wrong bit"])
def test_a_corrupt_image_is_named_or_skipped(tmp_path, kind, capsys):
    good = {name: image(16, 16) for name in ("1.png", "3.png", "4.png")}
    for name, x in good.items():
        put(tmp_path / name, x)
    whole = io.BytesIO()
    Image.fromarray(image(16, 16)).save(whole, "jpeg" if "jpeg" in kind else "png")
    whole = whole.getvalue()
    bad = {"text": b"not an image", "empty": b"",
           "a png with a wrong bit": whole[:60] + bytes([whole[60] ^ 1]) + whole[61:]}
    path = tmp_path / ("2.jpg" if "jpeg" in kind else "2.png")
    path.write_bytes(bad.get(kind, whole[:len(whole) // 2]))
    with pytest.raises(SystemExit, match=f"cannot read the image {path} .* - mend or delete it, "
                                         ".* --skip-corrupt") as stop:
        images.read_folder(tmp_path)
    assert "\n" not in str(stop.value)
    x = images.read_folder(tmp_path, skip_corrupt=True)
    assert keys(x) == keys([chw(p) for p in good.values()])
    assert capsys.readouterr().err == "skipped 1 of 4 images that cannot be read\n"
    put(tmp_path / "train/1.png", image(16, 16))
    (tmp_path / "test").mkdir()
    path.rename(tmp_path / "test" / path.name)                       # a corrupt one leads the set, none else is in test
    assert images.load(tmp_path, "train", skip_corrupt=True).shape == (1, 3, 16, 16)
    with pytest.raises(SystemExit, match="none of the 1 images, .*/test/2.*, can be read"):
        images.load(tmp_path, "test", skip_corrupt=True)
    with pytest.raises(SystemExit, match="none of the 1 images"):
        images.read_folder(tmp_path / "test", skip_corrupt=True)


def test_the_grid_has_images_in_rows_and_white_elsewhere():
    x = torch.from_numpy(RNG.integers(0, 255, (5, 3, 4, 6), dtype=np.uint8))
    y = images.grid(x, 3)
    assert y.shape == (3, 2 * 6 + 2, 3 * 8 + 2) and y.dtype == torch.uint8
    white = torch.ones(y.shape, dtype=torch.bool)
    for i in range(5):
        top, left = 2 + 6 * (i // 3), 2 + 8 * (i % 3)
        assert torch.equal(y[:, top:top + 4, left:left + 6], x[i])
        white[:, top:top + 4, left:left + 6] = False
    assert (y[white] == 255).all()
    assert images.grid(x[:2, :1], 10).shape == (1, 6 + 2, 2 * 8 + 2)          # no empty columns, grey stays grey


@pytest.mark.parametrize("C", [1, 3])
def test_a_png_keeps_every_value(tmp_path, C):
    x = image(4, 6, C)
    images.save_png(chw(x), tmp_path / "new/x.png")
    with Image.open(tmp_path / "new/x.png") as read:
        assert (read.format, read.mode) == ("PNG", {1: "L", 3: "RGB"}[C]) and np.array_equal(np.asarray(read), x)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="Linux has a device that is always full")
def test_a_full_disk_keeps_the_old_png(tmp_path):
    (tmp_path / "x.png").write_bytes(b"old")
    (tmp_path / "x.png.tmp").symlink_to("/dev/full")
    with pytest.raises(SystemExit, match="cannot write .*x.png: No space left"):
        images.save_png(chw(image(4, 6)), tmp_path / "x.png")
    assert (tmp_path / "x.png").read_bytes() == b"old"


def test_the_script_shows_a_set(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    level = {"train/1.png": [51, 51, 255], "train/2.png": [255, 51, 255], "test/1.png": [255, 0, 0]}
    for name, colour in level.items():
        put(tmp_path / "set" / name, np.full((2, 3, 3), colour, np.uint8))
    images.main(["set"])
    out = capsys.readouterr().out
    assert "set, test: N = 1, C = 3, H = 2, W = 3; in [-1, 1] each channel has mean 1.0000 -1.0000 -1.0000, " \
           "standard" in out
    assert "set, train: N = 2" in out and "mean 0.2000 -0.6000 1.0000, standard deviation 0.8356 0.0000 0.0000" in out
    with Image.open("images.png") as shown:
        assert shown.size == (2 * 5 + 2, 4 + 2)
    monkeypatch.setattr(sys, "argv", ["images.py", "none"])
    with pytest.raises(SystemExit, match="^no folder of images at none[^\n]*$"):
        runpy.run_path(images.__file__, run_name="__main__")
