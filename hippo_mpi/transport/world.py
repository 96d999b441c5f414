"""The world of ranks: finds out which launcher started us, and calls `mx.distributed.init` once, strictly.

Knows launchers and backends. Must not know models. `mx.distributed` appears in this package only.
"""

from __future__ import annotations

import contextlib
import ctypes
import ipaddress
import json
import os
import select
import signal
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx

from hippo_mpi.environment import CONTROL
from hippo_mpi.errors import LaunchError, RankError, print_error
from hippo_mpi.transport.mpi_library import find_mpi_library
from hippo_mpi.transport.processes import is_stopped, kill_stopped_ranks
from hippo_mpi.transport.status_file import write_status

MAX_ADDRESSES = 16
"""At which a rank's control sockets listen; further ones are left out."""
_OUTSIDE = "192.0.2.1"  # no host has it
_SIGNAL_INTERVAL_S = 1.0  # between SIGQUIT and SIGKILL


@dataclass
class World:
    """This process among its peers. `group` is None for a rank that is alone."""

    rank: int
    size: int
    backend: str
    host: str
    addresses: tuple[str, ...]  # where peers reach this rank's control sockets; first, where its data go
    group: mx.distributed.Group | None = None

    @property
    def name(self) -> str:
        """This rank's number and host, for messages."""
        return f"rank {self.rank} ({self.host})"


@dataclass(frozen=True)
class Launch:
    """How this process was started, according to its environment."""

    backend: str  # "" (alone), "ring", "mpi", "jaccl"
    rank: int
    size: int | None  # None: only the backend knows
    ring: tuple[tuple[str, ...], ...] = ()  # the data's addresses of each rank, if it is known


def detect_launch() -> Launch:
    """Read the launcher's environment.

    Raises:
        LaunchError: its variables contradict each other, or name a hostfile that can't be read.
    """
    env = os.environ
    # mpirun inside sbatch leaves SLURM_PROCID at 0 on every rank, so its own variables come first.
    if "OMPI_COMM_WORLD_SIZE" in env:
        size = int(env["OMPI_COMM_WORLD_SIZE"])
        return Launch("mpi" if size > 1 else "", int(env["OMPI_COMM_WORLD_RANK"]), size)
    if "PMIX_RANK" in env:
        tasks = int(env.get("SLURM_NTASKS", "0")) or None
        return Launch("" if tasks == 1 else "mpi", int(env["PMIX_RANK"]), tasks)
    if "MLX_IBV_DEVICES" in env or "MLX_JACCL_COORDINATOR" in env:
        return Launch("jaccl", int(env.get("MLX_RANK", "0")), None)
    if "MLX_HOSTFILE" in env:
        return _detect_ring(Path(env["MLX_HOSTFILE"]), int(env.get("MLX_RANK", "0")))
    # Under srun without PMIx, or another MPI, each task would be a world of its own.
    tasks = int(env.get("PMI_SIZE", env.get("SLURM_STEP_NUM_TASKS", "1")))
    if tasks > 1:
        raise LaunchError(f"started as one of {tasks} tasks, but without PMIx: use srun --mpi=pmix, or mpirun")
    return Launch("", 0, 1)


def _detect_ring(hostfile: Path, rank: int) -> Launch:
    try:
        text = hostfile.read_text().strip()
        hosts = json.loads(text) if text else []  # mlx.launch writes nothing for a single host
    except (OSError, json.JSONDecodeError) as error:
        raise LaunchError(f"MLX_HOSTFILE {hostfile} can't be read: {error}") from None
    if len(hosts) <= 1:
        return Launch("", 0, 1)
    if not 0 <= rank < len(hosts):
        raise LaunchError(f"MLX_RANK is {rank}, but MLX_HOSTFILE {hostfile} has {len(hosts)} hosts")
    ring = tuple(tuple(str(place).rpartition(":")[0] for place in places) for places in hosts)
    return Launch("ring", rank, len(hosts), ring)


def connect(launch: Launch, timeout_s: float) -> World:
    """Join the world, or fail; never end up silently as a world of one.

    Args:
        launch: from `detect_launch`.
        timeout_s: seconds to wait for the other ranks; then this process ends with a line and status 3.

    Raises:
        LaunchError: the backend doesn't load, or joins another number of ranks than the launcher started.
    """
    host = socket.gethostname()
    if not launch.backend:
        return World(0, 1, "none", host, ("127.0.0.1",))
    if launch.backend == "mpi":
        find_mpi_library()
    waiting_for = (
        f"rank {launch.rank} ({host}) waited {timeout_s:.0f} s for the other ranks to start"
        f" ({launch.backend}; --start-timeout)"
    )
    with deadline(timeout_s, waiting_for):
        try:
            group = mx.distributed.init(strict=True, backend=launch.backend)
        except (RuntimeError, ValueError) as error:
            raise LaunchError(_explain(launch, str(error))) from None
    if launch.size not in (None, group.size()) or group.rank() != launch.rank:
        raise LaunchError(
            f"{launch.backend} initialised rank {group.rank()} of {group.size()}, but the launcher started rank {launch.rank} of"
            f" {launch.size}: do launcher and library ({os.environ.get('MLX_MPI_LIBNAME')}) belong to the same MPI?"
        )
    return World(group.rank(), group.size(), launch.backend, host, control_addresses(launch), group)


def _explain(launch: Launch, error: str) -> str:
    if launch.backend == "mpi":
        library = os.environ.get("MLX_MPI_LIBNAME", "libmpi")
        return f"can't load MPI ({library}): {error}; set MLX_MPI_LIBNAME to the library of the mpirun in use"
    if "bind" in error:
        return f"the ring's address of rank {launch.rank} is in use or not this host's: {error}; try --starting-port"
    if "Couldn't connect" in error:
        return (
            f"rank {launch.rank} couldn't reach the next rank: MLX's ring tries at once and after 1, 3, 7 and 15 s, whatever"
            " --start-timeout; start all ranks within 15 s, and check the firewall between them"
        )
    return f"the {launch.backend} backend can't start: {error}"


def control_addresses(launch: Launch) -> tuple[str, ...]:
    """Return where others reach this rank's control sockets; first, where it gets the ring's data.

    All ranks call rank 0, also those with which it shares no cable. So rank 0 is reached, too, where its packets to any
    other rank leave from, and at the addresses that it was given (HIPPO_CONTROL).

    Raises:
        LaunchError: it was given one that is none.
    """
    if launch.ring:
        own = list(launch.ring[launch.rank][:1])
        others = [address for rank, places in enumerate(launch.ring) if rank != launch.rank for address in places]
        if launch.rank == 0:
            own += [source for other in others if (source := _source_of(other)) and not _is_loopback(source)]
    else:
        coordinator = os.environ.get("MLX_JACCL_COORDINATOR", "").rpartition(":")[0]
        is_coordinator = launch.backend == "jaccl" and launch.rank == 0 and coordinator
        own = [coordinator if is_coordinator else _source_of(coordinator or _OUTSIDE) or "127.0.0.1"]
    for address in filter(None, os.environ.get(CONTROL, "").split(",")) if launch.rank == 0 else ():
        try:
            own.append(str(ipaddress.IPv4Address(address)))
        except ValueError:
            raise LaunchError(f"{CONTROL}: {address!r} is not an IPv4 address") from None
    return tuple(dict.fromkeys(own))[:MAX_ADDRESSES]


def _source_of(destination: str) -> str | None:
    """Return this host's address on the way to another; None: there is no way."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((destination, 9))  # nothing is sent: this only picks a route
            return str(probe.getsockname()[0])
        except OSError:
            return None


def _is_loopback(address: str) -> bool:
    return ipaddress.IPv4Address(address).is_loopback


@contextlib.contextmanager
def deadline(timeout_s: float, complaint: str) -> Iterator[None]:
    """End this process with a line and status 3 if the block takes longer than `timeout_s`."""
    with _ends_with_status_3():
        child, done = _keep_time(timeout_s, complaint)
        try:
            yield
        finally:
            os.close(done)
            os.waitpid(child, 0)


def end_within(timeout_s: float, complaint: str) -> None:
    """End this process with a line and status 3 if it is still alive after `timeout_s`.

    For a process that is about to end, but may wait for others meanwhile.
    """
    _exit_on_sigquit()
    _keep_time(timeout_s, complaint)


def _keep_time(timeout_s: float, complaint: str) -> tuple[int, int]:
    """Fork a process that ends this one after `timeout_s`; return its id and a descriptor whose closing ends it.

    `mx.distributed.init` holds the interpreter's lock, and on rank 0 it waits forever, so no thread of this process
    could end it: a forked child keeps the time.
    """
    done_read, done_write = os.pipe()
    own, launcher = os.getpid(), os.getppid()
    child = os.fork()
    if child == 0:
        os.close(done_write)
        if not select.select([done_read], [], [], timeout_s)[0]:
            _end(own, launcher, complaint)
        os._exit(0)
    os.close(done_read)
    return child, done_write


@contextlib.contextmanager
def _ends_with_status_3() -> Iterator[None]:
    before = signal.getsignal(signal.SIGQUIT)
    _exit_on_sigquit()
    try:
        yield
    finally:
        signal.signal(signal.SIGQUIT, before)


def _exit_on_sigquit() -> None:
    """Let a SIGQUIT end this process with the signal's number as its status, which happens to be RankError's.

    No Python handler runs while MLX holds the interpreter's lock, and the default action would give another status.
    """
    assert RankError.exit_code == signal.SIGQUIT
    libc = ctypes.CDLL(None)
    libc.signal(signal.SIGQUIT, ctypes.cast(libc._exit, ctypes.c_void_p))


def _end(rank_pid: int, launcher: int, complaint: str) -> None:
    """End a rank that has waited too long, and the ranks of this host that it waits for, if they are stopped."""
    if not is_stopped(rank_pid):  # otherwise others wait for this one, and report it
        print_error(complaint)
    kill_stopped_ranks(launcher)
    write_status(RankError.exit_code, complaint)
    for number in (signal.SIGQUIT, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.kill(rank_pid, number)
        time.sleep(_SIGNAL_INTERVAL_S)
