"""Programs that are sent to hosts: what they read, and how they begin and end, as real processes of this machine."""

from __future__ import annotations

import ast
import asyncio
import contextlib
import json
import os
import socket
import subprocess
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from hippo_mpi.cluster.hostfile import Host
from hippo_mpi.cluster.link.link_end import _MAX_STRANGERS
from hippo_mpi.cluster.programs import far_end
from hippo_mpi.cluster.programs.far_end import read_netstat, read_proc_net_dev
from hippo_mpi.cluster.programs.host_program import HostLost, HostProgram, _command, _modules
from tests import ranks

HERE = Host("127.0.0.1")
START_S = ranks.LIMIT_S


@pytest.mark.parametrize("name", ["programs.far_end", "link.link_end", "top.top_end"])
def test_they_are_python_3_8_and_import_nothing_of_ours_but_each_other(name: str) -> None:
    tree = ast.parse(
        (Path(far_end.__file__).parents[1] / f"{name.replace('.', '/')}.py").read_text(), feature_version=(3, 8)
    )
    ours = {
        node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and "hippo" in (node.module or "")
    }
    assert ours <= {"hippo_mpi.cluster.programs.far_end"}
    assert not [node for node in ast.walk(tree) if isinstance(node, ast.Match)]


def test_counters_of_linux() -> None:
    text = """Inter-|   Receive                                                |  Transmit
 face |bytes    packets errs drop fifo frame compressed multicast|bytes    packets errs drop fifo colls carrier compressed
    lo: 1000 10 0 0 0 0 0 0 2000 10 0 0 0 0 0 0
eth0.7:3000 10 0 0 0 0 0 0 4000 10 0 0 0 0 0 0
broken: x y
"""
    assert read_proc_net_dev(text) == {"lo": [1000, 2000], "eth0.7": [3000, 4000]}


def test_counters_of_macos() -> None:
    text = """Name       Mtu   Network       Address            Ipkts Ierrs     Ibytes    Opkts Oerrs     Obytes  Coll
lo0        16384 <Link#1>                        12     0       1000       12     0       2000     0
lo0        16384 127           127.0.0.1         12     -       1000       12     -       2000     -
en3        1500  <Link#9>    02:00:00:00:00:01  345     0    3000000      456     0    4000000     0
en3        1500  10.205/30     10.205.0.1       345     -    3000000      456     -    4000000     -
utun0*     1380  <Link#12>                        0     0          0        7     0        500     0
"""
    assert read_netstat(text) == {"lo0": [1000, 2000], "en3": [3000000, 4000000], "utun0": [0, 500]}


@contextlib.asynccontextmanager
async def program(host: Host = HERE) -> AsyncIterator[HostProgram]:
    running = HostProgram(host)
    try:
        await running.start("link.link_end", START_S)
        yield running
    finally:
        await running.close()


def test_strangers_are_sent_away_and_the_other_end_is_let_in() -> None:
    async def run() -> None:
        async with program() as one:
            port = (await one.ask(START_S, do="listen", address="127.0.0.1"))["port"]
            told = {"port": port, "streams": 1, "size": 64, "seconds": 5.0, "count": 10}
            accepting = asyncio.create_task(one.ask(START_S, do="accept", role="echo", token="a secret", **told))
            strangers = [socket.create_connection(("127.0.0.1", port)) for _ in range(8)]
            strangers[0].sendall(b"0" * 128)
            with pytest.raises(OSError, match="somebody else listens there"):
                await one.ask(START_S, do="call", role="ping", token="a guess", address="127.0.0.1", **told)
            said = await one.ask(START_S, do="call", role="ping", token="a secret", address="127.0.0.1", **told)
            assert len(said["times"]) == 10 and await accepting == {}
            for stranger in strangers:
                stranger.close()

    asyncio.run(run())


@pytest.mark.slow
def test_strangers_who_say_nothing_keep_the_other_end_waiting_but_not_out() -> None:
    async def run() -> None:
        async with program() as one:
            port = (await one.ask(START_S, do="listen", address="127.0.0.1"))["port"]
            told = {"port": port, "streams": 1, "size": 64, "seconds": 5.0, "count": 10, "token": "a secret"}
            with contextlib.ExitStack() as stack:
                for _ in range(_MAX_STRANGERS):
                    stack.enter_context(socket.create_connection(("127.0.0.1", port)))
                accepting = asyncio.create_task(one.ask(START_S, do="accept", role="echo", **told))
                await asyncio.sleep(0.5)  # so that they have its ear
                said = await one.ask(START_S, do="call", role="ping", address="127.0.0.1", **told)
            assert len(said["times"]) == 10 and await accepting == {}

    asyncio.run(run())


def test_what_an_end_cannot_do_is_said() -> None:
    async def run() -> None:
        async with program() as one:
            with pytest.raises(OSError, match="assign requested address"):
                await one.ask(START_S, do="listen", address="203.0.113.7")
            told = {"port": 1, "streams": 1, "seconds": 1.0, "token": "a secret"}
            with pytest.raises(OSError, match="refused"):
                await one.ask(START_S, do="call", role="send", address="127.0.0.1", **told)

    asyncio.run(run())


def test_a_program_ends_with_its_input_and_one_that_is_killed_is_lost() -> None:
    async def run() -> None:
        async with program() as one:
            assert await one.ask(START_S, do="counters")
            (pid,) = (pid for pid in ranks.descendants(os.getpid()) if ranks.is_alive(pid))  # not ps itself
        assert not ranks.await_end([pid])
        async with program() as one:
            (pid,) = (pid for pid in ranks.descendants(os.getpid()) if ranks.is_alive(pid))  # not ps itself
            os.kill(pid, 9)
            with pytest.raises(HostLost, match="is lost"):
                await one.ask(START_S, do="counters")
            with pytest.raises(HostLost, match="is lost"):
                await one.ask(START_S, do="counters")

    asyncio.run(run())


@pytest.mark.slow
def test_a_lifeline_ends_a_program_and_so_does_silence() -> None:
    """Whatever its starter does; here with little patience."""
    sources = [(name, text.replace("SILENCE_S = 10.0", "SILENCE_S = 3.0")) for name, text in _modules("link.link_end")]
    started = [
        subprocess.Popen(_command(HERE, START_S), stdin=subprocess.PIPE, stdout=subprocess.PIPE) for _ in range(2)
    ]
    for one in started:
        assert one.stdin is not None and one.stdout is not None
        one.stdin.write(json.dumps(sources).encode() + b"\n" + b'{"id": 7, "do": "counters"}\n')
        one.stdin.flush()
        assert one.stdout.readline() == b"hippo-program-begins\n"
        assert json.loads(one.stdout.readline())["id"] == 7
    lifeline, silent = started
    assert lifeline.stdin is not None
    lifeline.stdin.close()
    assert lifeline.wait(ranks.LIMIT_S) == 0 and silent.wait(ranks.LIMIT_S) == 1
    for one in started:
        with one:  # closes its streams
            pass


@pytest.mark.slow
def test_a_host_that_never_speaks_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By way of an ssh that prints a greeting, and then nothing; or too much; or has no Python."""
    ssh = tmp_path / "ssh"
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")

    async def start(script: str, limit_s: float) -> str:
        ssh.write_text(f"#!/bin/sh\n{script}\n")
        ssh.chmod(0o755)
        one = HostProgram(Host("mini9"))
        began_s = time.monotonic()
        try:
            with pytest.raises(HostLost) as lost:
                await one.start("link.link_end", limit_s)
            assert time.monotonic() - began_s < START_S
            return str(lost.value)
        finally:
            await one.close()

    async def run() -> None:
        assert await start("echo Welcome; exec sleep 60", 1.0) == "mini9: no answer within 1 s"
        assert await start(f"yes & echo $! >{tmp_path}/pid; wait", START_S) == "mini9 prints too much at each login"
        assert not ranks.await_end([int((tmp_path / "pid").read_text())])
        assert await start("echo hippo-no-python", START_S) == "mini9 has no Python of 3.8 or later"
        refused = "printf 'kex: \\033[31mConnection refused\\n' >&2; exit 255"
        assert await start(refused, START_S) == r"mini9 lets nobody in: kex: \x1b[31mConnection refused"

    asyncio.run(run())


@pytest.mark.slow
def test_a_host_may_answer_anything(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is no answer is passed over; what is one is shown without control characters; endless lines end it."""
    nested = "[" * 100_000
    lines = [
        "no JSON",
        "7",
        "null",
        '{"id": [], "answer": {}}',
        '{"id": 99, "answer": {}}',
        '{"id": 0, "answer": 3}',
        nested,
    ]
    answer = '{"id": 0, "answer": {"error": "\\u001b[2Jgone"}}'
    (tmp_path / "said").write_text("\n".join([*lines, answer, ""]))
    ssh = tmp_path / "ssh"
    ssh.write_text(
        f"#!/bin/sh\necho hippo-program-begins; read a; read b; cat {tmp_path}/said; read c; yes | tr -d '\\n'\n"
    )
    ssh.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    heard: list[object] = []

    async def run() -> None:
        one = HostProgram(Host("mini9"), heard.append)
        try:
            await one.start("link.link_end", START_S)
            with pytest.raises(OSError, match=r"^\\x1b\[2Jgone$"):
                await one.ask(START_S, do="counters")
            with pytest.raises(HostLost, match="mini9 is lost"):
                await one.ask(START_S, do="counters")
        finally:
            await one.close()

    asyncio.run(run())
    assert not heard
