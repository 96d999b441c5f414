"""What the documents say is true: the file tree, options, endpoints, exit statuses, examples, links and error lines."""

from __future__ import annotations

import ast
import contextlib
import io
import json
import re
import shlex
import subprocess
import urllib.request
from pathlib import Path

import pytest

from hippo_mpi import audit, batch, benchmark, chat, errors, generate, models, page, plan, run, serve
from hippo_mpi.cluster import __main__ as cluster
from hippo_mpi.config.yaml_file import read_config
from hippo_mpi.errors import HippoError
from hippo_mpi.protocols.openai_requests import CHAT
from hippo_mpi.serving.api.openapi import openapi_object
from tests import servers

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
ARCHITECTURE = (ROOT / "hippo_mpi" / "README.md").read_text()
SERVING = (ROOT / "hippo_mpi" / "serving" / "README.md").read_text()
DOCUMENTS = {path: path.read_text() for path in [ROOT / "README.md", *sorted((ROOT / "hippo_mpi").rglob("README.md"))]}
EVERYTHING = "\n".join(DOCUMENTS.values())
MAX_README_LINES = 200
PARSERS = {
    m.__name__.split(".")[-1]: m.make_parser()
    for m in (audit, batch, benchmark, chat, generate, models, page, plan, serve)
} | {"cluster": cluster.make_parser()}
PARSERS |= {f"cluster {verb}": cluster.parser_of(verb) for verb in cluster.VERBS}
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


@pytest.mark.parametrize("command", [c for c in PARSERS if not c.startswith("cluster")])  # which no launcher starts
def test_no_option_is_mistaken_for_one_of_mlx_launch(command: str) -> None:
    for action in PARSERS[command]._actions:
        for option in action.option_strings:
            # serve starts launchers itself; inside one, these two are the launcher's.
            if option not in ("-h", "--help") and (command, option) not in (
                ("serve", "--hostfile"),
                ("serve", "--backend"),
            ):
                assert not [o for o in LAUNCH_OPTIONS if o.startswith(option)], option


def test_the_readme_is_short() -> None:
    assert len(README.splitlines()) <= MAX_README_LINES


def test_options_in_the_documents_exist() -> None:
    known = {o for p in [*PARSERS.values(), run.make_parser()] for a in p._actions for o in a.option_strings}
    known |= LAUNCH_OPTIONS | {"--quick", "--clients", "--strict", "--preload"}
    mentioned = set(re.findall(r"(?<![\w-])(--[a-z][a-z-]+)", EVERYTHING))
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
    for parser in (parser for name, parser in PARSERS.items() if name not in ("audit", "cluster")):  # they have none
        assert "default:" in parser.format_help()


def test_help_has_defaults_as_one_types_them() -> None:
    for parser in PARSERS.values():
        assert not re.search(r"\(default:\s+[\[({'\"]", parser.format_help())


def blocks(language: str, text: str = EVERYTHING) -> list[str]:
    """Code blocks of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.M | re.S)


def test_the_server_s_file_in_the_documents_is_one(tmp_path: Path) -> None:
    (block,) = blocks("yaml")
    (tmp_path / "hippo.yaml").write_text(block)
    found = read_config(tmp_path / "hippo.yaml")
    assert found.settings["model"][0].removeprefix("--model=") in found.cards
    assert len(found.cards) == len(found.hosts) == 2


@pytest.mark.parametrize("name", PARSERS)
def test_defaults_are_shown_as_they_are_typed(name: str) -> None:
    text = " ".join(PARSERS[name].format_help().split())
    assert "(default: (" not in text and "(default: [" not in text
    if name in ("plan", "benchmark"):
        assert "(default: 1,4,16)" in text


EXAMPLES = [line for block in blocks("sh") for line in block.replace("\\\n", " ").splitlines() if line]


@pytest.mark.parametrize("line", EXAMPLES)
def test_the_examples_have_options_that_exist(line: str) -> None:
    words = shlex.split(line, comments=True)
    if words[0] == "./launch/run" or words[:2] == ["hippo-mpi", "run"]:
        arguments, rest = run.make_parser().parse_known_args(words[1 + (words[0] == "hippo-mpi") :])
        words = [arguments.command, *rest]
    if words[0] == "./launch/cluster":
        words = [f"hippo_mpi.cluster {words[1]}", *words[2:]]
    found = [(n, word.removeprefix("hippo_mpi.")) for n, word in enumerate(words) if word.startswith("hippo_mpi.")]
    for n, command in found[:1]:
        PARSERS[command].parse_args(words[n + 1 + (words[n + 1 : n + 2] == ["install"]) :])


def test_the_endpoints_are_in_the_document_of_the_server() -> None:
    paths = {*openapi_object(["M"])["paths"]}
    assert CHAT in paths
    for path in paths:
        assert f"{path.replace('{id}', 'ID').replace('{model}', 'NAME')}`" in SERVING, path
    for path in set(re.findall(r"`(?:GET|POST|DELETE) (/[\w/.]*)", SERVING)):
        assert path.replace("ID", "{id}").replace("NAME", "{model}") in paths, path


def test_python_in_the_documents_is_python() -> None:
    assert blocks("python")
    for block in blocks("python"):
        ast.parse(block)


@pytest.mark.slow
def test_the_clients_of_the_readme_are_answered() -> None:
    section = README.split("## Serve", 1)[1].split("\n## ")[0]
    (body,) = re.findall(r"--json '(.*)'", section)
    (client,) = blocks("python", section)
    with servers.server() as server:
        request = urllib.request.Request(f"{server.url}{CHAT}", body.encode(), servers.JSON)
        with urllib.request.urlopen(request, timeout=60) as answer:
            assert json.load(answer)["choices"][0]["message"]["content"]
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(client.replace("http://127.0.0.1:8080", server.url), {})
    assert len(printed.getvalue()) > 20


def slug(heading: str) -> str:
    """The anchor that GitHub gives a heading."""
    return re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-")


def test_relative_links_resolve() -> None:
    tracked = subprocess.run(["git", "ls-files", "*.md"], cwd=ROOT, capture_output=True, text=True).stdout.split()
    paths = {*DOCUMENTS, *(ROOT / name for name in tracked)}
    for path in paths:
        for link in re.findall(r"\]\((?!https?:)([^)\s]+)\)", path.read_text()):
            name, _, anchor = link.partition("#")
            target = path.parent / name if name else path
            assert target.exists(), (path, link)
            headings = re.findall(r"^#+ (.*)", target.read_text(), re.M) if anchor else []
            assert not anchor or anchor in map(slug, headings), (path, link)


def test_symptoms_in_the_readme_are_lines_that_the_code_prints() -> None:
    source = "\n".join(path.read_text() for path in (ROOT / "hippo_mpi").rglob("*.py"))
    source = re.sub(r'"\s*\n\s*f?"', "", source)  # strings that go on in the next line
    rows = README.split("## Troubleshooting", 1)[1].split("\n## ")[0].splitlines()
    symptoms = [quoted for row in rows if row.startswith("| `") for quoted in re.findall(r"`(.*?)`", row.split("|")[1])]
    assert symptoms
    for symptom in symptoms:  # by what stands between values
        pieces = re.split(r"\s*\S*(?:\d|\.\.\.|\(|[A-Z]{2}|huggingface)\S*\s*", symptom)
        for piece in filter(None, pieces):
            assert piece in source, symptom
