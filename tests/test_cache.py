"""Results on disk: the same to the bit, never those of anything else, and in nobody's way."""
import os
import stat

import pytest
import torch
from torch.testing import assert_close

import cache
import checkpoints
import ddpm
import kind_points
import metrics
import optimum
from datasets2d import DATASETS, GaussianMixture

HEAVY = optimum.optimal_predictions, optimum.optimal_errors, kind_points.floors


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.setenv("DIFFUSION_LOSSES_CACHE", str(tmp_path / "kept"))
    monkeypatch.setattr(kind_points, "POINTS", 500)
    for function in *HEAVY, cache.code:
        function.cache_clear()
    yield tmp_path / "kept"
    monkeypatch.undo()
    for function in *HEAVY, cache.code:
        function.cache_clear()


def asked():
    """Optimum and floor, computed or from the disk; the dataset's work done for them."""
    for function in HEAVY:
        function.cache_clear()
    work = []
    with pytest.MonkeyPatch.context() as patch:
        for owner, name in (GaussianMixture, "denoise_and_score"), (metrics, "floor"):
            original = getattr(owner, name)
            patch.setattr(owner, name, lambda *args, original=original, **kw: work.append(1) or original(*args, **kw))
        return (optimum.optimal_errors("rings", "v", "cosine", 1e-3, 0.0),
                kind_points.floors("rings", 50, "null")), len(work)


def same(a, b):
    assert_close(a[0], b[0], rtol=0, atol=0)
    assert repr(a[1]) == repr(b[1])


def test_the_second_process_computes_nothing_and_has_the_same_bits(place):
    first, work = asked()
    second, again = asked()
    assert work == 2 and again == 0 and len(list(place.iterdir())) == 2
    same(first, second)
    data = DATASETS["rings"]
    fresh = metrics.floor(data, 50, 500, generator=kind_points.run.generator("cpu", "floor"))
    assert second[1] == (fresh, metrics.log_density(data, kind_points.load(dict(data="rings"))).item())
    assert kind_points.floors("rings", 60, "null")[0] != first[1][0]
    assert stat.S_IMODE(place.stat().st_mode) == 0o700


@pytest.mark.parametrize("owner, name, value", [
    (kind_points, "POINTS", 400), (kind_points, "DATASETS", {**DATASETS, "rings": DATASETS["clusters"]}),
    (optimum, "fixed", lambda name: ddpm.SCHEDULES["linear"]), (torch, "__version__", "3.0"),
    (cache.threads, "MOST", 7)])
def test_what_depends_on_something_else_is_computed(place, monkeypatch, owner, name, value):
    asked()
    monkeypatch.setattr(owner, name, value)
    cache.code.cache_clear()
    result, work = asked()
    cache.code.cache_clear()
    assert work == (1 if name == "fixed" else 2)         # the floor has no schedule
    monkeypatch.setenv("DIFFUSION_LOSSES_CACHE", "")
    same(result, asked()[0])


def test_other_code_is_something_else(place, monkeypatch, tmp_path):
    (tmp_path / "a.py").write_text("1")
    monkeypatch.setattr(cache, "__file__", str(tmp_path / "cache.py"))
    codes = []
    for text in "1", "2":
        (tmp_path / "a.py").write_text(text)
        cache.code.cache_clear()
        codes.append(cache.digest(1))
    cache.code.cache_clear()
    assert codes[0] != codes[1]


def test_names_tell_values_shapes_and_types_apart():
    x = torch.arange(6.0)
    parts = [(x,), (x.reshape(2, 3),), (x.reshape(3, 2),), (x.reshape(2, 3).T,), (x.int(),), (x, 1), (x, 2), (x, "1"),
             (x + 1,), (x, x), ()]
    assert len({cache.digest(*part) for part in parts}) == len(parts)
    assert cache.digest(x, "a") == cache.digest(x.clone(), "a")


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def unsigned(path):
    """Another's file that torch can read."""
    torch.save({"value": 1}, path)


@pytest.mark.parametrize("damage", [flip, unsigned, lambda path: path.write_bytes(b""),
                                    lambda path: path.write_bytes(path.read_bytes()[:-50]),
                                    lambda path: path.unlink() or path.mkdir(),
                                    lambda path: path.unlink() or os.mkfifo(path),
                                    lambda path: checkpoints.save(path, {})])
def test_a_damaged_file_is_computed_again(place, damage):
    first, _ = asked()
    for path in place.iterdir():
        damage(path)
    second, work = asked()
    assert work == 2
    same(first, second)


@pytest.mark.parametrize("where", ["", "/proc/nothing/here", "/dev/null/x", "\0", 3000 * "x"])
def test_without_a_folder_there_is_no_cache(place, monkeypatch, where):
    first, _ = asked()
    monkeypatch.setattr(cache, "folder", lambda: where and cache.Path(where))
    second, work = asked()
    assert work == 2
    same(first, second)


def test_the_folder_is_the_users_cache(monkeypatch, tmp_path):
    monkeypatch.delenv("DIFFUSION_LOSSES_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache.folder() == tmp_path / "diffusion-losses"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache.folder() == tmp_path / ".cache" / "diffusion-losses"
    monkeypatch.setenv("DIFFUSION_LOSSES_CACHE", "")
    assert cache.folder() is None


def test_the_oldest_files_go(place, monkeypatch):
    monkeypatch.setattr(cache, "FILES", 3)
    for i in range(5):
        assert cache.kept(lambda: [i], "number", i) == [i]                              # noqa: B023
        os.utime(place / f"number-{cache.digest(i)[:32]}.pt", (i, i))
    assert {path.name for path in place.iterdir()} == {f"number-{cache.digest(i)[:32]}.pt" for i in (2, 3, 4)}
    assert cache.kept(lambda: "new", "number", 4) == [4] and cache.kept(lambda: "new", "number", 0) == "new"
