"""A learned schedule: gamma typed again, gradients by autograd, quadrature, the known best density, runs, mistakes."""
import json
import math
import re
import runpy

import numpy as np
import pytest
import torch
from test_chain_images import folder  # noqa: F401 - a fixture
from test_chain_runs import ends, few, fit, same  # noqa: F401 - fixture few
from test_train_images import killed, only
from torch.testing import assert_close

import ddpm
import decoders
import kind_points
import learned_schedule
import likelihood
import losses
import optimum
import run
import sample
import samplers
import train
import train_images
from datasets2d import DATASETS
from learned_schedule import CLOCK, LearnedSchedule, Learner
from mlp import MLP

F64 = torch.float64
T = torch.linspace(0.01, 0.99, 33, dtype=F64)


def random_schedule(seed=0, spread=1.0, t_min=0.02):
    """Any weights at all: far from where it starts."""
    schedule, g = LearnedSchedule((-7.0, 5.0), t_min), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in schedule.parameters():
            weight += spread * torch.randn(weight.shape, generator=g, dtype=F64)
    return schedule


def typed(schedule, t):
    """gamma(t) as the docstring has it, in numpy, one t at a time."""
    softplus = lambda name: np.log1p(np.exp(getattr(schedule, name).detach().numpy().astype(np.longdouble)))
    l1, l2, l3, b = softplus("l1")[0], softplus("l2"), softplus("l3"), schedule.b.detach().numpy()
    n = lambda t: l1 * t + (l3 / (1 + np.exp(b - l2 * t))).sum()
    high, low = softplus("raw_ends")
    span = n(1 - schedule.t_min) - n(schedule.t_min)
    gamma = np.array([-high + (low + high) * (n(s) - n(schedule.t_min)) / span for s in t.numpy()])
    return torch.from_numpy(gamma.astype(float))


@pytest.mark.parametrize("seed", [0, 1])
def test_gamma_is_the_formula_and_its_slope_the_derivative(seed):
    schedule, t = random_schedule(seed), T.clone().requires_grad_()
    gamma, slope = schedule.gamma(t)
    assert_close(gamma.detach(), typed(schedule, T), rtol=1e-10, atol=1e-10)
    assert_close(slope.detach(), torch.autograd.grad(gamma.sum(), t)[0], rtol=1e-9, atol=0)
    assert_close([schedule.logsnr(T), schedule.dlogsnr(T)], [-gamma, -slope], rtol=0, atol=0)
    low, high = schedule.ends(schedule.t_min)                                  # whatever the shape
    of_ends = torch.nn.functional.softplus(schedule.raw_ends).tolist()
    assert_close(torch.tensor([high, -low]), torch.tensor(of_ends), rtol=1e-6, atol=0)


def test_it_starts_nearly_linear_between_its_ends():
    schedule = LearnedSchedule((-9.0, 11.0), 0.001)
    assert_close(torch.tensor(schedule.ends(0.001)), torch.tensor([-9.0, 11.0]))
    assert (schedule.logsnr(T) - (11 - 20 * T)).abs().max() < 1.0


@pytest.mark.parametrize("spread", [0.1, 3.0, 300.0])
def test_log_snr_falls_whatever_the_weights(spread):
    """A schedule that is not monotone cannot be written: neither by weights nor by ends."""
    t = torch.linspace(0, 1, 501, dtype=F64)
    for seed in range(20):
        schedule = random_schedule(seed, spread)
        logsnr, slope = schedule.logsnr(t), schedule.dlogsnr(t)
        assert (logsnr.diff() <= 0).all() and (slope <= 0).all() and logsnr.isfinite().all()
        low, high = schedule.ends(schedule.t_min)
        assert low < high and low < 1e-9 and high > -1e-9                      # rounding


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_it_is_a_schedule_as_the_others(dtype):
    """Variance preserving, in the dtype of t, with the SDE and the inverse that `Schedule` gives it."""
    schedule, t = random_schedule(), T.to(dtype)
    gamma = typed(schedule, T).to(dtype)
    near = dict(rtol=1e-4, atol=1e-6) if dtype == torch.float32 else dict(rtol=1e-9, atol=1e-12)
    assert_close(schedule.alpha(t).detach()**2, 1 / (1 + gamma.exp()), **near)
    assert_close(schedule.sigma(t).detach()**2, 1 / (1 + (-gamma).exp()), **near)                  # VDM A.1
    assert_close(schedule.snr(t).detach(), (-gamma).exp(), **near)
    slope = schedule.gamma(t)[1].detach()
    assert_close(schedule.dsnr(t).detach(), -(-gamma).exp() * slope, **near)
    assert_close(schedule.diffusion_sq(t).detach(), slope / (1 + (-gamma).exp()), **near)
    assert_close(schedule.drift(t).detach(), -0.5 * slope / (1 + (-gamma).exp()), **near)
    assert_close(schedule.t(schedule.logsnr(t.double()).detach()), t.double(), rtol=1e-5, atol=1e-7)
    assert schedule.scale is ddpm.PRESERVING and isinstance(schedule, ddpm.Schedule)


def test_the_clock_is_the_cosine_schedule():
    logsnr = torch.linspace(-20, 20, 41, dtype=F64)
    assert_close(CLOCK.logsnr(learned_schedule.clock(logsnr)), logsnr, rtol=0, atol=1e-6)
    assert ddpm.fixed("learned") is CLOCK is ddpm.SCHEDULES["cosine"] and ddpm.fixed("flow") is ddpm.SCHEDULES["flow"]


@pytest.mark.parametrize("trained", [False, True])
def test_the_slope_at_a_log_snr_and_its_gradient(trained):
    """t of a log-SNR moves with the weights: against bisection, and finite differences of it."""
    schedule = random_schedule(3, 0.3) if trained else LearnedSchedule((-7.0, 5.0), 0.02)
    logsnr = torch.linspace(-6.5, 4.5, 23, dtype=F64)
    slope = lambda: schedule.gamma(schedule.t(logsnr))[1].log().sum()
    assert_close(schedule.slope_at(logsnr).log().sum(), slope(), rtol=1e-6, atol=1e-6)
    found = torch.autograd.grad(schedule.slope_at(logsnr).log().sum(), schedule.shape())
    with torch.no_grad():
        for weight, gradient in zip(schedule.shape(), found):
            for i in range(0, len(weight), 5):
                h, before = 1e-5 * max(1, abs(weight[i].item())), weight[i].clone()
                weight[i] = before + h
                up = slope()
                weight[i] = before - h
                assert_close(gradient[i], (up - slope()) / (2 * h), rtol=1e-3, atol=1e-4)
                weight[i] = before


# The update

def loss_typed(model, x, t, eps, schedule):
    """1/2 gamma' |eps_hat - eps|^2 / D of a network that predicts v, t on the cosine schedule."""
    gamma, slope = schedule.gamma(t)
    alpha, sigma = torch.sigmoid(-gamma).sqrt()[:, None], torch.sigmoid(gamma).sqrt()[:, None]
    z = alpha * x + sigma * eps
    v = model(z, 2 / math.pi * torch.atan2(sigma, alpha)[:, 0])
    return 0.5 * slope * (alpha * v + sigma * z - eps).square().mean(1)


def test_the_update_of_vdm_is_the_gradient_of_the_square_in_one_backward_pass():
    """Of the network the gradient of the mean, of the schedule that of the mean square: autograd of both."""
    schedule, g = random_schedule(), torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    model = MLP(width=16, activation="silu").double()
    x, eps = (torch.randn(40, 2, generator=g, dtype=F64) for _ in range(2))
    t = torch.rand(40, generator=g, dtype=F64)
    each = loss_typed(model, x, t, eps, schedule)
    expected = [*torch.autograd.grad(each.mean(), list(model.parameters()), retain_graph=True),
                *torch.autograd.grad(each.square().mean(), list(schedule.parameters()))]
    passes = []
    model.register_full_backward_hook(lambda *args: passes.append(1))
    found = learned_schedule.squared_gradient(model, x, t, eps, schedule, target="v")
    assert_close(found, each.detach())
    assert len(passes) == 1
    for weight, gradient in zip([*model.parameters(), *schedule.parameters()], expected):
        assert_close(weight.grad, gradient, rtol=1e-8, atol=1e-10)


def of_gaussian(logsnr):
    """The root mean square over draws of |eps_hat - eps|^2 of the exact denoiser of N(0, 1)."""
    return math.sqrt(3) * torch.sigmoid(logsnr)


def quadrature(schedule, n=40_000):
    """Mean square of 1/2 gamma' h over t uniform between the ends, by the midpoint rule."""
    t = schedule.t_min + (1 - 2 * schedule.t_min) * (torch.arange(n, dtype=F64) + 0.5) / n
    gamma, slope = schedule.gamma(t)
    return t, gamma, slope, (0.5 * slope * of_gaussian(-gamma)).square().mean()


def test_the_mean_square_under_another_schedule_and_its_gradient_need_no_new_draws():
    """Of draws under one schedule what quadrature gives under the other; and VDM's gradient, through gamma and z."""
    before, new = random_schedule(0, 0.3), random_schedule(1, 1.0)
    with torch.no_grad():
        new.raw_ends.copy_(before.raw_ends)
        _, gamma, slope, own = quadrature(before)
    each = 0.5 * slope * of_gaussian(-gamma)
    value = learned_schedule.second_moment(new, -gamma, each, slope)
    assert_close(value.item(), quadrature(new)[3].item(), rtol=2e-3, atol=0)
    assert abs(value.item() / own.item() - 1) > 0.02
    at_itself = learned_schedule.second_moment(before, -gamma, each, slope)
    assert_close(at_itself.item(), own.item(), rtol=1e-6, atol=0)
    found = torch.autograd.grad(at_itself, before.shape())
    expected = torch.autograd.grad(quadrature(before)[3], before.shape())      # 2 l dl / d eta at fixed t
    for a, b in zip(found, expected):
        assert_close(a, b, rtol=1e-2, atol=1e-3 * b.abs().max().item())


def test_it_learns_the_density_of_least_variance():
    """Clusters, +-9: deviation over mean of a draw 4.31 with cosine, 1.81 uniform, 1.154 at best; its mean is fixed."""
    g, limit, exact = torch.Generator().manual_seed(0), 9.0, DATASETS["clusters"].optimal_model("eps", CLOCK)

    def error(logsnr):
        x = DATASETS["clusters"].sample(len(logsnr), g)
        eps = torch.randn(x.shape, generator=g)
        t = learned_schedule.clock(logsnr).float()
        return (exact(ddpm.q_sample(x, t, eps, CLOCK), t) - eps).square().mean(1).double()
    middles, width = torch.linspace(-limit, limit, 121, dtype=F64)[:-1] + 0.075, 0.15
    h = error(middles.repeat_interleave(1500)).unflatten(0, (120, 1500))
    mean, square = h.mean(1) / 2, h.square().mean(1) / 4

    def spread(p):
        p = p / (p.sum() * width)
        return ((square / p).sum() * width / (mean.sum() * width)**2 - 1).sqrt().item()
    assert spread(1 / torch.cosh(middles / 2)) == pytest.approx(4.31, rel=0.05)
    assert spread(torch.ones(120)) == pytest.approx(1.81, rel=0.03)
    assert spread(square.sqrt()) == pytest.approx(1.154, rel=0.03)

    learner = Learner(dict(t_min=learned_schedule.clock(torch.tensor(limit, dtype=F64)).item()))
    assert learner.schedule.ends(learner.t_min) == pytest.approx([-limit, limit])
    own = lambda: 1 / learner.schedule.slope_at(middles).detach()
    assert spread(own()) == pytest.approx(1.85, rel=0.05)
    means = []
    for _ in range(4):
        t, _ = learner.draw((70, 512), g)
        logsnr = CLOCK.logsnr(t.double())
        slope = learner.schedule.slope_at(logsnr.flatten()).detach().view_as(logsnr)
        each = 0.5 * slope * error(logsnr.flatten()).view_as(logsnr)
        means.append(each.mean().item() * (1 - 2 * learner.t_min))
        learner.update(t, each)
    assert spread(own()) < 1.03 * spread(square.sqrt())
    assert means == pytest.approx([mean.sum().item() * width] * 4, rel=0.02)           # E of a draw does not move
    p, best = own() / (1 - 2 * learner.t_min), square.sqrt() / (square.sqrt().sum() * width)
    inside = middles > -3
    fine = torch.linspace(-limit, limit, 4001, dtype=F64)
    total = torch.trapezoid(1 / learner.schedule.slope_at(fine).detach(), fine).item() / (1 - 2 * learner.t_min)
    assert total == pytest.approx(1.0, rel=2e-3)
    assert (p / best)[inside].log().abs().max() < 0.5 and (p / best)[inside].log().square().mean().sqrt() < 0.15


def test_draws_are_uniform_on_the_schedule_and_their_importance_is_to_the_clock():
    learner = Learner(dict(t_min=1e-3))
    with torch.no_grad():
        for weight in learner.schedule.parameters():
            weight += 0.3 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(1), dtype=F64)
    t, importance = learner.draw((7, 5000), torch.Generator().manual_seed(0))
    u = losses.sample_t((7, 5000), 1e-3, torch.Generator().manual_seed(0))
    assert t.dtype == importance.dtype == torch.float32 and t.shape == importance.shape == (7, 5000)
    assert_close(CLOCK.logsnr(t.double()), -typed(learner.schedule, u.double().flatten()).view_as(u), rtol=0, atol=2e-3)
    low, high = learner.schedule.ends(1e-3)
    edges = learned_schedule.clock(torch.tensor([high, low], dtype=F64))
    for f in torch.ones_like, lambda t: t**2, lambda t: torch.cos(3 * t):
        grid = edges[0] + (edges[1] - edges[0]) * (torch.arange(100_000, dtype=F64) + 0.5) / 100_000
        expected = f(grid).mean() * (edges[1] - edges[0]) / (1 - 2e-3)
        assert_close((f(t.double()) * importance).mean(), expected, rtol=2e-3, atol=0)


# The ends

@pytest.mark.parametrize("decoder", [decoders.gaussian, decoders.discretised])
def test_the_gradient_of_the_ends_is_that_of_the_bound(decoder):
    """Finite differences of prior + reconstruction + 1/2 the integral of an error that changes with log-SNR."""
    schedule, g = random_schedule(2), torch.Generator().manual_seed(0)
    x = (torch.randint(0, 256, (30, 3), generator=g) / 127.5 - 1).double()
    eps = torch.randn(x.shape, generator=g, dtype=F64)
    error = lambda logsnr: 0.3 + torch.sigmoid(0.7 * logsnr)
    softplus = torch.nn.functional.softplus

    def bound(raw):
        high, low = softplus(raw[0]), -softplus(raw[1])
        prior = 0.5 * (torch.sigmoid(low) * (x**2 - 1) + softplus(low)).mean()
        var = torch.exp(-high)
        decoded = decoder(x, x + var.sqrt() * (1 if decoder is decoders.gaussian else eps), var.log()).mean()
        u = low + (high - low) * (torch.arange(20_000, dtype=F64) + 0.5) / 20_000
        return prior + decoded + 0.5 * error(u).mean() * (high - low)
    raw = schedule.raw_ends.detach()
    expected = torch.stack([(bound(raw + h) - bound(raw - h)) / 2e-4 for h in 1e-4 * torch.eye(2, dtype=F64)])
    errors = error(torch.tensor([1.0, -1.0], dtype=F64) * softplus(raw))
    found = learned_schedule.end_gradient(schedule, x, eps, errors, decoder)
    assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_every_member_of_a_stack_moves_its_own_ends():
    """A step of descent, with the error of eps_hat at z of log-SNR's ends for any target, and by 1 at most."""
    learners, g, seen = [Learner(dict(t_min=t_min)) for t_min in (0.02, 0.1)], torch.Generator().manual_seed(0), []
    x, eps = ([torch.randn(50, 2, generator=g, dtype=F64) for _ in range(2)] for _ in range(2))

    def model(z, t):
        seen.append(t)
        return z * 0.9
    before = [learner.schedule.raw_ends.detach().clone() for learner in learners]
    expected = []
    for learner, points, noise, target in zip(learners, x, eps, ("eps", "x")):
        low, high = (torch.tensor(end, dtype=F64) for end in learner.schedule.ends(learner.t_min))
        errors = []
        for logsnr in high, low:
            alpha, sigma = torch.sigmoid(logsnr).sqrt(), torch.sigmoid(-logsnr).sqrt()
            z = alpha * points + sigma * noise
            eps_hat = 0.9 * z if target == "eps" else (z - alpha * 0.9 * z) / sigma
            errors.append((eps_hat - noise).square().mean())
        expected.append(learned_schedule.end_gradient(learner.schedule, points, noise, torch.stack(errors)))
    learned_schedule.move_ends(learners, model, x, eps, ["eps", "x"])
    assert_close(seen[0][::50], torch.tensor([0.02, 0.98, 0.1, 0.9], dtype=F64))
    for learner, old, gradient in zip(learners, before, expected):
        assert_close(learner.schedule.raw_ends.detach(), old - gradient.clamp(-1, 1))
    learned_schedule.move_ends(learners, lambda z, t: z + 1000, x, eps, ["eps", "x"])
    moved = [learner.schedule.raw_ends.detach() for learner in learners]
    assert all((old - new).abs().max() < 2.1 for old, new in zip(before, moved))
    assert all(learner.schedule.ends(learner.t_min)[0] < 0 < learner.schedule.ends(learner.t_min)[1]
               for learner in learners)


# Runs

WORDS = "--schedule learned --target v eps --loss nelbo"


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    out = tmp_path_factory.mktemp("learned")
    fit(out, WORDS)
    return out


def test_a_killed_stack_goes_on_bit_for_bit(trained, tmp_path, interrupted):
    """With its schedule and the state of the optimiser; each member has its own. Without them it is refused."""
    interrupted(lambda: fit(tmp_path, WORDS))
    states = {path: run.load(path) for path in tmp_path.glob("*/ckpt.pt")}
    assert len(states) == 2 and all(len(state["history"]) == 1 for state in states.values())
    fit(tmp_path, WORDS, "--resume")
    whole = {path: run.load(trained / path.parent.name) for path in states}
    assert all(same(run.load(path), whole[path]) for path in states)
    weights = [state["schedule"]["weights"] for state in whole.values()]
    assert not any(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    for path, state in states.items():
        moved = state["schedule"]["weights"] | {"b": state["schedule"]["weights"]["b"] + 0.1}
        run.save(path, state | {"schedule": state["schedule"] | {"weights": moved}})
    fit(tmp_path, WORDS, "--resume")
    assert not any(same(run.load(path)["model"], whole[path]["model"]) for path in states)
    for path, state in states.items():
        run.save(path, {key: value for key, value in state.items() if key != "schedule"})
    with pytest.raises(SystemExit, match="its schedule is not that of a run on points - choose another, or train it"):
        fit(tmp_path, WORDS, "--resume")


def test_a_checkpoint_has_a_whole_schedule_or_is_refused(trained, tmp_path):
    one = run.load(trained / "clusters-v-nelbo-s0")
    schedule, weights = one["schedule"], one["schedule"]["weights"]
    fit(tmp_path / "cosine", "--epochs 1")
    cosine = run.load(tmp_path / "cosine/clusters-eps-mse-s0")
    bad = [None, {}, [], schedule | {"weights": {}}, schedule | {"optimizer": {}},
           *(schedule | {"weights": weights | change} for change in (
               {"l1": weights["l1"] * math.nan}, {"b": weights["b"][1:]}, {"b": weights["b"].float()},
               {"more": weights["b"]}, {"raw_ends": 3.0}))]
    for state in [*(one | {"schedule": value} for value in bad), cosine | {"schedule": schedule}]:
        run.save(tmp_path / "ckpt.pt", state)
        with pytest.raises(SystemExit, match="its schedule is not that of a run on points"):
            run.open(tmp_path / "ckpt.pt")


def test_an_opened_run_has_its_own_schedule_and_time(trained):
    """t of the network is that of its schedule; tests and optimum are those of the cosine schedule."""
    one = run.open(trained / "clusters-v-nelbo-s0")
    weights = one.checkpoint["schedule"]["weights"]
    assert all(torch.equal(value, weights[name]) for name, value in one.schedule.state_dict().items())
    bare, z, t = kind_points.build_model(one.config), torch.randn(9, 2), torch.linspace(0.1, 0.9, 9)
    bare.load_state_dict(one.checkpoint["model"])
    on_clock = 2 / math.pi * torch.atan(torch.exp(-one.schedule.logsnr(t) / 2))
    assert_close(one.model()(z, t), bare(z, on_clock).detach())
    x_hat, eps_hat = one.denoiser()(z, torch.tensor(0.4))
    assert_close(one.schedule.alpha(torch.tensor(0.4)) * x_hat + one.schedule.sigma(torch.tensor(0.4)) * eps_hat, z)
    cosine = one.config | {"schedule": "cosine"}
    assert_close(optimum.ready([one.config], "cpu")[1], optimum.ready([cosine], "cpu")[1])


def test_samples_and_likelihoods_are_those_of_its_schedule(trained, tmp_path):
    names = "clusters-eps-nelbo-s0", "clusters-v-nelbo-s0"
    runs = [run.open(trained / name) for name in names]
    assert len(run.stacks(runs, "cpu")) == 2 and len(run.stacks(runs[:1], "cpu")) == 1
    with pytest.raises(SystemExit, match="differ in schedule and cannot be one stack"):
        run.open([trained / name for name in names])
    for one in runs:
        expected = samplers.sample(one.model(), (30, 2), 4, target=one.target, schedule=one.schedule, t_min=1e-3,
                                   generator=run.generator("cpu", 5, "sample"))
        assert_close(kind_points.draw(one, 4, 30, 5)[0], expected)
        x = kind_points.load(one.config)[:50].double()
        how = dict(draws=4, num_ode=0, generator=run.generator("cpu", 1))
        terms, _ = likelihood.evaluate(one.model().double(), x, one.config, own=one.schedule, **how)
        alone = likelihood.bound(one.model().double(), x, target=one.target, schedule=one.schedule, draws=4,
                                 generator=run.generator("cpu", 1))
        assert_close([terms["diffusion"], terms["prior"]], [alone["diffusion"], alone["prior"]])
    sample.main(["--ckpt", *(str(trained / name) for name in names), "--steps", "3", "--num-samples", "20",
                 "--out", str(tmp_path)])
    likelihood.main(["--ckpt", str(trained / names[1]), "--num", "20", "--num-ode", "0", "--draws", "2",
                     "--out", str(tmp_path), "--device", "cpu"])
    assert json.loads((tmp_path / names[0] / "metrics.json").read_text())["schedule"] == "learned"


def test_images_learn_a_schedule_and_a_killed_run_goes_on_bit_for_bit(folder, tmp_path, monkeypatch):  # noqa: F811
    words = ("--channels 8 --channel-mult 1 --layers 1 --attention 0 --batch-size 4 --lr 0.01 --warmup 2 --device cpu "
             "--epochs 2 --test-every 2 --grid-every 100 --schedule learned --target v --loss nelbo").split()
    argv = lambda name: ["--data", str(folder), "--out", str(tmp_path / name), *words]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(learned_schedule, "ENDS_EVERY", 2)
        patch.setattr(train_images, "SAVE_EVERY", 0)
        train.main(argv("whole"))
        killed(monkeypatch, argv("killed"), 4)
        state = run.load(only(tmp_path / "killed"))
        assert state["step"] == 3 and state["schedule"]["optimizer"][0]["step"] == 3
        train.main([*argv("killed"), "--resume"])
    whole = run.load(only(tmp_path / "whole"))
    assert same(whole, run.load(only(tmp_path / "killed")))
    fresh = Learner(whole["config"]).schedule.state_dict()
    assert not any(torch.equal(value, fresh[name]) for name, value in whole["schedule"]["weights"].items())
    one = run.open(only(tmp_path / "whole"))
    sample.main(["--ckpt", str(one.folder), "--steps", "2", "--num-samples", "2", "--device", "cpu", "--out",
                 str(tmp_path / "samples")])
    with pytest.raises(SystemExit, match="--schedule learned is for one process, each would draw other"):
        monkeypatch.setattr(run, "processes", lambda device: (0, 2))
        train.main(argv("two"))


@pytest.mark.parametrize("words, message", [
    ("--timesteps 9", "--schedule learned is of continuous time - leave it or --timesteps out"),
    ("--t-density logsnr", "is a density of its own - leave it or --t-density logsnr out"),
    ("--loss exact --target s", "--loss exact has no t and does not use --schedule - leave it out"),
    ("--sigma 0.1", "--sigma is for --loss"), ("--loss vlb", "loss vlb is of a discrete chain"),
    ("--t-min 0", r"--t-min must be in \[1e-06, 0.49\]")])
def test_mistakes(tmp_path, monkeypatch, capsys, words, message):
    monkeypatch.chdir(tmp_path)
    code, text = ends(capsys, train.main, "--schedule", "learned", *words.split())
    assert code == 2 and re.search(message, text), text


def test_the_file_shows_it(capsys):
    runpy.run_path(learned_schedule.__file__, run_name="__main__")
    rows = dict(re.findall(r"^  (\S.*?)\s{2,}([\d.]+)$", capsys.readouterr().out, re.M))
    values = {name: float(value) for name, value in rows.items()}
    assert values["cosine"] == pytest.approx(4.31, rel=0.05)
    last = [value for name, value in values.items() if name.startswith("learned")]
    assert last[0] > 1.7 and last[-1] < 1.05 * values["p ~ sqrt(E h^2), the least"]
