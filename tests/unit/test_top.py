"""What `top` reads and shows: of hosts, of macOS's commands, of a server; and that it fits a terminal."""

from __future__ import annotations

import socket
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from hippo_mpi.cluster.asking.facts import Probed
from hippo_mpi.cluster.hostfile import Host
from hippo_mpi.cluster.top.server_answers import fetch_status, fetch_tokens
from hippo_mpi.cluster.top.top import data_interfaces
from hippo_mpi.cluster.top.top_end import busy_share, read_ioreg, read_meminfo, read_ps, read_stat, read_vm_stat
from hippo_mpi.cluster.top.top_state import HostState, ServerState, read_sample
from hippo_mpi.cluster.top.top_view import screen, to_object
from tests.unit.test_link_judgement import two_hosts

SAID: dict[str, Any] = {
    "memory": {"total": 16 << 30, "free": 4 << 30, "ours": 9 << 30}, "cpu": 0.25, "gpu": None,
    "links": {"lo": [9e9, 9e9], "tb0": [1.25e9, 125e3], "en0": [100.0, 2e9]},
}  # fmt: skip


def state(name: str = "mini1", heard_s: float = 10.0, **changes: Any) -> HostState:
    one = HostState(name)
    one.hear(SAID | changes, heard_s)
    return one


def shown(hosts: list[HostState], server: ServerState | None = None, now_s: float = 10.5, height: int = 24) -> str:
    text = screen(hosts, server, now_s, (80, height), "; q leaves").plain
    lines = text.splitlines()
    assert len(lines) < height and all(len(line) <= 80 for line in lines), text
    return text


def test_a_host_that_speaks() -> None:
    one = state()
    assert one.sample and one.sample.other_bytes == 3 << 30 and not one.trouble(11.0)
    assert one.links() == [("en0", 100.0, 2e9)]  # the busiest, but for what never leaves the machine
    one.data = ("tb0", "gone0")
    text = shown([one])
    assert text.splitlines()[2].split() == ["mini1", "9.0", "3.0", "4.0", "25%", "tb0", "10.0G", "1M"]


def test_a_host_that_falls_silent() -> None:
    one = state(heard_s=10.0)
    assert (one.trouble(11.4), one.trouble(11.6), one.trouble(14.2)) == ("", "silent 2 s", "silent 4 s")
    text = shown([one], now_s=14.2)
    assert "silent 4 s" in text and "9.0" not in text
    one.why_lost = "mini1 is lost: Connection reset"
    assert "mini1: mini1 is lost" in shown([one], now_s=14.2)
    one.hear(SAID, 15.0)
    assert not one.why_lost and not one.trouble(15.1)


@pytest.mark.parametrize("change", [
    {"memory": 3}, {"memory": {"total": -1, "free": 0, "ours": 0}}, {"cpu": float("nan")}, {"links": [1]}, {"cpu": "much"},
    {"links": {"x": [1]}}, {"links": {"x": {"0": 1}}}, {"gpu": {}}, {"cpu": 10**400}, {"memory": {"total": 1e30, "free": 0, "ours": 0}},
])  # fmt: skip
def test_what_is_no_sample_is_as_if_nothing_was_said(change: dict[str, Any]) -> None:
    one = state()
    one.hear(SAID | change, 99.0)
    assert one.heard_s == 10.0
    with pytest.raises((ValueError, LookupError, TypeError, AttributeError)):
        read_sample(SAID | change)


def test_names_of_interfaces_are_shown_without_control_characters() -> None:
    assert "\x1b" not in shown([state(links={"\x1b[2Jevil" + "x" * 900: [1e9, 1e9]})])


READY: dict[str, Any] = {
    "ready": True, "state": "ready", "running": 2, "waiting": 1, "model": "story", "beat_s": 10.0,
    "ranks": [{"host": "mini0", "layers": [0, 12], "weight_bytes": 1}, {"host": "mini1", "layers": [12, 24], "weight_bytes": 1}],
    "now": [{"busy_s": 1.0, "hop_s": 1.0, "num_hops": 10}, {"busy_s": 2.0, "hop_s": 1.0, "num_hops": 10}],
}  # fmt: skip


def test_a_server_and_its_ranks() -> None:
    server = ServerState()
    server.hear(READY)
    later = [{"busy_s": 1.5, "hop_s": 1.1, "num_hops": 110}, {"busy_s": 2.9, "hop_s": 1.0, "num_hops": 10}]
    server.hear(READY | {"beat_s": 11.0, "now": later})
    server.hear_tokens(100, 5.0)
    server.hear_tokens(150, 7.0)
    text = shown([state("a"), state("b")], server)
    assert "server  story, 2 running, 1 waiting, 25.0 tokens/s" in text
    assert text.splitlines()[3].split()[-3:] == ["0-11", "50%", "1.00"]
    assert text.splitlines()[4].split()[-3:] == ["12-23", "90%", "0.00"]
    by_name = shown([state("mini1"), state("other"), state("mini0")], server)
    assert [line.split()[-3] for line in by_name.splitlines()[3:6]] == ["12-23", "en0", "0-11"]
    said = to_object([state("a"), state("b")], server, 10.5)
    assert said["hosts"][1]["layers"] == [12, 24] and said["server"]["tokens_per_s"] == 25.0
    server.hear({"ready": False, "state": "loading \x1b[2J", "running": 0, "waiting": 0})
    assert server.line == r"not ready: loading \x1b[2J; 0 running, 0 waiting" and not server.ranks
    server.hear({"running": "x", "waiting": 0})
    assert server.line == "its answer can't be read"


@pytest.mark.parametrize("change", [
    {"ranks": [{"layers": [0]}]}, {"ranks": 7}, {"now": [[1], [2]]}, {"beat_s": "soon"}, {"running": None}, {"running": float("inf")}, {"now": [{"busy_s": 10**400}] * 2}, {"now": [{"busy_s": {}}, {}]},
])  # fmt: skip
def test_answers_that_are_no_servers(change: dict[str, Any]) -> None:
    server = ServerState()
    server.hear(READY)
    server.hear(READY | {"beat_s": 11.0} | change)
    assert shown([state()], server)


def test_what_a_server_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HIPPO_API_KEYS", "first,second")
    bodies = {"/ready": (503, '{"ready": false}'), "/metrics": (200, "# HELP x\nhippo_generated_tokens_total 7.0\n")}

    class Answers(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            status, body = bodies[self.path]
            self.send_response(status if self.headers["Authorization"] == "Bearer first" else 401)
            self.end_headers()
            self.wfile.write(body.encode())

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Answers) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        assert fetch_status(url) == {"ready": False} and fetch_tokens(url) == 7.0
        bodies["/metrics"] = (200, "<html>a proxy's page</html>")
        with pytest.raises(ValueError, match="no hippo_generated_tokens_total"):
            fetch_tokens(url)
        for odd in ("[1]", "5", "null"):
            bodies["/ready"] = (200, odd)
            with pytest.raises(ValueError, match="no object"):
                fetch_status(url)
        monkeypatch.setenv("HIPPO_API_KEYS", "")
        with pytest.raises(OSError):
            fetch_tokens(url)
        server.shutdown()


@pytest.mark.parametrize(
    "said",
    [b"HTTP/9 rubbish\r\n\r\n", b"\0\n\n", b"HTTP/1.1 200 OK\r\n" + b"A: b\r\n" * 200 + b"\r\n",
     b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n", b"HTTP/1.1 503 No\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n"],
)  # fmt: skip
def test_what_speaks_no_http_does_not_answer(said: bytes) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def answer() -> None:
            with listener.accept()[0] as caller:
                caller.recv(4096)
                caller.sendall(said)

        answering = threading.Thread(target=answer)
        answering.start()
        with pytest.raises(OSError, match="isn't HTTP"):
            fetch_status(f"http://127.0.0.1:{listener.getsockname()[1]}")
        answering.join()


def test_many_hosts_fit_a_small_terminal() -> None:
    hosts = [state(f"a-rather-long-name-of-a-host-{number}.local") for number in range(40)]
    for number, host in enumerate(hosts):
        host.data, host.why_lost = ("tb0", "en0"), "no answer " * 30 if number % 2 else ""
    server = ServerState()
    server.hear(READY)
    assert "more lines: enlarge the window" in shown(hosts, server)
    assert shown(hosts, server, height=12)


def test_proc() -> None:
    assert read_stat("cpu  10 0 10 70 10 0 0 0 5 5\ncpu0 1 1") == (80, 100)
    assert busy_share((80, 100), (100, 200)) == 0.8 and busy_share((1, 1), (1, 1)) == 0.0
    assert read_meminfo("MemTotal:  100 kB\nMemFree: 1 kB\nMemAvailable:   40 kB\n") == (102400, 40960)


def test_commands_of_macos() -> None:
    ps = """  5120   3.5 /Users/anna/.venv/bin/python -m hippo_mpi.generate --model M
  1024  96,5 /usr/libexec/other
  2048   0.0 python3 -u -c import json, sys; sys.stdin.readline() hippo_mpi.cluster
"""
    ours, busy = read_ps(ps)
    assert ours == 5120 << 10 and busy == pytest.approx(1.0)
    vm = """Mach Virtual Memory Statistics: (page size of 16384 bytes)
Pages free:                               1000.
Pages active:                           900000.
Pages inactive:                           2000.
Pages speculative:                         500.
Pages wired down:                       100000.
Pages purgeable:                            10.
"""
    assert read_vm_stat(vm) == 3510 * 16384 and read_vm_stat("") == 0
    ioreg = '"PerformanceStatistics" = {"In use system memory"=1,"Device Utilization %"=37,"Renderer Utilization %"=9}'
    assert read_ioreg(ioreg) == 0.37 and read_ioreg("") is None


def test_data_interfaces_are_those_of_the_hostfile_and_towards_the_next_rank() -> None:
    hosts = two_hosts()
    assert data_interfaces(hosts, 0) == ("tb0",)
    hosts[1] = Probed(Host("mini1", ("192.168.1.12",)), hosts[1].facts)
    assert data_interfaces(hosts, 0) == ("tb0", "en0")
    assert data_interfaces([Probed(Host("mini1"))], 0) == ()
