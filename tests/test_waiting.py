"""What is said while points are prepared, trained and drawn: before the first line, time left, losses of several."""
import io
import re
import sys
import time

import pytest
import torch

import kind_points
import likelihood
import optimum
import progress
import run
import samplers
import train
import train_points


@pytest.fixture
def clock(monkeypatch, tmp_path):
    """A clock that only work moves: 40 s to prepare, 2 s an epoch and network, 1 s an evaluation of those trained."""
    class Clock:
        now = time.perf_counter()

        def takes(self, seconds, function):
            def slow(*args, **kw):
                self.now += seconds
                return function(*args, **kw)
            return slow
    clock = Clock()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(time, "perf_counter", lambda: clock.now)
    monkeypatch.setattr(kind_points, "POINTS", 1250)
    for function in optimum.optimal_predictions, optimum.optimal_errors, kind_points.floors:
        function.cache_clear()
    monkeypatch.setattr(optimum, "optimum", clock.takes(40, optimum.optimum))
    yield clock
    for function in optimum.optimal_predictions, optimum.optimal_errors, kind_points.floors:
        function.cache_clear()


WORDS = "--data clusters --width 8 --batch-size 500 --epochs".split()


def test_time_left_is_that_of_training_and_the_clock_that_of_the_process(clock, monkeypatch, capsys):
    """However long the preparation of tests was; 20 runs in stacks of 8, 8 and 4 included."""
    monkeypatch.setattr(train_points, "train_epoch", clock.takes(2, train_points.train_epoch))
    began = clock.now - progress.seconds()
    train.main([*WORDS, "10"])
    lines = capsys.readouterr().out.splitlines()
    found = [re.fullmatch(r"epoch +\d+  train [\d.]+  test [\d.]+  (\d+) s, (\d+) s left", line)
             for line in lines[1:11]]
    assert [int(match[2]) for match in found] == [18, 16, 14, 12, 10, 8, 6, 4, 2, 0]
    assert [int(match[1]) for match in found] == [round(clock.now - began - 2 * i) for i in range(9, -1, -1)]
    assert lines[12].startswith(f"{clock.now - began:.0f} s in all; next: python ")

    train.main([*WORDS, "4", "--seeds", "20", "--out", "many"])
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("epoch")]
    left = [int(re.search(r", (\d+) s left$", line)[1]) for line in lines]
    assert left[0] == round(2 / 8 * (80 - 8)) and left[-1] == 0 and len(lines) < 12
    assert sum(line.startswith("epoch   4") for line in lines) == 3


def test_several_runs_say_mean_and_range_of_their_losses(clock, capsys):
    train.main([*WORDS, "1", "--target", "v", "x"])
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("epoch"))
    shown = r"(\d+\.\d{4}) \((\d+\.\d{4}) to (\d+\.\d{4})\)"
    found = re.match(rf"epoch   1  train {shown}  test {shown}  ", line)
    for key, shown in ("train_loss", found.groups()[:3]), ("test_loss", found.groups()[3:]):
        x, v = (run.load(f"runs/clusters-{target}-mse-s0")["history"][0][key] for target in "xv")
        assert shown == tuple(f"{value:.4f}" for value in ((x + v) / 2, min(x, v), max(x, v)))


def test_a_member_that_diverged_is_not_in_the_losses_that_are_shown(clock, capsys, monkeypatch):
    losses = torch.tensor([[1.0, float("nan"), 4.0]])
    original = train_points.train_epoch
    monkeypatch.setattr(train_points, "train_epoch", lambda *args: (losses, *original(*args)[1:]))
    with pytest.raises(SystemExit, match="not finite"):
        train.main([*WORDS, "1", "--target", "x", "v", "eps"])
    assert "train 2.5000 (1.0000 to 4.0000)  test" in capsys.readouterr().out


@pytest.mark.parametrize("sampler", samplers.SAMPLERS)
def test_sampling_says_how_long_it_takes(clock, capsys, monkeypatch, sampler):
    """After a tenth of the steps the time left is right; nothing stays on a terminal."""
    train.main([*WORDS, "1"])
    one = run.open("runs/clusters-eps-mse-s0")
    monkeypatch.setattr(kind_points, "in_chunks", lambda model, *_: clock.takes(1, model))
    capsys.readouterr()
    kind_points.draw(one, 40, 100, sampler=sampler)
    lines = capsys.readouterr().err.splitlines()
    total = {"heun": 39, "annealed": 31}.get(sampler, 40)
    assert lines[0] == f"drawing 100 samples: 4 of {total} evaluations, {total - 4} s left" and len(lines) > 3
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    kind_points.draw(one, 40, 100, sampler=sampler)
    assert capsys.readouterr().err.endswith("\r\033[K")


@pytest.mark.parametrize("terminal, shown", [(False, "computing\n"), (True, "\rcomputing\033[K\r\033[K")])
def test_long_work_is_announced_and_short_work_is_not(monkeypatch, terminal, shown):
    stream = io.StringIO()
    stream.isatty = lambda: terminal
    monkeypatch.setattr(sys, "stderr", stream)
    with progress.announced("computing", after=0.5):
        pass
    assert stream.getvalue() == ""
    with progress.announced("computing", after=0.01):
        time.sleep(0.2)
    assert stream.getvalue() == shown


def test_optimum_and_floor_are_announced(monkeypatch, capsys, tmp_path):
    """When they are computed, not when they are on the disk."""
    monkeypatch.setenv("DIFFUSION_LOSSES_CACHE", str(tmp_path))
    monkeypatch.setattr(kind_points, "POINTS", 1000)
    said = []
    original = progress.announced
    monkeypatch.setattr(progress, "announced", lambda line: said.append(line) or original(line))
    for _ in range(2):
        for function in optimum.optimal_predictions, optimum.optimal_errors, kind_points.floors:
            function.cache_clear()
        optimum.optimal_errors("rings", "v", "cosine", 1e-3, 0.0)
        kind_points.floors("rings", 2000, "null")
    for function in optimum.optimal_predictions, optimum.optimal_errors, kind_points.floors:
        function.cache_clear()
    assert said == ["computing the optimum of rings", "computing the floor of 2,000 samples of rings"]


def test_the_flow_of_a_likelihood_says_how_long_it_takes(clock, capsys, monkeypatch):
    """Within a batch, from its evaluations; the draws of the bound do not count."""
    train.main([*WORDS, "1"])
    network = run.Run.model
    monkeypatch.setattr(run.Run, "model", lambda self, device, out: Slow(clock, network(self, device)))
    capsys.readouterr()
    likelihood.main("--num 20 --batch-size 10 --draws 2 --ode-steps 5".split())
    lines = capsys.readouterr().err.splitlines()
    done, total, left = (int(number) for number in re.findall(r"\d+", lines[0]))
    assert total == 4 * 5 * 20 and done % 10 == 0 and left == (total - done) / 10


class Slow(torch.nn.Module):
    """A network of which an evaluation takes a second of the clock where gradients are taken."""

    def __init__(self, clock, network):
        super().__init__()
        self.clock, self.network = clock, network

    def forward(self, z, t):
        self.clock.now += torch.is_grad_enabled()
        return self.network(z, t)
