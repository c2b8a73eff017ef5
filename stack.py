"""Many small networks as one: the same arithmetic, fewer and larger kernels.

Read `mlp.py` and `train.py` first. A stack of M networks is one network whose weights have a leading dimension M, and
whose rows come in M equal blocks, block m for network m. Targets and weights of the losses are numbers per row, so
members may differ in data, target, loss and seed; nothing they learn from mixes: the loss of the stack is the sum of
theirs, Adam works element by element. So each member is the network that training it alone gives, but for rounding. On
a CPU its predictions and gradients are the same bits; torch's fused Adam rounds the last n modulo 8 elements of a
tensor, here of the last bias, otherwise than the rest. Thousands of steps make of that what they make of any rounding:
two runs of one quality.

Not here: what is trained (`losses.regression`), and with which settings (`train.py`).

    python stack.py       # forward and backward pass of 8 networks, alone and as a stack
"""
import copy

import torch


def size(device):
    """How many networks to train or sample at once: on a CPU more of them save nothing."""
    return 8 if torch.device(device).type == "cpu" else 96


def interleave(members, batch_size):
    """M tensors (n, ...) -> (n // batch_size, M * batch_size, ...): batches of each member's points, a block for each.

    The n % batch_size points at the end are left out.
    """
    batches = len(members[0]) // batch_size
    return torch.stack([c[:batches * batch_size].unflatten(0, (batches, batch_size)) for c in members], 1).flatten(1, 2)


def join(states):
    """A stack's state from those of its members: nested dicts of tensors (1, ...) -> (M, ...), numbers as they are."""
    first = states[0]
    if isinstance(first, dict):
        return {key: join([state[key] for state in states]) for key in first}
    return torch.cat(states) if first.ndim else first.clone()


def member(state, i):
    """State of member i of a stack, a copy on the CPU: what `join` undoes."""
    if isinstance(state, dict):
        return {key: member(value, i) for key, value in state.items()}
    return state[i:i + 1].detach().to("cpu", copy=True) if state.ndim else state.detach().to("cpu", copy=True)


def in_chunks(model, members, rows):
    """The model, given about `rows` rows at a time, a part of each block: activations then fit in a CPU's cache."""
    def chunked(z, t):
        z, t = z.unflatten(0, (members, -1)), t.unflatten(0, (members, -1))
        size = max(1, rows // members)
        parts = [model(z.flatten(0, 1), t.flatten()).unflatten(0, (members, -1))
                 for z, t in zip(z.split(size, 1), t.split(size, 1))]
        return torch.cat(parts, 1).flatten(0, 1)
    return chunked


def captured(step, model, optimizer, inputs):
    """step(*inputs) as a CUDA graph: one launch for all its kernels. Returns a function of tensors like `inputs`.

    The result is overwritten by the next call. step changes model and optimizer, whose learning rate is a tensor; what
    the warming up changes is put back, in place because the graph knows their addresses.
    """
    weights, state = copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict()["state"])
    inputs = [c.clone() for c in inputs]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step(*inputs)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = step(*inputs)
    model.load_state_dict(weights)
    for i, moments in optimizer.state_dict()["state"].items():
        for name, value in moments.items():
            value.copy_(state[i][name]) if state else value.zero_()

    def replay(*new):
        for c, value in zip(inputs, new):
            c.copy_(value)
        graph.replay()
        return result
    return replay


if __name__ == "__main__":
    import time

    from mlp import MLP
    z, t = torch.randn(8 * 512, 2), torch.rand(8 * 512)

    def milliseconds(members):
        model, parts = MLP(members=members), list(zip(z.chunk(8 // members), t.chunk(8 // members)))
        for repeat in range(21):
            if repeat == 1:
                start = time.perf_counter()
            for part in parts:
                model.zero_grad()
                model(*part).square().mean().backward()
        return (time.perf_counter() - start) / 20 * 1e3
    print(f"forward and backward of 8 networks: {milliseconds(1):.1f} ms alone, {milliseconds(8):.1f} ms as a stack")
