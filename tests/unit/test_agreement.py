"""What tells ranks that their code or their models differ."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import pytest

import hippo_mpi
from hippo_mpi.checkpoint import checkpoint as checkpoints
from hippo_mpi.checkpoint.checkpoint import Checkpoint
from hippo_mpi.config.bundled import BUNDLED_MODEL
from hippo_mpi.errors import LaunchError
from hippo_mpi.runtime.agreement import Introduction, given_speed, machines_of
from tests import ranks
from tests.local_ring import open_folder
from tests.parity.tiny_models import make_checkpoint

PACKAGE = Path(hippo_mpi.__file__).parent


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return open_folder(make_checkpoint("llama-full", tmp_path_factory.mktemp("llama")))


@pytest.mark.slow
def test_two_checkouts_of_one_version(tmp_path: Path) -> None:
    """They don't run together, although pip says the same of both."""
    shutil.copytree(PACKAGE, tmp_path / "hippo_mpi", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "models").symlink_to(BUNDLED_MODEL.parent)
    changed = tmp_path / "hippo_mpi" / "parallel" / "step_plan.py"
    changed.write_text(changed.read_text() + "\n# another header\n")
    command = [ranks.sys.executable, "-P", "-m", "hippo_mpi.generate", "--max-tokens", "1"]
    other = ["env", f"PYTHONPATH={tmp_path}{os.pathsep}", *command]
    with ranks.ring([command, other]) as running:
        assert running[0].wait() == 2
        assert "have different versions: hippo-mpi's files " in running[0].err and "mlx" not in running[0].err


def test_adapters_of_different_scales(checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def digest(name: str, scale: float) -> str:
        folder = tmp_path / name
        folder.mkdir()
        mx.save_safetensors(str(folder / "adapters.safetensors"), {"a": mx.ones(4)})
        (folder / "adapter_config.json").write_text(json.dumps({"lora_parameters": {"scale": scale}}))
        return replace(checkpoint, source=replace(checkpoint.source, adapter_path=str(folder))).digest()

    assert digest("a", 10.0) == digest("b", 10.0) != digest("c", 20.0)
    assert digest("d", 10.0) != checkpoint.digest()
    monkeypatch.setattr(checkpoints, "commit_of", lambda folder: "0123")  # as of a model from the hub
    assert digest("e", 10.0) == digest("f", 10.0) != digest("g", 20.0)


def introduced(speeds: list[tuple[float, bool]]) -> list[float]:
    """The speeds that are planned with, of hosts whose own were measured (True) or said."""
    told = [
        Introduction(f"mini{i}", {}, {}, 8 << 30, speed, is_measured, 30.0)
        for i, (speed, is_measured) in enumerate(speeds)
    ]
    return [machine.speed for machine in machines_of(told)]


def test_speeds_are_relative_and_may_be_said(monkeypatch: pytest.MonkeyPatch) -> None:
    assert introduced([(100e9, True), (400e9, True), (380e9, True)]) == [0.25, 1.0, 1.0]
    assert introduced([(2.0, False), (400e9, True)]) == [1.0, 0.5], "nothing was said of the other"
    assert introduced([(1.0, False), (1.05, False)]) == [1 / 1.05, 1.0], "what is said is exact"
    monkeypatch.setenv("HIPPO_SPEED", "0")
    with pytest.raises(LaunchError, match="HIPPO_SPEED: 0 is not"):
        given_speed()
