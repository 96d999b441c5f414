"""Where histories happen: a server with two models, a disk that may be full, and ranks that may be hurt in every way."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from hippo_mpi.config.bundled import BUNDLED_MODEL
from tests import ranks
from tests.histories.kinds import OTHER, THINKS
from tests.servers import FAULTS, WITH_FAULTS, Server, server

TIMEOUT_S = 4
_DISK = "8m"
_TEMPLATE = """{% if tools %}<|system|>
<tool_call>{{ tools | tojson }}</tool_call>
{% endif %}{% for message in messages %}<|{{ message.role }}|>
{{ message.content }}{% for tool_call in message.tool_calls or [] %}<tool_call>{{ tool_call.name }}{% endfor %}<|end|>
{% endfor %}<|assistant|>
{% if enable_thinking %}<think>{% else %}<think></think>{% endif %}"""
SIGNALS = {
    "kill": FAULTS["killed"], "stop": FAULTS["stopped"], "raise": FAULTS["raises"], "cut": FAULTS["loses its links"],
    "half cut": signal.SIGRTMIN + 1, "slow": signal.SIGRTMIN + 2, "silent": signal.SIGRTMIN + 3,
}  # fmt: skip
PASS_BY = {"stop": signal.SIGCONT, "slow": signal.SIGRTMIN + 4, "silent": signal.SIGRTMIN + 4}
"""What ends a fault that doesn't last for good."""
_COUNT = signal.SIGRTMIN + 5


class Stage:
    """A server, and what may befall it.

    Args:
        disk: where its audit log and its journal are; None: no disk of its own could be made.
        counts: where its processes write what they have.
        start_s: that its first start took.
    """

    def __init__(self, running: Server, disk: Path | None, counts: Path, start_s: float) -> None:
        self.running, self.start_s = running, start_s
        self._disk, self._counts = disk, counts

    @property
    def fault_kinds(self) -> list[str]:
        return [*SIGNALS, "swap", *(["full disk"] if self._disk else [])]

    @property
    def front_pid(self) -> int:
        return self.running.running.process.pid

    def rank_pid(self, rank: int) -> int | None:
        """The rank's process as it is now, which may be about to start, or None."""
        return max(self._ranks().get(rank, ()), default=None)

    def _ranks(self) -> dict[int, list[int]]:
        """The front's children that are ranks, also those that were to have ended."""
        found: dict[int, list[int]] = {}
        for pid in _children(self.front_pid):
            for rank in (0, 1):
                if f"MLX_RANK={rank}".encode() in environment(pid):
                    found.setdefault(rank, []).append(pid)
        return found

    def strike(self, kind: str, rank: int) -> int | None:
        """Hurt a rank (None: there is none just now), and return which process it was."""
        pid = self.rank_pid(rank)
        if pid is not None:
            _signal(pid, SIGNALS[kind])
        return pid

    def pass_by(self, kind: str, pid: int) -> None:
        """A fault of a process is over, if that still runs: it may have been killed and replaced long since."""
        _signal(pid, PASS_BY[kind])

    @contextlib.contextmanager
    def full_disk(self) -> Iterator[None]:
        assert self._disk
        # It may be full twice at once.
        with tempfile.NamedTemporaryFile("wb", buffering=0, dir=self._disk, prefix="filler-") as file:
            with contextlib.suppress(OSError):
                for size in (1 << 16, 1 << 8, 1):
                    with contextlib.suppress(OSError):
                        while True:
                            file.write(bytes(size))
            yield

    def count(self, names: Sequence[str] = ("front", "rank 0", "rank 1")) -> dict[str, dict[str, Any]]:
        """What front and ranks have: threads, tasks, slots, descriptors and memory. Ranks that are about to start must not
        be asked."""
        who = {"front": self.front_pid, "rank 0": self.rank_pid(0), "rank 1": self.rank_pid(1)}
        return {name: self._count_of(pid) for name in names if (pid := who[name]) is not None}

    def _count_of(self, pid: int) -> dict[str, Any]:
        path = self._counts / f"{pid}.json"
        path.unlink(missing_ok=True)
        os.kill(pid, _COUNT)
        ends = time.monotonic() + 10
        while not path.exists():
            assert time.monotonic() < ends, f"process {pid} doesn't tell what it has"
            time.sleep(0.01)
        found = {"descriptors": len(os.listdir(f"/proc/{pid}/fd")), "children": len(_children(pid))}
        return {**json.loads(path.read_text()), **found, "MiB": round(resident_mib(pid), 1)}

    def strays(self) -> list[int]:
        """Processes of this server that are no longer below its front, and ranks of before."""
        below = {self.front_pid, *ranks.descendants(self.front_pid)}
        lost = [pid for pid in processes_with(f"HIPPO_COUNTS={self._counts}".encode()) if pid not in below]
        return lost + [pid for pids in self._ranks().values() for pid in pids if pid != max(pids)]

    def audit_fault(self) -> str:
        """What the auditor says of the log; "" if it is whole."""
        if self._disk is None:
            return ""
        command = [str(ranks.BIN / "hippo_mpi.audit"), "verify", str(self._disk / "audit.jsonl")]
        found = subprocess.run(command, capture_output=True, text=True)
        return found.stderr.strip() if found.returncode else ""


def resident_mib(pid: int) -> float:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def environment(pid: int) -> list[bytes]:
    """What a process was started with; nothing if it is gone."""
    try:
        return Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:
        return []


def processes_with(mark: bytes) -> list[int]:
    """All that were started with NAME=VALUE in their environment, whoever their parent is; no zombies."""
    pids = (int(path.name) for path in Path("/proc").iterdir() if path.name.isdigit())
    return [pid for pid in pids if mark in environment(pid)]


def _signal(pid: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def _children(pid: int) -> list[int]:
    found = subprocess.run(["ps", "--ppid", str(pid), "-o", "pid="], capture_output=True, text=True).stdout
    return [int(word) for word in found.split()]


@contextlib.contextmanager
def stage(*options: str) -> Iterator[Stage]:
    """A server with a catalogue of two models."""
    with tempfile.TemporaryDirectory(prefix="hippo-histories-") as name, contextlib.ExitStack() as stack:
        folder = Path(name)
        counts = folder / "counts"
        counts.mkdir()
        _make_catalogue(folder / "catalogue")
        disk = stack.enter_context(_small_disk(folder / "disk"))
        files = ["--audit-log", str(disk / "audit.jsonl"), "--journal", str(disk / "journal")] if disk else []
        given = [
            "--catalogue", str(folder / "catalogue"), "--model", THINKS, "--timeout", str(TIMEOUT_S), "--max-restarts", "20",
            "--max-batch-size", "12", "--max-queue", "100", "--prefill-step-size", "64",
            "--seed", "5", *files, *options,
        ]  # fmt: skip
        began = time.monotonic()
        with server(*given, env={**WITH_FAULTS, "HIPPO_COUNTS": str(counts)}) as running:
            yield Stage(running, disk, counts, time.monotonic() - began)


@contextlib.contextmanager
def _small_disk(folder: Path) -> Iterator[Path | None]:
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={_DISK}", "none", str(folder)]
    if os.geteuid() != 0 or subprocess.run(command, capture_output=True).returncode:
        yield None
        return
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def _make_catalogue(folder: Path) -> None:
    """The bundled model and its draft with marks for thoughts in their tokenizer, and the one with another tokenizer."""
    folder.mkdir()
    for name in ("story-3m", "story-draft"):
        model = folder / "models" / name
        model.mkdir(parents=True)
        for path in (BUNDLED_MODEL.parent / name).iterdir():
            (model / path.name).symlink_to(path)
        for file, text in (
            ("chat_template.jinja", _TEMPLATE),
            ("tokenizer.json", _with_thoughts(model / "tokenizer.json")),
        ):
            (model / file).unlink()
            (model / file).write_text(text)
    draft = folder / "models" / "story-draft"
    # In float32, tokens are those that a stream gets alone, with drafts and without.
    (folder / f"{THINKS}.yaml").write_text(
        f"model: {folder / 'models' / 'story-3m'}\nprecision: float32\ndraft-model: {draft}\n"
    )
    (folder / f"{OTHER}.yaml").write_text(
        f"model: {BUNDLED_MODEL.parent / 'story-other-tokenizer'}\nprecision: float32\n"
    )


def _with_thoughts(path: Path) -> str:
    content = json.loads(path.read_text())
    first = max(max(content["model"]["vocab"].values()), *(token["id"] for token in content["added_tokens"])) + 1
    like = {**content["added_tokens"][0], "special": False}
    content["added_tokens"] += [
        {**like, "id": first + i, "content": mark} for i, mark in enumerate(("<think>", "</think>"))
    ]
    return json.dumps(content)
