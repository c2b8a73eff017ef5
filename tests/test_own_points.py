"""Points of a file: read, standardised, trained on, and given back in their units."""
import json

import numpy as np
import pytest
import torch
from torch.testing import assert_close

import kind_points
import likelihood
import metrics
import optimum
import own_points
import run
import sample
import train

G = np.random.default_rng(0)
POINTS = np.stack([100 + 30 * G.normal(size=600), 0.1 * G.normal(size=600) - 5, G.uniform(size=600)], 1)
SMALL = ["--epochs", "1", "--batch-size", "256", "--width", "8", "--device", "cpu"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("own")
    np.save(folder / "points.npy", POINTS)
    train.main(["--data", str(folder / "points.npy"), "--target", "v", "eps", *SMALL, "--out", str(folder / "runs")])
    return folder


def test_npy_and_csv_with_and_without_a_header_are_the_same_points(tmp_path):
    np.save(tmp_path / "a.npy", POINTS.astype(np.float32))
    np.savetxt(tmp_path / "b.csv", POINTS, delimiter=",", header="x,y,z", comments="", fmt="%.17g")
    np.savetxt(tmp_path / "c.CSV", POINTS, delimiter=",", fmt="%.17g", encoding="utf-8-sig")
    np.savetxt(tmp_path / "d.csv", POINTS[:, :1], fmt="%.17g")
    assert (own_points.read(tmp_path / "a.npy") == POINTS.astype(np.float32)).all()
    for name in "b.csv", "c.CSV":
        assert (own_points.read(tmp_path / name) == POINTS).all()
    assert (own_points.read(tmp_path / "d.csv") == POINTS[:, :1]).all()


@pytest.mark.parametrize("content, says", [
    (np.zeros(30), "column 1 of .* is the same in all rows"), (np.zeros((30, 2, 2)), "has the shape"),
    (np.zeros((30, 0)), "has the shape"),
    (POINTS[:19], "has 19 points - give at least 20"), (np.array([["a"] * 2] * 30), "cannot read"),
    (np.array([[{}] * 2] * 30), "cannot read"), (POINTS + 1j, "cannot read"),
    (np.where(np.arange(1800).reshape(600, 3) == 7, np.nan, POINTS), "1 points that are not finite, .* in row 3"),
    (POINTS * [1, 0, 1], "column 2 of .* is the same"), (POINTS * [1e302, 1, 1], "column 1 of .* too much for")])
def test_bad_arrays_end_in_a_sentence(tmp_path, content, says):
    np.save(tmp_path / "bad.npy", content)
    with pytest.raises(SystemExit, match=says):
        train.main(["--data", str(tmp_path / "bad.npy"), *SMALL, "--out", str(tmp_path / "runs")])
    assert not (tmp_path / "runs").exists()


class Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return self.path.touch, ()


def test_nothing_in_an_array_is_run(tmp_path):
    np.save(tmp_path / "bad.npy", np.array([[Evil(tmp_path / "was_run")] * 2] * 30), allow_pickle=True)
    with pytest.raises(SystemExit, match="cannot read"):
        own_points.read(tmp_path / "bad.npy")
    assert not (tmp_path / "was_run").exists()


@pytest.mark.parametrize("text, says", [("", "cannot read|has the shape|has 0"), ("a,b\n1,2\n", "has 1 points"),
                                        ("length\n" + "45,5\n" * 30, "a header of 1 names and rows of 2 numbers"),
                                        ("1,2\n3\n" * 30, "cannot read"), ("1,2\nx,y\n" * 30, "cannot read")])
@pytest.mark.filterwarnings("error")
def test_bad_tables_end_in_a_sentence(tmp_path, text, says):
    (tmp_path / "bad.csv").write_text(text)
    with pytest.raises(SystemExit, match=says):
        own_points.read(tmp_path / "bad.csv")


def test_the_split_is_a_tenth_and_what_is_trained_on_has_mean_0_and_variance_1(trained):
    path = str(trained / "points.npy")
    facts = own_points.facts(path)
    data = own_points.OwnPoints(path, facts)
    assert (facts["rows"], facts["dim"], len(data.train), len(data.test)) == (600, 3, 540, 60)
    assert_close(data.train.mean(0), torch.zeros(3), rtol=0, atol=1e-6)
    assert_close(data.train.std(0, correction=0), torch.ones(3), rtol=1e-6, atol=0)
    back = own_points.in_units_of_the_file(torch.cat([data.train, data.test]).double(), facts).numpy()
    assert np.allclose(sorted(back.tolist()), sorted(POINTS.tolist()), rtol=1e-5)
    drawn = data.sample(5000, torch.Generator().manual_seed(0), torch.float64)
    assert drawn.dtype == torch.float64 and drawn.shape == (5000, 3)
    every = torch.cat([data.train, data.test]).double()
    assert {tuple(row) for row in drawn.tolist()} <= {tuple(row) for row in every.tolist()}
    assert len({tuple(row) for row in drawn.tolist()}) > 590                        # all of them, the tests too


def test_a_run_keeps_the_statistics_says_that_no_optimum_is_known_and_opens(trained, capsys):
    train.main(["--data", str(trained / "points.npy"), "--target", "v", "eps", *SMALL, "--out", str(trained / "runs"),
                "--resume"])
    assert "best possible unknown" in capsys.readouterr().out
    one = run.open(trained / "runs/points.npy-v-mse-s0")
    assert one.config["points"] == own_points.facts(str(trained / "points.npy"))
    assert one.history[0]["optimum"] is None and one.history[0]["optimum_nelbo"] is None
    assert one.history[0]["step"] == 540 // 256 and (one.folder / "loss.png").exists()
    z = torch.randn(4, 3)
    assert one.model()(z, torch.full((4,), 0.5)).shape == (4, 3)
    z, t, y, weights = optimum.test_batch(one.config)                # 60 test points, each with many t and noises
    assert len(z) == kind_points.POINTS and y.shape == z.shape
    a, b = one.schedule.alpha(t)[:, None], one.schedule.sigma(t)[:, None]
    x = (a * z - b * y)[:180].unflatten(0, (3, 60))                                                         # v: (3.58)
    assert_close(x, kind_points.load(one.config).expand(3, 60, 3), rtol=0, atol=1e-5)


def test_samples_are_in_the_units_of_the_file_and_measured_against_its_test_points(trained, capsys):
    folder = trained / "runs/points.npy-v-mse-s0"
    sample.main(["--ckpt", str(folder), "--steps", "4", "--num-samples", "500", "--device", "cpu"])
    assert "mean log-density      unknown" in capsys.readouterr().out
    one = run.open(folder)
    x = kind_points.draw(one, 4, 500)[0]
    mean, scale = (np.array(one.config["points"][key]) for key in ("mean", "scale"))
    assert np.allclose(np.load(folder / "samples.npy"), x.numpy() * scale + mean, rtol=1e-4, atol=1e-4)
    result, test = json.loads((folder / "metrics.json").read_text()), kind_points.load(one.config)
    assert result["mean_distance"] == pytest.approx((x.mean(0) - test.mean(0)).norm().item(), rel=1e-4)
    assert "log_density" not in result and result["optimum"] is None
    # the floor of the mean: 500 and 60 points of variance 1 in three dimensions
    assert result["mean_distance_floor"]["mean"] == pytest.approx((3 * (1 / 500 + 1 / 60))**0.5, rel=0.25)
    assert (folder / "samples.png").exists()


def test_a_small_scale_far_from_zero_survives_and_one_axis_may_be_an_array_without_columns(tmp_path):
    x = 5.4e6 + 0.1 * np.random.default_rng(1).normal(size=500)
    np.save(tmp_path / "a.npy", x)
    facts = own_points.facts(str(tmp_path / "a.npy"))
    data = own_points.OwnPoints(str(tmp_path / "a.npy"), facts)
    back = own_points.in_units_of_the_file(torch.cat([data.train, data.test]), facts)[:, 0].numpy()
    assert np.allclose(np.sort(back), np.sort(x), rtol=0, atol=1e-6)


def test_the_likelihood_is_that_of_three_dimensions_without_an_entropy(trained, capsys):
    folder = trained / "runs/points.npy-v-mse-s0"
    likelihood.main(["--ckpt", str(folder), "--num", "20", "--draws", "4", "--ode-steps", "8", "--device", "cpu"])
    text = capsys.readouterr().out
    assert "entropy" not in text
    scale = run.open(folder).config["points"]["scale"]
    assert f"in the file's units add {np.log(scale).sum():.4f} nats" in text
    nats, bits = (float(text.split("reconstruction")[1].split()[i]) for i in (0, 2))
    assert bits == pytest.approx(nats / 3 / np.log(2), rel=1e-3)


def test_a_file_that_has_changed_is_noticed(trained, tmp_path):
    np.save(tmp_path / "points.npy", POINTS)
    argv = ["--data", str(tmp_path / "points.npy"), *SMALL, "--out", str(tmp_path / "runs")]
    train.main(argv)
    np.save(tmp_path / "points.npy", POINTS + (np.arange(1800).reshape(600, 3) == 7))
    own_points.split.cache_clear()
    with pytest.raises(SystemExit, match="other settings"):
        train.main([*argv, "--resume"])
    with pytest.raises(SystemExit, match="not the file that this run was trained on"):
        sample.main(["--ckpt", str(tmp_path / "runs/points.npy-eps-mse-s0"), "--steps", "2", "--num-samples", "50"])
    own_points.split.cache_clear()


def test_fewer_points_than_a_batch_end_in_a_sentence_before_any_training(trained, tmp_path):
    with pytest.raises(SystemExit, match="540 points to train on, less than a batch - lower --batch-size"):
        train.main(["--data", "rings", str(trained / "points.npy"), "--out", str(tmp_path), "--epochs", "1",
                    "--batch-size", "541"])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("dim", [1, 3, 5])
def test_sliced_wasserstein_of_shifted_points_is_the_mean_shift_along_the_directions(dim):
    x = torch.randn(400, dim, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    shift = torch.arange(1, dim + 1, dtype=torch.float64)
    u = metrics.directions(dim, x)
    assert_close(u.norm(dim=0), torch.ones(100, dtype=torch.float64))
    assert_close(metrics.sliced_wasserstein(x + shift, x), (shift @ u).square().mean().sqrt())
    assert metrics.sliced_wasserstein(x + shift, x) == pytest.approx(shift.norm().item() / dim**0.5, rel=0.15)
