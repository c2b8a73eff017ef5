"""Weights of log-SNR against Kingma and Gao's Table 1 typed again, closed forms at both ends, and integrals over t."""
import itertools
import json
import math
import runpy

import numpy as np
import pytest
import torch
from test_ddpm import every_schedule
from test_losses import COSINE, TARGETS, x_factor
from torch.testing import assert_close

import conflicts
import kind_images
import kind_points
import losses
import optimum
import plots
import plots_weightings
import reproduce
import reproduce_vdm
import run
import targets
import train
import weightings
from ddpm import SCHEDULES

F64 = torch.float64
GRID = torch.linspace(-12.9, 12.9, 259, dtype=F64)               # where the cosine schedule is in training
SECH = lambda x: 2 / (x.exp() + (-x).exp())
NORMAL = torch.distributions.Normal(torch.tensor(2.4, dtype=F64), 2.4)

# Kingma and Gao 2023, Table 1, the factor 1 / pi included; EDM with data of variance 1.
TABLE_1 = {
    "elbo": lambda u: 0 * u + 1,
    "sigmoid": lambda u: 1 / (1 + torch.exp(u - 2)),
    "edm": lambda u: 2 * NORMAL.log_prob(u).exp() * (torch.exp(-u) + 1),
    "simple": lambda u: SECH(u / 2) / math.pi,
    "min_snr": lambda u: SECH(u / 2) / math.pi * torch.minimum(torch.ones_like(u), 5 * torch.exp(-u)),
    "soft_min_snr": lambda u: SECH(u / 2) / math.pi * 5 / (5 + torch.exp(u)),
    "trunc_snr": lambda u: SECH(u / 2) / math.pi * torch.maximum(torch.ones_like(u), torch.exp(-u)),
    "p2": lambda u: SECH(u / 2) / math.pi / (1 + torch.exp(u)),
}
DENSITIES = {   # p(log-SNR) of t uniform; its range
    "cosine": (lambda u: SECH(u / 2) / (2 * math.pi), -12.9, 12.9),
    "flow": (lambda u: SECH(u / 4)**2 / 8, -12.9, 12.9),
    "edm": (lambda u: NORMAL.log_prob(u).exp(), -8.0, 12.0),
    "ve": (lambda u: 0 * u + 1 / (2 * math.log(5000)), -7.8, 9.2),
    "linear": (lambda u: 1 / ((0.01 + 39.8 * torch.log1p(torch.exp(-u))).sqrt() * (1 + torch.exp(u))), -10.0, 12.9),
}


def span(name, n=21):
    """log-SNR over what the schedule has of +-12.9, ends included."""
    low, high = SCHEDULES[name].ends(1e-6)
    return torch.linspace(max(low, -12.9), min(high, 12.9), n, dtype=F64)


def test_the_rows_are_table_1():
    assert weightings.WEIGHTINGS.keys() == TABLE_1.keys() | {"edm_monotonic"}
    for name, expected in TABLE_1.items():
        assert_close(weightings.WEIGHTINGS[name](GRID), expected(GRID), rtol=1e-9, atol=0)


def test_edm_monotonic_is_edm_with_its_maximum_below_the_peak():
    u = torch.linspace(-15, 15, 300_001, dtype=F64)
    w = TABLE_1["edm"](u)
    largest_from_here = w.flip(0).cummax(0).values.flip(0)
    assert_close(weightings.WEIGHTINGS["edm_monotonic"](u), largest_from_here, rtol=1e-9, atol=0)


def test_monotonic_is_what_a_fine_grid_says():
    u = torch.linspace(-30, 30, 60_001, dtype=F64)
    assert weightings.MONOTONIC.keys() == weightings.WEIGHTINGS.keys()
    for name, w in weightings.WEIGHTINGS.items():
        steps = w(u).log().diff()
        assert (steps.max() < 1e-12) == weightings.MONOTONIC[name] == weightings.falls(w(u)), name
        assert weightings.MONOTONIC[name] or steps.max() > 1e-5
    assert weightings.falls(torch.tensor([3.0, 3.0, 1.0])) and not weightings.falls(torch.tensor([3.0, 1.0, 1.001]))


@every_schedule
def test_the_density_is_one_over_the_slope_and_has_mass_one(name):
    schedule, u = SCHEDULES[name], span(name, 2001)
    p = weightings.density(schedule, u)
    t = torch.tensor([0.02, 0.3, 0.6, 0.97], dtype=F64)
    middle = schedule.logsnr(t)
    slope = (schedule.logsnr(t + 1e-6) - schedule.logsnr(t - 1e-6)) / 2e-6
    assert_close(weightings.density(schedule, middle), -1 / slope, rtol=1e-6, atol=0)
    first, last = schedule.t(u[[0, -1]]).tolist()
    assert_close(torch.trapezoid(p, u).item(), first - last, rtol=1e-5, atol=0)
    if name in DENSITIES:
        closed, low, high = DENSITIES[name]
        ends = torch.linspace(low, high, 101, dtype=F64)
        assert_close(weightings.density(schedule, ends), closed(ends), rtol=1e-7, atol=0)


@every_schedule
@pytest.mark.parametrize("target", TARGETS)
def test_nelbo_has_weight_one_for_every_target_and_schedule(name, target):
    u = span(name)
    assert_close(weightings.implied("nelbo", target, SCHEDULES[name], u), torch.ones_like(u), rtol=1e-9, atol=0)


CLOSED = [      # Kingma and Gao 2023, Table 1, and the docstring, with their factors
    ("mse", "eps", "cosine", lambda u: SECH(u / 2) / math.pi),
    ("mse", "v", "cosine", lambda u: 2 / math.pi * torch.exp(-u / 2)),
    ("mse", "F", "cosine", lambda u: 2 / math.pi * torch.exp(-u / 2)),
    ("mse", "x", "cosine", lambda u: torch.exp(-u) * SECH(u / 2) / math.pi),
    ("mse", "s", "cosine", lambda u: 2 / math.pi * torch.exp(u / 2)),
    ("mse", "u", "cosine", lambda u: (1 + torch.exp(-u / 2))**2 * SECH(u / 2) / math.pi),
    ("mse", "u", "flow", lambda u: torch.exp(-u / 2)),
    ("mse", "eps", "flow", lambda u: SECH(u / 4)**2 / 4),
    ("mse", "x", "flow", lambda u: torch.exp(-u) * SECH(u / 4)**2 / 4),                             # InDI
    ("mse", "F", "edm", TABLE_1["edm"]),
    ("mse", "eps", "ve", lambda u: 0 * u + 1 / math.log(5000)),
    ("mse", "s", "ve", lambda u: torch.exp(u) / math.log(5000)),
    ("mse", "v", "ve", lambda u: (1 + torch.exp(-u))**2 / math.log(5000)),
    ("mse", "eps", "linear", lambda u: 2 * DENSITIES["linear"][0](u)),
    ("rescaled", "s", "cosine", lambda u: torch.exp(-u) * SECH(u / 2) / math.pi),
    ("nelbo_stable", "v", "cosine", lambda u: 2 / math.pi / (1 + 0.01 * torch.exp(u / 2) * (1 + torch.exp(-u)).sqrt())),
]


@pytest.mark.parametrize("loss, target, name, closed", CLOSED)
def test_implied_weights_in_closed_form_at_both_ends(loss, target, name, closed):
    _, low, high = DENSITIES[name]
    u = torch.linspace(low, high, 101, dtype=F64)
    assert_close(weightings.implied(loss, target, SCHEDULES[name], u), closed(u), rtol=1e-7, atol=0)


@every_schedule
def test_a_row_has_its_weight_whatever_the_target(name):
    """Defined by w with every schedule; a factor of the error of eps_hat: 2 p(lambda) times it, with cosine Table 1."""
    u = span(name)
    for target in TARGETS:
        implied = lambda loss: weightings.implied(loss, target, SCHEDULES[name], u)              # noqa: B023
        for loss in "sigmoid", "edm", "edm_monotonic":
            assert_close(implied(loss), weightings.WEIGHTINGS[loss](u), rtol=1e-8, atol=0)
        twice_p = -2 / SCHEDULES[name].dlogsnr(SCHEDULES[name].t(u))
        for loss, factor in {"simple": 0 * u + 1, "min_snr": torch.exp(u).clamp(max=5) / torch.exp(u),
                             "soft_min_snr": 1 / (1 + torch.exp(u) / 5), "p2": 1 / (1 + torch.exp(u)),
                             "trunc_snr": torch.exp(u).clamp(min=1) / torch.exp(u)}.items():
            assert_close(implied(loss), twice_p * factor, rtol=1e-8, atol=0)
            if name == "cosine":
                assert_close(implied(loss), weightings.WEIGHTINGS[loss](u), rtol=1e-8, atol=0)


@every_schedule
def test_a_space_is_mse_of_its_target(name):
    u = span(name)
    for loss, of in ("rescaled", "x"), ("simple", "eps"), ("v_space", "v"), ("u_space", "u"), ("s_space", "s"):
        expected = weightings.implied("mse", of, SCHEDULES[name], u)
        for target in TARGETS:
            assert_close(weightings.implied(loss, target, SCHEDULES[name], u), expected, rtol=1e-8, atol=0)


@every_schedule
def test_the_mean_over_t_is_half_the_integral_over_log_snr(name):
    """VDM 4.113, by two quadratures, for a made-up error of eps_hat; every loss, and mse of every target."""
    schedule, t_min = SCHEDULES[name], 0.02
    nodes, weights = (torch.tensor(c) for c in np.polynomial.legendre.leggauss(300))
    low, high = schedule.ends(t_min)
    t, u = 0.5 + (0.5 - t_min) * nodes, (low + high) / 2 + (high - low) / 2 * nodes
    error = lambda u: 0.3 + torch.sin(0.7 * u)**2 / (1 + torch.exp(0.3 * u))
    alpha, sigma = schedule.alpha(t), schedule.sigma(t)
    pairs = [("mse", target) for target in TARGETS] + list(zip(
        ["rescaled", "v_space", "u_space", "s_space", "nelbo", *weightings.ROWS], itertools.cycle(TARGETS)))
    for loss, target in pairs:
        of_target = sigma**2 / alpha**2 / x_factor(target, alpha, sigma) * error(schedule.logsnr(t))
        mean = ((0.5 - t_min) * weights * losses.weight(loss, target, t, schedule) * of_target).sum()
        integral = ((high - low) / 4 * weights * weightings.implied(loss, target, schedule, u) * error(u)).sum()
        assert_close(mean, integral, rtol=3e-4, atol=0)


@every_schedule
def test_weights_in_float32_are_those_of_float64(name):
    t = torch.tensor([1e-3, 0.1, 0.5, 0.9, 0.999], dtype=F64)
    for target in TARGETS:
        for loss in "v_space", "u_space", "s_space", *weightings.ROWS:
            single = losses.weight(loss, target, t.float(), SCHEDULES[name])
            assert single.dtype == torch.float32
            assert_close(single.double(), losses.weight(loss, target, t, SCHEDULES[name]), rtol=2e-3, atol=0)


@pytest.mark.parametrize("loss, target, name, at, message", [
    ("mse", "v", "ve", 9.3, "has log-SNR from -7.824 to 9.21 - take values between"),
    ("mse", "v", "linear", -10.1, "has log-SNR from -10.05 to inf"), ("foo", "v", "cosine", 0.0, "unknown loss 'foo'"),
    ("mse", "foo", "cosine", 0.0, "unknown target 'foo'"), ("vlb", "v", "cosine", 0.0, "of a discrete chain"),
    ("mse", "mu", "cosine", 0.0, "mean of a step of a discrete chain"),
    ("nelbo_stable", "eps", "ve", 0.0, "cosine schedule alone"), ("nelbo_stable", "u", "cosine", 0.0, "no weight for")])
def test_what_has_no_weight_says_so(loss, target, name, at, message):
    with pytest.raises(ValueError, match=message):
        weightings.implied(loss, target, SCHEDULES[name], torch.tensor([0.0, at], dtype=F64))


def test_a_target_without_a_finite_weight_is_refused(monkeypatch, capsys):
    """A row in the direction of z has determinant 0: x cannot be had from it."""
    monkeypatch.setitem(targets.TARGETS, "z", lambda alpha, sigma, d: (alpha, sigma))
    config = vars(train.parse(["--epochs", "1"])) | {"target": "z", "loss": "sigmoid"}
    assert conflicts.conflict(config) == ("--loss sigmoid has no finite weight for target z with schedule cosine - "
                                          "take mse, or a larger --t-min")
    assert conflicts.conflict(config | {"loss": "mse"}) is None
    for some in (lambda alpha: alpha > 0.01), (lambda alpha: alpha < 0.999):               # det 0 at one end alone
        monkeypatch.setitem(targets.TARGETS, "z", lambda alpha, sigma, d: (1.0 * some(alpha), 0.0))     # noqa: B023
        assert "no finite weight" in conflicts.conflict(config)
    with pytest.raises(SystemExit) as stop:
        train.main(["--target", "z", "--loss", "sigmoid"])
    assert stop.value.code == 2 and "no finite weight for target z" in capsys.readouterr().err


# In training

@pytest.mark.parametrize("loss", ["sigmoid", "edm_monotonic", "p2", "v_space"])
def test_the_optimum_of_such_a_loss_is_one_number_for_all_targets(loss, monkeypatch):
    """1/2 integral of w(lambda) E |eps - E[eps | z]|^2, here a mean over the test points, typed again."""
    monkeypatch.setattr(kind_points, "POINTS", 2000)
    for cached in optimum.optimal_predictions, optimum.optimal_errors:
        cached.cache_clear()
    found = {}
    for target in "x", "eps", "v", "s", "u":
        config = dict(data="clusters", target=target, loss=loss, schedule="flow", t_min=1e-3, stabiliser=0.0, seed=0,
                      timesteps=None)
        z, t, y, weights = optimum.test_batch(config)
        found[target] = optimum.optimum(config, weights)[0]
    for cached in optimum.optimal_predictions, optimum.optimal_errors:
        cached.cache_clear()
    t, z, u = t.double(), z.double(), y.double()
    x, alpha, sigma = z - t[:, None] * u, 1 - t, t
    x_hat = kind_points.dataset(config).denoise(z, alpha, sigma)
    logsnr = 2 * torch.log(alpha / sigma)
    w = {"sigmoid": TABLE_1["sigmoid"](logsnr) / (t * (1 - t)),                  # -dlogsnr / 2 = 1 / (t (1 - t))
         "edm_monotonic": TABLE_1["edm"](logsnr.clamp(min=-3.11532)) / (t * (1 - t)),
         "p2": 1 / (1 + alpha**2 / sigma**2), "v_space": (alpha**2 + sigma**2)**2 / alpha**2}[loss]
    expected = (w * (alpha / sigma)**2 * (x_hat - x).square().mean(1)).mean().item()
    assert found == pytest.approx(dict.fromkeys(found, expected), rel=2e-3)


def test_a_run_on_points_trains_on_such_a_loss(tmp_path):
    train.main(["--data", "clusters", "--target", "v", "eps", "--loss", "sigmoid", "min_snr", "--schedule", "flow",
                "--epochs", "1", "--batch-size", "25000", "--width", "8", "--device", "cpu", "--out", str(tmp_path)])
    for target in "v", "eps":
        folder = tmp_path / f"clusters-{target}-sigmoid-s0"
        last = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
        assert run.load(folder)["config"]["loss"] == "sigmoid"
        assert math.isfinite(last["train_loss"]) and last["test_loss"] > last["optimum"] > 0
    assert (tmp_path / "clusters-v-min_snr-s0").exists()


def test_images_have_such_a_loss_and_four_tests():
    data, config = torch.randint(0, 256, (40, 1, 4, 4), dtype=torch.uint8), dict(
        data="mnist", target="v", loss="sigmoid", seed=0, schedule="cosine", t_min=1e-3, stabiliser=0.0)
    seen = []

    def model(z, t):
        seen.append((z, t))
        return torch.zeros_like(z)
    result = kind_images.test(model, data, config, torch.device("cpu"))
    (_, t), = seen
    assert result.keys() == {"test_loss", "test_mse", "test_rescaled", "test_nelbo", "test_nelbo_stable"}
    w = losses.weight("sigmoid", "v", t, COSINE)
    logsnr = 2 * torch.log(torch.cos(math.pi / 2 * t) / torch.sin(math.pi / 2 * t))
    assert_close(w, TABLE_1["sigmoid"](logsnr) * losses.weight("nelbo", "v", t, COSINE), rtol=1e-3, atol=0)
    assert 0 < result["test_loss"] < result["test_nelbo"]
    prediction, y = torch.zeros(40, 1, 4, 4), torch.ones(40, 1, 4, 4)
    assert_close(kind_images.loss(prediction, y, t, y, w, config), w)


# Figures and script

def test_the_figures_show_every_weight_and_density(tmp_path, monkeypatch):
    drawn = {}
    monkeypatch.setattr(plots, "DPI", 30)
    for name in "over_logsnr", "densities":
        original = getattr(plots_weightings, name)
        monkeypatch.setattr(plots_weightings, name, lambda curves, path, original=original: (
            drawn.update({path.stem: curves}), original(curves, path)))
    for name in "weights", "densities":
        reproduce.main([name, "--device", "cpu", "--runs", str(tmp_path / "runs"), "--out", str(tmp_path)])
        assert (tmp_path / "vdm" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    index = (tmp_path / "vdm" / "index.md").read_text()
    assert all(f"[{name}.png]({name}.png): {title}." in index 
               for name, (_, title) in reproduce_vdm.RESULTS.items() if name in drawn)
    weights = drawn["weights"]
    assert [title.split(";")[0] for title in weights] == [
        *(f"mse of {target}" for target in TARGETS), "any target and schedule", "any target, cosine schedule"]
    u, w = weights["mse of v; v_space"]["cosine"]
    assert u[0] == -10 and u[-1] == 10
    assert_close(w, 2 / math.pi * torch.exp(-u / 2), rtol=1e-7, atol=0)
    u, w = weights["mse of x; rescaled"]["nelbo_stable"]
    alpha, sigma = torch.sigmoid(u).sqrt(), torch.sigmoid(-u).sqrt()
    assert_close(w, SECH(u / 2) / math.pi * sigma**2 / alpha**2 * alpha / (sigma**3 + 0.01), rtol=1e-7, atol=0)
    for title, table in ("any target and schedule", weightings.OF_LOGSNR), (
            "any target, cosine schedule", weightings.OF_EPS):
        assert weights[title].keys() == table.keys()
        for name, (u, w) in weights[title].items():
            assert_close(w, weightings.WEIGHTINGS[name](u))
    assert drawn["densities"].keys() == SCHEDULES.keys()
    u, p = drawn["densities"]["ve"]
    assert u[0] > -7.83 and u[-1] < 9.22 and len(u) > 100
    assert_close(p, torch.full_like(p, 1 / (2 * math.log(5000))))


def test_lines_are_dashed_where_a_weight_rises_and_scaled_to_one_at_0(tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(plots_weightings, "save", lambda fig, path: figures.append(fig))
    u = torch.linspace(-10, 10, 21, dtype=F64)
    plots_weightings.over_logsnr({"a": {"cosine": (u, 3 * torch.exp(-u))}, "b": {"up": (u, 5 * torch.exp(u)),
                                                                                 "flat": (u, 2 + 0 * u)}}, tmp_path)
    (falling,), (rising, flat) = (ax.get_lines() for ax in figures[0].axes[:2])
    assert [line.get_linestyle() for line in (falling, rising, flat)] == ["-", "--", "-"]
    assert_close(torch.tensor(falling.get_ydata()), torch.exp(-u))
    assert_close(torch.tensor(flat.get_ydata()), 1 + 0 * u)
    plots_weightings.plt.close("all")


def test_the_script_shows_its_table(capsys):
    runpy.run_path(weightings.__file__, run_name="__main__")
    lines = {line[:22].strip(): line[22:].split() for line in capsys.readouterr().out.splitlines()}
    assert lines.keys() == {"log-SNR", "mse of x, cosine", "mse of eps, cosine", "mse of v, cosine", "mse of s, cosine",
                            "mse of u, flow", *weightings.WEIGHTINGS}
    assert lines["mse of u, flow"] == [f"{math.exp(-u / 2):.3g}" for u in range(-8, 9, 2)] + ["True"]
    assert all(lines[name][-1] == str(monotonic) for name, monotonic in weightings.MONOTONIC.items())
