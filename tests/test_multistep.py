"""The samplers that remember: against quadrature, typed recursions on Gaussian data, diffusers' schedulers and their
order of convergence."""
import functools
import math

import numpy as np
import pytest
import torch
from test_ddpm import alpha_sigma, every_schedule
from test_samplers import exact, gaussian_model
from torch.testing import assert_close

import multistep
import samplers
from datasets2d import DATASETS
from ddpm import SCHEDULES

F64 = torch.float64
FLOWS = [name for name in multistep.MULTISTEP if name != "sde_dpmpp"]


def polynomial_step(lambdas, values, start, end):
    """The integral of e^(lambda - end) times the polynomial through values, by Gauss-Legendre; of a line its middle."""
    nodes, weights = np.polynomial.legendre.leggauss(30)
    lam = start + (end - start) * (nodes + 1) / 2
    if len(values) == 2:
        (a, b), (x, y) = lambdas, values
        return (x + (y - x) * ((start + end) / 2 - a) / (b - a)) * (1 - math.exp(start - end))
    lagrange = [np.prod([(lam - other) / (own - other) for other in lambdas if other != own], axis=0)
                for own in lambdas]
    return sum(value * (end - start) / 2 * np.sum(weights * np.exp(lam - end) * basis)
               for value, basis in zip(values, lagrange))


@pytest.mark.parametrize("name", ["cosine", "ve", "flow"])
@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_a_step_integrates_the_polynomial_through_what_is_known(name, n):
    schedule, times = SCHEDULES[name], torch.tensor([0.8, 0.7, 0.55, 0.4, 0.2], dtype=F64)
    (alpha, sigma), x = alpha_sigma(name, times), [0.3, -0.7, 0.5, 1.1][4 - n:]
    lam = (alpha / sigma).log().tolist()
    z = torch.tensor([[1.3]], dtype=F64)
    known = {at: torch.full((1, 1), value, dtype=F64) for at, value in zip(lam[4 - n:4], x)}
    expected = sigma[4] / sigma[3] * 1.3 + alpha[4] * polynomial_step(lam[4 - n:4], x, lam[3], lam[4])
    assert_close(multistep.step(z, times[3], times[4], known, schedule).item(), expected.item(), rtol=1e-7, atol=0)


def recursion(sampler, alpha, sigma, k):
    """What multiplies the first z in the last x_hat, if x_hat = k z: float by float."""
    lam, e = np.log(alpha / sigma), (1 - alpha * k) / sigma
    gains, xs = [1.0], []                                # of z and x_hat at every time
    order = {"dpmpp3m": 3, "unipc3": 3, "ipndm": 4}.get(sampler, 2)
    z = 1.0
    for i in range(len(k)):
        xs.append((k if sampler != "ipndm" else e)[i] * z)
        if sampler.startswith("unipc") and i:            # corrected with the x_hat of here
            first = max(0, i - order)
            z = sigma[i] / sigma[i - 1] * gains[-1] + alpha[i] * polynomial_step(
                lam[first:i + 1], xs[first:], lam[i - 1], lam[i])
        if i == len(k) - 1:
            return xs[-1] if sampler != "ipndm" else k[i] * z
        if i:
            gains.append(z)
        first = max(0, i + 1 - order)
        if sampler == "ipndm":
            weights = {1: [1], 2: [-1 / 2, 3 / 2], 3: [5 / 12, -4 / 3, 23 / 12],
                       4: [-9 / 24, 37 / 24, -59 / 24, 55 / 24]}[i + 1 - first]
            eps = np.dot(weights, xs[first:])
            z = alpha[i + 1] * (z - sigma[i] * eps) / alpha[i] + sigma[i + 1] * eps
        else:
            z = sigma[i + 1] / sigma[i] * z + alpha[i + 1] * polynomial_step(
                lam[first:i + 1], xs[first:], lam[i], lam[i + 1])


@every_schedule
@pytest.mark.parametrize("sampler", FLOWS)
def test_gaussian_data_follow_the_recursion(name, sampler):
    c, t_min = 0.6, 0.01
    for n in 1, 2, 3, 4, 9:
        times = samplers.GRIDS["logsnr"](n, SCHEDULES[name], t_min, dtype=F64)
        alpha, sigma = (value.numpy() for value in alpha_sigma(name, times))
        k = alpha * c**2 / (alpha**2 * c**2 + sigma**2)
        first = np.hypot(alpha[0], sigma[0]) * torch.randn(5, 1, generator=torch.Generator().manual_seed(3), dtype=F64)
        found = samplers.sample(gaussian_model(c, name), (5, 1), n, target="x", schedule=SCHEDULES[name],
                                sampler=sampler, grid="logsnr", t_min=t_min, dtype=F64,
                                generator=torch.Generator().manual_seed(3))
        assert_close(found, recursion(sampler, alpha, sigma, k) * first, rtol=1e-5, atol=1e-7)


@every_schedule
@pytest.mark.parametrize("n", [1, 2, 3, 7])
def test_the_law_of_sde_dpmpp_on_gaussian_data(name, n):
    """z is linear in the first z and in the noise of every step: its path and its variance."""
    c, t_min = 0.6, 0.01
    times = samplers.GRIDS["logsnr"](n, SCHEDULES[name], t_min, dtype=F64)
    alpha, sigma = (value.numpy() for value in alpha_sigma(name, times))
    k, lam = alpha * c**2 / (alpha**2 * c**2 + sigma**2), np.log(alpha / sigma)
    z = np.hypot(alpha[0], sigma[0]) * np.eye(n)[0]      # coefficients of the n draws
    before = None
    for i in range(n - 1):
        h, x = lam[i + 1] - lam[i], k[i] * z
        middle = x if before is None else x + (x - before) * h / 2 / (lam[i] - lam[i - 1])
        before = x
        z = (sigma[i + 1] / sigma[i] * math.exp(-h) * z + alpha[i + 1] * (1 - math.exp(-2 * h)) * middle
             + sigma[i + 1] * math.sqrt(1 - math.exp(-2 * h)) * np.eye(n)[i + 1])
    g = torch.Generator().manual_seed(3)
    draws = torch.stack([torch.randn(20_000, 1, generator=g, dtype=F64) for _ in range(n)], -1)
    found = samplers.sample(gaussian_model(c, name), (20_000, 1), n, target="x", schedule=SCHEDULES[name],
                            sampler="sde_dpmpp", grid="logsnr", t_min=t_min, dtype=F64,
                            generator=torch.Generator().manual_seed(3))
    assert_close(found, draws @ torch.tensor(k[-1] * z, dtype=F64), rtol=1e-5, atol=1e-6)
    assert_close(found.std().item(), k[-1] * np.linalg.norm(z), rtol=0.03, atol=0)


@pytest.mark.parametrize("sampler, order", [("dpmpp", 2), ("dpmpp3m", 3), ("unipc", 3), ("unipc3", 4), ("ipndm", 2)])
def test_the_order_of_convergence(sampler, order):
    """On N(0, 0.6^2), where z over its standard deviation stays as it is, from noise to t = 0.3, log-SNR equal.

    A corrector adds one to the order of its predictor. iPNDM's weights are those of equal steps of sigma / alpha, which
    these are not. All need the first steps, of lower order, to be where x_hat hardly changes.
    """
    c, schedule, errors = 0.6, SCHEDULES["cosine"], []
    ends = torch.tensor([0.999, 0.3], dtype=F64)
    alpha, sigma = alpha_sigma("cosine", ends)
    var = alpha**2 * c**2 + sigma**2
    right = (alpha[1] * c**2 / var[1] * (var[1] / var[0]).sqrt()).item()
    for n in 150, 300:
        times = schedule.t(torch.linspace(*schedule.logsnr(ends).tolist(), n + 1, dtype=F64))
        denoise = samplers.denoiser(gaussian_model(c, "cosine"), "x", schedule)
        z = torch.ones(1, 1, dtype=F64)
        errors.append(abs(multistep.MULTISTEP[sampler](denoise, z, times, schedule, None).item() - right))
    assert 0.85 * 2**order < errors[0] / errors[1] < 1.15 * 2**order and errors[1] < 1e-3


def test_ipndm_integrates_a_cubic_with_equal_steps_of_its_own():
    """eps_hat a cubic of sigma / alpha: once four values are known, every step is exact."""
    schedule, seen = SCHEDULES["flow"], []
    times = schedule.t(-2 * torch.linspace(2, 1, 9, dtype=F64).log())
    cubic = np.polynomial.Polynomial([0.3, -1.0, 0.7, 0.4])

    def denoise(z, t):
        level = (t / (1 - t)).item()
        seen.append((level, (z / (1 - t)).item()))
        return z, torch.full_like(z, cubic(level))
    multistep.ipndm(denoise, torch.ones(1, 1, dtype=F64), times, schedule, None)
    for (late, z), (early, z_next) in zip(seen[3:], seen[4:]):
        assert z_next - z == pytest.approx(cubic.integ()(early) - cubic.integ()(late), abs=1e-9)


def dictated(scheduler, n, times, schedule):
    """diffusers' scheduler on our times, given x_hat."""
    scheduler.set_timesteps(n)
    scheduler.sigmas = torch.cat([schedule.sigma(times) / schedule.alpha(times), torch.zeros(1, dtype=F64)])
    scheduler.convert_model_output = lambda output, *args, **kw: output
    return scheduler


@pytest.mark.parametrize("sampler", ["unipc", "unipc3", "dpmpp3m", "sde_dpmpp", "ipndm"])
def test_they_are_diffusers(sampler):
    """dpmpp3m is UniPC-3 without its corrector: diffusers' own 3M, as k-diffusion's, is no third order, see below."""
    diffusers = pytest.importorskip("diffusers")
    schedule, n = SCHEDULES["cosine"], 9
    times = samplers.GRIDS["t"](n, schedule, 1e-3, dtype=F64)
    unipc = functools.partial(diffusers.UniPCMultistepScheduler, solver_type="bh2", predict_x0=True,
                              final_sigmas_type="zero")
    theirs = {"unipc": lambda: unipc(solver_order=2), "unipc3": lambda: unipc(solver_order=3, lower_order_final=False),
              "dpmpp3m": lambda: unipc(solver_order=3, disable_corrector=range(n), lower_order_final=False),
              "sde_dpmpp": lambda: diffusers.DPMSolverMultistepScheduler(
                  solver_order=2, algorithm_type="sde-dpmsolver++", final_sigmas_type="zero"),
              "ipndm": diffusers.IPNDMScheduler}[sampler]()
    dictated(theirs, n, times, schedule)
    if sampler == "ipndm":
        theirs.alphas, theirs.betas = (torch.cat([values(times), torch.tensor([last], dtype=F64)])
                                       for values, last in ((schedule.alpha, 1), (schedule.sigma, 0)))
    target = "v" if sampler == "ipndm" else "x"
    model = DATASETS["clusters"].optimal_model(target, schedule)
    g = torch.Generator().manual_seed(2)
    noise = lambda: torch.randn(60, 2, generator=g, dtype=F64)
    z = (schedule.alpha(times[0])**2 + schedule.sigma(times[0])**2).sqrt() * noise()
    for t, step in zip(times[:-1], theirs.timesteps):
        how = dict(variance_noise=noise()) if sampler == "sde_dpmpp" else {}
        z = theirs.step(model(z, t.expand(60)), step, z, **how).prev_sample
    z = samplers.denoiser(model, target, schedule)(z, times[-1])[0]
    assert_close(exact(sampler, n, target="x"), z, rtol=1e-4, atol=1e-5)


def test_the_third_order_of_diffusers_has_half_the_curvature():
    """Their D2 is a divided difference, x''h^2 / 2, and their weight is that of x''h^2: of second order."""
    diffusers = pytest.importorskip("diffusers")
    schedule, times = SCHEDULES["cosine"], torch.tensor([0.8, 0.7, 0.55, 0.4], dtype=F64)
    theirs = dictated(diffusers.DPMSolverMultistepScheduler(
        solver_order=3, algorithm_type="dpmsolver++", final_sigmas_type="zero"), 9, times, schedule)
    theirs._step_index, z = 2, torch.ones(1, 1, dtype=F64)
    lam = schedule.logsnr(times) / 2
    for curvature in 0.0, 1.0:
        values = curvature * (lam - lam[2])**2 + 0.3 * (lam - lam[2]) + 0.1
        known = {at.item(): value.reshape(1, 1) for at, value in zip(lam[:3], values)}
        their_z = theirs.multistep_dpm_solver_third_order_update([*known.values()], sample=z)
        our_z, h = multistep.step(z, times[2], times[3], known, schedule), (lam[3] - lam[2]).item()
        missing = schedule.alpha(times[3]) * (h**2 / 2 - h + 1 - math.exp(-h))
        assert_close(our_z - their_z, curvature * missing.reshape(1, 1), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("sampler", multistep.MULTISTEP)
def test_times_that_are_the_same_in_float32_do_no_harm(sampler):
    """512 of Karras's times from 1 - 1e-6 on."""
    data = DATASETS["clusters"]
    samples = samplers.sample(data.optimal_model("x", SCHEDULES["cosine"]), (500, 2), 512, target="x",
                              schedule=SCHEDULES["cosine"], sampler=sampler, grid="karras", t_min=1e-6,
                              generator=torch.Generator().manual_seed(0))
    assert abs(data.log_prob(samples).mean() + 0.96) < 0.15
