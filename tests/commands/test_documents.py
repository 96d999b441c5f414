"""What the documents say is true: the file tree, the options, the exit statuses."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from hippo_mpi import audit, batch, benchmark, chat, errors, generate, models, page, plan, run, serve
from hippo_mpi.config.yaml_file import read_config
from hippo_mpi.errors import HippoError

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
ARCHITECTURE = (ROOT / "hippo_mpi" / "README.md").read_text()
PARSERS = {
    m.__name__.split(".")[-1]: m.make_parser()
    for m in (audit, batch, benchmark, chat, generate, models, page, plan, serve)
}
# Options that mlx.launch takes out of its program's arguments, read off its parser.
LAUNCH_OPTIONS = set(
    re.findall(
        r'"(--?[a-z][a-z-]*)"',
        (Path(__import__("mlx").__path__[0]) / "_distributed_utils" / "launch.py").read_text().split("def main")[1],
    )
)


def tree_entries() -> set[str]:
    """Paths in the file tree."""
    block = ARCHITECTURE.split("## File tree")[1].split("```")[1]
    found, folders = set(), []
    for line in block.strip("\n").splitlines():
        indent = (len(line) - len(line.lstrip())) // 2
        names = re.split(r"\s{2,}|(?<=/)\s", line.strip())[0].split()
        names = [n for n in names if "/" in n or "." in n or n in ("LICENSE", "hostfile")]
        folders = folders[:indent]
        for name in names:
            found.add("/".join([*(f.rstrip("/") for f in folders), name]))
        if line.strip().split()[0].endswith("/"):
            folders = [*folders, line.strip().split()[0]]
    return found


def test_every_file_of_the_tree_exists() -> None:
    missing = [entry for entry in tree_entries() if not (ROOT / entry).exists()]
    assert not missing


def test_every_module_is_in_the_tree() -> None:
    entries = tree_entries()
    for path in [*(ROOT / "hippo_mpi").rglob("*.py"), *(ROOT / "launch").iterdir(), *(ROOT / "tests").glob("*.py")]:
        if path.name != "__init__.py":
            assert str(path.relative_to(ROOT)) in entries
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout.split()
    for name in {path.split("/")[0] for path in tracked if not path.startswith(".git")}:
        assert any(entry.split("/")[0] == name for entry in entries), name


@pytest.mark.parametrize("command", PARSERS)
def test_no_option_is_mistaken_for_one_of_mlx_launch(command: str) -> None:
    for action in PARSERS[command]._actions:
        for option in action.option_strings:
            # serve starts launchers itself; inside one, these two are the launcher's.
            if option not in ("-h", "--help") and (command, option) not in (
                ("serve", "--hostfile"),
                ("serve", "--backend"),
            ):
                assert not [o for o in LAUNCH_OPTIONS if o.startswith(option)], option


def test_options_in_the_readme_exist() -> None:
    known = {o for p in [*PARSERS.values(), run.make_parser()] for a in p._actions for o in a.option_strings}
    known |= LAUNCH_OPTIONS | {"--quick", "--clients", "--strict", "--preload"}
    mentioned = set(re.findall(r"(?<![\w-])(--[a-z][a-z-]+)", README))
    assert mentioned <= known, mentioned - known


def test_commands_of_the_package_are_in_the_readme() -> None:
    scripts = re.findall(r'^"(hippo_mpi\.\w+)" =', (ROOT / "pyproject.toml").read_text(), re.M)
    assert scripts
    for script in scripts:
        assert f"| `{script}` |" in README


def test_exit_statuses_in_the_readme() -> None:
    def codes(kind: type[HippoError]) -> set[int]:
        return {kind.exit_code}.union(*(codes(sub) for sub in kind.__subclasses__()))

    listed = {int(n) for n in re.findall(r"^\| (\d) \|", README, re.M)}
    assert listed == codes(HippoError) | {0, batch.SOME_FAILED}


def test_the_error_tree_is_drawn_as_it_is() -> None:
    drawn = re.findall(r"(?:-- )?(\w+Error)\b", errors.__doc__ or "")
    classes = [n for n, v in vars(errors).items() if isinstance(v, type) and issubclass(v, HippoError)]
    assert sorted(drawn) == sorted(classes)


def test_help_names_every_default() -> None:
    for parser in (parser for name, parser in PARSERS.items() if name != "audit"):  # which has no defaults
        assert "default:" in parser.format_help()


def test_help_has_defaults_as_one_types_them() -> None:
    for parser in PARSERS.values():
        assert not re.search(r"\(default:\s+[\[({'\"]", parser.format_help())


def test_the_server_s_file_in_the_readme_is_one(tmp_path: Path) -> None:
    (block,) = re.findall(r"^```yaml\n(.*?)^```", README, re.M | re.S)
    (tmp_path / "hippo.yaml").write_text(block)
    found = read_config(tmp_path / "hippo.yaml")
    first = [option.removeprefix("--model=") for option in found.options if option.startswith("--model=")]
    assert first[0] in found.cards and len(found.cards) == len(found.hosts) == 2


@pytest.mark.parametrize("name", PARSERS)
def test_defaults_are_shown_as_they_are_typed(name: str) -> None:
    text = " ".join(PARSERS[name].format_help().split())
    assert "(default: (" not in text and "(default: [" not in text
    if name in ("plan", "benchmark"):
        assert "(default: 1,4,16)" in text
