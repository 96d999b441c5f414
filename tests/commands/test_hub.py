"""A model from the hub: each rank downloads only the files that hold its layers.

The hub itself can't be reached from tests: a small server on this machine speaks the part of its protocol that
huggingface_hub uses to list, look at and download files.
"""

from __future__ import annotations

import hashlib
import http.server
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlparse

import mlx.core as mx
import pytest

from hippo_mpi.config import BUNDLED_MODEL
from tests import ranks

REPO = "someone/story"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
GENERATE = str(ranks.BIN / "hippo_mpi.generate")


def make_repo(folder: Path) -> None:
    """The bundled model in four weight files: one for what isn't in layers, three for four layers each."""
    weights = mx.load(str(BUNDLED_MODEL / "model.safetensors"))
    assert isinstance(weights, dict)
    parts: dict[str, dict[str, mx.array]] = {}
    for name, array in weights.items():
        words = name.split(".")
        part = f"layers-{int(words[2]) // 4}" if words[1] == "layers" else "rest"
        parts.setdefault(f"model-{part}.safetensors", {})[name] = array
    for file, arrays in parts.items():
        mx.save_safetensors(str(folder / file), arrays)
    index = {"weight_map": {name: file for file, arrays in parts.items() for name in arrays}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    for path in BUNDLED_MODEL.iterdir():
        if path.suffix in (".json", ".jinja"):
            (folder / path.name).write_bytes(path.read_bytes())


class Hub(http.server.BaseHTTPRequestHandler):
    folder: Path
    downloads: list[str]

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def _answer(self, with_body: bool) -> None:
        path = unquote(urlparse(self.path).path)
        if path.startswith(f"/api/models/{REPO}"):
            self._send_json(self._tree() if "/tree/" in path else self._info())
        elif path.startswith(f"/{REPO}/resolve/") and (file := self.folder / path.split("/")[-1]).exists():
            self._send_file(file, with_body)
        else:
            self.send_response(404)
            self.send_header("X-Error-Code", "RepoNotFound")
            self.end_headers()

    def _info(self) -> dict[str, Any]:
        names = [{"rfilename": path.name} for path in self.folder.iterdir()]
        return {
            "id": REPO,
            "modelId": REPO,
            "sha": COMMIT,
            "private": False,
            "tags": [],
            "siblings": names,
            "downloads": 0,
        }

    def _tree(self) -> list[dict[str, Any]]:
        return [
            {"type": "file", "path": p.name, "size": p.stat().st_size, "oid": hashlib.sha1(p.name.encode()).hexdigest()}
            for p in self.folder.iterdir()
        ]

    def _send_json(self, content: Any) -> None:
        data = json.dumps(content).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def _send_file(self, file: Path, with_body: bool) -> None:
        data, status = file.read_bytes(), 200
        total = len(data)
        wanted = self.headers.get("Range", "")
        if wanted.startswith("bytes="):
            first, _, last = wanted.removeprefix("bytes=").partition("-")
            data, status = data[int(first) : int(last or total) + 1], 206
        elif with_body:
            self.downloads.append(file.name)
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.send_header("ETag", f'"{hashlib.sha1(file.name.encode()).hexdigest()}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("Accept-Ranges", "bytes")
        self.end_headers()
        if with_body:
            self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[tuple[str, list[str]]]:
    folder = tmp_path / "repo"
    folder.mkdir()
    make_repo(folder)
    downloads: list[str] = []
    handler = type("Handler", (Hub,), {"folder": folder, "downloads": downloads})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}", downloads
        server.shutdown()


def on_rank(home: Path, endpoint: str, *options: str) -> list[str]:
    settings = [f"HF_HOME={home}", f"HF_ENDPOINT={endpoint}", "HF_HUB_OFFLINE=0", "HF_HUB_DISABLE_XET=1"]
    return ["env", *settings, GENERATE, "--model", REPO, *options]


@pytest.mark.slow
def test_each_rank_downloads_only_its_files(hub: tuple[str, list[str]], tmp_path: Path) -> None:
    """Two ranks with a cache each, as on two machines; layers 0-5 and 6-11 share one file of four layers."""
    endpoint, downloads = hub
    homes = [tmp_path / "home0", tmp_path / "home1"]
    options = ["--layer-split", "4,8", "--json"]
    with ranks.ring([on_rank(home, endpoint, *options) for home in homes]) as running:
        assert [rank.wait() for rank in running] == [0, 0], running[0].err
        text = json.loads(running[0].out)["text"]
    with ranks.single([GENERATE, "--json"]) as alone:
        assert alone.wait() == 0
        assert json.loads(alone.out)["text"] == text
    weights = sorted(name for name in downloads if name.endswith(".safetensors"))
    assert weights == [f"model-{part}.safetensors" for part in ("layers-0", "layers-1", "layers-2", "rest")]
    for home, expected in zip(homes, ({"layers-0", "rest"}, {"layers-1", "layers-2"}), strict=True):
        (view,) = (home / "hippo_mpi").iterdir()
        real = {
            p.name.removeprefix("model-").removesuffix(".safetensors")
            for p in view.glob("*.safetensors")
            if p.is_symlink()
        }
        assert real == expected


def test_a_plan_downloads_no_weights(hub: tuple[str, list[str]], tmp_path: Path) -> None:
    endpoint, downloads = hub
    with ranks.single(on_rank(tmp_path / "home", endpoint, "--show-plan")) as running:
        assert running.wait() == 0, running.err
        assert "12 layers" in running.out
    assert not [name for name in downloads if name.endswith(".safetensors")]


def test_no_such_repo(hub: tuple[str, list[str]], tmp_path: Path) -> None:
    endpoint, _ = hub
    command = [part.replace(REPO, "someone/else") for part in on_rank(tmp_path / "home", endpoint)]
    with ranks.single(command) as running:
        assert running.wait() == 2
        assert running.err.startswith("error: no folder someone/else, and no such repo could be had from the hub")
        assert len(running.err.splitlines()) == 1
