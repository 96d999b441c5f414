"""A server whose ranks fail while it answers: clients see a pause, and the same text."""

from __future__ import annotations

import os
import re
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import openai
import pytest

from hippo_mpi.config.bundled import BUNDLED_MODEL
from tests import ranks
from tests.servers import FAULTS, GOES_ON, MODEL, SERVE, WITH_FAULTS, Server, server

NUM_STREAMS = 8
TIMEOUT_S = 8  # other ranks start beside these, which must count as lost only if they are


def answers(running: Server, begun: threading.Barrier | None = None) -> list[str]:
    """Long answers to different prompts at once, greedy ones and drawn ones; all have begun at the barrier."""

    def ask(number: int) -> str:
        stream = running.client().completions.create(
            model=MODEL, prompt=f"Story {number}: once upon a time a fox", max_tokens=150, stream=True,
            temperature=0.0 if number % 2 else 1.0, seed=number, logit_bias=GOES_ON,
        )  # fmt: skip
        text = ""
        for index, chunk in enumerate(stream):
            text += chunk.choices[0].text
            if index == 5 and begun is not None:
                begun.wait(30)
        return text

    with ThreadPoolExecutor(NUM_STREAMS) as pool:
        return list(pool.map(ask, range(NUM_STREAMS)))


@pytest.fixture(scope="module")
def running() -> Iterator[Server]:
    with server("--timeout", str(TIMEOUT_S), env=WITH_FAULTS) as found:
        yield found


@pytest.fixture(scope="module")
def wanted(running: Server) -> list[str]:
    """What is answered without a fault."""
    found = answers(running)
    assert all(len(text) > 100 for text in found)
    return found


def num_restarts(running: Server) -> float:
    return float(re.findall(r"^hippo_restarts (\S+)$", running.get("/metrics"), re.M)[0])


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("rank", [0, 1])
def test_every_stream_goes_on_where_it_was(running: Server, wanted: list[str], rank: int, fault: str) -> None:
    running.await_ready()
    before, restarts = running.rank_pids(), num_restarts(running)
    begun = threading.Barrier(NUM_STREAMS + 1)
    with ThreadPoolExecutor(1) as pool:
        found = pool.submit(answers, running, begun)
        begun.wait(60)
        os.kill(before[rank], FAULTS[fault])
        assert running.get("/health") == {"status": "ok"}
        assert found.result(60) == wanted
    assert not ranks.await_end(before)
    assert running.status()["ready"]
    assert num_restarts(running) == restarts + 1, running.running.err


def test_ranks_share_the_model_as_before() -> None:
    """What they have found to be fastest might be another layout next time, and takes seconds to find."""
    with server("--timeout", str(TIMEOUT_S), "--parallel", "auto") as running:
        running.await_ready()
        before, (layout,) = (
            running.status()["ranks"],
            re.findall("chosen: (.*), [0-9.,]+ tokens/s", running.running.err),
        )
        os.kill(running.rank_pids()[1], signal.SIGKILL)
        running.client().completions.create(model=MODEL, prompt="Once", max_tokens=3)
        assert num_restarts(running) == 1
        assert [rank["layers"] for rank in running.status()["ranks"]] == [rank["layers"] for rank in before], layout
        assert len(re.findall("timing layers to choose a layout", running.running.err)) == 1


def test_a_request_that_kills_ranks_is_given_up_alone() -> None:
    """Streams that were at work beside it, and requests that waited, end as if it had never been."""
    options = ("--timeout", str(TIMEOUT_S), "--max-restarts", "2", "--max-batch-size", "10")
    with server(*options, env={**WITH_FAULTS, "HIPPO_POISON": "1000"}) as running:
        client, begun = running.client(), threading.Barrier(NUM_STREAMS + 1)
        undisturbed = answers(running)

        def poison() -> str:
            with pytest.raises(openai.InternalServerError) as told:
                client.completions.create(model=MODEL, prompt=[9, 10, 1000, 1000, 1000, 11], max_tokens=3)
            return str(told.value)

        def ask(number: int) -> int:
            told = client.completions.create(
                model=MODEL, prompt=f"A hen and {number}", max_tokens=3, logit_bias=GOES_ON
            )
            assert told.usage is not None
            return told.usage.completion_tokens

        with ThreadPoolExecutor(12) as pool:
            streams = pool.submit(answers, running, begun)
            begun.wait(60)
            poisoned, others = pool.submit(poison), [pool.submit(ask, number) for number in range(8)]
            assert "the ranks failed 3 times in a row, most recently: lost the connection to rank 0" in poisoned.result(
                60
            )
            assert [other.result(60) for other in others] == [3] * 8
            assert streams.result(60) == undisturbed
        assert num_restarts(running) == 3, running.running.err


def test_drafts_are_made_anew() -> None:
    """An answer that a draft model helps with goes on after a fault as if there had been none."""
    draft = str(BUNDLED_MODEL.parent / "story-draft")
    with server("--timeout", str(TIMEOUT_S), "--draft-model", draft, "--precision", "float32") as running:

        def ask(begun: threading.Event, **options: float) -> str:
            stream = running.client().completions.create(
                model=MODEL, prompt="Once upon a time a fox", max_tokens=150, stream=True, logit_bias=GOES_ON, **options
            )  # type: ignore[call-overload]
            text = ""
            for index, chunk in enumerate(stream):
                text += chunk.choices[0].text
                if index > 5:
                    begun.set()
            return text

        for options in ({"temperature": 0}, {"temperature": 1.0, "seed": 4}):
            undisturbed, begun = ask(threading.Event(), **options), threading.Event()
            with ThreadPoolExecutor(1) as pool:
                found = pool.submit(ask, begun, **options)
                begun.wait(30)
                os.kill(running.rank_pids()[1], signal.SIGKILL)
                assert found.result(60) == undisturbed
        accepted = re.findall(r"^hippo_accepted_draft_tokens_total (\S+)$", running.get("/metrics"), re.M)
        assert float(accepted[0]) > 100


def test_requests_wait_while_ranks_start_again() -> None:
    with server("--timeout", str(TIMEOUT_S)) as running:
        os.kill(running.rank_pids()[0], signal.SIGKILL)
        running.await_status(lambda status: not status["ready"])
        assert "the ranks" in running.status()["state"]
        answer = running.client().completions.create(model=MODEL, prompt="A fox", max_tokens=5)
        assert answer.usage is not None and answer.usage.completion_tokens == 5


def test_a_model_that_is_gone_meanwhile(tmp_path: Path) -> None:
    """Ranks that can't start again are tried again, later and later; a request gets its error after so many."""
    folder = tmp_path / "model"
    shutil.copytree(BUNDLED_MODEL, folder)
    with server("--model", str(folder), "--timeout", str(TIMEOUT_S), "--max-restarts", "2") as running:
        client = running.client()
        client.completions.create(model="model", prompt="A fox", max_tokens=3)
        folder.rename(tmp_path / "other")
        os.kill(running.rank_pids()[0], signal.SIGKILL)
        running.await_status(lambda status: not status["ready"])
        with pytest.raises(openai.InternalServerError, match="the ranks failed 3 times in a row"):
            client.completions.create(model="model", prompt="A fox", max_tokens=3)
        (tmp_path / "other").rename(folder)
        assert client.completions.create(model="model", prompt="A fox", max_tokens=3).choices[0].text


def test_the_end_while_ranks_start_again() -> None:
    """A stopped rank, and a signal to the front while it ends what is left: nothing stays."""
    with ranks.single([SERVE, "--port", "0", "--timeout", "3"]) as process:
        running = Server(process)
        running.await_ready()
        below = running.rank_pids()
        os.kill(below[1], signal.SIGSTOP)
        running.await_status(lambda status: not status["ready"])
        time.sleep(0.3)
        process.process.terminate()
        assert process.wait(20) == 0
        assert not ranks.await_end(below)


def test_ranks_that_never_come_back() -> None:
    """Only then does a client get an error, and it says why."""
    with server("--timeout", str(TIMEOUT_S), "--max-restarts", "0") as running:
        begun = threading.Event()

        def ask() -> str:
            stream = running.client().completions.create(
                model=MODEL, prompt="A fox", max_tokens=1900, stream=True, temperature=2.0,
                logit_bias=GOES_ON,
            )  # fmt: skip
            try:
                for _ in stream:
                    begun.set()
            except Exception as error:
                return str(error)
            return "no error"

        with ThreadPoolExecutor(1) as pool:
            line = pool.submit(ask)
            begun.wait(30)
            os.kill(running.rank_pids()[1], signal.SIGKILL)
            assert "the ranks failed 1 times in a row" in line.result(60)
        time.sleep(0.1)
        running.await_ready()
