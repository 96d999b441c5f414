"""hippo_mpi.serve install and uninstall: what systemd and launchd are told, and what becomes of it."""

from __future__ import annotations

import os
import plistlib
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hippo_mpi.errors import UserError
from hippo_mpi.serve import make_parser
from hippo_mpi.serving.service import Service, install, service_of
from tests.servers import SERVE

WORDS = st.lists(st.text(st.characters(codec="utf-8", exclude_categories=("Cc", "Cs")), min_size=1), max_size=4)
# Stands in for systemctl and loginctl, which need a system that was booted with systemd.
STAND_IN = '#!/bin/sh\necho "$(basename "$0") $*" >>"$HOME/asked"\nexit ${FAILS:-0}\n'


def systemd_words(text: bytes, setting: str) -> list[str]:
    """The words of a setting, as systemd.syntax(7) has them read."""
    lines = re.findall(rf"^{setting}=(.*)$", text.decode(), re.M)
    found = re.findall(r'"((?:[^"\\]|\\.)*)"', " ".join(lines))
    return [re.sub(r"\\(.)", r"\1", word).replace("%%", "%").replace("$$", "$") for word in found]


@given(words=WORDS)
def test_options_come_through_unchanged(words: list[str]) -> None:
    home = Path("/home/anna")
    command = [sys.executable, "-m", "hippo_mpi.serve", *words]
    unit, agent = service_of(words, "Linux", home), service_of(words, "Darwin", home)
    assert systemd_words(unit.text, "ExecStart")[: len(command)] == command
    assert plistlib.loads(agent.text)["ProgramArguments"][: len(command)] == command


def test_both_are_services_of_servers_that_could_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HOME", "/data/models of anna's, 100%")
    unit, agent = service_of(["--port", "80"], "Linux"), service_of(["--port", "80"], "Darwin")
    told = plistlib.loads(agent.text)
    assert make_parser().read(systemd_words(unit.text, "ExecStart")[3:]).port == 80
    assert make_parser().read(told["ProgramArguments"][3:]).log_file == Path(told["StandardErrorPath"])
    assert "HF_HOME=/data/models of anna's, 100%" in systemd_words(unit.text, "Environment")
    assert told["EnvironmentVariables"]["HF_HOME"] == os.environ["HF_HOME"]
    assert b"\nRestart=always\n" in unit.text and told["KeepAlive"] is True
    for options in (["--journal", "j"], ["--config", "hippo.yaml"], ["--config=hippo.yaml"]):
        assert b"state" not in service_of(options, "Linux").text
    for odd in ("a\nExecStart=/bin/sh", os.fsdecode(b"\xff")):
        for system in ("Linux", "Darwin"):
            with pytest.raises(UserError, match="control characters"):
                service_of(["--model", odd], system)


@pytest.mark.parametrize("name", ["ends\\", "ends "])
def test_a_folder_that_systemd_would_read_otherwise(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / name)
    with pytest.raises(UserError, match="backslash"):
        service_of([], "Linux")


def test_a_service_goes_on_if_its_new_file_can_not_be_written(tmp_path: Path) -> None:
    file, stopped = tmp_path / "unit", tmp_path / "stopped"
    file.write_text("as before")
    (tmp_path / "no-folder").write_text("")
    service = Service(file, b"", (), (("touch", str(stopped)),), (), (tmp_path / "no-folder" / "state",))
    with pytest.raises(UserError, match="can't write"):
        install(service)
    assert file.read_text() == "as before" and not stopped.exists()


def test_what_a_service_inherits_is_for_nobody_else(tmp_path: Path) -> None:
    file = tmp_path / "unit"
    for _ in range(2):
        assert install(Service(file, b"HF_ENDPOINT=https://me:secret@hub", (), (), (), (tmp_path,))) == 0
        assert file.stat().st_mode & 0o777 == 0o600
        file.chmod(0o644)  # as earlier versions have left it


def run(home: Path, *words: str, **env: str) -> subprocess.CompletedProcess[str]:
    path = f"{home / 'bin'}:{os.environ['PATH']}"
    return subprocess.run(
        [SERVE, *words], capture_output=True, text=True, timeout=60, cwd=home, env={**os.environ, "HOME": str(home), "PATH": path, **env},
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="systemd is Linux's")
def test_installed_and_uninstalled(tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    for name in ("systemctl", "loginctl"):
        (tmp_path / "bin" / name).write_text(STAND_IN)
        (tmp_path / "bin" / name).chmod(0o755)
    file = tmp_path / ".config" / "systemd" / "user" / "hippo-serve.service"
    refused = run(tmp_path, "install", "--model", "./nowhere")
    assert (refused.returncode, refused.stderr) == (2, "error: no such model folder: ./nowhere\n")
    refused = run(tmp_path, "install", HIPPO_API_KEYS="secret")
    assert refused.returncode == 2 and "--api-key-file" in refused.stderr
    assert not file.exists() and not (tmp_path / "asked").exists()

    for _ in range(2):
        made = run(tmp_path, "install", "--ranks", "1")
        assert (made.returncode, made.stderr) == (0, ""), made
        assert f"wrote {file}" in made.stdout and made.stdout.splitlines()[-1].endswith(
            "journalctl --user -u hippo-serve -f"
        )
    asked = (tmp_path / "asked").read_text().splitlines()
    begun = ["systemctl --user daemon-reload", "systemctl --user enable --now hippo-serve", "loginctl enable-linger"]
    assert asked == [*begun, "systemctl --user disable --now hippo-serve", *begun]
    if shutil.which("systemd-analyze"):
        analyzes = {**os.environ, "XDG_RUNTIME_DIR": str(tmp_path)}
        command = ["systemd-analyze", "--user", "verify", str(file)]
        found = subprocess.run(command, capture_output=True, text=True, timeout=60, env=analyzes)
        assert (found.returncode, found.stderr) == (0, "")
    assert (tmp_path / ".local" / "state" / "hippo-serve").is_dir()

    gone = run(tmp_path, "uninstall")
    assert gone.returncode == 0 and not file.exists() and str(file) in gone.stdout
    assert "loginctl disable-linger" in gone.stdout.splitlines()[-1]  # nobody knows who else has use for it
    assert run(tmp_path, "uninstall").stdout == f"not installed: there is no {file}\n"
    failed = run(tmp_path, "install", "--ranks", "1", FAILS="1")
    assert failed.returncode == 2 and failed.stderr.startswith("error: systemctl: status 1; start it with: systemctl ")
    assert failed.stderr.count("\n") == 1
