"""Fewer threads while another process needs the cores, and all of them again when it has ended.

torch's threads wait for each other by spinning. Alone that is the fastest; beside another process each spins in the
time of a thread that it waits for, and a step takes 7 times as long. So we watch which part of its threads' time the
work gets. On a CPU the number of threads changes no bit of what the networks of `mlp.py` learn.
"""
import time

import torch

MOST = torch.get_num_threads()         # what torch or the user ($OMP_NUM_THREADS) has chosen


def shared(work, device="cpu", window=0.2, patience=5.0):
    """A function as one that halves torch's threads when it gets less than 3/4 of their time, and tries more later.

    device: where it works; only a CPU's is watched.
    window, patience: seconds of work after which that is judged, and after which more threads are tried.
    """
    if MOST == 1 or torch.device(device).type != "cpu":
        return work
    wall = used = 0.0
    warm = False                           # the first call may read and compile

    def call(*args):
        nonlocal wall, used, warm
        start, before = time.perf_counter(), time.process_time()
        result = work(*args)
        wall += warm * (time.perf_counter() - start)
        used += warm * (time.process_time() - before)
        warm, threads = True, torch.get_num_threads()
        busy = used < 0.75 * threads * wall
        if wall > window and threads > 1 and busy or wall > patience:
            torch.set_num_threads(max(1, threads // 2) if busy else min(MOST, 2 * threads))
            wall = used = 0.0
        return result
    return call
