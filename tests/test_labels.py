"""Labels of points through all scripts: what the network sees, train, test columns, resume, samples, mistakes."""
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.testing import assert_close

import batches
import guidance
import kind_points
import metrics
import mlp
import optimum
import plots
import reproduce_guidance
import run
import sample
import samplers
import settings
import stack
import targets
import train
import train_points
from datasets2d import DATASETS, GaussianMixture
from ddpm import SCHEDULES

FAST = "--data clusters --width 8 --epochs 2 --batch-size 500 --device cpu --target v --labels".split()
CACHED = optimum.optimal_predictions, optimum.optimal_errors, kind_points.floors
COSINE, NULL = SCHEDULES["cosine"], guidance.NULL


@pytest.fixture(scope="module", autouse=True)
def few():
    """2,500 points to train and to test on in place of 50,000, and no figures."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kind_points, "POINTS", 2500)
        for function in CACHED:
            function.cache_clear()
        yield
    for function in CACHED:
        function.cache_clear()


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two seeds of a run with labels, trained as a stack -> folder."""
    folder = tmp_path_factory.mktemp("runs")
    train.main([*FAST, "--seeds", "2", "--out", str(folder)])
    return folder


def of(words=()):
    return settings.configs(train.parse([*FAST, *words]))


# The network

def test_the_network_sees_one_number_for_each_label():
    torch.manual_seed(0)
    model, z, t = mlp.MLP(width=5, layers=2, members=2, classes=3), torch.randn(6, 2), torch.rand(6)
    label = torch.tensor([0, 2, NULL, 1, 1, 0])
    one_hot = torch.zeros(6, 3)
    for row, column in (0, 0), (1, 2), (3, 1), (4, 1), (5, 0):
        one_hot[row, column] = 1
    h = torch.cat([z, t[:, None], one_hot], 1).unflatten(0, (2, 3))
    for weight, bias, last in zip(model.weights, model.biases, (False, True)):
        h = torch.stack([torch.nn.functional.linear(h[m], weight[m], bias[m, 0]) for m in range(2)])
        h = h if last else h.clamp(min=0)
    assert_close(model(z, t, label), h.flatten(0, 1))
    assert_close(model(z, t), model(z, t, torch.full((6,), NULL)))
    assert (model(z, t) - model(z, t, label))[[0, 1, 3]].abs().min() > 0


def test_without_labels_the_network_is_what_it_was():
    weights = lambda **options: (torch.manual_seed(0), mlp.MLP(width=5, layers=2, **options).state_dict())[1]
    assert all(torch.equal(a, b) for a, b in zip(weights().values(), weights(classes=0).values()))
    assert kind_points.build_model({**of()[0], "labels": False}).weights[0].shape[2] == 3
    assert kind_points.build_model(of()[0]).weights[0].shape[2] == 7


# Training

def test_an_epoch_of_labels_goes_with_its_points():
    config, other = of(["--epochs", "3"])[0], of(["--seed", "1"])[0]
    data = [kind_points.load(c, "train") for c in (config, other)]
    found = batches.epoch(data, 4, [config, other])
    plain = batches.epoch(data, 4, [{**c, "labels": False} for c in (config, other)])
    assert len(found) == 6 and len(plain) == 5
    for column, before in zip(found, plain):               # all other draws are those of runs without
        assert torch.equal(column, before)
    _, z, t, y, _, label = (c.unflatten(1, (2, 500))[:, 0].flatten(0, 1) for c in found)      # member 0
    x = targets.to_x("v", y, z, COSINE.alpha(t)[:, None], COSINE.sigma(t)[:, None])
    truth, dropped = guidance.posterior(DATASETS["clusters"], x).argmax(1), label == NULL
    assert torch.equal(label[~dropped], truth[~dropped]) and len(label) == 2500
    assert abs(dropped.double().mean() - 0.1) < 4.5 * (0.09 / 2500)**0.5
    assert not torch.equal(dropped, batches.labels(config, 5, "cpu")[0] == NULL)
    assert abs((dropped & (truth == 0)).sum() / (truth == 0).sum() - 0.1) < 0.06


def test_the_step_gives_the_network_its_labels():
    model = mlp.MLP(width=4, layers=2, classes=4)
    step = train_points.build_step(model, torch.optim.SGD(model.parameters(), 0.1), 1, labels=True)
    z, t, y, label = torch.randn(5, 2), torch.rand(5), torch.randn(5, 2), torch.tensor([0, NULL, 3, 1, 2])
    expected = 2 * (model(z, t, label) - y).square().mean(1).detach()
    assert_close(step(z, t, y, torch.full((5,), 2.0), label)[0], expected)


def test_a_stack_is_its_members_and_a_killed_run_goes_on_exactly(runs, tmp_path, monkeypatch):
    words, calls, original = [*FAST, "--seed", "1", "--out", str(tmp_path)], [], train_points.train_epoch

    def stop(*arguments):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return original(*arguments)
    monkeypatch.setattr(train_points, "train_epoch", stop)
    with pytest.raises(KeyboardInterrupt):
        train.main(words)
    monkeypatch.setattr(train_points, "train_epoch", original)
    assert len(run.open(tmp_path / "clusters-v-mse-s1").history) == 1
    train.main([*words, "--resume"])
    whole = tmp_path / "whole"
    train.main([*words[:-1], str(whole)])
    states = [run.open(folder / "clusters-v-mse-s1").checkpoint["model"] for folder in (tmp_path, whole, runs)]
    assert all(torch.equal(a, b) for a, b in zip(states[0].values(), states[1].values()))
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(states[0].values(), states[2].values()))


def test_the_optimum_knows_the_labels():
    """By torch.distributions: E[x | z, label] of each cluster is that of a Gaussian; a perfect network is at it."""
    config, data = of()[0], DATASETS["clusters"]
    test, (optima,) = optimum.ready([config], "cpu")
    x, label = kind_points.pairs(config)
    z, t, y, w = optimum.test_batch(config)
    alpha, sigma, var = COSINE.alpha(t)[:, None], COSINE.sigma(t)[:, None], (data.std**2).float()
    centre = torch.stack([(x[:, k] > 0) * 2.0 - 1 for k in range(2)], 1) * data.centres.abs()[0].float()
    x_hat = centre + alpha * var / (alpha**2 * var + sigma**2) * (z - alpha * centre)
    v_hat = (alpha * z - x_hat) / sigma                                                       # cosine: Eq. (3.58)
    expected = ((v_hat - y).square().mean(1)[:, None] * w).mean(0)
    assert_close(torch.tensor(optima), expected, rtol=1e-3, atol=1e-5)
    assert_close(test(guidance.exact(data, "v", COSINE))[0], torch.tensor(optima), rtol=1e-3, atol=1e-5)
    without = optimum.ready([{**config, "labels": False}], "cpu")[1][0]
    assert optima[0] < 0.9 * without[0] and optima[2] < without[2]


def test_the_history_of_a_run_has_that_optimum(runs):
    last = run.open(runs / "clusters-v-mse-s0").history[-1]
    assert last["optimum"] == optimum.ready(of(), "cpu")[1][0][0] and last["test_loss"] > last["optimum"]


# Samples

def test_samples_of_labels_are_guided(runs, tmp_path, monkeypatch):
    shown = []
    monkeypatch.setattr(plots, "scatter", lambda panels, *arguments, **options: shown.append(panels))
    words = ["--steps", "8", "--num-samples", "300", "--sampler", "dpmpp", "--device", "cpu", "--guidance", "1.5"]
    folders = [str(runs / f"clusters-v-mse-s{seed}") for seed in range(2)]
    sample.main(["--ckpt", *folders, "--label", "3", "1", "--out", str(tmp_path), *words])
    for seed in range(2):
        model = run.open(folders[seed]).model()
        for label in 3, 1:
            folder = tmp_path / f"clusters-v-mse-s{seed}" / f"label-{label}"
            rows = torch.full((300,), label)
            guided = lambda z, t: 2.5 * model(z, t, rows) - 1.5 * model(z, t, NULL * torch.ones_like(rows))  # noqa: B023
            expected = samplers.sample(guided, (300, 2), 8, target="v", schedule=COSINE, sampler="dpmpp",
                                       generator=run.generator("cpu", 0, "sample"))
            x = torch.from_numpy(np.load(folder / "samples.npy"))
            assert_close(x, expected, rtol=1e-4, atol=1e-5)
            found, (test, of_test) = json.loads((folder / "metrics.json").read_text()), kind_points.pairs(of()[0])
            real = test[of_test == label]
            assert found["label"] == label and found["guidance"] == 1.5
            assert found["mean_distance"] == pytest.approx(metrics.mean_distance(x, real).item(), rel=1e-5)
            assert found["log_density_data"] == pytest.approx(
                DATASETS["clusters"].given(label).log_prob(real).mean().item(), rel=1e-5)
            assert found["sliced_wasserstein_floor"]["mean"] < 0.1
            assert (real.mean(0) * DATASETS["clusters"].centres[label] > 0).all()
    assert len(shown) == 4 and list(shown[0])[1].endswith("label 3, w = 1.5") and len(list(shown[0].values())[0]) < 1000


def test_without_a_label_samples_are_those_of_all_points(runs, tmp_path):
    words = ["--steps", "6", "--num-samples", "200", "--device", "cpu", "--out", str(tmp_path)]
    sample.main(["--ckpt", str(runs / "clusters-v-mse-s0"), *words])
    model = run.open(runs / "clusters-v-mse-s0").model()
    expected = samplers.sample(model, (200, 2), 6, target="v", schedule=COSINE,
                               generator=run.generator("cpu", 0, "sample"))
    assert_close(torch.from_numpy(np.load(tmp_path / "samples.npy")), expected, rtol=1e-4, atol=1e-5)
    assert "label" not in json.loads((tmp_path / "metrics.json").read_text())
    sample.main(["--ckpt", str(runs / "clusters-v-mse-s0"), *words, "--label", "2"])           # w = 0, in the folder
    assert json.loads((tmp_path / "metrics.json").read_text())["guidance"] == 0


# Mistakes

@pytest.mark.parametrize("words, sentence", [
    (["--label", "4"], "no label 4: choose from 0 to 3"), (["--label", "0", "9"], "no label 9"),
])
def test_a_label_that_does_not_exist(words, sentence, runs, tmp_path):
    with pytest.raises(SystemExit, match=f"clusters-v-mse-s0: {sentence}"):
        sample.main(["--ckpt", str(runs / "clusters-v-mse-s0"), *words, "--out", str(tmp_path)])
    assert not list(tmp_path.iterdir())


def test_guidance_of_a_run_without_labels(tmp_path):
    train.main([*FAST[:-1], "--epochs", "1", "--out", str(tmp_path)])
    with pytest.raises(SystemExit, match="trained without labels - leave out --label, or train with --labels"):
        sample.main(["--ckpt", str(tmp_path / "clusters-v-mse-s0"), "--label", "1", "--guidance", "1"])


@pytest.mark.parametrize("words, sentence", [
    (["--guidance", "1"], "--guidance is towards a label of a run trained with --labels: say which"),
    (["--label", "1", "2", "--csv", "a.csv"], "--csv is the table of one label"),
])
def test_arguments_of_sampling(words, sentence, capsys):
    with pytest.raises(SystemExit) as error:
        sample.parse(words)
    assert error.value.code == 2 and sentence in capsys.readouterr().err


@pytest.mark.parametrize("words, sentence", [
    (["--data", "clusters", "{points}"], "has none - leave it out"),
    (["--timesteps", "10"], "of continuous time"), (["--energy", "--target", "s"], "of continuous time"),
    (["--loss", "exact", "--target", "s"], "of continuous time"),
    (["--data", "cifar10", "--timesteps", "10"], "of continuous time"),
])
def test_what_labels_are_not_for(words, sentence, tmp_path, capsys):
    np.save(tmp_path / "points.npy", np.random.default_rng(0).normal(size=(50, 2)))
    with pytest.raises(SystemExit) as error:
        train.parse(["--labels", *(word.format(points=tmp_path / "points.npy") for word in words)])
    assert error.value.code == 2 and sentence in capsys.readouterr().err


def test_a_dataset_without_classes_has_no_labels(monkeypatch, capsys):
    monkeypatch.setitem(DATASETS, "clusters", GaussianMixture(DATASETS["clusters"].centres, DATASETS["clusters"].std))
    with pytest.raises(SystemExit):
        of()
    assert "--labels: clusters has none - leave it out" in capsys.readouterr().err


def test_a_stack_with_labels_has_one_dataset(runs):
    one = run.open(runs / "clusters-v-mse-s0").config
    assert settings.alike(one) != settings.alike(one | {"data": "rings"})
    assert settings.alike(one) == settings.alike(one | {"seed": 7, "target": "eps"})
    plain = one | {"labels": False}
    assert settings.alike(plain) == settings.alike(plain | {"data": "rings"})
    assert stack.size("cpu") == 8


# The table

def test_the_cells_of_networks(runs, monkeypatch):
    for function in reproduce_guidance.tilted, reproduce_guidance.samples:
        function.cache_clear()
    monkeypatch.setattr(reproduce_guidance, "SAMPLERS", {"flow": ("dpmpp", 6)})
    monkeypatch.setattr(reproduce_guidance, "REAL", 2000)
    monkeypatch.setattr(reproduce_guidance, "TRAINED", (0, 2))
    monkeypatch.setattr(reproduce_guidance, "SETS", {"clusters": reproduce_guidance.SETS["clusters"]})
    members = {("clusters", "v", "mse", seed): run.open(runs / f"clusters-v-mse-s{seed}") for seed in range(2)}
    found = {key: reproduce_guidance.of_network(one, 500) for key, one in members.items()}
    model = guidance.of_label(guidance.guided(members["clusters", "v", "mse", 1].model(), 2), 3)
    x = samplers.sample(model, (500, 2), 6, target="v", schedule=COSINE, sampler="dpmpp", grid="logsnr",
                        generator=run.generator("cpu", "guided"))
    exact, real = reproduce_guidance.samples("clusters", 2, "flow", 500), reproduce_guidance.tilted("clusters", 2)[1]
    distances = [metrics.sliced_wasserstein(*pair).item() for pair in ((x, real), (x, exact), (exact, real))]
    assert found["clusters", "v", "mse", 1]["2 flow"] == pytest.approx(
        [*distances, *reproduce_guidance.measured("clusters", x)], rel=1e-4)
    others = {("rings", *key[1:]): {how: [9.0] * 6 for how in result} for key, result in found.items()}
    study = SimpleNamespace(args=SimpleNamespace(num_samples=2000, epochs=2, seeds=2),
                            trained=lambda *arguments, **options: members, measured=lambda *arguments: found | others)
    row = next(line for line in reproduce_guidance.trained(study) if line.startswith("| clusters | 2 | flow |"))
    cells = row.strip("| ").split(" | ")[3:]
    assert cells[0] == f"{distances[2]:.3f}"
    a, b = (found[key]["2 flow"] for key in members)
    assert cells[1] == f"{(a[0] + b[0]) / 2:.3f} +- {abs(a[0] - b[0]) / 2**0.5:.3f}"
    assert cells[2] == f"{(a[1] + b[1]) / 2:.3f} +- {abs(a[1] - b[1]) / 2**0.5:.3f}"
    assert len(cells) == 6
    for function in reproduce_guidance.tilted, reproduce_guidance.samples:
        function.cache_clear()
