"""The theorems of VDM on closed forms: Gaussian data, quadrature of one axis, equations typed again; their tables."""
import math
from types import SimpleNamespace

import pytest
import torch
from test_slides import CACHES
from torch.testing import assert_close

import kind_points
import losses
import plots
import plots_theorems
import reproduce
import reproduce_theorems
import weightings
from datasets2d import DATASETS, GaussianMixture
from ddpm import SCHEDULES
from learned_schedule import LearnedSchedule

F64 = torch.float64
CLUSTERS, COSINE = DATASETS["clusters"], SCHEDULES["cosine"]
CENTRE, STD = CLUSTERS.centres[-1, 0].item(), CLUSTERS.std[0].item()           # of either axis: +-CENTRE
U = torch.linspace(-9, 9, 3601, dtype=F64)
OWN = reproduce_theorems.draws, reproduce_theorems.information, reproduce_theorems.sides, reproduce_theorems.least_error


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def gaussian(std):
    return GaussianMixture(torch.zeros(1, 2, dtype=F64), torch.full((2,), std, dtype=F64))


def axis(var):
    """Grid and density of one axis of the clusters plus noise of this variance."""
    line = torch.linspace(-8, 8, 16_001, dtype=F64)
    normal = lambda mean: torch.exp(-0.5 * (line - mean)**2 / (STD**2 + var)) / math.sqrt(2 * math.pi * (STD**2 + var))
    return line, normal(CENTRE), normal(-CENTRE)


def entropy(var):
    """Of the clusters plus noise, by quadrature."""
    line, right, left = axis(var)
    p = (right + left) / 2
    return -2 * torch.trapezoid(p * p.clamp(min=1e-300).log(), line).item()


def least_error(logsnr):
    """E|x - E[x | z]|^2 of the clusters, by quadrature: z / alpha has noise of variance 1 / SNR."""
    var = math.exp(-logsnr)
    line, right, left = axis(var)
    shrink = STD**2 / (STD**2 + var)
    x_hat = ((CENTRE + shrink * (line - CENTRE)) * right + (-CENTRE + shrink * (line + CENTRE)) * left) / (right + left
                                                                                                  ).clamp(min=1e-300)
    return 2 * (1 - torch.trapezoid(x_hat**2 * (right + left) / 2, line).item())


# Noise as augmentation

@pytest.mark.parametrize("start", [0.0, 0.7])
def test_by_parts_of_gaussian_data_is_the_weighted_loss(start):
    """N(0, 1): E|eps_hat - eps|^2 is sigmoid(lambda), L(lambda) is half of softplus; `start`: the KL of the prior."""
    softplus = torch.nn.functional.softplus
    bound = start + 0.5 * (softplus(U) - softplus(U[0]))
    for w, closed_end in ((weightings.sigmoid(U), 1 / (1 + math.exp(7))), (torch.exp(-U / 2), math.exp(-4.5)),
                          (weightings.sech(U / 2), weightings.sech(torch.tensor(4.5)).item()), (0 * U + 1, 1.0)):
        right, ends = weightings.augmented(w, bound)
        assert_close(right + ends, torch.trapezoid(0.5 * w * torch.sigmoid(U), U), rtol=1e-5, atol=0)
        assert_close(ends.item(), closed_end * bound[-1].item() - w[0].item() * start, rtol=1e-6, atol=1e-12)
    flat = weightings.augmented(0 * U + 1, bound)
    assert flat[0] == 0 and flat[1] == bound[-1] - start


def test_which_part_of_p_w_is_negative():
    assert weightings.negative(torch.exp(-U)) == 0 and weightings.negative(torch.exp(U)) == 1
    assert math.isnan(weightings.negative(0 * U + 1 + 1e-14 * torch.sin(U)))
    assert weightings.negative(weightings.sech(U / 2)) == pytest.approx(0.5, abs=1e-6)
    assert weightings.negative(torch.tensor([3.0, 1.0, 2.0, 0.0])) == pytest.approx(1 / 5)


@pytest.mark.parametrize("std, factor", [(1.0, 1.0), (0.6, 1.0), (1.0, 1.1)])
def test_the_error_and_the_noisy_bound_of_gaussian_data(std, factor):
    """Data N(0, 1), denoiser of N(0, std^2): the error in closed form, and the bound by the density, its integral."""
    n, p, data = 40_000, gaussian(std), gaussian(1.0)
    x, eps = data.sample(n, generator(1), F64), torch.randn(n, 2, generator=generator(2), dtype=F64)
    c = lambda logsnr: (torch.sigmoid(logsnr), torch.sigmoid(-logsnr))
    alpha_sq, var = c(U)
    k = factor * var / (alpha_sq * std**2 + var)                  # factor eps_hat = k / sigma (alpha x + sigma eps)
    closed = 2 * (k**2 * alpha_sq / var + (k - 1)**2)
    for logsnr in -6.0, -1.0, 2.0, 6.0:
        found = reproduce_theorems.error(p, factor, x, eps, torch.full((n,), logsnr, dtype=F64))
        expected = closed[(U - logsnr).abs().argmin()]
        assert abs(found.mean() - expected) < 4.5 * found.std() / n**0.5
        if factor == 1:
            terms = reproduce_theorems.noisy_bound(p, x, eps, torch.full((n,), logsnr, dtype=F64))
            below = logsnr + 1e-9 > U
            expected = torch.trapezoid(0.5 * closed[below], U[below])
            assert abs(terms.mean() - expected) < 4.5 * terms.std() / n**0.5 + 1e-4


def test_both_sides_on_the_clusters_and_the_numbers_of_an_exact_denoiser():
    found = reproduce_theorems.sides("clusters", "clusters", 1.0, 2000)
    numbers = {"nelbo": 7.1313, "sigmoid": 1.645, "mse of v": 1.6143, "mse of x": 0.9265, "mse of eps": 0.688}
    ends = {"nelbo": 1.0, "sigmoid": 0.004, "mse of v": 0.031, "mse of x": 0.0, "mse of eps": 0.073}
    assert found.keys() == numbers.keys() == reproduce_theorems.WEIGHTS.keys()
    for name, of in found.items():
        for side in "left, quadrature", "left, Monte Carlo", "right, Monte Carlo", "log-density":
            mean, error = of[side]
            assert abs(mean - numbers[name]) < 4.5 * error + 0.001 and error < 0.06 * numbers[name], (name, side)
        assert of["right, quadrature"] == pytest.approx(of["left, quadrature"][0], rel=2e-3)
        assert of["ends"] == pytest.approx(ends[name], abs=0.004)
        assert of["rises"] == pytest.approx(0.5 if name == "mse of eps" else 0.0, abs=0.01)


def test_both_sides_of_wrong_denoisers():
    """1.1 eps_hat, and that of data with other centres: both sides agree, and are larger than the least loss."""
    least = reproduce_theorems.sides("clusters", "clusters", 1.0, 2000)
    for of, factor in ("clusters", 1.1), ("unequal", 1.0):
        for name, found in reproduce_theorems.sides("clusters", of, factor, 1000).items():
            (left, error), (right, more) = found["left, Monte Carlo"], found["right, Monte Carlo"]
            assert abs(left - right) < 4.5 * (error**2 + more**2)**0.5, name
            assert left > least[name]["left, quadrature"][0]
            assert (found["log-density"] is None) == (factor != 1)
            if factor == 1:
                mean, more = found["log-density"]
                assert abs(left - mean) < 4.5 * (error**2 + more**2)**0.5, name


def test_what_noise_leaves_of_the_clusters_by_entropies():
    mean, error = reproduce_theorems.information("clusters", 4000)
    at = lambda logsnr: entropy(math.exp(-logsnr)) - math.log(2 * math.pi * math.e) + logsnr
    assert at(9.0) - math.log1p(math.exp(-9)) == pytest.approx(7.1313, abs=0.002)      # of much noise as of N(0, 1)
    assert abs(mean - 7.1313) < 4.5 * error + 0.002


# T -> 2T

def test_the_least_error_is_that_of_one_axis_twice():
    logsnr, errors = reproduce_theorems.least_error("clusters")
    for u in -8.0, -1.0, 0.0, 2.0, 4.0, 8.0:
        assert errors[(logsnr - u).abs().argmin()].item() == pytest.approx(least_error(u), rel=0.05)


def test_l_t_of_the_exact_denoiser_and_3_110_typed_again():
    """Gaps of the bound with variance `small`, clusters, T = 16, 128 and 1000, found elsewhere by Monte Carlo."""
    exact, offset = reproduce_theorems.DENOISERS.values()
    of = lambda T, name, extra=exact: reproduce_theorems.loss_of(T, SCHEDULES[name], "clusters", extra).item()
    assert of(16, "cosine") - of(128, "cosine") == pytest.approx(3202.7 - 73.8, rel=0.02)
    assert of(128, "cosine") - of(1000, "cosine") == pytest.approx(73.8 - 2.74, rel=0.03)
    assert of(16, "linear") - of(128, "linear") == pytest.approx(191.4 - 11.8, rel=0.02)
    T = 16
    t = 0.001 + 0.998 * torch.arange(2 * T + 1, dtype=F64) / (2 * T)
    logsnr = 2 * torch.log(torch.cos(math.pi / 2 * t) / torch.sin(math.pi / 2 * t))
    for extra, more in (exact, 0 * logsnr), (offset, 2 * 0.5**2 / (1 + torch.exp(4 - logsnr))):
        error = torch.tensor([least_error(u) for u in logsnr.tolist()]) + more
        s, middle, t = slice(0, -1, 2), slice(1, None, 2), slice(2, None, 2)
        terms = 0.5 * (logsnr[s].exp() - logsnr[middle].exp()) * (error[middle] - error[t])           # Eq. (3.110)
        assert of(2 * T, "cosine", extra) - of(T, "cosine", extra) == pytest.approx(terms.sum().item(), rel=0.02)


def test_l_t_of_the_offset_denoiser_is_its_discrete_loss():
    n, T, extra = 20_000, 3, reproduce_theorems.DENOISERS["offset"]
    x, eps = CLUSTERS.sample(n, generator(3), F64), torch.randn(n, 2, generator=generator(4), dtype=F64)

    def model(z, t):
        x_hat = CLUSTERS.denoise(z, COSINE.alpha(t), COSINE.sigma(t))
        return x_hat + 0.5 * torch.sigmoid(COSINE.logsnr(t) - 4).sqrt()[:, None]
    i = torch.arange(n) % T + 1
    terms = 2 * losses.discrete_loss(model, x, i, eps, steps=T, target="x", schedule=COSINE)
    first = terms[i == 1]                                                             # nearly all of it
    expected = reproduce_theorems.loss_of(T, COSINE, "clusters", extra).item()
    assert abs(terms.mean() - expected) < 4.5 * first.std() / len(first)**0.5 / T + 0.01 * expected


def test_doubling_helps_the_exact_denoiser_and_harms_the_other(tmp_path, monkeypatch):
    drawn, figures = {}, []
    monkeypatch.setattr(reproduce_theorems, "SETS", ("clusters",))
    original = plots_theorems.doubling
    monkeypatch.setattr(plots_theorems, "doubling", lambda panels, path: (drawn.update(panels), original(panels, path)))
    monkeypatch.setattr(plots_theorems, "save", lambda fig, path: figures.append(fig))
    learned = LearnedSchedule(COSINE.ends(1e-3), 1e-3)
    runs = {("clusters", "v", "nelbo", 0): SimpleNamespace(schedule=learned, config={"data": "clusters"})}
    study = SimpleNamespace(trained=lambda recipe, data, target: runs,
                            measured=lambda runs, part, measure: {key: measure(one) for key, one in runs.items()})
    reproduce_theorems.fig_doubling(study, tmp_path)
    assert [*drawn["clusters"]] == [(name, denoiser) for name in ("cosine", "learned")
                                    for denoiser in ("exact", "offset")]
    assert not torch.equal(drawn["clusters"]["cosine", "exact"][1], drawn["clusters"]["learned", "exact"][1])
    for (_, denoiser), (T, change) in drawn["clusters"].items():
        assert T[0] == 1 and T[-1] == 4096
        assert (change > 0).all() if denoiser == "exact" else (change[4:] < 0).all() and change[0] > 0
    lines = figures[0].axes[0].get_lines()
    assert [line.get_linestyle() for line in lines] == ["-", "--"] * 4
    shown = [torch.tensor(line.get_ydata()).isfinite().sum().item() for line in lines]
    assert shown[:2] == shown[4:6] == [13, 0]
    assert all(falls + grows == 13 for falls, grows in zip(shown[::2], shown[1::2]))
    plots_theorems.plt.close("all")


# The tables

def test_the_tables_from_a_small_study(tmp_path, monkeypatch, capsys):
    for function in (*CACHES, *OWN):
        function.cache_clear()
    monkeypatch.setattr(plots, "DPI", 20)
    monkeypatch.setattr(kind_points, "POINTS", 5000)
    for name, value in dict(SETS=("clusters",), POINTS=4000, BATCH=400, EVALUATIONS=6,
                            ENDS=[(-12.9, 3.0), (-3.0, 12.9)],
                            CASES=[("clusters", "1.1 eps_hat", "clusters", 1.1, 200)]).items():
        monkeypatch.setattr(reproduce_theorems, name, value)
    monkeypatch.setitem(reproduce_theorems.TRAINED, "data", ("clusters",))
    make = lambda name, *more: reproduce.main([
        name, "--seeds", "1", "--epochs", "1", "--num-samples", "2000", "--device", "cpu", "--runs",
        str(tmp_path / "runs"), "--out", str(tmp_path), *more])

    def cells(name, *more):
        make(name, *more)
        text = (tmp_path / "vdm" / f"{name}.md").read_text()
        return [[c.strip() for c in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|")][2:]
    table = cells("invariance")
    assert [row[1] for row in table] == [*reproduce_theorems.SHOWN, "learned"]
    for row in table:
        mean, error = map(float, row[2].split(" +- "))
        assert abs(mean - 7.131) < 5 * error and error < 1
        assert float(row[4]) > 6 and (row[1] == "cosine") == (row[6] == "-")
        assert row[1] == "cosine" or abs(float(row[6])) < 8 * float(row[5]) + 0.01
    assert float(table[3][3]) < float(table[0][3]) < float(table[1][3])               # ve, cosine, linear
    assert float(table[5][3]) < 0.6 * float(table[0][3])       # after an epoch learned is still nearly that of ve
    assert cells("invariance", "--recorded") == table
    samples = cells("invariance-samples")
    assert [row[:3] for row in samples] == [*(["clusters", "t", name] for name in reproduce_theorems.SHOWN),
                                            ["clusters", "logsnr", "all"], ["clusters", "floor", ""]]
    assert samples[0][-1] == "0" and float(samples[3][-1]) > 0.01 and float(samples[5][-1]) < 0.01
    assert cells("invariance-samples", "--recorded") == samples
    (_, _, cosine, ve, prior, _, _, _), (_, _, _, small, late, *_) = cells("edges")
    alpha_sq, var = 1 / (1 + math.exp(-3)), math.exp(-3)
    gain = entropy(var) - entropy(0.0)
    assert float(ve) == pytest.approx(gain, abs=0.08)
    assert float(cosine) == pytest.approx(gain + math.log(alpha_sq), abs=0.08)      # h(alpha x) = h(x) + 2 log alpha
    assert abs(float(small)) < 0.01 and float(prior) < 1e-3
    assert float(late) == pytest.approx(math.log1p(math.exp(-3)), abs=1e-3)         # E x^2 = 1: softplus / 2 an axis
    (*_, rises), = [row for row in cells("augmentation") if row[2] == "mse of eps"]
    assert rises == "50 %"
    make("doubling")
    assert (tmp_path / "vdm" / "doubling.png").exists()
    capsys.readouterr()
    for function in (*CACHES, *OWN):
        function.cache_clear()
