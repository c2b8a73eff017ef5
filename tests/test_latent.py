"""An autoencoder and its latents: the bound in closed form, the loop typed again, runs on latents, mistakes."""
import json
import math
import shutil
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_train_images import SMALL, only
from torch.distributions import Normal, kl_divergence
from torch.testing import assert_close

import classifier
import images
import importance
import kind_images
import latent
import latent_data
import likelihood
import run
import sample
import samplers
import settings
import train
import train_images
import unet
import variance
from ddpm import SCHEDULES
from decoders import discretised, gaussian

F64 = torch.float64


# The autoencoder

def test_kl_is_that_of_torch_and_the_loss_the_bound_without_a_constant():
    """A linear Gaussian model with its exact posterior: the bound is log p(x). It is quadratic in eps: +-1 are enough.
    """
    g = torch.Generator().manual_seed(0)
    mean, log_var = torch.randn(2, 5, 3, 2, generator=g, dtype=F64)
    q = Normal(mean, (log_var / 2).exp())
    assert_close(latent.kl(mean, log_var), kl_divergence(q, Normal(0.0, 1.0)).sum((1, 2)))
    w, noise, x = 0.8, 0.3, torch.randn(6, 1, generator=g, dtype=F64)
    var = noise**2 / (w**2 + noise**2)                     # of z given x = w z + noise
    model = latent.Autoencoder(lambda x: torch.cat([w * x / (w**2 + noise**2), 0 * x + math.log(var)], 1),
                               lambda z: w * z, 1)
    found = sum(model.loss(x, torch.full_like(x, eps), noise) for eps in (-1, 1)) / 2
    assert_close(found + 0.5 * math.log(2 * math.pi * noise**2),
                 -Normal(0.0, torch.tensor(w**2 + noise**2, dtype=F64).sqrt()).log_prob(x)[:, 0])


def test_latents_are_standardised_by_channel_and_decoded_from_that():
    torch.manual_seed(0)
    model = latent.convolutional(1).double().requires_grad_(False)
    x = torch.randn(50, 1, 8, 12, dtype=F64)
    mean, log_var = model.posterior(x)
    assert mean.shape == log_var.shape == (50, 3, 2, 3) and model.decode(mean).shape == x.shape
    assert_close(torch.cat([mean, log_var], 1), model.encoder(x))
    assert_close(model.encode(x), mean)                    # before: mean 0 and std 1
    model.standardise(mean)
    z = model.encode(x)
    assert_close(z.mean((0, 2, 3)), torch.zeros(3, dtype=F64), rtol=0, atol=1e-12)
    assert_close(z.square().mean((0, 2, 3)), torch.ones(3, dtype=F64))
    assert_close(model.decode(z), model.decoder(mean))
    assert model.mean.unique().numel() == 3


def test_parts_are_the_whole():
    x = torch.randn(7, 2)
    assert_close(latent.in_parts(lambda part: part[:3] * 2, x, 3), 2 * x)


def test_reconstructions_end_at_black_and_white():
    model = latent.Autoencoder(lambda x: torch.cat([3 * x, x], 1), lambda z: z, 1)
    x = torch.tensor([0, 255, 102], dtype=torch.uint8).view(3, 1, 1, 1)                     # -1, 1, -0.2 become thrice
    x_hat, error = latent.reconstructions(model, x)
    assert x_hat.flatten().tolist() == [0, 255, 51] and error == pytest.approx(0.4**2 / 3)


# Its training

@pytest.fixture(scope="module", autouse=True)
def few():
    """Batches of 16."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(latent, "BATCH", 16)
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """44 colour images of 8 x 8, 40 to train on and 4 to test on."""
    root, g = tmp_path_factory.mktemp("data") / "squares", np.random.default_rng(0)
    for i in range(44):
        path = root / ("test" if i % 11 == 0 else "train") / f"{i:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        image = np.full((8, 8, 3), 40 * (i // 22), np.uint8)
        image[2:6, :4] = g.integers(100, 255, 3)
        Image.fromarray(image).save(path)
    return root


def command(folder, out, *more):
    return ["--data", str(folder), "--out", str(out), "--steps", "7", "--device", "cpu", *more]


@pytest.fixture(scope="module")
def made(folder, tmp_path_factory):
    """The folder of an autoencoder of 7 steps."""
    out = tmp_path_factory.mktemp("autoencoders")
    latent.main(command(folder, out))
    return out / "latent-squares"


def test_training_is_the_loop_typed_again(folder, made):
    torch.manual_seed(0)
    model, train, test = latent.convolutional(3), images.load(str(folder), "train"), images.load(str(folder), "test")
    optimizer = torch.optim.Adam(model.parameters(), 2e-3)
    for step in range(7):
        epoch, i = divmod(step, 2)                         # two batches of 16 out of 40
        order = torch.randperm(40, generator=run.generator("cpu", 0, "order", epoch))
        x = train[order[16 * i:16 * i + 16]].float() / 127.5 - 1
        eps = torch.randn(16, 3, 2, 2, generator=run.generator("cpu", 0, "noise", step))
        mean, log_var = model.encoder(x).chunk(2, 1)
        x_hat = model.decoder(mean + (log_var / 2).exp() * eps)
        divergence = kl_divergence(Normal(mean, (log_var / 2).exp()), Normal(0.0, 1.0)).sum((1, 2, 3))
        optimizer.zero_grad()
        (divergence - Normal(x_hat, 0.05).log_prob(x).sum((1, 2, 3))).mean().backward()
        optimizer.step()
    found, latents = latent.read(made), latent_data.load(made)
    for name, value in model.named_parameters():
        assert_close(found["model"][name], value.detach(), rtol=1e-3, atol=1e-4)
    assert found["step"] == 7 and found["seconds"] > 0
    raw = model.encoder(train.float() / 127.5 - 1).chunk(2, 1)[0].detach()
    assert_close(latents["train"], (raw - raw.mean((0, 2, 3), keepdim=True)) / raw.transpose(0, 1).flatten(1).std(
        1, correction=0)[:, None, None], rtol=1e-2, atol=1e-2)
    x_hat, error = latent.reconstructions(found["autoencoder"], test)
    with torch.no_grad():
        typed = found["autoencoder"].decoder(found["autoencoder"].encoder(test.float() / 127.5 - 1).chunk(2, 1)[0])
    assert error == pytest.approx((typed.clamp(-1, 1) - test.float() / 127.5 + 1).square().mean().item(), rel=1e-4)
    assert (x_hat.float() - (typed.clamp(-1, 1) + 1) * 127.5).abs().max() < 0.51
    assert_close(latents["test"], found["autoencoder"].encode(test.float() / 127.5 - 1), rtol=1e-4, atol=1e-4)
    shown = np.array(Image.open(made / "reconstructions.png"))
    assert (shown[2:10, 12:20] == test[1].permute(1, 2, 0).numpy()).all()                   # 2 wide borders
    assert (shown[12:20, 12:20] == x_hat[1].permute(1, 2, 0).numpy()).all()


def test_a_killed_autoencoder_goes_on_exactly(folder, made, tmp_path, monkeypatch):
    def counter(what, *args):
        done = []

        def add(n=1):
            done.append(1)
            if what == "training" and len(done) == 5:
                raise KeyboardInterrupt
        return add
    monkeypatch.setattr(latent, "SAVE_EVERY", 0)
    monkeypatch.setattr(latent.progress, "counter", counter)
    with pytest.raises(KeyboardInterrupt):
        latent.main(command(folder, tmp_path))
    monkeypatch.undo()
    killed = tmp_path / "latent-squares"
    assert latent.read(killed)["step"] == 4
    with pytest.raises(SystemExit, match="has no latents.pt - "):
        latent_data.load(killed)
    with pytest.raises(SystemExit, match="already - go on with --resume or start again with --overwrite"):
        latent.main(command(folder, tmp_path))
    with pytest.raises(SystemExit, match="of other images or settings - give another --out"):
        latent.main(command(folder, tmp_path, "--noise", "0.1", "--resume"))
    latent.main(command(folder, tmp_path, "--resume"))
    whole, resumed = latent.read(made), latent.read(killed)
    assert all(torch.equal(whole["model"][name], resumed["model"][name]) for name in whole["model"])
    assert latent_data.facts(killed) == latent_data.facts(made) and latent_data.facts(made)["count"] == 44


def test_minutes_stop_it_and_another_seed_is_another(folder, made, tmp_path):
    latent.main(command(folder, tmp_path, "--minutes", "1e-9", "--seed", "1"))
    other = latent.read(tmp_path / "latent-squares")
    assert other["step"] == 1 and not torch.equal(other["model"]["mean"], latent.read(made)["model"]["mean"])


def test_sides_are_multiples_of_4(folder, tmp_path):
    with pytest.raises(SystemExit, match="images of 3x6x6: their sides must be multiples of 4 - give, say, --image-si"):
        latent.main(command(folder, tmp_path, "--image-size", "6"))


# Runs on latents

@pytest.fixture(scope="module")
def trained(made, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs")
    train.main(["--data", str(made), "--target", "v", "--out", str(out), *SMALL, "--epochs", "1", "--test-every", "2"])
    return only(out)


def test_a_run_sees_standardised_latents_and_nothing_of_pixels(made, trained):
    config, latents = run.load(trained)["config"], latent_data.load(made)
    assert trained.name == "latent-squares-v-mse-s0" and config["shape"] == [3, 2, 2] and config["flip"] is False
    assert config["latents"] == dict(count=44, digest=latent.digest(latent.read(made)["autoencoder"]))
    assert not {"images", "points"} & config.keys() and settings.fault(config) is None
    for split in "train", "test":
        assert torch.equal(kind_images.load(config, split), latents[split])
    order = torch.randperm(40, generator=run.generator("cpu", 0, "order", 0))
    x, *_ = train_images.batch(latents["train"], 1, config)
    assert_close(x, latents["train"][order[8:16]], rtol=0, atol=0)     # no levels, not mirrored
    assert len(latents["train"]) == 40 and x.abs().max() > 1


def test_samples_are_decoded_and_not_clipped(made, trained, tmp_path):
    argv = ["--ckpt", str(trained), "--steps", "3", "--sampler", "ddim", "--num-samples", "4", "--batch-size", "4",
            "--device", "cpu"]
    sample.main([*argv, "--out", str(tmp_path), "--movie"])
    one, model = run.open(trained), latent.read(made)["autoencoder"]
    z = samplers.sample(one.model(), (4, 3, 2, 2), 3, sampler="ddim", target="v", schedule=SCHEDULES["cosine"],
                        generator=run.generator("cpu", 0, "sample", 0))
    assert z.abs().max() > 1
    levels = ((model.decoder(z * model.std + model.mean).clamp(-1, 1) + 1) * 127.5).detach()
    got = torch.stack([torch.tensor(np.array(Image.open(tmp_path / f"samples/{i:05d}.png"))) for i in range(4)])
    assert (got.permute(0, 3, 1, 2).float() - levels).abs().max() < 0.6
    assert json.loads((tmp_path / "samples/settings.json").read_text())["clip"] is False
    with Image.open(tmp_path / "samples.gif") as film:     # of images as they are decoded: 2 x 2 with borders of 2
        assert film.size == (42, 12)


def test_distances_are_to_the_images(folder, trained, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(kind_images.metrics, "enough_images", lambda *args: None)
    monkeypatch.setattr(kind_images.metrics, "inception", lambda *args: None)
    monkeypatch.setattr(kind_images, "reference", lambda config, *args: seen.append(config) or (0, 0, 40))
    monkeypatch.setattr(kind_images, "measure", lambda *args: 1.5)
    monkeypatch.setattr(classifier, "of_run", lambda path, config, device: seen.append(config) or (None, {}))
    monkeypatch.setattr(classifier, "real", lambda model, config, *args: seen.append(config) or ())
    monkeypatch.setattr(classifier, "measure", lambda *args: {})
    monkeypatch.setattr(classifier, "show", lambda result: None)
    sample.main(["--ckpt", str(trained), "--steps", "2", "--num-samples", "2", "--batch-size", "2", "--fid",
                 "--metrics", "--out", str(tmp_path), "--device", "cpu"])
    assert len(seen) == 3 and all(config["data"] == str(folder) and config["shape"] == [3, 8, 8] for config in seen)
    assert kind_images.load(seen[0], "test").shape == (4, 3, 8, 8)


def test_likelihood_is_a_density_of_the_latents(trained, tmp_path, capsys):
    argv = ["--ckpt", str(trained), "--num", "4", "--draws", "2", "--num-ode", "2", "--ode-steps", "2", "--device",
            "cpu", "--out", str(tmp_path)]
    likelihood.main(argv)
    found, out = json.loads(next(tmp_path.glob("likelihood*.json")).read_text()), capsys.readouterr().out
    log_var = 2 * math.log(math.tan(math.pi / 2 * 1e-3))   # of z_0 / alpha given x
    assert found["reconstruction"][0] == pytest.approx(12 / 2 * (math.log(2 * math.pi) + log_var + 1), rel=1e-4)
    assert found["dequantisation"] is None and "(a density of latents, standardised)" in out
    assert "uniform noise" not in out
    one = run.open(trained)
    x = kind_images.test_examples(one.config, 4, torch.device("cpu"))
    g = run.generator("cpu", 0, "likelihood")
    terms, _ = likelihood.evaluate(one.model(), x, one.config, 2, num_ode=2, ode_steps=2, probes=1, generator=g)
    assert found["exact"][0] == pytest.approx(terms["exact"].mean().item(), rel=1e-5)
    with pytest.raises(SystemExit, match="latents are no grey levels - leave out --dequantisation"):
        likelihood.main([*argv, "--dequantisation", "uniform"])


def test_decoders_of_latents_are_gaussian(trained, monkeypatch):
    seen = []
    monkeypatch.setattr(importance, "log_weights",
                        lambda *args, **how: seen.append(how["decoder"]) or torch.zeros(2, 4))
    one = run.open(trained)
    importance.of_run(one, kind_images.load(one.config), 2, 3)
    monkeypatch.setattr(variance, "loss", lambda *args: seen.append(args[-1]))
    config = dict(loss="vlb", target="v", schedule="ddpm", timesteps=9, t_min=0.0, stabiliser=0.0, variance="range",
                  vlb_weight=1.0)
    for more in {"latents": {}}, {}:
        kind_images.loss(None, None, torch.tensor([0.5]), None, None, config | more)
    assert seen == [gaussian, gaussian, discretised]


# Mistakes

@pytest.fixture
def copies(made, trained, tmp_path, monkeypatch):
    """Both folders in a place of their own, where the run's config has the path of the latents."""
    shutil.copytree(made, tmp_path / "latent-squares")
    shutil.copytree(trained, tmp_path / trained.name)
    state = run.load(tmp_path / trained.name)
    state["config"]["data"] = "latent-squares"
    (tmp_path / trained.name / "config.json").unlink()
    run.save(tmp_path / trained.name / "ckpt.pt", state)
    monkeypatch.chdir(tmp_path)
    return trained.name


def uses(name):
    """Every way to use a run on latents: a command that must end in one sentence."""
    return [(train.main, ["--data", "latent-squares", "--target", "v", "--out", ".", *SMALL, "--resume"]),
            (sample.main, ["--ckpt", name, "--steps", "2", "--device", "cpu"]),
            (likelihood.main, ["--ckpt", name, "--device", "cpu"])]


def test_latents_without_their_autoencoder(copies):
    Path("latent-squares/autoencoder.pt").unlink()
    for main, argv in uses(copies):
        with pytest.raises(SystemExit, match="^latent-squares has no autoencoder.pt - bring it back, or make another"):
            main(argv)


def test_latents_of_another_autoencoder(folder, copies):
    latent.main(command(folder, ".", "--seed", "1", "--overwrite"))
    for main, argv in uses(copies):
        with pytest.raises(SystemExit, match=f"^{copies} was trained on latents of another autoencoder than latent-sq"):
            main(argv)


def test_latents_and_autoencoder_that_do_not_belong_together(folder, made, copies):
    latent.main(command(folder, ".", "--seed", "1", "--overwrite"))
    shutil.copy(made / "latents.pt", "latent-squares")
    with pytest.raises(SystemExit, match="latents.pt is not of the autoencoder.pt beside it - make it anew"):
        train.main(uses(copies)[0][1])


@pytest.mark.parametrize("content", [b"", b"x" * 100, "foreign"])
@pytest.mark.parametrize("name", ["autoencoder.pt", "latents.pt"])
def test_damaged_files(copies, tmp_path, name, content):
    path = tmp_path / "latent-squares" / name
    if content == "foreign":
        torch.save({"format": 7, "config": {"shape": [3, 8, 8]}, "model": {}, "digest": ""}, path)
    else:
        path.write_bytes(content)
    with pytest.raises(SystemExit, match=f"{name} is damaged or not of this project - bring it back, or make another"):
        latent_data.load("latent-squares")


@pytest.mark.parametrize("words, name", [(["--flip"], "flip"), (["--labels"], "labels"),
                                         (["--image-size", "8"], "image-size")])
def test_settings_of_images_alone(made, capsys, words, name):
    with pytest.raises(SystemExit) as error:
        train.parse(["--data", str(made), *words])
    assert error.value.code == 2 and f"--{name} is of images, and {made} has latents - leave it out" in \
        capsys.readouterr().err
    assert train.parse(["--data", str(made), "--no-flip"]).kind == "images"


def test_wrong_arguments_and_the_cost(capsys):
    with pytest.raises(SystemExit) as error:
        latent.main(["--resume", "--overwrite"])
    assert error.value.code == 2
    capsys.readouterr()
    latent.main([])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 6 and lines[1].split()[:7] == ["latents", "3", "x", "7", "x", "7", "147"]
    flop = unet.flop(unet.UNet(3, 7), (3, 7, 7))
    assert f" {flop / 1e9:.2f} GFLOP" in lines[1]


def test_a_run_on_latents_has_no_labels_and_is_not_told_to_train_with_them():
    for config, words in ({}, "leave out --label, or train with --labels"), ({"latents": {}}, "leave out --label"):
        with pytest.raises(ValueError) as error:
            sample.of_label(types.SimpleNamespace(config=config), 0, 1.0)
        assert str(error.value) == f"trained without labels - {words}"
