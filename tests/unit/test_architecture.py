"""Rules that keep the code as CONTRIBUTING says: imports go down, in no circles, and MLX stays where it is needed."""

from __future__ import annotations

import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "hippo_mpi"
# From the top down, the commands first; a room may import from itself and from those after it.
ROOMS = [
    "", "library", "measure", "runtime", "offline", "serving", "protocols", "engine", "parallel", "planning", "sharding", "checkpoint",
    "tracing", "cluster", "views", "transport", "config", "durable_files", "errors", "environment", "units",
]  # fmt: skip
MODULES = sorted(PACKAGE.rglob("*.py"))
# The page, launchers, and the front's memory run on machines and in processes where MLX has no business.
WITHOUT_MLX = [
    *("cli", "run", "page", "audit", "serving.supervision.request_broker", "serving.supervision.supervisor"),
    *sorted(f"cluster.{path.stem}" for path in (PACKAGE / "cluster").glob("[a-z]*.py")),
    *("cluster.verbs.sync", "cluster.sync.place", "checkpoint.hub_place"),
]


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imports_of(path: Path) -> set[str]:
    """Modules of ours that a file imports, also those that it imports later."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    known = {module_of(path) for path in MODULES}
    return {name for name in names if name in known and name != "hippo_mpi"}


def room(module: str) -> int:
    name = module.split(".")[1] if "." in module else ""
    return ROOMS.index(name) if name in ROOMS else 0


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_go_down(path: Path) -> None:
    own = module_of(path)
    for name in imports_of(path):
        assert room(name) >= room(own), f"{own} imports {name}, which is above it"
        assert room(name) > 0, f"the command {own} imports the command {name}"


def test_no_module_imports_itself_by_way_of_others() -> None:
    graph = {module_of(path): imports_of(path) for path in MODULES if path.name != "__init__.py"}
    assert list(TopologicalSorter(graph).static_order())  # or a CycleError names them


def test_packages_import_nothing() -> None:
    for path in MODULES:
        if path.name == "__init__.py" and path.parent != PACKAGE:  # whose names are imported when they are used
            assert not imports_of(path), path


def test_only_transport_talks_to_mx_distributed() -> None:
    for path in MODULES:
        if path.parent.name != "transport":
            attributes = [n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Attribute)]
            assert not [n for n in attributes if n.attr == "distributed"], path


def test_only_the_schedule_is_free_of_mlx_by_rule() -> None:
    for name in ("parallel/schedule.py", "parallel/step_plan.py", "engine/request.py", "engine/scheduler.py"):
        assert "mlx.core" not in (PACKAGE / name).read_text()


@pytest.mark.parametrize("module", WITHOUT_MLX)
def test_no_mlx_is_loaded(module: str) -> None:
    code = f"import sys, hippo_mpi.{module}; sys.exit('mlx.core' in sys.modules or 'mlx_lm' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
