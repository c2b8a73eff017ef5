"""Times drawn where the loss is large: densities, moments and runs against loops, quadrature and known numbers."""
import pytest
import torch
from test_chain_images import folder  # noqa: F401 - a fixture
from test_chain_runs import same
from test_train_images import killed, only
from torch.testing import assert_close

import adaptive
import losses
import run
import train
import train_images
import train_points
from datasets2d import DATASETS
from ddpm import SCHEDULES

F64 = torch.float64
FAST = ["--epochs", "2", "--width", "8", "--batch-size", "10000", "--device", "cpu"]


def seed(k=0):
    return torch.Generator().manual_seed(k)


def config_of(words=""):
    return vars(train.parse(words.split())) | dict(data="clusters", target="v", loss="nelbo", seed=0)


# Bins and draws

@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("t_min", [1e-3, 0.05])
def test_bins_are_equal_in_log_snr_and_numbered_from_little_noise(name, t_min):
    of, schedule = adaptive.bins(SCHEDULES[name], t_min), SCHEDULES[name]
    assert of.steps == 100 and len(of.share) == 100 and of.share.sum().item() == pytest.approx(1)
    edges = schedule.logsnr(of.times)
    assert_close(edges.diff(), (edges[-1] - edges[0]).div(100).expand(100), rtol=1e-6, atol=1e-9)
    assert_close(of.times[[0, -1]], torch.tensor([t_min, 1 - t_min], dtype=F64), rtol=1e-9, atol=0)
    middle = (of.times[1:] + of.times[:-1]) / 2
    assert of.index(middle.reshape(4, 25)).tolist() == torch.arange(1, 101).reshape(4, 25).tolist()
    assert of.index(torch.tensor([t_min - 1e-7, 1 - t_min + 1e-7])).tolist() == [1, 100]


@pytest.mark.parametrize("name", ["cosine", "flow", "iddpm", "edm"])
def test_a_draw_has_the_density_of_its_importance(name):
    """Counts are those of p and a thousandth uniform; in a bin t is uniform; any mean over t comes out unbiased."""
    schedule, n, p = SCHEDULES[name], 60_000, 0.1 + torch.rand(100, generator=seed(), dtype=F64)**4
    t, importance = adaptive.draw_bins((n,), schedule, 0.01, p, seed(1), F64)
    edges = schedule.t(torch.linspace(*schedule.ends(0.01)[::-1], 101, dtype=F64))
    q, i = 0.999 * p / p.sum() + 1e-5, (t[:, None] > edges[1:-1]).sum(1)
    assert ((i.bincount(minlength=100) - n * q).abs() < 1.1).all()
    assert_close(importance, ((edges[1:] - edges[:-1]) / 0.98 / q)[i], rtol=1e-6, atol=0)
    inside = (t - edges[i]) / (edges[1:] - edges[:-1])[i]
    for k in (i.bincount().topk(5)[1]).tolist():
        own = inside[i == k].sort()[0]
        assert_close(own, torch.linspace(0, 1, len(own), dtype=F64), rtol=0, atol=0.01)
    grid = 0.01 + 0.98 * (torch.arange(10**5, dtype=F64) + 0.5) / 10**5
    for f in torch.cos, lambda t: schedule.logsnr(t)**2, lambda t: (t < 0.2).double():
        assert (importance * f(t)).mean().item() == pytest.approx(f(grid).mean().item(), rel=2e-3, abs=1e-3)
    single, weights = adaptive.draw_bins((7, 30), schedule, 0.01, p.float(), seed(1))
    assert single.dtype == weights.dtype == torch.float32 and single.shape == weights.shape == (7, 30)


def test_bins_alike_are_log_snr_uniform():
    t, importance = adaptive.draw_bins((50_000,), SCHEDULES["cosine"], generator=seed(), dtype=F64)
    expected = losses.draw_t((50_000,), SCHEDULES["cosine"], 1e-3, "logsnr", seed(), F64)
    logsnr = SCHEDULES["cosine"].logsnr(torch.stack([t, expected[0]])).sort(1)[0]
    assert_close(logsnr[0], logsnr[1], rtol=0, atol=0.02)
    assert_close(importance.sort()[0], expected[1].sort()[0], rtol=0.15, atol=0)
    assert importance.mean().item() == pytest.approx(1, abs=1e-3)


def test_what_a_run_draws_with():
    """The root that belongs to the moments; a chain its steps; the fixed densities as they are."""
    moments = torch.rand(100, generator=seed()) + 0.1
    for density, p in ("adaptive", moments), ("loss_aware", moments.sqrt()):
        config = config_of(f"--t-density {density} --schedule linear --t-min 0.02")
        for given, expected in (moments, p), (None, None):
            found = adaptive.draw((50,), config, given, seed())
            assert_close(found, adaptive.draw_bins((50,), SCHEDULES["linear"], 0.02, expected, seed()))
    for density in "uniform", "logsnr":
        found = adaptive.draw((50,), config_of(f"--t-density {density} --schedule flow --t-min 0.02"), None, seed())
        assert_close(found, losses.draw_t((50,), SCHEDULES["flow"], 0.02, density, seed()), rtol=0, atol=0)
    config = config_of("--timesteps 7 --t-density loss_aware")
    for given in None, moments[:7]:
        found = adaptive.draw((50,), config, given, seed())
        assert_close(found, losses.draw_step((50,), losses.chain_of(config), given, seed()), rtol=0, atol=0)


# Moments

@pytest.mark.parametrize("words, power", [("--t-density adaptive", 1), ("--t-density loss_aware", 2),
                                          ("--timesteps 8 --t-density loss_aware", 2)])
@pytest.mark.parametrize("begun", [False, True])
def test_moments_move_to_the_mean_power_of_the_loss_in_each_bin(words, power, begun):
    """By a loop. Bins not drawn stay, or begin as the mean of all; each is moved once, however often it was drawn."""
    config = config_of(f"{words} --schedule cosine")
    chain = losses.chain_of(config)
    edges = chain.times if chain else SCHEDULES["cosine"].t(torch.linspace(*SCHEDULES["cosine"].ends(1e-3)[::-1], 101,
                                                                           dtype=F64))
    n, errors = len(edges) - 1, torch.rand(6, generator=seed(), dtype=F64) + 0.5
    bins, expected = [3, 0, 3, 7, 3, 0], []
    t = edges[1:][bins] if chain else ((edges[1:] + edges[:-1]) / 2)[bins]
    width = lambda k: 1 if chain else n * (edges[k + 1] - edges[k]).item() / 0.998
    powers = [(width(k) * error)**power for k, error in zip(bins, errors.tolist())]
    before = torch.rand(n, generator=seed(1), dtype=F64) if begun else None
    for k in range(n):
        own, old = [p for p, bin in zip(powers, bins) if bin == k], before[k].item() if begun else sum(powers) / 6
        expected.append(0.9 * old + 0.1 * sum(own) / len(own) if own else old)
    found = adaptive.moved(before, t, errors, 0.1, config)
    assert_close(found, torch.tensor(expected, dtype=F64), rtol=1e-6, atol=0)


def moments_of_h(data, n):
    """E[h] and E[h^2] at the middles of 100 bins of log-SNR from -9 to 9, h = 1/2 |eps - eps_hat|^2, typed again."""
    logsnr, g = -9 + 0.18 * (torch.arange(100, dtype=F64) + 0.5), seed(7)
    logsnr = logsnr.repeat_interleave(n)
    alpha, sigma = torch.sigmoid(logsnr).sqrt(), torch.sigmoid(-logsnr).sqrt()
    x = data.sample(len(logsnr), g, F64)
    eps = torch.randn(x.shape, generator=g, dtype=F64)
    z = alpha[:, None] * x + sigma[:, None] * eps
    eps_hat = (z - alpha[:, None] * data.denoise(z, alpha, sigma)) / sigma[:, None]
    h = 0.5 * (eps - eps_hat).square().sum(1).unflatten(0, (100, n))
    return h.mean(1), h.square().mean(1)


KNOWN = {"clusters": (1.81, 4.31, 1.198, 1.154), "rings": (1.71, 3.92, 1.108, 1.101)}
DENSITIES = "logsnr", "uniform", "adaptive", "loss_aware"


@pytest.mark.parametrize("data", KNOWN)
def test_deviation_of_one_draw_by_quadrature_and_by_draws(data):
    """From log-SNR -9 to 9 it is sqrt(integral of E[h^2] / p - L^2) / L, and `one_draw` has it for every density."""
    n, per_bin, close = (60_000, 1000, 0.03) if data == "clusters" else (4000, 150, 0.06)
    first, second = moments_of_h(DATASETS[data], per_bin)
    cosine = 1 / torch.cosh((-9 + 0.18 * (torch.arange(100, dtype=F64) + 0.5)) / 2)
    t_min, mean = SCHEDULES["cosine"].t(torch.tensor(9.0, dtype=F64)).item(), 18 * first.mean()
    for density, p, known in zip(DENSITIES, (torch.ones(100), cosine, first, second.sqrt()), KNOWN[data]):
        p = p / (0.18 * p.sum())
        found = (0.18 * (second / p).sum() - mean**2).sqrt() / mean
        assert found.item() == pytest.approx(known, rel=close)
        terms, _ = adaptive.one_draw(DATASETS[data], density, "cosine", t_min, n=n)
        assert (terms.std() / terms.mean()).item() == pytest.approx(known, rel=2 * close)
        assert abs(2 * (1 - 2 * t_min) * terms.mean() - mean) < 4.5 * (
            2 * terms.std() / n**0.5 + (second.mean() / per_bin / 100)**0.5 * 18)


def test_a_wrong_network_has_one_loss_whatever_the_density():
    """Any weight and schedule: draws with bad moments, too, are unbiased."""
    model, moments = lambda z, t: torch.tanh(z) * t[:, None], torch.rand(100, generator=seed(), dtype=F64)
    for words, loss in ("--schedule cosine", "nelbo"), ("--schedule flow", "mse"), ("--schedule edm", "sigmoid"):
        means, errors = [], []
        for density in DENSITIES:
            config, g = config_of(f"{words} --t-density {density}") | {"loss": loss}, seed(3)
            t, importance = adaptive.draw((60_000,), config, moments if density in adaptive.POWERS else None, g)
            x = DATASETS["clusters"].sample(60_000, g)
            terms = importance * losses.loss(model, x, t, torch.randn(x.shape, generator=g), **losses.objective(config))
            means.append(terms.mean())
            errors.append(terms.std() / 60_000**0.5)
        for mean, error in zip(means[1:], errors[1:]):
            assert abs(mean - means[0]) < 4.5 * (error**2 + errors[0]**2)**0.5


# Runs

@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A stack of four runs: words, their folder."""
    words = ["--data", "clusters", "--target", "v", "eps", "--loss", "nelbo", "mse", "--adaptive"]
    out = tmp_path_factory.mktemp("runs")
    train.main([*words, *FAST, "--out", str(out)])
    return words, out


def test_each_member_has_moments_of_its_own(trained):
    states = [run.load(path) for path in sorted(trained[1].glob("*/ckpt.pt"))]
    moments = torch.stack([state["moments"] for state in states])
    assert moments.shape == (4, 100) and (moments > 0).all()
    assert all((a / b).log().abs().max() > 0.1 for k, a in enumerate(moments) for b in moments[:k])
    for edited in moments[0][:99], moments[0][None], -moments[0], None:
        run.save(trained[1] / "ckpt.pt", states[0] | {"moments": edited})
        with pytest.raises(SystemExit, match="its moments is not that of a run on points"):
            run.open(trained[1])


def test_a_killed_stack_goes_on_bit_for_bit(trained, tmp_path, monkeypatch):
    """With other moments it ends elsewhere."""
    words, out = trained
    original = train_points.train_epoch

    def stop(step, optimizer, data, epoch, *rest):
        if epoch == 1:
            raise KeyboardInterrupt
        return original(step, optimizer, data, epoch, *rest)
    with monkeypatch.context() as patch:
        patch.setattr(train_points, "train_epoch", stop)
        with pytest.raises(KeyboardInterrupt):
            train.main([*words, *FAST, "--out", str(tmp_path)])
    kept = {path: run.load(path) for path in tmp_path.glob("*/ckpt.pt")}
    train.main([*words, *FAST, "--out", str(tmp_path), "--resume"])
    assert len(kept) == 4 and all(same(run.load(path), run.load(out / path.parent.name)) for path in kept)
    for path, state in kept.items():
        run.save(path, state | {"moments": state["moments"].flip(0)})
    train.main([*words, *FAST, "--out", str(tmp_path), "--resume"])
    assert not any(same(run.load(path)["model"], run.load(out / path.parent.name)["model"]) for path in kept)


def test_training_draws_with_the_moments_and_moves_them_to_its_losses(monkeypatch):
    """With a rate of nearly nothing: an epoch's losses are those of the first network, and the moments are theirs."""
    drawn, original = [], losses.regression
    monkeypatch.setattr(losses, "regression", lambda *draws, **kw: drawn.append(draws) or original(*draws, **kw))
    config = config_of("--width 8 --batch-size 1000 --lr 1e-12 --epochs 2 --adaptive")
    torch.manual_seed(0)
    model = train_points.kind_points.build_model(config, 1)
    optimizer, points = train_points.build_optimizer(model, config), [DATASETS["clusters"].sample(4000, seed())]
    step = train_points.build_step(model, optimizer, 1)
    before = torch.rand(100, generator=seed()) + 0.01
    moments = [before.clone()]
    found, _, _ = train_points.train_epoch(step, optimizer, points, 0, [config], moments=moments)
    (x, t, eps), of = drawn[0], adaptive.bins(SCHEDULES["cosine"], 1e-3)
    i, plain = of.index(t) - 1, losses.loss(model, x, t, eps, **losses.objective(config)).detach()
    q = 0.999 * before / before.sum() + 1e-5
    assert ((i.bincount(minlength=100) - 4000 * q).abs() < 5).all()                    # stratified in each of 4 batches
    assert_close(found[:, 0], (plain * (of.share.float() / q)[i]).unflatten(0, (4, 1000)).mean(1), rtol=1e-3, atol=0)
    means = torch.stack([100 * of.share[k].float() * plain[i == k].mean() if (i == k).any() else before[k]
                         for k in range(100)])
    assert_close(moments[0], means, rtol=1e-3, atol=0)
    moments = [None]
    train_points.train_epoch(step, optimizer, points, 0, [config], moments=moments)
    assert ((of.index(drawn[-1][1]).bincount(minlength=101)[1:] - 40).abs() <= 4).all() and len(moments[0]) == 100


IMAGES = ("--channels 8 --channel-mult 1 --layers 1 --attention 0 --batch-size 4 --lr 0.01 --warmup 2 --device cpu "
          "--epochs 2 --test-every 2 --grid-every 100 --target v --loss nelbo").split()


def test_images_resumed_are_the_same_and_their_moments_those_of_their_losses(folder, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setattr(train_images, "SAVE_EVERY", 0)
    calls, drawn, original, draw = [], [], adaptive.moved, adaptive.draw
    argv = ["--data", str(folder), *IMAGES, "--t-density", "loss_aware", "--out"]
    with monkeypatch.context() as patch:
        patch.setattr(adaptive, "moved", lambda *of: (calls.append(of), original(*of))[1])
        patch.setattr(adaptive, "draw", lambda *of: (drawn.append(draw(*of)), drawn[-1])[1])
        train.main([*argv, str(tmp_path / "whole")])
    state = run.load(only(tmp_path / "whole"))
    assert len(calls) == 6 and calls[0][0] is None and state["moments"].shape == (100,)
    moments = None
    for before, t, errors, rate, config in calls:
        assert (before is None) == (moments is None) and rate == 0.1
        if moments is not None:
            assert torch.equal(before, moments)
        moments = original(before, t, errors, rate, config)
    assert torch.equal(moments, state["moments"])
    means = [(errors * importance).mean().item() for (_, _, errors, *_), (_, importance) in zip(calls, drawn)]
    assert [entry["train_loss"] for entry in state["history"]] == pytest.approx(
        [(a + b) / 2 for a, b in zip(means[::2], means[1::2])], rel=1e-4)
    killed(monkeypatch, [*argv, str(tmp_path / "killed")], 4)
    train.main([*argv, str(tmp_path / "killed"), "--resume"])
    assert same(state, run.load(only(tmp_path / "killed")))


def test_images_draw_with_their_moments(folder):  # noqa: F811
    data = train_images.images.load(str(folder), "train")
    config = config_of(f"--data {folder} --adaptive --batch-size 6") | dict(flip=False)
    p = torch.zeros(100).index_fill(0, torch.tensor([30]), 1.0)
    _, t, _, importance = train_images.batch(data, 0, config, p)
    of = adaptive.bins(SCHEDULES["cosine"], 1e-3)
    assert (of.index(t) == 31).sum() >= 5
    assert_close(importance[of.index(t) == 31][0], (of.share[30] / (0.999 + 1e-5)).float(), rtol=1e-5, atol=0)


# Settings

def test_the_short_form_is_the_density():
    assert train.parse(["--adaptive"]).t_density == "adaptive" and train.parse([]).t_density == "uniform"
    assert train.parse(["--adaptive", "--loss", "sigmoid", "mse", "--schedule", "edm"]).t_density == "adaptive"


@pytest.mark.parametrize("words, sentence", [
    ("--adaptive --timesteps 100", "--t-density adaptive is of continuous time - leave it or --timesteps out, or take "
                                   "loss_aware"),
    ("--adaptive --target s --loss denoising --sigma 0.1", "--loss denoising has no t and does not use --t-density - "
                                                           "leave it out"),
    ("--t-density loss_aware --target s --loss exact", "--loss exact has no t and does not use --t-density - leave"),
    ("--adaptive --target s --loss mse --sigma 0.1", "--sigma is for --loss"),
    ("--t-density loss", "invalid choice: 'loss'"), ("--adaptive yes", "unrecognized arguments: yes")])
def test_bad_input_is_one_sentence(words, sentence, capsys):
    with pytest.raises(SystemExit) as stop:
        train.parse(words.split())
    error = capsys.readouterr().err
    assert stop.value.code == 2 and sentence in error.splitlines()[-1] and "Traceback" not in error


def test_a_density_of_moments_is_for_one_process(folder, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setattr(run, "processes", lambda device: (0, 2))
    args = train.parse(["--data", str(folder), *IMAGES, "--adaptive", "--out", str(tmp_path)])
    with pytest.raises(SystemExit, match="--t-density adaptive is for one process, each would draw other times - l"):
        train_images.train(args, torch.device("cpu"))
