"""The samplers against closed-form recursions on Gaussian data, each other, diffusers' solver and their order of
convergence."""
import functools
import math

import pytest
import torch
from test_ddpm import alpha_sigma, every_schedule
from torch.testing import assert_close

import grids
import metrics
import multistep
import samplers
from datasets2d import DATASETS, GaussianMixture, rings, standardised, swiss_roll, waves
from ddpm import SCHEDULES

F64 = torch.float64
every_sampler = pytest.mark.parametrize("sampler", samplers.SAMPLERS)
OTHERS = {*multistep.MULTISTEP, "annealed"} - {"dpmpp"}                     # test_multistep.py, test_scores.py
OF_STEPS = [name for name in samplers.SAMPLERS if name not in OTHERS]


def gaussian_model(c, name):
    """Exact x-prediction for data N(0, c^2): E[x | z] = alpha c^2 z / (alpha^2 c^2 + sigma^2)."""
    def model(z, t):
        alpha, sigma = alpha_sigma(name, t[:1])
        return alpha * c**2 / (alpha**2 * c**2 + sigma**2) * z
    return model


@every_schedule
@pytest.mark.parametrize("steps", [1, 2, 7])
def test_ancestral_sampling_of_gaussian_data_has_the_variance_of_its_recursion(name, steps):
    """z_s = (A + B k) z_t + noise is linear, so the variance is known at any number of steps."""
    c, t_min = 0.6, 1e-3
    grid = [t_min + (1 - 2 * t_min) * i / steps for i in range(steps + 1)]
    alpha, sigma = alpha_sigma(name, torch.tensor(grid, dtype=F64))
    k = alpha * c**2 / (alpha**2 * c**2 + sigma**2)
    var = alpha[-1]**2 + sigma[-1]**2
    for i in range(steps, 1, -1):
        gain = alpha[i] / alpha[i - 1] * sigma[i - 1]**2 / sigma[i]**2
        noise = sigma[i - 1]**2 - gain**2 * sigma[i]**2
        var = (gain + (alpha[i - 1] - gain * alpha[i]) * k[i])**2 * var + noise
    samples = samplers.sample(gaussian_model(c, name), (200_000, 1), steps, target="x", t_min=t_min,
                                    schedule=SCHEDULES[name], generator=torch.Generator().manual_seed(0), dtype=F64)
    assert_close(samples.var().item(), (k[1]**2 * var).item(), rtol=0.02, atol=0)


def test_ancestral_sampling_tells_the_network_the_true_t_and_adds_no_noise_at_the_end():
    seen = []

    def model(z, t):
        seen.append(t)
        return torch.full_like(z, 0.25)
    samples = samplers.sample(model, (5, 2), 4, target="x", schedule=SCHEDULES["cosine"], t_min=0.1, dtype=F64)
    assert_close(torch.stack(seen), torch.tensor([0.9, 0.7, 0.5, 0.3], dtype=F64)[:, None].expand(4, 5))
    assert_close(samples, torch.full_like(samples, 0.25), rtol=1e-12, atol=0)


@every_schedule
def test_ancestral_sampling_starts_with_the_variance_of_standardised_data(name):
    """sqrt(alpha^2 + sigma^2), not sigma: for the exploding schedule they differ by 2e-4."""
    seen, seed = [], lambda: torch.Generator().manual_seed(5)
    samplers.sample(lambda z, t: seen.append(z) or z, (6, 2), 1, target="x", schedule=SCHEDULES[name],
                          generator=seed(), dtype=F64)
    alpha, sigma = alpha_sigma(name, torch.tensor([0.999], dtype=F64))
    expected = (alpha**2 + sigma**2).sqrt() * torch.randn(6, 2, generator=seed(), dtype=F64)
    assert_close(seen[0], expected, rtol=1e-7, atol=0)


def test_ancestral_sampling_inverts_the_target_it_is_given():
    """The same denoiser, spoken as x, eps, v, stabilised s and u, draws the same samples."""
    data, schedule, runs = DATASETS["clusters"], SCHEDULES["cosine"], {}
    for target, d in ("x", 0), ("eps", 0), ("v", 0), ("s", 0.01), ("u", 0):
        runs[target] = samplers.sample(data.optimal_model(target, schedule, d), (50, 2), 20, target=target,
                                             schedule=schedule, generator=torch.Generator().manual_seed(3),
                                             stabiliser=d, dtype=F64)
        assert_close(runs[target], runs["x"], rtol=1e-5, atol=1e-6)


def test_ancestral_sampling_repeats_with_its_seed_and_refuses_zero_steps():
    sample = lambda seed, steps=3: samplers.sample(
        gaussian_model(1.0, "cosine"), (4, 2), steps, target="x", schedule=SCHEDULES["cosine"],
        generator=torch.Generator().manual_seed(seed))
    assert torch.equal(sample(1), sample(1)) and not torch.equal(sample(1), sample(2))
    assert sample(1).shape == (4, 2) and sample(1).dtype == torch.float32
    seen = []
    model = lambda z, t: seen.append((z, t)) or torch.zeros_like(z)
    samples = samplers.sample(model, (4, 2), 3, target="x", schedule=SCHEDULES["cosine"], dtype=F64)
    assert samples.dtype == F64 and all(z.dtype == F64 and t.dtype == F64 for z, t in seen)
    assert_close(seen[0][1], torch.full((4,), 0.999, dtype=F64))
    scale = SCHEDULES["cosine"].alpha(seen[0][1][0])**2 + SCHEDULES["cosine"].sigma(seen[0][1][0])**2
    assert (seen[0][0] / scale.sqrt() != (seen[0][0] / scale.sqrt()).float()).any()        # noise drawn in float64
    with pytest.raises(ValueError, match="at least 1"):
        sample(1, steps=0)


def derivatives(name, t):
    """alpha', sigma' by autograd of the textbook alpha and sigma."""
    t = t.clone().requires_grad_()
    return [torch.autograd.grad(c.sum() + 0 * t.sum(), t, retain_graph=True)[0] for c in (alpha_sigma(name, t))]


@every_schedule
@pytest.mark.parametrize("grid", ["t", "logsnr", "karras"])
@pytest.mark.parametrize("sampler, eta", [*((name, None) for name in OF_STEPS), ("ddim", 0.4), ("sde", 0.4)])
@pytest.mark.parametrize("n", [1, 2, 9])
def test_gaussian_data_follow_the_recursion_of_the_sampler(name, grid, sampler, eta, n):
    """With x_hat = k z every step is z_s = G z + noise: path and variance from G, typed without the code's formulas."""
    c, t_min, steps = 0.6, 0.01, 2 * n - 1 if sampler == "heun" else n
    times = samplers.GRIDS[grid](n, SCHEDULES[name], t_min, dtype=F64)
    alpha, sigma = alpha_sigma(name, times)
    dalpha, dsigma = derivatives(name, times)
    k = alpha * c**2 / (alpha**2 * c**2 + sigma**2)
    e = (1 - alpha * k) / sigma
    slope = dalpha * k + dsigma * e                                          # dz/dt of the flow = alpha' x + sigma' eps
    drift = dalpha / alpha
    g_sq = 2 * sigma * dsigma - 2 * drift * sigma**2
    seed = lambda: torch.Generator().manual_seed(3)
    g = seed()
    noise = lambda: torch.randn(20_000, 1, generator=g, dtype=F64)
    z, var, before = (alpha[0]**2 + sigma[0]**2).sqrt() * noise(), alpha[0]**2 + sigma[0]**2, None
    gain_all = (alpha[0]**2 + sigma[0]**2).sqrt()
    for i in range(n - 1):
        j, step, extra = i + 1, times[i + 1] - times[i], torch.zeros((), dtype=F64)
        covariance = alpha[i] / alpha[j] * sigma[j]**2                          # of z_s and z_t given x
        posterior_var = sigma[j]**2 - covariance**2 / sigma[i]**2
        if sampler == "ancestral":
            gain, extra = alpha[j] * k[i] + covariance / sigma[i]**2 * (1 - alpha[i] * k[i]), posterior_var
        elif sampler == "ddim":
            extra = (eta or 0)**2 * posterior_var
            gain = alpha[j] * k[i] + (sigma[j]**2 - extra).sqrt() * e[i]
        elif sampler == "sde":
            k_sq = 1 if eta is None else eta**2
            gain = 1 + (drift[i] + (1 + k_sq) / 2 * g_sq[i] * e[i] / sigma[i]) * step
            extra = -k_sq * g_sq[i] * step
        elif sampler == "euler":
            gain = 1 + slope[i] * step
        elif sampler == "heun":
            gain = 1 + step / 2 * (slope[i] + slope[j] * (1 + step * slope[i]))
        else:
            lam = (alpha / sigma).log()
            h = lam[j] - lam[i]
            data = k[i] * gain_all
            if before is not None:
                r = (lam[i] - lam[i - 1]) / h
                data = (1 + 1 / (2 * r)) * data - before / (2 * r)
            before = k[i] * gain_all
            gain_all = sigma[j] / sigma[i] * gain_all - alpha[j] * (torch.exp(-h) - 1) * data
            continue
        z, var, gain_all = gain * z, gain**2 * var + extra, gain * gain_all
        if extra > 0:
            z = z + extra.sqrt() * noise()
    if sampler == "dpmpp":
        g = seed()
        z, var = gain_all * noise(), gain_all**2
    options = {} if eta is None else {"eta": eta}
    found = samplers.sample(gaussian_model(c, name), (20_000, 1), steps, target="x", schedule=SCHEDULES[name],
                            sampler=sampler, grid=grid, t_min=t_min, generator=seed(), dtype=F64, **options)
    assert_close(found, k[-1] * z, rtol=1e-5, atol=1e-6 * found.abs().max().item())
    assert_close(found.var().item(), (k[-1]**2 * var).item(), rtol=0.05, atol=0)


@every_schedule
@pytest.mark.parametrize("churn", [0.6, 100])
def test_heun_with_churn_on_gaussian_data(name, churn):
    """Karras et al. 2022, Alg. 2, in z / alpha: noise up to level (1 + gamma) times the old, but at most the first."""
    c, t_min, n, schedule = 0.6, 0.01, 4, SCHEDULES[name]
    gamma, g = min(churn / n, math.sqrt(2) - 1), torch.Generator().manual_seed(3)
    noise = lambda: torch.randn(20_000, 1, generator=g, dtype=F64)
    times = samplers.GRIDS["logsnr"](n, schedule, t_min, dtype=F64)
    at = lambda t: [value.item() for value in (*alpha_sigma(name, t[None]), *derivatives(name, t[None]))]
    slope = lambda t: (lambda a, s, da, ds: (da * a * c**2 + ds * s) / (a**2 * c**2 + s**2))(*at(t))
    alpha, sigma, *_ = at(times[0])
    z, var, first = math.hypot(alpha, sigma) * noise(), alpha**2 + sigma**2, sigma / alpha
    for i in range(n - 1):
        alpha, sigma, *_ = at(times[i])
        level = min((1 + gamma) * sigma / alpha, first)
        back = schedule.t(torch.tensor(-2 * math.log(level), dtype=F64))
        up, added = at(back)[0] / alpha, (at(back)[0]**2 * (level**2 - (sigma / alpha)**2))
        z, var = up * z + max(added, 0)**0.5 * noise(), up**2 * var + max(added, 0)
        h = (times[i + 1] - back).item()
        gain = 1 + h / 2 * (slope(back) + slope(times[i + 1]) * (1 + h * slope(back)))
        z, var = gain * z, gain**2 * var
    alpha, sigma, *_ = at(times[-1])
    k = alpha * c**2 / (alpha**2 * c**2 + sigma**2)
    found = samplers.sample(gaussian_model(c, name), (20_000, 1), 2 * n - 1, target="x", schedule=schedule,
                            sampler="heun", grid="logsnr", t_min=t_min, generator=torch.Generator().manual_seed(3),
                            dtype=F64, churn=churn)
    assert_close(found, k * z, rtol=1e-4, atol=1e-5 * found.abs().max().item())
    assert_close(found.var().item(), k**2 * var, rtol=0.05, atol=0)


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_every_eta_of_the_sde_has_the_same_marginals(eta):
    """On N(0, 0.6^2), in 400 steps; without noise it is `euler`."""
    draw = lambda sampler, **how: samplers.sample(
        gaussian_model(0.6, "cosine"), (20_000, 1), 400, target="x", schedule=SCHEDULES["cosine"], sampler=sampler,
        generator=torch.Generator().manual_seed(3), dtype=F64, **how)
    found = draw("sde", eta=eta)
    assert_close(found.std().item(), 0.6, rtol=0.02, atol=0)
    if eta == 0:
        assert_close(found, draw("euler"))


def test_noise_corrects_what_an_error_of_the_network_does():
    """Slides: a flow has no stochastic error correction. eps_hat + 0.1 sin 3z, exact otherwise: density of samples."""
    data, schedule = DATASETS["clusters"], SCHEDULES["cosine"]
    exact_eps = data.optimal_model("eps", schedule)
    density = lambda eta: data.log_prob(samplers.sample(
        lambda z, t: exact_eps(z, t) + 0.1 * torch.sin(3 * z), (4000, 2), 128, target="eps", schedule=schedule,
        sampler="sde", grid="logsnr", generator=torch.Generator().manual_seed(3), eta=eta)).mean().item()
    flow, quarter, reverse = map(density, (0.0, 0.25, 1.0))
    assert flow + 1 < quarter < reverse - 0.2


def exact(sampler, n, data="clusters", target="v", count=60, **options):
    """Samples with the exact denoiser, from the same noise, in float64."""
    schedule = SCHEDULES["cosine"]
    return samplers.sample(DATASETS[data].optimal_model(target, schedule), (count, 2), n, target=target,
                           schedule=schedule, sampler=sampler, generator=torch.Generator().manual_seed(2), dtype=F64,
                           **options)


@functools.cache
def exact_end():
    """Without the error of second order of Heun's method, of which 512 steps have four times that of 1,024."""
    coarse, fine = (exact("heun", n, grid="logsnr", count=20) for n in (1023, 2047))
    return (4 * fine - coarse) / 3


@pytest.mark.parametrize("sampler, order", [("euler", 1), ("ddim", 1), ("heun", 2), ("dpmpp", 2)])
def test_the_order_of_convergence(sampler, order):
    """When the steps double the error falls by 2 for Euler and DDIM, by 4 for Heun and DPM-Solver++(2M).

    In log-SNR: there the time from which the last step goes to 0 is the same for all.
    """
    reference = exact_end()
    numbers = [799, 1599] if sampler == "heun" else [400, 800]
    coarse, fine = ((exact(sampler, n, grid="logsnr", count=20) - reference).square().mean().sqrt() for n in numbers)
    assert 0.95 * 2**order < coarse / fine < 1.05 * 2**order and fine < 0.003


def test_the_samplers_of_the_ode_end_in_the_same_points_and_those_with_noise_do_not():
    reference = exact("heun", 2047)
    for sampler in "euler", "ddim", "dpmpp":
        assert_close(exact(sampler, 1024), reference, rtol=0, atol=0.05)
    for sampler in "ancestral", "sde":
        assert (exact(sampler, 64) - reference).abs().max() > 1


@every_schedule
def test_ddim_with_eta_1_is_ancestral_and_its_first_step_that_of_dpmpp(name):
    schedule = SCHEDULES[name]
    draw = lambda sampler, n, **options: samplers.sample(
        DATASETS["clusters"].optimal_model("eps", schedule), (50, 2), n, target="eps", schedule=schedule,
        sampler=sampler, generator=torch.Generator().manual_seed(2), dtype=F64, **options)
    assert_close(draw("ddim", 12, eta=1.0), draw("ancestral", 12), rtol=1e-6, atol=1e-8)
    assert_close(draw("ddim", 2), draw("dpmpp", 2), rtol=1e-6, atol=1e-8)
    assert (draw("ddim", 3) - draw("dpmpp", 3)).abs().max() > 1e-3


def test_dpmpp_is_diffusers():
    diffusers = pytest.importorskip("diffusers")
    schedule, n = SCHEDULES["cosine"], 7
    times = samplers.GRIDS["t"](n, schedule, 1e-3, dtype=F64)
    theirs = diffusers.DPMSolverMultistepScheduler(solver_order=2, algorithm_type="dpmsolver++",
                                                   final_sigmas_type="zero")
    theirs.set_timesteps(n)
    theirs.sigmas = torch.cat([schedule.sigma(times) / schedule.alpha(times), torch.zeros(1, dtype=F64)])
    assert len(theirs.timesteps) == n
    theirs.convert_model_output = lambda output, *args, **kw: output                     # it is given x_hat
    model = DATASETS["clusters"].optimal_model("x", schedule)
    z = (schedule.alpha(times[0])**2 + schedule.sigma(times[0])**2).sqrt() * torch.randn(
        60, 2, generator=torch.Generator().manual_seed(2), dtype=F64)
    for t, step in zip(times, theirs.timesteps):
        z = theirs.step(model(z, t.expand(60)), step, z).prev_sample
    assert_close(exact("dpmpp", n, target="x"), z, rtol=1e-5, atol=1e-5)


COARSE = {"clusters": DATASETS["clusters"], "rings": standardised(*rings(100)),
          "swiss_roll": standardised(*swiss_roll(150)), "waves": standardised(*waves(100))}      # fewer centres: faster


@functools.cache
def floors(data):
    return metrics.floor(DATASETS[data], 2000, 20_000, 20, torch.Generator().manual_seed(6))


@pytest.mark.parametrize("data", ["clusters", "swiss_roll"])
@pytest.mark.parametrize("sampler", sorted({*OF_STEPS, *multistep.MULTISTEP} - {"ancestral"}))
def test_every_sampler_converges_to_the_floor(sampler, data):
    """That of `ancestral`, with more samples, is in test_datasets2d.py."""
    schedule, g = SCHEDULES["cosine"], torch.Generator().manual_seed(5)
    steps = {"sde": 256, "ddim": 192}.get(sampler, 64)
    real = DATASETS[data].sample(20_000, g)
    samples = samplers.sample(COARSE[data].optimal_model("x", schedule), (2000, 2), steps, target="x",
                              schedule=schedule, sampler=sampler, generator=g)
    for distance, (mean, std) in floors(data).items():
        assert getattr(metrics, distance)(samples, real) < mean + 3.5 * std


@every_schedule
def test_the_grids(name):
    """t equal in t; log-SNR equal in it; Karras et al. 2022, Eq. (5), typed again; one time is the first."""
    schedule, n, t_min = SCHEDULES[name], 6, 0.002
    like = dict(schedule=schedule, t_min=t_min, dtype=F64)
    i = torch.arange(n, dtype=F64)
    assert_close(samplers.GRIDS["t"](n, **like), t_min + (1 - 2 * t_min) * (n - i) / n)
    ends = torch.tensor([1 - t_min, t_min], dtype=F64)
    alpha, sigma = alpha_sigma(name, torch.cat([ends, *(samplers.GRIDS[grid](n, **like)
                                                        for grid in ("logsnr", "karras"))]))
    first, last = (sigma / alpha)[:2]
    assert_close((sigma / alpha).log()[2:2 + n], first.log() + i / (n - 1) * (last / first).log(), rtol=1e-6, atol=1e-7)
    expected = (first**(1 / 7) + i / (n - 1) * (last**(1 / 7) - first**(1 / 7)))**7
    assert_close((sigma / alpha)[2 + n:], expected, rtol=1e-6, atol=1e-9)
    assert_close(grids.karras(3, rho=3, **like)[1],
                 schedule.t(-2 * (3 * (first**(1 / 3) + last**(1 / 3)).div(2).log())))
    for grid in samplers.GRIDS.values():
        assert_close(grid(1, **like), torch.tensor([1 - t_min], dtype=F64), rtol=0, atol=1e-9)
        assert grid(4, schedule, t_min, dtype=torch.float32).dtype == grid(4, schedule, t_min).dtype == torch.float32


@every_sampler
@pytest.mark.parametrize("steps", [1, 2, 5, 8])
def test_the_number_of_evaluations(sampler, steps):
    seen = []
    model = lambda z, t: seen.append(t[0].item()) or torch.zeros_like(z)
    samples = samplers.sample(model, (2, 1, 3, 4), steps, target="eps", schedule=SCHEDULES["cosine"], sampler=sampler,
                              dtype=F64)
    assert samples.shape == (2, 1, 3, 4)
    expected = {"heun": steps - (steps % 2 == 0), "annealed": 1}.get(sampler, steps)
    assert len(seen) == expected == samplers.evaluations(sampler, steps) and abs(seen[0] - 0.999) < 1e-9


@every_sampler
def test_the_same_denoiser_in_any_target_draws_the_same(sampler):
    runs = [exact(sampler, 20, target=target, grid="logsnr") for target in ("x", "eps", "v", "s", "u")]
    for samples in runs[1:]:
        assert_close(samples, runs[0], rtol=1e-4, atol=1e-4)


def test_eps_hat_goes_with_the_clipped_x_hat():
    schedule, t = SCHEDULES["cosine"], torch.tensor(0.4, dtype=F64)
    z = torch.tensor([[3.0, -0.2]], dtype=F64)
    x_hat, eps_hat = samplers.denoiser(lambda z, t: torch.zeros_like(z), "eps", schedule, clip=1.0)(z, t)
    alpha, sigma = math.cos(0.2 * math.pi), math.sin(0.2 * math.pi)
    assert_close(x_hat, torch.tensor([[1.0, -0.2 / alpha]], dtype=F64))
    assert_close(eps_hat, torch.tensor([[(3 - alpha) / sigma, 0]], dtype=F64))


def test_a_stack_is_its_members_with_every_sampler():
    """Two networks of different targets in one call: the same draws for both."""
    data, schedule = DATASETS["clusters"], SCHEDULES["cosine"]
    first, second = (data.optimal_model(target, schedule) for target in ("x", "v"))
    both = lambda z, t: torch.cat([first(*(c[:10] for c in (z, t))), second(*(c[10:] for c in (z, t)))])
    for sampler in samplers.SAMPLERS:
        draw = lambda model, target, sampler=sampler: samplers.sample(
            model, (10, 2), 6, target=target, schedule=schedule, sampler=sampler,
            generator=torch.Generator().manual_seed(2), dtype=F64)
        assert_close(draw(both, ["x", "v"]), torch.cat([draw(first, "x"), draw(second, "v")]))


def test_times_that_are_the_same_in_float32_do_no_harm():
    """512 of Karras's times from 1 - 1e-6 on."""
    times = samplers.GRIDS["karras"](512, SCHEDULES["cosine"], 1e-6, dtype=torch.float32)
    assert (times.diff() == 0).any()
    data = DATASETS["clusters"]
    samples = samplers.sample(data.optimal_model("x", SCHEDULES["cosine"]), (500, 2), 512, target="x",
                              schedule=SCHEDULES["cosine"], sampler="dpmpp", grid="karras", t_min=1e-6,
                              generator=torch.Generator().manual_seed(0))
    assert abs(data.log_prob(samples).mean() + 0.96) < 0.15


def test_unknown_names_and_too_few_steps():
    for options, message in (dict(sampler="plms"),
                             "unknown sampler 'plms': choose from .*ancestral, ddim, sde, euler, heun, dpmpp"), \
                            (dict(grid="cosine"), "unknown grid 'cosine': choose from .*t, logsnr, karras"):
        with pytest.raises(ValueError, match=message):
            samplers.sample(None, (1, 2), 3, target="x", schedule=SCHEDULES["cosine"], **options)


@pytest.mark.parametrize("sampler", ["ddim", "heun", "dpmpp"])
def test_the_flow_of_wide_gaussian_data_is_followed_however_far_it_goes(sampler):
    """N(0, 10^2): z over its standard deviation stays what it was at first, so that most samples end beyond any range
    of images."""
    c, schedule, t_min = 10.0, SCHEDULES["cosine"], 1e-3
    n = 799 if sampler == "heun" else 400
    found = samplers.sample(gaussian_model(c, "cosine"), (100, 1), n, target="x", schedule=schedule, sampler=sampler,
                            grid="logsnr", generator=torch.Generator().manual_seed(4), dtype=F64)
    alpha, sigma = alpha_sigma("cosine", torch.tensor([1 - t_min, t_min], dtype=F64))
    first = torch.randn(100, 1, generator=torch.Generator().manual_seed(4), dtype=F64)
    var = alpha**2 * c**2 + sigma**2
    expected = alpha[1] * c**2 / var[1] * (var[1] / var[0]).sqrt() * first
    assert_close(found, expected, rtol=0.03 if sampler == "ddim" else 0.001, atol=1e-6)
    assert (found.abs() > 4).sum() > 50


# Variances of a step, and the chain of DDPM

@every_schedule
@pytest.mark.parametrize("variance", ["small", "large", "best", "range", "log"])
def test_ancestral_sampling_with_each_variance_follows_its_recursion(name, variance):
    """z_s = (A + B k) z_t + sqrt(v) noise, path and variance; `out` of a learned one is the network's second half."""
    c, t_min, n, count = 0.6, 0.01, 6, 20_000
    times = torch.tensor([t_min + (1 - 2 * t_min) * i / n for i in range(n, 0, -1)], dtype=F64)
    alpha, sigma = alpha_sigma(name, times)
    k = alpha * c**2 / (alpha**2 * c**2 + sigma**2)
    out = {"range": 0.4 + times, "log": -3 * times}.get(variance)
    learned = dict(zip(times.tolist(), out.tolist())) if out is not None else {}

    def model(z, t):
        x_hat = gaussian_model(c, name)(z, t)
        return torch.cat([x_hat, torch.full_like(z, learned[t[0].item()])], 1) if learned else x_hat
    g = torch.Generator().manual_seed(3)
    noise = lambda: torch.randn(count, 2, generator=g, dtype=F64)
    spread = alpha[0]**2 + sigma[0]**2
    z = spread.sqrt() * noise()
    for i in range(n - 1):
        gain = alpha[i] / alpha[i + 1] * sigma[i + 1]**2 / sigma[i]**2
        B = alpha[i + 1] - gain * alpha[i]
        beta = sigma[i]**2 - (alpha[i] / alpha[i + 1] * sigma[i + 1])**2
        q = beta * sigma[i + 1]**2 / sigma[i]**2
        v = {"small": q, "large": beta, "best": q + B**2 * k[i] * sigma[i]**2 / alpha[i]}.get(variance)
        if variance == "range":
            v = beta**((out[i] + 1) / 2) * q**((1 - out[i]) / 2)
        elif variance == "log":
            v = out[i].exp()
        z, spread = (gain + B * k[i]) * z + v.sqrt() * noise(), (gain + B * k[i])**2 * spread + v
    data = GaussianMixture(torch.zeros(1, 2, dtype=F64), torch.full((2,), c, dtype=F64))
    found = samplers.sample(model, (count, 2), n, target="x", schedule=SCHEDULES[name], t_min=t_min, dtype=F64,
                            generator=torch.Generator().manual_seed(3), variance=variance, data=data)
    assert_close(found, k[-1] * z, rtol=1e-5, atol=1e-6)
    assert_close(found.var().item(), (k[-1]**2 * spread).item(), rtol=0.05, atol=0)


def algorithm_2(eps_model, beta, variance, shape, seed):
    """Slides; Ho et al. 2020, Alg. 2. The network is told i / T."""
    g, T = torch.Generator().manual_seed(seed), len(beta)
    alpha, abar = 1 - beta, torch.cumprod(1 - beta, 0)
    x = torch.randn(shape, generator=g, dtype=F64)
    for i in range(T, 0, -1):
        eps = eps_model(x, torch.full((len(x),), i / T, dtype=F64))
        x = (x - beta[i - 1] / (1 - abar[i - 1]).sqrt() * eps) / alpha[i - 1].sqrt()
        if i > 1:
            var = beta[i - 1] if variance == "large" else beta[i - 1] * (1 - abar[i - 2]) / (1 - abar[i - 1])
            x = x + var.sqrt() * torch.randn(shape, generator=g, dtype=F64)
    return x


EPS_MODEL = lambda z, t: torch.tanh(z) * t[:, None].sqrt()


@pytest.mark.parametrize("T, grid, variance", [(1000, "t", "small"), (25, "rescaled", "large"),
                                               (60, "rescaled", "small")])
def test_algorithm_2_of_the_slides(T, grid, variance):
    """beta = linspace(1e-4, 0.02, 1000); in other steps, times 1000 / T (Foundations 1.25). The last step has no
    noise."""
    beta = torch.linspace(1e-4, 0.02, T, dtype=F64) * 1000 / T
    found = samplers.sample(EPS_MODEL, (4, 2), T, target="eps", schedule=SCHEDULES["ddpm"], grid=grid,
                            variance=variance, t_min=0.3 if grid == "rescaled" else 0.0,
                            generator=torch.Generator().manual_seed(1), dtype=F64)
    assert_close(found, algorithm_2(EPS_MODEL, beta, variance, (4, 2), 1), rtol=1e-6, atol=1e-8)


def test_fewer_steps_of_the_chain_skip_those_between():
    """Nichol and Dhariwal 2021, Eq. (19): abar of every fortieth step, and betas from their ratios."""
    abar = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=F64), 0)
    abar = torch.cat([torch.ones(1, dtype=F64), abar])[::40]
    found = samplers.sample(EPS_MODEL, (4, 2), 25, target="eps", schedule=SCHEDULES["ddpm"], t_min=0.0,
                            generator=torch.Generator().manual_seed(1), dtype=F64)
    assert_close(found, algorithm_2(EPS_MODEL, 1 - abar[1:] / abar[:-1], "small", (4, 2), 1), rtol=1e-6, atol=1e-8)


def test_what_cannot_be_rescaled():
    draw = lambda schedule, steps: samplers.sample(EPS_MODEL, (4, 2), steps, target="eps", grid="rescaled",
                                                   schedule=SCHEDULES[schedule])
    with pytest.raises(ValueError, match="steps must be at least 21, got 20: else the last beta is 1 or more"):
        draw("ddpm", 20)
    with pytest.raises(ValueError, match="those of schedule ddpm"):
        draw("iddpm", 30)
    assert draw("ddpm", 21).shape == (4, 2)


def test_the_denoiser_hands_on_the_second_half_of_a_network():
    """Of images on the axis of channels, of a stack that of both members; a network of one half has no third result."""
    schedule, t = SCHEDULES["cosine"], torch.tensor(0.3, dtype=F64)
    z = torch.randn(4, 3, 2, 2, generator=torch.Generator().manual_seed(0), dtype=F64)
    out = z.cos()
    pair = lambda z, t: torch.cat([torch.tanh(z), out], 1)
    x_hat, eps_hat, *rest = samplers.denoiser(pair, ["x", "eps"], schedule)(z, t)
    alpha, sigma = math.cos(0.15 * math.pi), math.sin(0.15 * math.pi)
    assert_close(x_hat, torch.cat([torch.tanh(z[:2]), (z[2:] - sigma * torch.tanh(z[2:])) / alpha]), rtol=1e-7, atol=0)
    assert_close(eps_hat[2:], torch.tanh(z[2:]), rtol=1e-7, atol=1e-12)
    assert len(rest) == 1 and torch.equal(rest[0], out)
    assert len(samplers.denoiser(lambda z, t: z, "x", schedule)(z, t)) == 2
