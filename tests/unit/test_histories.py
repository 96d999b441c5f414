"""Histories of faults are drawn as they are said to be, and what clients are told is compared to the letter."""

from __future__ import annotations

from collections import Counter

from hippo_mpi.engine.request import SamplingParams
from hippo_mpi.protocols.anthropic_messages import read_messages_body
from hippo_mpi.protocols.openai_requests import read_prompts
from hippo_mpi.protocols.openai_responses import read_responses_body
from tests.histories.answers import Said
from tests.histories.history import FAULT_KINDS, draw_history
from tests.histories.kinds import KINDS, MESSAGES, NUM_VARIANTS, RESPONSES, ask_of


def test_a_seed_says_all() -> None:
    assert draw_history(7) == draw_history(7) != draw_history(8)
    assert str(draw_history(7)).startswith("seed 7: ")


def test_all_kinds_come() -> None:
    found = [draw_history(seed) for seed in range(200)]
    faults = [fault for one in found for fault in one.faults]
    assert {fault.kind for fault in faults} == set(FAULT_KINDS)
    assert {stream.kind for one in found for stream in one.streams} == set(KINDS)
    assert {fault.rank for fault in faults} == {0, 1}
    assert all(fault.lasts_s <= FAULT_KINDS[fault.kind] for fault in faults)
    assert not any(one.faults[0].in_recovery for one in found)
    counts = Counter(fault.in_recovery for fault in faults)
    assert counts[True] > 30 and any(one.leaves_after for history in found for one in history.streams)
    assert {fault.kind for one in range(50) for fault in draw_history(one, kinds=["kill"]).faults} == {"kill"}


def test_every_kind_of_stream_can_be_asked_for() -> None:
    for kind in KINDS:
        asks = [ask_of(kind, variant) for variant in range(NUM_VARIANTS)]
        assert asks[0] == ask_of(kind, 0) and any(ask != asks[0] for ask in asks)
        for ask in asks:
            body = {
                name: value
                for name, value in ask.body.items()
                if name not in ("model", "stream", "n", "stream_options")
            }
            if ask.path == MESSAGES:
                read_messages_body(body, SamplingParams())
            elif ask.path == RESPONSES:
                read_responses_body(body, SamplingParams())
            else:
                read_prompts(ask.path, body, SamplingParams())


def test_what_was_told_is_compared() -> None:
    def said(*tokens: str, has_ended: bool = True, logprob: float = -1.0) -> Said:
        found = Said(has_ended=has_ended)
        for token in tokens:
            found.add("0.text", token)
            found.add_logprob("0.logprobs", logprob)
        return found

    wanted = said("a", "b", "c")
    assert not said("a", "b", "c", logprob=-1.001).difference(wanted)
    assert not said("a", "b", has_ended=False).difference(wanted)
    assert "0.text at 2" in said("a", "b").difference(wanted)
    assert "0.text at 2: 'abbc', not 'abc'" in said("a", "b", "b", "c").difference(wanted)
    assert "0.text at 0" in said("b", has_ended=False).difference(wanted)
    assert "0.logprobs at 0" in said("a", "b", "c", logprob=-2.0).difference(wanted)
