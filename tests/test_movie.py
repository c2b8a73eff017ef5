"""Films: which z are shown, where the dots stand, and what is in the file, read back with Pillow."""
import json

import numpy as np
import pytest
import torch
from PIL import Image

import images
import kind_points
import movie
import plots
import run
import sample
import samplers
import train
from datasets2d import DATASETS
from ddpm import SCHEDULES


def frames_of(path):
    with Image.open(path) as film:
        return [(np.asarray(film.convert("RGB")), film.info["duration"]) for i in range(film.n_frames)
                if film.seek(i) is None]


@pytest.mark.parametrize("name, steps, expected", [("ancestral", 7, 7), ("heun", 16, 15), ("dpmpp", 100, 59)])
def test_a_film_has_the_z_of_evaluations_spread_evenly_at_the_scale_of_the_data(name, steps, expected):
    """Also where the noise of the schedule is 50, and nothing of sampling changes."""
    schedule, seen = SCHEDULES["ve"], []
    model = lambda z, t: seen.append((t[0].item(), z)) or 0.5 * z
    how = dict(target="x", schedule=schedule, sampler=name)
    film = movie.Film(schedule, steps, lambda z: z[:5])
    x = samplers.sample(film.watch(model), (9, 2), steps, generator=torch.Generator().manual_seed(1), **how)
    evaluations, calls = len(seen), list(seen)
    plain = samplers.sample(model, (9, 2), steps, generator=torch.Generator().manual_seed(1), **how)
    assert torch.equal(x, plain) and len(film.frames) == expected
    which = [i * steps // expected if expected == 59 else i for i in range(expected)]
    assert which[-1] >= evaluations - 2 and which[0] == 0
    for (t, z), (true_t, true_z) in zip(film.frames, [calls[i] for i in which]):
        sigma = 0.01 * 5000**true_t
        assert t == true_t and torch.allclose(z, true_z[:5] / (1 + sigma**2)**0.5, rtol=1e-5, atol=1e-7)


def test_dots_stand_where_the_points_are():
    """Up is up; what is outside or not finite is left out; one dimension stands against 0."""
    middle = lambda ink: [float((ink.sum(axis) * (np.arange(100) + 0.5)).sum() / ink.sum()) for axis in (0, 1)]
    x, y = middle(movie.dots(torch.tensor([[1.5, 0.9], [9.0, 0.0], [np.nan, 0.0]]), 100))
    assert abs(x - 75) < 0.3 and abs(y - 35) < 0.3                       # (1.5 + 3) / 6, (3 - 0.9) / 6
    x, y = middle(movie.dots(torch.tensor([[-1.5]]), 100))
    assert abs(x - 25) < 0.3 and abs(y - 50) < 0.3
    x, y = middle(movie.dots(torch.tensor([[0.0, 1.5, 2.0]]), 100))
    assert abs(x - 50) < 0.3 and abs(y - 25) < 0.3


def test_a_gif_loops_pauses_and_is_small(tmp_path, monkeypatch):
    noise = [Image.fromarray(np.random.default_rng(i).integers(255, size=(40, 40), dtype=np.uint8)) for i in range(12)]
    movie.gif(noise, tmp_path / "a.gif")
    found = frames_of(tmp_path / "a.gif")
    assert [duration for _, duration in found] == 11 * [250] + [1500]
    assert Image.open(tmp_path / "a.gif").info["loop"] == 0
    monkeypatch.setattr(movie, "LIMIT", (tmp_path / "a.gif").stat().st_size - 1)
    movie.gif(noise, tmp_path / "b.gif")
    half = frames_of(tmp_path / "b.gif")
    assert len(half) == 6 and all(np.array_equal(a[0], b[0]) for a, b in zip(half, found[1::2]))     # the last stays


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs")
    train.main(["--data", "clusters", "--target", "v", "x", "--epochs", "1", "--width", "16", "--batch-size", "5000",
                "--device", "cpu", "--out", str(out)])
    return [out / f"clusters-{target}-mse-s0" for target in ("v", "x")]


def test_each_run_of_a_stack_has_its_film_beside_the_data(trained, tmp_path, monkeypatch, capsys):
    drawn, original = {}, movie.points
    monkeypatch.setattr(movie, "POINTS", 30)
    monkeypatch.setattr(movie, "points", lambda frames, data, titles, colour, path: drawn.setdefault(
        path.parent.name, (frames, data, titles, colour)) and original(frames, data, titles, colour, path))
    sample.main(["--ckpt", *map(str, trained), "--movie", "--steps", "4", "--num-samples", "50", "--device", "cpu",
                 "--out", str(tmp_path)])
    for folder in trained:
        (frames, data, titles, colour), (*_, (_, last)) = drawn[folder.name], drawn[folder.name][0]
        target = run.open(folder).target
        assert len(frames) == 5 and titles == ("clusters, data", f"{target}, mse, 4 steps")
        assert colour == plots.COLOURS[target] and torch.equal(data, kind_points.load(dict(data="clusters")))
        samples = np.load(tmp_path / folder.name / "samples.npy")
        assert np.array_equal(last.numpy(), samples[:30])
        first = torch.randn(50, 2, generator=run.generator("cpu", 0, "sample"))[:30]
        assert frames[0][1].shape == (30, 2) and torch.allclose(frames[0][1], first, atol=1e-5)
        assert len(frames_of(tmp_path / folder.name / "samples.gif")) == 5
    assert not torch.equal(drawn[trained[0].name][0][2][1], drawn[trained[1].name][0][2][1])
    assert "samples.gif" in capsys.readouterr().out


def test_a_film_of_other_samples_does_not_stay_beside_new_ones(trained, tmp_path):
    argv = ["--ckpt", str(trained[0]), "--steps", "2", "--num-samples", "50", "--device", "cpu", "--out", str(tmp_path)]
    sample.main([*argv, "--movie"])
    (tmp_path / "holiday.gif").write_bytes(b"not ours")
    assert (tmp_path / "samples.gif").exists()
    sample.main(argv)
    assert not (tmp_path / "samples.gif").exists() and (tmp_path / "holiday.gif").exists()


def test_the_panels_have_the_colours_of_data_and_target(tmp_path):
    data = DATASETS["rings"].sample(500)
    movie.points([(0.5, data), (0.0, torch.full((400, 2), 1.0))], data, ("a", "b"), "#009E73", tmp_path / "x.gif")
    (_, _), (pixels, _) = frames_of(tmp_path / "x.gif")
    assert tuple(pixels[26 + 100, 16 + movie.SIZE + 200]) == (0, 0x9E, 0x73)           # (1, 1): 2/3 right, 1/3 down
    left, right = pixels[26:-30, 10:movie.SIZE], pixels[26:-30, 20 + movie.SIZE:-12]
    assert (left[..., 2] > left[..., 1]).any() and not (right[..., 2] > right[..., 1]).any()   # blue and green


def test_several_runs_are_one_table_and_csv_has_every_digit(trained, tmp_path, capsys):
    sample.main(["--ckpt", *map(str, trained), "--steps", "3", "--num-samples", "40", "--device", "cpu",
                 "--out", str(tmp_path), "--csv", str(tmp_path / "table.csv")])
    out = capsys.readouterr().out
    header, *lines = (tmp_path / "table.csv").read_text().splitlines()
    assert header.startswith("run,mean distance,covariance distance,sliced wasserstein,log density,steps,sampler")
    for folder, line in zip(trained, lines):
        result = json.loads((tmp_path / folder.name / "metrics.json").read_text())
        assert line.startswith(f"{folder},{result['mean_distance']},{result['covariance_distance']},"
                               f"{result['sliced_wasserstein']},{result['log_density']},3,ancestral,t,,small,40,0")
        row, = [row for row in out.splitlines() if row.startswith(f"{folder} ")]
        assert row.split()[1:] == [f"{result[key]:.4f}" for key in kind_points.MEASURED]
    assert lines[2].startswith(f'"floor, clusters",{result["mean_distance_floor"]["mean"]},')
    assert len(lines) == 3 and "data against data" not in out                    # the block of one run
    sample.main(["--ckpt", str(trained[0]), "--steps", "3", "--num-samples", "40", "--device", "cpu",
                 "--out", str(tmp_path), "--csv", str(tmp_path / "table.csv")])
    out = capsys.readouterr().out
    assert "data against data" in out and "mean distance  cov" not in out
    assert len((tmp_path / "table.csv").read_text().splitlines()) == 2


def test_the_film_of_images_begins_in_noise_and_ends_in_the_images(tmp_path):
    """64 images of 4 x 4 in rows of 8; the second call has them already, and films them again all the same."""
    for i in range(12):
        images.save_png(torch.full((1, 4, 4), 20 * i, dtype=torch.uint8), tmp_path / "data" / f"{i}.png")
    train.main(["--data", str(tmp_path / "data"), "--channels", "8", "--channel-mult", "1", "--layers", "1",
                "--epochs", "1", "--batch-size", "4", "--device", "cpu", "--out", str(tmp_path)])
    folder = tmp_path / "data-eps-mse-s0"
    for _ in range(2):
        (folder / "samples.gif").unlink(missing_ok=True)
        sample.main(["--ckpt", str(folder), "--movie", "--steps", "3", "--num-samples", "64", "--device", "cpu"])
        film = frames_of(folder / "samples.gif")
        end = images.read_folder(folder / "samples")
        shown = np.asarray(Image.open(folder / "samples.png")).astype(int)
        assert len(film) == 4 and film[-1][0].shape[:2] == shown.shape and len(end) == 64
        assert np.abs(film[-1][0][..., 0].astype(int) - shown).max() <= 40              # 32 colours
        assert film[0][0][..., 0].std() > 60                                            # noise, clipped
