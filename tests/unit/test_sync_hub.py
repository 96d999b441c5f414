"""Whole files against the hub's SHA-256: what comes wrong, or lies wrong in its cache, is named and fetched again."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from hippo_mpi.config.bundled import BUNDLED_MODEL
from tests.commands.test_hub import COMMIT, REPO, Hub

NAME = "model.safetensors"
DATA = (BUNDLED_MODEL / NAME).read_bytes()
WRONG = bytearray(DATA)
WRONG[len(DATA) // 2] ^= 1


class SummedHub(Hub):
    """Says what weight files hash to, and sends them wrong a number of times."""

    wrong: list[None]

    def send_header(self, keyword: str, value: str) -> None:
        is_sum = keyword == "ETag" and self.path.endswith(NAME)
        super().send_header(keyword, f'"{hashlib.sha256(DATA).hexdigest()}"' if is_sum else value)

    def _send_file(self, file: Path, with_body: bool) -> None:
        is_piece = with_body and file.name == NAME and self.headers.get("Range", "") != "bytes=0-99999"  # the head
        if is_piece and self.wrong:
            self.wrong.pop()
            file = self.folder / "wrong" / NAME
        super()._send_file(file, with_body)


class Bed:
    """A hub and this machine, which has a cache of its own."""

    def __init__(self, folder: Path, port: int, wrong: list[None]) -> None:
        self.home, self.wrong = folder / "home", wrong
        self.env = {
            **os.environ, "HF_HOME": str(self.home), "HF_ENDPOINT": f"http://127.0.0.1:{port}", "HF_HUB_DISABLE_XET": "1"
        }  # fmt: skip

    def sync(self, *options: str) -> tuple[int, dict[str, Any], str]:
        command = [sys.executable, "-m", "hippo_mpi.cluster", "sync", REPO, "--whole", "--json", "--timeout", "60"]
        found = subprocess.run([*command, *options], capture_output=True, text=True, env=self.env, timeout=200)
        return found.returncode, json.loads(found.stdout)["hosts"][0] if found.stdout else {}, found.stderr

    @property
    def weights(self) -> Path:
        (view,) = (self.home / "hippo_mpi").iterdir()
        return view / NAME


@pytest.fixture
def bed(tmp_path: Path) -> Iterator[Bed]:
    (tmp_path / "repo" / "wrong").mkdir(parents=True)
    for path in BUNDLED_MODEL.iterdir():
        if path.suffix in (".json", ".jinja", ".safetensors"):
            (tmp_path / "repo" / path.name).write_bytes(path.read_bytes())
    (tmp_path / "repo" / "wrong" / NAME).write_bytes(WRONG)
    wrong: list[None] = []
    given = {"folder": tmp_path / "repo", "downloads": [], "ranges": [], "wrong": wrong}
    with ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (SummedHub,), given)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield Bed(tmp_path, server.server_port, wrong)
        server.shutdown()


@pytest.mark.slow
def test_what_comes_wrong_is_fetched_again(bed: Bed) -> None:
    bed.wrong += [None] * 9
    code, host, err = bed.sync()
    told = "model.safetensors isn't what the hub has, also when fetched again"
    assert code == 2 and told in err and host["mismatched"] == [NAME], (host, err, len(bed.wrong))
    del bed.wrong[1:]
    code, host, err = bed.sync()
    assert code == 0 and host["mismatched"] == [NAME] and host["error"] is None, err
    assert bed.weights.read_bytes() == DATA and not bed.wrong
    assert bed.sync("--verify")[1] | {"ranks": []} == {
        "host": "127.0.0.1", "ranks": [], "needed": len(DATA), "was_here": len(DATA), "came": 0, "damaged": 0,
        "unchecked": 0, "mismatched": [], "error": None,
    }  # fmt: skip


@pytest.mark.slow
def test_what_lies_wrong_in_the_hubs_cache_is_replaced_in_the_view(bed: Bed) -> None:
    assert bed.sync()[0] == 0
    blob = bed.home / "hub" / "blobs" / "weights"
    blob.parent.mkdir()
    blob.write_bytes(WRONG)
    bed.weights.unlink()
    bed.weights.symlink_to(blob)
    assert bed.sync()[1]["came"] == 0  # nobody has asked
    code, host, err = bed.sync("--verify")
    assert code == 0 and host["mismatched"] == [NAME] and host["came"] == len(DATA) and host["unchecked"] == 0, err
    assert not bed.weights.is_symlink() and bed.weights.read_bytes() == DATA and blob.read_bytes() == WRONG
    assert COMMIT in str(bed.weights) and bed.sync("--verify")[1]["unchecked"] == 0
