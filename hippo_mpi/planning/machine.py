"""Measures this machine: memory for a rank, speed, and the length of step that suits it."""

from __future__ import annotations

import os
import resource
import sys
import time
from pathlib import Path

import mlx.core as mx


def available_bytes() -> int:
    """Return the bytes that models may fill here: Metal's recommended working set, or Linux's available memory."""
    if mx.metal.is_available():
        return int(mx.device_info()["max_recommended_working_set_size"])
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return int(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") * 3 // 4)


def measured_speed() -> float:
    """Return the bytes of weights per second that a matrix-vector product reads, which limits decoding.

    Measuring takes some 50 ms.
    """
    matrix, vector = mx.ones((2048, 2048)), mx.ones((1, 2048))
    mx.eval(matrix, vector)
    best = float("inf")
    for _ in range(5):
        began = time.perf_counter()
        mx.eval(vector @ matrix)
        best = min(best, time.perf_counter() - began)
    size = matrix.nbytes
    del matrix, vector
    mx.clear_cache()  # buffers that MLX keeps would count as this rank's memory
    return size / best


def longest_chunk() -> int:
    """Return how many prompt tokens one step should read at most.

    On a GPU mlx_lm.generate's 2,048. On a CPU the attention scores of that many tokens don't fit into the CPU's caches:
    a prompt of 2,048 took 8.8 ms per token in one step, 5.3 in steps of 512, 5.1 in steps of 256 (86M parameters, one
    core).
    """
    return 2048 if mx.default_device() == mx.Device(mx.gpu) else 256


def peak_resident_bytes() -> int:
    """Return the most bytes of memory that this process ever held.

    Linux's getrusage includes what the parent held when it started this process, so /proc is asked first.
    """
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
