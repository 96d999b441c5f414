"""Options are dataclasses: command lines, YAML files and cards are read into them, and each knows what it takes."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from hippo_mpi import batch, benchmark, chat, generate, models, page, plan, run, serve
from hippo_mpi.checkpoint.hub import find_model
from hippo_mpi.cluster.starting.start_plan import StartPlan
from hippo_mpi.config.parser import OptionsParser, changed
from hippo_mpi.config.yaml_file import expanded, read_card, read_catalogue, read_config, read_start
from hippo_mpi.errors import HippoError, UserError
from hippo_mpi.offline.conversation import ask
from hippo_mpi.transport.layout import Layout
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


COMMANDS = (batch, benchmark, chat, generate, plan, run, serve)


@pytest.mark.parametrize("module", COMMANDS, ids=lambda m: m.__name__)
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
        ("- port\n", "line 1: expected keys and values"),
        ("port: 1\ntemp: inf\n", "line 2: argument --temp: inf is not a number of at least 0"),
        ("port: 1\ntemp: .nan\n", "line 2: argument --temp: '.nan' is not a number of at least 0"),
        ("models:\n  a: {model: x,\n   temp: inf}\n", "line 3: argument --temp: inf is not"),
        ("port: 1\nmodels: {}\n", "line 2: models is empty"),
        ("port: 1\nhosts: []\n", "line 2: hosts must be a list"),
        ("hosts:\n  - {ssh: a,\n     ips: 127.0.0.1}\n", "line 3: ips must be a list"),
        ("hosts:\n  - {ssh: [a]}\n", "line 2: ssh must be a single name"),
        ("hosts:\n  - {ssh: a, speed: fast}\n", "line 2: speed: 'fast' is not a number"),
        ("hosts: [{ssh: !foo bar, ips: [127.0.0.1]}]\n", "line 1: unsupported YAML tag '!foo'"),
        ("temp: !foo 1\n", "line 1: unsupported YAML tag '!foo'"),
        ("hosts: [{ssh: {[1]: 2}}]\n", "line 1: expected a name, or a list of names"),
        ("hosts: [{[1]: 2}]\n", "line 1: a key must be a name"),
        ("[1]: 2\n", "line 1: a key must be a name"),
        ("hosts: [{ssh: a, ips: &a [*a]}]\n", "line 1: expected a name, or a list of names"),
        ("insecure: !!bool maybe\n", "line 1: insecure must be true or false"),
        ('model: "a\\0b"\n', "line 1: 'a\\x00b' contains a NUL"),
        ('system-prompt: "\\ud800"\n', "line 1: '\\ud800' is not UTF-8"),
        ("stop-words: [a, -m 5]\n", "line 1: '-m 5' looks like an option"),
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
        job = run.make_job(options, run.find_hosts(options, rest), rest, held, RunKey())
        assert isinstance(job, StartPlan) and [rank.host for rank in job.ranks] == ["127.0.0.1"] * 2
        assert job.words == ["-m", "hippo_mpi.generate", "--config", str(path), "--prompt", "x"]


@pytest.mark.parametrize(
    "text", ["[" * 3000, "a: " + "[" * 3000 + "]" * 3000, 'a: "\\U00110000"\n', 'a: "\\Uffffffff"\n']
)
def test_what_is_no_yaml_is_told_in_a_line(text: str, tmp_path: Path) -> None:
    path = tmp_path / "hippo.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=r"hippo.yaml is (not YAML|nested too deeply)"):
        read_config(path)


KEYS = (
    "model",
    "models",
    "hosts",
    "ssh",
    "ips",
    "rdma",
    "python",
    "temp",
    "machine",
    "stop-words",
    "insecure",
    "config",
)
SCALARS = st.text(max_size=5) | st.sampled_from(
    [
        *KEYS, "inf", ".nan", "1e400", "127.0.0.1", "mini1:16", "--temp=1", "-m 5", "5G", "true", "null", "2026-13-45",
        "!foo bar", "!!bool maybe", "!!int x", "!!timestamp x", "!!python/name:os.system", "!!set {a}", "!!binary =",
        "&a b", "*a", "&a [*a]", "&a {*a : *a}", "<<", "=", '"\\ud800"', '"\\0"', '"\\Uffffffff"', "|\n x", "- x", "? x",
    ]
)  # fmt: skip
VALUES = st.recursive(
    SCALARS,
    lambda value: (
        st.lists(value, max_size=3).map(lambda items: f"[{', '.join(items)}]")
        | st.lists(st.tuples(st.sampled_from(KEYS) | value, value), max_size=3).map(
            lambda items: f"{{{', '.join(f'{key}: {item}' for key, item in items)}}}"
        )
    ),
    max_leaves=6,
)
FILES = st.lists(st.tuples(st.sampled_from(KEYS) | SCALARS, VALUES), max_size=2).map(
    lambda entries: "".join(f"{key}: {value}\n" for key, value in entries)
)


@settings(deadline=None)
@given(st.text() | FILES | st.tuples(st.sampled_from(KEYS), FILES).map(lambda entry: f"{entry[0]}: [{{{entry[1]}}}]"))
@example("models: &m {m: *m}")
@example("? &k {*k : 1}\n: 2")
def test_any_file_is_read_or_refused_in_a_line(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    path = tmp_path_factory.getbasetemp() / "any.yaml"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    for reader in (read_config, read_start, read_card, lambda path: read_config(path, plan.PlanOptions)):
        try:
            reader(path)
        except UserError as error:
            assert str(path) in str(error) and "\n" not in str(error)


FLOATS = [
    (module, action.option_strings[-1])
    for module in COMMANDS
    for action in module.make_parser()._actions
    if action.option_strings
    and action.type
    and "float" in str(getattr(action.type, "__annotations__", {}).get("return"))
]


@pytest.mark.parametrize(("module", "name"), FLOATS, ids=[f"{m.__name__}{name}" for m, name in FLOATS])
def test_numbers_are_finite(module: Any, name: str) -> None:
    for text in ("inf", "infinity", "nan", "1e400", "-inf", " inf\n"):
        with pytest.raises(UserError, match=f"argument {name}: [^\n]*$"):
            module.make_parser().read([f"{name}={text}"])


@pytest.mark.parametrize("text", ["1e400", "1e308G", "infG", "nan"])
def test_sizes_and_memories_are_finite(text: str) -> None:
    with pytest.raises(UserError, match="--prompt-cache-bytes"):
        batch.make_parser().read(["--prompt-cache-bytes", text])
    with pytest.raises(UserError, match="--machine"):
        plan.make_parser().read(["--machine", f"mini1:{text}"])
    with pytest.raises(UserError, match="--machine"):
        plan.make_parser().read(["--machine", "mini1:1e300"])


def test_a_list_of_the_file_takes_no_argument_of_the_command_line(tmp_path: Path) -> None:
    path, parser = tmp_path / "stop.yaml", batch.make_parser()
    for text in ("max-tokens: 5\nstop-words: [END]\n", "extra-eos-token: [END, STOP]\n", "stop-words: END\n"):
        path.write_text(text)
        for words in (["p.txt", "-o", "out"], ["-o", "out", "p.txt"], ["p.txt"], ["-"], ["--", "p.txt"]):
            options = parser.read(expanded(["--config", str(path), *words], parser.options))
            assert str(options.prompts) == next(word for word in words if word in ("p.txt", "-"))
            assert "END" in (*options.stop_words, *options.extra_eos_token)


def test_a_list_of_an_option_that_is_repeated(tmp_path: Path) -> None:
    path, parser = tmp_path / "plan.yaml", plan.make_parser()
    path.write_text(
        "machine: [mini1:16, mini2:24]\nlink: [wifi, 10gbe]\nsimulate: true\nmodel: m\nlayer-split: [4, 8]\n"
    )

    def read_plan(*words: str) -> plan.PlanOptions:
        return parser.read(expanded(["--config", str(path), *words], parser.options))

    options = read_plan()
    assert [machine.name for machine in options.machines or ()] == ["mini1", "mini2"]
    assert [link.name for link in options.links or ()] == ["wifi", "10gbe"]
    assert options.layer_split == (4, 8)
    options = read_plan("--machine", "mini3:8")  # the command line wins
    assert [machine.name for machine in options.machines or ()] == ["mini3"]
    path.write_text("machine: mini1:16\n")
    assert [machine.name for machine in read_plan().machines or ()] == ["mini1"]


def test_folders_of_a_card_begin_where_it_lies(tmp_path: Path) -> None:
    for name in ("model", "draft", "adapter"):
        (tmp_path / name).mkdir()
    card = tmp_path / "tale.yaml"
    card.write_text("model: model\ndraft-model: draft\nadapter-path: adapter\n")
    assert {name: words[0].partition("=")[2] for name, words in read_card(card).items()} == {
        "model": str(tmp_path / "model"),
        "draft-model": str(tmp_path / "draft"),
        "adapter-path": str(tmp_path / "adapter"),
    }
    card.write_text(f"model: {'x' * 5000}\n")  # too long for a file
    assert read_catalogue(tmp_path)["tale"]["model"] == [f"--model={'x' * 5000}"]


@pytest.mark.parametrize("module", [generate, plan, serve, models, page, run])
def test_one_file_of_options(module: Any, config: Path) -> None:
    words = ["--config", str(config), "--config", str(config)]
    with pytest.raises(UserError, match="--config: can be given only once"):
        if module is serve:
            serve.read_command_line(words)
        elif module is run:
            run.find_hosts(run.make_parser().read([]), words)
        elif module in (models, page):
            module.make_parser().read(words)
        else:
            expanded(words, module.make_parser().options)


HALF = "Once \udcff"  # as Python has bytes of a command line that aren't UTF-8


@pytest.mark.parametrize(
    "name", ["--prompt", "--system-prompt", "--prefill-response", "--stop-words", "--extra-eos-token"]
)
def test_texts_are_utf_8(name: str) -> None:
    with pytest.raises(UserError, match=f"argument {name}: 'Once ..dcff' is not UTF-8"):
        generate.make_parser().read([name, HALF])


def test_names_of_files_need_not_be() -> None:
    assert generate.make_parser().read(["--model", f"/tmp/{HALF}"]).model == f"/tmp/{HALF}"
    with pytest.raises(UserError) as told:
        find_model(f"/tmp/{HALF}", None)
    assert str(told.value) == "no such model folder: /tmp/Once \\udcff"
    assert json.dumps(str(HippoError(HALF))).isascii() and str(HippoError("ä")) == "ä"


@pytest.mark.parametrize("name", ["x" * 5000, "~nobody-of-that-name/model"])
def test_a_model_that_can_be_no_folder(name: str) -> None:
    with pytest.raises(UserError, match="no such model folder"):
        find_model(name, None)


def test_a_page_finds_the_server_of_a_file(config: Path) -> None:
    assert page.url_of_server(config) == "http://127.0.0.1:9000"
    config.write_text("address: 0.0.0.0\nssl-certfile: cert.pem\n")
    assert page.url_of_server(config) == "https://127.0.0.1:8080"
    assert page.make_parser().read(["--config", str(config)]).port == 7860  # its own


def test_a_model_that_is_none_is_told_with_those_of_the_file(config: Path) -> None:
    with pytest.raises(UserError) as told:
        read(config, "--model", "nosuch")
    assert str(told.value) == (
        f"no such model: nosuch; {config} has tale, fable; bundled models: story-3m, story-draft, story-other-tokenizer"
    )
    assert read(config, "--model", "story-3m").model == "story-3m"
    assert read(config, "--model", str(config.parent)).model == str(config.parent)


def test_help_has_the_bundled_models_that_an_error_has() -> None:
    with pytest.raises(UserError) as told:
        find_model("nosuch", None)
    names = str(told.value).partition("bundled models: ")[2]
    (shown,) = (action.help for action in generate.make_parser()._actions if action.dest == "model")
    assert names.count(",") == 2 and f"a bundled one ({names})" in str(shown)


def test_links_of_one_rank_are_refused() -> None:
    options = plan.make_parser().read(["--simulate", "--link", "wifi", "--link", "10gbe"])
    folder = SimpleNamespace(source=SimpleNamespace(path=Path("models/story-3m")))
    session: Any = SimpleNamespace(options=options, agreement=SimpleNamespace(layout=Layout(1), checkpoint=folder))
    with pytest.raises(
        UserError, match=r"--link needs several ranks: give --machine .* ./launch/run -n 2 --command plan"
    ):
        plan._check(session)
    session.agreement.layout = Layout(2)
    plan._check(session)


@pytest.mark.parametrize("is_person", [True, False])
def test_only_people_are_asked(is_person: bool, capsys: pytest.CaptureFixture[str]) -> None:
    launcher: Any = SimpleNamespace(is_terminal=False, may_be_typed=is_person, read_line=lambda: "hello")
    assert ask(launcher, ">> ") == "hello"
    assert capsys.readouterr().err == (">> " if is_person else "")


def job_of(path: Path, *words: str) -> StartPlan:
    with contextlib.ExitStack() as held:
        options, rest = run.make_parser().read_known(["--config", str(path), *words])
        job = run.make_job(options, run.find_hosts(options, rest), rest, held, RunKey())
    assert isinstance(job, StartPlan)
    return job


def test_the_launcher_takes_ranks_hostfile_and_backend_of_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, hostfile = tmp_path / "hippo.yaml", tmp_path / "hosts.json"
    hostfile.write_text(json.dumps([{"ssh": "127.0.0.1", "ips": ["127.0.0.1"]}] * 4))
    path.write_text("ranks: 3\nprompt: a key of the command\n")
    assert len(job_of(path).ranks) == 3
    assert len(job_of(path, "-n", "1").ranks) == 1
    assert len(job_of(path, "--hostfile", str(hostfile)).ranks) == 4
    path.write_text(f"hostfile: {hostfile}\n")
    assert len(job_of(path).ranks) == 4
    assert len(job_of(path, "-n", "1").ranks) == 1
    monkeypatch.setattr(run.shutil, "which", lambda name: None)
    path.write_text("backend: mpi\nranks: 2\n")
    with pytest.raises(UserError, match="--backend mpi needs mpirun"):
        job_of(path)
    assert len(job_of(path, "--backend", "ring").ranks) == 2
    for text, line in (
        ("ranks: many\n", "line 1: argument --ranks"),
        ("hosts: [{ssh: a, ips: b}]\n", "line 1: ips must"),
    ):
        path.write_text(text)
        with pytest.raises(UserError, match=line):
            job_of(path)
    path.write_text("ranks: 2\nhosts: [{ssh: a}]\n")
    with pytest.raises(UserError, match="line 1: 'ranks' conflicts with 'hosts'"):
        job_of(path)
