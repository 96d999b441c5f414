"""Whatever a request meets ends that request, and no other: on rank 0, in the engine."""

from __future__ import annotations

import json
import shutil
import socket
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
import pytest
from mlx_lm.tokenizer_utils import TokenizerWrapper

from hippo_mpi.config.bundled import BUNDLED_MODEL
from hippo_mpi.engine import grammar
from hippo_mpi.engine.engine import Engine
from hippo_mpi.engine.grammar import json_grammar
from hippo_mpi.engine.messages import OutputMessage
from hippo_mpi.engine.prefill import Limits
from hippo_mpi.engine.request import Request, RequestOutput, SamplingParams
from hippo_mpi.engine.sampling import TokenSampler
from hippo_mpi.engine.text import AnswerText, open_tokenizer
from hippo_mpi.errors import FieldError, ForeignError, HippoError, UserError
from hippo_mpi.parallel.timeline import Timeline
from hippo_mpi.serving.supervision.messages import Add, Begun, Ready, Refused, Report, Taking, line_of, read_report
from hippo_mpi.serving.supervision.rank_service import RankService
from tests.local_ring import LocalRing, make_stages, open_folder

pytestmark = pytest.mark.slow

PROMPT = [9, 10, 11, 12]
PLAIN = SamplingParams(max_tokens=12)
SCHEMA = {"type": "object", "properties": {"fox": {"type": "boolean"}}, "required": ["fox"]}
TOO_COMPLEX = {
    "type": "object",
    "required": ["x"],
    "additionalProperties": False,
    "properties": {"x": {"anyOf": [{"type": "object", "required": [f"k{i}"]} for i in range(2500)]}},
}
"""llguidance takes it, and meets its limit of 2,000 items in a row when an answer has come to the x."""


def open_words(folder: Path = BUNDLED_MODEL) -> TokenizerWrapper:
    return open_tokenizer(folder, [4, 0], (), False)


@pytest.fixture
def engine() -> Engine:
    return make_engine(open_words())


def make_engine(words: TokenizerWrapper) -> Engine:
    story = open_folder(BUNDLED_MODEL)
    ring = LocalRing(make_stages(story, [4, 8]))
    return Engine(ring.leader, words, Limits(max_batch_size=8), 500, story.config["vocab_size"])


def run(engine: Engine, *asked: SamplingParams) -> list[list[RequestOutput]]:
    """All of these at once; a bystander's answer comes last, and is what it is alone."""
    for number, sampling in enumerate([*asked, PLAIN]):
        engine.add(Request(number, PROMPT, sampling))
    found: list[list[RequestOutput]] = [[] for _ in (*asked, PLAIN)]
    for output in engine.run():
        found[output.request_id].append(output)
    return found


def error_of(outputs: list[RequestOutput]) -> HippoError:
    assert outputs[-1].finish_reason == "error"
    assert outputs[-1].error is not None
    assert not any(output.error for output in outputs[:-1])
    return outputs[-1].error


@pytest.fixture(scope="module")
def undisturbed() -> list[int | None]:
    (found,) = run(make_engine(open_words()))
    return [output.token for output in found]


@pytest.mark.parametrize("where", ["sampler", "processor", "logprobs", "accept", "detokenizer", "queue"])
def test_an_error_of_one_request(
    engine: Engine, undisturbed: list[int | None], where: str, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    """Where no client can bring one about, we do: at the third token, or before the first."""

    def break_sampler(self: TokenSampler, *_: Any) -> Any:
        raise RuntimeError("a mistake")

    marked = replace(PLAIN, temp=1.0, seed=5, logprobs=2)
    wanted = Engine._queue

    def queue(self: Engine, request: Request, mask: Any = None) -> None:
        if request.sampling != marked:
            return wanted(self, request, mask)
        if where == "queue":
            raise RuntimeError("a mistake")
        wanted(self, request, mask)
        sequence = self._sequences[request.id]
        if where == "detokenizer":
            sequence.detokenizer.add_token = break_sampler
        else:
            name = {"sampler": "_sampler", "processor": "logprobs", "logprobs": "num_logprobs"}.get(where, where)
            setattr(sequence.sampler, name, "many" if where == "logprobs" else break_sampler)
        return None

    monkeypatch.setattr(Engine, "_queue", queue)
    state = mx.array(mx.random.state[0])
    if where == "queue":  # its caller refuses it: rank_service.py, batch_run.py
        with pytest.raises(RuntimeError, match="a mistake"):
            engine.add(Request(7, PROMPT, marked))
        (bystander,) = run(engine)
    else:
        broken, bystander = run(engine, marked)
        error = error_of(broken)
        assert isinstance(error, ForeignError)
        assert "internal error" in str(error)
        assert "Traceback" in caplog.text
    assert [output.token for output in bystander] == undisturbed
    assert mx.array_equal(mx.random.state[0], state)
    assert engine.is_idle and not engine._sequences


def test_a_grammar_that_goes_astray_is_an_error(engine: Engine, undisturbed: list[int | None]) -> None:
    """Neither the end of a text that isn't JSON, nor anybody else's."""
    broken, bystander = run(engine, replace(PLAIN, max_tokens=200, grammar=json_grammar(TOO_COMPLEX)))
    error = error_of(broken)
    assert isinstance(error, FieldError) and error.field == "response_format"
    assert "can no longer follow its schema: Parser Error: Current row has" in str(error)
    assert [output.token for output in bystander] == undisturbed


def test_grammars_are_compiled_once_beside_the_steps(
    engine: Engine, undisturbed: list[int | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled = []
    compile_one = grammar.Grammars._matcher
    monkeypatch.setattr(
        grammar.Grammars, "_matcher", lambda self, one: (compiled.append(one.grammar), compile_one(self, one))[1]
    )
    held = replace(PLAIN, max_tokens=40, temp=1.0, grammar=json_grammar({**SCHEMA, "additionalProperties": False}))
    *answers, bystander = run(engine, *(replace(held, seed=seed) for seed in range(5)))
    assert compiled == [held.grammar]
    for outputs in answers:
        assert json.loads("".join(output.text for output in outputs))["fox"] in (True, False)
    assert [output.token for output in bystander] == undisturbed


def test_grammars_that_cant_be_compiled(engine: Engine, undisturbed: list[int | None], monkeypatch: Any) -> None:
    wrong = replace(PLAIN, grammar='{"grammars": [{"lark_grammar": "start: ("}]}')
    broken, bystander = run(engine, wrong)
    assert str(error_of(broken)).startswith("response_format: ")
    assert [output.token for output in bystander] == undisturbed
    monkeypatch.setattr(grammar, "_COMPILE_TIMEOUT_S", 0.2)
    monkeypatch.setattr(grammar.Grammars, "_matcher", lambda *_: time.sleep(1))
    late, bystander = run(engine, replace(PLAIN, grammar=json_grammar(SCHEMA)))
    assert "compiling the schema took longer than 0 s" in str(error_of(late))
    assert [output.token for output in bystander] == undisturbed
    engine.add(Request(0, PROMPT, replace(PLAIN, grammar=json_grammar({"type": "string"}))))
    assert not engine.is_idle and engine.num_waiting == 1
    engine.abort(0)
    assert [output.finish_reason for output in engine.run()] == ["abort"]


@pytest.mark.parametrize("decoder", ["ByteLevel", "SPM"])
def test_tokens_that_the_tokenizer_doesnt_have_say_nothing(
    tmp_path: Path, decoder: str, undisturbed: list[int | None]
) -> None:
    """Logits are wider than many vocabularies; a bias or a high temperature may choose what nothing stands for."""
    folder = shutil.copytree(BUNDLED_MODEL, tmp_path / "model")
    if decoder == "SPM":
        tokenizer = json.loads((folder / "tokenizer.json").read_text())
        replaced = {"type": "Replace", "pattern": {"String": "\u2581"}, "content": " "}
        tokenizer["decoder"] = {"type": "Sequence", "decoders": [replaced, {"type": "ByteFallback"}, {"type": "Fuse"}]}
        (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    words = open_words(folder)
    padded, bystander = run(make_engine(words), replace(PLAIN, max_tokens=3, logit_bias=((1500, 10000.0),)))
    assert [(output.token, output.text) for output in padded] == [(1500, "")] * 3
    assert [output.token for output in bystander] == undisturbed
    assert AnswerText(words, [1500, 1501]).text == ""


@pytest.mark.parametrize("temp", [1e-300, 1e-39, 1e-9])
def test_a_temperature_that_is_nearly_0_is_greedy(engine: Engine, undisturbed: list[int | None], temp: float) -> None:
    """float32 has no reciprocal of it: all tokens would be alike."""
    nearly, _ = run(engine, replace(PLAIN, temp=temp, seed=3))
    assert [output.token for output in nearly] == undisturbed


class Watch:
    """A Control that watches nothing."""

    stalled_s = 0.0

    def __getattr__(self, name: str) -> Any:
        return lambda *_: []


def test_rank_0_says_what_a_request_has_met(engine: Engine, monkeypatch: Any) -> None:
    """Whatever reading it raises, or a step of it, is told, and the next request is answered."""
    ours, theirs = socket.socketpair()
    queue_one = Engine._queue

    def queue(self: Engine, request: Request, mask: Any = None) -> None:
        if request.id == 0:
            raise RuntimeError("a mistake")
        queue_one(self, request, mask)
        if request.id == 1:
            self._sequences[1].sampler.accept = None

    monkeypatch.setattr(Engine, "_queue", queue)
    service = RankService(ours, cast(Any, Watch()))
    asked = [replace(PLAIN, temp=0.5, seed=number) for number in range(3)]
    asked.append(replace(PLAIN, logit_bias=((9999, 1.0),)))
    for number, sampling in enumerate(asked):
        theirs.sendall(line_of(Add(Request(number, PROMPT, sampling))))
    said: list[Report] = []

    def read() -> None:
        for line in theirs.makefile("rb"):
            said.append(report := read_report(line))
            if isinstance(report, OutputMessage) and report.finish_reason:
                theirs.shutdown(socket.SHUT_RDWR)

    reading = threading.Thread(target=read)
    reading.start()
    service.run(engine, Ready(500, 1536), Timeline(lambda doing, activity=None: None))
    reading.join(30)
    errors = {report.request_id: report.error.error() for report in said if isinstance(report, Refused)}
    assert [type(errors[number]) for number in (0, 1, 3)] == [ForeignError, ForeignError, UserError]
    assert [report.request_id for report in said if isinstance(report, Taking)] == [0, None, 1, None, 2, None, 3, None]
    assert sorted(number for report in said if isinstance(report, Begun) for number in report.request_ids) == [1, 2]
    assert {report.request_id for report in said if isinstance(report, OutputMessage)} == {2}
