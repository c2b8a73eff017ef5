"""The losses against Table 3.2 typed again, the closed form of Gaussian data, the exact denoiser of the 2D datasets."""
import math
import runpy

import pytest
import torch
from test_datasets2d import COARSE
from test_ddpm import every_schedule
from torch.testing import assert_close

import ddpm
import discrete
import losses
import variance
from datasets2d import DATASETS
from ddpm import SCHEDULES

F64 = torch.float64
T = torch.tensor([1e-3, 0.01, 0.1, 0.3, 0.5, 0.7, 0.9, 0.99, 0.999], dtype=F64)
COSINE = SCHEDULES["cosine"]
TARGETS = "x", "eps", "v", "s", "u", "F"


def x_factor(target, alpha, sigma):
    """The factor that turns the target's squared error into that of x_hat, for any alpha and sigma."""
    return {"x": torch.ones_like(alpha), "eps": sigma**2 / alpha**2,                           # (3.62)
            "v": sigma**2 / (alpha**2 + sigma**2)**2,                                          # (3.63) is for VP
            "s": sigma**4 / alpha**2, "u": sigma**2 / (alpha + sigma)**2,                      # (3.64)
            "F": sigma**2 / (alpha**2 + sigma**2)}[target]


@every_schedule
@pytest.mark.parametrize("target", TARGETS)
def test_weights_are_table_3_2(name, target):
    schedule, t = SCHEDULES[name], T.clone().requires_grad_()
    alpha, sigma = schedule.alpha(t), schedule.sigma(t)
    dsnr, = torch.autograd.grad((alpha**2 / sigma**2).sum(), t)
    alpha, sigma = alpha.detach(), sigma.detach()
    factor = x_factor(target, alpha, sigma)
    weight = lambda loss: losses.weight(loss, target, T, schedule)
    assert_close(weight("mse"), torch.ones_like(T))
    assert_close(weight("rescaled"), factor, rtol=1e-7, atol=0)
    assert_close(weight("nelbo"), -0.5 * dsnr * factor, rtol=1e-6, atol=0)                     # (3.20), with the 1/2


def test_weights_on_the_cosine_schedule_in_trigonometry():
    """Eq. (3.22) - (3.60) with alpha = cos, sigma = sin typed out; twice ours is the thesis's L."""
    alpha, sigma = torch.cos(math.pi * T / 2), torch.sin(math.pi * T / 2)
    thesis = {"x": math.pi * alpha / sigma**3, "eps": math.pi / (alpha * sigma),
              "v": math.pi * alpha / sigma, "s": math.pi * sigma / alpha}
    for target, expected in thesis.items():
        assert_close(2 * losses.weight("nelbo", target, T, COSINE), expected, rtol=1e-7, atol=0)


WAY_BACK = {     # x_hat and eps_hat of a prediction, for any alpha and sigma (r^2 = alpha^2 + sigma^2), typed out
    "x":   lambda y, z, a, s: (y, (z - a * y) / s),
    "eps": lambda y, z, a, s: ((z - s * y) / a, y),
    "v":   lambda y, z, a, s: ((a * z - s * y) / (a**2 + s**2), (s * z + a * y) / (a**2 + s**2)),
    "s":   lambda y, z, a, s: ((z + s**2 * y) / a, -s * y),
    "u":   lambda y, z, a, s: ((z - s * y) / (a + s), (z + a * y) / (a + s)),
    "F":   lambda y, z, a, s: ((a * z + s * (a**2 + s**2)**0.5 * y) / (a**2 + s**2),
                               (s * z - a * (a**2 + s**2)**0.5 * y) / (a**2 + s**2)),
}
OF = {"x": lambda x, eps, a, s: x, "eps": lambda x, eps, a, s: eps, "v": lambda x, eps, a, s: a * eps - s * x,
      "s": lambda x, eps, a, s: -eps / s, "u": lambda x, eps, a, s: eps - x,
      "F": lambda x, eps, a, s: (s * x - a * eps) / (a**2 + s**2)**0.5}


@every_schedule
@pytest.mark.parametrize("source", TARGETS)
def test_translated_errors_are_those_of_the_translated_prediction(name, source):
    """VDM Table 4.3 for every ordered pair: a wrong prediction of `source`, made one of `to` by x_hat, eps_hat."""
    x, eps, wrong = torch.randn(3, len(T), dtype=F64, generator=torch.Generator().manual_seed(0))
    a, s = SCHEDULES[name].alpha(T), SCHEDULES[name].sigma(T)
    y_hat = OF[source](x, eps, a, s) + wrong
    x_hat, eps_hat = WAY_BACK[source](y_hat, a * x + s * eps, a, s)
    for to in TARGETS:
        error = OF[to](x_hat, eps_hat, a, s) - OF[to](x, eps, a, s)
        factor = losses.translate(source, to, T, SCHEDULES[name])
        assert_close(error**2, factor * wrong**2, rtol=1e-5, atol=1e-12)
        assert_close(losses.translate(to, source, T, SCHEDULES[name]) * factor, torch.ones_like(T), rtol=1e-9, atol=0)
        assert_close(losses.weight("mse", to, T, SCHEDULES[name]) * factor, {                      # the spaces
            "x": losses.weight("rescaled", source, T, SCHEDULES[name]),
            "eps": losses.weight("simple", source, T, SCHEDULES[name]),
            "v": losses.weight("v_space", source, T, SCHEDULES[name]),
            "u": losses.weight("u_space", source, T, SCHEDULES[name]),
            "s": losses.weight("s_space", source, T, SCHEDULES[name])}.get(to, factor), rtol=1e-9, atol=0)


def test_table_4_3_of_vdm_with_its_errata():
    """As printed for alpha^2 + sigma^2 = 1, but v to eps, printed 1 / alpha^2 (4.65): it inverts eps to v (4.74)."""
    a, s = COSINE.alpha(T), COSINE.sigma(T)
    printed = {("eps", "x"): s**2 / a**2, ("v", "x"): s**2, ("x", "eps"): a**2 / s**2,
               ("x", "v"): s**2 * (a**2 / s**2 + 1)**2, ("eps", "v"): a**2 * (s**2 / a**2 + 1)**2}
    for (source, to), factor in printed.items():
        assert_close(losses.translate(source, to, T, COSINE), factor, rtol=1e-9, atol=0)
    found = losses.translate("v", "eps", T, COSINE)
    assert_close(found, a**2, rtol=1e-9, atol=0)
    assert ((found * a**2 - 1).abs() > 1e-6).all()
    with pytest.raises(ValueError, match="mean of a step of a discrete chain"):
        losses.translate("mu", "x", T, COSINE)


def test_the_script_prints_the_translations(capsys):
    runpy.run_path(losses.__file__, run_name="__main__")
    out = capsys.readouterr().out
    weights, table = out.split("squared error of the row")
    lines = {line.split()[0]: line.split()[1:] for line in table.splitlines()[2:]}
    s = math.sin(math.pi / 2 * 0.1)
    assert table.splitlines()[1].split() == [*TARGETS] == [*lines]
    assert [float(lines["x"][i]) for i in (0, 1, 2)] == pytest.approx([1, s**2 / (1 - s**2), s**2], rel=1e-3)
    assert float(lines["eps"][0]) == pytest.approx((1 - s**2) / s**2, rel=1e-3)
    assert all(f"{name} " in weights for name in ("mse", "sigmoid", "v_space"))


def test_stable_weights_are_the_inferred_ones():
    alpha, sigma = torch.cos(math.pi * T / 2), torch.sin(math.pi * T / 2)
    expected = {"x": alpha / (sigma**3 + 0.01), "eps": 1 / (alpha * sigma + 0.01), "v": alpha / (sigma + 0.01),
                "s": sigma / (alpha + 0.01)}
    for target in expected:
        assert_close(losses.weight("nelbo_stable", target, T, COSINE), expected[target], rtol=1e-7, atol=0)
    with pytest.raises(ValueError, match="no weight for target 'u'"):
        losses.weight("nelbo_stable", "u", T, COSINE)
    for name in SCHEDULES.keys() - {"cosine"}:
        with pytest.raises(ValueError, match="for the cosine schedule alone"):
            losses.weight("nelbo_stable", "eps", T, SCHEDULES[name])


def test_errata_2_the_weight_of_the_score_cancels_the_snr_derivative():
    """w_s = -alpha^2 / (sigma^4 SNR'), not -alpha^2 SNR' / sigma^4: w times twice the NELBO weight must be 1."""
    alpha, sigma, dsnr = COSINE.alpha(T), COSINE.sigma(T), COSINE.dsnr(T)
    scaling = 2 * losses.weight("nelbo", "s", T, COSINE)
    assert_close(-alpha**2 / (sigma**4 * dsnr) * scaling, torch.ones_like(T), rtol=1e-7, atol=0)
    assert not torch.allclose(-alpha**2 * dsnr / sigma**4 * scaling, torch.ones_like(T), rtol=0.5)


def test_errata_6_the_scalings_of_figure_4_10_are_the_other_way_round():
    early, late = torch.tensor([0.01], dtype=F64), torch.tensor([0.99], dtype=F64)
    weight = lambda target, t: losses.weight("nelbo", target, t, COSINE).item()
    assert weight("x", early) > 1000 * weight("eps", early) > 0                 # x, not eps or v, is largest early
    assert weight("x", early) / weight("x", early * 10) > 900                   # and falls as t^-3, they as 1 / t
    assert 9 < weight("eps", early) / weight("eps", early * 10) < 11
    assert weight("s", late) > 1000 * weight("s", early)


def quadratic_expectation(c, n):
    """x = +-c, eps = +-1 and n midpoints of t: exact averages of anything quadratic in Gaussian x and eps."""
    t_min = 1e-3
    t = t_min + (1 - 2 * t_min) * (torch.arange(n, dtype=F64) + 0.5) / n
    x, eps = torch.tensor([[c, 1], [c, -1], [-c, 1], [-c, -1]], dtype=F64).T.repeat_interleave(n, 1)
    return x[:, None], t.repeat(4), eps[:, None], t_min


def gaussian_model(c, target, schedule, d=0.0):
    """E[y | z] for data N(0, c^2), each target typed on its own."""
    def model(z, t):
        alpha, sigma = schedule.alpha(t)[:, None], schedule.sigma(t)[:, None]
        var = alpha**2 * c**2 + sigma**2
        x_hat, eps_hat = alpha * c**2 / var * z, sigma / var * z
        return {"x": x_hat, "eps": eps_hat, "v": alpha * eps_hat - sigma * x_hat,
                "s": -sigma * eps_hat / (sigma**2 + d), "u": eps_hat - x_hat,
                "F": (sigma * x_hat - alpha * eps_hat) / (alpha**2 + sigma**2).sqrt()}[target]
    return model


@every_schedule
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("d", [0.0, 0.01])
def test_nelbo_of_gaussian_data_is_the_lost_information(name, target, d):
    """1/2 integral of mmse dSNR = 1/2 log (1 + c^2 SNR) between the ends: errata 3, only the 1/2 gives the entropy."""
    c, schedule = 0.6, SCHEDULES[name]
    x, t, eps, t_min = quadratic_expectation(c, 50_000)
    value = losses.loss(gaussian_model(c, target, schedule, d), x, t, eps, target=target, loss="nelbo",
                        schedule=schedule, stabiliser=d).mean() * (1 - 2 * t_min)
    snr = schedule.snr(torch.tensor([t_min, 1 - t_min], dtype=F64))
    assert_close(value, 0.5 * torch.log((1 + c**2 * snr[0]) / (1 + c**2 * snr[1])), rtol=1e-5, atol=0)


def test_errata_3_prior_reconstruction_and_nelbo_add_up_to_the_entropy():
    """For N(0, c^2), with the optimal decoder: L_prior + L_recon + L = entropy, to 1e-4 nats and not to half of L."""
    c, schedule = 0.6, COSINE
    x, t, eps, t_min = quadratic_expectation(c, 200_000)
    diffusion = losses.loss(gaussian_model(c, "eps", schedule), x, t, eps, target="eps", loss="nelbo",
                            schedule=schedule).mean() * (1 - 2 * t_min)
    ends = torch.tensor([t_min, 1 - t_min], dtype=F64)
    (alpha_0, alpha_1), (sigma_0, sigma_1) = schedule.alpha(ends), schedule.sigma(ends)
    prior_var = alpha_1**2 * c**2 + sigma_1**2                      # p(z_1) is the true marginal here
    prior = 0.5 * (torch.log(prior_var / sigma_1**2))
    posterior_var = c**2 * sigma_0**2 / (alpha_0**2 * c**2 + sigma_0**2)
    reconstruction = 0.5 * torch.log(2 * math.pi * math.e * posterior_var)      # entropy of x given z_0
    entropy = torch.tensor(0.5 * math.log(2 * math.pi * math.e * c**2), dtype=F64)
    assert_close(prior + reconstruction + diffusion, entropy, rtol=0, atol=1e-4)


@every_schedule
@pytest.mark.parametrize("data", DATASETS)
def test_with_the_exact_denoiser_nelbo_and_rescaled_are_the_same_for_every_target(name, data):
    schedule, dataset, g = SCHEDULES[name], DATASETS[data], torch.Generator().manual_seed(0)
    x = dataset.sample(500, g, dtype=F64)
    t, eps = losses.sample_t((500,), 1e-3, g, dtype=F64), torch.randn(500, 2, generator=g, dtype=F64)
    value = lambda loss, target, d=0.0: losses.loss(dataset.optimal_model(target, schedule, d), x, t, eps,
                                                    target=target, loss=loss, schedule=schedule, stabiliser=d)
    for loss in "nelbo", "rescaled":
        for target, d in ("eps", 0.0), ("v", 0.0), ("s", 0.0), ("s", 0.01), ("u", 0.0), ("F", 0.0):
            assert_close(value(loss, target, d), value(loss, "x"), rtol=1e-5, atol=1e-12)
    if schedule.scale is ddpm.PRESERVING:
        assert_close(value("mse", "v"), value("mse", "x") + value("mse", "eps"), rtol=1e-6, atol=1e-12)
        assert_close(value("nelbo", "x").mean() * 2, (-schedule.dsnr(t) * value("mse", "x")).mean(), rtol=1e-6, atol=0)


# ERRATA.md entry 8: what a perfect model gets in the thesis's Table 4.1, clusters.
BAYES = {("mse", "x"): 0.4702, ("mse", "eps"): 0.3512, ("mse", "v"): 0.8214, ("mse", "s"): 2.6519,
         ("nelbo_stable", "x"): 0.6524, ("nelbo_stable", "eps"): 2.3687, ("nelbo_stable", "v"): 2.3737,
         ("nelbo_stable", "s"): 0.7533}


# The thesis's Table 4.1: weighted loss of x, eps, v, s, then their NELBO.
THESIS = {"clusters": [0.4754, 0.3522, 0.8264, 2.6934, 0.6777, 2.3636, 2.5396, 0.7657],
          "rings": [0.4932, 0.4266, 0.9227, 3.0981, 0.8785, 2.5700, 2.5452, 0.9577],
          "swiss_roll": [0.4934, 0.4261, 0.9171, 3.0274, 0.8640, 2.5324, 2.4861, 0.9493],
          "waves": [0.4939, 0.4500, 0.9411, 3.4165, 0.9104, 2.6805, 2.6873, 1.0210]}


def stabilised_optimum(name, loss, target, n):
    """Loss of the exact denoiser with the thesis's stabiliser and t in (0, 1)."""
    t_min, dataset = 1e-6, COARSE[name]
    u = torch.quasirandom.SobolEngine(6, scramble=True, seed=0).draw(n, dtype=F64)     # 30 times less error than random
    noise = torch.distributions.Normal(0, 1).icdf(u[:, :4].clamp(1e-12, 1 - 1e-12))
    x, eps = dataset.centres[(len(dataset.centres) * u[:, 4]).long()] + dataset.std * noise[:, :2], noise[:, 2:]
    t = t_min + (1 - 2 * t_min) * u[:, 5]
    return losses.loss(dataset.optimal_model(target, COSINE, 0.01), x, t, eps, target=target, loss=loss,
                       schedule=COSINE, stabiliser=0.01).mean().item()


@pytest.mark.parametrize("loss, target", BAYES)
def test_errata_8_the_exact_denoiser_of_the_clusters_gives_the_inferred_table(loss, target):
    assert_close(stabilised_optimum("clusters", loss, target, 2**18), BAYES[loss, target], rtol=0.002, atol=0)


@pytest.mark.parametrize("name", THESIS)
def test_errata_8_the_thesis_trained_models_lie_just_above_the_optimum(name):
    """From 1 % below to 7 % above, with 1 % for the error of 2^15 points."""
    for (loss, target), trained in zip(BAYES, THESIS[name]):
        assert 0.98 < trained / stabilised_optimum(name, loss, target, 2**15) < 1.08


def test_over_t_is_the_mean_of_each_bin_however_many_fall_in_it():
    t, errors = torch.tensor([[0.1, 0.11, 0.3, 0.7, 0.9]]), torch.tensor([[1.0, 3.0, 5.0, 7.0, 9.0]])
    assert losses.over_t(errors, t, 0.1, bins=4).tolist() == [[2.0, 5.0, 7.0, 9.0]]
    ends = losses.over_t(torch.ones(2), torch.tensor([1e-3, 0.999]))                 # both ends of t belong to a bin
    assert ends[0] == ends[-1] == 1


@pytest.mark.parametrize("loss", [name for name in losses.LOSSES if name not in (*losses.OF_A_CHAIN, "multi_scale")])
def test_loss_weighs_each_samples_own_error(loss):
    """Errata 5: mean of weight times error, with the error a mean over dimensions, typed out sample by sample."""
    g = torch.Generator().manual_seed(0)
    x, eps = torch.randn(2, 6, 3, 2, dtype=F64, generator=g)
    t = torch.linspace(0.1, 0.9, 6, dtype=F64)
    model = lambda z, t: z.sin() + t[:, None, None]
    values = losses.loss(model, x, t, eps, target="v", loss=loss, schedule=COSINE)
    expected, errors, weights = [], [], losses.weight(loss, "v", t, COSINE)
    for i in range(6):
        alpha, sigma = math.cos(math.pi * t[i] / 2), math.sin(math.pi * t[i] / 2)
        z, v = alpha * x[i] + sigma * eps[i], alpha * eps[i] - sigma * x[i]
        errors.append(sum(((z.sin() + t[i] - v)**2).flatten().tolist()) / 6)
        expected.append(weights[i].item() * errors[-1])
    assert values.shape == (6,)
    assert_close(values, torch.tensor(expected, dtype=F64))
    if loss not in ("mse", "v_space"):                     # of v these weights are 1
        assert abs(values.mean() - weights.mean() * sum(errors) / 6) > 0.003 * values.mean()


def test_a_model_of_the_wrong_shape_is_refused():
    with pytest.raises(AssertionError, match="returned"):
        losses.loss(lambda z, t: z[:, :1], torch.zeros(3, 2), torch.full((3,), 0.5), torch.zeros(3, 2), target="x",
                    loss="mse", schedule=COSINE)
    with pytest.raises(ValueError, match="unknown loss 'foo': choose from .*mse, rescaled, nelbo"):
        losses.weight("foo", "x", T, COSINE)


@every_schedule
@pytest.mark.parametrize("t_min", [1e-3, 0.05])
def test_discrete_loss_is_the_sum_of_equation_3_18(name, t_min):
    """All T terms for Gaussian data: 1/2 sum of (SNR(s) - SNR(t)) mmse(t), typed out."""
    c, steps, schedule = 0.6, 9, SCHEDULES[name]
    i = torch.arange(1, steps + 1)
    grid = t_min + (1 - 2 * t_min) * torch.arange(steps + 1, dtype=F64) / steps
    alpha, sigma = schedule.alpha(grid), schedule.sigma(grid)
    snr = alpha**2 / sigma**2
    expected = 0.5 * sum((snr[k - 1] - snr[k]) * c**2 / (1 + c**2 * snr[k]) for k in range(1, steps + 1))
    x, eps = torch.tensor([[c, 1], [c, -1], [-c, 1], [-c, -1]], dtype=F64).T.repeat_interleave(steps, 1)
    for target, d in *((target, 0.0) for target in TARGETS), ("s", 0.01):
        values = losses.discrete_loss(gaussian_model(c, target, schedule, d), x[:, None], i.repeat(4), eps[:, None],
                                      steps=steps, target=target, schedule=schedule, t_min=t_min, stabiliser=d)
        assert values.shape == (4 * steps,)
        assert_close(values.mean(), expected, rtol=1e-6, atol=0)


@every_schedule
def test_discrete_loss_is_the_kl_of_the_two_posteriors(name):
    """Eq. (3.15) - (3.17): each term is T times KL(q(z_s | z_t, x) || p(z_s | z_t)) by torch.distributions."""
    steps, schedule, g = 8, SCHEDULES[name], torch.Generator().manual_seed(0)
    i = torch.arange(1, steps + 1)
    x, eps = torch.randn(2, steps, 2, dtype=F64, generator=g)
    model = lambda z, t: 0.3 * z - 0.1
    s, t = (1e-3 + (1 - 2e-3) * (i + shift).to(F64) / steps for shift in (-1, 0))
    z = ddpm.q_sample(x, t, eps, schedule)
    mean, var = ddpm.posterior(z, x, s, t, schedule)
    mean_hat, _ = ddpm.posterior(z, model(z, t), s, t, schedule)
    normal = torch.distributions.Normal
    kl = torch.distributions.kl_divergence(normal(mean, var.sqrt()), normal(mean_hat, var.sqrt())).sum(1)
    values = losses.discrete_loss(model, x, i, eps, steps=steps, target="x", schedule=schedule)
    assert_close(values * 2 / steps, kl, rtol=1e-6, atol=0)


@every_schedule
def test_discrete_loss_tends_to_the_continuous_one_from_above(name):
    c, schedule, t_min = 0.6, SCHEDULES[name], 1e-3
    snr = schedule.snr(torch.tensor([t_min, 1 - t_min], dtype=F64))
    limit = 0.5 * torch.log((1 + c**2 * snr[0]) / (1 + c**2 * snr[1])).item()
    gaps = []
    for steps in 64, 256, 1024, 2**18:
        i = torch.arange(1, steps + 1)
        x, eps = torch.tensor([[c, 1], [c, -1], [-c, 1], [-c, -1]], dtype=F64).T.repeat_interleave(steps, 1)
        gaps.append(losses.discrete_loss(gaussian_model(c, "v", schedule), x[:, None], i.repeat(4), eps[:, None],
                                         steps=steps, target="v", schedule=schedule).mean().item() - limit)
    assert gaps[0] > gaps[1] > gaps[2] > gaps[3] > 0
    assert gaps[3] < 2e-3 * limit and gaps[3] < gaps[2] / 100        # the gap halves as T doubles


def test_discrete_loss_does_not_cancel_in_float32():
    """SNR(s) / SNR(t) - 1 = 1e-6 by expm1; an exponential minus one is off by 5 %."""
    schedule = ddpm.Schedule(lambda t: -1e-6 * t, lambda t: torch.full_like(t, -1e-6))
    value = losses.discrete_loss(lambda z, t: 0 * z, torch.ones(1, 2), torch.tensor([1]), torch.ones(1, 2), steps=1,
                                 target="eps", schedule=schedule, t_min=0.0)
    assert_close(value, torch.tensor([0.5e-6]), rtol=1e-5, atol=0)


def test_loss_has_a_gradient_and_t_keeps_its_dtype():
    w = torch.ones((), requires_grad=True)
    losses.loss(lambda z, t: w * z, *(torch.full(s, 0.5) for s in ((3, 2), (3,), (3, 2))), target="x", loss="mse",
                schedule=COSINE).mean().backward()
    assert w.grad != 0
    t = losses.sample_t((5,), 0.1, torch.Generator().manual_seed(0), dtype=F64)
    assert t.dtype == F64 and t[0] != t[0].float()


def test_t_is_uniform_in_its_range_and_stratified_over_each_batch():
    n, t_min = 1000, 0.1
    t = losses.sample_t((7, n), t_min, torch.Generator().manual_seed(0), dtype=F64)
    assert t.shape == (7, n) and t.min() >= t_min and t.max() <= 1 - t_min
    gaps = t.sort(1).values.diff(dim=1)
    assert_close(gaps, torch.full_like(gaps, (1 - 2 * t_min) / n))           # evenly spaced
    assert len(set(t[:, 0].tolist())) == 7                                     # each batch with its own offset
    single = torch.stack([losses.sample_t((4,), t_min, torch.Generator().manual_seed(i))[0] for i in range(4000)])
    assert abs(single.mean() - 0.5) < 4 * 0.8 / 12**0.5 / 4000**0.5           # and each t alone is uniform
    assert abs(single.std() - 0.8 / 12**0.5) < 0.01


def test_stratified_t_has_less_variance():
    means = lambda draw: torch.stack([(draw(i)**2).mean() for i in range(300)]).var()
    plain = means(lambda i: torch.rand(64, generator=torch.Generator().manual_seed(i)))
    assert means(lambda i: losses.sample_t((64,), 0.0, torch.Generator().manual_seed(i))) < 0.1 * plain


@every_schedule
@pytest.mark.parametrize("t_min", [1e-3, 0.1])
def test_importance_is_one_over_the_density_of_t_and_the_length_of_its_range(name, t_min):
    """p(t) = |d logsnr / dt| / range of logsnr, by autograd; with t uniform, and for `ve` in both, it is 1."""
    schedule = SCHEDULES[name]
    t, importance = losses.draw_t((500,), schedule, t_min, "logsnr", torch.Generator().manual_seed(0), F64)
    t.requires_grad_()
    slope, = torch.autograd.grad(schedule.logsnr(t).sum(), t)
    first, last = schedule.logsnr(torch.tensor([1 - t_min, t_min], dtype=F64))
    density = -slope / (last - first)
    assert_close(importance, 1 / (density * (1 - 2 * t_min)), rtol=1e-6, atol=0)
    assert name == "ve" or importance.max() > 1.1 and importance.min() < 0.9
    covered = ((schedule.logsnr(t) - first) / (last - first)).sort().values              # the whole range, evenly
    assert_close(covered.detach(), (torch.arange(500) + 0.5).double() / 500, rtol=0, atol=1.01 / 500)
    t, importance = losses.draw_t((5,), schedule, t_min, "uniform", dtype=F64)
    assert (importance == 1).all() and t.min() >= t_min


def test_the_loss_over_t_is_the_mean_in_each_bin_and_with_importance_a_weighted_one():
    """Four bins of [0.1, 0.9], by hand; errors have the importance as a factor already."""
    t = torch.tensor([0.1, 0.25, 0.31, 0.65, 0.6, 0.9, 0.55], dtype=F64)
    errors = torch.tensor([1, 3, 5, 7, 9, 11, 2], dtype=F64)
    assert_close(losses.over_t(errors, t, 0.1, 4), torch.tensor([2, 5, 6, 11], dtype=F64))
    importance = torch.tensor([3, 1, 2, 1, 1, 4, 2], dtype=F64)
    found = losses.over_t(torch.stack([importance * errors, errors]), t.expand(2, 7), 0.1, 4,
                          torch.stack([importance, torch.ones(7, dtype=F64)]))
    assert_close(found, torch.tensor([[6 / 4, 5, 20 / 4, 11], [2, 5, 6, 11]], dtype=F64))


def test_the_objective_of_a_config():
    config = dict(target="s", loss="rescaled", schedule="ve", stabiliser=0.02, t_min=0.1, seed=3)
    assert losses.objective(config) == dict(target="s", loss="rescaled", schedule=SCHEDULES["ve"], stabiliser=0.02)


# On a discrete chain

CHAIN = discrete.chain(SCHEDULES["ddpm"], 8, 0.0)


@every_schedule
@pytest.mark.parametrize("t_min", [1e-3, 0.05])
def test_each_term_of_the_discrete_loss_with_small_is_equation_3_18_for_any_model(name, t_min):
    """T / 2 (SNR(s) - SNR(t)) |x_hat - x|^2, a mean over dimensions; other variances are the sum of `vlb`."""
    steps, schedule, data = 6, SCHEDULES[name], DATASETS["clusters"]
    i = torch.arange(1, steps + 1)
    x, eps = torch.randn(2, steps, 2, dtype=F64, generator=torch.Generator().manual_seed(0))
    grid = t_min + (1 - 2 * t_min) * torch.arange(steps + 1, dtype=F64) / steps
    alpha, sigma = schedule.alpha(grid[1:])[:, None], schedule.sigma(grid[1:])[:, None]
    snr = (schedule.alpha(grid) / schedule.sigma(grid))**2
    x_hat = lambda z: torch.tanh(z)
    model = lambda z, t: (z - alpha * x_hat(z)) / sigma                                    # eps
    found = losses.discrete_loss(model, x, i, eps, steps=steps, target="eps", schedule=schedule, t_min=t_min)
    z = alpha * x + sigma * eps
    assert_close(found, steps / 2 * (snr[:-1] - snr[1:]) * (x_hat(z) - x).square().mean(1), rtol=1e-6, atol=1e-12)
    for how in dict(variance="large"), dict(variance="best", data=data):
        terms = [variance.term(lambda z, t, k=k: (z - alpha[k - 1] * x_hat(z)) / sigma[k - 1], x[k - 1:k],
                               torch.tensor([k]), eps[k - 1:k], chain=discrete.chain(schedule, steps, t_min),
                               target="eps", **how) for k in i.tolist()]
        found = losses.discrete_loss(model, x, i, eps, steps=steps, target="eps", schedule=schedule, t_min=t_min,
                                     **how)
        assert_close(found.mean(), torch.cat(terms).sum() / 2, rtol=1e-9, atol=0)


def test_a_step_of_a_chain_is_drawn_uniformly_and_stratified():
    t, importance = losses.draw_step((5, 800), CHAIN, generator=torch.Generator().manual_seed(0), dtype=F64)
    i = CHAIN.index(t)
    assert torch.equal(CHAIN.times[i], t) and t.dtype == F64 and t.shape == (5, 800)
    assert i.min() == 1 and i.max() == 8
    for row in i:
        assert ((row.bincount(minlength=9)[1:] - 100).abs() <= 1).all()
    assert_close(importance, torch.ones(5, 800, dtype=F64), rtol=1e-12, atol=0)
    alone = torch.cat([losses.draw_step((1,), CHAIN, generator=torch.Generator().manual_seed(k))[0]
                       for k in range(800)])
    counts = CHAIN.index(alone).bincount(minlength=9)[1:]
    assert alone.dtype == torch.float32 and ((counts - 100).abs() < 40).all()


def test_steps_drawn_by_their_second_moments():
    """p(i) is the root of the moment over the sum of them, with a thousandth uniform: sums over i are unbiased."""
    moments = torch.tensor([0.0, 1.0, 4.0, 9.0, 1.0, 0.25, 0.0, 25.0], dtype=F64)
    p = 0.999 * moments.sqrt() / moments.sqrt().sum() + 0.001 / 8
    draw = lambda n, seed=0, **how: losses.draw_step((n,), CHAIN, generator=torch.Generator().manual_seed(seed),
                                                     dtype=F64, **how)
    t, importance = draw(400_000, moments=moments)
    i = CHAIN.index(t)
    assert ((i.bincount(minlength=9)[1:] - 400_000 * p).abs() <= 1.001).all()              # stratified
    assert_close(importance, 1 / (8 * p)[i - 1], rtol=1e-9, atol=0)
    value = torch.tensor([3.0, -1, 2, 7, 0.5, 1, 4, -2], dtype=F64)                        # a mean over i, exactly:
    seen = torch.zeros(8, dtype=F64).index_put((i - 1,), importance)
    assert (seen > 0).all()
    assert_close((p * seen * value).sum(), value.mean(), rtol=1e-9, atol=0)
    assert_close((importance * value[i - 1]).mean(), value.mean(), rtol=1e-2, atol=0)
    single = losses.draw_step((1000,), CHAIN, moments.float(), torch.Generator().manual_seed(0))
    assert single[0].dtype == single[1].dtype == torch.float32


def test_the_root_of_the_second_moment_has_the_least_variance():
    """Of one draw of the mean over i: the densities proportional to it, to the moment, and the uniform one."""
    errors = torch.tensor([0.01, 0.3, 1.0, 2.0, 3.0, 0.1, 0.1, 5.0], dtype=F64)

    def spread(moments):
        t, importance = losses.draw_step((100_000,), CHAIN, moments, torch.Generator().manual_seed(0), F64)
        return (importance * errors[CHAIN.index(t) - 1]).std()
    assert spread(errors**2) < 0.2 * spread(errors**4)
    assert spread(errors**2) < 0.2 * spread(None)


def test_the_weights_of_a_chain_and_what_needs_one():
    """vlb has no weight of an error, hybrid that of mse; losses and targets of a chain without one say so."""
    t, schedule = CHAIN.times[1:], CHAIN.schedule
    weight = lambda loss, target="mu", chain=CHAIN: losses.weight(loss, target, t, schedule, chain=chain)
    assert weight("vlb").tolist() == 8 * [0] and weight("hybrid").tolist() == weight("mse").tolist() == 8 * [1]
    _, B, _ = ddpm.posterior_coefficients(CHAIN.times[:-1], t, schedule)
    assert_close(weight("rescaled"), 1 / B**2, rtol=1e-9, atol=0)                            # of an error of x
    assert_close(weight("nelbo"), -0.5 * schedule.dsnr(t) / B**2, rtol=1e-7, atol=0)
    for loss in "vlb", "hybrid":
        with pytest.raises(ValueError, match=f"loss {loss} is of a discrete chain: say of how many steps, --timesteps"):
            weight(loss, "eps", None)
    with pytest.raises(ValueError, match="target mu is the mean of a step of a discrete chain"):
        weight("mse", "mu", None)


@pytest.mark.parametrize("target", ["mu", "mu_skip"])
def test_a_network_of_the_mean_learns_the_posterior_mean(target):
    g = torch.Generator().manual_seed(0)
    x, eps = torch.randn(2, 8, 2, dtype=F64, generator=g)
    t, schedule = CHAIN.times[1:], CHAIN.schedule
    z, y, w = losses.regression(x, t, eps, target=target, loss="hybrid", schedule=schedule, chain=CHAIN)
    mean, _ = ddpm.posterior(z, x, CHAIN.times[:-1], t, schedule)
    assert_close(y, mean - z * (target == "mu_skip"), rtol=1e-7, atol=1e-9)
    assert w.tolist() == 8 * [1]


def test_the_chain_of_a_config():
    config = dict(target="mu", loss="vlb", schedule="iddpm", stabiliser=0.0, t_min=0.0, timesteps=30)
    found = losses.objective(config)
    assert found.pop("chain") is discrete.chain(SCHEDULES["iddpm"], 30, 0.0) is losses.chain_of(config)
    assert found == dict(target="mu", loss="vlb", schedule=SCHEDULES["iddpm"], stabiliser=0.0)
    assert losses.chain_of(config | {"timesteps": None}) is None and "chain" not in losses.objective(
        config | {"timesteps": None})
