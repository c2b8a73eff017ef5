"""The chain of T steps against Ho et al.'s and Nichol and Dhariwal's definitions typed again, and the documents' table
of weights."""
import math
import runpy

import pytest
import torch
from test_ddpm import alpha_sigma, every_schedule
from torch.testing import assert_close

import discrete
import samplers
from ddpm import SCHEDULES

F64 = torch.float64
BETA = torch.linspace(1e-4, 0.02, 1000, dtype=F64)                                    # Ho et al. 2020; slides
ABAR = torch.cat([torch.ones(1, dtype=F64), torch.cumprod(1 - BETA, 0)])              # with abar_0 = 1


def typed(beta):
    """A, B, beta tilde of the steps 1..T of a chain with these betas: Foundations 2.39 - 2.41, Ho et al. Eq. (7)."""
    abar = torch.cumprod(1 - beta, 0)
    before = torch.cat([torch.ones(1, dtype=F64), abar[:-1]])
    return ((1 - beta).sqrt() * (1 - before) / (1 - abar), before.sqrt() * beta / (1 - abar),
            beta * (1 - before) / (1 - abar))


def everything(chain, like=BETA):
    return chain.step(torch.arange(1, chain.steps + 1), like)


def test_ddpm_in_1000_steps_is_the_chain_of_ho_et_al():
    chain = discrete.chain(SCHEDULES["ddpm"], 1000, 0.0)
    assert_close(chain.times, torch.arange(1001, dtype=F64) / 1000, rtol=0, atol=1e-15)
    assert_close(chain.schedule.alpha(chain.times)**2, ABAR, rtol=1e-11, atol=0)
    step, (A, B, small) = everything(chain), typed(BETA)
    assert_close(step.log_large.exp(), BETA, rtol=1e-8, atol=0)
    assert_close(step.A, A, rtol=1e-8, atol=1e-15)
    assert_close(step.B, B, rtol=1e-8, atol=0)
    assert_close(step.log_q[1:].exp(), small[1:], rtol=1e-8, atol=0)
    assert chain.decodes and step.log_q[0] == -math.inf and step.decodes.tolist() == [1.0] + 999 * [0.0]
    assert step.log_small[0] == step.log_small[1] == step.log_q[1]                    # beta tilde_1 := beta tilde_2
    assert torch.equal(step.log_small[1:], step.log_q[1:])
    assert_close(small[1], torch.tensor(5.4534e-05, dtype=F64), rtol=1e-4, atol=0)


def test_iddpm_in_1000_steps_is_the_chain_of_nichol_and_dhariwal():
    """Their Eq. (17), beta at most 0.999: 4.128e-5 first, only the last one is cut."""
    f = torch.cos((torch.arange(1001, dtype=F64) / 1000 + 0.008) / 1.008 * math.pi / 2)**2
    uncut = 1 - f[1:] / f[:-1]
    beta = uncut.clamp(max=0.999)
    step, (A, B, small) = everything(discrete.chain(SCHEDULES["iddpm"], 1000, 0.0)), typed(beta)
    assert_close(step.log_large.exp(), beta, rtol=1e-9, atol=0)
    assert_close(step.A, A, rtol=1e-9, atol=1e-14)
    assert_close(step.B, B, rtol=1e-9, atol=0)
    assert_close(step.log_q[1:].exp(), small[1:], rtol=1e-9, atol=0)
    assert_close(beta[0].item(), 4.128e-5, rtol=1e-3, atol=0)
    assert (uncut > 0.999).tolist() == 999 * [False] + [True]


@pytest.mark.parametrize("T, i", [(100, 37), (10, 2), (4, 4), (2, 1), (1, 1)])
def test_fewer_steps_skip_those_between(T, i):
    """beta of a long step is 1 - the ratio of two abar; a chain of one step has nothing but beta for its variance."""
    chain, every = discrete.chain(SCHEDULES["ddpm"], T, 0.0), 1000 // T
    step, (A, B, small) = everything(chain), typed(1 - ABAR[every::every] / ABAR[:-1:every])
    beta = 1 - ABAR[i * every] / ABAR[(i - 1) * every]
    assert_close([step.A[i - 1], step.B[i - 1], step.log_large[i - 1].exp()], [A[i - 1], B[i - 1], beta],
                 rtol=1e-8, atol=1e-15)
    expected = small[max(i - 1, 1)] if T > 1 else beta
    assert_close(step.log_small[i - 1].exp(), expected, rtol=1e-8, atol=0)


@every_schedule
@pytest.mark.parametrize("T, t_min", [(7, 0.01), (1, 1e-3)])
def test_a_chain_that_ends_before_x_has_no_decoding_step(name, T, t_min):
    """Eq. (3.11), VDM A.21 on t_i = t_min + (1 - 2 t_min) i / T: z_0 is not x."""
    chain = discrete.chain(SCHEDULES[name], T, t_min)
    times = torch.tensor([t_min + (1 - 2 * t_min) * i / T for i in range(T + 1)], dtype=F64)
    assert_close(chain.times, times, rtol=0, atol=1e-15)
    alpha, sigma = alpha_sigma(name, times)
    ratio = alpha[1:] / alpha[:-1]
    large = sigma[1:]**2 - ratio**2 * sigma[:-1]**2
    step, small = everything(chain), large * sigma[:-1]**2 / sigma[1:]**2
    expected = [ratio * sigma[:-1]**2 / sigma[1:]**2, alpha[:-1] * large / sigma[1:]**2, small.log(), small.log(),
                large.log(), torch.zeros(T, dtype=F64)]
    for found, wanted in zip(step, expected):
        assert_close(found, wanted, rtol=1e-6, atol=1e-9)
    assert not chain.decodes


def test_where_a_chain_begins():
    assert {name: discrete.smallest_t(schedule) for name, schedule in SCHEDULES.items()} == {
        "cosine": 1e-3, "flow": 1e-3, "edm": 1e-3, "linear": 0.0, "ddpm": 0.0, "iddpm": 0.0, "ve": 0.0}
    assert discrete.smallest_t(SCHEDULES["cosine"], 0.02) == 0.02
    assert discrete.chain(SCHEDULES["linear"], 3, 0.0).decodes and not discrete.chain(SCHEDULES["ve"], 3, 0.0).decodes
    found = [discrete.chain(SCHEDULES["ddpm"], T, 0.0) for T in (30, 31, 30)]
    assert found[0] is found[2] is not found[1]                                       # kept


@pytest.mark.parametrize("name, T, t_min", [("ddpm", 1000, 0.0), ("ddpm", 4000, 0.0), ("cosine", 1000, 1e-3),
                                            ("iddpm", 7, 0.0), ("cosine", 1, 0.2)])
def test_the_index_of_a_time_in_any_precision(name, T, t_min):
    chain, i = discrete.chain(SCHEDULES[name], T, t_min), torch.arange(T + 1)
    for dtype in F64, torch.float32:
        assert torch.equal(chain.index(chain.times.to(dtype)), i)
        assert torch.equal(chain.index(chain.times.to(dtype).flip(0)[::2]), i.flip(0)[::2])


@pytest.mark.parametrize("name, T, t_min", [("ddpm", 100, 0.0), ("cosine", 20, 1e-3)])
def test_a_step_of_the_chains_length_from_any_time(name, T, t_min):
    """At the chain's times its own steps; between them a step as long; before t_1 that of t_1, so that B is not 0."""
    chain, schedule = discrete.chain(SCHEDULES[name], T, t_min), SCHEDULES[name]
    step, length = everything(chain), (1 - 2 * t_min) / T
    for dtype, rtol in (F64, 1e-8), (torch.float32, 1e-3):
        A, B = chain.at(chain.times[1:].to(dtype))
        assert A.dtype == B.dtype == dtype
        assert_close(A.double(), step.A, rtol=rtol, atol=1e-7)
        assert_close(B.double(), step.B, rtol=rtol, atol=0)
    late = torch.tensor([0.2345, 0.8], dtype=F64)
    (alpha_s, sigma_s), (alpha_t, sigma_t) = ((schedule.alpha(t), schedule.sigma(t)) for t in (late - length, late))
    A = alpha_t / alpha_s * sigma_s**2 / sigma_t**2
    found = chain.at(late)
    assert_close(found[0], A, rtol=1e-9, atol=0)
    assert_close(found[1], alpha_s - A * alpha_t, rtol=1e-7, atol=0)                  # the mean of z_s is alpha_s x
    early = torch.tensor([t_min, t_min + 0.3 * length], dtype=F64)
    assert_close(chain.at(early), [c[:1].expand(2) for c in step[:2]], rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("T, log_abar, off", [(1000, -10.118, 1e-9), (4000, -10.067, 0.0008), (500, -10.19, 0.0011),
                                              (250, -10.33, 0.005), (100, -10.80, 0.01), (50, -11.77, 0.021)])
def test_betas_rescaled_to_another_number_of_steps(T, log_abar, off):
    """Foundations 1.25, typed again: the chain nearly ends where that of 1000 steps does; sqrt(abar) is off by this."""
    abar = torch.cumprod(1 - torch.linspace(1e-4 * 1000 / T, 0.02 * 1000 / T, T, dtype=F64), 0)
    schedule, t = discrete.rescaled(SCHEDULES["ddpm"], T), torch.arange(1, T + 1, dtype=F64) / T
    assert_close(schedule.alpha(t)**2, abar, rtol=1e-10, atol=0)
    assert_close(schedule.sigma(t)**2, 1 - abar, rtol=1e-10, atol=1e-15)
    assert_close(schedule.alpha(t.float()).double()**2, abar, rtol=1e-5, atol=0)
    assert abs(abar[-1].log() - log_abar) < 0.006
    zero = torch.zeros(2, dtype=F64)
    assert schedule.alpha(zero).tolist() == [1, 1] and schedule.sigma(zero).tolist() == [0, 0]
    tenths = torch.arange(1, 11, dtype=F64) / 10
    difference = (schedule.alpha(tenths) - ABAR[100::100].sqrt()).abs().max()
    assert difference <= off and (T == 1000 or difference > off / 3)


def test_what_cannot_be_rescaled():
    for steps in 20, 1:
        with pytest.raises(ValueError, match="steps must be at least 21, got"):
            discrete.rescaled(SCHEDULES["ddpm"], steps)
    for name in "iddpm", "linear":
        with pytest.raises(ValueError, match="the linear betas that can be rescaled are those of schedule ddpm"):
            discrete.rescaled(SCHEDULES[name], 100)
    for sampler in "sde", "euler", "heun":
        with pytest.raises(ValueError, match="have no slope - take sampler ancestral, ddim or dpmpp"):
            samplers.sample(lambda z, t: z, (3, 2), 50, target="eps", schedule=SCHEDULES["ddpm"], sampler=sampler,
                            grid="rescaled")


def test_the_weights_of_the_documents():
    """At t = 2, 10, 50, 100, 500, 1000: 1 / (2 beta tilde), 1/2 (SNR(t-1) - SNR(t)) and that over SNR(t)."""
    table = {"mu": [9169, 2099, 482, 246, 49.8, 25.0], "x": [2726, 45.5, 0.646, 0.0894, 4.7e-4, 4.1e-7],
             "eps": [0.600, 0.0864, 0.0193, 0.0103, 0.0055, 0.0102]}
    i, chain = torch.tensor([2, 10, 50, 100, 500, 1000]), discrete.chain(SCHEDULES["ddpm"], 1000, 0.0)
    snr = ABAR / (1 - ABAR)
    exact = {"mu": 1 / (2 * typed(BETA)[2][i - 1]), "x": (snr[i - 1] - snr[i]) / 2,
             "eps": (snr[i - 1] - snr[i]) / 2 / snr[i]}
    exact["mu_skip"], exact["v"] = exact["mu"], exact["x"] * (1 - ABAR[i])
    exact["s"] = exact["eps"] * (1 - ABAR[i])
    for target, expected in exact.items():
        found = discrete.weight(i, chain, target)
        assert_close(found, expected, rtol=1e-7, atol=0)
        if target in table:
            assert_close(found, torch.tensor(table[target], dtype=F64), rtol=0.02, atol=0)
    first = discrete.weight(torch.tensor([1]), chain, "x")                          # of a decoder with beta tilde_2
    assert_close(first, 1 / (2 * typed(BETA)[2][1:2]), rtol=1e-7, atol=0)


def test_the_script_prints_the_weights(capsys):
    runpy.run_path(discrete.__file__, run_name="__main__")
    lines = capsys.readouterr().out.splitlines()
    assert [line.split() for line in lines if line.startswith("weight of mu ")][0][3:] == [
        "9.17e+03", "2.1e+03", "482", "246", "49.8", "25"]
    assert [line.split() for line in lines if line.startswith("beta tilde")][0][4:] == [
        "0.455", "0.853", "0.964", "0.982", "0.999", "1"]
