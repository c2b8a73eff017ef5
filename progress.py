"""How much of a long piece of work is done and how long the rest takes: on a terminal, in a pipe and in a file.

Short work says nothing. A terminal shows one line on stderr, rewritten every second; elsewhere there is a line of its
own after 3 seconds and then the rarer the longer it takes, at least every 30 seconds.

    python progress.py        # five seconds of work
"""
import contextlib
import os
import sys
import threading
import time

BEGAN = time.perf_counter() - time.process_time()      # until here the process has imported: what it took of a CPU


def seconds():
    """Since this process began."""
    return time.perf_counter() - BEGAN


def say(line):
    """Show a line on stderr; on a terminal in place of the last one, "" takes it away."""
    terminal = sys.stderr.isatty()
    if line or terminal:
        print(f"\r{line}\033[K" if terminal else line, end="" if terminal else "\n", file=sys.stderr, flush=True)


@contextlib.contextmanager
def announced(line, after=1):
    """Say what is being done if it takes longer than `after` seconds; on a terminal the line goes when it is done."""
    spoken = threading.Event()
    timer = threading.Timer(after, lambda: (spoken.set(), say(line)))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        timer.join()
        if spoken.is_set():
            say("")


def due(start, shown):
    """Is it time to speak of work that began at `start`, after last time, `shown`? Both of time.perf_counter()."""
    now = time.perf_counter()
    return now - shown > (1 if sys.stderr.isatty() else min(30, max(3, (now - start) / 5)))


def counter(what, total, unit):
    """A function add(n=1) to be called when n more of `total` are done. Of torchrun's processes the first speaks.

    The first ones may have warmed something up: as soon as there are others, their time does not count.
    """
    start = first = shown = time.perf_counter()
    done = head = 0
    spoken, quiet = False, os.environ.get("RANK", "0") != "0"

    def add(n=1):
        nonlocal done, head, first, shown, spoken
        done += n
        if not head:
            head, first = done, time.perf_counter()
        if done >= total and spoken:
            say("")
        elif done < total and not quiet and due(start, shown):
            shown, spoken = time.perf_counter(), True
            rate = (done - head) / (shown - first) if done > head else done / (shown - start)
            say(f"{what}: {done:,} of {total:,} {unit}, {(total - done) / rate:.0f} s left")
    return add


def watch(items, what, unit, size=lambda item: 1):
    """Yield the items of a list, and `counter` counts them; size(item): what it counts for."""
    sizes = [size(item) for item in items]
    add = counter(what, sum(sizes), unit)
    for item, n in zip(items, sizes):
        yield item
        add(n)


def counted(model, add):
    """The model(z, t) as one that calls add() after each evaluation."""
    def evaluate(z, t):
        prediction = model(z, t)
        add()
        return prediction
    evaluate.__wrapped__ = model
    return evaluate


if __name__ == "__main__":
    for _ in watch(range(50), "sleeping", "naps"):
        time.sleep(0.1)
