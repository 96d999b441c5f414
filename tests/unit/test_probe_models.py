"""What a host says of a model's weights there: of a folder that sync has brought, too, as a run finds it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from hippo_mpi.cluster.asking.probe import is_path, model_bytes
from hippo_mpi.views import view


@pytest.mark.parametrize("asked", ["/Users/anna/models/bear", "./bear", "/elsewhere/bear"])
def test_a_folder_that_sync_brought_is_found_as_a_run_finds_it(
    asked: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.setattr(view, "views_folder", lambda: tmp_path / "hippo_mpi")
    folder = tmp_path / "hippo_mpi" / "local--bear--0123456789abcdef"
    folder.mkdir(parents=True)
    note = {"origin": "/Users/anna/models/bear", "models": ["./bear"], "commit": "0123", "layout": view.LAYOUT}
    (folder / view.NOTE).write_text(json.dumps(note))
    (folder / "model.safetensors").write_bytes(b"x" * 8192)
    bad = tmp_path / "hippo_mpi" / "local--bad--0" / view.NOTE
    bad.parent.mkdir()
    bad.write_text("[]")
    found = model_bytes(asked)
    assert found is not None
    assert (found["here"] > 0) == (view.synced_view(asked) is not None) == (asked != "/elsewhere/bear")


def test_a_repo_is_no_path() -> None:
    assert [is_path(name) for name in ("org/model", "story-3m", "./a", "../a/b", "~/a", "/a", "a/b/c")] == [
        False, False, True, True, True, True, True,
    ]  # fmt: skip
