"""Muon: the polynomial of singular values by a decomposition, torch's own Muon and Adam, stacks and resumed runs."""
import copy

import pytest
import torch
from torch.testing import assert_close

import adam
import kind_points
import muon
import run
import settings
import train
import train_points
from mlp import MLP

FAST = ["--data", "clusters", "--target", "x", "v", "--epochs", "2", "--batch-size", "5000", "--width", "8", "--device",
        "cpu", "--optimizer", "muon"]


def test_orthogonal_is_a_polynomial_of_the_singular_values():
    """Three times 3.4445 s - 4.775 s^3 + 2.0315 s^5 of s over the norm of all, each matrix of a stack for itself."""
    m = torch.randn(6, 6, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    m[2:4] *= 1e-2
    U, s, V = torch.linalg.svd(m)
    s = s / s.square().sum(-1, keepdim=True).sqrt()
    large = s > 0.02
    for _ in range(3):
        s = 3.4445 * s - 4.775 * s**3 + 2.0315 * s**5
    assert_close(muon.orthogonal(m), U @ torch.diag_embed(s) @ V, rtol=1e-6, atol=1e-9)
    assert ((s - 1).abs()[large] < 0.33).all() and (s < 1.3).all() and large.sum() > 30
    assert muon.orthogonal(torch.zeros(1, 4, 4)).abs().max() == 0             # a network that learns nothing yet


def steps(optimizer, model, gradients):
    for i, gradient in enumerate(gradients):
        optimizer.param_groups[0]["lr"] = 1e-3 * (i + 1)
        for p, g in zip(model.parameters(), gradient):
            p.grad = g.clone()
        optimizer.step()


def test_a_step_is_torchs_muon_for_square_weights_and_adam_for_the_others():
    """torch's orthogonalises in bfloat16, of one matrix each."""
    torch.manual_seed(0)
    ours = MLP(width=16, members=1)
    theirs, mine = copy.deepcopy(ours), muon.Muon(list(ours.parameters()), 1e-3)
    before = copy.deepcopy(ours)
    gradients = [[torch.randn_like(p) for p in ours.parameters()] for _ in range(4)]
    steps(mine, ours, gradients)
    other = adam.Adam(list(theirs.parameters()), 1e-3)
    steps(other, theirs, gradients)
    square = 0
    for p, q, start, of in zip(ours.parameters(), theirs.parameters(), before.parameters(), zip(*gradients)):
        if p.shape != (1, 16, 16):
            assert_close(p, q, rtol=0, atol=0)
            continue
        single = torch.nn.Parameter(start[0].detach().clone())
        theirs_muon = torch.optim.Muon([single], lr=0.02, momentum=0.95, weight_decay=0.0, ns_steps=3)
        for i, g in enumerate(of):
            theirs_muon.param_groups[0]["lr"] = 0.02 * (i + 1)
            single.grad = g[0].clone()
            theirs_muon.step()
        moved, expected = p[0] - start[0], single - start[0]
        assert (moved - expected).norm() < 0.03 * expected.norm()
        square += 1
    assert square == 5


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    out = tmp_path_factory.mktemp("muon")
    train.main([*FAST, "--out", str(out)])
    return out


def test_a_member_is_the_network_trained_alone_and_a_killed_run_goes_on(trained, tmp_path, interrupted):
    alone = [*FAST[:2], "--target", "v", *FAST[5:], "--out", str(tmp_path)]

    def is_muon(optimizer):
        assert isinstance(optimizer, muon.Muon)
    interrupted(lambda: train.main(alone), is_muon)
    train.main([*alone, "--resume"])
    a, b = (run.load(folder / "clusters-v-mse-s0") for folder in (trained, tmp_path))
    assert a["config"]["optimizer"] == "muon" and len(b["history"]) == 2
    for part in "model", "optimizer":
        assert_close(a[part], b[part], rtol=1e-3, atol=1e-5)


def test_runs_of_before_have_adam(trained):
    config = dict(run.load(trained / "clusters-v-mse-s0")["config"])
    model = kind_points.build_model(config)
    assert isinstance(train_points.build_optimizer(model, config), muon.Muon)
    del config["optimizer"]
    assert type(train_points.build_optimizer(model, config)) is adam.Adam


def test_products_in_bf16_leave_the_weights_in_float32_and_change_them_a_little(trained, tmp_path):
    train.main([*FAST, "--precision", "bf16", "--out", str(tmp_path)])
    for name in "clusters-v-mse-s0", "clusters-x-mse-s0":
        a, b = run.load(trained / name), run.load(tmp_path / name)
        assert b["config"]["precision"] == "bf16" and a["config"]["precision"] == "fp32"
        assert all(w.dtype == torch.float32 for w in b["model"].values())
        assert_close(a["model"], b["model"], rtol=0, atol=0.1)
        assert any(not torch.equal(a["model"][key], b["model"][key]) for key in a["model"])
        losses = [state["history"][-1]["test_loss"] for state in (a, b)]
        assert losses[1] == pytest.approx(losses[0], rel=0.05)
    assert train.parse([*FAST, "--precision", "auto"]).precision == "fp32"


def test_points_of_a_run_in_bf16_are_drawn_in_bf16_and_those_of_another_are_not(trained, monkeypatch):
    one, seen = run.open(trained / "clusters-v-mse-s0"), []
    baddbmm = torch.baddbmm

    def spy(*words):
        out = baddbmm(*words)
        seen.append(out.dtype)
        return out
    monkeypatch.setattr(torch, "baddbmm", spy)
    drawn = {}
    for precision, dtype in ("fp32", torch.float32), ("bf16", torch.bfloat16):
        config = one.config | dict(precision=precision)
        of = run.Run(one.folder, one.checkpoint | dict(config=config))
        drawn[precision] = kind_points.draw(of, 4, num_samples=50)
        assert {*seen} == {dtype} and drawn[precision].dtype == torch.float32
        seen.clear()
        assert kind_points.in_chunks(of.model())(torch.randn(3, 2), torch.rand(3)).dtype == torch.float32
        assert {*seen} == {torch.float32}          # what judges a network is not told of the run
        with settings.autocast(config, torch.device("cpu")):
            assert of.model()(torch.randn(3, 2), torch.rand(3)).dtype == torch.float32     # that samplers go on with
        seen.clear()
    assert_close(drawn["fp32"], drawn["bf16"], rtol=0, atol=0.1)
    assert not torch.equal(drawn["fp32"], drawn["bf16"])
    old = {key: value for key, value in one.config.items() if key != "precision"}
    assert not settings.autocast(old, torch.device("cpu"))._enabled


@pytest.mark.parametrize("words", ["--energy --target s", "--loss exact --target s"])
def test_derivatives_are_not_trained_in_bf16(words, capsys):
    with pytest.raises(SystemExit) as error:
        train.parse(["--precision", "bf16", *words.split()])
    assert error.value.code == 2 and "--precision bf16 is too rough for derivatives" in capsys.readouterr().err


def test_autocast_is_for_bf16_alone(tmp_path, monkeypatch):
    calls, original = [], torch.autocast
    monkeypatch.setattr(torch, "autocast", lambda *words, **more: calls.append(words) or original(*words, **more))
    for precision, expected in ("fp32", []), ("bf16", [("cpu", torch.bfloat16)]):
        train.main([*FAST[:2], "--target", "v", *FAST[5:], "--precision", precision, "--out",
                    str(tmp_path / precision)])
        assert calls == expected
