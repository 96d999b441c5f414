"""Options are dataclasses: command lines, YAML files and cards are read into them, and each knows what it takes."""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest

from hippo_mpi import batch, benchmark, chat, generate, plan, run, serve
from hippo_mpi.cluster.start_plan import StartPlan
from hippo_mpi.config.parser import OptionsParser, changed
from hippo_mpi.config.yaml_file import expanded, read_config
from hippo_mpi.errors import UserError
from hippo_mpi.transport.run_key import RunKey

FILE = """
max-tokens: 11
port: 9000
temp: 0.5
models:
  tale: {model: tales/one, temp: 0.7, modes: [chat], draft-model: tales/small}
  fable: {model: fables/two, kv-bits: 8}
"""


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "hippo.yaml"
    path.write_text(FILE)
    return path


@pytest.mark.parametrize("module", [batch, benchmark, chat, generate, plan, run, serve], ids=lambda m: m.__name__)
def test_defaults_are_those_of_the_class(module: object) -> None:
    parser: OptionsParser[object] = module.make_parser()  # type: ignore[attr-defined]
    assert parser.read([]) == parser.options()
    assert changed(parser.options()) == {}


def read(config: Path, *words: str) -> generate.GenerateOptions:
    parser = generate.make_parser()
    return parser.read(expanded([*words, "--config", str(config)], parser.options))


def test_the_command_line_wins_over_the_card_and_that_over_the_file(config: Path) -> None:
    assert changed(read(config, "--model", "tale", "--temp", "0.9")) == {
        "model": "tales/one", "draft_model": "tales/small", "temp": 0.9, "max_tokens": 11,
    }  # fmt: skip
    assert changed(read(config, "--model=fable")) == {
        "model": "fables/two", "kv_bits": 8, "temp": 0.5, "max_tokens": 11,
    }  # fmt: skip


def test_the_first_card_is_the_model_if_none_is_named(config: Path) -> None:
    assert read(config).model == "tales/one"
    config.write_text(f"model: fable\n{FILE}")
    assert read(config).model == "fables/two"
    assert read(config, "--model", "some/repo").model == "some/repo"


def test_a_command_takes_what_it_has_options_for(config: Path) -> None:
    parser = benchmark.make_parser()
    options = parser.read(expanded(["--config", str(config), "--trials", "2"], parser.options))
    assert changed(options) == {"model": "tales/one", "trials": 2}


def test_keys_of_a_command_of_its_own(config: Path) -> None:
    """Each command also takes keys that a server doesn't know; another command says that it doesn't."""
    config.write_text("prompt: A fox\nmodel: m\n")
    assert read(config).prompt == "A fox"
    with pytest.raises(UserError, match="line 1: unknown key 'prompt'"):
        read_config(config)


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("max-token: 5\n", "line 1: unknown key 'max-token'; did you mean 'max-tokens'?"),
        ("modells:\n  a: {model: x}\n", "line 1: unknown key 'modells'; did you mean 'models'?"),
        ("port: 1\nmodels:\n  a: {model: x, kv_bit: 8}\n", "line 3: unknown key 'kv_bit'; did you mean 'kv-bits'?"),
        ("hosts:\n  - {shs: x}\n", "line 2: unknown key 'shs'; did you mean 'ssh'?"),
        ("zzzzzz: 1\n", "line 1: unknown key 'zzzzzz'"),
        ("config: other.yaml\n", "line 1: unknown key 'config'"),
        ("max-tokens: many\n", "line 1: argument --max-tokens"),
        ("insecure: 1\n", "line 1: insecure must be true or false"),
        ("- port\n", "line 1: keys and values must stand here"),
    ],
)
def test_a_wrong_key_is_named_with_its_line_and_the_nearest(text: str, line: str, tmp_path: Path) -> None:
    path = tmp_path / "hippo.yaml"
    path.write_text(text)
    with pytest.raises(UserError) as told:
        read_config(path)
    assert str(told.value).startswith(f"{path}, {line}")


def test_a_catalogue_of_the_file_has_names_too(tmp_path: Path) -> None:
    (tmp_path / "cards").mkdir()
    (tmp_path / "cards" / "saga.yaml").write_text("model: sagas/three\nseed: 4\n")
    path = tmp_path / "hippo.yaml"
    path.write_text(f"catalogue: {tmp_path / 'cards'}\n")
    assert changed(read(path, "--model", "saga")) == {"model": "sagas/three", "seed": 4}


def test_the_launcher_starts_on_the_hosts_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "hippo.yaml"
    path.write_text('hosts:\n  - {ssh: 127.0.0.1, ips: ["127.0.0.1"]}\n  - {ssh: 127.0.0.1, ips: [127.0.0.1]}\n')
    with contextlib.ExitStack() as held:
        options, rest = run.make_parser().read_known(["--config", str(path), "--prompt", "x"])
        job = run.make_job(options, rest, held, RunKey())
        assert isinstance(job, StartPlan) and [rank.host for rank in job.ranks] == ["127.0.0.1"] * 2
        assert job.words == ["-m", "hippo_mpi.generate", "--config", str(path), "--prompt", "x"]
