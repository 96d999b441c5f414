"""Setup over real ssh, on hosts with nothing of the project: own file system, account, home, shell, and no internet."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import re
import select
import shutil
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.bare_hosts import CAN_MAKE, PASSWORD, WHY_NOT, Bare, bare_hosts

pytestmark = [pytest.mark.skipif(not CAN_MAKE, reason=WHY_NOT), pytest.mark.timeout(240)]
GREETING = "echo Welcome to mini; echo to this machine >&2\n"


def at_a_terminal(bare: Bare, words: Sequence[str], answers: Sequence[tuple[str, str]]) -> tuple[int, str]:
    """Run a command of hippo_mpi.cluster; type each answer once its question is there. Return status and output."""
    command = bare.command(*words)
    pid, terminal = pty.fork()
    if pid == 0:
        os.chdir(bare.folder)
        os.execvpe(command[0], command, {**os.environ, **bare.env})
    said, seen, left, ends_s = b"", 0, list(answers), time.monotonic() + 90
    while time.monotonic() < ends_s:
        if not select.select([terminal], [], [], 0.2)[0]:
            continue
        with contextlib.suppress(OSError):  # all have closed it
            if data := os.read(terminal, 65536):
                said += data
                while left and (found := re.search(left[0][0].encode(), said[seen:])):
                    seen += found.end()
                    os.write(terminal, left.pop(0)[1].encode() + b"\n")
                continue
        break
    os.close(terminal)
    assert not left, said
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), said.decode(errors="replace").replace("\r", "")


def test_from_a_bare_host_to_a_first_token_and_back(tmp_path: Path) -> None:
    """Its shell is fish, if there is one, and greets on both streams."""
    shell = shutil.which("fish") or "/bin/sh"
    with bare_hosts(1, tmp_path, shell=shell, profile=GREETING) as bare:
        (host,) = bare.hosts
        bare.ssh(host, "true")  # the first login makes fish's own folders
        before, hostfile = host.state(), tmp_path / "hosts.json"
        asked = bare.cluster("setup", host.name)
        assert asked.returncode == 0 and asked.stdout.endswith("do this? [y/N] nothing was changed\n"), asked.stderr
        assert host.state() == before and not hostfile.exists()

        done = bare.cluster("setup", host.name, "--yes")
        assert done.returncode == 0 and "the same as on one machine" in done.stdout, done.stdout + done.stderr
        assert done.stderr == ""
        assert [entry.get("python") for entry in json.loads(hostfile.read_text())["hosts"]] == [
            None,
            "~/.hippo-mpi/venv/bin/python",
        ]
        ready, written = host.state(), hostfile.stat()
        again = bare.cluster("setup", "--yes")
        assert (again.returncode, again.stderr) == (0, "") and "as they were" in again.stdout
        assert host.state() == ready and hostfile.stat() == written
        well = bare.cluster("doctor", "--hostfile", "hosts.json", "--timeout", "60", "--json")
        errors = [one for one in json.loads(well.stdout)["findings"] if one["weight"] == "error"]
        assert [one for one in errors if one["check"] != "stale-ranks"] == [], errors
        lost = bare.cluster("setup", "nosuch.invalid", "--yes")
        assert lost.returncode == 3 and re.fullmatch(r"error: ssh-refused on nosuch\.invalid: .*\n", lost.stderr), lost

        removed = bare.cluster("remove", host.name, "--yes")
        assert removed.returncode == 0 and "as it was before" in removed.stdout, removed.stderr
        assert host.state() == before and not hostfile.exists()


def test_a_stranger_s_fingerprint_and_a_wrong_password(tmp_path: Path) -> None:
    """What a person is asked at the terminal: whom to trust, the account's password, whether to leave a key."""
    with bare_hosts(1, tmp_path, shell="/bin/sh", has_key=False) as bare:
        (host,) = bare.hosts
        (tmp_path / "known").write_text("")
        before, words = host.state(), ["setup", host.name]
        alone = bare.cluster(*words, "--yes")
        assert alone.returncode == 3 and alone.stderr.startswith("error: ssh-host-key on mini1: Host key verification")

        code, said = at_a_terminal(bare, words, [(r"SHA256:.*\s.*\s.*\(yes/no", "no")])
        assert code == 3 and said.endswith("and says above why; the same command tries again\n")
        code, said = at_a_terminal(bare, words, [("yes/no", "yes"), *[("password:", "wrong")] * 3])
        assert code == 3 and said.count("error: ") == 1
        code, said = at_a_terminal(bare, words, [("password:", PASSWORD), ("by that key", "n")])
        assert code == 2 and said.endswith("give mini1 a key: ssh-copy-id mini1\n")
        assert host.state() == before

        code, said = at_a_terminal(bare, words, [("password:", PASSWORD), ("by that key", "y"), ("do this", "n")])
        stays = "key           stays; to take it out: ./launch/cluster remove mini1\nnothing else was changed\n"
        assert code == 0 and said.endswith(stays), said
        assert host.state() != before
        assert bare.cluster("remove", host.name, "--yes").returncode == 0
        assert host.state() == before
