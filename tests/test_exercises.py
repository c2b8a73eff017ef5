"""The README's exercises check themselves: each test is skipped until its row is there, then tells right from wrong.

    pytest -k exercise -rs       # which are open

The last test solves them all, and spoils each, to see that the checks can pass and fail.
"""
import math

import pytest
import torch
from torch.testing import assert_close

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
    """By Hang et al. the weight on the error of x_hat is min(SNR, 5), so on that of eps_hat min(SNR, 5) / SNR."""
    snr = ALPHA**2 / SIGMA**2
    for target, on_x in ("x", torch.ones_like(T)), ("eps", 1 / snr), ("v", SIGMA**2), ("s", SIGMA**4 / ALPHA**2):
        assert_close(losses.weight("min_snr", target, T, SCHEDULES["cosine"]), snr.clamp(max=5) * on_x)


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


EXERCISES = {"loss": (losses.LOSSES, "min_snr", check_loss), "target": (targets.TARGETS, "diff", check_target),
             "sampler": (samplers.SAMPLERS, "ddim_half", check_sampler),
             "schedule": (SCHEDULES, "sigmoid", check_schedule)}


@pytest.mark.parametrize("name", EXERCISES)
def test_exercise(name):
    table, row, check = EXERCISES[name]
    if row not in table:
        pytest.skip(f"exercise {name}: add a row {row!r}, see README.md")
    check()


def min_snr(target, alpha, sigma, det, dlogsnr):
    return torch.clamp((alpha / sigma)**2, max=5) * (sigma / det)**2


def ddim_half(denoise, z, times, schedule, noise):
    for t, s in zip(times, times[1:]):
        m = (t + s) / 2
        x_hat, eps_hat = denoise(z, t)
        x_hat, eps_hat = denoise(schedule.alpha(m) * x_hat + schedule.sigma(m) * eps_hat, m)
        z = schedule.alpha(s) * x_hat + schedule.sigma(s) * eps_hat
    return denoise(z, times[-1])[0]


def test_the_exercises_can_be_solved_and_failed(monkeypatch):
    from ddpm import Schedule
    constant = lambda t: torch.full_like(t, -20.0)
    right = {"loss": min_snr, "target": lambda alpha, sigma, d: (-alpha, sigma), "sampler": ddim_half,
             "schedule": Schedule(lambda t: 10 - 20 * t, constant)}
    wrong = {"loss": lambda *c: min_snr(*c) / 2, "target": lambda alpha, sigma, d: (alpha, -sigma),
             "sampler": samplers.ddim, "schedule": Schedule(lambda t: 10 - 19 * t, constant)}
    monkeypatch.setitem(samplers.EVALUATIONS, "ddim_half", 2)
    for name, (table, row, check) in EXERCISES.items():
        monkeypatch.setitem(table, row, right[name])
        check()
        monkeypatch.setitem(table, row, wrong[name])
        with pytest.raises((AssertionError, ValueError)):
            check()
