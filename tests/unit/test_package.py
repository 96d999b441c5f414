"""What an installation by pip has: every package, the bundled models, and hints that can be typed."""

from __future__ import annotations

import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

from hippo_mpi.errors import install_hint

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
SETUPTOOLS = PROJECT["tool"]["setuptools"]


def test_every_package_is_listed() -> None:
    found = {".".join(path.parent.relative_to(ROOT).parts) for path in (ROOT / "hippo_mpi").rglob("__init__.py")}
    assert {*SETUPTOOLS["packages"]} == found | {"hippo_mpi.bundled"}


def test_the_bundled_model_works_where_pip_has_put_it(tmp_path: Path) -> None:
    """Inside the package instead of beside it; a wheel has exactly these files."""
    shutil.copytree(ROOT / "hippo_mpi", tmp_path / "hippo_mpi")
    source = ROOT / SETUPTOOLS["package-dir"]["hippo_mpi.bundled"]
    for pattern in SETUPTOOLS["package-data"]["hippo_mpi.bundled"]:
        for path in source.glob(pattern):
            place = tmp_path / "hippo_mpi" / "bundled" / path.relative_to(source)
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, place)
    for module, *options in (["generate", "-m", "5", "--model", "story-draft"], ["models", "--machine", "a:8"]):
        command = [sys.executable, "-m", f"hippo_mpi.{module}", *options]
        found = subprocess.run(
            command, cwd=tmp_path, capture_output=True, text=True, timeout=100, stdin=subprocess.DEVNULL
        )
        assert found.returncode == 0, found.stderr
    assert "story-3m" in found.stdout


def test_hints_name_what_the_extras_list() -> None:
    extras = PROJECT["project"]["optional-dependencies"]
    assert install_hint("serve") == f"pip install {shlex.join(extras['serve'])}"
    assert install_hint("page") == "pip install 'gradio>=6' 'openai>=2'"
