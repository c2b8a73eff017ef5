"""What is said of long work: when, how often, and whether the time left is right. The clock is typed here."""
import re
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch

import progress
import train_images


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still until clock.now is set."""
    fake = types.SimpleNamespace(now=100.0)
    monkeypatch.setattr(progress.time, "perf_counter", lambda: fake.now)
    return fake


def work(clock, seconds):
    """Items that take so long each, watched."""
    for second in progress.watch(seconds, "working", "items"):
        clock.now += second


def test_short_work_says_nothing(clock, capsys):
    work(clock, 10 * [0.29])
    assert capsys.readouterr() == ("", "")


def test_in_a_pipe_there_is_a_line_after_3_seconds_and_then_more_and_more_rarely(clock, capsys):
    work(clock, 1000 * [1.0])
    lines = capsys.readouterr().err.splitlines()
    done = [int(line.split()[1].replace(",", "")) for line in lines]
    assert lines[0] == "working: 4 of 1,000 items, 996 s left" and lines[-1].endswith(" s left")
    gaps = [b - a for a, b in zip(done, done[1:])]
    assert gaps[0] <= 5 and max(gaps) == 31 and gaps[:3] == sorted(gaps[:3]) and 30 < len(lines) < 60
    assert all(re.fullmatch(r"working: [\d,]+ of 1,000 items, \d+ s left", line) for line in lines)


def test_on_a_terminal_one_line_is_rewritten_every_second_and_taken_away(clock, capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    work(clock, 40 * [0.25])
    err = capsys.readouterr().err
    assert err.count("\r") == 8 and "\n" not in err and err.endswith("\r\033[K")
    assert err.startswith("\rworking: 5 of 40 items, 9 s left\033[K")


def test_the_time_left_is_right_after_a_tenth_of_the_work_though_the_first_item_was_slow(clock, capsys):
    work(clock, [30.0] + 99 * [1.1])
    for line in capsys.readouterr().err.splitlines()[1:]:
        done, left = (int(n.replace(",", "")) for n in re.findall(r"([\d,]+) (?:of|s left)", line))
        assert left == pytest.approx(1.1 * (100 - done), rel=0.02, abs=0.5)


def test_items_count_for_their_size_and_come_through(clock, capsys):
    batches = [[1, 2, 3], [4, 5], [6]]
    seen = []
    for batch in progress.watch(batches, "testing", "images", len):
        seen.append(batch)
        clock.now += 4
    assert seen == batches and [line.split(",")[0] for line in capsys.readouterr().err.splitlines()] == [
        "testing: 3 of 6 images", "testing: 5 of 6 images"]
    assert list(progress.watch([], "nothing", "items")) == []


def test_only_the_first_process_speaks(clock, capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    work(clock, 20 * [1.0])
    assert capsys.readouterr() == ("", "")


def test_a_counted_model_gives_what_the_model_gives():
    calls = []
    model = progress.counted(lambda z, t: 2 * z + t, lambda: calls.append(1))
    assert model(3, 4) == 10 and model(0, 1) == 1 and calls == [1, 1]


def test_the_clock_is_of_the_whole_process():
    """Work before the import counts, as the import of torch does."""
    code = ("import time; start = time.perf_counter()\nwhile time.process_time() < 1: pass\n"
            "import progress; time.sleep(0.3); print(progress.seconds())")
    root = Path(progress.__file__).parent
    out = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True).stdout
    assert 1.3 <= float(out) < 2.3


@pytest.mark.parametrize("test_every, grid_every", [(1000, 1000), (30, 400), (7, 11)])
@pytest.mark.parametrize("minutes", [float("inf"), 20.0])
def test_the_time_left_of_a_run_has_its_tests_and_grids(clock, capsys, monkeypatch, test_every, grid_every, minutes):
    """A run of 1,000 steps of 2 s, a test of 25 s, a grid of 80 s: after a tenth, 30 % at most, tested or not."""
    monkeypatch.setattr(progress, "due", lambda *args: True)
    monkeypatch.setattr(train_images, "GRID_STEPS", 100)
    config, took = dict(batch_size=64), dict(test=None, grid=None, all=0.0)
    said, start = [], clock.now
    monkeypatch.setattr(progress, "say", lambda line: said.append((clock.now, float(line.split()[-3]))))
    on_step = train_images.reporter("", config, 1000, minutes, 2400, test_every, grid_every)
    for step in range(1, 1001):
        clock.now += 20 if step == 1 else 2                # the first warms up
        over = step == 1000 or clock.now - start >= 60 * minutes
        on_step(step, torch.tensor(1.0), clock.now - start, took)
        for part, every, long in ("test", test_every, 25), ("grid", grid_every, 80):
            if step % every == 0 or over:
                clock.now += long
                took |= {part: long, "all": took["all"] + long}
        if over:
            break
    whole = clock.now - start
    late = [(now, left) for now, left in said if now - start > whole / 10]
    assert len(late) > 50
    for now, left in late:
        assert left == pytest.approx(clock.now - now, rel=0.3, abs=6), (now - start, whole)
    assert late[-1][1] >= 80                               # the closing test and grid are waited for too
