"""Programs that sync asks through pipes: few, dying, silent, or none at all; and a hub that sends whole files only."""

from __future__ import annotations

import os
import sys
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from hippo_mpi.checkpoint import hub_place
from hippo_mpi.checkpoint.hub_spans import NoRangesError
from hippo_mpi.cluster.hostfile import Host
from hippo_mpi.cluster.sync import needs
from hippo_mpi.cluster.sync import site as sites
from hippo_mpi.cluster.sync.links import Links
from hippo_mpi.cluster.sync.model_files import ModelFiles
from hippo_mpi.cluster.sync.needs import Needs
from hippo_mpi.cluster.sync.pieces import Piece
from hippo_mpi.cluster.sync.session import HostState, SyncSession
from hippo_mpi.cluster.sync.site import LostError, RefusalError, Site, command_of
from hippo_mpi.cluster.sync.transfer import HERE, HOSTS, Transfer
from hippo_mpi.errors import RankError, UserError

START_S = 30.0
# Answers what is asked; the first argument is a file that only one process may create, the second what happens else.
PROGRAM = """
import os, sys, time
from hippo_mpi.cluster.sync.frames import MARK, FrameError, Frames
try:
    os.close(os.open(sys.argv[1], os.O_CREAT | os.O_EXCL))
except FileExistsError:
    if sys.argv[2] == "refuse":
        sys.exit("too many of us")
frames = Frames(0, 1, 60)
frames.write(b"Welcome\\n" + MARK)
frames.receive()
try:
    while True:
        header, data = frames.receive()
        if header["op"] == "die":
            sys.stderr.write("out of\\x1b[2J memory\\n")
            sys.exit(1)
        for step in range(1, header.get("steps", 1) + 1):
            time.sleep(0.05)
            frames.send({"goes_on": step if header["op"] != "stall" else True})
        frames.send({"error": "no"} if header["op"] == "fail" else {"pid": os.getpid(), "is_good": header.get("n") != 1}, data)
except FrameError:
    pass
"""


def site(tmp_path: Path, what: str = "", command: list[str] | None = None) -> Site:
    words = [sys.executable, "-c", PROGRAM, str(tmp_path / "first"), what]
    return Site("mini2", command or words, {"model": {}}, START_S, {**os.environ})


def test_a_host_that_takes_fewer_programs_is_asked_through_those(tmp_path: Path) -> None:
    here = site(tmp_path, "refuse")
    with ThreadPoolExecutor(6) as pool:
        answers = list(pool.map(lambda n: here.ask({"op": "x"}, bytes([n]))[0], range(12)))
    assert len({answer["pid"] for answer in answers}) == 1 and not here.lost
    with pytest.raises(RefusalError, match=r"^no$"):
        here.ask({"op": "fail"})
    assert here.ask({"op": "x"}, b"abc")[1] == b"abc"
    here.close()


def test_a_program_that_dies_takes_its_site_along(tmp_path: Path) -> None:
    """With its last words, from which a terminal has nothing to fear."""
    here = site(tmp_path)
    with pytest.raises(LostError, match=r"^out of\\x1b\[2J memory$"):
        here.ask({"op": "die"})
    with pytest.raises(LostError, match="memory"):
        here.ask({"op": "x"})


@pytest.mark.slow
def test_a_program_that_goes_on_for_ever_and_does_nothing_is_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sites, "_STALLED_S", 0.5)
    here = site(tmp_path)
    assert here.ask({"op": "x", "steps": 20})[0]["pid"]
    with pytest.raises(LostError, match="has done nothing"):
        here.ask({"op": "stall", "steps": 200})


@pytest.mark.parametrize(
    ("command", "kind", "told"),
    [
        (["sh", "-c", "echo no such module >&2; exit 1"], RefusalError, "can't run there: no such module"),
        (["sh", "-c", "echo no route >&2; exit 255"], LostError, "^no route$"),
        (["sh", "-c", "cat; exit 255"], LostError, "ended|moved"),
        (["/no/such/program"], RefusalError, "can't be started: No such file"),
    ],
)
def test_a_program_that_does_not_start(
    command: list[str], kind: type[Exception], told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = Site("mini2", command, {}, 0.2, {**os.environ})
    with pytest.raises(kind, match=told):
        one.ask({"op": "open"})
    assert one.lost


def test_the_host_is_one_word_of_a_command_that_every_shell_understands() -> None:
    command = command_of(Host("anna@mini2", python="~/it's here/python"))
    assert command[0] == "ssh" and command[-2] == "anna@mini2"
    assert command[-1] == "exec ~/'it'\"'\"'s here/python' -m hippo_mpi.cluster.sync.place"
    assert command_of(Host("127.0.0.1"))[0] == sys.executable


class Scripted(Site):
    """A host in this process, with bytes that can be wrong a number of times."""

    def __init__(self, name: str, data: bytes = b"", wrong: int = 0, lost: str = "") -> None:
        self.name, self.lost, self.data, self.wrong, self.put = name, lost, data, wrong, {}  # type: ignore[var-annotated]

    def ask(self, header: dict[str, Any], data: Any = b"") -> tuple[dict[str, Any], bytearray]:
        if self.lost:
            raise LostError(self.lost)
        if self.wrong:
            self.wrong -= 1
            return {"is_good": False, "digest": "other"}, bytearray(self.data)
        if header["op"] == "put":
            self.put[header["start"]] = bytes(data)
            return {"is_good": True}, bytearray()
        piece = self.data[header["start"] : header["stop"]]
        return {"digest": hub_place.hashlib.sha256(piece).hexdigest()}, bytearray(piece)


def links_of(sites: list[Scripted]) -> Links:
    """No hostfile names addresses: all goes by ssh."""
    return Links(sites, [() for _ in sites], lambda line: None)


def test_a_piece_comes_from_the_next_that_has_it_and_is_sent_until_it_arrives(tmp_path: Path) -> None:
    goal, gone, good = Scripted("a", wrong=2), Scripted("b", lost="cut"), Scripted("c", b"abcdef", wrong=1)
    sites = [goal, gone, good, Scripted("here")]
    transfer = Transfer(sites, tmp_path, None, links_of(sites), lambda number, count: None)
    transfer.run([Piece("f", 1, 3, (0,), (1, 2)), Piece("f", 3, 6, (0,), (1, 2))])
    assert goal.put == {1: b"bc", 3: b"def"} and not transfer.failures and transfer.arrived == [5, 0, 0, 0]
    assert transfer.num_bytes[HERE] == 0 and transfer.num_bytes[HOSTS] >= 5


@pytest.mark.parametrize(
    ("goal", "holders", "told"),
    [(Scripted("a", wrong=9), (1,), "doesn't arrive"), (Scripted("a"), (), "no host has bytes 0 to 3 of f"),
     (Scripted("a", lost="cut"), (1,), "cut"), (Scripted("a"), (2,), "c: cut")],
)  # fmt: skip
def test_a_host_that_can_not_be_filled_does_not_keep_others_from_it(
    goal: Scripted, holders: tuple[int, ...], told: str, tmp_path: Path
) -> None:
    other = Scripted("d")
    sites = [goal, Scripted("b", b"abc"), Scripted("c", lost="cut"), other, Scripted("here")]
    transfer = Transfer(sites, tmp_path, None, links_of(sites), lambda number, count: None)
    transfer.run([Piece("f", 0, 3, (0,), holders), Piece("f", 0, 3, (3,), (1,))])
    assert told in transfer.failures[0] and 3 not in transfer.failures and other.put == {0: b"abc"}


def test_of_a_hub_without_ranges_whole_files_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "f").write_bytes(b"abcdef")

    def refuse(*_: Any) -> bytes:
        raise NoRangesError

    monkeypatch.setattr(hub_place, "read_all", refuse)
    monkeypatch.setattr(hub_place, "hf_hub_download", lambda *_, **__: str(tmp_path / "f"))
    model = ModelFiles("a/b", "ab" * 20, {"f": 6}, "a/b", "main")
    assert hub_place.read_piece(model, "f", (2, 4), lambda: None) == b"cd"


# ---- hosts that answer anything

WELL = {"free": 1 << 40, "small": {}, "is_kept": False, "is_made": False, "folder": "f", "here": {}}


@pytest.mark.parametrize(
    ("op", "answer"),
    [
        ("open", WELL | {"free": float("inf")}), ("open", WELL | {"free": "1"}), ("open", WELL | {"here": 5}),
        ("verify", {}), ("verify", {"bad": "x", "unchecked": 0}), ("verify", {"bad": 0, "unchecked": float("inf")}),
    ],
)  # fmt: skip
def test_a_host_that_answers_rubbish_is_left_out_and_the_other_goes_on(op: str, answer: Any, tmp_path: Path) -> None:
    files = ModelFiles("story", "ab" * 32, {"model.safetensors": 10}, origin="/story")
    wanted = Needs(files, tmp_path, {}, [], None, [])
    hosts = [HostState(Host(name), [0], {}) for name in ("mini2", "127.0.0.1")]
    session = SyncSession(hosts, wanted, "/", {}, {}, START_S)
    good = {"open": WELL, "verify": {"bad": 1, "unchecked": 2}}
    session._sites = [Answering(good | {op: answer}), Answering(good)]  # type: ignore[list-item]
    session.verify()
    assert [state.error for state in hosts] == [hosts[0].error, ""] and "can't be read" in hosts[0].error
    assert (hosts[0].code, hosts[1].damaged, hosts[1].unchecked) == (2, 1, 2)


class Answering:
    """A site that always says the same."""

    def __init__(self, answers: dict[str, Any]) -> None:
        self._answers = answers

    def ask(self, asked: dict[str, Any]) -> tuple[Any, bytes]:
        return self._answers[asked["op"]], b""


def test_of_a_host_that_prints_without_end_only_the_end_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    said = '{"memory_bytes": 5, "bytes_per_s": 1, "flops_per_s": 1}'
    script = f"yes | head -c 9000000; echo; echo '{said}'"
    tracemalloc.start()
    try:
        monkeypatch.setattr(needs, "command_of", lambda *_: ["sh", "-c", script])
        (found,) = needs.introduce([Host("mini2")], START_S, {**os.environ})
        assert found["memory_bytes"] == 5 and tracemalloc.get_traced_memory()[1] < 4 << 20
        monkeypatch.setattr(needs, "command_of", lambda *_: ["sh", "-c", "yes '[' | head -n 9000 | tr -d '\\n'"])
        with pytest.raises(UserError, match="mini2 says of itself what can't be read"):
            needs.introduce([Host("mini2")], START_S, {**os.environ})
        monkeypatch.setattr(needs, "command_of", lambda *_: ["yes"])
        monkeypatch.setattr(needs, "_MLX_S", 0.0)
        with pytest.raises(RankError, match="mini2: no answer within"):
            needs.introduce([Host("mini2")], 0.3, {**os.environ})
    finally:
        tracemalloc.stop()
