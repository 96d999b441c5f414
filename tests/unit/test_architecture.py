"""Rules that keep the code as DESIGN says: imports go down, MLX's distributed calls stay in transport."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "hippo_mpi"
# From the top down; a package may import from itself and from those after it.
LAYERS = ["", "serving", "engine", "parallel", "shard", "transport", "config", "errors", "environment", "units"]
MODULES = sorted(PACKAGE.rglob("*.py"))


def layer(module: str) -> int:
    parts = module.split(".")
    name = parts[1] if len(parts) > 1 else ""
    return LAYERS.index(name) if name in LAYERS else 0


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_go_down(path: Path) -> None:
    own = layer(".".join(path.relative_to(ROOT).with_suffix("").parts))
    for node in ast.walk(ast.parse(path.read_text())):
        names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and node.module:
            names.append(node.module)
        for name in names:
            if name.startswith("hippo_mpi."):
                assert layer(name) >= own, f"{path.name} imports {name}, which is above it"


def test_only_transport_talks_to_mx_distributed() -> None:
    for path in MODULES:
        if path.parent.name != "transport":
            attributes = [n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Attribute)]
            assert not [n for n in attributes if n.attr == "distributed"], path


def test_only_the_schedule_is_free_of_mlx_by_rule() -> None:
    for name in ("parallel/schedule.py", "parallel/step_plan.py", "engine/request.py", "engine/scheduler.py"):
        assert "mlx.core" not in (PACKAGE / name).read_text()


def test_launching_loads_no_mlx() -> None:
    code = "import sys, hippo_mpi.run; sys.exit('mlx.core' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
