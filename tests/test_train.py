"""Training end to end: files, paired draws, exact resume after a kill, and mistakes that end in one sentence."""
import copy
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import kind_points
import losses
import optimum
import run
import settings
import train
import train_points
import unet
from datasets2d import DATASETS
from ddpm import SCHEDULES
from targets import TARGETS

ROOT = Path(__file__).parent.parent
FAST = ["--data", "clusters", "--epochs", "2", "--batch-size", "5000", "--width", "16", "--device", "cpu"]


def fit(tmp_path, *extra):
    train.main([*FAST, "--out", str(tmp_path), *extra])


def command(tmp_path, *extra, script="train.py"):
    return [sys.executable, str(ROOT / script), *(FAST if script == "train.py" else []), "--out", str(tmp_path), *extra]


def weights(folder):
    return run.load(folder)["model"]


def assert_same(a, b):
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_a_run_writes_its_folder_and_learns(tmp_path, capsys, with_pictures):
    fit(tmp_path, "--epochs", "4", "--seed", "3")
    folder = tmp_path / "clusters-eps-mse-s3"
    assert sorted(p.name for p in folder.iterdir()) == ["ckpt.pt", "config.json", "loss.png", "metrics.jsonl"]
    config = json.loads((folder / "config.json").read_text())
    assert config == run.load(folder)["config"]
    assert (config["target"], config["seed"], config["t_min"], config["schedule"]) == ("eps", 3, 1e-3, "cosine")
    history = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [h["epoch"] for h in history] == [1, 2, 3, 4] and history[-1]["step"] == 40
    assert history[-1]["test_loss"] < history[0]["test_loss"]
    assert all(h["test_loss"] > h["optimum"] > 0 for h in history)
    assert (folder / "loss.png").read_bytes().startswith(b"\x89PNG")
    out = capsys.readouterr().out
    assert "epoch   4" in out and out.endswith(f"next: python sample.py --ckpt {folder} --steps 512\n")


def test_the_optimum_is_the_loss_of_the_exact_denoiser(tmp_path):
    """0.3512 is ERRATA.md's Bayes value for eps on the clusters, 0.8214 for v; t_min and 50,000 points make 2 %."""
    for target, expected in ("eps", 0.3512), ("v", 0.8214):
        fit(tmp_path, "--target", target, "--epochs", "1")
        optimum = run.load(tmp_path / f"clusters-{target}-mse-s0")["history"][0]["optimum"]
        assert abs(optimum / expected - 1) < 0.02


def test_draws_are_the_same_for_every_target_and_loss_and_differ_between_seeds(tmp_path, monkeypatch):
    drawn, original = [], losses.regression

    def spy(x, t, eps, **objective):
        drawn[-1].append((x, t, eps))
        return original(x, t, eps, **objective)
    monkeypatch.setattr(losses, "regression", spy)
    for extra in [["--target", "eps"], ["--target", "v", "--loss", "nelbo"], ["--seed", "1"]]:
        drawn.append([])
        fit(tmp_path, *extra)
    first, second, other = drawn
    epochs = lambda calls: [call for call in calls if not torch.equal(call[0], calls[0][0])]
    assert all(torch.equal(a, b) for calls in drawn for a, b in zip(calls[0], first[0]))     # one test set, noise fixed
    first, second, other = epochs(first), epochs(second), epochs(other)
    assert len(first) == len(second) == len(other) == 2
    assert all(torch.equal(a, b) for one, two in zip(first, second) for a, b in zip(one, two))
    assert not any(torch.equal(a, b) for a, b in zip(first[0], other[0]))
    assert sorted(first[0][0].tolist()) != sorted(other[0][0].tolist())    # a seed has its own training points
    assert not any(torch.equal(a, b) for a, b in zip(first[0], first[1]))  # epochs differ too
    assert sorted(first[0][0].tolist()) == sorted(first[1][0].tolist())    # in the order of the same points
    t = first[0][1].view(10, 5000).sort(1).values.diff(dim=1)
    assert (t - t.mean()).abs().max() < 1e-6                         # stratified in every batch


def test_same_initial_weights_for_every_target(tmp_path):
    for target, seed in ("eps", "0"), ("v", "0"), ("eps", "1"):
        fit(tmp_path, "--target", target, "--lr", "1e-12", "--seed", seed)
    first, second, other = (weights(tmp_path / f"clusters-{name}") for name in ("eps-mse-s0", "v-mse-s0", "eps-mse-s1"))
    torch.testing.assert_close(first, second, rtol=0, atol=1e-9)
    assert not torch.allclose(first["weights.3"], other["weights.3"], atol=1e-3)


HARD = ["--target", "s", "--loss", "nelbo", "--schedule", "ve", "--t-min", "0.05", "--stabiliser", "0.02"]


@pytest.fixture
def drawn(monkeypatch):
    """Every (x, t, eps) that training asks the regression of."""
    calls, original = [], losses.regression
    monkeypatch.setattr(losses, "regression", lambda *draws, **kw: calls.append(draws) or original(*draws, **kw))
    return calls


def test_an_epoch_is_the_loop_written_by_hand(drawn):
    """Steps of plain gradient descent on losses.loss, batch by batch: every setting of the config counts."""
    config, = settings.configs(train.parse([*FAST, *HARD, "--lr", "0.01"]))
    data = DATASETS["clusters"].sample(22_000, torch.Generator().manual_seed(0))
    model = kind_points.build_model(config)
    by_hand = copy.deepcopy(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    step_losses, over_t, norms = train_points.train_epoch(train_points.build_step(model, optimizer, 1), optimizer,
                                                          [data], 1, [config])
    (x, t, eps), expected, errors = drawn[0], [], []
    assert len(x) == 20_000 and t.min() >= 0.05 and t.max() <= 0.95
    for i in range(4):
        part = slice(5000 * i, 5000 * (i + 1))
        errors.append(losses.loss(by_hand, x[part], t[part], eps[part], target="s", loss="nelbo",
                                  schedule=SCHEDULES["ve"], stabiliser=0.02))
        value = errors[-1].mean()
        expected.append([value.item()])
        gradients = torch.autograd.grad(value, list(by_hand.parameters()))
        rate = 0.01 * 0.5 * (1 + math.cos(math.pi * (4 + i) / 8))
        with torch.no_grad():
            for p, gradient in zip(by_hand.parameters(), gradients):
                p -= rate * gradient
    torch.testing.assert_close(step_losses, torch.tensor(expected), rtol=1e-4, atol=1e-6)
    for p, q in zip(model.parameters(), by_hand.parameters()):
        torch.testing.assert_close(p, q, rtol=1e-3, atol=1e-6)
    errors, edges = torch.cat(errors), torch.linspace(0.05, 0.95, 21)
    expected = [errors[(low < t) & (t < high)].mean().item() for low, high in zip(edges, edges[1:])]
    torch.testing.assert_close(over_t, torch.tensor([expected]), rtol=1e-3, atol=1e-6)


def test_evaluation_is_the_loss_of_every_point_and_keeps_no_graph(tmp_path, drawn):
    fit(tmp_path, *HARD, "--epochs", "1")
    x, t, eps = drawn[0]
    assert torch.equal(x, kind_points.load(dict(data="clusters"))) and t.min() >= 0.05
    setting = dict(target="s", loss="nelbo", schedule=SCHEDULES["ve"], stabiliser=0.02)
    state = run.load(tmp_path / "clusters-s-nelbo-s0")
    model = kind_points.build_model(state["config"])
    model.load_state_dict(state["model"])
    best = DATASETS["clusters"].optimal_model("s", SCHEDULES["ve"], 0.02)
    for key, network in ("test_loss", model), ("optimum", best):
        value = losses.loss(network, x, t, eps, **setting).mean().item()
        assert abs(state["history"][0][key] / value - 1) < 1e-4
    grad = []
    batches = torch.ones(10, 4, 2)
    optimum.test(lambda z, t: grad.append(torch.is_grad_enabled()) or z, batches, batches[..., 0], batches,
                     torch.ones(2, 20, 3))
    assert grad == 10 * [False]


@pytest.mark.parametrize("t_min, low, schedule", [(1e-6, 1e-3, "cosine"), (0.05, 0.05, "cosine"),
                                                  (1e-6, 1e-3, "linear")])
def test_every_run_is_judged_by_the_exact_losses_on_one_range_of_t(t_min, low, schedule):
    """Their mean over the test points whose t is in the range, whatever range the run is trained on."""
    config = dict(data="rings", target="s", loss="mse", schedule=schedule, t_min=t_min, stabiliser=0.01)
    z, t, y, weights = optimum.test_batch(config)
    errors, inside = (z - y).double().square().mean(1), (t >= low) & (t <= 1 - low)
    assert bool((~inside).any()) == (t_min < low) and (weights[:, 0] == 1).all()
    for k, judge in (1, "rescaled"), (2, "nelbo"):
        expected = (losses.weight(judge, "s", t, SCHEDULES[schedule], 0.01) * errors)[inside].mean()
        torch.testing.assert_close((weights[:, k] * errors).mean(), expected, rtol=1e-5, atol=0)


def test_configs_are_all_combinations_each_once():
    args = train.parse(["--data", "rings", "waves", "rings", "--target", "x", "v", "x", "--loss", "mse", "mse",
                        "--seeds", "2", "--seed", "5"])
    assert [(c["data"], c["seed"], c["target"]) for c in settings.configs(args)] == [
        (data, seed, target) for data in ("rings", "waves") for seed in (5, 6) for target in ("x", "v")]


def test_defaults_are_the_documented_ones():
    args = vars(train.parse([]))
    shared = dict(target=["eps"], loss=["mse"], schedule="cosine", t_min=1e-3, t_density="uniform", stabiliser=0.0,
                  seed=0, seeds=1, device="auto", stack=None, out="runs", resume=False, overwrite=False,
                  timesteps=None, variance="small", vlb_weight=1e-3)
    images = dict(data_dir="data", image_size=None, skip_corrupt=False, preset="ddpm", channels=None,
                  channel_mult=None, layers=None, mid_blocks=None, attention=None, precision="auto", ema=0.9999,
                  warmup=1000, clip_norm=1.0, minutes=math.inf, train_steps=math.inf, test_every=2000,
                  grid_every=10_000, compile=None, dropout=0.0, flip=None)
    assert args == dict(kind="points", **shared, data=["rings"], epochs=100, batch_size=512,
                        lr=1e-3, width=128, sigma=None, energy=False, activation="relu",
                        labels=False, optimizer="adam", stable_targets=False,
                        **dict.fromkeys(images) | {"ema": 0.0, "precision": "fp32"})
    of_images = train.parse(["--data", "cifar10"])
    assert vars(of_images) == dict(kind="images", **images, **shared, data=["cifar10"], epochs=500, batch_size=128,
                                   lr=2e-4, width=None, sigma=None, energy=None, activation=None,
                                   labels=False, optimizer=None, stable_targets=None)
    assert settings.configs(of_images)[0].items() >= unet.PRESETS["ddpm"].items()
    changed, = settings.configs(train.parse(["--data", "cifar10", "--preset", "thesis", "--channels", "32",
                                             "--attention", "0"]))
    assert changed.items() >= (unet.PRESETS["thesis"] | dict(channels=32, attention=[0])).items()
    assert train.parse(["--batch-size", "50000"]).batch_size == 50_000


def test_history_says_what_happened(tmp_path, monkeypatch):
    original = train_points.train_epoch
    monkeypatch.setattr(train_points, "train_epoch",
                        lambda *args, **kw: original(*args, **kw) and (torch.tensor([[1.0], [3.0]]), torch.ones(1, 20),
                                                                    torch.tensor([[0.5], [0.25]])))
    fit(tmp_path, "--epochs", "1")
    folder = tmp_path / "clusters-eps-mse-s0"
    assert run.load(folder)["history"][0]["train_loss"] == 2
    assert run.load(folder)["history"][0]["gradient_norms"] == [0.5, 0.25]
    nan = torch.tensor([[1.0], [1.0], [float("nan")], [1.0]])
    epochs = []
    monkeypatch.setattr(train_points, "train_epoch",
                        lambda *args, **kw: epochs.append(args[3]) or (nan, torch.ones(1, 20), torch.ones(4, 1)))
    for file in "samples.npy", "samples.png", "metrics.json":
        (folder / file).write_text("of the old run")
    with pytest.raises(SystemExit, match="from step 2 on"):
        fit(tmp_path, "--overwrite")
    assert epochs == [0]                                              # and stops there
    assert [p.name for p in folder.iterdir()] == ["config.json"]      # --overwrite removed the old run
    monkeypatch.undo()
    original = optimum.test
    monkeypatch.setattr(optimum, "test", lambda *args, **kw: torch.tensor([[float("nan"), 1, 1]]))
    with pytest.raises(SystemExit, match="not finite from step 10 on"):
        fit(tmp_path)
    monkeypatch.setattr(optimum, "test", original)


def test_a_moved_run_resumes_elsewhere_and_its_clock_and_log_go_on(tmp_path):
    fit(tmp_path / "a", "--epochs", "2")
    folder = tmp_path / "a" / "clusters-eps-mse-s0"
    state = run.load(folder)
    assert state["config"].keys() == {"data", "target", "loss", "seed", "schedule", "t_min", "t_density", "stabiliser",
                                      "epochs", "batch_size", "lr", "width", "timesteps", "variance", "vlb_weight",
                                      "sigma", "energy", "activation", "labels", "ema",
                                      "optimizer", "precision", "stable_targets"}
    state["history"] = state["history"][:1]
    state["history"][0]["seconds"] = 1000.0
    run.save(folder / "ckpt.pt", state)                               # as if killed between metrics.jsonl and ckpt.pt
    (tmp_path / "a").rename(tmp_path / "b")
    fit(tmp_path / "b", "--epochs", "2", "--resume", "--device", "auto")
    folder = tmp_path / "b" / "clusters-eps-mse-s0"
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert lines == run.load(folder)["history"] and len(lines) == 2 and lines[1]["seconds"] > 1000


def test_learning_rate_decays_as_a_cosine(tmp_path, monkeypatch):
    rates, original = [], train_points.Adam.step

    def spy(self, *args, **kwargs):
        rates.append(self.param_groups[0]["lr"])
        return original(self, *args, **kwargs)
    monkeypatch.setattr(train_points.Adam, "step", spy)
    fit(tmp_path, "--lr", "0.002")
    assert len(rates) == 20 and rates[0] == 0.002
    assert abs(rates[10] - 0.001) < 1e-12 and abs(rates[5] - 0.001 * (1 + 0.5**0.5)) < 1e-12 and 0 < rates[19] < 2e-5


@pytest.mark.parametrize("schedule, target, loss", [("ve", "eps", "mse"), ("linear", "u", "nelbo"),
                                                    ("cosine", "s", "nelbo_stable"), ("cosine", "x", "rescaled")])
def test_other_schedules_targets_and_losses_train(tmp_path, schedule, target, loss):
    fit(tmp_path, "--schedule", schedule, "--target", target, "--loss", loss, "--stabiliser", "0.01")
    history = run.load(tmp_path / f"clusters-{target}-{loss}-s0")["history"]
    assert history[1]["test_loss"] < history[0]["test_loss"] < float("inf")


def test_resume_after_kill_9_gives_the_same_weights(tmp_path):
    """Killed twice, wherever it is, and resumed: bit for bit the run that was never killed."""
    extra = ["--epochs", "30", "--batch-size", "2000"]
    fit(tmp_path / "whole", *extra)
    folder = tmp_path / "killed" / "clusters-eps-mse-s0"
    for finished in 1, 8:
        process = subprocess.Popen(command(tmp_path / "killed", *extra, "--resume"), cwd=ROOT,
                                   stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while process.poll() is None:
            lines = (folder / "metrics.jsonl").read_text().count("\n") if (folder / "metrics.jsonl").exists() else 0
            if lines >= finished:
                os.kill(process.pid, signal.SIGKILL)
                process.wait()
            time.sleep(0.01)
    assert len(run.load(folder)["history"]) < 30
    fit(tmp_path / "killed", *extra, "--resume")
    whole, killed = run.load(tmp_path / "whole" / folder.name), run.load(folder)
    assert_same(whole["model"], killed["model"])
    for a, b in zip(whole["history"], killed["history"], strict=True):
        assert {k: v for k, v in a.items() if k != "seconds"} == {k: v for k, v in b.items() if k != "seconds"}


def test_a_run_is_never_silently_overwritten(tmp_path):
    fit(tmp_path)
    folder = tmp_path / "clusters-eps-mse-s0"
    before = (folder / "ckpt.pt").read_bytes()
    with pytest.raises(SystemExit, match="holds this run already - add --resume to go on with it or --overwrite"):
        fit(tmp_path)
    for extra in [["--width", "8"], ["--width", "8", "--resume"]]:
        with pytest.raises(SystemExit, match=r"other settings \(--width 16\) - keep both by giving this one another"):
            fit(tmp_path, *extra)
    assert (folder / "ckpt.pt").read_bytes() == before
    fit(tmp_path, "--resume")                                        # finished: says so again, changes nothing
    assert_same(weights(folder), torch.load(folder / "ckpt.pt", weights_only=True)["model"])
    for name in "likelihood.json", "likelihood-num-40.json", "mine.json":
        (folder / name).write_text("{}")
    fit(tmp_path, "--overwrite", "--width", "8")
    assert run.load(folder)["config"]["width"] == 8
    assert [path.name for path in sorted(folder.glob("*.json"))] == ["config.json", "mine.json"]


def test_nan_stops_the_run_and_names_the_step(tmp_path, monkeypatch):
    fit(tmp_path, "--epochs", "3")
    folder = tmp_path / "clusters-eps-mse-s0"
    before = (folder / "ckpt.pt").read_bytes()
    state = run.load(folder)
    state["history"] = state["history"][:2]                          # as if stopped after epoch 2
    state["model"]["biases.3"][:] = float("nan")
    run.save(folder / "ckpt.pt", state)
    with pytest.raises(SystemExit, match="not finite from step 20 on - lower --lr .* 2 finished epochs are kept"):
        fit(tmp_path, "--epochs", "3", "--resume")
    assert len(run.load(folder)["history"]) == 2 and before != (folder / "ckpt.pt").read_bytes()


def test_an_exploding_learning_rate_is_one_sentence(tmp_path):
    with pytest.raises(SystemExit, match="the loss is not finite from step"):
        fit(tmp_path, "--lr", "1e6")


def test_a_full_disk_while_saving_keeps_the_last_checkpoint(tmp_path):
    """/dev/full stands where the temporary file goes: the write itself fails with ENOSPC."""
    fit(tmp_path, "--epochs", "1")
    folder = tmp_path / "clusters-eps-mse-s0"
    before = (folder / "ckpt.pt").read_bytes()
    (folder / "ckpt.pt.tmp").symlink_to("/dev/full")
    with pytest.raises(SystemExit, match="cannot write .*ckpt.pt: No space left on device - what was there before"):
        run.save(folder / "ckpt.pt", run.load(folder))
    assert (folder / "ckpt.pt").read_bytes() == before and not (folder / "ckpt.pt.tmp").exists()


def test_overwrite_on_a_full_disk_loses_nothing(tmp_path):
    fit(tmp_path, "--epochs", "1")
    folder = tmp_path / "clusters-eps-mse-s0"
    before = (folder / "ckpt.pt").read_bytes()
    (folder / "config.json.tmp").symlink_to("/dev/full")
    with pytest.raises(SystemExit, match="cannot write .*config.json: No space left on device"):
        fit(tmp_path, "--epochs", "1", "--overwrite")
    assert (folder / "ckpt.pt").read_bytes() == before


def test_a_full_disk_in_the_middle_of_training(tmp_path):
    """No file may grow over 100 kB: config.json fits, the first checkpoint does not."""
    script = ("import resource, sys, train; resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000)); "
              "train.main(sys.argv[1:])")
    arguments = command(tmp_path, "--width", "128")[2:]
    result = subprocess.run([sys.executable, "-c", script, *arguments], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 1 and "Traceback" not in result.stderr
    assert "cannot write" in result.stderr and "ckpt.pt" in result.stderr
    names = sorted(p.name for p in (tmp_path / "clusters-eps-mse-s0").iterdir())
    assert names == ["config.json", "metrics.jsonl"]                 # no half-written checkpoint


def test_an_unwritable_folder_is_one_sentence(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit, match="2"):
        fit(tmp_path / "file")
    assert "file is a file, not a folder" in capsys.readouterr().err
    (tmp_path / "clusters-eps-mse-s0").write_text("")                # the run's own folder
    with pytest.raises(SystemExit, match="cannot write .*: .* - what was there before is kept; choose another folder"):
        fit(tmp_path)


@pytest.mark.parametrize("arguments, message", [
    (["--target", "foo"], "invalid choice: 'foo'"),
    (["--data", "cubes"], "unknown data 'cubes': choose from .*clusters"),
    (["--epochs", "0"], r"must be in \[1, 1000000\], got 0"), (["--epochs", "two"], "'two' is not a whole number"),
    (["--batch-size", "60000"], r"must be in \[1, 50000\]"), (["--t-min", "0.7"], "must be in"),
    (["--lr", "nan"], r"must be in \[1e-12, 1000000\], got nan"), (["--lr", "inf"], "must be in"),
    (["--lr", "0"], "must be in"), (["--data", "swis_roll"], "did you mean swiss_roll"),
    (["--seed", "-1"], "must be in"), (["--seed", "9" * 20], "must be in"),
    (["--resume", "--overwrite"], "choose one"), (["--target", "u", "--loss", "nelbo_stable"], "no weight")])
def test_wrong_arguments_exit_with_2_and_one_sentence(tmp_path, capsys, arguments, message):
    with pytest.raises(SystemExit) as stop:
        fit(tmp_path, *arguments)
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error and re.search(message, error)
    assert not list(tmp_path.iterdir())


def test_a_missing_device_is_one_sentence(tmp_path):
    if not torch.cuda.is_available():
        with pytest.raises(SystemExit, match="no cuda device .* try --device auto"):
            fit(tmp_path, "--device", "cuda")
    assert run.device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")


def test_generators_are_functions_of_the_whole_key():
    draw = lambda *key: torch.rand(3, generator=run.generator("cpu", *key)).tolist()
    keys = [(0, "noise", 0), (0, "noise", 1), (1, "noise", 0), (0, "order", 0), (2**32, "noise", 0), (0, "noise")]
    assert draw(*keys[0]) == draw(*keys[0])
    assert len({tuple(draw(*key)) for key in keys}) == len(keys)
    assert len({run.generator("cpu", 0, i).initial_seed() for i in range(1000)}) == 1000


def test_a_new_target_needs_its_row_only(tmp_path, monkeypatch):
    """As the README says; a weight that it lacks is one sentence."""
    monkeypatch.setitem(TARGETS, "f", lambda alpha, sigma, d: (-alpha, sigma))
    fit(tmp_path, "--target", "f")
    assert (tmp_path / "clusters-f-mse-s0" / "loss.png").exists()
    with pytest.raises(SystemExit) as stop:
        fit(tmp_path, "--target", "f", "--loss", "nelbo_stable")
    assert stop.value.code == 2


def test_a_new_loss_needs_its_function_only(tmp_path, monkeypatch):
    def debiased(target, alpha, sigma, det, dlogsnr):
        return sigma / alpha * (alpha / det)**2
    monkeypatch.setitem(losses.LOSSES, "debiased", debiased)
    fit(tmp_path, "--loss", "debiased")
    assert run.load(tmp_path / "clusters-eps-debiased-s0")["config"]["loss"] == "debiased"


def test_ctrl_c_is_exit_code_130_and_one_sentence(capsys):
    def main():
        raise KeyboardInterrupt
    with pytest.raises(SystemExit) as stop:
        run.script(main, "go on")
    assert stop.value.code == 130 and capsys.readouterr().err == "\nstopped - go on\n"


LOGSNR = {"cosine": lambda t: -2 * torch.log(torch.tan(math.pi / 2 * t)),
          "linear": lambda t: -torch.log(torch.expm1(0.1 * t + 9.95 * t**2))}      # alpha^2 = exp(-integral of beta)


def importance_of(t, t_min, name="cosine"):
    """1 / (p(t) (1 - 2 t_min)) with log-SNR uniform: by autograd, in float64."""
    logsnr, t = LOGSNR[name], t.double().requires_grad_()
    slope, = torch.autograd.grad(logsnr(t).sum(), t)
    first, last = logsnr(torch.tensor([1 - t_min, t_min], dtype=torch.float64))
    return ((last - first) / (-slope * (1 - 2 * t_min))).float()


@pytest.mark.parametrize("name", LOGSNR)
def test_with_log_snr_uniform_a_step_goes_down_the_gradient_of_the_loss_times_the_importance(name, drawn):
    config, = settings.configs(train.parse([*FAST, "--target", "v", "--loss", "nelbo", "--t-min", "0.02", "--t-density",
                                            "logsnr", "--lr", "0.01", "--schedule", name]))
    torch.manual_seed(0)
    model = kind_points.build_model(config)
    by_hand, optimizer = copy.deepcopy(model), torch.optim.SGD(model.parameters(), lr=1.0)
    data = DATASETS["clusters"].sample(5000, torch.Generator().manual_seed(0))
    step = train_points.build_step(model, optimizer, 1)
    step_losses, *_ = train_points.train_epoch(step, optimizer, [data], 0, [config])
    (x, t, eps), = drawn
    unweighted = losses.loss(by_hand, x, t, eps, target="v", loss="nelbo", schedule=SCHEDULES[name])
    values = unweighted * importance_of(t, 0.02, name)
    assert abs(values.mean() / unweighted.mean() - 1) > 0.2
    torch.testing.assert_close(step_losses, values.mean().detach()[None, None], rtol=1e-4, atol=0)
    gradients = torch.autograd.grad(values.mean(), list(by_hand.parameters()))
    for p, q, gradient in zip(model.parameters(), by_hand.parameters(), gradients):
        torch.testing.assert_close(p - q, -0.01 * gradient, rtol=1e-3, atol=1e-6)


def test_the_loss_over_t_is_that_of_t_uniform_whatever_the_density_in_training(drawn):
    """At a rate of 0, so that it is one network: each bin within 4.5 of its standard errors, and those are small."""
    config, = settings.configs(train.parse([*FAST, "--target", "v", "--t-density", "logsnr", "--lr", "1e-12"]))
    torch.manual_seed(0)
    model, data = kind_points.build_model(config), kind_points.load(config, "train")
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    step = train_points.build_step(model, optimizer, 1)
    _, over_t, _ = train_points.train_epoch(step, optimizer, [data], 0, [config])
    k = lambda t: ((t - 0.001) / 0.998 * 20).long().clamp(0, 19)
    t, eps = losses.sample_t((50_000,), generator=torch.Generator().manual_seed(1)), torch.randn(50_000, 2)
    importance = importance_of(drawn[0][1], 0.001)
    with torch.no_grad():
        errors = losses.loss(model, data, t, eps, target="v", loss="mse", schedule=SCHEDULES["cosine"])
        weighted = losses.loss(model, *drawn[0], target="v", loss="mse", schedule=SCHEDULES["cosine"]) * importance
    for i in range(20):
        uniform, here = errors[k(t) == i], k(drawn[0][1]) == i
        terms, counts = weighted[here], importance[here]               # the loss of a bin is the ratio of their means
        of_ratio = (terms - over_t[0, i] * counts).std() / counts.mean() / len(counts)**0.5
        error = (uniform.var() / len(uniform) + of_ratio**2).sqrt()
        assert abs(over_t[0, i] - uniform.mean()) < 4.5 * error < 0.25 * uniform.mean()
