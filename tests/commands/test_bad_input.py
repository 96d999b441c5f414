"""Every bad input gets one clear line from one rank, exit status 2 on all, and nothing is left running."""

from __future__ import annotations

import json
import os
import shutil
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from hippo_mpi.config.bundled import BUNDLED_MODEL
from tests import ranks

GENERATE = str(ranks.BIN / "hippo_mpi.generate")
SECONDS = 25.0  # starting Python and its libraries on two shared cores takes most of it


def assert_refused(commands: list[list[str]], *expected: str) -> None:
    with ranks.ring(commands) as running:
        codes = [rank.wait(SECONDS) for rank in running]
    lines = [line for rank in running for line in rank.err.splitlines() if line.strip()]
    assert codes == [2] * len(commands), lines
    errors = [line for line in lines if line.startswith("error: ")]
    assert len(errors) == 1, lines
    for text in expected:
        assert text in errors[0]
    assert not any(rank.out for rank in running)
    assert not any("Traceback" in line for line in lines)


def copied(folder: Path) -> Path:
    shutil.copytree(BUNDLED_MODEL, folder)
    return folder


def without(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def with_text(name: str, text: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_text(text) and None


def edit_config(**changes: object) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        path = folder / "config.json"
        config = {**json.loads(path.read_text()), **changes}
        path.write_text(json.dumps({key: value for key, value in config.items() if value is not ...}))

    return edit


def edit_weights(change: Callable[[dict[str, mx.array]], object]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        path = str(folder / "model.safetensors")
        weights = mx.load(path)
        assert isinstance(weights, dict)
        mx.eval(weights)
        change(weights)
        mx.save_safetensors(path, weights)

    return edit


def truncate(folder: Path) -> None:
    path = folder / "model.safetensors"
    os.truncate(path, path.stat().st_size // 2)


def no_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer_config.json").unlink()


def quick_are(*names: str, of: dict[str, Any]) -> pytest.MarkDecorator:
    """All cases of a table; those that are named belong to the quick run."""
    return pytest.mark.parametrize(
        "case", [pytest.param(name, marks=() if name in names else pytest.mark.slow, id=name) for name in of]
    )


NORM = "model.layers.7.input_layernorm.weight"
CHECKPOINTS: dict[str, tuple[Callable[[Path], object], list[str]]] = {
    "no config": (without("config.json"), ["has no config.json"]),
    "config not JSON": (with_text("config.json", "{not json"), ["config.json is not JSON"]),
    "config without a type": (with_text("config.json", "{}"), ["has no model_type"]),
    "unknown type": (edit_config(model_type="nonesuch"), ["nonesuch not supported"]),
    "config without a size": (edit_config(hidden_size=...), ["can't be loaded: config.json is missing 'hidden_size'"]),
    "index not JSON": (with_text("model.safetensors.index.json", "{"), ["can't be loaded: Expecting property name"]),
    "no weights": (without("model.safetensors"), ["has no model*.safetensors"]),
    "truncated weights": (truncate, ["is truncated", "bytes of"]),
    "tensor missing": (edit_weights(lambda w: w.pop(NORM)), ["Missing 1 parameters", NORM]),
    "tensor of wrong shape": (edit_weights(lambda w: w.update({NORM: mx.zeros(3)})), ["(3,)", NORM]),
    "no tokenizer": (no_tokenizer, ["has no tokenizer"]),
    "broken tokenizer": (with_text("tokenizer.json", "{"), ["tokenizer", "can't be read"]),
}


@pytest.mark.slow
@quick_are("no config", "truncated weights", "tensor missing", "no tokenizer", of=CHECKPOINTS)
def test_bad_checkpoint(case: str, tmp_path: Path) -> None:
    damage, expected = CHECKPOINTS[case]
    folder = copied(tmp_path / "model")
    damage(folder)
    assert_refused([[GENERATE, "--model", str(folder)]] * 2, *expected)


OWN_CODE = """
from mlx_lm.models import llama
ModelArgs = llama.ModelArgs
class Model(llama.Model):
    def __call__(self, *args, **kwargs):
        return {}["a key that nobody has"]
"""


def with_own_code(folder: Path) -> Path:
    copied(folder)
    edit_config(model_file="own.py")(folder)
    (folder / "own.py").write_text(OWN_CODE)
    return folder


@pytest.mark.slow
def test_a_server_does_not_try_our_mistakes_again(tmp_path: Path) -> None:
    folder = with_own_code(tmp_path / "model")
    serve = str(ranks.BIN / "hippo_mpi.serve")
    with ranks.single([serve, "--port", "0", "--model", str(folder), "--trust-remote-code"]) as running:
        assert running.wait(2 * SECONDS) == 1
    assert running.err.splitlines()[-1] == "error: the ranks didn't start; see their error above"
    assert "restarting them" not in running.err


@pytest.mark.slow
@pytest.mark.parametrize("shows_traceback", [False, True])
def test_a_model_whose_code_fails_is_our_mistake(shows_traceback: bool, tmp_path: Path) -> None:
    """Status 1, and a line that asks for a report; it is none of what was typed or configured."""
    folder = with_own_code(tmp_path / "model")
    command = [
        "env",
        f"HIPPO_TRACEBACK={shows_traceback or ''}",
        GENERATE,
        "--model",
        str(folder),
        "--trust-remote-code",
    ]
    with ranks.ring([command] * 2) as running:
        assert [rank.wait(SECONDS) for rank in running] == [1, 1]
    line = f"error: {folder} can't be run: KeyError: 'a key that nobody has'; please report this"
    assert running[0].err.splitlines()[-1].startswith(line)
    assert ("own.py" in running[0].err) == shows_traceback
    assert shows_traceback or [len(rank.err.splitlines()) for rank in running] == [1, 0]


ARGUMENTS: dict[str, tuple[list[str], list[str]]] = {
    "no such folder": (["--model", "/no/such/folder"], ["no such model folder: /no/such/folder"]),
    "no such name": (
        ["--model", "tale"],
        ["no such model folder: tale; bundled models: story-3m, story-draft, story-o"],
    ),
    "a file": (["--model", __file__], ["is not a directory"]),
    "empty prompt": (["--prompt", " "], ["the prompt is empty"]),
    "long prompt": (["--prompt", "fox " * 3000], ["tokens, but this model's maximum context length is 2048"]),
    "short context": (["--max-context", "8"], ["the prompt has", "but this model's maximum context length is 8"]),
    "split too short": (["--layer-split", "5,6"], ["covers 11 layers but the model has 12; try --layer-split 6,6"]),
    "split with zero": (["--layer-split", "12,0"], ["leaves a rank without layers"]),
    "split for more ranks": (["--layer-split", "4,4,4"], ["is for 3 ranks, but there are 2"]),
    "split not numbers": (["--layer-split", "a,b"], ["is not a list of layer counts"]),
    "unknown option": (["--nonesuch"], ["unrecognized arguments: --nonesuch"]),
    "seed too large": (["--seed", str(2**64)], ["--seed", f"{2**64} is not a seed, from 0 to 2**64 - 1"]),
    "bad number": (["--temp", "-1"], ["--temp", "-1 is not a number of at least 0"]),
    "bad template arguments": (["--chat-template-config", "{"], ["--chat-template-config is not JSON"]),
    "context too large": (["--max-context", "2000000000"], ["the model doesn't fit", "shorter --max-context"]),
    "no adapter": (["--adapter-path", "/no/such"], ["--adapter-path /no/such has no adapters.safetensors"]),
}


@pytest.mark.slow
@quick_are("no such folder", "empty prompt", "split too short", "unknown option", "context too large", of=ARGUMENTS)
def test_bad_arguments(case: str) -> None:
    options, expected = ARGUMENTS[case]
    assert_refused([[GENERATE, *options]] * 2, *expected)


@pytest.mark.slow
def test_more_ranks_than_layers(tmp_path: Path) -> None:
    draft = BUNDLED_MODEL.parent / "story-draft"
    assert_refused([[GENERATE, "--model", str(draft)]] * 3, "3 ranks, but the model has 2 layers")


@pytest.mark.slow
def test_a_cut_where_the_model_cannot_be_cut(tmp_path: Path) -> None:
    from tests.parity.tiny_models import make_checkpoint

    folder = make_checkpoint("gemma3n", tmp_path)
    assert_refused([[GENERATE, "--model", str(folder), "--layer-split", "3,3"]] * 2, "can't be cut", "reads the cache")


@pytest.mark.slow
def test_ranks_with_different_arguments() -> None:
    commands = [[GENERATE, "--max-tokens", "5"], [GENERATE, "--max-tokens", "6"]]
    assert_refused(commands, "rank 0", "rank 1", "different command-line arguments")


def retrained(folder: Path) -> Path:
    """The bundled model with other numbers in it: the same structure."""
    folder.mkdir()
    for path in BUNDLED_MODEL.iterdir():
        (folder / path.name).symlink_to(path)
    weights = mx.load(str(BUNDLED_MODEL / "model.safetensors"))
    assert isinstance(weights, dict)
    (folder / "model.safetensors").unlink()
    mx.save_safetensors(str(folder / "model.safetensors"), {k: v * 1.01 for k, v in weights.items()})
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("is_same_structure", [False, True])
def test_ranks_with_different_models(tmp_path: Path, is_same_structure: bool) -> None:
    """The same path, but another model behind it: here, by way of the working folder."""
    second = retrained(tmp_path / "retrained") if is_same_structure else BUNDLED_MODEL.parent / "story-draft"
    for name, other in (("a", BUNDLED_MODEL), ("b", second)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model").symlink_to(other)
    shell = 'cd "$0" && exec "$@"'
    commands = [["sh", "-c", shell, str(tmp_path / n), GENERATE, "--model", "./model"] for n in ("a", "b")]
    assert_refused(commands, "different models")


@pytest.mark.slow
def test_ranks_with_different_versions() -> None:
    fake = (
        "import importlib.metadata as m, sys; v = m.version;"
        "m.version = lambda name: '0.0.1' if name == 'hippo-mpi' else v(name);"
        "from hippo_mpi import generate; generate.main()"
    )
    assert_refused([[GENERATE], [sys.executable, "-c", fake]], "different versions", "hippo-mpi 0.1.0 and 0.0.1")


def test_port_in_use(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        hostfile = tmp_path / "hosts.json"  # as mlx.launch writes it
        hosts = [[f"127.0.0.1:{taken.getsockname()[1]}"], [f"127.0.0.1:{ranks.free_ports(1)[0]}"]]
        hostfile.write_text(json.dumps(hosts))
        with ranks.single([GENERATE], env={"MLX_RANK": "0", "MLX_HOSTFILE": str(hostfile)}) as running:
            assert running.wait(SECONDS) == 2
            assert "is in use" in running.err
            assert len(running.err.splitlines()) == 1


def test_mpi_library_that_does_not_load() -> None:
    """Never a silent world of one."""
    command = ranks.mpirun(2, ["env", "MLX_MPI_LIBNAME=libnonesuch.so", GENERATE])
    with ranks.single(command) as running:
        assert running.wait(SECONDS) == 2
        assert "can't load MPI (libnonesuch.so)" in running.err
        assert not running.out


def test_srun_without_pmix() -> None:
    """Each task would be a world of its own."""
    with ranks.single([GENERATE], env={"PMI_RANK": "1", "PMI_SIZE": "2"}) as running:
        assert running.wait(SECONDS) == 2
        assert running.err == "error: started as one of 2 tasks, but without PMIx: use srun --mpi=pmix, or mpirun\n"
