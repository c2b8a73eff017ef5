"""A stack: its members are the networks that training and sampling them alone give."""
import contextlib
import copy
import itertools
import time
import types

import numpy as np
import pytest
import torch
from torch.testing import assert_close

import kind_points
import run
import sample
import settings
import stack
import train
import train_points
from mlp import MLP

FAST = ["--epochs", "3", "--batch-size", "5000", "--width", "16", "--device", "cpu"]
STACK = ["--data", "clusters", "rings", "--target", "x", "s", "--loss", "mse", "nelbo", "--seeds", "2",
         "--stabiliser", "0.01"]


def assert_same_run(a, b):
    a, b = run.load(a), run.load(b)
    assert a["config"] == b["config"]
    leaves = lambda state: [leaf for value in state.values()
                            for leaf in (leaves(value) if isinstance(value, dict) else [value])]
    for part in "model", "optimizer":
        assert len(leaves(a[part])) == len(leaves(b[part])) > 0
        for p, q in zip(leaves(a[part]), leaves(b[part])):
            assert_close(p, q, rtol=1e-4, atol=1e-6)                 # what fused Adam rounds otherwise
    for p, q in zip(a["history"], b["history"], strict=True):
        assert p.keys() == q.keys()
        for key in p.keys() - {"seconds"}:
            assert p[key] == pytest.approx(q[key], rel=1e-4)


@pytest.fixture(scope="module")
def stacked(tmp_path_factory):
    """16 runs in stacks of at most 5."""
    out = tmp_path_factory.mktemp("stacked")
    train.main([*STACK, *FAST, "--stack", "5", "--out", str(out)])
    return out


@pytest.mark.parametrize("data, target, loss, seed", [("clusters", "x", "mse", 0), ("rings", "s", "nelbo", 1),
                                                      ("rings", "x", "nelbo", 0), ("clusters", "s", "mse", 1)])
def test_a_member_is_the_network_trained_alone(stacked, tmp_path, data, target, loss, seed):
    train.main(["--data", data, "--target", target, "--loss", loss, "--seed", str(seed), "--stabiliser", "0.01", *FAST,
                "--out", str(tmp_path)])
    name = f"{data}-{target}-{loss}-s{seed}"
    assert_same_run(stacked / name, tmp_path / name)
    assert len(list(stacked.iterdir())) == 16
    assert sorted(p.name for p in (stacked / name).iterdir()) == ["ckpt.pt", "config.json", "loss.png", "metrics.jsonl"]


@pytest.mark.parametrize("width, members", [(16, 5), (128, 8)])
def test_predictions_and_steps_of_plain_gradient_descent_are_the_same_bits(width, members):
    """All but Adam, whose fused kernel rounds the end of a tensor otherwise."""
    names = settings.configs(train.parse([*STACK, *FAST, "--width", str(width)]))[:members]
    torch.manual_seed(0)
    alone = [kind_points.build_model(config) for config in names]
    together = kind_points.build_model(names[0], members)
    together.load_state_dict(stack.join([model.state_dict() for model in alone]))
    points = {(data, seed): torch.randn(2048, 2) for data, seed in itertools.product(("clusters", "rings"), (0, 1))}
    data = [points[config["data"], config["seed"]] for config in names]
    for config in names:
        config |= {"batch_size": 512, "lr": 1e-5, "t_min": 0.1}

    def epoch(model, configs, data):
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        return train_points.train_epoch(train_points.build_step(model, optimizer, len(configs)), optimizer, data, 0,
                                        configs)
    values, over_t, _ = epoch(together, names, data)
    for m, (model, config) in enumerate(zip(alone, names)):
        value, t, _ = epoch(model, [config], [data[m]])
        assert_close(value[:, 0], values[:, m]), assert_close(t[0], over_t[m])
        parts = stack.member(together.state_dict(), m)
        assert all(torch.equal(p, parts[key]) for key, p in model.state_dict().items())


def test_a_checkpoint_holds_its_member_only(stacked):
    """A slice saved as it is would drag the whole stack's memory into each file."""
    sizes = {path.stat().st_size for path in stacked.glob("*/ckpt.pt")}
    assert max(sizes) < 1.2 * min(sizes) and max(sizes) < 60_000


def test_an_interrupted_stack_goes_on_from_wherever_its_members_are(stacked, tmp_path, interrupted, capsys):
    """One run finished alone, a stack stopped in its second epoch, the rest never begun."""
    train.main(["--data", "rings", "--target", "x", "--loss", "mse", "--stabiliser", "0.01", *FAST,
                "--out", str(tmp_path)])
    interrupted(lambda: train.main([*STACK, *FAST, "--stack", "6", "--out", str(tmp_path), "--resume"]))
    done = {path.parent.name: len(run.load(path)["history"]) for path in tmp_path.glob("*/ckpt.pt")}
    assert sorted(done.values()) == 6 * [1] + [3]
    train.main([*STACK, *FAST, "--out", str(tmp_path), "--resume"])
    assert "1 of 16 runs are finished already" in capsys.readouterr().out
    for path in stacked.iterdir():
        assert_same_run(path, tmp_path / path.name)


def test_one_finished_run_stops_a_stack_before_it_begins(stacked, tmp_path):
    train.main(["--target", "x", *FAST, "--out", str(tmp_path)])
    with pytest.raises(SystemExit, match="rings-x-mse-s0 holds this run already"):
        train.main(["--target", "eps", "x", *FAST, "--out", str(tmp_path)])
    assert [path.name for path in tmp_path.iterdir()] == ["rings-x-mse-s0"]


def test_a_diverging_member_is_named_when_the_others_are_done(tmp_path, monkeypatch):
    original = train_points.train_epoch

    def diverge(*arguments):
        values, *rest = original(*arguments)
        values[7, 1:] = float("nan")       # of the second member, if there is one
        return values, *rest
    monkeypatch.setattr(train_points, "train_epoch", diverge)
    with pytest.raises(SystemExit, match="rings-x-mse-s0: the loss is not finite from step 7 on "
                                         ".* 0 finished epochs") as stop:
        train.main(["--target", "eps", "x", "v", *FAST, "--stack", "2", "--out", str(tmp_path)])
    assert "\n" not in str(stop.value) and not (tmp_path / "rings-x-mse-s0" / "ckpt.pt").exists()
    assert len(run.load(tmp_path / "rings-eps-mse-s0")["history"]) \
        == len(run.load(tmp_path / "rings-v-mse-s0")["history"]) == 3


def test_draws_are_made_once_for_all_targets_and_losses(tmp_path, monkeypatch):
    """One noise generator an epoch and (dataset, seed), however many members share it."""
    made, original = [], run.generator
    monkeypatch.setattr(run, "generator", lambda device, *key: made.append(key) or original(device, *key))
    start = time.perf_counter()
    train.main([*STACK, *FAST, "--stack", "16", "--out", str(tmp_path)])
    spent = sum(run.load(folder)["history"][-1]["seconds"] for folder in tmp_path.iterdir())
    assert 0 < spent < time.perf_counter() - start                   # each run has its share of the time
    assert sum(key[1:] == ("noise", 0) for key in made) == 4 and sum(key[1:] == ("order", 2) for key in made) == 4


def test_samples_of_a_stack_are_those_of_its_members(stacked, tmp_path):
    folders = [stacked / name for name in ("clusters-x-mse-s0", "rings-s-nelbo-s1", "rings-s-mse-s0")]
    options = ["--steps", "5", "--num-samples", "300", "--seed", "3", "--device", "cpu"]
    sample.main(["--ckpt", *map(str, folders), *options, "--out", str(tmp_path / "many")])
    for folder in folders:
        sample.main(["--ckpt", str(folder), *options, "--out", str(tmp_path / folder.name)])
        alone, together = (np.load(path / "samples.npy")
                           for path in (tmp_path / folder.name, tmp_path / "many" / folder.name))
        assert_close(alone, together, rtol=1e-4, atol=1e-5)
    assert not np.allclose(together, np.load(tmp_path / "many" / folders[0].name / "samples.npy"), atol=0.1)


def test_only_runs_alike_are_stacked():
    opened = lambda i, **config: run.Run(
        str(i), {"config": dict(data="rings", target="x", loss="mse", seed=i) | config, "history": []})
    runs = [opened(i, t_min=t_min) for i, t_min in enumerate([1e-3] * 10 + [1e-6] + [1e-3])]
    assert [[int(one.folder.name) for one in group.members] for group in run.stacks(runs, "cpu")] == [
        [*range(8)], [8, 9, 11], [10]]
    assert [len(group.members) for group in run.stacks(runs, "cuda")] == [11, 1]
    for key, value in ("schedule", "linear"), ("stabiliser", 0.01), ("width", 16), ("t_density", "logsnr"):
        assert len(run.stacks([runs[0], opened(1, **{key: value})], "cpu")) == 2
        with pytest.raises(SystemExit, match=f"0 and 1 differ in {key} and cannot be one stack"):
            run.Stack([runs[0], opened(1, **{key: value})])
    assert len(run.stacks([runs[0], opened(1, data="waves", target="v", loss="nelbo")], "cpu")) == 1


def test_interleave_gives_each_member_its_block():
    members = [torch.arange(14.).reshape(7, 2) + 100 * m for m in range(3)]
    batches = stack.interleave(members, 3)
    assert batches.shape == (2, 9, 2)
    for (i, m) in itertools.product(range(2), range(3)):
        assert torch.equal(batches[i, 3 * m:3 * m + 3], members[m][3 * i:3 * i + 3])


def test_join_and_member():
    states = [{"a": {"w": torch.full((1, 2, 2), float(m)), "step": torch.tensor(5.0)}} for m in range(3)]
    joined = stack.join(states)
    assert joined["a"]["w"].tolist() == [[[m, m]] * 2 for m in (0.0, 1.0, 2.0)] and joined["a"]["step"] == 5
    part = stack.member(joined, 1)
    joined["a"]["w"].zero_(), joined["a"]["step"].zero_()
    assert torch.equal(part["a"]["w"], states[1]["a"]["w"]) and part["a"]["step"] == 5 and states[0]["a"]["step"] == 5


@pytest.mark.parametrize("rows", [1, 7, 60, 1000])
def test_chunks_change_nothing(rows):
    model = MLP(width=8, members=3).double()
    z, t = torch.randn(60, 2, dtype=torch.float64), torch.rand(60, dtype=torch.float64)
    sizes = []
    spy = lambda z, t: sizes.append(len(z)) or model(z, t)
    assert_close(stack.in_chunks(spy, 3, rows)(z, t), model(z, t))
    assert max(sizes) == min(60, max(3, rows // 3 * 3)) and sum(sizes) == 60


@pytest.mark.parametrize("fresh", [True, False])
def test_capturing_leaves_model_and_optimizer_as_they_were(monkeypatch, fresh):
    """With a graph that replays by calling the step again: tested is the warming up and the copying around it."""
    calls = []

    class Graph:
        def replay(self):
            for kept, new in zip(calls[-1][1], original(*calls[-1][0])):
                kept.copy_(new)
    stream = types.SimpleNamespace(wait_stream=lambda other: None)
    monkeypatch.setattr(torch.cuda, "Stream", lambda: stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda s: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", lambda g: contextlib.nullcontext())
    config, = settings.configs(train.parse(["--width", "8"]))
    batches = [(torch.randn(20, 2), torch.rand(20), torch.randn(20, 2), torch.rand(20)) for _ in range(3)]
    results, first = [], [c.clone() for c in batches[0]]
    for capture in False, True:
        torch.manual_seed(0)
        model = kind_points.build_model(config, 2)
        optimizer = train_points.build_optimizer(model, config)
        step = original = train_points.build_step(model, optimizer, 2)
        if not fresh:
            step(*batches[0])
        if capture:
            step = stack.captured(lambda *c, original=original: calls.append((c, original(*c))) or calls[-1][1],
                                  model, optimizer, batches[0])
        losses = [c.clone() for batch in batches for c in step(*batch)]
        results.append((losses, [p.detach().clone() for p in model.parameters()]))
    assert len(calls) == 4                                           # three to warm up, one to capture
    assert all(torch.equal(c, kept) for c, kept in zip(batches[0], first))
    for eager, captured in zip(*results):
        assert all(torch.equal(p, q) for p, q in zip(eager, captured))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("resumed", [False, True])
def test_a_captured_step_on_cuda_is_the_eager_one(resumed):
    """Two epochs; resumed: the second with model and optimizer that come from a checkpoint."""
    configs = settings.configs(train.parse(["--target", "x", "v", "--width", "32"]))
    data, results = kind_points.load(dict(data="rings")).cuda(), []
    for build in (lambda *c: train_points.build_step(*c[:3])), train_points.ready_step:
        torch.manual_seed(0)
        model = kind_points.build_model(configs[0], 2).cuda()
        optimizer = train_points.build_optimizer(model, configs[0])
        step = build(model, optimizer, 2, 512)
        for epoch in range(2):
            if epoch and resumed:
                weights, state = copy.deepcopy(model.state_dict()), optimizer.state_dict()["state"]
                model = kind_points.build_model(configs[0], 2).cuda()
                model.load_state_dict(weights)
                optimizer = train_points.build_optimizer(model, configs[0])
                parts = [stack.member(state, m) for m in range(2)]
                optimizer.load_state_dict({"state": stack.join(parts),
                                           "param_groups": optimizer.state_dict()["param_groups"]})
                step = build(model, optimizer, 2, 512)
                assert optimizer.param_groups[0]["lr"].is_cuda
            train_points.train_epoch(step, optimizer, [data, data], epoch, configs)
        results.append([p.detach().cpu() for p in model.parameters()])
    assert_close(*results, rtol=1e-3, atol=1e-4)


def test_warming_up_waits_for_what_was_queued_before_and_the_graph_for_the_warming_up(monkeypatch):
    """On a stream of its own, as torch's notes on CUDA graphs have it: otherwise both could see half-written
    weights."""
    events = []
    stream = lambda name: types.SimpleNamespace(
        name=name, wait_stream=lambda other: events.append(f"{name} waits for {other.name}"))
    main, side = stream("main"), stream("side")

    @contextlib.contextmanager
    def using(name):
        events.append(f"{name} begins")
        yield
        events.append(f"{name} ends")
    monkeypatch.setattr(torch.cuda, "Stream", lambda: side)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: main)
    monkeypatch.setattr(torch.cuda, "stream", lambda s: using(s.name))
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: None)
    monkeypatch.setattr(torch.cuda, "graph", lambda g: using("graph"))
    model = MLP(width=8)
    stack.captured(lambda z: events.append("step"), model, torch.optim.Adam(model.parameters()), (torch.zeros(2),))
    assert events == ["side waits for main", "side begins", *3 * ["step"], "side ends", "main waits for side",
                      "graph begins", "step", "graph ends"]


def test_a_stack_is_of_eight_networks_on_a_cpu_and_of_the_96_of_the_experiment_elsewhere():
    assert [stack.size(torch.device(device)) for device in ("cpu", "cuda", "cuda:1", "mps")] == [8, 96, 96, 96]
