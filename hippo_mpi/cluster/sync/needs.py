"""Asks this machine's Python which bytes each host needs, and the hosts' Pythons what they are. Loads no MLX."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from hippo_mpi.cluster.hostfile import Host
from hippo_mpi.cluster.sync.model_files import ModelFiles, check_name, read_spans
from hippo_mpi.cluster.sync.site import command_of
from hippo_mpi.errors import ForeignError, RankError, UserError, error_with_status
from hippo_mpi.transport.ports import THIS_MACHINE
from hippo_mpi.units import visible
from hippo_mpi.views.spans import Span

_MODULE = "hippo_mpi.runtime.model_needs"
_MLX_S = 60.0  # for a Python to load MLX and to look at its machine
_SSH_FAILED = 255
_LAST_WORDS_S = 2.0
_MAX_SAID_BYTES = 1 << 16


@dataclass(frozen=True)
class Needs:
    """What is to be where.

    Args:
        files: the model.
        folder: where it is on this machine.
        heads: sizes of the heads of weight files.
        small: names of the small files.
        counts: layers of each rank; None: every rank gets the whole model.
        by_rank: spans by files.
    """

    files: ModelFiles
    folder: Path
    heads: Mapping[str, int]
    small: Sequence[str]
    counts: Sequence[int] | None
    by_rank: Sequence[Mapping[str, Sequence[Span]]]


def ask_needs(question: Mapping[str, Any], environment: Mapping[str, str]) -> Needs:
    """Return what each rank needs, by a program that loads MLX.

    Raises:
        HippoError: its own, such as that there is no such model.
    """
    ended = subprocess.run(
        [sys.executable, "-m", _MODULE], input=json.dumps(question), capture_output=True, text=True, env=environment
    )
    if ended.returncode:
        lines = [line for line in ended.stderr.splitlines() if line.startswith("error: ")]
        line = lines[-1].removeprefix("error: ") if lines else f"{_MODULE}: {visible(ended.stderr[-300:])}"
        raise error_with_status(ended.returncode if ended.returncode > 0 else ForeignError.exit_code, line)
    found = json.loads(ended.stdout)
    files = ModelFiles.from_object(found["files"])
    return Needs(
        files, Path(found["folder"]), found["heads"], [name for name in found["small"] if _is_name(name)],
        found["counts"], [read_spans(spans, files.sizes) for spans in found["needs"]],
    )  # fmt: skip


def _is_name(name: str) -> bool:
    try:
        return bool(check_name(name))
    except UserError:
        return False


def introduce(hosts: Sequence[Host], timeout_s: float, environment: Mapping[str, str]) -> list[dict[str, Any]]:
    """Return memory and speeds of each host, as its rank would say.

    Raises:
        HippoError: one doesn't say; the layers can't be shared out then.
    """
    with ThreadPoolExecutor(len(hosts)) as pool:
        return list(pool.map(lambda host: _introduce(host, timeout_s, environment), hosts))


def _run(
    command: Sequence[str], timeout_s: float, environment: Mapping[str, str]
) -> subprocess.CompletedProcess[bytes]:
    """Run a command; return the end of what it prints, which may be without end.

    Raises:
        OSError, subprocess.TimeoutExpired: it can't be started, or doesn't end.
    """
    said = bytearray(), bytearray()
    process = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment
    )
    streams = zip((process.stdout, process.stderr), said, strict=True)
    readers = [threading.Thread(target=_keep_end, args=one, daemon=True) for one in streams]
    for reader in readers:
        reader.start()
    try:
        code = process.wait(timeout_s)
    finally:
        process.kill()
        process.wait()
    for reader in readers:
        reader.join(_LAST_WORDS_S)
    return subprocess.CompletedProcess(command, code, bytes(said[0]), bytes(said[1]))


def _keep_end(stream: BinaryIO, said: bytearray) -> None:
    with stream:
        while data := os.read(stream.fileno(), _MAX_SAID_BYTES):
            said += data
            del said[:-_MAX_SAID_BYTES]


def _introduce(host: Host, timeout_s: float, environment: Mapping[str, str]) -> dict[str, Any]:
    command = command_of(host, f"-m {_MODULE} --introduce", timeout_s)
    try:
        ended = _run(command, timeout_s + _MLX_S, environment)
    except subprocess.TimeoutExpired:
        raise RankError(f"{host.ssh}: no answer within {timeout_s + _MLX_S:.0f} s") from None
    except OSError as error:
        raise UserError(f"{command[0]} can't be started: {error.strerror}") from None
    lines = [line for line in ended.stderr.decode(errors="replace").splitlines() if line.strip()]
    if ended.returncode:
        why = visible(lines[-1]) if lines else f"exit status {ended.returncode}"
        kind = RankError if ended.returncode == _SSH_FAILED and host.ssh != THIS_MACHINE else UserError
        raise kind(f"{host.ssh} doesn't say what it is: {why}")
    try:
        said = json.loads(ended.stdout.splitlines()[-1])  # before it a shell's greeting
        numbers = {name: float(said[name]) for name in ("memory_bytes", "bytes_per_s", "flops_per_s")}
        if not all(0 < number < float("inf") for number in numbers.values()):
            raise ValueError
        return {"host": host.ssh, "given_speed": host.speed, **numbers, "memory_bytes": int(numbers["memory_bytes"])}
    except (ValueError, KeyError, TypeError, IndexError, OverflowError, RecursionError):
        raise UserError(f"{host.ssh} says of itself what can't be read: {visible(repr(ended.stdout[-200:]))}") from None
