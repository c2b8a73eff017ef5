"""Threads that wait leave the processor to others. Scripts import this first: OpenMP reads it when torch is loaded.

By default a thread that waits for the others spins. Beside another process on the same cores it then spins while those
that it waits for have none: training gets up to 20 times slower. Whoever set one of these has chosen already.
"""
import os

WAITING = {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "0", "KMP_BLOCKTIME": "0"}   # any, GNU, LLVM

if not WAITING.keys() & os.environ.keys():
    os.environ.update(WAITING)
