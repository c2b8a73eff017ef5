"""How many threads a process takes beside others, on a clock that only work moves; and that nothing depends on it."""
import time

import pytest
import torch
from torch.testing import assert_close

import kind_points
import settings
import threads
import train
import train_points
from datasets2d import DATASETS


@pytest.fixture
def machine(monkeypatch):
    """Four cores and so many threads of others; a call takes 0.01 s, its threads that have a core use one."""
    class Machine:
        wall, cpu, threads, others, outside = 100.0, 5.0, 4, 0, 0.0

        def work(self):
            self.wall += 0.01
            self.cpu += 0.01 * self.threads * min(1, 4 / (self.threads + self.others))
    machine = Machine()
    monkeypatch.setattr(time, "perf_counter", lambda: machine.wall)
    monkeypatch.setattr(time, "process_time", lambda: machine.cpu)
    monkeypatch.setattr(threads, "MOST", 4)
    monkeypatch.setattr(torch, "get_num_threads", lambda: machine.threads)
    monkeypatch.setattr(torch, "set_num_threads", lambda n: setattr(machine, "threads", n))
    return machine


def follow(machine, call, calls, gap=0.0):
    """The numbers of threads that so many calls have, with a gap between them in which nothing is computed."""
    counts = []
    for _ in range(calls):
        counts.append(machine.threads)
        call()
        machine.wall += gap
    return counts


def test_alone_all_threads_are_kept_whatever_is_between_the_calls(machine):
    call = threads.shared(machine.work)
    assert set(follow(machine, call, 2000, gap=0.05)) == {4}


def test_a_slow_first_call_does_not_count(machine):
    work = iter([3.0, *[0.0] * 300])

    def first_reads():
        machine.wall += next(work)
        machine.work()
    assert set(follow(machine, threads.shared(first_reads), 300)) == {4}


def test_beside_others_threads_are_halved_and_tried_again_later(machine):
    call = threads.shared(machine.work)
    machine.others = 4                     # of 8 threads on 4 cores each has half
    counts = follow(machine, call, 1500) + follow(machine, threads.shared(machine.work), 500)     # the next stack
    assert set(counts[:21]) == {4} and set(counts[25:40]) == {2} and counts[60] == 1
    tried = [i for i in range(100, 2000) if counts[i] > counts[i - 1]]
    assert counts[tried[0]] == 2 and 400 < tried[1] - tried[0] < 600 and counts.count(1) > 0.85 * len(counts)
    machine.others = 0
    assert set(follow(machine, threads.shared(machine.work), 1600)[-300:]) == {4}


def test_a_function_of_one_thread_is_left_as_it_is(machine, monkeypatch):
    monkeypatch.setattr(threads, "MOST", 1)
    assert threads.shared(machine.work) == machine.work
    monkeypatch.setattr(threads, "MOST", 4)
    assert threads.shared(machine.work, "cuda") == machine.work


def test_arguments_and_result_pass(machine):
    assert threads.shared(lambda a, b: a - b)(3, 1) == 2


@pytest.mark.parametrize("members", [1, 3])
def test_what_is_learned_does_not_depend_on_the_threads(members):
    configs = settings.configs(train.parse(["--seeds", str(members), "--width", "128", "--batch-size", "512"]))
    data, weights, before = DATASETS["rings"].sample(5120), [], torch.get_num_threads()
    try:
        for number in 1, 2, 3:
            torch.set_num_threads(number)
            torch.manual_seed(0)
            model = kind_points.build_model(configs[0], members)
            optimizer = train_points.build_optimizer(model, configs[0])
            step = train_points.build_step(model, optimizer, members)
            train_points.train_epoch(step, optimizer, members * [data], 0, configs)
            weights.append([p.detach() for p in model.parameters()])
    finally:
        torch.set_num_threads(before)
    assert_close(weights[1], weights[0], rtol=0, atol=0)
    assert_close(weights[2], weights[0], rtol=0, atol=0)


def test_training_and_sampling_share(monkeypatch):
    """The step that trains, and the network that draws, on a CPU."""
    shared = []
    monkeypatch.setattr(threads, "shared", lambda work, device: shared.append(device) or work)
    config, = settings.configs(train.parse(["--width", "8"]))
    model = kind_points.build_model(config)
    train_points.ready_step(model, train_points.build_optimizer(model, config), 1, 512)
    one = kind_points.run.Run("none", dict(config=config, model=model.state_dict(), history=[]))
    kind_points.draw(one, 2, 10)
    assert [str(device) for device in shared] == ["cpu", "cpu"]
