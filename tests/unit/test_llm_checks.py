"""What a script gives to an LLM is checked before anything is begun; what ranks send each other is checked when it comes."""

from __future__ import annotations

from collections import deque
from typing import Any

import pytest

from hippo_mpi.config.options import SamplingOptions
from hippo_mpi.engine.request import SamplingParams, check_sampling
from hippo_mpi.errors import DesyncError, HippoError, UserError
from hippo_mpi.transport.channel import RingChannel
from hippo_mpi.transport.layout import Layout
from hippo_mpi.transport.script_ring import ScriptControl
from hippo_mpi.transport.world import World

BAD: list[tuple[dict[str, Any], str]] = [
    ({"max_tokens": 0}, "max_tokens: 0 is not a whole number above 0"),
    ({"max_tokens": -3}, "max_tokens: -3 is not a whole number above 0"),
    ({"max_tokens": 2.5}, "max_tokens: '2.5' is not a whole number above 0"),
    ({"max_tokens": None}, "max_tokens: 'None' is not a whole number above 0"),
    ({"stop_words": "END"}, "stop_words: 'END' is not a list of strings"),
    ({"stop_words": ("END", 3)}, r"stop_words: \('END', 3\) is not a list of strings"),
    ({"top_p": 7.0}, "top_p: 7.0 is not a number from 0 to 1"),
    ({"temp": float("nan")}, "temp: nan is not a number of at least 0"),
    ({"temp": "0.5"}, "temp: .* is not a number of at least 0"),
    ({"logprobs": -1}, "logprobs: -1 is not a whole number"),
    ({"min_p": 2.0}, "min_p: 2.0 is not a number from 0 to 1"),
    ({"top_k": -5}, "top_k: -5 is not a whole number"),
    ({"xtc_probability": 2.0}, "xtc_probability: 2.0 is not a number from 0 to 1"),
    ({"xtc_threshold": 0.7}, "xtc_threshold: 0.7 is not a number from 0 to 0.5"),
    ({"repetition_penalty": 0.0}, "repetition_penalty: 0.0 is not a number above 0"),
    ({"presence_penalty": float("inf")}, "presence_penalty: inf is not a number"),
    ({"seed": -1}, "seed: -1 is not a seed, from 0"),
    ({"logit_bias": {5: 1.0}}, r"logit_bias: {5: 1.0} is not a list of pairs \(token, number\)"),
    ({"logit_bias": ((5, "1"),)}, r"logit_bias: .* is not a list of pairs \(token, number\)"),
]


@pytest.mark.parametrize(("given", "message"), BAD)
def test_invalid_parameters_are_refused_in_the_words_of_the_command_line(given: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=f"^{message}"):
        check_sampling(SamplingParams(**given))


def test_valid_parameters_are_not() -> None:
    check_sampling(SamplingParams())
    check_sampling(SamplingParams.from_options(SamplingOptions()))
    check_sampling(SamplingParams(1, 1, 1, 1, seed=2**64 - 1, logprobs=0, stop_words=("END",), logit_bias=((5, -1),)))


def test_an_llm_refuses_them_before_it_begins(capsys: pytest.CaptureFixture[str]) -> None:
    from hippo_mpi import LLM

    with LLM("story-3m") as llm:
        with pytest.raises(UserError, match="top_p: 7"):
            llm.generate(["The fox", "The bear"], [SamplingParams(), SamplingParams(top_p=7.0)])
        assert len(list(llm.generate("The fox", SamplingParams(max_tokens=3)))) == 3
    assert not capsys.readouterr().err


class ScriptedControl:
    """The control connections of a rank to which certain frames come."""

    def __init__(self, *frames: bytes) -> None:
        self.frames = deque(frames)

    def await_announcement(self) -> bytes:
        return self.frames.popleft()


def test_arrays_where_an_announcement_was_expected_are_out_of_step() -> None:
    control: Any = ScriptedControl(b"")
    with pytest.raises(DesyncError, match="before the next one was announced"):
        RingChannel(World(0, 1, "none", "here", ()), control, Layout(1)).receive()


def test_a_report_of_another_kind_is_out_of_step(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: ScriptControl, error: HippoError) -> None:
        raise error

    monkeypatch.setattr(ScriptControl, "fail", fail)
    control = ScriptControl(World(0, 1, "none", "here", ("127.0.0.1",)), 5.0, 30.0)
    control.idle()
    control._reports.put((0, b'{"a": 1}'))  # type: ignore[arg-type]
    with pytest.raises(DesyncError, match="every rank of a script must make the same calls"):
        control.next_report(list[int])
