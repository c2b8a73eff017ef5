"""Training on images: the loop typed a second time, resume, processes, tests of a run, mistakes."""
import itertools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.testing import assert_close

import adam
import checkpoints
import ddpm
import draw_images
import images
import kind_images
import losses
import metrics
import reproduce
import reproduce_thesis
import run
import sample
import samplers
import train
import train_images
import unet

SMALL = ["--channels", "8", "--channel-mult", "1", "2", "--layers", "1", "--attention", "4", "--batch-size", "8",
         "--lr", "0.01", "--warmup", "4", "--device", "cpu"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """44 colour images of 8 x 8, in two classes: 40 to train on, 4 to test on."""
    root, g = tmp_path_factory.mktemp("data") / "squares", np.random.default_rng(0)
    for i in range(44):
        path = root / ("test" if i % 11 == 0 else "train") / f"class{i // 22}" / f"{i:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        image = np.full((8, 8, 3), 40 * (i // 22), np.uint8)
        image[2:6, :4] = g.integers(100, 255, 3)
        Image.fromarray(image).save(path)
    return root


def command(folder, out, *more):
    return ["--data", str(folder), "--target", "v", "--out", str(out), *SMALL, *more]


def only(out):
    return next(Path(out).glob("*/ckpt.pt")).parent


@pytest.fixture(scope="module")
def trained(folder, tmp_path_factory):
    """A run of 10 steps, tested at every second."""
    out = tmp_path_factory.mktemp("runs")
    train.main(command(folder, out, "--epochs", "2", "--test-every", "2", "--grid-every", "5"))
    return only(out)


def history(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_the_loop_is_the_loop_typed_again(trained, folder):
    """AdamW with a linear warm-up, clipped gradients, EMA with a warm-up, batches that are a function of the step."""
    state = run.load(trained)
    config = state["config"]
    torch.manual_seed(0)
    model = unet.UNet(3, 8, channels=8, channel_mult=[1, 2], layers=1, attention=[4])
    optimizer, data = torch.optim.AdamW(model.parameters()), images.load(str(folder), "train")
    average, train_losses = [p.detach().clone() for p in model.parameters()], []
    for step in range(10):
        x, t, eps, importance = train_images.batch(data, step, config)
        alpha, sigma = torch.cos(torch.pi / 2 * t)[:, None, None, None], \
            torch.sin(torch.pi / 2 * t)[:, None, None, None]
        loss = ((model(alpha * x + sigma * eps, t) - (alpha * eps - sigma * x))**2).mean()
        optimizer.zero_grad()
        loss.backward()
        norm = torch.sqrt(sum((p.grad**2).sum() for p in model.parameters()))
        for p in model.parameters():
            p.grad *= min(1, 1 / (norm + 1e-6))
        optimizer.param_groups[0]["lr"] = 0.01 * min(1, (step + 1) / 4)
        optimizer.step()
        decay = min(0.9999, (2 + step) / (11 + step))
        average = [decay * a + (1 - decay) * p.detach() for a, p in zip(average, model.parameters())]
        train_losses.append((loss.item(), norm.item()))
    close = dict(rtol=1e-3, atol=3e-4)
    assert_close(list(state["model"].values()), [p.detach() for p in model.parameters()], **close)
    assert_close(list(state["ema"].values()), average, **close)
    entries = history(trained)
    assert [entry["step"] for entry in entries] == [2, 4, 6, 8, 10] and state["step"] == 10
    assert entries[-1]["epoch"] == 10 * 8 / 40 and entries == state["history"]
    means = torch.tensor(train_losses).unflatten(0, (5, 2)).mean(1)
    assert_close(torch.tensor([[entry["train_loss"], entry["gradient_norm"]] for entry in entries]), means, **close)
    assert {path.name for path in trained.iterdir()} == {"ckpt.pt", "config.json", "metrics.jsonl", "samples-5.png",
                                                         "samples-10.png"}
    averaged = kind_images.build_model(config)            # what is tested and drawn are the averages
    averaged.load_state_dict(state["ema"])
    tests = kind_images.test(averaged, images.load(str(folder), "test"), config, torch.device("cpu"))
    assert tests == pytest.approx({key: entries[-1][key] for key in tests}, rel=1e-5)
    samples = draw_images.draw(averaged, (64, 3, 8, 8), 5, config, run.generator("cpu", 0, "grid"))
    assert (np.array(Image.open(trained / "samples-10.png")) == images.grid(samples, 8).permute(1, 2, 0).numpy()).all()


def test_ema_decay_at_both_ends():
    assert adam.ema_decay(0.9999, 0) == 0.1 and adam.ema_decay(0.9999, 90) == 0.91
    assert adam.ema_decay(0.9999, 10**7) == 0.9999 and adam.ema_decay(0.0, 5) == 0.0


def test_batches_are_a_function_of_seed_and_step():
    data = torch.arange(20, dtype=torch.uint8)[:, None, None, None].expand(20, 3, 4, 4).contiguous()
    data[:, :, :, 0] = 255
    config = dict(batch_size=6, seed=3, flip=True, t_min=0.05, schedule="cosine", t_density="uniform")
    batches = [train_images.batch(data, step, config) for step in range(6)]
    again = train_images.batch(data, 4, config)
    assert all(torch.equal(a, b) for a, b in zip(batches[4], again))
    assert not torch.equal(train_images.batch(data, 4, config | dict(seed=4))[2], again[2])
    of_seed = [train_images.batch(data, 0, config | dict(seed=seed, flip=False))[0][:, 0, 0, 2] for seed in (3, 4)]
    assert sorted(of_seed[0].tolist()) != sorted(of_seed[1].tolist())      # other images, not only other noise
    orders = []
    for epoch in 0, 1:                                     # three batches of 6 out of 20, each image at most once
        orders.append(torch.cat([images.to_uint8(batches[3 * epoch + i][0])[:, 0, 0, 1:3].amin(1)
                                 for i in range(3)]).tolist())
        assert len(set(orders[-1])) == 18
    assert orders[0] != orders[1]
    x = torch.cat([x for x, *_ in batches])
    mirrored = (x[:, 0, 0, 3] == 1).float().mean()
    assert 0.2 < mirrored < 0.8 and ((x[:, 0, 0, 0] == 1) | (x[:, 0, 0, 3] == 1)).all()
    straight = train_images.batch(data, 0, config | dict(flip=False))[0]
    assert (straight[:, :, :, 0] == 1).all() and (straight[:, :, :, 3] < 1).all()
    t, eps = torch.cat([t for _, t, *_ in batches]), torch.cat([eps for _, _, eps, _ in batches])
    assert t.min() >= 0.05 and t.max() <= 0.95 and eps.shape == x.shape and abs(eps.std() - 1) < 0.1
    assert not torch.equal(batches[0][2], batches[1][2])


@pytest.mark.parametrize("name, options, flipped", [
    ("squares", [], False), ("squares", ["--flip"], True), ("squares", ["--no-flip"], False), ("cifar10", [], True),
    ("cifar10", ["--no-flip"], False), ("mnist", [], False), ("mnist", ["--flip"], True)])
def test_only_cifar10_is_mirrored_unless_asked(folder, tmp_path, monkeypatch, capsys, name, options, flipped):
    """It is in the config, in what training says and in what it does."""
    data = images.load(str(folder), "train")
    monkeypatch.setattr(images, "fetch", lambda *args: data)
    seen, original = [], images.flip
    monkeypatch.setattr(images, "flip", lambda *args: seen.append(1) or original(*args))
    name = str(folder) if name == "squares" else name
    train.main(command(name, tmp_path, "--minutes", "1e-6", "--grid-every", "5", *options))
    assert run.load(only(tmp_path))["config"]["flip"] is flipped and bool(seen) is flipped
    out = capsys.readouterr().out
    assert ("40 images of 3x8x8, half of them mirrored, 2,500 steps" if flipped else "40 images of 3x8x8, 2,500") in out


@pytest.mark.parametrize("target, loss", [("v", "mse"), ("x", "nelbo"), ("u", "rescaled")])
def test_evaluation_is_the_sum_typed_again(target, loss):
    torch.manual_seed(1)
    config = dict(data="cifar10", target=target, loss=loss, seed=0, schedule="cosine", t_min=1e-3, stabiliser=0.0)
    data = torch.randint(0, 256, (600, 3, 4, 4), dtype=torch.uint8)
    seen = []

    def model(z, t):
        seen.append((z, t))
        return 0.5 * z + t[:, None, None, None]
    result = kind_images.test(model, data, config, torch.device("cpu"))
    z, t = (torch.cat(column) for column in zip(*seen))
    assert [len(c) for c, _ in seen] == [250, 250, 100] and 0.001 <= t.min() < 0.003 and 0.997 < t.max() <= 0.999
    g = run.generator("cpu", "test noise")
    order, u = torch.randperm(600, generator=g), torch.rand(1, generator=g)
    x = data[order].float() / 127.5 - 1
    assert_close(t, 0.001 + 0.998 * ((u + torch.arange(600) / 600) % 1))
    alpha, sigma = torch.cos(torch.pi / 2 * t)[:, None, None, None], torch.sin(torch.pi / 2 * t)[:, None, None, None]
    eps = (z - alpha * x) / sigma
    well = sigma.flatten() > 0.2                           # where the division is accurate
    assert abs(eps[well].std() - 1) < 0.02
    y = {"x": x, "v": alpha * eps - sigma * x, "u": eps - x}[target]
    errors = ((0.5 * z + t[:, None, None, None] - y)**2).mean((1, 2, 3))
    names = ["mse", "rescaled", "nelbo", "nelbo_stable"][:3 if target == "u" else 4]
    assert result.keys() >= {"test_loss", *(f"test_{name}" for name in names)}
    assert (target == "u") == ("test_nelbo_stable" not in result)
    for name in names:
        weights = losses.weight(name, target, t, ddpm.SCHEDULES["cosine"])
        assert abs(result[f"test_{name}"] / (weights * errors).mean() - 1) < 1e-3
    assert result["test_loss"] == pytest.approx(result[f"test_{loss}"])


def test_every_setting_reaches_the_run_and_its_samples(folder, tmp_path, monkeypatch):
    seen, original = [], samplers.sample
    monkeypatch.setattr(samplers, "sample",
                        lambda model, *args, **kw: (seen.append((model.__wrapped__.schedule, kw))
                                                    or original(model, *args, **kw)))
    train.main(command(folder, tmp_path, "--epochs", "1", "--target", "s", "--schedule", "ve", "--t-min", "0.05",
                       "--stabiliser", "0.02", "--seed", "3", "--lr", "1e-12", "--image-size", "6", "--preset",
                       "thesis"))
    state = run.load(only(tmp_path))
    torch.manual_seed(3)                                   # at a rate of 1e-12 the first weights stay
    preset = unet.PRESETS["thesis"] | dict(channels=8, channel_mult=[1, 2], layers=1, attention=[4])
    first = unet.UNet(3, 6, **preset).state_dict()
    assert state["config"]["shape"] == [3, 6, 6]
    assert all(torch.allclose(state["model"][key], first[key], rtol=0, atol=1e-9) for key in first)
    (schedule, grid), = seen
    assert schedule == grid["schedule"] == ddpm.SCHEDULES["ve"] and (grid["stabiliser"], grid["t_min"]) == (0.02, 0.05)
    sample.main(["--ckpt", str(only(tmp_path)), "--steps", "2", "--num-samples", "2", "--batch-size", "2",
                 "--t-min", "0.1", "--seed", "7", "--sampler", "ddim", "--eta", "0.5", "--grid", "karras",
                 "--device", "cpu"])
    assert [seen[1][1][key] for key in ("t_min", "sampler", "eta", "grid")] == [0.1, "ddim", 0.5, "karras"]
    settings = json.loads((only(tmp_path) / "samples/settings.json").read_text())
    assert settings | dict(test_loss=0) == dict(run="squares-s-mse-s3", step=5, test_loss=0, steps=2, sampler="ddim",
                                                eta=0.5, grid="karras", t_min=0.1, clip=True, sampling_seed=7,
                                                batch_size=2, precision="fp32", device="cpu")
    with draw_images.autocast(dict(precision="bf16"), torch.device("cpu")):
        assert torch.is_autocast_enabled("cpu")


def test_several_sets_in_one_call(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "again")
    train.main(["--data", str(folder), str(tmp_path / "again"), "--out", str(tmp_path / "runs"), *SMALL,
                "--epochs", "1"])
    assert {path.name for path in (tmp_path / "runs").iterdir()} == {"squares-eps-mse-s0", "again-eps-mse-s0"}


def killed(monkeypatch, argv, step):
    """Run train.main and kill it after a step."""
    def reporter(*args):
        def on_step(done, *facts):
            if done == step:
                raise KeyboardInterrupt
        return on_step
    monkeypatch.setattr(train_images, "reporter", reporter)
    with pytest.raises(KeyboardInterrupt):
        train.main(argv)
    monkeypatch.undo()


@pytest.mark.parametrize("step, kept", [(6, 0), (8, 1)])
def test_a_killed_run_goes_on_exactly(trained, folder, tmp_path, monkeypatch, step, kept):
    """Killed after an epoch and amid one, with steps since the last test: weights and history as in one go."""
    argv = command(folder, tmp_path, "--epochs", "2", "--test-every", "2", "--grid-every", "5")
    monkeypatch.setattr(train_images, "SAVE_EVERY", 0)
    killed(monkeypatch, argv, step)
    state = run.load(only(tmp_path))
    assert state["step"] == step - 1 and len(state["history"]) == (step - 1) // 2 and len(state["recent"][0]) == 1
    train.main([*argv, "--resume"])
    whole, resumed = run.load(trained), run.load(only(tmp_path))
    assert all(torch.equal(whole[part][key], resumed[part][key]) for part in ("model", "ema") for key in whole[part])
    drop = lambda entries: [{key: value for key, value in entry.items() if key != "seconds"} for entry in entries]
    assert drop(whole["history"]) == drop(resumed["history"]) and resumed["seconds"] > 0


@pytest.fixture(scope="module")
def dropped(folder, tmp_path_factory):
    """`trained` with dropout, and a copy of its folder killed after 7 of the 10 steps."""
    out, argv = tmp_path_factory.mktemp("runs"), ["--epochs", "2", "--dropout", "0.3", "--grid-every", "50"]
    train.main(command(folder, out / "whole", *argv))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_images, "SAVE_EVERY", 0)
        killed(patch, command(folder, out / "killed", *argv), 8)
    return out, argv


@pytest.mark.parametrize("lost", [None, "exp_avg", "exp_avg_sq", "ema", "step"])
def test_dropout_goes_on_exactly_and_without_the_restored_state_it_does_not(folder, tmp_path, dropped, lost):
    out, argv = dropped
    shutil.copytree(out / "killed", tmp_path / "again")
    state = run.load(only(tmp_path / "again"))
    assert state["step"] == 7                              # amid the second epoch
    if lost in ("exp_avg", "exp_avg_sq"):
        for moments in state["optimizer"]["state"].values():
            moments[lost].zero_()
    elif lost == "ema":
        state["ema"] = state["model"]
    elif lost:
        state["step"] = 6
    run.save(only(tmp_path / "again") / "ckpt.pt", {key: value for key, value in state.items() if key != "format"})
    train.main(command(folder, tmp_path / "again", *argv, "--resume"))
    whole, resumed = run.load(only(out / "whole")), run.load(only(tmp_path / "again"))
    equal = [torch.equal(whole[part][key], resumed[part][key]) for part in ("model", "ema") for key in whole[part]]
    assert all(equal) if lost is None else not all(equal)


def test_dropout_is_of_training_alone_and_differs_from_step_to_step(trained, folder, dropped, monkeypatch):
    """0.3 of what the last convolution of a block sees are 0, the others 1 / 0.7; tests and samples drop nothing."""
    opened = run.open(only(dropped[0] / "whole"))
    assert opened.config["dropout"] == 0.3 and run.open(trained).config["dropout"] == 0.0
    model, z, t = opened.model(), torch.randn(2, 3, 8, 8), torch.tensor([0.1, 0.9])
    assert not model.training and torch.equal(model(z, t), model(z, t))
    block, seen = model.down[0].layers[0].resnet, {}
    block.norm2.register_forward_hook(lambda module, args, out: seen.update(before=torch.nn.functional.silu(out)))
    block.conv2.register_forward_pre_hook(lambda module, args: seen.update(after=args[0]))
    model(z, t)
    assert torch.equal(seen["before"], seen["after"])
    model.train()(z, t)
    off = seen["after"] == 0
    assert abs(off.float().mean() - 0.3) < 0.06            # 4 standard deviations of 1,024 draws
    assert_close(seen["after"], seen["before"] / 0.7 * ~off)
    assert sum(isinstance(part, torch.nn.Dropout) and part.p == 0.3 for part in model.modules()) == \
        sum(isinstance(part, unet.Resnet) for part in model.modules())
    draws, original = [], train_images.average
    monkeypatch.setattr(train_images, "average",
                        lambda *weights: draws.append(torch.rand(()).item()) or original(*weights))
    modes, test = [], kind_images.test
    monkeypatch.setattr(kind_images, "test", lambda model, *args: modes.append(model.training) or test(model, *args))
    train.main(command(folder, dropped[0] / "other", "--epochs", "1", "--dropout", "0.3", "--grid-every", "50"))
    assert len(set(draws)) == 5 and modes == [False]       # the generator that dropout draws from, after each step


def grown(folder, tmp_path):
    """A copy of the folder without its two splits, and a run of a step on it."""
    for path in folder.rglob("*.png"):
        (tmp_path / "set").mkdir(exist_ok=True)
        shutil.copy(path, tmp_path / "set")
    argv = command(tmp_path / "set", tmp_path / "runs", "--epochs", "1", "--grid-every", "50")
    train.main(argv)
    return argv, only(tmp_path / "runs")


def test_a_run_is_not_resumed_on_a_folder_that_has_grown(folder, tmp_path):
    argv, out = grown(folder, tmp_path)
    assert run.load(out)["config"]["images"] == images.facts(tmp_path / "set")
    before = (out / "ckpt.pt").read_bytes()
    shutil.copy(tmp_path / "set/01.png", tmp_path / "set/99.png")
    with pytest.raises(SystemExit, match="was trained on 44 images of a folder that now has 45, or others - bring"):
        train.main([*argv, "--resume"])
    (tmp_path / "set/02.png").unlink()                     # as many as before, but others
    with pytest.raises(SystemExit, match="44 images of a folder that now has 44, or others"):
        train.main([*argv, "--resume"])
    assert (out / "ckpt.pt").read_bytes() == before
    train.main([*argv, "--overwrite"])
    assert run.load(out)["config"]["images"] == images.facts(tmp_path / "set")


def test_a_run_from_before_goes_on_with_the_images_and_settings_it_had(folder, tmp_path, monkeypatch):
    """Its config has neither `images` nor `dropout`, and `flip` for every set in colour: the split is the old one."""
    argv, out = grown(folder, tmp_path)
    state = run.load(out)
    old = {key: value for key, value in state["config"].items() if key not in ("images", "dropout")} | dict(flip=True)
    run.save(out / "ckpt.pt", {**state, "config": old})
    (out / "config.json").write_text(json.dumps(old))
    seen, original = [], train_images.train_run
    monkeypatch.setattr(train_images, "train_run", lambda *args: seen.append(args[5]) or original(*args))
    train.main([*argv, "--epochs", "2", "--resume", "--flip"])
    (data, test), = seen
    assert torch.equal(data, images.load(tmp_path / "set", "train", by_name=False)) and len(test) == 4
    assert run.load(out)["step"] == 10 and "images" not in run.load(out)["config"]
    opened = run.open(out)
    assert torch.equal(kind_images.load(opened.config), test) and opened.config["dropout"] == 0.0
    assert not torch.equal(images.load(tmp_path / "set", "test"), test)


def test_a_run_saved_before_its_first_test_ends_though_it_is_resumed_with_fewer_epochs(folder, tmp_path, monkeypatch):
    """It has done more steps than it is to have, and no test: one more step, a test, and the end."""
    argv = command(folder, tmp_path, "--test-every", "100")
    monkeypatch.setattr(train_images, "SAVE_EVERY", 0)
    killed(monkeypatch, [*argv, "--epochs", "2"], 8)
    assert run.load(only(tmp_path))["step"] == 7 and run.load(only(tmp_path))["history"] == []
    original, calls = train_images.batch, itertools.count(1)
    monkeypatch.setattr(train_images, "batch",
                        lambda *args: pytest.fail("endless") if next(calls) > 3 else original(*args))
    train.main([*argv, "--epochs", "1", "--resume"])
    state = run.load(only(tmp_path))
    assert state["step"] == 8 and [entry["step"] for entry in state["history"]] == [8]


def test_more_epochs_go_on_from_a_finished_run(trained, folder, tmp_path):
    argv = command(folder, tmp_path, "--test-every", "2")
    train.main([*argv, "--epochs", "1"])
    train.main([*argv, "--epochs", "2", "--resume"])
    whole, extended = run.load(trained), run.load(only(tmp_path))
    assert all(torch.equal(whole["ema"][key], extended["ema"][key]) for key in whole["ema"]) and extended["step"] == 10


def test_limited_minutes_stop_the_first_run_and_the_others_do_as_many_steps(folder, tmp_path, capsys):
    argv = ["--data", str(folder), "--target", "eps", "x", "--out", str(tmp_path), *SMALL, "--minutes", "0.01"]
    train.main(argv)
    first, second = (run.load(tmp_path / f"squares-{target}-mse-s0") for target in ("eps", "x"))
    assert 0 < first["step"] == second["step"] < 2500 and first["seconds"] >= 0.6
    train.main([*argv, "--resume"])                        # finished already
    assert run.load(tmp_path / "squares-x-mse-s0")["step"] == second["step"]
    assert "test losses of the averaged weights: loss" in capsys.readouterr().out


def test_no_minutes_are_one_step(folder, tmp_path):
    train.main(command(folder, tmp_path, "--minutes", "1e-6"))
    assert run.load(only(tmp_path))["step"] == 1


def test_a_loss_that_is_not_finite_stops_the_run(folder, tmp_path, monkeypatch):
    argv = command(folder, tmp_path, "--epochs", "2", "--test-every", "3")
    original = train_images.batch
    nan = lambda data, step, *rest: [c * float("nan") if step == 4 else c for c in original(data, step, *rest)]
    monkeypatch.setattr(train_images, "batch", nan)
    with pytest.raises(SystemExit, match="not finite at step 4 "):
        train.main(argv)
    assert run.load(only(tmp_path))["step"] == 3


def test_a_gradient_that_is_not_finite_stops_the_run_too(folder, tmp_path, monkeypatch):
    """The loss of that step is finite, the weights after it are not: they must not replace a good checkpoint."""
    steps, original = [], torch.nn.utils.clip_grad_norm_

    def clip(parameters, norm):
        steps.append(1)
        parameters = list(parameters)
        if len(steps) == 5:
            parameters[0].grad.fill_(float("inf"))
        return original(parameters, norm)
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", clip)
    monkeypatch.setattr(train_images, "SAVE_EVERY", 0)
    with pytest.raises(SystemExit, match="not finite at step 4 "):
        train.main(command(folder, tmp_path, "--epochs", "2"))
    state = run.load(only(tmp_path))
    assert state["step"] == 4 and all(value.isfinite().all() for value in state["model"].values())


def test_a_run_goes_on_with_another_number_of_processes(folder, tmp_path, monkeypatch):
    """What the other processes had seen since the last test is gone, the weights are not."""
    argv = command(folder, tmp_path, "--epochs", "2")
    monkeypatch.setattr(train_images, "SAVE_EVERY", 0)
    killed(monkeypatch, argv, 4)
    state = run.load(only(tmp_path))
    state["recent"] = [column[:, :4] if column.ndim == 2 else column for column in state["recent"]]   # of two processes
    run.save(only(tmp_path) / "ckpt.pt", {key: value for key, value in state.items() if key != "format"})
    train.main([*argv, "--resume"])
    assert run.load(only(tmp_path))["step"] == 10


def test_two_processes_have_the_loss_curve_of_one(trained, folder, tmp_path):
    """torchrun with gloo: the batch is divided, gradients and losses are those of the whole."""
    argv = command(folder, tmp_path, "--epochs", "2", "--test-every", "2", "--grid-every", "5")
    result = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
                             "train.py", *argv], cwd=Path(train.__file__).parent, capture_output=True, text=True,
                            env=os.environ | {"OMP_NUM_THREADS": "1", **(
                                {"GLOO_SOCKET_IFNAME": "lo"} if sys.platform == "linux" else {})})
    assert result.returncode == 0, result.stderr
    for one, two in zip(history(trained), history(only(tmp_path)), strict=True):
        for key in "train_loss", "test_loss", "test_nelbo", "gradient_norm":
            assert two[key] == pytest.approx(one[key], rel=1e-3), key
    whole, divided = run.load(trained), run.load(only(tmp_path))
    assert_close(divided["ema"], whole["ema"], rtol=1e-3, atol=2e-3)  # steps of Adam amplify rounding: the rate is 0.01


@pytest.mark.parametrize("argv, message, code", [
    (["--data", "nothing"], "unknown data 'nothing': choose from ", 2),
    (["--data", "FOLDER", "rings"], "points and images cannot be trained in one call", 2),
    (["--data", "FOLDER", "--preset", "big"], "invalid choice", 2),
    (["--data", "FOLDER", "--channels", "0"], "must be in [4, 4096]", 2),
    (["--data", "rings", "--batch-size", "60000"], "must be in [1, 50000]", 2),
    (["--data", "FOLDER", "--batch-size", "41"], "less than a batch", 1),
])
def test_mistakes_are_one_sentence(folder, tmp_path, capsys, argv, message, code):
    with pytest.raises(SystemExit) as error:
        train.main([arg.replace("FOLDER", str(folder)) for arg in argv] + ["--out", str(tmp_path)])
    assert message in (capsys.readouterr().err if code == 2 else str(error.value))
    assert (error.value.code == 2) == (code == 2) and not list(tmp_path.iterdir())


@pytest.mark.parametrize("part", ["build_model", "train_run"])
def test_out_of_memory_is_one_sentence(folder, tmp_path, monkeypatch, part):
    def full(*args):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
    monkeypatch.setattr(kind_images if part == "build_model" else train_images, part, full)
    with pytest.raises(SystemExit, match="not enough memory - try a smaller --batch-size, --channels or --image-size"):
        train.main(command(folder, tmp_path))


def test_a_run_is_not_overwritten_nor_resumed_with_other_settings(trained, folder):
    argv = command(folder, trained.parent, "--epochs", "2")
    with pytest.raises(SystemExit, match="holds this run already"):
        train.main(argv)
    with pytest.raises(SystemExit, match=r"other settings \(--channels 8\)"):
        train.main([*argv, "--channels", "16", "--resume"])


def test_a_run_that_is_there_already_stops_the_call_before_the_first_is_trained(trained, folder, tmp_path):
    shutil.copytree(trained, tmp_path / "squares-v-mse-s0")
    with pytest.raises(SystemExit, match="squares-v-mse-s0 holds this run already"):
        train.main(["--data", str(folder), "--target", "eps", "v", "--out", str(tmp_path), *SMALL, "--epochs", "2"])
    assert [path.name for path in tmp_path.iterdir()] == ["squares-v-mse-s0"]
    shutil.copytree(folder, tmp_path / "other" / "squares")
    with pytest.raises(SystemExit, match="two of these runs would share a folder"):
        train.main(["--data", str(folder), str(tmp_path / "other" / "squares"), "--out", str(tmp_path / "runs"),
                    *SMALL])
    assert not (tmp_path / "runs").exists()


class Features(torch.nn.Module):
    """In place of Inception: the mean colour."""
    dims = 3

    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(()))

    def forward(self, x):
        return [self.scale * 10 * x.mean((2, 3), keepdim=True)]


@pytest.fixture
def drawn(trained, tmp_path):
    argv = ["--ckpt", str(trained), "--steps", "3", "--num-samples", "10", "--batch-size", "4", "--device", "cpu",
            "--out", str(tmp_path)]
    sample.main(argv)
    return argv, tmp_path


def test_samples_are_those_of_the_averaged_weights(trained, drawn):
    """The sampler typed again: x_hat from v, kept in [-1, 1], and the posterior of Eq. (3.9)."""
    argv, out = drawn
    state = run.load(trained)
    model = kind_images.build_model(state["config"])
    model.load_state_dict(state["ema"])
    g = run.generator("cpu", 0, "sample", 4)               # the second batch: images 4 to 7
    z = torch.randn(4, 3, 8, 8, generator=g)
    times = torch.tensor([0.001 + 0.998 * i / 3 for i in range(4)])
    for i in 3, 2, 1:
        t = times[i]
        (a_s, a_t), (s_s, s_t) = torch.cos(torch.pi / 2 * times[[i - 1, i]]), \
            torch.sin(torch.pi / 2 * times[[i - 1, i]])
        with torch.no_grad():
            x_hat = (a_t * z - s_t * model(z, t.expand(4))).clamp(-1, 1)
        var_ts = s_t**2 - (a_t / a_s)**2 * s_s**2
        mean = (a_t / a_s) * s_s**2 / s_t**2 * z + a_s * var_ts / s_t**2 * x_hat
        if i > 1:
            z = mean + (var_ts * s_s**2 / s_t**2).sqrt() * torch.randn(4, 3, 8, 8, generator=g)
    expected = ((x_hat + 1) * 127.5).round().permute(0, 2, 3, 1)
    got = torch.stack([torch.tensor(np.array(Image.open(out / f"samples/{i:05d}.png"))) for i in range(4, 8)])
    assert (got.float() - expected).abs().max() <= 1       # a level may round either way
    assert sorted(path.name for path in out.glob("samples/*.png")) == [f"{i:05d}.png" for i in range(10)]
    result = json.loads((out / "metrics.json").read_text())
    assert (result["weights"], result["sampler"], result["steps"], result["num_samples"], result["clip"]) == \
        ("EMA", "ancestral", 3, 10, True)
    grid = np.array(Image.open(out / "samples.png"))
    assert grid.shape == (22, 82, 3) and (grid[2:10, 12:20] == np.array(Image.open(out / "samples/00001.png"))).all()


@pytest.mark.parametrize("precision, dtype", [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_images_are_drawn_in_the_precision_that_they_were_trained_in(trained, monkeypatch, precision, dtype):
    one, seen, conv2d = run.open(trained), set(), torch.nn.functional.conv2d

    def spy(*words, **more):
        out = conv2d(*words, **more)
        seen.add(out.dtype)
        return out
    monkeypatch.setattr(torch.nn.functional, "conv2d", spy)
    x = draw_images.draw(one.model(), (2, *one.config["shape"]), 2, one.config | dict(precision=precision),
                         run.generator("cpu", "draw"))
    assert seen == {dtype} and x.dtype == torch.uint8


def test_sampling_goes_on_with_what_is_missing(drawn, monkeypatch):
    argv, out = drawn
    before = {path.name: path.read_bytes() for path in out.glob("samples/*.png")}
    (out / "samples/00005.png").unlink()
    batches, original = [], draw_images.draw
    monkeypatch.setattr(draw_images, "draw", lambda *args, **kw: batches.append(args) or original(*args, **kw))
    sample.main(argv)
    assert len(batches) == 1 and {path.name: path.read_bytes() for path in out.glob("samples/*.png")} == before
    sample.main([*argv, "--num-samples", "13"])            # one more: the image 8 ... 11 and 12 ... 15
    assert len(batches) == 3 and len(list(out.glob("samples/*.png"))) == 13
    sample.main([*argv, "--num-samples", "5"])             # fewer: nothing is drawn, nothing goes
    assert len(batches) == 3 and len(list(out.glob("samples/*.png"))) == 13


def test_images_of_other_settings_are_kept(drawn):
    argv, out = drawn
    before = (out / "samples/00000.png").read_bytes()
    with pytest.raises(SystemExit, match="10 images of other settings"):
        sample.main([*argv, "--steps", "2"])
    assert (out / "samples/00000.png").read_bytes() == before
    sample.main([*argv, "--steps", "2", "--overwrite", "--num-samples", "2", "--no-clip"])
    assert (out / "samples/00000.png").read_bytes() != before and len(list(out.glob("samples/*.png"))) == 2
    assert json.loads((out / "samples/settings.json").read_text())["clip"] is False


def test_foreign_files_among_the_samples_stay_and_are_not_counted(drawn, monkeypatch, capsys):
    """With fewer images, with more, with other settings and --overwrite; FID is of the first n that were drawn."""
    argv, out = drawn
    foreign = ["holiday.png", "1.png", "00003.jpg", "000x1.png", "00001.png.bak.png"]
    for name in foreign:
        Image.fromarray(np.full((20, 30, 3), 9, np.uint8)).save(out / "samples" / name)
    before = {name: (out / "samples" / name).read_bytes() for name in foreign}
    counted = []
    monkeypatch.setattr(metrics, "enough_images", lambda *args: None)
    monkeypatch.setattr(metrics, "inception", lambda weights, device: Features())
    monkeypatch.setattr(metrics, "statistics", lambda x, *args: counted.append(x) or (torch.ones(3), torch.eye(3), 7))
    for options, n, there in (["--num-samples", "6"], 6, 10), (["--num-samples", "12"], 12, 12), \
            (["--steps", "2", "--overwrite", "--num-samples", "4"], 4, 4):
        sample.main([*argv, *options, "--fid", "--data-dir", str(out / "cache")])
        assert {name: (out / "samples" / name).read_bytes() for name in foreign} == before
        own = sorted(path for path in out.glob("samples/0[0-9][0-9][0-9][0-9].png"))
        assert [path.name for path in own] == [f"{i:05d}.png" for i in range(there)]
        first = torch.stack([torch.tensor(np.array(Image.open(path))).permute(2, 0, 1) for path in own[:n]])
        assert torch.equal(counted[-1], first)
        assert ("holds 10 images: the first 6 count" in capsys.readouterr().out) == (n == 6)
    assert json.loads((out / "metrics.json").read_text())["num_samples"] == 4


def test_a_numbered_image_that_was_not_drawn_is_in_the_way(trained, tmp_path):
    """Without settings.json beside it nothing says that sample.py wrote it: --overwrite does not touch it either."""
    (tmp_path / "samples").mkdir()
    (tmp_path / "samples/00001.png").write_bytes(b"mine")
    for option in [], ["--overwrite"]:
        with pytest.raises(SystemExit, match="00001.png was not drawn by sample.py and is in the way - move it"):
            sample.main(["--ckpt", str(trained), "--steps", "2", "--num-samples", "3", "--out", str(tmp_path), *option])
    assert (tmp_path / "samples/00001.png").read_bytes() == b"mine" and len(list(tmp_path.rglob("*"))) == 2


@pytest.mark.parametrize("content", ["", "{", "[1]", "null"])
def test_images_with_damaged_settings_are_kept(drawn, content):
    argv, out = drawn
    (out / "samples/settings.json").write_text(content)
    with pytest.raises(SystemExit, match="10 images of other settings"):
        sample.main(argv)
    assert len(list(out.glob("samples/*.png"))) == 10


def test_the_device_is_one_of_the_settings_of_samples(drawn):
    """The noise is a device's own. Older samples do not say which it was."""
    argv, out = drawn
    path = out / "samples/settings.json"
    settings = json.loads(path.read_text())
    assert settings["device"] == "cpu"
    path.write_text(json.dumps({key: value for key, value in settings.items() if key != "device"}))
    sample.main(argv)
    assert json.loads(path.read_text()) == settings
    path.write_text(json.dumps(settings | dict(device="cuda")))
    with pytest.raises(SystemExit, match="10 images of other settings"):
        sample.main(argv)


def test_clipping_is_optional(trained, tmp_path, monkeypatch):
    clips, original = [], samplers.sample
    monkeypatch.setattr(samplers, "sample", lambda *args, **kw: clips.append(kw["clip"]) or original(*args, **kw))
    for flag in "--clip", "--no-clip":
        sample.main(["--ckpt", str(trained), "--steps", "1", "--num-samples", "2", "--device", "cpu",
                     "--out", str(tmp_path / flag), flag])
    assert clips == [1.0, float("inf")]


def test_fid_of_a_run(trained, folder, drawn, monkeypatch, capsys):
    """--fid compares the images that were written with the data of the run, and keeps the data's statistics."""
    argv, out = drawn
    monkeypatch.setattr(metrics, "enough_images", lambda *args: None)
    monkeypatch.setattr(metrics, "inception", lambda weights, device: Features())
    sample.main([*argv, "--fid", "--data-dir", str(out / "cache")])
    of = lambda x: metrics.moments(10 * (x.float() / 255).mean((2, 3)))
    expected = metrics.frechet_distance(*of(images.read_folder(out / "samples")),
                                        *of(images.load(str(folder), "train"))).item()
    result = json.loads((out / "metrics.json").read_text())
    assert result["fid"] == pytest.approx(expected, rel=1e-6) and result["fid_reference"] == 40
    assert "10 samples (EMA, sampler ancestral, grid t, 3 steps, clipped) against 40 images of" \
        in capsys.readouterr().out
    cached, = (out / "cache").glob("*.npz")
    assert "train" in cached.name and "3x8x8" in cached.name


def test_mistakes_in_sampling_are_one_sentence(trained, tmp_path):
    with pytest.raises(SystemExit, match="2,000 are too few"):
        sample.main(["--ckpt", str(trained), "--fid", "--num-samples", "2000", "--out", str(tmp_path)])
    assert not list(tmp_path.iterdir())
    with pytest.raises(SystemExit, match="cannot be mixed in one call"):
        points = tmp_path / "rings-eps-mse-s0"
        train.main(["--epochs", "1", "--batch-size", "25000", "--out", str(tmp_path), "--device", "cpu"])
        sample.main(["--ckpt", str(trained), str(points)])
    with pytest.raises(SystemExit, match="--fid is an option of images, and this run is on points"):
        sample.main(["--ckpt", str(points), "--fid"])


def test_table4_2(folder, tmp_path, monkeypatch):
    """Six runs of equally many steps; what the table says is what the runs say, without Inception and with it."""
    for at_hand in False, True:
        table4_2_is_what_the_runs_say(folder, tmp_path, monkeypatch, at_hand)


def table4_2_is_what_the_runs_say(folder, tmp_path, monkeypatch, at_hand):
    monkeypatch.setattr(reproduce_thesis, "IMAGE_STEPS", 2)
    monkeypatch.setattr(metrics, "downloaded_weights", lambda: folder if at_hand else folder / "missing")
    monkeypatch.setattr(metrics, "enough_images", lambda *args: None)
    monkeypatch.setattr(metrics, "inception", lambda weights, device: Features())
    calls, original = [], train.main
    monkeypatch.setattr(train, "main", lambda argv: calls.append(argv) or original(argv))
    args = reproduce.parse(["table4.2", "--data", str(folder), "--budget", "0.03", "--runs", str(tmp_path),
                            "--data-dir", str(tmp_path / "data"), "--device", "cpu", *SMALL[:-2]])
    args.num_samples = 40                                             # fewer than the command line takes
    reproduce.make("table4.2", args)
    text = (tmp_path / "results/thesis/table4.2.md").read_text()
    cells = {row.split("|")[1].strip(): [cell.strip() for cell in row.split("|")[2:-1]] for row in text.splitlines()
             if row.startswith("|")}
    root, steps = tmp_path / "table4.2-squares-0.03-minutes", set()
    for target, thesis in {"x": ("0.05", "0.09", "16.96", "13.54"), "eps": ("0.06", "0.84", "13.75", "24.26"),
                           "v": ("0.12", "0.86", "18.24", "18.18")}.items():
        mse, nelbo = (root / f"squares-{target}-{loss}-s0" for loss in ("mse", "nelbo"))
        last, also = history(mse)[-1], history(nelbo)[-1]
        steps |= {last["step"], also["step"]}
        numbers = [last["test_mse"], also["test_nelbo_stable"], last["test_nelbo"], also["test_nelbo"]]
        fids = [f"{json.loads((path / 'metrics.json').read_text())['fid']:.2f}" if at_hand else "-"
                for path in (mse, nelbo)]
        mse, stable, exact, exact_too = (f"{number:.4f}" for number in numbers)
        assert cells[target] == [thesis[0], mse, thesis[1], stable, exact, exact_too,
                                 thesis[2], fids[0], thesis[3], fids[1]]
    (argv,), minutes = calls, calls[0].index("--minutes") + 1
    assert float(argv[minutes]) == pytest.approx(0.03 / 6)
    assert len(steps) == 1 and f"{steps.pop():,} steps of 8 images" in text
    assert ("No FID" in text) == (not at_hand) \
        and "`python reproduce.py table4.2 --data" in text and "--channels 8" in text


def test_only_table4_2_takes_further_options(capsys):
    with pytest.raises(SystemExit, match="2"):
        reproduce.main(["fig3.2", "--channels", "8"])
    assert "unrecognized arguments: --channels 8" in capsys.readouterr().err


@pytest.mark.parametrize("option", [["--loss", "mse"], ["--minutes", "5"], ["--seed=3"], ["--overwrite"],
                                    ["--min", "3"]])
def test_table4_2_refuses_what_it_sets_itself(option, capsys):
    with pytest.raises(SystemExit, match="2"):
        reproduce.main(["table4.2", *option])
    assert f"{option[0]} is set by table4.2 itself - leave it out" in capsys.readouterr().err
    reproduce.parse(["table4.2", "--lr", "0.1", "--schedule", "ve", "--layers", "1"])


def test_with_log_snr_uniform_loss_gradient_and_loss_over_t_have_the_importance(folder, tmp_path, monkeypatch):
    """One batch of 16: losses.loss times 1 / (p(t) (1 - 2 t_min)) by autograd; bins of [0.1, 0.9] one by one."""
    gradients, original = [], torch.nn.utils.clip_grad_norm_

    def clip(parameters, norm):
        parameters = list(parameters)
        gradients.append([p.grad.clone() for p in parameters])
        return original(parameters, norm)
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", clip)
    train.main(command(folder, tmp_path, "--minutes", "1e-6", "--batch-size", "16", "--t-density", "logsnr", "--t-min",
                       "0.1", "--loss", "nelbo", "--schedule", "linear"))
    config = run.load(only(tmp_path))["config"]
    torch.manual_seed(0)
    model = kind_images.build_model(config)
    x, t, eps, _ = train_images.batch(images.load(str(folder), "train"), 0, config)
    logsnr = lambda t: -torch.log(torch.expm1(0.1 * t + 9.95 * t**2))
    times = t.double().requires_grad_()
    slope, = torch.autograd.grad(logsnr(times).sum(), times)
    first, last = logsnr(torch.tensor([0.9, 0.1], dtype=torch.float64))
    importance = ((last - first) / (-slope * 0.8)).float()
    unweighted = losses.loss(model, x, t, eps, target="v", loss="nelbo", schedule=ddpm.SCHEDULES["linear"])
    loss = (unweighted * importance).mean()
    assert abs(loss / unweighted.mean() - 1) > 0.02
    assert_close(gradients[0], list(torch.autograd.grad(loss, list(model.parameters()))), rtol=1e-3, atol=1e-5)
    entry, = history(only(tmp_path))
    assert entry["train_loss"] == pytest.approx(loss.item(), rel=1e-4)
    expected = 20 * [None]
    for i in range(20):
        inside = ((0.1 + 0.04 * i < t) & (t < 0.14 + 0.04 * i)).tolist()
        if any(inside):
            terms = [(v.item() * c.item(), c.item()) for v, c, here in zip(unweighted, importance, inside) if here]
            expected[i] = pytest.approx(sum(v for v, _ in terms) / sum(c for _, c in terms), rel=1e-3)
    assert entry["train_loss_over_t"] == expected and 2 < expected.count(None) < 15


def test_the_grid_at_the_end_of_training_and_the_clock_of_a_resumed_run(folder, tmp_path, monkeypatch):
    """A grid is drawn at the last step, down to t = 0.001 though training goes to 1e-6; seconds go on."""
    seen, original = [], samplers.sample
    monkeypatch.setattr(samplers, "sample", lambda *args, **how: seen.append(how["t_min"]) or original(*args, **how))
    argv = command(folder, tmp_path, "--epochs", "1", "--t-min", "1e-6", "--test-every", "5")
    train.main(argv)
    assert [path.name for path in only(tmp_path).glob("*.png")] == ["samples-5.png"] and seen == [1e-3]
    state = run.load(only(tmp_path))
    state["seconds"] = state["history"][0]["seconds"] = 1000.0
    run.save(only(tmp_path) / "ckpt.pt", state)
    train.main([*argv, "--epochs", "2", "--resume"])
    resumed = run.load(only(tmp_path))
    assert resumed["step"] == 10 and 1000 < resumed["history"][1]["seconds"] < 1100 and 1000 < resumed["seconds"] < 1100


def test_losses_of_a_run_are_on_its_own_range_of_t_and_with_its_stabiliser():
    """The score with d = 0.2 for t in [0.1, 0.9]: y = -sigma eps / (sigma^2 + d), the exact loss is that of eps_hat."""
    config = dict(target="s", loss="nelbo", schedule="cosine", t_min=0.1, stabiliser=0.2)
    data = torch.randint(0, 256, (200, 1, 4, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    seen = []
    result = kind_images.test(lambda z, t: seen.append((z, t)) or 0 * z, data, config, torch.device("cpu"))
    (z, t), = seen
    assert 0.1 <= t.min() < 0.105 and 0.895 < t.max() <= 0.9
    alpha, sigma = torch.cos(torch.pi / 2 * t)[:, None, None, None], torch.sin(torch.pi / 2 * t)[:, None, None, None]
    order = torch.randperm(200, generator=run.generator("cpu", "test noise"))
    eps = (z - alpha * (data[order].float() / 127.5 - 1)) / sigma
    errors = (sigma * eps / (sigma**2 + 0.2)).square().mean((1, 2, 3))
    exact = torch.pi / torch.sin(torch.pi * t) * eps.square().mean((1, 2, 3))             # -1/2 dlogsnr/dt, Eq. (3.26)
    assert result["test_mse"] == pytest.approx(errors.mean().item(), rel=1e-4)
    assert result["test_nelbo"] == pytest.approx(exact.mean().item(), rel=1e-4) == result["test_loss"]


def test_the_network_of_images_that_are_not_square_attends_by_their_longer_side():
    """8 x 16 with attention at 16: the first block, and not the second."""
    torch.manual_seed(0)
    config = dict(shape=[3, 8, 16], schedule="cosine", channels=8, channel_mult=[1, 2], layers=1, mid_blocks=1,
                  attention=[16], skips="layer", dropout=0.0)
    model = kind_images.build_model(config)
    assert [isinstance(block.layers[0].attention, unet.Attention) for block in model.down] == [True, False]
    assert model(torch.zeros(2, 3, 8, 16), torch.full((2,), 0.5)).shape == (2, 3, 8, 16)


def test_the_statistics_of_the_data_have_a_file_for_what_changes_them(folder, tmp_path, monkeypatch):
    """All that changes what Inception sees, or Inception, changes the file's name; a run's loss does not."""
    monkeypatch.setattr(metrics, "reference_statistics", lambda path, *rest: path)
    shutil.copytree(folder, tmp_path / "squares")
    data, network = tmp_path / "squares", Features()
    config = dict(data=str(data), shape=[3, 8, 8], image_size=None, skip_corrupt=False, loss="mse", images={})

    def path(*options, network=network, **changed):
        return kind_images.reference(config | changed, network, sample.parse(["--data-dir", str(tmp_path), *options]))
    test, small, other = ["--fid-split", "test"], dict(shape=[3, 6, 6], image_size=6), Features()
    other.scale.data += 1e-6                               # another file of weights, whatever its name
    paths = [path(), path(*test), path(network=other), path(skip_corrupt=True), path(**small), path(shape=[3, 6, 8]),
             path(data=str(folder)), path(data="cifar10"), path(*test, data="cifar10"), path(data="cifar10", **small),
             path(data="fashion_mnist"), path(data="cifar10", network=other)]
    assert len(set(paths)) == 12 and {place.parent for place in paths} == {tmp_path}
    assert path(loss="nelbo") == path(network=Features()) == paths[0]
    monkeypatch.chdir(tmp_path)
    assert path(data="squares") == paths[0]                # one folder, however it is written
    one = next(data.rglob("*.png"))
    os.utime(one, ns=(1, 1))                               # written anew
    touched = path()
    one.rename(one.with_name("renamed.png"))
    renamed = path()
    (data / "more.png").write_bytes(b"1")
    more = path()
    assert len({paths[0], touched, renamed, more}) == 4
    config.pop("images")                                   # the old split
    assert path() != more


def test_the_digest_is_of_every_byte():
    x = torch.arange(6.0)
    assert checkpoints.digest(x) == checkpoints.digest(x.clone()) != checkpoints.digest(x, x)
    assert len({checkpoints.digest(x.index_add(0, torch.tensor([i]), torch.tensor([1e-6]))) for i in (0, 1, 2)}) == 3
    assert checkpoints.digest(torch.tensor(0)) != checkpoints.digest(torch.tensor(1))


def test_points_and_images_have_the_same_names_in_their_history(trained, tmp_path):
    train.main(["--epochs", "1", "--batch-size", "25000", "--width", "8", "--out", str(tmp_path), "--device", "cpu"])
    points, last = history(only(tmp_path))[-1], history(trained)[-1]
    assert {key for key in points if not key.startswith("optimum")} <= last.keys()
    assert last.keys() - points.keys() >= {"gradient_norm", "test_mse", "test_nelbo_stable"}
    assert len(points["train_loss_over_t"]) == len(last["train_loss_over_t"])
