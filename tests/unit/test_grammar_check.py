"""Schemas that llguidance takes seconds or for ever to compile: bounded, remembered, and nobody waits for them."""

from __future__ import annotations

import asyncio
import logging
import os
import resource
import signal
import time
from typing import Any

import pytest

from hippo_mpi.engine.grammar import json_grammar
from hippo_mpi.engine.grammar_check import GrammarCheck, _note_not_held_to
from hippo_mpi.errors import FieldError
from tests.ranks import descendants, is_alive

FOR_EVER = {"type": "string", "allOf": [{"pattern": f"(a|b|[c-z])*x.{{{i}}}y{i}.*"} for i in range(17)]}
"""Less than 1 kB, and many minutes."""
SIMPLE = json_grammar({"type": "object", "properties": {"at": {"enum": ["river"]}}})


def properties(count: int) -> dict[str, Any]:
    return {"type": "object", "properties": {f"p{i}": {"type": "string"} for i in range(count)}}


@pytest.mark.slow
def test_a_schema_that_takes_for_ever_is_ended_and_remembered() -> None:
    check, grammar = GrammarCheck(limit_s=1.0), json_grammar(FOR_EVER)
    assert len(grammar) < 1000
    for limit_s in (30.0, 0.1):
        began_s = time.monotonic()
        with pytest.raises(FieldError, match=r"^text: compiling the schema takes longer than 1 s: simplify it") as told:
            check.check("text", grammar)
        assert told.value.field == "text"
        assert time.monotonic() - began_s < limit_s
    check.check("text", SIMPLE)


def test_what_is_too_long_is_refused_at_once() -> None:
    with pytest.raises(
        FieldError, match=r"the schema has \d{3},\d{3} bytes; the maximum is 131,072 .*--max-schema-bytes"
    ):
        GrammarCheck().check("response_format", json_grammar(properties(10_000)))


def test_others_dont_wait_and_a_client_that_leaves_ends_it() -> None:
    """The event loop goes on, simple schemas are told meanwhile, and nobody's is no longer worked on."""
    check, before = GrammarCheck(limit_s=60.0), set(descendants(os.getpid()))

    def at_work() -> int:
        return sum(is_alive(pid) for pid in descendants(os.getpid()) if pid not in before)

    async def both() -> None:
        slow = asyncio.ensure_future(check.check_beside("tools", json_grammar(FOR_EVER)))
        await asyncio.sleep(0.2)
        began_s = time.monotonic()
        await check.check_beside("tools", SIMPLE)
        assert time.monotonic() - began_s < 10  # the start of a process, on a busy machine
        assert at_work() == 2
        slow.cancel()
        with pytest.raises(asyncio.CancelledError):
            await slow
        while at_work() > 1:
            assert time.monotonic() - began_s < 20
            await asyncio.sleep(0.05)

    asyncio.run(both())


def test_schemas_with_what_no_grammar_holds_to(caplog: pytest.LogCaptureFixture) -> None:
    """Python's set[...] has uniqueItems: the rest of the schema holds. What would let wrong answers through is refused."""
    _note_not_held_to.cache_clear()
    check = GrammarCheck()
    with caplog.at_level(logging.WARNING):
        check.check("text", json_grammar({"type": "array", "items": {"type": "string"}, "uniqueItems": True}))
        check.check("text", json_grammar({"type": "string", "format": "decimal"}))
    assert "uniqueItems" in caplog.text and "decimal" in caplog.text
    for keyword in ({"not": {"type": "string"}}, {"propertyNames": {"pattern": "a"}}, {"uniqueItems": True, "if": {}}):
        with pytest.raises(FieldError, match="response_format: Unimplemented keys"):
            check.check("response_format", json_grammar(keyword))


def test_descriptors_above_those_that_select_knows() -> None:
    """As a server with a thousand connections has them; and no process is left behind."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(4096, hard), hard))
    check, before = GrammarCheck(), set(descendants(os.getpid()))
    held = [os.dup(0) for _ in range(1100)]
    try:
        check.check("tools", SIMPLE)
        with pytest.raises(FieldError):
            check.check("tools", "no grammar")
        assert sum(is_alive(pid) for pid in set(descendants(os.getpid())) - before) == 1
    finally:
        for descriptor in held:
            os.close(descriptor)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.slow
def test_a_worker_that_reads_nothing_is_ended() -> None:
    """A grammar is longer than what a pipe takes."""
    check = GrammarCheck(limit_s=0.5)
    check.check("tools", SIMPLE)
    worker = check._idle[0].pid
    os.kill(worker, signal.SIGSTOP)
    began_s = time.monotonic()
    with pytest.raises(FieldError, match="takes longer"):
        check.check("tools", json_grammar(properties(3000)))
    assert time.monotonic() - began_s < 20
    assert not is_alive(worker)
    check.check("tools", SIMPLE + " ")
