"""Labels of images through all scripts: what they are, what the network sees, train, resume, samples, mistakes."""
import itertools
import json
import re
import struct

import numpy as np
import pytest
import torch
from PIL import Image
from test_train_images import SMALL, history, killed
from torch.testing import assert_close

import draw_images
import guidance
import images
import kind_images
import likelihood
import run
import sample
import train
import train_images
import unet

NULL = guidance.NULL


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """44 grey images of 8 x 8 in two classes, the second bright: 40 to train on, 4 to test on."""
    root, g = tmp_path_factory.mktemp("data") / "squares", np.random.default_rng(0)
    for i in range(44):
        path = root / ("test" if i % 11 == 0 else "train") / f"class{i % 2}" / f"{i:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(g.integers(120 * (i % 2), 120 * (i % 2) + 100, (8, 8)).astype(np.uint8)).save(path)
    return root


def command(folder, out, *more):
    return ["--data", str(folder), "--target", "v", "--out", str(out), *SMALL, "--labels", *more]


@pytest.fixture(scope="module")
def trained(folder, tmp_path_factory):
    """A run of 10 steps, tested at every second."""
    out = tmp_path_factory.mktemp("runs")
    train.main(command(folder, out, "--epochs", "2", "--test-every", "2", "--grid-every", "20"))
    return out / "squares-v-mse-s0"


# What they are

@pytest.mark.parametrize("name, where", [("fashion_mnist", "FashionMNIST/raw"), ("mnist", "MNIST/raw")])
def test_labels_of_grey_sets_are_those_of_their_files(name, where, tmp_path):
    (tmp_path / where).mkdir(parents=True)
    truth = {"train": [3, 9, 0], "test": [7, 1]}
    for split, file in ("train", "train"), ("test", "t10k"):
        n = len(truth[split])
        (tmp_path / where / f"{file}-images-idx3-ubyte").write_bytes(
            struct.pack(">4B3I", 0, 0, 8, 3, n, 28, 28) + bytes(784 * n))
        (tmp_path / where / f"{file}-labels-idx1-ubyte").write_bytes(
            struct.pack(">4BI", 0, 0, 8, 1, n) + bytes(truth[split]))
    for split in truth:
        label, classes = images.labels(name, split, tmp_path)
        assert label.tolist() == truth[split] and label.dtype == torch.int64 and classes == 10


def test_labels_of_a_folder_are_its_subfolders_with_and_without_splits(folder, tmp_path):
    for split in "train", "test":
        x, (label, classes) = images.load(str(folder), split), images.labels(str(folder), split)
        assert torch.equal(label, (x.float().mean((1, 2, 3)) > 100).long()) and classes == 2 == len(label.unique())
    for i, name in itertools.product(range(40), "bca"):
        path = tmp_path / "set" / name / "deeper" / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((2, 2), 80 * "abc".index(name) + i, np.uint8)).save(path)
    data = f"{tmp_path}/set/"
    for split, by_name in itertools.product(("train", "test"), (True, False)):
        x, (label, classes) = images.load(data, split, by_name=by_name), images.labels(data, split, by_name=by_name)
        assert torch.equal(label, x[:, 0, 0, 0].long() // 80) and classes == 3
    (tmp_path / "set" / "a" / "deeper" / "0.png").write_bytes(b"damaged")
    x = images.load(data, "train", skip_corrupt=True)
    assert torch.equal(images.labels(data, "train", skip_corrupt=True)[0], x[:, 0, 0, 0].long() // 80)


def test_classes_that_the_test_split_lacks_count(tmp_path):
    for split, name in ("train", "a"), ("train", "b"), ("test", "b"), ("valid", "0"):
        path = tmp_path / split / name / "1.png"
        path.parent.mkdir(parents=True)
        Image.fromarray(np.zeros((2, 2), np.uint8)).save(path)
    label, classes = images.labels(str(tmp_path), "test")
    assert label.tolist() == [1] and classes == 2


@pytest.mark.parametrize("paths", [["1.png", "2.png"], ["a/1.png", "2.png"], ["a/1.png", "a/2.png"],
                                   ["train/1.png", "test/2.png"], ["train/a/1.png", "test/a/2.png"]])
def test_a_folder_without_classes_has_no_labels(paths, tmp_path):
    for path in paths:
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.zeros((8, 8), np.uint8)).save(tmp_path / path)
    with pytest.raises(SystemExit, match="has no labels: each class needs a subfolder of its own"):
        train.main(command(tmp_path, tmp_path / "runs", "--batch-size", "1"))
    assert not (tmp_path / "runs").exists()


# The network

def test_the_network_adds_a_vector_of_the_label_to_that_of_the_time():
    """All other weights are those of a network without labels, which with NULL it is."""
    how = dict(image_channels=1, size=8, channels=8, channel_mult=[1, 2], layers=1, attention=[4])
    torch.manual_seed(0)
    plain = unet.UNet(**how)
    torch.manual_seed(0)
    model = unet.UNet(**how, classes=3)
    for name, weight in plain.state_dict().items():
        assert torch.equal(weight, model.state_dict()[name])
    for network in plain, model:                           # residuals start at zero
        torch.manual_seed(1)
        for weight in [*network.parameters()][:len([*plain.parameters()])]:
            torch.nn.init.normal_(weight, std=0.2)
    z, t, label = torch.randn(4, 1, 8, 8), torch.rand(4), torch.tensor([2, NULL, 0, 1])
    y, time = model(z, t, label), plain.time.forward
    assert_close(model(z, t), plain(z, t))
    assert_close(model(z, t, torch.full((4,), NULL)), plain(z, t))
    vectors = torch.zeros(4, 32)
    for row, column in (0, 2), (2, 0), (3, 1):
        vectors[row] = model.label.weight[:, column].detach()
    plain.time.forward = lambda t: time(t) + vectors
    assert_close(y, plain(z, t))
    change = (y - model(z, t)).abs().amax((1, 2, 3))
    assert change[1] == 0 and change[[0, 2, 3]].min() > 1e-3


# Training

def test_the_labels_of_a_batch_are_those_of_its_images():
    data, truth = torch.arange(200, dtype=torch.uint8)[:, None, None, None].expand(200, 1, 2, 2), torch.arange(200) % 7
    config = dict(batch_size=50, seed=3, flip=True, t_min=0.05, schedule="cosine", t_density="uniform")
    dropped = []
    for step in range(40):
        *columns, label = train_images.batch(data, step, config, labels=truth)
        assert all(torch.equal(a, b) for a, b in zip(columns, train_images.batch(data, step, config), strict=True))
        seen = label != NULL
        assert torch.equal(label[seen], images.to_uint8(columns[0])[seen, 0, 0, 0].long() % 7)
        dropped.append(~seen)
    assert abs(torch.cat(dropped).double().mean() - 0.1) < 4.5 * (0.09 / 2000)**0.5
    assert not torch.equal(dropped[0], dropped[1])
    again = train_images.batch(data, 0, config, labels=truth)[-1]
    assert torch.equal(again == NULL, dropped[0])
    other = train_images.batch(data, 0, config | dict(seed=4), labels=truth)[-1]
    assert not torch.equal(other == NULL, dropped[0])


def test_the_loop_with_labels_is_the_loop_typed_again(trained, folder):
    state, data = run.load(trained), images.load(str(folder), "train")
    config, truth = state["config"], (data.float().mean((1, 2, 3)) > 100).long()
    assert config["labels"] is True and config["classes"] == 2
    torch.manual_seed(0)
    model = unet.UNet(1, 8, channels=8, channel_mult=[1, 2], layers=1, attention=[4], classes=2)
    optimizer, train_losses = torch.optim.AdamW(model.parameters()), []
    for step in range(10):
        x, t, eps, _, label = train_images.batch(data, step, config, labels=truth)
        alpha, sigma = (c[:, None, None, None] for c in (torch.cos(torch.pi / 2 * t), torch.sin(torch.pi / 2 * t)))
        loss = ((model(alpha * x + sigma * eps, t, label) - (alpha * eps - sigma * x))**2).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.param_groups[0]["lr"] = 0.01 * min(1, (step + 1) / 4)
        optimizer.step()
        train_losses.append(loss.item())
    assert_close(list(state["model"].values()), [p.detach() for p in model.parameters()], rtol=1e-3, atol=3e-4)
    means = torch.tensor(train_losses).unflatten(0, (5, 2)).mean(1)
    assert_close(torch.tensor([entry["train_loss"] for entry in history(trained)]), means, rtol=1e-3, atol=3e-4)
    averaged = kind_images.build_model(config)
    averaged.load_state_dict(state["ema"])
    test = images.load(str(folder), "test")
    label = (test.float().mean((1, 2, 3)) > 100).long()
    tests = kind_images.test(averaged, test, config, torch.device("cpu"), label)
    assert tests == pytest.approx({key: history(trained)[-1][key] for key in tests}, rel=1e-5)


def test_a_test_gives_each_image_its_label():
    config = dict(data="cifar10", target="v", loss="mse", seed=0, schedule="cosine", t_min=1e-3, stabiliser=0.0)
    data, seen = torch.arange(250, dtype=torch.uint8).repeat(2)[:, None, None, None].expand(-1, 1, 2, 2), []
    model = lambda z, t, label: seen.append((z, t, label)) or 0 * z
    kind_images.test(model, data, config, torch.device("cpu"), torch.arange(250).repeat(2))
    z, t, label = (torch.cat(column) for column in zip(*seen))
    early = t < 0.02                                       # z is nearly x
    assert early.sum() > 5 and ((images.to_uint8(z)[early].float().mean((1, 2, 3)) - label[early]).abs() < 9).all()


def test_a_killed_run_with_labels_goes_on_exactly(trained, folder, tmp_path, monkeypatch):
    argv = command(folder, tmp_path, "--epochs", "2", "--test-every", "2", "--grid-every", "20")
    monkeypatch.setattr(train_images, "SAVE_EVERY", 0)
    killed(monkeypatch, argv, 8)
    train.main([*argv, "--resume"])
    whole, resumed = run.load(trained), run.load(tmp_path / "squares-v-mse-s0")
    for part in "model", "ema":
        assert all(torch.equal(a, b) for a, b in zip(whole[part].values(), resumed[part].values()))
    with pytest.raises(SystemExit, match="other settings .*--labels True"):
        train.main([word for word in argv if word != "--labels"] + ["--resume"])


def test_a_learned_schedule_knows_labels(folder, tmp_path):
    train.main(command(folder, tmp_path, "--schedule", "learned", "--train-steps", "2"))
    model = run.open(tmp_path / "squares-v-mse-s0").model()
    z, t, label = torch.randn(2, 1, 8, 8), torch.tensor([0.3, 0.6]), torch.tensor([1, 0])
    expected = model.network(z, 2 / torch.pi * torch.atan(torch.exp(-0.5 * model.schedule.logsnr(t))), label)
    assert_close(model(z, t, label), expected)


# Samples

def test_images_of_labels_are_guided_and_a_row_each(trained, tmp_path, capsys):
    words = ["--ckpt", str(trained), "--steps", "4", "--num-samples", "6", "--batch-size", "4", "--sampler", "dpmpp",
             "--grid", "logsnr", "--device", "cpu", "--out", str(tmp_path), "--guidance", "1.5"]
    sample.main([*words, "--label", "1", "0", "--guidance-interval", "0.1", "0.6"])
    one, model = run.open(trained), run.open(trained).model()
    rows = []
    for label in 1, 0:
        def guided(z, t):
            of, none = (model(z, t, torch.full((len(z),), each)) for each in (label, NULL))        # noqa: B023
            return torch.where(((0.1 < t) & (t <= 0.6))[:, None, None, None], 2.5 * of - 1.5 * none, of)
        place = tmp_path / f"label-{label}"
        x = torch.cat([draw_images.draw(guided, (4, 1, 8, 8), 4, one.config, run.generator("cpu", 0, "sample", i),
                                        sampler="dpmpp", grid="logsnr") for i in (0, 4)])
        found = images.read_folder(place / "samples")
        assert (found.int() - x[:6].int()).abs().max() <= 1
        rows.append(found)
        facts = dict(label=label, guidance=1.5, guidance_interval=[0.1, 0.6])
        for name in "metrics.json", "samples/settings.json":
            said = json.loads((place / name).read_text())
            assert {key: said[key] for key in facts} == facts
    grid = np.array(Image.open(tmp_path / "samples.png"))
    assert (grid == images.grid(torch.cat(rows), 6)[0].numpy()).all() and grid.shape == (22, 62)
    out = capsys.readouterr().out
    assert "label 1, w = 1.5 for t in (0.1, 0.6]" in out and "labels 1, 0, a row each" in out
    with pytest.raises(SystemExit, match="6 images of other settings"):
        sample.main([*words, "--label", "1", "0"])         # guided everywhere


def test_without_a_label_images_are_those_of_all(trained, folder, tmp_path):
    words = ["--ckpt", str(trained), "--steps", "3", "--num-samples", "4", "--device", "cpu", "--out", str(tmp_path)]
    sample.main(words)
    said = json.loads((tmp_path / "samples/settings.json").read_text())
    assert not set(guidance.SAMPLING) & set(said)
    one, model = run.open(trained), run.open(trained).model()
    null = lambda z, t: model(z, t, torch.full((len(z),), NULL))
    x = draw_images.draw(null, (64, 1, 8, 8), 3, one.config, run.generator("cpu", 0, "sample", 0))
    assert (images.read_folder(tmp_path / "samples").int() - x[:4].int()).abs().max() <= 1
    likelihood.main(["--ckpt", str(trained), "--num", "4", "--draws", "2", "--num-ode", "0", "--device", "cpu"])
    test = kind_images.test_examples(one.config, 4, "cpu")
    terms = likelihood.bound(null, test, target="v", schedule=one.schedule, decoder=kind_images.discretised, draws=2,
                             generator=run.generator("cpu", 0, "likelihood"))
    bound = sum(terms[key] for key in ("prior", "reconstruction", "diffusion")).mean().item()
    said, = (json.loads(path.read_text()) for path in trained.glob("likelihood*.json"))
    assert said["bound"][0] == pytest.approx(bound, rel=1e-4)


@pytest.mark.parametrize("words, sentence", [
    (["--label", "2"], "squares-v-mse-s0: no label 2: choose from 0 to 1"), (["--label", "0", "9"], "no label 9"),
])
def test_a_label_that_does_not_exist(words, sentence, trained, tmp_path):
    with pytest.raises(SystemExit, match=sentence):
        sample.main(["--ckpt", str(trained), *words, "--out", str(tmp_path)])
    assert not list(tmp_path.iterdir())


def test_guidance_of_images_without_labels(folder, tmp_path):
    train.main([word for word in command(folder, tmp_path, "--train-steps", "1") if word != "--labels"])
    config = run.load(tmp_path / "squares-v-mse-s0")["config"]
    assert config["labels"] is False and "classes" not in config
    with pytest.raises(SystemExit, match="trained without labels - leave out --label, or train with --labels"):
        sample.main(["--ckpt", str(tmp_path / "squares-v-mse-s0"), "--label", "1", "--guidance", "1"])


@pytest.mark.parametrize("words, sentence", [
    (["--guidance-interval", "0.2", "0.8"], "--guidance-interval is where guidance acts: say how much, --guidance 1"),
    (["--label", "1", "--guidance", "1", "--guidance-interval", "0.8", "0.2"], "LOW must be below HIGH"),
    (["--label", "1", "--guidance", "1", "--guidance-interval", "0.8", "2"], r"must be in \[0, 1\]"),
])
def test_arguments_of_an_interval(words, sentence, capsys):
    with pytest.raises(SystemExit) as error:
        sample.parse(words)
    assert error.value.code == 2
    assert re.search(sentence, capsys.readouterr().err)
