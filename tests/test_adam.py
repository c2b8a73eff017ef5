"""Averaged weights of points: the recursion typed again, and that tests, samples, stacks and resumed runs have them."""
import copy

import pytest
import torch
from torch.testing import assert_close

import adam
import kind_points
import optimum
import run
import train
import train_points

FAST = ["--data", "clusters", "--target", "x", "v", "--epochs", "2", "--batch-size", "5000", "--width", "8", "--device",
        "cpu", "--ema", "0.8"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Two networks in one stack, and the weights after each step: (folder, first weights, [weights])."""
    out, steps, patch, original = tmp_path_factory.mktemp("ema"), [], pytest.MonkeyPatch(), adam.average

    def spy(ema, model, decay, step):
        steps.append(([p.detach().clone() for p in ema.parameters()], [p.detach().clone() for p in model.parameters()]))
        assert step == len(steps)
        original(ema, model, decay, step)
    patch.setattr(train_points, "average", spy)
    train.main([*FAST, "--out", str(out)])
    patch.undo()
    return out, steps[0][0], [weights for _, weights in steps]


def member(weights, m):
    return [w[m:m + 1] for w in weights]


def test_they_are_the_recursion_typed_again(trained):
    """From the first weights on; the decay is 2 / 11 after the first step, 0.8 from the 35th on."""
    out, first, weights = trained
    assert len(weights) == 20 and adam.ema_decay(0.8, 1) == 2 / 11 and adam.ema_decay(0.8, 35) == 0.8
    ema = [w.double() for w in first]
    for n, after in enumerate(weights, 1):
        decay = min(0.8, (1 + n) / (10 + n))
        ema = [decay * e + (1 - decay) * w.double() for e, w in zip(ema, after)]
    for m, name in enumerate(["clusters-x-mse-s0", "clusters-v-mse-s0"]):
        state = run.load(out / name)
        assert_close(list(state["ema"].values()), [e.float() for e in member(ema, m)], rtol=1e-5, atol=1e-6)
        assert_close(list(state["model"].values()), member(weights[-1], m), rtol=0, atol=0)
    torch.manual_seed(0)
    assert_close(list(kind_points.build_model(state["config"]).state_dict().values()), member(first, 1))


def test_they_are_what_is_tested_and_opened(trained):
    one = run.open(trained[0] / "clusters-v-mse-s0")
    state = one.checkpoint
    assert all(torch.equal(p, q) for p, q in zip(one.model().state_dict().values(), state["ema"].values()))
    test, _ = optimum.ready([one.config], torch.device("cpu"))
    model = kind_points.build_model(one.config)
    for part, same in ("ema", True), ("model", False):
        model.load_state_dict(state[part])
        assert (abs(test(model)[0, 0].item() - one.history[-1]["test_loss"]) < 1e-6) == same


def test_a_member_is_the_network_trained_alone_and_a_killed_run_goes_on(trained, tmp_path, interrupted):
    alone = [*FAST[:2], "--target", "v", *FAST[5:], "--out", str(tmp_path)]
    interrupted(lambda: train.main(alone))
    name = "clusters-v-mse-s0"
    assert len(run.load(tmp_path / name)["history"]) == 1
    train.main([*alone, "--resume"])
    a, b = run.load(trained[0] / name), run.load(tmp_path / name)
    for part in "model", "ema":
        assert_close(a[part], b[part], rtol=1e-4, atol=1e-6)                 # what fused Adam rounds otherwise


def test_a_checkpoint_without_them_is_refused_and_runs_without_them_have_none(trained, tmp_path):
    state = copy.copy(run.load(trained[0] / "clusters-v-mse-s0"))
    del state["ema"]
    (tmp_path / "a").mkdir()
    run.save(tmp_path / "a/ckpt.pt", {key: value for key, value in state.items() if key != "format"})
    with pytest.raises(SystemExit, match="its ema is not that of a run on points"):
        run.open(tmp_path / "a")
    train.main([*FAST[:2], "--target", "v", "--epochs", "1", *FAST[7:-2], "--out", str(tmp_path)])
    assert "ema" not in run.load(tmp_path / "clusters-v-mse-s0")
