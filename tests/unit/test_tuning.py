"""Settings that tune shows and changes: of Linux and of macOS, whose commands are small ones here that keep their state."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from hippo_mpi.cluster.cabling.address_plan import Command
from hippo_mpi.cluster.setting_up import agent, tuning
from hippo_mpi.cluster.setting_up.tuning import Setting, settings_of
from hippo_mpi.cluster.verbs.tune import table

GIB = 1 << 30
LINUX = {
    "rmem_max": "212992\n-rw-r--r-- 1 root\n", "wmem_max": "33554432\n-rw-r--r-- 1 root\n", "files": "1024\n524288\n", "limits": "", "pages": "always madvise [never]\n",
    "governor": "conservative performance schedutil\n",
    "governors": "".join(f"/sys/devices/system/cpu/cpu{n}/cpufreq/scaling_governor:{kind}\n" for n, kind in enumerate(["schedutil", "performance"])),
}  # fmt: skip
CUSTOM = "Battery Power:\n sleep                1\nAC Power:\n autorestart          0\n sleep                10 (prevented by x)\n"


def wanted(settings: list[Setting]) -> dict[str, str | None]:
    return {one.name: one.wanted for one in settings}


def test_linux() -> None:
    found = settings_of("Linux", LINUX)
    assert wanted(found) == {
        "net.core.rmem_max": "16777216", "net.core.wmem_max": None, "open files": "65536", "CPU governor": "performance",
        "transparent_hugepage": "madvise",
    }  # fmt: skip
    assert all((one.command is None) == (one.wanted is None) for one in found)
    governor = next(one.command for one in found if one.name == "CPU governor")
    assert (
        governor
        and "schedutil >/sys/devices/system/cpu/cpu0" in governor.undo[2]
        and "performance >" in governor.undo[2]
    )
    lines = table({"mini2": found})
    assert lines[0].split() == ["host", "setting", "now", "wanted", "lasts", "root", "why"]
    assert " ".join(lines[1].split()).startswith("mini2 net.core.rmem_max 212992 16777216 until reboot sudo bytes")
    assert "as it is" in lines[2]


def test_linux_that_is_well_or_says_nothing() -> None:
    well = {
        "rmem_max": "33554432",
        "wmem_max": "33554432",
        "files": "unlimited unlimited",
        "governors": "",
        "pages": "[always] never",
    }
    assert set(wanted(settings_of("Linux", {**LINUX, **well})).values()) == {None}
    assert settings_of("Linux", dict.fromkeys(LINUX)) == [] == settings_of("FreeBSD", {})
    # Once it is set, the limit is another from the next login on, and isn't set again.
    limits = settings_of("Linux", {**LINUX, "limits": tuning._LIMITS_TEXT})
    assert wanted(limits)["open files"] is None
    assert wanted(settings_of("Linux", {**LINUX, "limits": "somebody's own"}))["open files"] is None


def mac(memory: int, limit: int) -> dict[str, str | None]:
    return {
        "settings": f"hw.memsize: {memory}\niogpu.wired_limit_mb: {limit}\n",
        "power": CUSTOM,
        "files": "256\nunlimited\n",
    }


@pytest.mark.parametrize(
    ("memory", "limit", "asked", "value"),
    [
        (16 * GIB, 0, None, "12569"),  # all but 4 GB
        (128 * GIB, 0, None, "117964"),  # all but a tenth
        (128 * GIB, 0, 100_000, "100000"),
        (128 * GIB, 0, 130_000, "117964"),
        (128 * GIB, 130_000, None, "117964"),
        (128 * GIB, 117_964, None, None),
    ],
)
def test_a_mac_s_gpu_never_gets_so_much_that_the_rest_runs_short(
    memory: int, limit: int, asked: int | None, value: str | None
) -> None:
    found = settings_of("Darwin", mac(memory, limit), asked)
    assert wanted(found)["iogpu.wired_limit_mb"] == value
    assert wanted(found)["pmset sleep"] == "0" and wanted(found)["pmset autorestart"] == "1"


SYSCTL = """#!{python}
import json, pathlib, sys
state = pathlib.Path({state!r})
found = json.loads(state.read_text())
for word in sys.argv[1:]:
    name, _, value = word.partition("=")
    if value:
        found[name] = value
    print(f"{{name}}: {{found[name]}}")
state.write_text(json.dumps(found))
"""
PMSET = """#!{python}
import json, pathlib, sys
state = pathlib.Path({state!r})
found = json.loads(state.read_text())
if sys.argv[1] == "-c":
    found[sys.argv[2]] = sys.argv[3]
state.write_text(json.dumps(found))
print("AC Power:\\n" + "".join(f" {{name}}  {{found[name]}}\\n" for name in ("sleep", "autorestart")))
"""


@pytest.fixture
def fake_mac(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A Mac of 64 GiB, whose two commands keep their state in a file."""
    state = tmp_path / "state"
    state.write_text(
        json.dumps({"hw.memsize": str(64 * GIB), "iogpu.wired_limit_mb": "0", "sleep": "10", "autorestart": "0"})
    )
    for name, text in (("sysctl", SYSCTL), ("pmset", PMSET)):
        (tmp_path / name).write_text(text.format(python=sys.executable, state=str(state)))
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("HOME", str(tmp_path))
    return state


def there(words: tuple[str, ...] | list[str], folder: Path) -> list[str]:
    """The same command, of the fake Mac."""
    return [str(folder / words[0].rpartition("/")[2]) if words[0].startswith("/usr/") else words[0], *words[1:]]


def fake_settings(folder: Path) -> list[Setting]:
    said = agent.outputs({name: there(words, folder) for name, words in tuning.READ["Darwin"].items()})
    settings = settings_of("Darwin", said)
    return [
        replace(
            one,
            command=Command(tuple(there(one.command.do, folder)), tuple(there(one.command.undo, folder)))
            if one.command
            else None,
        )
        for one in settings
    ]


def applied(settings: list[Setting]) -> str:
    commands = [one.command for one in settings if one.command]
    sent = [{"do": list(one.do), "undo": list(one.undo), "root": False} for one in commands]
    return agent.apply(sent, of="tune", runs=True) if sent else ""


def test_apply_and_undo_are_idempotent_and_give_back_the_same(fake_mac: Path) -> None:
    before = fake_mac.read_bytes()
    assert applied(fake_settings(fake_mac.parent)) == ""
    after = fake_mac.read_bytes()
    assert after != before and set(wanted(fake_settings(fake_mac.parent)).values()) == {None}
    assert applied(fake_settings(fake_mac.parent)) == "" and fake_mac.read_bytes() == after
    for _ in range(2):
        assert agent.undo(["tune"], is_root_done=False) == {"failed": [], "left": []}
        assert fake_mac.read_bytes() == before and not (fake_mac.parent / ".hippo-mpi").exists()


def test_setup_s_part_stays_if_tune_s_is_put_back(fake_mac: Path) -> None:
    agent.add_key("ssh-ed25519 AAAA me")
    before = fake_mac.read_bytes()
    applied(fake_settings(fake_mac.parent))
    assert agent.undo(["tune"], is_root_done=False)["failed"] == []
    assert fake_mac.read_bytes() == before
    assert {entry["kind"] for entry in agent.changes()} == {"made", "folder", "line"}
    assert agent.undo(["setup"], is_root_done=False)["failed"] == [] and not (fake_mac.parent / ".ssh").exists()


def test_nothing_is_changed_without_a_yes(tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    command = [sys.executable, "-m", "hippo_mpi.cluster", "tune", "--apply"]
    env = {**os.environ, "HOME": str(tmp_path / "home")}
    found = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60, env=env)
    assert found.returncode == 0 and found.stdout.startswith("host "), found.stderr
    assert not list((tmp_path / "home").iterdir())
    again = subprocess.run([*command, "--undo"], capture_output=True, text=True, timeout=60, env=env)
    assert (again.returncode, again.stderr) == (2, "error: give --apply, or --undo, not both\n")
