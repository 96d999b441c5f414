"""What ranks need of a model's files, by its own code, and that a run finds what sync has brought."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants

from hippo_mpi.checkpoint.checkpoint import ModelSource, load_weights, open_checkpoint
from hippo_mpi.checkpoint.hub import find_model
from hippo_mpi.cluster.sync.model_files import ModelFiles
from hippo_mpi.cluster.sync.place import Place
from hippo_mpi.config.bundled import BUNDLED_MODEL
from hippo_mpi.errors import ModelError, UserError
from hippo_mpi.runtime.model_needs import Question, answer
from hippo_mpi.views.spans import merged, num_bytes, write_here
from hippo_mpi.views.view import synced_view
from tests.parity.test_depth import make_adapter

NAME = "model.safetensors"


def question(model: str, **given: Any) -> Question:
    fields: dict[str, Any] = {
        "model": model, "revision": None, "precision": None, "trust_remote_code": False, "layer_split": None,
        "max_context": None, "whole": False, "ranks": [{"host": "a"}, {"host": "b"}],
    }  # fmt: skip
    return Question(**fields | given)


def test_ranks_need_their_own_layers_and_together_all() -> None:
    found = answer(question(str(BUNDLED_MODEL), layer_split=[5, 7]))
    size = found["files"]["sizes"][NAME]
    both = [found["needs"][rank][NAME] for rank in range(2)]
    assert merged([*both[0], *both[1]]) == [(0, size)]
    assert num_bytes(both[0]) + num_bytes(both[1]) == size + found["heads"][NAME]
    assert found["counts"] == [5, 7] and "config.json" in found["small"] and NAME not in found["small"]
    whole = answer(question(str(BUNDLED_MODEL), whole=True))
    assert whole["needs"] == [{NAME: [(0, size)]}] * 2 and whole["counts"] is None


def test_the_planner_shares_layers_out() -> None:
    ranks = [
        {"host": name, "memory_bytes": 8 << 30, "bytes_per_s": speed, "flops_per_s": 30 * speed}
        for name, speed in (("a", 1.0), ("b", 3.0))
    ]
    counts = answer(question(str(BUNDLED_MODEL), ranks=ranks))["counts"]
    assert sum(counts) == 12 and counts[0] < counts[1]


@pytest.mark.parametrize(
    ("model", "told"),
    [("story-3m", "comes with hippo_mpi"), ("/no/such", "no such model folder"), ("/", "has no model")],
)
def test_models_that_can_not_be_synced(model: str, told: str) -> None:
    with pytest.raises(ModelError, match=told):
        answer(question(model))


def test_a_synced_folder_is_found_by_what_was_typed_and_is_the_same_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its layers load; others are told of."""
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path))
    found = answer(question(str(BUNDLED_MODEL), layer_split=[5, 7]))
    model = replace(ModelFiles.from_object(found["files"]), model="~/models/tale", origin="/home/anna/models/tale")
    place = Place(None, model)  # type: ignore[arg-type]
    for name in found["small"]:
        place.answer({"op": "stage", "name": name, "start": 0}, (BUNDLED_MODEL / name).read_bytes())
    whole = (BUNDLED_MODEL / NAME).read_bytes()
    place.answer({"op": "stage", "name": NAME, "start": 0}, whole[: found["heads"][NAME]])
    place.answer({"op": "commit"}, b"")
    for start, stop in found["needs"][1][NAME]:
        write_here(place.folder / NAME, start, whole[start:stop])
    assert find_model("~/models/tale", None) == find_model("/home/anna/models/tale", None) == place.folder
    assert synced_view("models/tale") is None and synced_view("/home/bob/models/tale") is None
    here, there = (open_checkpoint(ModelSource(folder)) for folder in (BUNDLED_MODEL, place.folder))
    assert here.digest() == there.digest()
    load_weights(there, there.flow.stage_weights(5, 12))
    with pytest.raises(
        ModelError, match=r"layers of /home/anna/models/tale aren't on this host: run hippo_mpi\.cluster sync"
    ):
        load_weights(there, there.flow.stage_weights(4, 12))


def test_an_adapter_is_whole_on_every_host_at_its_own_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a link to where it was synced to, which follows a newer one, and takes nobody's place."""
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path / "home"))
    here, there = tmp_path / "here" / "adapter", tmp_path / "there" / "adapter"
    here.parent.mkdir()
    make_adapter(BUNDLED_MODEL, here, 12)
    name = "adapters.safetensors"
    for _ in range(2):
        (here / "adapter_config.json").write_text(f"{(here / 'adapter_config.json').read_text()}\n")
        found = answer(question(str(here), whole=True, is_adapter=True))
        model = replace(ModelFiles.from_object(found["files"]), link=str(there))
        place = Place(None, model)  # type: ignore[arg-type]
        whole = (here / name).read_bytes()
        place.answer({"op": "stage", "name": name, "start": 0}, whole[: found["heads"][name]])
        place.answer(
            {"op": "stage", "name": "adapter_config.json", "start": 0}, (here / "adapter_config.json").read_bytes()
        )
        place.answer({"op": "commit"}, b"")
        assert found["needs"] == [{name: [(0, len(whole))]}] * 2 and found["small"] == ["adapter_config.json"]
        write_here(place.folder / name, 0, whole)
        place.answer({"op": "link"}, b"")
        assert there.is_symlink()
        digests = [open_checkpoint(ModelSource(BUNDLED_MODEL, str(path))).digest() for path in (here, there)]
        assert digests[0] == digests[1]
    there.unlink()
    there.mkdir()
    (there / name).write_bytes(whole)
    with pytest.raises(UserError, match="another adapter than here"):
        Place(None, model)  # type: ignore[arg-type]
    (there / "adapter_config.json").write_bytes((here / "adapter_config.json").read_bytes())
    place = Place(None, model)  # type: ignore[arg-type]
    assert place.answer({"op": "open"}, b"")[0]["is_kept"] and place.answer({"op": "link"}, b"")[0] == {}
    assert there.is_dir() and not there.is_symlink()
    with pytest.raises(ModelError, match=r"--adapter-path .+ has no adapters\.safetensors"):
        answer(question(str(here.parent), whole=True, is_adapter=True))
