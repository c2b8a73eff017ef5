"""A small classifier: what it learns, what is measured with it, its file; then samples of a run, and mistakes."""
import json

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F
from torch.testing import assert_close

import checkpoints
import classifier
import images
import metrics
import run
import sample
import settings
import train

UNET = ("--target v --channels 8 --channel-mult 1 --layers 1 --attention 0 --batch-size 8 --warmup 2 --device cpu "
        "--train-steps 2 --labels").split()


def squares(n, seed=0):
    """Grey images of 8 x 8 and their labels: a bright left, middle or right third."""
    g = torch.Generator().manual_seed(seed)
    label = torch.randint(3, (n,), generator=g)
    x = torch.randint(0, 120, (n, 1, 8, 8), generator=g)
    for k in range(3):
        x[label == k, :, :, 3 * k:3 * k + 3] += 110
    return x.to(torch.uint8), label


@pytest.fixture(scope="module", autouse=True)
def small():
    """30 steps, and 6 features: the covariance of few images is whole."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(classifier, "STEPS", 30)
        patch.setattr(classifier, "RATE", 0.01)
        patch.setattr(classifier, "BATCH", 32)
        patch.setattr(classifier, "FEATURES", 6)
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """90 images to train on, 60 to test on, in three folders each."""
    root = tmp_path_factory.mktemp("data") / "squares"
    for seed, (split, n) in enumerate({"train": 90, "test": 60}.items()):
        for i, (image, label) in enumerate(zip(*squares(n, seed))):
            path = root / split / "abc"[label] / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image[0].numpy()).save(path)
    return root


@pytest.fixture(scope="module")
def file(folder, tmp_path_factory):
    path = tmp_path_factory.mktemp("runs") / "classifier.pt"
    classifier.main(["--data", str(folder), "--out", str(path), "--device", "cpu"])
    return path


def config_of(folder, **more):
    return dict(data=str(folder), shape=[1, 8, 8], image_size=None, skip_corrupt=False, images=images.facts(folder),
                **more)


@pytest.fixture(scope="module")
def model(file, folder):
    return classifier.of_run(file, config_of(folder))[0]


def test_it_learns_and_does_so_again():
    x, label = squares(200)
    models = [classifier.train(x, label, 3, flip) for flip in (False, False, True)]
    first, again, flipped = (list(model.state_dict().values()) for model in models)
    assert all(torch.equal(a, b) for a, b in zip(first, again)) and not torch.equal(first[0], flipped[0])
    test, truth = squares(300, seed=1)
    features, probability = classifier.said(models[0], test)
    assert (probability.argmax(1) == truth).double().mean() > 0.95
    assert features.shape == (300, 6) and not models[0].training
    assert features.mean(0).abs().max() < 0.5 and (features.std(0) - 1).abs().max() < 0.5


def test_what_it_says_is_the_network_typed_again(model):
    x, _ = squares(601)
    features, probability = classifier.said(model, x)
    w, h = {name: c.double() for name, c in model.body.state_dict().items()}, x.double() / 127.5 - 1
    for conv, norm in (0, 1), (4, 5), (8, 9):
        h = F.conv2d(h, w[f"{conv}.weight"], w[f"{conv}.bias"], padding=1)
        mean, var, scale, shift = (w[f"{norm}.{name}"][:, None, None] for name in (
            "running_mean", "running_var", "weight", "bias"))
        h = ((h - mean) / (var + 1e-5).sqrt() * scale + shift).clamp(min=0)
        h = h.unflatten(2, (-1, 2)).amax(3).unflatten(3, (-1, 2)).amax(4)
    assert h.shape == (601, 128, 1, 1)                     # as nine equal ones
    h = h.expand(-1, -1, 3, 3).flatten(1) @ w["14.weight"].T + w["14.bias"]
    h = (h - w["15.running_mean"]) / (w["15.running_var"] + 1e-5).sqrt()
    assert_close(features.double(), h, rtol=1e-3, atol=1e-3)
    logits = h.clamp(min=0) @ model.last.weight.double().T + model.last.bias.double()
    assert_close(probability.double(), logits.exp() / logits.exp().sum(1, keepdim=True), rtol=1e-3, atol=1e-4)
    assert_close(model(images.to_float(x)).double(), logits, rtol=1e-3, atol=1e-3)


def test_images_of_odd_sizes_have_features_too():
    for shape in (3, 28, 28), (1, 5, 9):
        network, x = classifier.Classifier(shape[0], 10).eval(), torch.zeros(2, *shape)
        assert network.features(x).shape == (2, 6) and network(x).shape == (2, 10)


def test_the_threshold_is_in_the_middle():
    x = torch.tensor([0, 127, 128, 255], dtype=torch.uint8)
    assert classifier.binarised(x).tolist() == [0, 0, 255, 255] and classifier.binarised(x).dtype == torch.uint8


def test_what_is_measured(model):
    """Samples are not the data here: precision and recall differ, as do images and their thresholds."""
    (x, label), (test, _), (train_part, _) = (squares(n, seed) for n, seed in ((70, 3), (90, 4), (80, 5)))
    x, label = x[label < 2], label[label < 2]
    x = (x.float() * 0.8).to(torch.uint8)
    of = {name: classifier.said(model, part)[0] for name, part in dict(x=x, test=test, train=train_part).items()}
    thresholds = {name: classifier.said(model, part)[0] for name, part in dict(
        x=(x > 127) * 255, test=(test > 127) * 255, train=(train_part > 127) * 255).items()}
    real = classifier.seen(model, test), classifier.seen(model, train_part)
    found = classifier.measure(model, x, *real)
    for name, suffix in ("x", ""), ("train", "_floor"):
        precision, recall = metrics.precision_recall(of["test"], of[name])
        expected = dict(frechet=metrics.frechet(of[name], of["test"]), kid=metrics.kid(of[name], of["test"]),
                        knn_precision=precision, knn_recall=recall,
                        frechet_binarised=metrics.frechet(thresholds[name], thresholds["test"]))
        assert {key: found[key + suffix] for key in expected} == pytest.approx(
            {key: value.item() for key, value in expected.items()}, rel=1e-5)
    assert len(found) == 10 and found["knn_recall"] < found["knn_precision"]
    assert found["frechet"] > 3 * found["frechet_floor"]
    names = {row.name for row in settings.SETTINGS}                    # else metrics.json has one in place of the other
    assert not names & {name.removesuffix("_floor") for name in found}
    labelled = classifier.measure(model, x, *real, label=1)
    guess = classifier.said(model, x)[1].argmax(1)
    assert labelled["recognised"] == (guess == 1).double().mean() and len(labelled) == 12
    assert labelled["recognised_floor"] == (classifier.said(model, train_part)[1].argmax(1) == 1).double().mean()
    each = classifier.recognised(classifier.seen(model, x), label)["recognised"]
    assert each == (guess == label).double().mean() and each > 0.9


def test_the_real_images_are_those_of_the_run(model, folder, monkeypatch):
    """The test split whole, so many of the train split at random; with a label the images of that."""
    monkeypatch.setattr(classifier, "seen", lambda model, x: x)
    test, part = classifier.real(model, config_of(folder), 50)
    train_split = images.load(str(folder), "train")
    assert torch.equal(test, images.load(str(folder), "test")) and len(part) == 50
    number = {image.numpy().tobytes(): i for i, image in enumerate(train_split)}
    rows = [number[image.numpy().tobytes()] for image in part]
    assert len(set(rows)) == 50 and rows != sorted(rows) and max(rows) > 60
    assert len(classifier.real(model, config_of(folder), 10**6)[1]) == 90
    test, part = classifier.real(model, config_of(folder, label=2), 10**6)
    for split, found in ("test", test), ("train", part):
        one = images.read_folder(folder / split / "c")
        assert sorted(image.numpy().tobytes() for image in found) == sorted(image.numpy().tobytes() for image in one)


def test_its_file_says_what_it_is(file, folder, capsys):
    network, facts = classifier.of_run(file, config_of(folder))
    x, label = images.load(str(folder), "test"), images.labels(str(folder), "test")[0]
    accuracy = (classifier.said(network, x)[1].argmax(1) == label).double().mean().item()
    assert facts["accuracy"] == accuracy > 0.9 and facts["shape"] == [1, 8, 8] and facts["classes"] == 3
    assert facts["digest"] == checkpoints.digest(*network.state_dict().values()) and not network.training
    assert not any(p.requires_grad for p in network.parameters())
    classifier.main(["--data", str(folder), "--out", str(file.parent / "again.pt"), "--device", "cpu"])
    out = capsys.readouterr().out
    assert f"3 classes, {accuracy:.2%} of 60 test images are given their label, digest {facts['digest']}" in out
    test, train_part = classifier.real(network, config_of(folder), 10_000)
    floor = classifier.distances(train_part, test)
    assert f"floor, train split against test split: frechet {floor['frechet']:.4f}, kid {floor['kid']:.4f}" in out
    assert classifier.place("photos/cats/").name == "classifier-cats.pt"


@pytest.mark.parametrize("change, sentence", [
    (dict(images=dict(count=1, digest="0")), "of other data"), (dict(shape=[3, 8, 8]), r"of other data .*1x8x8.*3x8x8"),
    (dict(images=None, data="mnist"), "of other data"),
])
def test_a_classifier_of_other_data(file, folder, change, sentence):
    with pytest.raises(SystemExit, match=f"classifier.pt is a classifier {sentence}.* - train one: python .*"):
        classifier.of_run(file, config_of(folder) | change)


def test_a_file_that_is_none(file, folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="no classifier at runs/classifier-squares.pt - train one: python .*squares"):
        classifier.of_run(None, config_of(folder))
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    (tmp_path / "flipped.pt").write_bytes(data)
    checkpoints.save(tmp_path / "other.pt", {"config": {}, "model": {}})
    for name in "flipped.pt", "other.pt":
        with pytest.raises(SystemExit, match=f"{name} is damaged or no classifier"):
            classifier.of_run(name, config_of(folder))


def test_a_folder_without_classes(tmp_path):
    for i in range(4):
        Image.fromarray(np.zeros((8, 8), np.uint8)).save(tmp_path / f"{i}.png")
    with pytest.raises(SystemExit, match="has no labels: each class needs a subfolder"):
        classifier.main(["--data", str(tmp_path), "--out", str(tmp_path / "a.pt"), "--device", "cpu"])
    assert not (tmp_path / "a.pt").exists()


# Samples

@pytest.fixture(scope="module")
def trained(folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("trained")
    train.main(["--data", str(folder), "--out", str(out), *UNET])
    return out / "squares-v-mse-s0"


def test_samples_are_measured_beside_the_floor(trained, folder, file, model, tmp_path, capsys):
    words = ["--ckpt", str(trained), "--steps", "2", "--num-samples", "12", "--device", "cpu", "--out", str(tmp_path)]
    sample.main([*words, "--classifier", str(file), "--label", "1"])
    found, out = json.loads((tmp_path / "metrics.json").read_text()), capsys.readouterr().out
    x = images.read_folder(tmp_path / "samples")
    real = classifier.real(model, config_of(folder, label=1), 12)
    expected = classifier.measure(model, x, *real, label=1)
    assert {key: found[key] for key in expected} == pytest.approx(expected, rel=1e-5) and len(expected) == 12
    assert found["classifier"]["digest"] == classifier.of_run(file, config_of(folder))[1]["digest"]
    for name in ("frechet", "recognised"):
        assert [line.split()[-2:] for line in out.splitlines() if line.startswith(f"{name} ")][0] == [
            f"{expected[name]:.4f}", f"{expected[f'{name}_floor']:.4f}"]
    sample.main([*words, "--overwrite", "--csv", str(tmp_path / "table.csv"), "--metrics", "--classifier", str(file)])
    found = json.loads((tmp_path / "metrics.json").read_text())
    assert "recognised" not in found and found["frechet_floor"] != expected["frechet_floor"]
    head, row = ((tmp_path / "table.csv").read_text().splitlines())
    assert float(dict(zip(head.split(","), row.split(",")))["kid"]) == pytest.approx(found["kid"], rel=1e-3)
    sample.main([*words, "--overwrite"])
    assert "frechet" not in json.loads((tmp_path / "metrics.json").read_text())


def test_mistakes_come_before_images(trained, file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = ["--ckpt", str(trained), "--steps", "2", "--device", "cpu", "--out", str(tmp_path / "out")]
    with pytest.raises(SystemExit, match="5 are too few"):
        sample.main([*words, "--num-samples", "5", "--classifier", str(file)])
    with pytest.raises(SystemExit, match="no classifier at runs/classifier-squares.pt"):
        sample.main([*words, "--metrics"])
    assert not list((tmp_path / "out").rglob("*.png"))


def test_metrics_are_of_images():
    for words, option in (["--metrics"], "metrics"), (["--classifier", "a.pt"], "classifier"):
        with pytest.raises(SystemExit, match=f"--{option} is an option of images"):
            run.of_images(sample.parse(words), sample.IMAGES, dict(data="rings"))
