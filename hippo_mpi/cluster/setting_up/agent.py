"""Sets a host up: this runs there, started by `session` through ssh, and ends with its standard input.

A line of JSON asks for one of CALLS, a line of JSON answers. Python 3.8 and its library only; nothing is judged here.
"""

from __future__ import annotations

import contextlib
import hmac
import json
import os
import platform
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import tarfile
import threading
import time
from collections.abc import Callable
from typing import Any, BinaryIO

from hippo_mpi.cluster.setting_up.changes import FOLDER, NAME, SILENCE_S, Record, add_line, remove, run

_IMPORT_S = 120.0
_PIP_S = 1800.0
_ECHO_S = 20.0
_MESSAGE = b"x" * 64


def _record(makes: bool = False) -> contextlib.closing[Record]:
    return contextlib.closing(Record(makes))


def hello() -> dict[str, Any]:
    """Return what this host and its Python are, and what is here of ours."""
    home, folder = os.path.expanduser("~"), os.path.expanduser(FOLDER)
    links = {name: os.readlink(os.path.join(folder, name)) for name in ("project", "venv") if _is_whole(folder, name)}
    return {
        "system": platform.system(), "machine": platform.machine(), "release": platform.release(), "home": home,
        "python": list(sys.version_info[:3]), "abi": sysconfig.get_config_var("SOABI") or "", "executable": sys.executable,
        "glibc": platform.libc_ver()[1] if platform.libc_ver()[0] == "glibc" else "", "macos": platform.mac_ver()[0],
        "free_bytes": shutil.disk_usage(home).free, "is_root": os.geteuid() == 0, "links": links,
        "has_record": os.path.exists(os.path.join(folder, NAME)),
    }  # fmt: skip


def _is_whole(folder: str, name: str) -> bool:
    path = os.path.join(folder, name)
    inside = _python_of(path) if name == "venv" else path  # whose Python may be gone, after a change of the system's
    return os.path.islink(path) and os.path.exists(inside)


def add_key(line: str) -> bool:
    """Let a public key in; return False if it was let in before."""
    with _record(makes=True) as record:
        return add_line(record, os.path.expanduser("~/.ssh/authorized_keys"), line)


class _Chunks:
    """What the other side sends, in chunks with their lengths before them; an empty one ends it."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream, self._left, self._is_over = stream, 0, False

    def read(self, size: int) -> bytes:
        """Return so many bytes; fewer at the end.

        Raises:
            EOFError: the connection was cut.
            TimeoutError: nothing comes any more: the other side's machine may be gone.
        """
        signal.alarm(SILENCE_S)
        try:
            return self._read(size)
        finally:
            signal.alarm(0)

    def _read(self, size: int) -> bytes:
        parts = []
        while size and not self._is_over:
            if not self._left:
                line = self._stream.readline()
                self._left = int(self._some(line[:-1] if line.endswith(b"\n") else b""))
                self._is_over = not self._left
            part = self._stream.read(min(size, self._left))
            self._left -= len(part)
            size -= len(part)
            parts.append(part if self._is_over else self._some(part))
        return b"".join(parts)

    @staticmethod
    def _some(data: bytes) -> bytes:
        if not data:
            raise EOFError("the connection was cut")
        return data

    def skip(self) -> None:
        """Read to the end."""
        while self.read(1 << 20):
            pass


def receive(chunks: _Chunks, name: str, link: str, is_environment: bool) -> None:
    """Unpack a tar archive that follows into a new folder of ours, and let a link lead there once it is whole."""
    with _record(makes=True) as record:
        _put(record, name, link, is_environment, lambda place: _unpack(chunks, place))


def _unpack(chunks: _Chunks, place: str) -> None:
    with tarfile.open(fileobj=chunks, mode="r|", bufsize=1 << 20) as archive:  # type: ignore[call-overload]
        for member in archive:
            if not (member.isfile() or member.isdir()) or member.name.startswith("/") or ".." in member.name.split("/"):
                raise ValueError(f"{member.name!r} has no place here")
            archive.extract(member, place, set_attrs=member.isfile())


def install(name: str, link: str, requirements: list[str]) -> None:
    """Make the environment by pip, with these versions."""

    def fill(place: str) -> None:
        words = [sys.executable, "-m", "pip", "--python", _python_of(place), "install", "--quiet", "--no-input"]
        if why := run([*words, "--disable-pip-version-check", *requirements], False, _PIP_S):
            raise RuntimeError(f"pip: {why}")

    with _record(makes=True) as record:
        _put(record, name, link, True, fill)


def _put(record: Record, name: str, link: str, is_environment: bool, fill: Any) -> None:
    """Make a folder beside its final place, and change places when it is whole; what was there before goes."""
    path, new = os.path.join(record.folder, name), os.path.join(record.folder, f"{name}.new")
    entries = [{"kind": "made", "of": "setup", "path": one} for one in (path, os.path.join(record.folder, link))]
    for entry in entries:
        record.begin(entry)
    try:
        remove(new)
        if is_environment:
            _make_environment(new)
            fill(new)
            _try_out(new)
        else:
            os.mkdir(new)
            fill(new)
        remove(path)
        os.rename(new, path)
    except BaseException:
        remove(new)
        raise
    temporary = os.path.join(record.folder, f"{link}.new")
    remove(temporary)
    os.symlink(name, temporary)
    os.replace(temporary, os.path.join(record.folder, link))
    for entry in entries:
        record.done(entry)
    for entry in list(record.entries):
        before = os.path.basename(entry.get("path", ""))
        if entry["kind"] == "made" and before.startswith(f"{link}-") and before != name:
            record.undo(entry)


def _python_of(environment: str) -> str:
    return os.path.join(environment, "bin", "python")


def _make_environment(place: str) -> None:
    import venv

    class Bare(venv.EnvBuilder):
        def setup_scripts(self, context: Any) -> None:
            """Leave the scripts out: they would name a path that changes."""

    Bare(symlinks=True).create(place)
    packages = os.path.join(place, "lib", f"python{sys.version_info[0]}.{sys.version_info[1]}", "site-packages")
    with open(os.path.join(packages, "hippo-mpi.pth"), "w") as file:
        file.write(os.path.join(os.path.expanduser(FOLDER), "project") + "\n")


def _try_out(environment: str) -> None:
    if why := run([_python_of(environment), "-c", "import mlx.core, hippo_mpi, numpy"], False, _IMPORT_S):
        raise RuntimeError(f"what was installed can't be imported: {why}")


# ---- settings


def apply(commands: list[dict[str, Any]], of: str, runs: bool) -> str:
    """Run commands, each written down before; return what failed first, or "".

    Args:
        commands: each with `do`, `undo`, and whether it needs `root`.
        of: the verb whose changes they are.
        runs: False: only write them down, for somebody else runs them.
    """
    with _record(makes=True) as record:
        for command in commands:
            entry = {"kind": "command", "of": of, **command}
            record.begin(entry)
            if runs:
                if why := run(command["do"], command["root"]):
                    return f"{' '.join(command['do'])}: {why}"
                record.done(entry)
    return ""


def confirm(commands: list[dict[str, Any]]) -> None:
    """Write down that commands were run by somebody else."""
    with _record() as record:
        for command in commands:
            record.done({"kind": "command", **command})


def changes() -> list[dict[str, Any]]:
    """Return the record."""
    try:
        with _record() as record:
            return record.entries
    except FileNotFoundError:
        return []


def undo(of: list[str], is_root_done: bool) -> dict[str, list[str]]:
    """Put back what these verbs changed, the last change first; return what can't be, and what else is in our folder.

    Args:
        of: the verbs.
        is_root_done: whether somebody else has put back what needs root.
    """
    failed: list[str] = []
    try:
        with _record() as record:
            for entry in reversed(list(record.entries)):
                if entry["of"] in of:
                    try:
                        record.forget(entry) if is_root_done and entry.get("root") else record.undo(entry)
                    except (OSError, RuntimeError) as error:
                        failed.append(str(error))
            return {"failed": failed, "left": record.end()}
    except FileNotFoundError:
        return {"failed": [], "left": []}


def outputs(commands: dict[str, list[str]]) -> dict[str, str | None]:
    """Return what commands print that change nothing; None: a command isn't there, or fails."""
    found: dict[str, str | None] = {}
    for name, words in commands.items():
        try:
            ended = subprocess.run(words, stdin=subprocess.DEVNULL, capture_output=True, timeout=10)
            found[name] = None if ended.returncode else ended.stdout.decode("utf-8", "replace")
        except (OSError, subprocess.SubprocessError):
            found[name] = None
    return found


# ---- links


def listen(address: str, key: str) -> int:
    """Answer messages on an address, to whoever knows a key, for some seconds; return the port."""
    listener = socket.socket()
    listener.bind((address, 0))
    listener.listen(4)
    listener.settimeout(_ECHO_S)
    threading.Thread(target=_echo, args=(listener, key.encode()), daemon=True).start()
    return int(listener.getsockname()[1])


def _echo(listener: socket.socket, key: bytes) -> None:
    with contextlib.suppress(OSError), listener:
        while True:
            peer, _ = listener.accept()
            with contextlib.suppress(OSError), peer:
                peer.settimeout(_ECHO_S)
                peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                if hmac.compare_digest(peer.recv(len(key), socket.MSG_WAITALL), key):
                    while data := peer.recv(len(_MESSAGE)):
                        peer.sendall(data)


def round_trips(address: str, port: int, key: str, count: int) -> list[float]:
    """Return how long messages took to come back from a listener, in ms."""
    found = []
    with socket.create_connection((address, port), 5) as peer:
        peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        peer.sendall(key.encode())
        for _ in range(count):
            began_s = time.perf_counter()
            peer.sendall(_MESSAGE)
            if peer.recv(len(_MESSAGE), socket.MSG_WAITALL) != _MESSAGE:
                raise OSError("somebody else answers there")
            found.append((time.perf_counter() - began_s) * 1e3)
    return found


CALLS: dict[str, Callable[..., Any]] = {
    one.__name__: one
    for one in (hello, add_key, receive, install, apply, confirm, changes, undo, outputs, listen, round_trips)
}  # fmt: skip


def _fall_silent(number: int, frame: object) -> None:
    raise TimeoutError("nothing came any more")


def serve() -> None:
    """Answer calls until the input ends."""
    signal.signal(signal.SIGALRM, _fall_silent)
    for line in iter(sys.stdin.buffer.readline, b""):
        request = json.loads(line)
        stream = {"chunks": _Chunks(sys.stdin.buffer)} if request["call"] == receive.__name__ else {}
        try:
            answer = {"result": CALLS[request["call"]](**stream, **request["arguments"])}
        except BlockingIOError:
            answer = {"error": f"another set-up of {socket.gethostname()} is running; wait for its end"}
        except OSError as error:
            path = f"{error.filename}: " if error.filename else ""
            answer = {"error": f"{path}{error.strerror or error}"}
        except Exception as error:  # the other side shows it
            answer = {"error": " ".join(str(error).split()) or repr(error)}
        sys.stdout.buffer.write(json.dumps(answer).encode() + b"\n")
        sys.stdout.buffer.flush()
        for chunks in stream.values():  # of which nothing more is wanted
            chunks.skip()
