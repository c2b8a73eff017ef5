"""The poster's table on images: what each system is trained and drawn with, what its cells are, what is remade."""
import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import cells
from torch.testing import assert_close

import classifier
import images
import kind_images
import likelihood
import reproduce
import reproduce_foundations_images
import reproduce_poster_images as poster
import run
import train
from ddpm import SCHEDULES

CONFIG = dict(data="set", target="v", loss="mse", schedule="cosine", shape=[1, 4, 4], precision="fp32", stabiliser=0.0,
              timesteps=None, variance="small", seed=0, t_min=1e-3, batch_size=8, skip_corrupt=False, image_size=None)


def gaussian(config, mean, out=None):
    """The exact network of images x ~ N(mean(label), 0.04 I), of a chain also `out`."""
    def model(z, t, label=None):
        alpha, sigma = (c(t)[:, None, None, None] for c in (SCHEDULES["cosine"].alpha, SCHEDULES["cosine"].sigma))
        m = mean(label)
        x_hat = m + 0.04 * alpha / (0.04 * alpha**2 + sigma**2) * (z - alpha * m)
        eps_hat = (z - alpha * x_hat) / sigma
        y = {"v": alpha * eps_hat - sigma * x_hat, "eps": eps_hat, "s": -eps_hat / sigma}[config["target"]]
        return y if out is None else torch.cat([y, torch.full_like(y, out)], 1)
    return model


def run_of(folder, mean=lambda label: 0.3, out=None, **config):
    config = CONFIG | config
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "ckpt.pt").touch()
    asked = []
    one = SimpleNamespace(folder=folder, config=config, target=config["target"],
                          checkpoint=dict(step=77, ema=dict(w=torch.zeros(3, 5))), asked=asked,
                          history=[{f"test_{name}": 1.25 for name in ("mse", "nelbo", "nelbo_stable")}])
    one.model = lambda device="cpu", out_too=False, **how: (asked.append(how), gaussian(config, mean, out))[1]
    return one


def test_samples_are_those_of_the_network(tmp_path):
    """Gaussian images: mean 0.3, standard deviation 0.2; more than one batch, no two images equal."""
    x, label = poster.draw(run_of(tmp_path), None, 250, 800, torch.device("cpu"))
    x = images.to_float(x)
    assert x.shape == (250, 1, 4, 4) and len(label) == 250
    assert x.mean() == pytest.approx(0.3, abs=0.015) and x.std() == pytest.approx(0.2, abs=0.015)
    assert torch.cdist(x.flatten(1), x.flatten(1)).add(torch.eye(250)).min() > 1e-3
    one, other = (poster.draw(run_of(tmp_path, seed=seed), None, 2, 4, torch.device("cpu"))[0] for seed in (0, 1))
    assert not torch.equal(one, other)                      # noise is of the run's seed


def test_guided_samples_have_their_labels_and_w(tmp_path):
    """Three labels with means of their own, of none 0: with w the mean is (1 + w) times the label's."""
    means = torch.tensor([-0.2, 0.1, 0.3, 0.0])
    one = run_of(tmp_path, lambda label: means[label][:, None, None, None], target="s", loss="simple", classes=3)
    for w in (0, 1):
        x, label = poster.draw(one, w, 240, 100, torch.device("cpu"))
        assert label.tolist() == [0, 1, 2] * 80
        of_label = torch.stack([images.to_float(x)[label == i].mean() for i in range(3)])
        assert_close(of_label, (1 + w) * means[:3], atol=0.02, rtol=0)


def test_a_learned_variance_is_sampled_with(tmp_path):
    """With out = 1 the steps have the large variance, with -1 the small one: 5 steps show it."""
    std = []
    for out in (-1.0, 1.0):
        one = run_of(tmp_path, target="eps", loss="hybrid", timesteps=1000, variance="range", out=out)
        std.append(images.to_float(poster.draw(one, None, 200, 5, torch.device("cpu"))[0]).std().item())
        assert one.asked == [{"out": True}]
    assert std[1] > std[0] + 0.01
    one = run_of(tmp_path)
    poster.draw(one, None, 2, 2, torch.device("cpu"))
    assert one.asked == [{"out": False}]


def test_networks_have_equal_steps_and_share_the_budget(tmp_path, monkeypatch):
    calls = []

    def trained(argv):
        option = {word: argv[argv.index(word) + 1] for word in argv if word.startswith("--") and word != argv[-1]}
        calls.append((argv, option))
    monkeypatch.setattr(train, "main", trained)
    monkeypatch.setattr(run, "open", lambda folder: SimpleNamespace(folder=folder, checkpoint={"step": 55}))
    args = SimpleNamespace(runs=str(tmp_path), data="set", seeds=2, budget=60.0, device="cpu", data_dir="d",
                           more=["--channels", "8"])
    runs = poster.trained(SimpleNamespace(args=args))
    assert len(calls) == len(poster.SYSTEMS) == 10 and len(runs) == 20
    for i, (argv, option) in enumerate(calls):
        assert option["--seeds"] == "2" and option["--channels"] == "8" and "--resume" in argv
        assert option.get("--minutes") == ("3.0" if i == 0 else None)
        assert option.get("--train-steps") == (None if i == 0 else "55")
    of = {name: (argv, option) for name, (argv, option) in zip(poster.SYSTEMS, calls)}
    assert (of["s, simple"][1]["--target"], of["s, simple"][1]["--loss"]) == ("s", "simple")
    assert "--labels" in of["s of labels"][0] and "--labels" not in of["s, simple"][0]
    argv, option = of["learned variance"]
    assert [option[name] for name in ("--target", "--loss", "--timesteps", "--variance")] == [
        "eps", "hybrid", "1000", "range"]
    assert len({(option["--out"], option["--target"], option["--loss"]) for _, option in calls}) == 10
    assert runs["x, nelbo", 1].folder == tmp_path / "poster-plain/set-x-nelbo-s1"
    assert runs["s of labels", 0].folder == tmp_path / "poster-labels/set-s-simple-s0"


def test_bits_are_the_bound_of_an_image_over_its_dimensions(tmp_path, monkeypatch):
    black = torch.zeros(500, 1, 4, 4, dtype=torch.uint8)
    monkeypatch.setattr(kind_images, "load", lambda config, split, data_dir: black)
    asked = {}

    def evaluate(model, x, config, **how):
        asked.update(how, n=len(x))
        return {"bound": 16 * math.log(2) * torch.arange(len(x), dtype=torch.float64)}, 0
    monkeypatch.setattr(likelihood, "evaluate", evaluate)
    mean, error = poster.bits(run_of(tmp_path), "d")["bits"]
    assert mean == pytest.approx(149.5) and error == pytest.approx((300 * 301 / 12 / 300)**0.5)
    assert asked["n"] == 300 and asked["num_ode"] == 0 and asked["draws"] == 8
    monkeypatch.setattr(reproduce_foundations_images, "measure", lambda one, data_dir: dict(
        bounds={"range": [3.5, 0.1]}))
    assert poster.bits(run_of(tmp_path, timesteps=1000, variance="range"), "d") == {"bits": [3.5, 0.1]}


def test_distances_are_of_the_samples_to_the_test_split(tmp_path, monkeypatch):
    x, label = torch.full((4, 1, 2, 2), 7), torch.tensor([0, 1, 2, 0])
    monkeypatch.setattr(poster, "draw", lambda one, w, n, steps, device: (x, label))
    said = torch.eye(3)[[0, 1, 1, 1]]
    monkeypatch.setattr(classifier, "seen", lambda model, x: ("seen", said))
    monkeypatch.setattr(classifier, "distances", lambda a, b: {"frechet": (a, b)})
    real = lambda: ("test", "train")
    assert poster.measure(None, None, 4, 10, "cpu", None, real) == {"frechet": (("seen", said), "test")}
    for w in (0, 1):
        assert poster.measure(None, w, 4, 10, "cpu", None, real) == {"frechet": (("seen", said), "test"),
                                                                     "recognised": 0.5}


@pytest.fixture
def study(tmp_path, monkeypatch):
    """A study of 2 seeds whose networks, classifier and distances are stand-ins -> (study, what was measured)."""
    measured = []
    runs = {(name, seed): run_of(tmp_path / f"{name}-{seed}") for name in poster.SYSTEMS for seed in range(2)}
    for i, one in enumerate(runs.values()):
        one.history[-1] = {"test_mse": i + 0.25, "test_nelbo": i + 0.5, "test_nelbo_stable": i + 0.75}
    monkeypatch.setattr(poster, "trained", lambda study: runs)
    monkeypatch.setattr(classifier, "of_run", lambda path, config, device: (
        "model", dict(accuracy=0.75, digest="abc" * 9)))
    monkeypatch.setattr(classifier, "real", lambda model, config, n, data_dir: ("test", "train") if (
        model, config["data"], n, data_dir) == ("model", "set", 2000, "d") else pytest.fail("other images"))
    monkeypatch.setattr(classifier, "distances", lambda x, y: dict.fromkeys(poster.COLUMNS, 0.125) if (x, y) == (
        "train", "test") else {})

    def measure(one, w, n, steps, device, model, real):
        measured.append((one, w, n, steps, real()))
        value = len(measured)
        return {name: value + k for k, name in enumerate(poster.COLUMNS)} | ({} if w is None else {"recognised": value})
    monkeypatch.setattr(poster, "measure", measure)
    monkeypatch.setattr(poster, "bits", lambda one, data_dir: {"bits": [float(one.folder.name[-1]), 0.0625]})
    args = SimpleNamespace(runs=str(tmp_path), data="set", seeds=2, num_samples=2000, device="cpu", data_dir="d")
    (tmp_path / "classifier-set.pt").touch()
    return SimpleNamespace(args=args, device="cpu"), measured, runs, tmp_path


def test_the_table_has_the_numbers_of_its_rows(study):
    study, measured, runs, folder = study
    text = poster.table(study)
    table = {(line[0], line[1]): line[2:] for line in cells(text)[2:]}
    assert table["train split", "-"] == ["1.12", "0.74", "-", *5 * ["0.125"], "-", "-"]
    assert len(table) == 13 and len(measured) == 24
    # row i of a seed is measured as number i + 1, of the other 12 later; standard deviation of two, 12 / 2^0.5
    assert table["x, mse", "-"] == ["49.10", "9.89", "-", *(f"{value}.000 +- 8.485" for value in range(7, 12)), "-",
                                    "0.500 +- 0.707"]
    assert table["s of labels", "5"][:4] == ["74.21", "25.16", "-", "10.000 +- 8.485"]
    assert table["s of labels", "5"][-2:] == ["10.000 +- 8.485", "-"]
    assert table["s of labels", "0"][-1] == "0.500 +- 0.707" and table["s of labels", "1"][-1] == "-"
    assert "standard error at most 0.062" in text[-1] and "77 steps of 8 images" in text[-1]
    assert "gives 75.0% of the test images their label, digest abcabcabcabc" in text[-1]
    assert {(one is runs["v, nelbo", 1]) for one, w, *_ in measured[-1:]} == {True}
    assert all(how == (2000, 100, ("test", "train")) for _, _, *how in map(list, measured) for how in [tuple(how)])
    poster.table(study)
    assert len(measured) == 24                              # kept beside the checkpoints
    poster.table(study, steps=500)
    assert len(measured) == 48 and measured[-1][3] == 500


def test_table_4_2_has_the_losses_and_distances_of_its_networks(study):
    study, measured, runs, _ = study
    table = {line[0]: line[1:] for line in cells(poster.table_of_losses(study))[2:]}
    # runs are x mse 0 1, x nelbo 2 3, eps mse 4 5, eps nelbo 6 7, v mse 8 9, v nelbo 10 11
    assert table["eps"] == ["0.06", "4.750 +- 0.707", "0.84", "7.250 +- 0.707", "5.000 +- 0.707", "7.000 +- 0.707",
                            "13.75", "8.000 +- 8.485", "24.26", "17.000 +- 8.485"]
    assert table["x"][:4] == ["0.05", "0.750 +- 0.707", "0.09", "3.250 +- 0.707"]
    assert len(table) == 3


def test_a_missing_classifier_is_trained(study, monkeypatch):
    study, _, _, folder = study
    (folder / "classifier-set.pt").unlink()
    calls = []
    monkeypatch.setattr(classifier, "main", calls.append)
    poster.table(study)
    option = dict(zip(calls[0][::2], calls[0][1::2]))
    assert option == {"--data": "set", "--data-dir": "d", "--device": "cpu", "--out": str(folder / "classifier-set.pt")}
    assert len(calls) == 1 and json.loads(next(Path(folder).glob("x, mse-0/poster-100-2000-None-*.json")).read_text())


def test_the_figure_has_a_panel_of_each_row(tmp_path, monkeypatch):
    drawn = []
    runs = {(name, 0): name for name in poster.SYSTEMS}
    monkeypatch.setattr(poster, "trained", lambda study: runs)
    monkeypatch.setattr(poster, "draw", lambda name, w, n, steps, device: (
        drawn.append((name, w, steps)), (torch.full((n, 1, 4, 4), len(drawn), dtype=torch.uint8), None))[1])
    poster.fig_samples(SimpleNamespace(device="cpu"), tmp_path / "fig.png")
    assert drawn == [(name, w, 100) for name, w, *_ in poster.ROWS]
    x = images.read([tmp_path / "fig.png"], [tmp_path / "fig.png"], None, False)[0, 0]
    assert x.shape == (4 * (2 * 6 + 2 + 6) + 6, 3 * (8 * 6 + 2 + 6) + 6)
    assert set(range(1, 13)) <= set(x.unique().tolist())


@pytest.mark.parametrize("option", ["--loss", "--labels", "--variance", "--timesteps", "--train-steps"])
def test_options_that_the_table_sets_are_refused(option, capsys):
    with pytest.raises(SystemExit) as error:
        reproduce.parse(["poster-images", option, "1"])
    assert error.value.code == 2 and f"{option} is set by poster-images itself" in capsys.readouterr().err
