"""The bound and the ODE against closed forms, quadrature, scipy and the exact density of the data."""
import csv
import json
import math
import shutil

import numpy as np
import pytest
import torch
from scipy import stats
from test_ddpm import alpha_sigma, every_schedule
from torch import distributions
from torch.testing import assert_close

import decoders
import images
import importance
import kind_images
import kind_points
import likelihood
import losses
import run
import train
import unet
from datasets2d import DATASETS, GaussianMixture, rings, standardised, swiss_roll, waves
from ddpm import SCHEDULES

F64 = torch.float64
COSINE = SCHEDULES["cosine"]
COARSE = {"clusters": DATASETS["clusters"], "rings": standardised(*rings(100)),
          "swiss_roll": standardised(*swiss_roll(150)), "waves": standardised(*waves(100))}      # fewer centres: faster
seed = lambda n: torch.Generator().manual_seed(n)
at = lambda name, t: alpha_sigma(name, torch.tensor([t], dtype=F64))


LEVELS = torch.linspace(-1, 1, 256, dtype=F64)


@every_schedule
@pytest.mark.parametrize("uniform", ["logsnr", "uniform"])
def test_t_is_drawn_uniformly_in_what_was_asked_and_its_importance_is_right(name, uniform):
    schedule, n = SCHEDULES[name], 20_000
    t, importance = losses.draw_t((3, n), schedule, 0.01, uniform, seed(0), F64)
    assert t.shape == importance.shape == (3, n) and 0.01 <= t.min() and t.max() <= 0.99
    alpha, sigma = alpha_sigma("ve", t) if name == "ve" else (schedule.alpha(t), schedule.sigma(t))
    value = (alpha / sigma).log() if uniform == "logsnr" else t
    ends = (schedule.alpha(c) / schedule.sigma(c) for c in torch.tensor([0.99, 0.01], dtype=F64))
    low, high = (c.log().item() for c in ends) if uniform == "logsnr" else (0.01, 0.99)
    assert_close(((value - low) / (high - low)).sort(1).values,
                 ((torch.arange(n) + 0.5) / n).double().expand(3, n), rtol=0, atol=1.01 / n)
    for power in 0, 2, 5:                                             # the mean of f(t) times it is that over t uniform
        expected = (0.99**(power + 1) - 0.01**(power + 1)) / (power + 1) / 0.98
        assert abs((t**power * importance).mean() - expected) < 1e-3
    assert losses.draw_t((4,), schedule, density=uniform)[0].dtype == torch.float32
    assert uniform == "logsnr" or (importance == 1).all()             # exactly: training with t uniform is untouched
    with pytest.raises(ValueError, match="unknown density of t 'x': choose from uniform, logsnr"):
        losses.draw_t((4,), schedule, density="x")


def exact_bound(data, x, name="cosine", t_min=1e-3, **options):
    objective = dict(target="eps", schedule=SCHEDULES[name], t_min=t_min, **options)
    return likelihood.bound(data.optimal_model("eps", SCHEDULES[name]), x, **objective)


def level(data, x, name="cosine", t_min=1e-3):
    """What the bound with the exact denoiser is on average in continuous time, by the density alone, for each x.

    The entropy of z_0, as q(z_0 | x) / p(x | z_0) is alpha^D, and the KL of q(z_1) from p(z_1): the truncation at both
    ends.
    """
    g, terms = seed(9), 0
    for _ in range(20):
        alpha, sigma = at(name, t_min)
        z = alpha * x + sigma * torch.randn(x.shape, generator=g, dtype=F64)
        terms = terms - data.log_prob(z, alpha, sigma) - 2 * alpha.log()
        alpha, sigma = at(name, 1 - t_min)
        z = alpha * x + sigma * torch.randn(x.shape, generator=g, dtype=F64)
        terms = terms + data.log_prob(z, alpha, sigma) \
            - distributions.Normal(0, (alpha**2 + sigma**2).sqrt()).log_prob(z).sum(1)
    return terms / 20


@pytest.mark.parametrize("data", COARSE)
def test_the_bound_with_the_exact_denoiser_is_the_entropy(data):
    """Within its Monte Carlo error, plus the truncation at t_min, which is at most 0.002 nats here."""
    mixture = COARSE[data]
    x = mixture.sample(4000, seed(0), F64)
    terms = exact_bound(mixture, x, draws=48, generator=seed(1))
    total = terms["prior"] + terms["reconstruction"] + terms["diffusion"]
    gap, truncation = total - level(mixture, x), level(mixture, x) + mixture.log_prob(x)
    assert abs(gap.mean()) < 3.5 * gap.std() / 4000**0.5 < 0.2
    assert abs(truncation.mean()) < 0.002
    assert terms["prior"].mean() < 1e-5 and abs(terms["error"].square().mean().sqrt() / gap.std() - 1) < 0.2


@pytest.mark.parametrize("name, data, t_min", [("cosine", "clusters", 0.05), ("linear", "waves", 0.02),
                                               ("ve", "rings", 0.2)])
def test_the_bound_on_other_schedules_and_with_a_truncation_that_counts(name, data, t_min):
    mixture = COARSE[data]
    x = mixture.sample(4000, seed(0), F64)
    known = level(mixture, x, name, t_min)
    assert (known + mixture.log_prob(x)).mean() > 0.02                     # the truncation
    for uniform in "logsnr", "t":
        terms = exact_bound(mixture, x, name, t_min, draws=32, uniform=uniform, generator=seed(1))
        gap = terms["prior"] + terms["reconstruction"] + terms["diffusion"] - known
        assert abs(gap.mean()) < 3.5 * gap.std() / 4000**0.5 < 0.15


def test_the_discrete_bound_falls_to_the_continuous_one_as_T_doubles():
    """VDM 3.111. The gap is as 1 / T for large T, and larger the smaller t_min."""
    data = COARSE["clusters"]
    x = data.sample(2000, seed(0), F64)
    for t_min, last in (1e-3, 5), (0.05, 0.1):
        continuous = level(data, x, t_min=t_min).mean()
        gaps = []
        for T in 16, 32, 64, 128, 256, 512, 1024, 2048:
            terms = exact_bound(data, x, t_min=t_min, steps=T, draws=max(100, T // 4), generator=seed(1))
            gaps.append((terms["prior"] + terms["reconstruction"] + terms["diffusion"]).mean() - continuous)
        assert all(b < 0.75 * a for a, b in zip(gaps[:5], gaps[1:5])) and all(b < a for a, b in zip(gaps, gaps[1:]))
        assert 0 < gaps[-1] < last


@pytest.mark.parametrize("T", [1, 3])
def test_the_discrete_bound_of_a_wrong_model_is_the_sum_of_its_kl_terms(T):
    """Eq. (3.15) - (3.18), KL of posteriors with x and with x_hat = 0.5 z, on t_i = t_min + (1 - 2 t_min) i / T."""
    x, t_min = torch.tensor([[0.7, -1.2]], dtype=F64), 0.05
    expected, nodes = 0, np.polynomial.hermite_e.hermegauss(9)
    for i in range(1, T + 1):
        s, t = (torch.tensor([t_min + (1 - 2 * t_min) * k / T], dtype=F64) for k in (i - 1, i))
        (alpha_s, sigma_s), (alpha_t, sigma_t) = alpha_sigma("cosine", s), alpha_sigma("cosine", t)
        covariance = alpha_t / alpha_s * sigma_s**2
        var = sigma_s**2 - covariance**2 / sigma_t**2
        for eps, weight in zip(nodes[0], nodes[1] / nodes[1].sum()):  # both dimensions alike: the KL is a sum over them
            z = alpha_t * x + sigma_t * eps
            mean = [alpha_s * c + covariance / sigma_t**2 * (z - alpha_t * c) for c in (x, 0.5 * z)]
            expected = expected + weight * distributions.kl_divergence(
                *(distributions.Normal(m, var.sqrt()) for m in mean)).sum()
    found = likelihood.bound(lambda z, t: 0.5 * z, x.expand(50_000, 2), target="x", schedule=COSINE, steps=T, draws=4,
                             t_min=t_min, generator=seed(0))["diffusion"]
    assert abs(found.mean() - expected) < 4 * found.std() / 50_000**0.5


def test_the_terms_of_images_and_the_error():
    """Sums over all pixels, a mean over the draws, and the standard error of the draws."""
    x = LEVELS[torch.randint(256, (3, 2, 4, 4), generator=seed(0))]
    found = likelihood.bound(lambda z, t: 0 * z, x, target="eps", schedule=COSINE,
                             decoder=decoders.discretised, draws=4000, generator=seed(1))
    low, high = COSINE.ends(1e-3)
    assert_close(found["diffusion"], torch.full((3,), 32 * 0.5 * (high - low), dtype=F64), rtol=0.02, atol=0)
    spread = 0.5 * (high - low) * 64**0.5                                  # of the sum of 32 squared normals
    assert_close(found["error"], torch.full((3,), spread / 4000**0.5, dtype=F64), rtol=0.06, atol=0)
    std, inner = math.exp(-high / 2), (x.abs() < 1)
    assert inner.all()
    e, h = np.linspace(-8, 0, 4001), 1 / 255 / std       # E over eps of -log(Phi(h - eps) - Phi(-h - eps)), even in eps
    pixel = -2 * (stats.norm.pdf(e) * np.log(stats.norm.cdf(h + e) - stats.norm.cdf(-h + e))).sum() * 0.002
    assert_close(found["reconstruction"], torch.full((3,), 32 * pixel, dtype=F64), rtol=0.03, atol=0)
    assert set(found) == {"prior", "reconstruction", "diffusion", "error"}


def test_uniform_log_snr_has_the_smaller_variance():
    data = DATASETS["clusters"]
    x = data.sample(2000, seed(0), F64)
    errors = {uniform: exact_bound(data, x, uniform=uniform, draws=64, generator=seed(1), control=False
                                   )["error"].square().mean() for uniform in ("logsnr", "t")}
    assert errors["t"] > 10 * errors["logsnr"]


# The exact log-likelihood

@every_schedule
@pytest.mark.parametrize("target", ["x", "eps", "v", "s", "u", "F"])
def test_the_log_likelihood_of_gaussian_data(name, target):
    """N(0, diag(0.3, 1.2)^2) diffused to t_min, times alpha there: the density of x is that of z_0 / alpha."""
    t_min, schedule, std = 0.02, SCHEDULES[name], torch.tensor([0.3, 1.2], dtype=F64)
    data = GaussianMixture(torch.zeros(1, 2, dtype=F64), std)
    x = torch.tensor([[0.1, -0.4], [-0.7, 2.0], [0.0, 0.3]], dtype=F64)
    alpha, sigma = at(name, t_min)
    z = alpha * x
    expected = distributions.Normal(0, (alpha**2 * std**2 + sigma**2).sqrt()).log_prob(z).sum(1) + 2 * alpha.log()
    # what the flow ends in is not quite p(z_1): its variance there against that of p
    alpha_1, sigma_1 = at(name, 1 - t_min)
    var = alpha_1**2 * std**2 + sigma_1**2
    z_1 = z * (var / (alpha**2 * std**2 + sigma**2)).sqrt()
    prior = distributions.Normal(0, (alpha_1**2 + sigma_1**2).sqrt())
    expected = expected + (prior.log_prob(z_1) - distributions.Normal(0, var.sqrt()).log_prob(z_1)).sum(1)
    model, options = data.optimal_model(target, schedule, 0.01), dict(target=target, schedule=schedule, t_min=t_min,
                                                                      stabiliser=0.01)
    found, evaluations = likelihood.log_likelihood(model, x, steps=64, **options)
    assert_close(found, expected, rtol=0, atol=1e-3)
    assert evaluations == 256
    if target == "v" or name == "cosine":                  # the slower of the two: each target, each schedule
        adaptive, evaluations = likelihood.log_likelihood(model, x, tolerance=1e-8, **options)
        assert_close(adaptive, expected, rtol=0, atol=1e-6)
        assert 50 < evaluations < 2000


@pytest.mark.parametrize("data", COARSE)
def test_the_flow_with_the_exact_denoiser_gives_the_density_of_the_data(data):
    """log q(z_0) at z_0 = alpha x and t_min, + D log alpha: to 1e-3 nats, and to 0.005 log_prob(x) itself."""
    mixture = COARSE[data]
    x = mixture.sample(40, seed(0), F64)
    alpha, sigma = at("cosine", 1e-3)
    expected = mixture.log_prob(alpha * x, alpha, sigma) + 2 * alpha.log()
    found, _ = likelihood.log_likelihood(mixture.optimal_model("v", COSINE), x, target="v", schedule=COSINE, steps=192)
    assert_close(found, expected, rtol=0, atol=1e-3)
    assert_close(found, mixture.log_prob(x), rtol=0, atol=0.01)


def test_the_fixed_steps_are_of_fourth_order():
    data = GaussianMixture(torch.zeros(1, 2, dtype=F64), torch.tensor([0.3, 1.2], dtype=F64))
    x, options = data.sample(20, seed(0), F64), dict(target="v", schedule=COSINE)
    model = data.optimal_model("v", COSINE)
    runs = [likelihood.log_likelihood(model, x, steps=n, **options)[0] for n in (20, 40, 80)]
    coarse, fine = ((a - b).square().mean().sqrt() for a, b in zip(runs, runs[1:]))
    assert 15 < coarse / fine < 17


def test_hutchinsons_divergence_is_unbiased_and_exact_for_a_diagonal_one():
    data = GaussianMixture(torch.tensor([[-1, -0.8], [0.9, 1]], dtype=F64), torch.tensor([0.4, 0.5], dtype=F64))
    model = data.optimal_model("v", COSINE)
    x, options = torch.tensor([[0.1, 0.2]], dtype=F64), dict(target="v", schedule=COSINE, steps=40)
    exact = likelihood.log_likelihood(model, x, **options)[0]
    estimates = likelihood.log_likelihood(model, x.expand(300, 2), probes=1, generator=seed(1), **options)[0]
    assert estimates.std() > 1e-3 and abs(estimates.mean() - exact) < 4 * estimates.std() / 300**0.5
    many = likelihood.log_likelihood(model, x.expand(300, 2), probes=16, generator=seed(1), **options)[0]
    assert 0.1 < (many.std() / estimates.std()) < 0.4                      # 1 / 4
    image = lambda z, t: 0.3 * z                                         # noqa: E731
    x = torch.randn(3, 1, 4, 4, generator=seed(2), dtype=F64)
    diagonal = dict(target="v", schedule=COSINE, steps=10)
    assert_close(likelihood.log_likelihood(image, x, probes=1, generator=seed(1), **diagonal)[0],
                 likelihood.log_likelihood(image, x, **diagonal)[0])


def test_a_flow_that_explodes_is_an_error_and_not_a_number():
    x, options = torch.ones(2, 2), dict(target="v", schedule=COSINE)
    with pytest.raises(ValueError, match="cannot be integrated to 1e-06|not finite"):
        likelihood.log_likelihood(lambda z, t: z**3 * 50, x, tolerance=1e-6, **options)
    for extra in {}, {"tolerance": 1e-3}:
        with pytest.raises(ValueError, match="its flow is not finite"):
            likelihood.log_likelihood(lambda z, t: math.nan * z, x, **options, **extra)


def test_the_bound_knows_the_stabiliser():
    """The exact denoiser as a score with d = 0.01 in its denominator, and as eps: one bound, with the same draws."""
    data = DATASETS["clusters"]
    x = data.sample(50, seed(0), F64)
    for steps in None, 8:
        bounds = [likelihood.bound(data.optimal_model(target, COSINE, 0.01), x, target=target, schedule=COSINE,
                                   stabiliser=0.01, steps=steps, draws=4, generator=seed(1))["diffusion"]
                  for target in ("eps", "s")]
        assert_close(*bounds, rtol=1e-8, atol=0)


# The script

@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs")
    train.main(["--data", "clusters", "--target", "s", "--epochs", "3", "--width", "32", "--stabiliser", "0.01",
                "--device", "cpu", "--out", str(out)])
    return out / "clusters-s-mse-s0"


@pytest.fixture(scope="module")
def image_run(tmp_path_factory):
    out = tmp_path_factory.mktemp("images")
    g = seed(4)
    for i in range(40):
        images.save_png(torch.randint(256, (3, 8, 8), generator=g, dtype=torch.uint8), out / "data" / f"{i}.png")
    train.main(["--data", str(out / "data"), "--channels", "8", "--channel-mult", "1", "--layers", "1",
                "--attention", "4", "--epochs", "1", "--batch-size", "8", "--device", "cpu", "--out", str(out)])
    state = run.load(out / "data-eps-mse-s0")
    state["model"] = {key: value * 2 for key, value in state["model"].items()}         # only the averaged weights count
    run.save(out / "data-eps-mse-s0" / "ckpt.pt", state)
    return out / "data-eps-mse-s0", out / "data"


def test_the_terms_of_a_run_are_printed_and_written_beside_the_entropy(trained, capsys):
    likelihood.main(["--ckpt", str(trained), "--num", "300", "--draws", "8", "--ode-steps", "10", "--t-min", "0.01",
                     "--seed", "5", "--num-ode", "200", "--batch-size", "150", "--device", "cpu"])
    out, result = capsys.readouterr().out, json.loads((trained / (
        "likelihood-num-300-t-min-0.01-seed-5-batch-size-150-draws-8-num-ode-200-ode-steps-10.json")).read_text())
    data = DATASETS["clusters"]
    model, x = run.open(trained).model().double(), kind_points.load(dict(data="clusters")).double()
    options = dict(target="s", schedule=COSINE, t_min=0.01, stabiliser=0.01)
    g = run.generator("cpu", 5, "likelihood")
    terms, exact = [], []
    for rows, ode in (x[:150], x[:150]), (x[150:300], x[150:200]):
        terms.append(likelihood.bound(model, rows, draws=8, generator=g, **options))
        exact.append(-likelihood.log_likelihood(model, ode, steps=10, **options)[0])
    total = {key: torch.cat([part[key] for part in terms]).detach() for key in ("prior", "reconstruction", "diffusion")}
    total["bound"] = sum(total.values())
    total["exact"] = torch.cat(exact)
    for key, values in total.items():
        assert result[key] == pytest.approx([values.mean().item(), values.std().item() / len(values)**0.5])
        assert f"{key:20s} {values.mean():10.4f}" in out
    entropy = -data.log_prob(x)
    assert result["entropy"] == pytest.approx([entropy.mean().item(), entropy.std().item() / len(x)**0.5])
    gap = total["exact"] - entropy[:200]
    assert result["exact - entropy"] == pytest.approx([gap.mean().item(), gap.std().item() / 200**0.5])
    assert f"median {gap.median():.4f}" in out and result["evaluations"] == 40
    bits = [c / (2 * math.log(2)) for c in result["bound"]]
    assert "{:10.4f} {:9.4f} {:10.4f} {:9.4f}".format(*result["bound"], *bits) in out
    of_draws = torch.cat([part["error"] for part in terms]).square().sum().sqrt().item() / 300
    assert f"at most {of_draws:.4f} nats from t and noise" in out
    assert (result["n"], result["n_exact"], result["draws"], result["t_min"], result["seed"]) == (300, 200, 8, 0.01, 5)


def test_the_discrete_bound_the_other_draw_and_adaptive_steps_of_a_run(trained, capsys):
    common = ["--ckpt", str(trained), "--num", "100", "--draws", "4", "--device", "cpu"]
    newest = lambda: max(trained.glob("likelihood*.json"), key=lambda path: path.stat().st_mtime_ns)
    read = lambda: json.loads(newest().read_text())
    model, x = run.open(trained).model().double(), kind_points.load(dict(data="clusters"))[:100].double()
    options = dict(target="s", schedule=COSINE, stabiliser=0.01, draws=4)
    for arguments, extra in (["--steps", "7"], dict(steps=7)), (["--uniform", "t"], dict(uniform="t")):
        likelihood.main([*common, *arguments, "--num-ode", "0"])
        expected = likelihood.bound(model, x, generator=run.generator("cpu", 0, "likelihood"), **options, **extra)
        assert read()["diffusion"][0] == pytest.approx(expected["diffusion"].mean().item()) and "exact" not in read()
    likelihood.main([*common, "--num-ode", "30", "--probes", "3", "--ode-steps", "5"])
    g = run.generator("cpu", 0, "likelihood")
    likelihood.bound(model, x, generator=g, **options)
    del options["draws"]
    log_p, _ = likelihood.log_likelihood(model, x[:30], steps=5, probes=3, generator=g, **options)
    assert read()["exact"][0] == pytest.approx(-log_p.mean().item()) and read()["probes"] == 3
    likelihood.main([*common, "--tolerance", "1e-3"])
    assert read()["evaluations"] not in (0, 256) and "T = 7" in capsys.readouterr().out


def test_the_likelihood_of_the_chain_is_a_row_beside_the_bound(trained, tmp_path, capsys):
    """In the table and the file; the rest is as it was without --chains, and of several runs the table has it too."""
    common = ["--ckpt", str(trained), "--num", "60", "--draws", "4", "--num-ode", "0", "--steps", "4", "--t-min", "0.1",
              "--variance", "large", "--batch-size", "700", "--device", "cpu", "--out", str(tmp_path)]
    name = "likelihood-num-60-t-min-0.1-batch-size-700-draws-4-steps-4-variance-large-num-ode-0{}.json"
    likelihood.main(common)
    before, result = capsys.readouterr().out, json.loads((tmp_path / name.format("")).read_text())
    likelihood.main([*common, "--chains", "300"])
    out, found = capsys.readouterr().out, json.loads((tmp_path / name.format("-chains-300")).read_text())
    x, one = kind_points.load(dict(data="clusters"))[:60].double(), run.open(trained)
    log_w = importance.of_run(one, x, 300, 4, "large", 0.1, 700, generator=run.generator("cpu", 0, "chains"))
    expected, w = -torch.logsumexp(log_w, 0) + math.log(300), torch.softmax(log_w, 0)
    assert found["chain"] == pytest.approx([expected.mean().item(), expected.std().item() / 60**0.5])
    gap = expected + DATASETS["clusters"].log_prob(x)
    assert found["chain - entropy"] == pytest.approx([gap.mean().item(), gap.std().item() / 60**0.5])
    size, error = 1 / w.square().sum(0), 300**0.5 * w.std(0)
    assert found["effective_size"] == pytest.approx(size.mean().item())
    assert found["smallest_effective_size"] == pytest.approx(size.min().item())
    assert found["error_of_chains"] == pytest.approx(error.square().sum().sqrt().item() / 60)
    assert found["bias_of_chains"] == pytest.approx(error.square().mean().item() / 2) and found["chains"] == 300
    row = next(line for line in out.splitlines() if line.startswith("chain "))
    assert f"{expected.mean():10.4f}" in row and f"300 chains, effective size {size.mean():.1f}, error" in row
    assert {key: value for key, value in found.items() if key in result} | {"seconds": 0} == result | {"seconds": 0}
    lines = lambda text: [line for line in text.splitlines() if line[:5] in ("prior", "recon", "diffu", "bound")]
    assert lines(before) == lines(out) and len(lines(out)) == 5 and "chain" not in before + str(result.keys())
    likelihood.main([*common, "--chains", "2", "--variance", "small"])
    assert "2 chains, effective size 1." in (out := capsys.readouterr().out) and "too few: an upper bound alone" in out
    again = tmp_path / "again"
    shutil.copytree(trained, again)
    for extra in [], ["--chains", "3"]:
        likelihood.main(["--ckpt", str(again), *common[1:], "--csv", str(tmp_path / "table.csv"), *extra])
        header = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("run"))
        assert ("chain - entropy" in header) == bool(extra)


def test_chains_of_images_and_of_a_run_that_has_none(image_run, trained, tmp_path, capsys, monkeypatch):
    folder, _ = image_run
    likelihood.main(["--ckpt", str(folder), "--num", "3", "--draws", "2", "--num-ode", "0", "--steps", "2", "--chains",
                     "4", "--batch-size", "3", "--device", "cpu", "--out", str(tmp_path)])
    one, found = run.open(folder), json.loads(next(tmp_path.glob("likelihood*-chains-4.json")).read_text())
    x = one.kind.test_examples(one.config, 3, torch.device("cpu"))
    log_w = importance.of_run(one, x, 4, 2, batch=3, generator=run.generator("cpu", 0, "chains"))
    assert log_w.dtype == F64 and found["chain"][0] == pytest.approx(math.log(4) - log_w.logsumexp(0).mean().item())
    assert f"{found['chain'][0] / (192 * math.log(2)):.4f}" in capsys.readouterr().out
    monkeypatch.setattr(likelihood, "evaluate", lambda *args: pytest.fail("minutes for nothing"))
    with pytest.raises(SystemExit, match="clusters-s-mse-s0: .* continuous time.* say of how many steps, --steps 10$"):
        likelihood.main(["--ckpt", str(trained), "--chains", "10", "--device", "cpu"])


def test_images_have_bits_per_dimension_and_a_dequantised_density(image_run, capsys, monkeypatch):
    folder, data = image_run
    likelihood.main(["--ckpt", str(folder), "--num", "4", "--draws", "3", "--num-ode", "2", "--ode-steps", "4",
                     "--device", "cpu"])
    out, result = capsys.readouterr().out, json.loads(
        (folder / "likelihood-num-4-draws-3-num-ode-2-ode-steps-4.json").read_text())
    config = run.load(folder)["config"]
    model = unet.UNet(3, 8, channels=8, channel_mult=[1], layers=1, attention=[4])
    model.load_state_dict(run.load(folder)["ema"])
    every = images.to_float(images.load(config["data"], "test"))
    x = every[torch.randperm(len(every), generator=run.generator("cpu", "likelihood"))[:4]]
    assert (result["n"], result["n_exact"], result["dimensions"], result["evaluations"]) == (4, 2, 192, 16)
    g, options = run.generator("cpu", 0, "likelihood"), dict(target="eps", schedule=COSINE)
    terms = likelihood.bound(model, x, draws=3, decoder=decoders.discretised, generator=g, **options)
    total = terms["prior"] + terms["reconstruction"] + terms["diffusion"]
    assert result["bound"][0] == pytest.approx(total.mean().item(), rel=1e-4)
    assert f"{result['bound'][0] / (192 * math.log(2)):.4f}" in out
    spread = x[:2] + (2 * torch.rand(x[:2].shape, generator=g) - 1) / 255
    log_p, _ = likelihood.log_likelihood(model, spread, steps=4, probes=1, generator=g, **options)
    assert result["exact"][0] == pytest.approx((-log_p - 192 * math.log(2 / 255)).mean().item(), rel=1e-4)
    assert "entropy" not in out
    seen = []
    monkeypatch.setattr(likelihood, "log_likelihood",
                        lambda model, x, **options: seen.append(x) or (torch.zeros(len(x)), 1))
    likelihood.evaluate(model, x, config, draws=2, num_ode=3)
    distance = (seen[0] - x[:3]).abs() * 255                                # spread evenly over bins of 2 / 255
    assert len(seen[0]) == 3 and distance.max() < 1 and abs(distance.mean() - 0.5) < 0.05


def test_several_runs_their_defaults_and_another_folder(trained, image_run, tmp_path, monkeypatch):
    """Points: 100 draws, 10,000 points, all of them, exactly; images: 16 draws, 500 images (here the 4 of the test
    split), 16, 1 probe."""
    calls, original = [], likelihood.evaluate
    monkeypatch.setattr(likelihood, "evaluate", lambda model, x, config, *args: calls.append((x, args)) or original(
        model, x[:4], config, 2, None, None, "logsnr", 2, 2, None, *args[7:]))
    again = tmp_path / "again"
    shutil.copytree(trained, again)
    likelihood.main(["--ckpt", str(trained), str(again), "--out", str(tmp_path), "--device", "cpu"])
    likelihood.main(["--ckpt", str(image_run[0]), "--out", str(tmp_path / "images"), "--device", "cpu"])
    (points, of_points), _, (images_, of_images) = calls
    assert points.shape == (10_000, 2) and points.dtype == F64 and images_.shape == (4, 3, 8, 8)
    assert of_points[:9] == (100, None, None, "logsnr", None, 64, None, None, None) and of_points[9] == 5000
    assert of_images[:9] == (16, None, None, "logsnr", 16, 64, None, 1, None) and of_images[9] == 50
    results = [json.loads((tmp_path / name / "likelihood.json").read_text())
               for name in (trained.name, "again", "images")]
    assert [(r["draws"], r["probes"], r["dimensions"]) for r in results] == [(100, None, 2)] * 2 + [(16, 1, 192)]
    with pytest.raises(SystemExit, match="points and images cannot be mixed in one call"):
        likelihood.main(["--ckpt", str(trained), str(image_run[0])])
    with pytest.raises(SystemExit, match="two of these runs have one name"):
        likelihood.main(["--ckpt", str(trained), str(trained), "--out", str(tmp_path)])


def test_the_schedule_of_a_run_and_the_size_of_its_images(tmp_path, image_run):
    train.main(["--data", "waves", "--target", "v", "--schedule", "linear", "--epochs", "1", "--width", "8",
                "--device", "cpu", "--out", str(tmp_path)])
    likelihood.main(["--ckpt", str(tmp_path / "waves-v-mse-s0"), "--num", "50", "--draws", "2", "--num-ode", "0",
                     "--device", "cpu"])
    result = json.loads((tmp_path / "waves-v-mse-s0" / "likelihood-num-50-draws-2-num-ode-0.json").read_text())
    high = SCHEDULES["linear"].ends(1e-3)[1]
    assert result["reconstruction"][0] == pytest.approx(1 + math.log(2 * math.pi) - high)
    config = run.load(image_run[0])["config"] | {"image_size": 4}
    assert kind_images.test_examples(config, 3, torch.device("cpu")).shape == (3, 3, 4, 4)


def test_likelihoods_that_are_not_finite_are_one_sentence(trained, tmp_path):
    state = run.load(trained)
    state["model"]["biases.6"][:] = math.nan
    run.save(tmp_path / "ckpt.pt", state)
    for extra in ["--num-ode", "0"], ["--tolerance", "1e-3"], []:
        with pytest.raises(SystemExit, match="not finite - train it longer, or with another --loss"):
            likelihood.main(["--ckpt", str(tmp_path), "--num", "10", "--draws", "2", "--device", "cpu", *extra])
    assert not list(tmp_path.glob("likelihood*.json"))


def test_a_run_on_images_without_its_images(image_run, tmp_path):
    folder, data = image_run
    shutil.move(data, tmp_path / "elsewhere")
    try:
        with pytest.raises(SystemExit, match="data"):
            likelihood.main(["--ckpt", str(folder), "--device", "cpu"])
    finally:
        shutil.move(tmp_path / "elsewhere", data)


@pytest.mark.parametrize("arguments", [["--steps", "0"], ["--draws", "1"], ["--num", "0"], ["--uniform", "x"],
                                       ["--ode-steps", "0"], ["--tolerance", "0"], ["--probes", "0"],
                                       ["--num-ode", "-1"], ["--t-min", "0.5"],
                                       ["--num-ode", "1"], ["--steps", "10000000"], ["--draws", "1" + 30 * "0"],
                                       ["--chains", "1"]])
def test_wrong_arguments_exit_with_2(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        likelihood.main(arguments)
    assert stop.value.code == 2 and "--" in capsys.readouterr().err


def test_a_flow_that_explodes_and_a_missing_run_are_one_sentence(trained, tmp_path, monkeypatch):
    with pytest.raises(SystemExit, match="no checkpoint at .* train one first"):
        likelihood.main(["--ckpt", str(tmp_path)])
    monkeypatch.setattr(run.Run, "model", lambda self, device, out: Cube())
    with pytest.raises(SystemExit, match="cannot be integrated .* larger, or leave it out|not finite"):
        likelihood.main(["--ckpt", str(trained), "--num", "5", "--draws", "2", "--tolerance", "1e-6",
                         "--device", "cpu"])


class Cube(torch.nn.Module):
    def forward(self, z, t):
        return -50 * z**3


def test_the_discrete_bound_draws_i_stratified_and_its_reconstruction_has_noise_of_its_own(monkeypatch):
    """As many examples as steps: in every draw each i comes once. At x = 0 z is sigma eps, and eps is not that of
    z_0."""
    seen, original = [], losses.discrete_loss
    monkeypatch.setattr(losses, "discrete_loss", lambda model, x, i, *rest, **how: seen.append(i) or original(
        model, x, i, *rest, **how))
    options, x = dict(target="eps", schedule=COSINE, draws=3, generator=seed(0)), torch.zeros(50, 2, dtype=F64)
    noise, noise_of_0 = [], []

    def model(z, t):
        noise.append(z / torch.sin(math.pi / 2 * t)[:, None])
        return z

    def decoder(x, mean, log_var):
        noise_of_0.append((mean - x) * torch.exp(-0.5 * log_var))
        return noise_of_0[-1]
    for steps in 50, None:
        likelihood.bound(model, x, steps=steps, decoder=decoder, **options)
    assert [sorted(i.tolist()) for i in seen] == 3 * [[*range(1, 51)]]
    of_t, of_0 = torch.cat(noise).flatten(), torch.cat(noise_of_0).flatten()
    assert len(of_t) == len(of_0) == 600 and abs(of_t.std() - 1) < 0.1 and abs(of_0.std() - 1) < 0.1
    assert abs((of_t * of_0).mean()) < 0.15                                # 3.7 standard errors


def test_evaluations_are_those_of_the_longest_batch_and_no_examples_have_no_flow():
    """Three of the four examples of the first batch of two; --num-ode 0 is none."""
    config = dict(target="v", loss="mse", schedule="cosine", stabiliser=0.0, t_min=1e-3)
    x, model = DATASETS["clusters"].sample(8, seed(0), F64), DATASETS["clusters"].optimal_model("v", COSINE)
    terms, evaluations = likelihood.evaluate(model, x, config, draws=2, num_ode=3, ode_steps=5, batch_size=4)
    assert evaluations == 20 and len(terms["exact"]) == 3 and len(terms["bound"]) == 8
    terms, evaluations = likelihood.evaluate(model, x, config, draws=2, num_ode=0, ode_steps=5, batch_size=4)
    assert evaluations == 0 and "exact" not in terms
    terms, _ = likelihood.evaluate(model, x, config, draws=2, ode_steps=1, batch_size=4)
    assert len(terms["exact"]) == 8


@pytest.mark.parametrize("extra", [{}, {"tolerance": 1e-3}])
def test_one_example_whose_flow_is_not_finite_is_an_error(extra):
    x = torch.tensor([[0.5, 0.1], [0.2, -0.3]])
    model = lambda z, t: torch.where(torch.tensor([[True], [False]]), math.inf, z)
    with pytest.raises(ValueError, match="its flow is not finite"):
        likelihood.log_likelihood(model, x, target="v", schedule=COSINE, steps=2, **extra)


def test_several_runs_are_one_table_and_other_settings_another_file(trained, tmp_path, capsys):
    """What is asked for and is the default anyway changes no name; t_min is that of the run, at least 0.001."""
    again = tmp_path / "again"
    shutil.copytree(trained, again)
    for path in [*again.glob("likelihood*"), again / "config.json"]:
        path.unlink()
    state = run.load(again)
    state["config"]["t_min"] = 0.05
    run.save(again / "ckpt.pt", state)
    common = ["--num", "40", "--draws", "2", "--ode-steps", "2", "--device", "cpu"]
    table = tmp_path / "table.csv"
    likelihood.main(["--ckpt", str(trained), str(again), *common, "--out", str(tmp_path / "out"), "--csv", str(table)])
    out, rows = capsys.readouterr().out, list(csv.DictReader(table.open()))
    assert "bits/dim" not in out and len(rows) == 2
    for row, folder, t_min in zip(rows, (trained, again), (1e-3, 0.05)):
        path = tmp_path / "out" / folder.name / "likelihood-num-40-draws-2-ode-steps-2.json"
        result = json.loads(path.read_text())
        assert (row["run"], float(row["t_min"]), result["t_min"]) == (str(folder), t_min, t_min)
        line, = [line for line in out.splitlines() if line.startswith(f"{folder} ")]
        names = ["bound", "exact", "entropy", "bound - entropy", "exact - entropy"]
        values = [result[name][0] for name in names]
        assert [float(row[name]) for name in names] == values and float(row["bound error"]) == result["bound"][1]
        shown = [values[0], result["bound"][1], values[1], result["exact"][1], *values[2:]]
        assert line.split()[1:] == [f"{value:.4f}" for value in shown]
        high = COSINE.ends(t_min)[1]
        assert result["reconstruction"][0] == pytest.approx(1 + math.log(2 * math.pi) - high)
    likelihood.main(["--ckpt", str(again), *common])
    likelihood.main(["--ckpt", str(again), *common, "--t-min", "0.02", "--steps", "9", "--uniform", "logsnr"])
    one, other = (json.loads((again / f"likelihood-num-40-{name}.json").read_text()) for name in
                  ("draws-2-ode-steps-2", "t-min-0.02-draws-2-steps-9-ode-steps-2"))
    assert (one["t_min"], one["steps"], other["t_min"], other["steps"]) == (0.05, None, 0.02, 9)
    assert "bits/dim" in capsys.readouterr().out
    state["config"]["t_min"] = 1e-6
    run.save(again / "ckpt.pt", state)
    likelihood.main(["--ckpt", str(again), *common])
    assert json.loads((again / "likelihood-num-40-draws-2-ode-steps-2.json").read_text())["t_min"] == 1e-3


def test_the_tolerance_holds_for_each_example_however_many_there_are():
    """One hard example among a thousand easy ones, which would hide its error in a mean over all."""
    data = DATASETS["clusters"]
    model, how = data.optimal_model("v", COSINE), dict(target="v", schedule=COSINE)
    easy = torch.zeros(1, 2, dtype=F64) + 20                # far away the flow is linear
    hard = torch.tensor([[0.02, 0.9]], dtype=F64)
    exact = likelihood.log_likelihood(model, hard, tolerance=1e-9, **how)[0]
    alone = likelihood.log_likelihood(model, hard, tolerance=1e-3, **how)[0]
    among = likelihood.log_likelihood(model, torch.cat([hard, easy.expand(1000, 2)]), tolerance=1e-3, **how)[0][:1]
    assert abs(alone - exact) < 0.1 and abs(among - exact) < max(2 * abs(alone - exact), 1e-3)


@pytest.mark.parametrize("steps", [None, 4])
def test_without_a_generator_the_bound_is_where_the_data_are(steps):
    """On another device than the CPU; meta has no values and refuses to be mixed with it."""
    terms = likelihood.bound(lambda z, t: z * t[:, None], torch.zeros(5, 2, device="meta"), target="v", schedule=COSINE,
                             steps=steps, draws=2)
    assert terms["diffusion"].device.type == "meta" and terms["diffusion"].shape == (5,)
