"""The README's exercises check themselves: each test is skipped until its row is there, then tells right from wrong.

    pytest -k exercise -rs       # which are open

The last test solves them all, and spoils each, to see that the checks can pass and fail.
"""
import math
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

import datasets2d
import losses
import metrics
import samplers
import targets
from datasets2d import DATASETS
from ddpm import SCHEDULES

F64 = torch.float64
T = torch.tensor([1e-3, 0.1, 0.4, 0.5, 0.8, 0.999], dtype=F64)
ALPHA, SIGMA = torch.cos(math.pi / 2 * T), torch.sin(math.pi / 2 * T)


def check_loss():
    """By Yu et al. the weight on the error of eps_hat is 1 / sqrt(SNR), so on that of x_hat sqrt(SNR)."""
    snr = ALPHA**2 / SIGMA**2
    for target, on_x in ("x", torch.ones_like(T)), ("eps", 1 / snr), ("v", SIGMA**2), ("s", SIGMA**4 / ALPHA**2):
        assert_close(losses.weight("debiased", target, T, SCHEDULES["cosine"]), snr.sqrt() * on_x)


def check_target():
    """sigma eps - alpha x, and the way back to x and eps from it."""
    x, eps = torch.randn(2, 6, dtype=F64, generator=torch.Generator().manual_seed(0))
    z, y = ALPHA * x + SIGMA * eps, SIGMA * eps - ALPHA * x
    a, b = targets.coefficients("diff", ALPHA, SIGMA)
    assert_close(a * x + b * eps, y)
    assert_close(targets.to_x("diff", y, z, ALPHA, SIGMA), x)
    assert_close(targets.to_eps("diff", y, z, ALPHA, SIGMA), eps)


def check_sampler():
    """Samples of the clusters in 64 evaluations at the floor; on N(0, I) every step is a rotation, typed here."""
    assert samplers.EVALUATIONS.get("ddim_half") == 2
    data, schedule = DATASETS["clusters"], SCHEDULES["cosine"]
    how = dict(schedule=schedule, sampler="ddim_half", generator=torch.Generator().manual_seed(0), dtype=F64)
    x = samplers.sample(data.optimal_model("v", schedule), (4000, 2), 64, target="v", **how)
    assert metrics.covariance_distance(x, data.sample(50_000, torch.Generator().manual_seed(1), F64)) < 0.06
    seen = []

    def model(z, t):                                   # the exact denoiser of N(0, I), x_hat = alpha z
        seen.append((t[0].item(), z[0, 0].item()))
        return torch.cos(math.pi / 2 * t)[:, None] * z
    samplers.sample(model, (1, 1), 3, target="x", t_min=0.1, **how)
    (t, z), (m, at_m), (s, at_s) = seen                # one step from t over the middle m to s
    assert (t, m, s) == pytest.approx((0.9, 0.7, 0.5))
    angle = lambda late, early: math.cos(math.pi / 2 * (late - early))
    assert at_m == pytest.approx(z * angle(t, m)) and at_s == pytest.approx(at_m * angle(m, s))


def check_schedule():
    """log-SNR from 10 to -10, its derivative, and alpha^2 + sigma^2 = 1."""
    schedule = SCHEDULES["sigmoid"]
    assert_close(schedule.logsnr(T), 10 - 20 * T)
    assert_close(schedule.dlogsnr(T), torch.full_like(T, -20))
    assert_close(schedule.alpha(T)**2 + schedule.sigma(T)**2, torch.ones_like(T))
    assert_close((schedule.alpha(T) / schedule.sigma(T)).log() * 2, 10 - 20 * T)


def check_dataset():
    """Two half circles, (cos u, sin u) and (1 - cos u, 0.5 - sin u), and noise 0.1, standardised."""
    data = DATASETS["moons"]
    u = math.pi * (torch.arange(len(data.centres) // 2, dtype=F64) + 0.5) / (len(data.centres) // 2)
    x, y = torch.cat([u.cos(), 1 - u.cos()]), torch.cat([u.sin(), 0.5 - u.sin()])
    scale = torch.stack([x, y]).var(1, correction=0).add(0.1**2).sqrt()
    expected = torch.stack([x - x.mean(), y - y.mean()], 1) / scale
    assert len(u) >= 100
    assert_close(data.centres[data.centres[:, 0].sort().indices], expected[expected[:, 0].sort().indices])
    assert_close(data.std, 0.1 / scale)


EXERCISES = {"loss": (losses.LOSSES, "debiased", check_loss), "target": (targets.TARGETS, "diff", check_target),
             "sampler": (samplers.SAMPLERS, "ddim_half", check_sampler),
             "schedule": (SCHEDULES, "sigmoid", check_schedule), "dataset": (DATASETS, "moons", check_dataset)}


@pytest.mark.parametrize("name", EXERCISES)
def test_exercise(name):
    table, row, check = EXERCISES[name]
    if row not in table:
        pytest.skip(f"exercise {name}: add a row {row!r}, see README.md")
    check()


DEBIASED = """
def debiased(target, alpha, sigma, det, dlogsnr):
    return sigma / alpha * (alpha / det)**2

"""
DDIM_HALF = """
def ddim_half(denoise, z, times, schedule, noise):
    for t, s in zip(times, times[1:]):
        m = (t + s) / 2
        x_hat, eps_hat = denoise(z, t)
        x_hat, eps_hat = denoise(schedule.alpha(m) * x_hat + schedule.sigma(m) * eps_hat, m)
        z = schedule.alpha(s) * x_hat + schedule.sigma(s) * eps_hat
    return denoise(z, times[-1])[0]

"""
MOONS = """
def moons(n=1000):
    u = line(0, math.pi, n)
    upper = torch.stack([u.cos(), u.sin()], 1)
    return torch.cat([upper, torch.tensor([1.0, 0.5], dtype=torch.float64) - upper]), 0.1

"""
TYPED = [  # file, what stands there, what is typed before it or, into a table, after it: each new row comes first
    ("losses.py", "\nLOSSES = {", DEBIASED, '"debiased": debiased, '),
    ("targets.py", "\nTARGETS = {", "", '"diff": lambda alpha, sigma, d: (-alpha, sigma), '),
    ("samplers.py", "\nSAMPLERS = {", DDIM_HALF, '"ddim_half": ddim_half, '),
    ("samplers.py", "\nEVALUATIONS = {", "", '"ddim_half": 2, '),
    ("ddpm.py", "\nSCHEDULES = {", "",
     '"sigmoid": Schedule(lambda t: 10 - 20 * t, lambda t: torch.full_like(t, -20.0)), '),
    ("datasets2d.py", "\nDATASETS = {", MOONS, ""),
    ("datasets2d.py", "for shape in (", "", "moons, "),
]


def typed(source, *names):
    """What the source of a solution defines."""
    space = {"torch": torch, "math": math, "line": datasets2d.line}
    exec(source, space)
    return [space[name] for name in names]


def test_the_exercises_can_be_solved_and_failed(monkeypatch):
    from ddpm import Schedule
    constant = lambda t: torch.full_like(t, -20.0)
    debiased, ddim_half, moons = (typed(source, name)[0] for source, name in (
        (DEBIASED, "debiased"), (DDIM_HALF, "ddim_half"), (MOONS, "moons")))
    right = {"loss": debiased, "target": lambda alpha, sigma, d: (-alpha, sigma), "sampler": ddim_half,
             "schedule": Schedule(lambda t: 10 - 20 * t, constant), "dataset": datasets2d.standardised(*moons())}
    wrong = {"loss": lambda *c: debiased(*c) / 2, "target": lambda alpha, sigma, d: (alpha, -sigma),
             "sampler": samplers.ddim, "schedule": Schedule(lambda t: 10 - 19 * t, constant),
             "dataset": datasets2d.standardised(moons()[0], 0.2)}
    monkeypatch.setitem(samplers.EVALUATIONS, "ddim_half", 2)
    for name, (table, row, check) in EXERCISES.items():
        monkeypatch.setitem(table, row, right[name])
        check()
        monkeypatch.setitem(table, row, wrong[name])
        with pytest.raises((AssertionError, ValueError)):
            check()


def test_recipes_typed_into_the_files_work_and_leave_the_tests_green(tmp_path):
    """Each new row is the first of its table; then train and sample with all five, and some tests of every table."""
    root = Path(__file__).parent.parent
    shutil.copytree(root, tmp_path / "project", ignore=shutil.ignore_patterns(".*", "__pycache__", "runs", "data"))
    for file, there, before, after in TYPED:
        path = tmp_path / "project" / file
        text = path.read_text()
        assert text.count(there) == 1
        path.write_text(text.replace(there, f"{before}{there}{after}"))
    calls = """
        import sys, pytest, sample, train
        train.main("--data moons --target diff --loss debiased --schedule sigmoid --epochs 1 --batch-size 25000"
                   " --width 8".split())
        sample.main("--sampler ddim_half --steps 3 --num-samples 100".split())
        tests = [f"tests/test_{name}.py" for name in ("targets", "settings", "exercises")]
        sys.exit(pytest.main(["-q", "-p", "no:cacheprovider", "-k", "not recipes", *tests]))"""
    result = subprocess.run([sys.executable, "-c", textwrap.dedent(calls)], cwd=tmp_path / "project", text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT)           # one process: torch loads once
    out = result.stdout
    assert result.returncode == 0 and "skipped" not in out, out
    assert "moons-diff-debiased-s0: test loss" in out and "covariance distance" in out and " passed" in out, out
