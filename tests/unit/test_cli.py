"""hippo-mpi: its verbs are the commands, and shells complete them without loading MLX.

python tests/unit/test_cli.py        # writes the completions anew, after a change of options
"""

from __future__ import annotations

import argparse
import importlib
import json
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import shtab

from hippo_mpi import cli
from hippo_mpi.cluster import __main__ as cluster

ROOT = Path(__file__).parents[2]
HIPPO = Path(sys.executable).parent / "hippo-mpi"
FOLDERS = {"--model", "--draft-model", "--adapter-path", "--catalogue"}


def parser_of_everything() -> argparse.ArgumentParser:
    """Return hippo-mpi's parser with each command's own options below its verb."""
    parser = cli.make_parser()
    (verbs,) = (action for action in parser._actions if isinstance(action, argparse._SubParsersAction))
    for name in cli.COMMANDS:
        # What `run` doesn't take is for the command that it starts, which is generate if nothing is said.
        for source in (name, "generate") if name == "run" else (name,):
            verbs.choices[name]._add_container_actions(importlib.import_module(cli.module_of(source)).make_parser())
        if name == "cluster":
            (below,) = (a for a in verbs.choices[name]._actions if isinstance(a, argparse._SubParsersAction))
            for verb, verb_parser in below.choices.items():
                verb_parser._add_container_actions(cluster.parser_of(verb))
        for action in verbs.choices[name]._actions:
            if str(ROOT) in str(action.default):
                action.default = None  # elsewhere it is another
            if FOLDERS & {*action.option_strings}:
                action.complete = shtab.DIRECTORY  # type: ignore[attr-defined]
            elif action.type is Path or action.dest in ("prompts", "log"):
                action.complete = shtab.FILE  # type: ignore[attr-defined]
    return parser


def script(shell: str) -> str:
    return str(shtab.complete(parser_of_everything(), shell)).rstrip("\n") + "\n"


def hippo(*words: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run([HIPPO, *words], capture_output=True, text=True, timeout=60, cwd=cwd)


@pytest.mark.parametrize("shell", cli.SHELLS)
def test_completions_are_those_of_the_options(shell: str) -> None:
    """If not: python tests/unit/test_cli.py"""
    assert hippo("completion", shell).stdout == script(shell)


COMPLETIONS = [
    ("hippo-mpi gen", {"generate"}),
    ("hippo-mpi generate --prec", {"--precision"}),
    ("hippo-mpi plan --sim", {"--simulate"}),
    ("hippo-mpi run --command hippo_mpi.ch", {"hippo_mpi.chat"}),
    ("hippo-mpi run --show", {"--show-plan"}),
    ("hippo-mpi serve --log-level w", {"warning"}),
    ("hippo-mpi audit v", {"verify"}),
    ("hippo-mpi cluster doc", {"doctor"}),
    ("hippo-mpi cluster doctor --sa", {"--save"}),
    ("hippo-mpi completion z", {"zsh"}),
    ("hippo-mpi generate --model here", {"here-is-one/"}),
    ("hippo-mpi batch prom", {"prompts.txt"}),
]


@pytest.mark.parametrize(("line", "expected"), COMPLETIONS, ids=[line for line, _ in COMPLETIONS])
def test_bash_completes(line: str, expected: set[str], tmp_path: Path) -> None:
    (tmp_path / "here-is-one").mkdir()
    (tmp_path / "prompts.txt").touch()
    *words, last = line.split()
    code = f"""
        source <("{HIPPO}" completion bash)
        COMP_WORDS=({line}); COMP_CWORD={len(words)}; COMP_LINE='{line}'; COMP_POINT={len(line)}
        eval "$(complete -p hippo-mpi | sed -E 's/.*-F ([^ ]+).*/\\1/') hippo-mpi {last} {words[-1]}"
        printf '%s\\n' "${{COMPREPLY[@]}}"
    """
    found = subprocess.run(["bash", "-c", code], capture_output=True, text=True, cwd=tmp_path, timeout=20)
    assert {word.rstrip("/ ") for word in found.stdout.split("\n") if word} == {w.rstrip("/") for w in expected}, found


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_other_shells_can_read_theirs(shell: str, tmp_path: Path) -> None:
    if not shutil.which(shell):
        pytest.skip(f"no {shell} here")
    (tmp_path / "script").write_text(script(shell))
    found = subprocess.run([shell, "-n", "script"], capture_output=True, text=True, cwd=tmp_path, timeout=20)
    assert (found.returncode, found.stderr) == (0, "")


def test_fish_completes(tmp_path: Path) -> None:
    if not shutil.which("fish"):
        pytest.skip("no fish here")
    (tmp_path / "script").write_text(script("fish"))
    for line, expected in (("hippo-mpi gen", "generate"), ("hippo-mpi generate --prec", "--precision")):
        code = f"source script; complete -C '{line}'"
        found = subprocess.run(["fish", "-c", code], capture_output=True, text=True, cwd=tmp_path, timeout=20)
        assert [row.split("\t")[0] for row in found.stdout.splitlines()] == [expected], found


def test_verbs_are_the_dotted_commands() -> None:
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    assert {name: f"{cli.module_of(name)}:main" for name in cli.COMMANDS} == {
        name.removeprefix("hippo_mpi."): place for name, place in scripts.items() if name != "hippo-mpi"
    }


@pytest.mark.parametrize(
    "words", [["--help"], ["--version"], ["completion", "bash"], ["dashboard"], ["run", "--version"]]
)
def test_no_mlx_is_loaded_to_tell_what_there_is(words: list[str]) -> None:
    code = f"""
import atexit, sys
from hippo_mpi import cli
from hippo_mpi.cluster import __main__ as cluster
atexit.register(lambda: print("mlx.core" in sys.modules or "mlx_lm" in sys.modules))
sys.argv = ["hippo-mpi", *{words}]
cli.main()
"""
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (found.returncode, found.stdout.splitlines()[-1]) == (0, "False"), found.stderr


def test_help_has_a_line_for_every_verb() -> None:
    found = hippo("--help")
    assert found.returncode == 0 and hippo().stdout == found.stdout
    listed = [line.split()[0] for line in found.stdout.splitlines() if re.match(r"    [a-z]+  +\S", line)]
    assert listed == [*cli.COMMANDS, "completion", "dashboard"]


def test_version_is_the_one_of_pyproject() -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert hippo("--version").stdout.startswith(f"hippo-mpi: hippo-mpi {version}, mlx ")


def test_a_verb_that_is_none_is_named() -> None:
    found = hippo("generat")
    assert (found.returncode, found.stdout) == (2, "")
    assert found.stderr.startswith("error: argument COMMAND [options]: invalid choice: 'generat' (choose from ")
    assert found.stderr.count("\n") == 1
    assert hippo("completion", "ksh").returncode == 2


def test_options_and_status_are_the_command_s() -> None:
    found = hippo("audit", "verify", "/nowhere/audit.jsonl")
    assert found.returncode == 2 and "/nowhere" in found.stderr
    assert hippo("audit", "--help").stdout.startswith("usage: hippo_mpi.audit ")


def test_the_dashboard_is_json(tmp_path: Path) -> None:
    assert json.loads(hippo("dashboard", cwd=tmp_path).stdout)["panels"]


if __name__ == "__main__":
    for name in cli.SHELLS:
        (ROOT / "hippo_mpi" / "completions" / f"hippo-mpi.{name}").write_text(script(name))
