"""A model from the hub: each rank downloads only the files that hold its layers.

The hub itself can't be reached from tests: a small server on this machine speaks the part of its protocol that
huggingface_hub uses to list, look at and download files.
"""

from __future__ import annotations

import contextlib
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

from hippo_mpi.config.bundled import BUNDLED_MODEL
from tests import ranks

REPO = "someone/story"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
GENERATE = str(ranks.BIN / "hippo_mpi.generate")
PLAN = str(ranks.BIN / "hippo_mpi.plan")


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
    ranges: list[int]  # how many bytes were asked for
    takes_ranges = True
    refusal: tuple[int, str] | None = None  # status and the hub's own code for every request, or for files
    refuses_files_only = False

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def _answer(self, with_body: bool) -> None:
        path = unquote(urlparse(self.path).path)
        _, _, revision = path.partition("/revision/")
        if self.refusal and (not self.refuses_files_only or "/resolve/" in path):
            self._refuse(*self.refusal)
        elif revision and revision not in ("main", COMMIT):
            self._refuse(404, "RevisionNotFound")
        elif path.startswith(f"/api/models/{REPO}"):
            self._send_json(self._tree() if "/tree/" in path else self._info())
        elif path.startswith(f"/{REPO}/resolve/") and (file := self.folder / path.split("/")[-1]).exists():
            self._send_file(file, with_body)
        elif path.startswith(f"/{REPO}/resolve/"):
            self._refuse(404, "EntryNotFound")
        else:
            self._refuse(404, "RepoNotFound")

    def _refuse(self, status: int, code: str) -> None:
        self.send_response(status)
        if code:
            self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
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
        if wanted.startswith("bytes=") and self.takes_ranges:
            first, _, last = wanted.removeprefix("bytes=").partition("-")
            data, status = data[int(first) : int(last or total) + 1], 206
            self.ranges.append(len(data))
        elif with_body:
            self.downloads.append(file.name)
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        if status == 206:
            self.send_header("Content-Range", f"bytes {first}-{int(first) + len(data) - 1}/{total}")
        self.send_header("ETag", f'"{hashlib.sha1(file.name.encode()).hexdigest()}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("Accept-Ranges", "bytes")
        self.end_headers()
        if with_body:
            with contextlib.suppress(ConnectionError):  # whoever only wanted the beginning has gone
                self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[tuple[str, list[str]]]:
    downloads: list[str] = []
    with serving_hub(tmp_path, downloads) as endpoint:
        yield endpoint, downloads


@contextlib.contextmanager
def serving_hub(tmp_path: Path, downloads: list[str], **behaviour: Any) -> Iterator[str]:
    folder = tmp_path / "repo"
    folder.mkdir()
    make_repo(folder)
    handler = type("Handler", (Hub,), {"folder": folder, "downloads": downloads, "ranges": [], **behaviour})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def on_rank(home: Path, endpoint: str, *options: str, command: str = GENERATE, offline: int = 0) -> list[str]:
    settings = [f"HF_HOME={home}", f"HF_ENDPOINT={endpoint}", f"HF_HUB_OFFLINE={offline}", "HF_HUB_DISABLE_XET=1"]
    return ["env", *settings, command, "--model", REPO, *options]


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


@pytest.mark.slow
@pytest.mark.parametrize("takes_ranges", [True, False], ids=["ranges", "whole-files-only"])
def test_of_one_file_each_rank_downloads_only_its_bytes(takes_ranges: bool, tmp_path: Path) -> None:
    """Two machines, then another split: what is here already isn't downloaded again."""
    downloads, ranges = list[str](), list[int]()
    homes = [tmp_path / "home0", tmp_path / "home1"]
    with serving_hub(tmp_path, downloads, ranges=ranges, takes_ranges=takes_ranges) as endpoint:
        for path in (tmp_path / "repo").glob("model*"):
            path.unlink()
        whole = (BUNDLED_MODEL / "model.safetensors").read_bytes()
        (tmp_path / "repo" / "model.safetensors").write_bytes(whole)
        texts = []
        for split in ("4,8", "4,8", "6,6"):
            ranges.clear()
            with ranks_of(homes, endpoint, split) as running:
                assert [rank.wait() for rank in running] == [0, 0], running[0].err
                texts.append(json.loads(running[0].out)["text"])
            if takes_ranges:
                weights = sum(ranges)
                most = {"4,8": len(whole) if not texts[1:] else 0, "6,6": 3 * len(whole) // 12}[split]
                assert weights <= most + 2 * 110_000, f"{weights:,} of {len(whole):,} bytes for {split}"
    assert len(set(texts)) == 1
    assert ("model.safetensors" in downloads) == (not takes_ranges)


def ranks_of(homes: list[Path], endpoint: str, split: str) -> contextlib.AbstractContextManager[list[ranks.Rank]]:
    """Two ranks with a cache each, as on two machines."""
    return ranks.ring([on_rank(home, endpoint, "--layer-split", split, "--json") for home in homes])


@pytest.mark.slow
def test_a_plan_downloads_config_and_index_only(hub: tuple[str, list[str]], tmp_path: Path) -> None:
    """And is right to the byte; generating later downloads what else is needed, a plan again nothing."""
    endpoint, downloads = hub
    home = tmp_path / "home"
    machines = ["--machine", "a:8", "--machine", "b:8", "--json"]
    plans = []
    for offline in (0, 1):
        with ranks.single(on_rank(home, endpoint, *machines, command=PLAN, offline=offline)) as running:
            assert running.wait() == 0, running.err
            plans.append(json.loads(running.out)["plan"])
        assert sorted(downloads) == ["config.json", "generation_config.json", "model.safetensors.index.json"]
    with ranks.single([PLAN, *machines]) as local:
        assert local.wait() == 0, local.err
    assert plans == [json.loads(local.out)["plan"]] * 2
    assert plans[0]["assumptions"] == []
    with ranks.single(on_rank(home, endpoint, "--json", "--max-tokens", "3")) as running:
        assert running.wait() == 0, running.err
        assert json.loads(running.out)["text"]
    assert {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"} < set(downloads)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["../../evil.safetensors", 5])
def test_files_that_an_index_names_elsewhere(hub: tuple[str, list[str]], tmp_path: Path, name: Any) -> None:
    index = tmp_path / "repo" / "model.safetensors.index.json"
    named = json.loads(index.read_text())["weight_map"]
    index.write_text(json.dumps({"weight_map": {**named, next(iter(named)): name}}))
    with ranks.single(on_rank(tmp_path / "home", hub[0], command=PLAN)) as running:
        assert running.wait() == 2, running.err
        assert running.err == f"error: the index of {REPO} has an invalid file name: {name!r}\n"
    assert not list(tmp_path.rglob("*evil*"))


@pytest.mark.slow
def test_models_say_how_much_is_here(hub: tuple[str, list[str]], tmp_path: Path) -> None:
    endpoint, _ = hub
    (tmp_path / "tale.yaml").write_text(f"model: {REPO}\n")
    listing = on_rank(tmp_path / "home", endpoint, command=str(ranks.BIN / "hippo_mpi.models"))[:-2]
    for share in ("0%", "100%"):
        with ranks.single([*listing, "--catalogue", str(tmp_path)]) as running:
            assert running.wait() == 0, running.err
        assert running.out.splitlines()[1].split()[:4] == ["tale", "5.0", "MiB", share]
        with ranks.single(on_rank(tmp_path / "home", endpoint, "--max-tokens", "1")) as running:
            assert running.wait() == 0, running.err


LOG_IN = "log in with: hf auth login"
REFUSALS: dict[str, tuple[tuple[int, str], str]] = {
    "gated": ((403, "GatedRepo"), f"{REPO} is gated: ask for access at {{url}}/{REPO}, then {LOG_IN}"),
    "no such repo": ((404, "RepoNotFound"), f"no folder {REPO}, and {{host}} has no such repo; if it is private, {LOG_IN}"),
    "forbidden": ((403, ""), f"{{host}} denies access to {REPO}: {LOG_IN}"),
    "too many requests": ((429, ""), f"{{host}} limits your requests: wait a few minutes, or {LOG_IN}"),
    "down": ((503, ""), f"{{host}} returned status 503: try {REPO} again later"),
}  # fmt: skip


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=() if case == "gated" else pytest.mark.slow) for case in REFUSALS]
)
def test_a_hub_that_refuses(case: str, tmp_path: Path) -> None:
    """Everything, or, as of a gated repo, only the files."""
    refusal, line = REFUSALS[case]
    is_gated = case == "gated"
    behaviour = {"refusal": refusal, "refuses_files_only": is_gated}
    with serving_hub(tmp_path, [], **behaviour) as url, ranks.single(on_rank(tmp_path / "home", url)) as running:
        assert running.wait() == 2
    assert running.err == f"error: {line.format(url=url, host=url.removeprefix('http://'))}\n"


def test_no_such_revision(hub: tuple[str, list[str]], tmp_path: Path) -> None:
    with ranks.single(on_rank(tmp_path / "home", hub[0], "--revision", "v9")) as running:
        assert running.wait() == 2
        assert running.err == f"error: {REPO} has no revision v9\n"


def test_no_network(tmp_path: Path) -> None:
    host = f"127.0.0.1:{ranks.free_ports(1)[0]}"
    with ranks.single(on_rank(tmp_path / "home", f"http://{host}")) as running:
        assert running.wait() == 2
        assert running.err == f"error: no network: {host} can't be reached, and {REPO} isn't in the cache\n"


def test_offline(tmp_path: Path) -> None:
    with ranks.single(on_rank(tmp_path / "home", "http://127.0.0.1:1", offline=1)) as running:
        assert running.wait() == 2
        line = f"no folder {REPO}, and the cache doesn't have all of it; unset HF_HUB_OFFLINE to download it"
        assert running.err == f"error: {line}\n"
