"""What pip installs, from a wheel, from an sdist and from a checkout: all of it works anywhere, in a folder elsewhere."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest

from hippo_mpi import cli
from hippo_mpi.errors import install_hint

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
BUNDLED = "hippo_mpi/bundled"


def run(*command: str | Path, cwd: Path) -> str:
    """Return a command's standard output, without a checkout or another environment on any path."""
    found = subprocess.run(
        command, cwd=cwd, capture_output=True, text=True, timeout=100, stdin=subprocess.DEVNULL,
        env={"PATH": "/usr/bin:/bin", "HOME": str(cwd), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert found.returncode == 0, found.stderr
    return found.stdout


def build(source: Path, place: Path, *targets: str) -> Path:
    """Build a wheel, and what else is asked for, by the project's own backend; the wheel."""
    asked = [word for target in targets for word in ("-t", target)]
    run(sys.executable, "-m", "hatchling", "build", "-d", place, *asked, cwd=source)
    (wheel,) = place.glob("*.whl")
    return wheel


def install(what: list[str], place: Path) -> Path:
    """Make an environment of our own dependencies and one more package; the folder of its commands."""
    venv.create(place, with_pip=True, symlinks=True)
    pip = [place / "bin" / "python", "-m", "pip", "install", "-q", "--no-index", "--no-deps", "--no-build-isolation"]
    (packages,) = place.glob("lib/python*/site-packages")
    # Folders on a .pth file are searched last, and their own .pth files, such as our editable one's, aren't read.
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib"))
    (place / "bin" / "mlx.launch").symlink_to(Path(sys.executable).parent / "mlx.launch")
    run(*pip, *what, cwd=place)
    return place / "bin"


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with the sdist and the wheel."""
    place = tmp_path_factory.mktemp("dist")
    build(ROOT, place, "sdist", "wheel")
    return place


@pytest.fixture(scope="module")
def wheel(built: Path) -> Path:
    return next(built.glob("*.whl"))


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return install([str(wheel)], tmp_path_factory.mktemp("wheel") / "venv")


@pytest.mark.slow
def test_a_wheel_has_what_the_checkout_has(wheel: Path) -> None:
    names = {*zipfile.ZipFile(wheel).namelist()}
    tracked = run("git", "-C", ROOT, "ls-files", "--cached", "--others", "--exclude-standard", cwd=ROOT).split()
    own = {name for name in tracked if name.startswith("hippo_mpi/") and (ROOT / name).exists()}
    models = {name for name in tracked if name.startswith("models/") and not name.startswith("models/training/")}
    expected = own | {f"{BUNDLED}/{name}" for name in models} | {f"{BUNDLED}/launch/grafana.json"}
    assert {name for name in names if ".dist-info/" not in name} == expected
    assert {"hippo_mpi/py.typed", f"{BUNDLED}/models/story-3m/model.safetensors"} <= expected


@pytest.mark.slow
def test_an_sdist_makes_the_same_wheel(built: Path, wheel: Path, tmp_path: Path) -> None:
    (sdist,) = built.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path, filter="data")
    (source,) = tmp_path.iterdir()
    second = zipfile.ZipFile(build(source, tmp_path, "wheel"))
    first, names = zipfile.ZipFile(wheel), zipfile.ZipFile(wheel).namelist()
    assert {name: first.read(name) for name in names} == {name: second.read(name) for name in second.namelist()}


@pytest.mark.slow
def test_an_installed_wheel_works_elsewhere(installed: Path, tmp_path: Path) -> None:
    (place,) = run(installed / "python", "-c", "import hippo_mpi; print(*hippo_mpi.__path__)", cwd=tmp_path).split()
    assert Path(place).is_relative_to(installed.parent)
    alone = run(installed / "hippo-mpi", "generate", "-m", "5", cwd=tmp_path)
    assert alone.strip()
    found = json.loads(run(installed / "hippo-mpi", "run", "-m", "5", "--json", cwd=tmp_path))
    assert found["text"] == alone.rstrip("\n")
    assert len(found["stats"]["ranks"]) == 2  # although there is no hostfile


@pytest.mark.slow
def test_mpirun_is_found_beside_it(installed: Path, tmp_path: Path) -> None:
    """Without `source venv/bin/activate`."""
    found = subprocess.run(
        [installed / "hippo-mpi", "run", "--backend", "mpi", "-n", "2"], capture_output=True, text=True, timeout=100,
        env={"PATH": str(tmp_path)},
    )  # fmt: skip
    assert found.returncode == 2
    assert found.stderr.startswith(
        "error: --backend mpi needs mpirun, which isn't installed: pip install "
    )  # no pip here
    (installed / "mpirun").symlink_to(Path(sys.executable).parent / "mpirun")
    assert run(installed / "hippo-mpi", "run", "--backend", "mpi", "-n", "2", "-m", "5", cwd=tmp_path).strip()


@pytest.mark.slow
def test_an_installed_wheel_has_all_commands(installed: Path, tmp_path: Path) -> None:
    for name in cli.COMMANDS:
        assert (installed / f"hippo_mpi.{name}").exists()
    assert "story-draft" in run(installed / "hippo_mpi.models", "--machine", "a:8", cwd=tmp_path)
    assert run(installed / "hippo-mpi", "dashboard", cwd=tmp_path) == (ROOT / "launch" / "grafana.json").read_text()
    assert "--precision" in run(installed / "hippo-mpi", "completion", "bash", cwd=tmp_path)


@pytest.mark.slow
def test_an_editable_installation_is_the_checkout(tmp_path: Path) -> None:
    commands = install(["--editable", str(ROOT)], tmp_path / "venv")
    found = run(commands / "python", "-c", "from hippo_mpi.config.bundled import BUNDLED; print(BUNDLED)", cwd=tmp_path)
    assert found == f"{ROOT}\n"
    assert not [*tmp_path.glob("venv/lib/python*/site-packages/hippo_mpi/")]
    assert run(commands / "hippo-mpi", "generate", "-m", "5", cwd=tmp_path).strip()


def test_hints_name_what_the_extras_list(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    extras = PROJECT["optional-dependencies"]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    pip = Path(sys.executable).with_name("pip")
    assert install_hint("serve") == f"{pip} install {shlex.join(extras['serve'])}"
    monkeypatch.chdir(pip.parent.parent)
    assert install_hint("page") == "bin/pip install 'gradio>=6' 'openai>=2'"
    monkeypatch.setenv("PATH", str(pip.parent))
    assert install_hint("page") == "pip install 'gradio>=6' 'openai>=2'"
