"""Images on a discrete chain: the loop typed a second time, with the grey levels' decoder; resume, samples, bounds."""
import json
import math

import numpy as np
import pytest
import torch
from PIL import Image
from test_chain_runs import posterior, same, steps_of
from test_train_images import history, killed, only
from torch.distributions import Normal, kl_divergence
from torch.testing import assert_close

import draw_images
import images
import kind_images
import likelihood
import run
import sample
import train
import train_images
from ddpm import SCHEDULES

SMALL = ("--channels 8 --channel-mult 1 --layers 1 --attention 0 --batch-size 4 --lr 0.01 --warmup 2 --device cpu "
         "--epochs 2 --test-every 2 --grid-every 100").split()
RUNS = {"range": "--schedule ddpm --timesteps 6 --target eps --loss hybrid --variance range --vlb-weight 0.1",
        "log": "--schedule cosine --timesteps 5 --target mu --loss vlb --variance log",
        "aware": "--schedule iddpm --timesteps 4 --target mu_skip --loss vlb --variance large --t-density loss_aware",
        "mse": "--schedule linear --timesteps 7 --target v --loss mse --variance large --t-density loss_aware"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """12 grey images of 4 x 4 to train on, 3 to test on; among their levels are black and white."""
    root, g = tmp_path_factory.mktemp("data") / "dots", np.random.default_rng(0)
    for i in range(15):
        path = root / ("train" if i < 12 else "test") / "one" / f"{i:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(g.choice([0, 255, 30, 128, 200], (4, 4)).astype(np.uint8)).save(path)
    return root


@pytest.fixture(scope="module")
def trained(folder, tmp_path_factory):
    """The four RUNS, 6 steps each, tested at every second: {name: its folder}."""
    out = tmp_path_factory.mktemp("runs")
    for name, words in RUNS.items():
        train.main(["--data", str(folder), "--out", str(out / name), *SMALL, *words.split()])
    return {name: only(out / name) for name in RUNS}


def minus_log_level(x, mean, std):
    """-log of the probability of a bin of width 2 / 255 around x, those of black and white without end."""
    low = torch.where(x < -0.999, -math.inf, (x - 1 / 255 - mean) / std)
    high = torch.where(x > 0.999, math.inf, (x + 1 / 255 - mean) / std)
    low, high = torch.where(low > 0, -high, low), torch.where(low > 0, -low, high)     # in the tail without 1 - 1
    return -torch.log(torch.special.ndtr(high) - torch.special.ndtr(low))


def by_hand(config, predict, x, t, eps):
    """The loss, the squared error of the posterior mean, the term of the bound: means over dimensions, (B,) each."""
    schedule, T, dtype = SCHEDULES[config["schedule"]], config["timesteps"], torch.float64
    s, t = (c[:, :, None, None] for c in steps_of(config, t))
    x, eps, alpha, sigma = x.to(dtype), eps.to(dtype), schedule.alpha(t), schedule.sigma(t)
    z = alpha * x + sigma * eps
    mean, q, beta = posterior(schedule, s, t, z, x)
    given = predict(z, t.flatten())
    y_hat, out = given[:, :1], given[:, 1:]
    y, x_hat = {"eps": (eps, (z - sigma * y_hat) / alpha), "v": (alpha * eps - sigma * x, alpha * z - sigma * y_hat),
                "mu": (mean, None), "mu_skip": (mean - z, None)}[config["target"]]
    mean_hat = y_hat + (z if config["target"] == "mu_skip" else 0) if x_hat is None else posterior(
        schedule, s, t, z, x_hat)[0]
    last = q == 0
    small = torch.where(last, posterior(schedule, t, 2 * t - s, z, x)[1], q)
    var = {"large": lambda: beta, "log": lambda: out.exp(),
           "range": lambda: beta**((1 + out) / 2) * small**((1 - out) / 2)}[config["variance"]]().expand(x.shape)
    inside = mean_hat.detach() if config["loss"] == "hybrid" else mean_hat
    kl = kl_divergence(Normal(mean, torch.where(last, 1, q).sqrt()), Normal(inside, var.sqrt()))
    bound = torch.where(last, minus_log_level(x, torch.where(last, inside, x), var.sqrt()), kl).mean((1, 2, 3))
    error = (y_hat - y).square().mean((1, 2, 3))
    loss = {"mse": error, "vlb": T * bound, "hybrid": error + config["vlb_weight"] * T * bound}[config["loss"]]
    return loss, (mean_hat - mean).square().mean((1, 2, 3)), bound


@pytest.mark.parametrize("name", RUNS)
def test_the_loop_is_the_loop_typed_again(trained, folder, name):
    """Losses, norms of gradients, moments of the terms and weights of 6 steps; and the tests of the averages."""
    state, data = run.load(trained[name]), images.load(str(folder), "train")
    config, T, dtype = state["config"], state["config"]["timesteps"], torch.float64
    torch.manual_seed(0)
    model = kind_images.build_model(config).to(dtype)
    optimizer, norms, train_losses = torch.optim.AdamW(model.parameters()), [], []
    aware, moments = "aware" in config["t_density"], None
    for step in range(6):
        x, t, eps, _ = train_images.batch(data, step, config, moments)
        i = ((t - config["t_min"]) / (1 - 2 * config["t_min"]) * T).round().long() - 1
        p = torch.ones(T) / T if moments is None else 0.999 * moments.sqrt() / moments.sqrt().sum() + 0.001 / T
        plain = by_hand(config, model, x, t, eps)[0]
        loss = (plain / (T * p[i])).mean()
        optimizer.zero_grad()
        loss.backward()
        norms.append(torch.sqrt(sum((p.grad**2).sum() for p in model.parameters())).item())
        for parameter in model.parameters():
            parameter.grad *= min(1, 1 / (norms[-1] + 1e-6))
        optimizer.param_groups[0]["lr"] = 0.01 * min(1, (step + 1) / 2)
        optimizer.step()
        train_losses.append(loss.item())
        if step == 0 and aware:
            moments = plain.detach().float().square().mean().repeat(T)
        for k in range(T) if aware else ():
            if (i == k).any():
                moments[k] += 0.1 * (plain.detach()[i == k].square().mean() - moments[k])
    entries = history(trained[name])
    assert [value for entry in entries for value in entry["gradient_norms"]] == pytest.approx(norms, rel=3e-3)
    assert [entry["gradient_norm"] for entry in entries] == pytest.approx(
        [(a + b) / 2 for a, b in zip(norms[::2], norms[1::2])], rel=3e-3)
    assert [entry["train_loss"] for entry in entries] == pytest.approx(
        [(a + b) / 2 for a, b in zip(train_losses[::2], train_losses[1::2])], rel=3e-3)
    for key, value in model.state_dict().items():
        assert_close(state["model"][key].to(dtype), value, rtol=1e-2, atol=2e-3)
    assert ("moments" in state) == (moments is not None)
    if moments is not None:
        assert_close(state["moments"], moments, rtol=1e-2, atol=0)

    calls, original = [], kind_images.losses.regression
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kind_images.losses, "regression", lambda *c, **kw: calls.append(c) or original(*c, **kw))
        averaged = kind_images.build_model(config)
        averaged.load_state_dict(state["ema"])
        tests = kind_images.test(averaged, images.load(str(folder), "test"), config, torch.device("cpu"))
    columns = [c.mean().item() for c in by_hand(config, averaged.to(dtype), *calls[0])]
    assert list(tests) == ["test_loss", "test_mean_mse", "test_vlb"] and len(calls[0][0]) == 3
    assert list(tests.values()) == pytest.approx([columns[0], columns[1], T * columns[2]], rel=1e-3)
    assert tests == pytest.approx({key: entries[-1][key] for key in tests}, rel=1e-4)


@pytest.mark.parametrize("name", ["range", "aware"])
def test_a_killed_run_goes_on_bit_for_bit(trained, folder, tmp_path, monkeypatch, name):
    """With the moments of its terms; without them it does not."""
    argv = ["--data", str(folder), "--out", str(tmp_path), *SMALL, *RUNS[name].split()]
    monkeypatch.setattr(train_images, "SAVE_EVERY", 0)
    killed(monkeypatch, argv, 4)
    state = run.load(only(tmp_path))
    assert state["step"] == 3
    train.main([*argv, "--resume"])
    assert same(run.load(trained[name]), run.load(only(tmp_path)))
    if name == "aware":
        run.save(only(tmp_path) / "ckpt.pt", state | {"moments": torch.ones(5)})
        with pytest.raises(SystemExit, match="its moments is not that of a run on images"):
            run.open(only(tmp_path))
        run.save(only(tmp_path) / "ckpt.pt", state | {"moments": torch.ones(4)})
        train.main([*argv, "--resume"])
        assert not same(run.load(trained[name])["model"], run.load(only(tmp_path))["model"])


def averaged(one):
    """The network of a run as it was trained, with the averaged weights, in float64."""
    model = kind_images.build_model(one.config)
    model.load_state_dict(one.checkpoint["ema"])
    return model.double().requires_grad_(False).eval()


def hand_x(one):
    """It as one that predicts x: (z, t) -> x_hat, out."""
    config, model, schedule = one.config, averaged(one), one.schedule
    length = (1 - 2 * config["t_min"]) / config["timesteps"]

    def predict(z, t):
        given, t = model(z, t), t[:, None, None, None]
        y_hat, out, alpha, sigma = given[:, :1], given[:, 1:], schedule.alpha(t), schedule.sigma(t)
        if not config["target"].startswith("mu"):
            return {"eps": (z - sigma * y_hat) / alpha, "v": alpha * z - sigma * y_hat}[config["target"]], out
        mean = y_hat + (z if config["target"] == "mu_skip" else 0)
        of_z, of_x = (posterior(schedule, t - length, t, *c)[0] for c in ((z, 0 * z), (0 * z, 0 * z + 1)))
        return (mean - of_z) / of_x, out
    return predict


@pytest.mark.parametrize("name, words, variance", [
    ("range", "--steps 6", "range"), ("range", "--steps 3", "range"), ("log", "--steps 5", "log"),
    ("log", "--steps 3 --variance large", "large"), ("aware", "--steps 4", "large"),
    ("mse", "--steps 7 --no-clip", "large")])
def test_images_are_drawn_with_the_variance_of_the_run(trained, tmp_path, name, words, variance):
    """The chain by hand, x_hat kept in [-1, 1], from the same noise: the same grey levels, nearly all."""
    one, steps = run.open(trained[name]), int(words.split()[1])
    sample.main(["--ckpt", str(trained[name]), *words.split(), "--num-samples", "9", "--batch-size", "9", "--device",
                 "cpu", "--out", str(tmp_path)])
    g, t_0, clip = run.generator("cpu", 0, "sample", 0), one.config["t_min"], 9e9 if "--no-clip" in words else 1
    z, predict = torch.randn((9, 1, 4, 4), generator=g).double(), hand_x(one)
    for i in range(steps, 0, -1):
        t, s = (torch.full((9, 1, 1, 1), t_0 + (1 - 2 * t_0) * k / steps, dtype=torch.float64) for k in (i, i - 1))
        x_hat, out = predict(z, t.flatten())
        x_hat = x_hat.clamp(-clip, clip)
        if i > 1:
            mean, small, beta = posterior(one.schedule, s, t, z, x_hat)
            var = {"large": lambda: beta, "log": lambda: out.exp(),                                     # noqa: B023
                   "range": lambda: beta**((1 + out) / 2) * small**((1 - out) / 2)}[variance]()         # noqa: B023
            z = mean + var.sqrt() * torch.randn((9, 1, 4, 4), generator=g).double()
    found = torch.from_numpy(np.stack([np.array(Image.open(tmp_path / f"samples/{i:05d}.png")) for i in range(9)]))
    expected = images.to_uint8(x_hat)[:, 0]
    assert (found.int() - expected.int()).abs().max() <= 1 and (found == expected).float().mean() > 0.9
    assert len(found.unique()) > 5


def test_the_grid_of_training_has_the_mean_alone(trained):
    """Its steps have beta tilde, for a network that predicts the mean and a variance, too."""
    one = run.open(trained["log"])
    samples = draw_images.draw(one.model(), (64, 1, 4, 4), 5, one.config, run.generator("cpu", 0, "grid"))
    assert one.target == "x" and one.model()(torch.zeros(2, 1, 4, 4), torch.full((2,), 0.5)).shape == (2, 1, 4, 4)
    drawn = np.array(Image.open(trained["log"] / "samples-6.png").convert("L"))
    assert (drawn == images.grid(samples, 8)[0].numpy()).all()


@pytest.mark.parametrize("name, words", [("range", ""), ("log", ""), ("aware", "--variance small"),
                                         ("range", "--steps 3 --variance large"), ("mse", "--draws 3")])
def test_the_bound_of_a_run_is_all_terms_with_its_own_variance(trained, folder, tmp_path, name, words):
    likelihood.main(["--ckpt", str(trained[name]), "--num", "3", "--num-ode", "0", *words.split(), "--out",
                     str(tmp_path), "--device", "cpu"])
    path, = tmp_path.iterdir()
    said, one, given = json.loads(path.read_text()), run.open(trained[name]), dict(zip(*2 * [iter(words.split())]))
    steps, draws = int(given.get("--steps", one.config["timesteps"])), int(given.get("--draws", 2))
    variance, t_0 = given.get("--variance", one.config["variance"]), one.config["t_min"]
    assert (said["steps"], said["variance"], said["draws"], said["dimensions"]) == (steps, variance, draws, 16)
    x = kind_images.test_examples(one.config, 3, "cpu").double()
    g, terms, predict, schedule = run.generator("cpu", 0, "likelihood"), [], hand_x(one), one.schedule
    noise = lambda: torch.randn(x.shape, generator=g).double()
    for i in range(1, steps + 1):
        terms.append(0)
        for _ in range(draws):
            t, s = (torch.full((3, 1, 1, 1), t_0 + (1 - 2 * t_0) * k / steps, dtype=torch.float64) for k in (i, i - 1))
            z = schedule.alpha(t) * x + schedule.sigma(t) * noise()
            x_hat, out = predict(z, t.flatten())
            (mean, q, beta), mean_hat = posterior(schedule, s, t, z, x), posterior(schedule, s, t, z, x_hat)[0]
            small = posterior(schedule, t, 2 * t - s, z, x)[1] if i == 1 and t_0 == 0 else q
            std = {"small": lambda: small, "large": lambda: beta, "log": lambda: out.exp(),             # noqa: B023
                   "range": lambda: beta**((1 + out) / 2) * small**((1 - out) / 2)}[variance]().sqrt().expand(x.shape)  # noqa: B023
            term = (minus_log_level(x, mean_hat, std) if i == 1 and t_0 == 0
                    else kl_divergence(Normal(mean, q.sqrt()), Normal(mean_hat, std)))
            terms[-1] = terms[-1] + term.sum((1, 2, 3)) / draws
    ends = torch.tensor([t_0, 1 - t_0], dtype=torch.float64)
    alpha, sigma = schedule.alpha(ends), schedule.sigma(ends)
    if t_0 > 0:
        std = sigma[0] / alpha[0]
        terms.insert(0, sum(minus_log_level(x, x + std * noise(), std).sum((1, 2, 3)) for _ in range(draws)) / draws)
    prior = kl_divergence(Normal(alpha[1] * x, sigma[1]), Normal(0 * x, 1)).sum((1, 2, 3))
    expected = {"prior": prior, "reconstruction": terms[0], "diffusion": sum(terms[1:])}
    for key, values in expected.items():
        assert said[key][0] == pytest.approx(values.mean().item(), rel=2e-3), key


def test_mistakes_and_the_next_command(trained, folder, tmp_path, monkeypatch, capsys):
    for main, words in (sample.main, ["--steps", "6"]), (likelihood.main, ["--num", "3"]):
        with pytest.raises(SystemExit, match="the best variance is known for the 2D datasets alone - take small or l"):
            main(["--ckpt", str(trained["range"]), "--variance", "best", *words, "--out", str(tmp_path)])
    with pytest.raises(SystemExit, match="variance log is that of its own 5 steps alone - take --steps 5"):
        sample.main(["--ckpt", str(trained["log"]), "--out", str(tmp_path)])
    argv = ["--data", str(folder), "--out", str(tmp_path / "runs"), *SMALL, *RUNS["aware"].split()]
    with monkeypatch.context() as patch:
        patch.setattr(run, "processes", lambda device: (0, 2))
        with pytest.raises(SystemExit, match="--t-density loss_aware is for one process"):
            train.main(argv)
    assert not list(tmp_path.rglob("*.png")) and not (tmp_path / "runs").exists()
    train.main([*argv, "--epochs", "1"])
    assert capsys.readouterr().out.endswith(f"next: {run.command('sample.py', '--ckpt', only(tmp_path / 'runs'))} "
                                            "--steps 4\n")
