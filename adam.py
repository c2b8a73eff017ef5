"""Adam on a CPU, as torch has it, without the seconds that building torch's own takes; the average of weights.

Not here: where it is used (`train_points.py`).
"""
import torch
from torch.optim.adam import adam


class Adam:
    """torch.optim.Adam(parameters, lr, fused=True) to the bit. Building that imports torch's compiler: some seconds."""

    def __init__(self, parameters, lr):
        self.param_groups = [{"params": parameters, "lr": lr}]
        self.state = [dict(step=torch.tensor(0.0, device=p.device), exp_avg=torch.zeros_like(p),
                           exp_avg_sq=torch.zeros_like(p)) for p in parameters]

    def zero_grad(self):
        for p in self.param_groups[0]["params"]:
            p.grad = None

    def step(self):
        self.update(range(len(self.state)))

    @torch.no_grad()
    def update(self, which):
        """A step of the parameters with these numbers."""
        group = self.param_groups[0]
        parameters = [group["params"][i] for i in which]
        steps, means, squares = ([self.state[i][key] for i in which] for key in ("step", "exp_avg", "exp_avg_sq"))
        adam(parameters, [p.grad for p in parameters], means, squares, [], steps, fused=True, amsgrad=False,
             lr=group["lr"], beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.0, maximize=False,
             capturable=parameters[0].is_cuda)

    def state_dict(self):
        return {"state": dict(enumerate(self.state)), "param_groups": self.param_groups}

    def load_state_dict(self, state):
        for i, moments in enumerate(self.state):
            for key, value in moments.items():
                value.copy_(state["state"][i][key])


def ema_decay(decay, step):
    """Decay of the exponential moving average after `step` steps: (1 + step) / (10 + step) until it reaches `decay`.

    So the average forgets the first, random weights at once, whatever the length of the run.
    """
    return min(decay, (1 + step) / (10 + step))


@torch.no_grad()
def average(ema, model, decay, step):
    """Move the weights of a network `ema` to those that `model` has after `step` steps, by 1 - `ema_decay`."""
    torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 1 - ema_decay(decay, step))
