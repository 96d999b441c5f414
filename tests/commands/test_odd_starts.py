"""Servers that are started in odd ways, or whose ranks can't start: they serve, or say why."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import tempfile
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from hippo_mpi.config.bundled import BUNDLED_MODEL
from hippo_mpi.config.serve_options import ServeOptions
from hippo_mpi.errors import UserError
from hippo_mpi.serve import _silence_s, serve
from hippo_mpi.serving.supervision.rank_service import BEAT_S
from tests import ranks
from tests.servers import SERVE, Server, server

pytestmark = pytest.mark.slow


def test_a_long_life(tmp_path: Path) -> None:
    """Behind nohup, and with a /tmp that is cleaned up while a rank fails."""
    environment = {"TMPDIR": str(tmp_path)}
    with ranks.single(["nohup", SERVE, "--port", "0", "--timeout", "4"], env=environment) as running:
        serving = Server(running)
        serving.await_ready()
        running.process.send_signal(signal.SIGHUP)
        for folder in tmp_path.glob("hippo-serve-*"):
            shutil.rmtree(folder)
        os.kill(serving.rank_pids()[0], signal.SIGKILL)
        serving.await_status(lambda status: status["ready"] and status["restarts"] >= 1)
        running.process.terminate()
        assert running.wait() == 0
    assert not list(tmp_path.glob("hippo-*"))


def test_a_model_that_never_loads_is_given_up() -> None:
    """Its ranks are killed while they load it, as by a system that is out of memory: the one before comes back."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "good.yaml").write_text(f"model: {BUNDLED_MODEL}\n")
        (folder / "huge.yaml").write_text(f"model: {BUNDLED_MODEL}\nmax-tokens: 77\n")
        (folder / "sitecustomize.py").write_text(
            "import os, sys\nif 'HIPPO_FRONT' in os.environ and '--max-tokens=77' in sys.argv: os.kill(os.getpid(), 9)\n"
        )
        options = ["--catalogue", name, "--model", "good", "--max-restarts", "1"]
        with server(*options, env={"PYTHONPATH": name}) as running:
            request = urllib.request.Request(
                f"{running.url}/admin/model",
                json.dumps({"model": "huge"}).encode(),
                {"Content-Type": "application/json"},
            )
            with pytest.raises(urllib.error.HTTPError) as refused:
                urllib.request.urlopen(request, timeout=60)
            assert "'huge' can't be loaded: its ranks failed 2 times" in refused.value.read().decode()
            running.await_ready()
            assert running.status()["model"] == "good"


def test_a_model_whose_ranks_fail_once_is_loaded(tmp_path: Path) -> None:
    """As by a mistake of ours, which may not come again; it was found by a random history."""
    for name, options in (("good", ""), ("shy", "max-tokens: 77")):
        (tmp_path / f"{name}.yaml").write_text(f"model: {BUNDLED_MODEL}\n{options}\n")
    (tmp_path / "sitecustomize.py").write_text(
        "import os, sys\n"
        "if 'HIPPO_FRONT' in os.environ and '--max-tokens=77' in sys.argv and not os.path.exists('seen'):\n"
        "    open('seen', 'w').close()\n"
        "    os._exit(1)\n".replace("'seen'", repr(str(tmp_path / "seen")))
    )
    options = ["--catalogue", str(tmp_path), "--model", "good", "--ranks", "1"]
    with server(*options, env={"PYTHONPATH": str(tmp_path)}) as running:
        answer = running.client().completions.create(model="shy", prompt="A fox", max_tokens=3)
        assert answer.usage is not None and answer.usage.completion_tokens == 3
        assert running.status()["model"] == "shy"


def test_the_shortest_deadline_is_longer_than_beats_are_apart() -> None:
    with ranks.single([SERVE, "--timeout", "0.9"]) as refused:
        assert refused.wait() == 2
        assert "from 1 to 1000000" in refused.err
    shortest = ServeOptions(timeout=1.0)
    assert _silence_s(shortest) >= 4 * BEAT_S


FINE = ["--allow-origin", "*", "https://fox.example", "--allow-host", "fox.example", "::1", "--max-body-bytes", "1M"]


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (["--ssl-certfile", "missing"], "--ssl-certfile missing can't be used"),
        (["--ssl-keyfile", "key.pem"], "--ssl-keyfile needs --ssl-certfile"),
        (["--audit-required"], "--audit-required needs --audit-log FILE"),
        (["--audit-key", "x"], "--audit-key needs --audit-log FILE"),
        (["--audit-log", "/nowhere/a"], "--audit-log /nowhere/a: no such folder: /nowhere"),
        (["--journal", "/nowhere/j"], "--journal /nowhere/j: no such folder: /nowhere"),
        (["--journal", "."], r"--journal \. is a folder: give a file in it"),
        (["--layer-split", "40,24"], "layer split 40,24 covers 64 layers but the model has 12"),
        (["--reconnect", "5"], "--reconnect needs --journal FILE"),
        (["--backend", "foo"], "argument --backend: invalid choice: 'foo'"),
        (["--allow-origin", "foo"], "'foo' is not an origin such as https://example.org"),
        (["--allow-host", "http://x/"], "'http://x/' is not a host's name such as example.org"),
        (["--max-body-bytes", "0"], "0 is not a size above 0"),
        (["--layer-split", "4,4,4"], "is for 3 ranks, but there are 2"),
    ],
)
def test_check_says_what_a_start_would(options: list[str], line: str) -> None:
    """So that `./launch/serve restart` leaves a server alone that works."""
    assert serve(["--layer-split", "4,4,4", "--ranks", "3", *FINE, "--check"]) == 0
    with pytest.raises(UserError, match=line):
        serve([*options, "--check"])


def test_a_folder_for_a_journal_is_refused() -> None:
    with ranks.single([SERVE, "--journal", "."]) as refused:
        assert refused.wait() == 2
        assert refused.err == "error: --journal . is a folder: give a file in it\n"


def test_a_start_without_its_hosts_leaves_the_journal_alone(tmp_path: Path) -> None:
    """What was under way may come to its end after the next start."""
    hosts = [{"ssh": name, "ips": [name]} for name in ("127.0.0.1", "127.0.0.77")]
    (tmp_path / "hostfile").write_text(json.dumps(hosts))
    command = [SERVE, "--port", "0", "--hostfile", str(tmp_path / "hostfile"), "--journal", str(tmp_path / "journal")]
    with ranks.single(command) as running:
        assert running.wait(60) > 0
        assert "`ssh NAME true` fails for 127.0.0.77 (rank 1)" in running.err
    assert not (tmp_path / "journal").exists()


def test_a_hostfile_for_jaccl_is_not_run_as_a_ring(tmp_path: Path) -> None:
    """Here, MLX says that it has none."""
    hostfile = tmp_path / "hosts.json"
    rdma = [[None, "rdma_en5"], ["rdma_en5", None]]
    hosts = [{"ssh": "127.0.0.1", "ips": ["127.0.0.1"], "rdma": row} for row in rdma]
    hostfile.write_text(json.dumps({"backend": "jaccl", "hosts": hosts}))
    with ranks.single([str(ranks.BIN / "hippo_mpi.serve"), "--port", "0", "--hostfile", str(hostfile)]) as running:
        assert running.wait() == 2
        assert re.search(r"ERROR rank \d: the jaccl backend can't start: ", running.err)
