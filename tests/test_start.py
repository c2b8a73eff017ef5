"""How soon a script starts: what it imports, our Adam beside torch's."""
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

import kind_points
import stack
import train_points

ROOT = Path(__file__).parent.parent
HEAVY = "matplotlib", "torchvision", "scipy", "torch._dynamo", "sympy", "torch._inductor"


def imported(code, folder):
    """Which of the heavy modules a process has imported after `code`, in the project's folder."""
    code = (f"import sys; sys.path.insert(0, {str(ROOT)!r})\n{code}\n"
            f"print('imported', *[name for name in {HEAVY} if name in sys.modules])")
    result = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout.splitlines()[-1].split()[1:]


def test_scripts_import_nothing_heavy_to_start(tmp_path):
    assert imported("import train, sample, likelihood", tmp_path) == []


def test_training_imports_no_compiler(tmp_path):
    """And matplotlib only after the last epoch."""
    assert imported("import train\ntrain.main('--data clusters --epochs 1 --width 8 --batch-size 25000'.split())",
                    tmp_path) == ["matplotlib"]


@pytest.fixture
def trained():
    """Gradients of three steps and two equal networks of two members."""
    config = dict(data="rings", width=16, schedule="cosine", lr=0.1)
    torch.manual_seed(0)
    ours = kind_points.build_model(config, 2)
    theirs = kind_points.build_model(config, 2)
    theirs.load_state_dict(ours.state_dict())
    gradients = [[torch.randn_like(p) for p in ours.parameters()] for _ in range(4)]
    return config, ours, theirs, gradients


def follow(optimizer, model, gradients):
    """Steps at learning rates 0.1, 0.2, ..."""
    for i, gradient in enumerate(gradients):
        optimizer.param_groups[0]["lr"] = 0.1 * (i + 1)
        optimizer.zero_grad()
        assert all(p.grad is None for p in model.parameters())
        for p, g in zip(model.parameters(), gradient):
            p.grad = g.clone()
        optimizer.step()


def test_adam_is_torchs_to_the_bit_and_goes_on_from_its_state(trained):
    """Weights and moments; and each takes the state of the other, as a checkpoint has it."""
    config, ours, theirs, gradients = trained
    mine = train_points.build_optimizer(ours, config)
    peer = lambda: torch.optim.Adam(theirs.parameters(), lr=0.1, fused=True)
    their = peer()
    assert not isinstance(mine, torch.optim.Optimizer) and mine.param_groups[0]["lr"] == 0.1
    for part in gradients[:2], gradients[2:]:
        follow(mine, ours, part)
        follow(their, theirs, part)
        assert_close(list(ours.parameters()), list(theirs.parameters()), rtol=0, atol=0)
        ours_state, their_state = mine.state_dict()["state"], their.state_dict()["state"]
        assert_close(ours_state, their_state, rtol=0, atol=0)
        assert [list(moments) for moments in ours_state.values()] == [
            list(moments) for moments in their_state.values()]
        swap = [stack.join([stack.member(state, m) for m in range(2)]) for state in (ours_state, their_state)]
        mine, their = train_points.build_optimizer(ours, config), peer()
        mine.load_state_dict({"state": swap[1], "param_groups": mine.state_dict()["param_groups"]})
        their.load_state_dict({"state": swap[0], "param_groups": their.state_dict()["param_groups"]})


def test_an_optimizer_leaves_the_state_it_is_given_alone(trained):
    config, ours, _, gradients = trained
    mine = train_points.build_optimizer(ours, config)
    follow(mine, ours, gradients[:1])
    state = {i: {key: value.clone() for key, value in moments.items()}
             for i, moments in mine.state_dict()["state"].items()}
    other = train_points.build_optimizer(ours, config)
    other.load_state_dict({"state": state})
    follow(other, ours, gradients[1:2])
    assert_close(state, mine.state_dict()["state"], rtol=0, atol=0)
