"""What setup changes on a host can be put back, byte by byte, also after a kill between any two steps; in one process."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import stat
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from hippo_mpi.cluster.setting_up import agent, changes
from tests.small_disk import fill, small_disk

KEY = "ssh-ed25519 AAAA somebody@somewhere"
SETTING = {"do": ["sh", "-c", "echo new >~/setting"], "undo": ["sh", "-c", "echo old >~/setting"], "root": False}
OTHER = {"do": ["mkdir", "-p", "made"], "undo": ["rmdir", "made"], "root": False}  # which can be undone only once
CHANGING = ("rename", "replace", "symlink", "mkdir", "unlink", "rmdir", "fsync")


def archive(files: dict[str, bytes]) -> bytes:
    """A stream as setup sends it."""
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w|") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    parts = [data.getvalue()[place : place + 3000] for place in range(0, len(data.getvalue()), 3000)]
    return b"".join(b"%d\n%b" % (len(part), part) for part in parts) + b"0\n"


FIRST = archive({"hippo_mpi/__init__.py": b"1", "models/a.json": b"{}" * 4000})
SECOND = archive({"hippo_mpi/__init__.py": b"2"})


def receive(name: str, data: bytes) -> None:
    agent.receive(agent._Chunks(io.BytesIO(data)), name=name, link="project", is_environment=False)


def set_up() -> None:
    agent.add_key(KEY)
    receive("project-1", FIRST)
    assert agent.apply([SETTING, OTHER], of="setup", runs=True) == ""
    receive("project-2", SECOND)


def put_back() -> None:
    assert agent.undo(["setup", "tune"], is_root_done=False) == {"failed": [], "left": []}


def state(home: Path) -> dict[str, str]:
    """Everything but the record, whose notes of what was begun differ."""
    found = {}
    for path in sorted(home.rglob("*")):
        mode = stat.filemode(path.lstat().st_mode)
        content = os.readlink(path) if path.is_symlink() else path.read_text() if path.is_file() else ""
        found[str(path.relative_to(home))] = f"{mode} {content if path.name != changes.NAME else ''}"
    return found


def in_child(home: Path, work: Callable[[], None], kill_at: int = 0) -> bool:
    """Run in a process of its own, which is killed before so many changes; return whether it came to its end."""
    pid = os.fork()
    if pid:
        return os.waitpid(pid, 0)[1] == 0
    os.environ["HOME"] = str(home)
    os.chdir(home)
    left = kill_at

    def counted(function: Callable[..., object]) -> Callable[..., object]:
        def call(*words: object, **named: object) -> object:
            nonlocal left
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*words, **named)

        return call

    for name in CHANGING:
        setattr(os, name, counted(getattr(os, name)))
    subprocess.run = counted(subprocess.run)  # type: ignore[assignment]
    try:
        work()
    except BaseException as error:
        os.write(2, f"{error!r}\n".encode())
        os._exit(1)
    os._exit(0)


@pytest.fixture(params=["nothing", "other keys"])
def home(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    memory = Path("/dev/shm")  # where it costs nothing to wait for the disk
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else tmp_path) as folder:
        yield home_in(Path(folder) / "home", request.param)


def home_in(home: Path, kind: str) -> Path:
    home.mkdir()
    (home / "setting").write_text("old\n")
    if kind == "other keys":
        (home / ".ssh").mkdir(mode=0o700)
        (home / ".ssh" / "authorized_keys").write_text("ssh-rsa BBBB another")  # without a newline at its end
        (home / ".ssh" / "authorized_keys").chmod(0o640)
    return home


def copied(home: Path, number: int) -> Path:
    """Another home, in whose record the paths are its own."""
    place = Path(shutil.copytree(home, home.with_name(f"home-{number}"), symlinks=True))
    for record in place.glob(f".hippo-mpi/{changes.NAME}*"):
        record.write_text(record.read_text().replace(f"{home}/", f"{place}/"))
    return place


@pytest.mark.slow
def test_killed_at_any_step_all_goes_on_or_back(home: Path) -> None:
    before = state(home)
    whole = copied(home, 0)
    assert in_child(whole, set_up)
    wanted = state(whole)
    assert wanted[".hippo-mpi/project"].endswith("project-2") and "project-1" not in str(wanted)
    assert in_child(whole, put_back) and state(whole) == before
    for kill_at in range(1, 1000, 1 if len(before) == 1 else 4):
        going_on = copied(home, kill_at)
        if in_child(going_on, set_up, kill_at):
            break
        going_back = copied(going_on, 1000 + kill_at)
        assert in_child(going_on, set_up) and state(going_on) == wanted, kill_at
        assert in_child(going_back, put_back) and state(going_back) == before, kill_at
    assert kill_at > 30


@pytest.mark.slow
def test_killed_while_it_puts_back_it_goes_on(home: Path) -> None:
    before = state(home)
    whole = copied(home, 0)
    assert in_child(whole, set_up)
    for kill_at in range(1, 1000, 1 if len(before) == 1 else 4):
        place = copied(whole, kill_at)
        if in_child(place, put_back, kill_at):
            break
        assert in_child(place, put_back) and state(place) == before, kill_at
    assert kill_at > 10


def test_what_others_did_meanwhile_stays(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(home)
    set_up()
    keys = home / ".ssh" / "authorized_keys"
    keys.write_text(f"{keys.read_text()}ssh-rsa CCCC later\n")
    (home / ".hippo-mpi" / "models").mkdir()
    assert agent.undo(["setup"], is_root_done=False) == {"failed": [], "left": ["models"]}
    assert keys.read_text().splitlines()[-1] == "ssh-rsa CCCC later" and KEY not in keys.read_text()
    assert os.listdir(home / ".hippo-mpi") == ["models"]


def test_a_stream_that_is_cut_leaves_nothing(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At each byte, also between two files and before the last one's end."""
    monkeypatch.setenv("HOME", str(home))
    receive("project-1", FIRST)
    wanted = state(home)
    for end in {*range(0, len(SECOND), 97), len(SECOND) - 1, len(SECOND) - 2}:
        with pytest.raises((EOFError, tarfile.TarError)):
            receive("project-2", SECOND[:end])
        assert state(home) == wanted, end


def test_a_disk_that_is_full_in_the_middle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with small_disk(tmp_path / "disk") as disk:
        monkeypatch.setenv("HOME", str(disk))
        receive("project-1", SECOND)
        wanted = state(disk)
        filler = fill(disk)
        filler.write_bytes(bytes(filler.stat().st_size - 20_000))
        with pytest.raises(OSError, match="No space"):
            receive("project-2", archive({"large": bytes(40_000)}))
        assert {name: what for name, what in state(disk).items() if name != "filler"} == wanted
        filler.unlink()
        receive("project-2", FIRST)
        assert (disk / ".hippo-mpi" / "project" / "models" / "a.json").read_bytes() == b"{}" * 4000


@pytest.mark.parametrize("name", ["../out", "/etc/x", "a/../../out"])
def test_files_that_would_be_elsewhere_are_refused(name: str, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(home))
    with pytest.raises(ValueError, match="has no place here"):
        receive("project-1", archive({name: b"x"}))
    assert not (home / ".hippo-mpi" / "project").exists() and not (home / "out").exists()


def test_a_command_that_fails_ends_the_rest(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(home)
    bad = {"do": ["sh", "-c", "echo no way >&2; exit 1"], "undo": ["false"], "root": False}
    assert agent.apply([SETTING, bad, OTHER], of="tune", runs=True) == "sh -c echo no way >&2; exit 1: no way"
    assert (home / "setting").read_text() == "new\n" and not (home / "made").exists()
    put_back()
    assert (home / "setting").read_text() == "old\n" and not (home / ".hippo-mpi").exists()


def test_one_at_a_time(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setattr(changes, "_LOCK_S", 0.3)
    first = changes.Record(makes=True)
    with pytest.raises(BlockingIOError):
        changes.Record()
    first.close()
    changes.Record().close()


def test_a_record_that_cannot_be_read_is_not_overwritten(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(home))
    (home / ".hippo-mpi").mkdir()
    (home / ".hippo-mpi" / changes.NAME).write_text('{"chan')
    with pytest.raises(ValueError, match="can't be read: move it away"):
        receive("project-1", FIRST)
    assert (home / ".hippo-mpi" / changes.NAME).read_text() == '{"chan'


def test_the_agent_ends_when_nothing_comes_any_more() -> None:
    """Its starter's machine may be gone without a word."""
    code = (
        "import io, os; from hippo_mpi.cluster.setting_up import agent, changes; agent.SILENCE_S = 1; import signal;"
        "signal.signal(signal.SIGALRM, agent._fall_silent); read, _ = os.pipe();"
        "agent._Chunks(os.fdopen(read, 'rb')).read(5)"
    )
    began_s = time.monotonic()
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30)
    assert "TimeoutError: nothing came any more" in found.stderr and time.monotonic() - began_s < 20


def test_it_is_python_3_8() -> None:
    """Hosts may have no later one to begin with."""
    import ast

    for module in (changes, agent):
        ast.parse(Path(module.__file__ or "").read_text(), feature_version=(3, 8))
    assert json.dumps(agent.hello())
