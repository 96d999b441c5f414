"""Measures this machine: memory for a rank, speed, and the length of step that suits it."""

from __future__ import annotations

import os
import resource
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx

from hippo_mpi.planning.layer_split import Machine

_MEASURING_S = 0.25  # for each of the speeds
_CPU_FLOPS_PER_BYTE = 5.0  # float32 on one core: 0.4 with MLX's own BLAS, 12 with OpenBLAS


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


@dataclass(frozen=True)
class Speeds:
    """What limits a machine: bytes of weights per second that decoding reads, and operations per second of long prompts."""

    bytes_per_s: float
    flops_per_s: float


def measured_speeds() -> Speeds:
    """Measure both on the device that models run on, which takes about half a second."""
    is_gpu = mx.default_device() == mx.Device(mx.gpu)
    size, num_rows, dtype = (8192, 256, mx.float16) if is_gpu else (4096, 64, mx.float32)
    matrix = mx.ones((size, size), dtype)
    bytes_per_s = matrix.nbytes / _best_s(mx.ones((1, size), dtype), matrix)  # more than caches hold
    matrix = mx.ones((size // 2, size // 2), dtype)
    flops_per_s = 2 * num_rows * matrix.size / _best_s(mx.ones((num_rows, size // 2), dtype), matrix)
    del matrix
    mx.clear_cache()  # buffers that MLX keeps would count as this rank's memory
    return Speeds(bytes_per_s, flops_per_s)


def _best_s(rows: mx.array, matrix: mx.array) -> float:
    """Return the shortest time of a product among as many as fit into a quarter of a second; a device may have slept."""
    mx.eval(rows, matrix)
    best_s, ends = float("inf"), time.perf_counter() + _MEASURING_S
    while time.perf_counter() < ends or best_s == float("inf"):
        began = time.perf_counter()
        mx.eval(rows @ matrix)
        best_s = min(best_s, time.perf_counter() - began)
    return best_s


def usual_flops_per_byte() -> float:
    """Return `Machine.flops_per_byte` where speeds aren't measured, since all ranks share one machine."""
    return _CPU_FLOPS_PER_BYTE if mx.default_device() == mx.Device(mx.cpu) else Machine.flops_per_byte


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
