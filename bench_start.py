"""How soon scripts answer: wall and CPU seconds of whole processes, beside importing torch alone.

    python bench_start.py                                  # this project, some minutes
    python bench_start.py path/to/another/checkout .       # two of them, in turn: before and after

Medians over the rounds. "first epoch" is the time until its line is printed, with the CPU time of the whole call.
Without `cache.py`'s files the optimum and the floor of the distances are computed, as in the first call of all.
"""
import argparse
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

RUN = "rings-eps-mse-s0"
CALLS = {  # words of the call, and whether it has cached results
    "import torch": (["-c", "import torch"], True),
    "train.py --help": (["train.py", "--help"], True),
    "sample.py --help": (["sample.py", "--help"], True),
    "first epoch, nothing cached": (["train.py", "--epochs=1", "--overwrite", "--out=RUNS"], False),
    "first epoch": (["train.py", "--epochs=1", "--overwrite", "--out=RUNS"], True),
    "2,000 points in 16 steps, nothing cached": (["sample.py", f"--ckpt=RUNS/{RUN}", "--steps=16",
                                                  "--num-samples=2000"], False),
    "2,000 points in 16 steps": (["sample.py", f"--ckpt=RUNS/{RUN}", "--steps=16", "--num-samples=2000"], True)}


def call(project, words, folder, cached):
    """Wall seconds of a process, or until it prints its first epoch, and its CPU seconds. SystemExit if it fails."""
    words = [word.replace("RUNS", str(folder / "runs")) for word in words]
    words = [str(Path(project, words[0]).resolve()), *words[1:]] if words[0] != "-c" else words
    environment = os.environ | {"DIFFUSION_LOSSES_CACHE": str(folder / "cache") if cached else ""}
    used = lambda: sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2])
    before, start = used(), time.perf_counter()
    with subprocess.Popen([sys.executable, *words], cwd=folder, env=environment, stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE, text=True) as process:
        first = next((time.perf_counter() for line in process.stdout if line.startswith("epoch")), None)
        errors = process.communicate()[1]
    if process.returncode:
        raise SystemExit(f"{' '.join(words)} fails: {errors.strip()}")
    return (first or time.perf_counter()) - start, used() - before


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("projects", nargs="*", default=[str(Path(__file__).parent)], help="folders (this one)")
    parser.add_argument("--rounds", type=int, default=5, help="of each, after one that does not count (5)")
    args = parser.parse_args(argv)
    times = {name: {project: [] for project in args.projects} for name in CALLS}
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(args.rounds + 1):
            for name, (words, cached) in CALLS.items():
                for i, project in enumerate(args.projects):
                    (own := Path(folder, str(i))).mkdir(exist_ok=True)
                    times[name][project].append(call(project, words, own, cached))
    print("wall / CPU seconds" + 24 * " " + "".join(f"{project[-22:]:>24s}" for project in args.projects))
    for name, columns in times.items():
        medians = [map(statistics.median, zip(*values[1:])) for values in columns.values()]
        print(f"{name:42s}" + "".join("{:16.1f} / {:5.1f}".format(*median) for median in medians))


if __name__ == "__main__":
    main()
