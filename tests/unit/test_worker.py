"""Several sequences through the real stages at once, over in-process channels."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import mlx.core as mx
import pytest
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.utils import load_model

from hippo_mpi.errors import DesyncError, UserError
from hippo_mpi.parallel.schedule import actions
from hippo_mpi.parallel.step import Step
from hippo_mpi.parallel.step_plan import StepPlan, decode
from hippo_mpi.sharding.slot_caches import KVSettings
from hippo_mpi.transport.channel import LocalChannel, Message
from tests.local_ring import LocalRing, make_stages, open_folder
from tests.parity import tiny_models
from tests.parity.tiny_models import make_checkpoint


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint("llama-full", tmp_path_factory.mktemp("llama"))


def greedy(folder: Path, prompt: Sequence[int], count: int) -> list[int]:
    model, _ = load_model(folder)
    cache = make_prompt_cache(model)
    logits = model(mx.array([list(prompt)]), cache=cache)
    made = []
    for _ in range(count):
        made.append(int(mx.argmax(logits[0, -1]).item()))
        logits = model(mx.array([[made[-1]]]), cache=cache)
    return made


@pytest.mark.parametrize("split", [[2, 4], [1, 2, 3], [1, 1, 2, 2]])
def test_two_sequences_in_flight(folder: Path, split: list[int]) -> None:
    """Two sequences take turns, with as many steps in flight as there are stages."""
    ring = LocalRing(make_stages(open_folder(folder), split))
    prompts = {0: [3, 1, 4, 1, 5, 9], 1: [2, 7, 1]}
    tokens = {slot: list(prompt) for slot, prompt in prompts.items()}
    ready = {0: 0, 1: 0}  # slot -> position of its next step; a slot in flight is not in it
    while any(len(tokens[slot]) < len(prompts[slot]) + 12 for slot in prompts):
        if ready:
            slot, position = next(iter(ready.items()))
            del ready[slot]
            chunk = tokens[slot][position:]
            finished = ring.step(ring.plan(slot, position, len(chunk)), [chunk])
        else:
            finished = ring.wait()
        if finished is not None:
            plan, logits = finished.step.plan, finished.logits
            tokens[plan.slots[0]].append(int(mx.argmax(logits[0, -1]).item()))
            ready[plan.slots[0]] = plan.ends[0]
    for slot, prompt in prompts.items():
        expected = greedy(folder, prompt, 12)
        assert tokens[slot][len(prompt) :][:12] == expected


def test_chunks_follow_each_other(folder: Path) -> None:
    """Chunks of a prompt go through without coming back; only the last step's result does."""
    ring = LocalRing(make_stages(open_folder(folder), [2, 2, 2]))
    prompt = list(range(1, 30))
    for start in range(0, 28, 7):
        ring.step(ring.plan(0, start, 7, wants_logits=False), [prompt[start : start + 7]])
    logits = ring.logits(prompt[28:], 28)
    assert not ring.queues[0]
    assert int(mx.argmax(logits[0, -1]).item()) == greedy(folder, prompt, 1)[0]


def noted_actions(ring: LocalRing, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A list of what the Leader does from now on: F computes, S sends, R has received."""
    done: list[str] = []
    leader = ring.leader
    channel = leader._channel
    assert isinstance(channel, LocalChannel)
    deliver, receive, build = channel.deliver, channel.receive, leader._build
    announced: list[int] = []

    def note_deliver(arrays: Sequence[mx.array]) -> None:
        done.append(f"S{announced.pop()}")
        deliver(arrays)

    def note_receive() -> Message:
        message = receive()
        serial = decode(message.header).serial
        return Message(message.header, message.arrays, lambda: done.append(f"R{serial}"))

    def note_build(step: Step, ids: mx.array) -> object:
        done.append(f"F{step.plan.serial}")
        announced.append(step.plan.serial)
        return build(step, ids)

    monkeypatch.setattr(channel, "deliver", note_deliver)
    monkeypatch.setattr(channel, "receive", note_receive)
    monkeypatch.setattr(leader, "_build", note_build)
    return done


@pytest.mark.parametrize("num_stages", [2, 3, 4])
def test_worker_follows_the_schedule(folder: Path, num_stages: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the Leader really does, in order, is what schedule.actions says."""
    ring = LocalRing(make_stages(open_folder(folder), [6 - (num_stages - 1), *[1] * (num_stages - 1)]))
    done = noted_actions(ring, monkeypatch)
    for slot in range(6):
        ring.step(ring.plan(slot, 0, 3), [[1, 2, 3]])
    while ring.leader.num_in_flight:
        ring.wait()
    assert done == [str(a) for a in actions(0, num_stages, 6) if a.kind != "head"]


def test_a_step_ahead_is_built_before_the_result_that_it_follows(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And sent behind it."""
    ring = LocalRing(make_stages(open_folder(folder), [3, 3]))
    done = noted_actions(ring, monkeypatch)
    assert ring.step(ring.plan(0, 0, 3), [[1, 2, 3]]) is None
    for position in range(3, 6):
        if ring.leader.is_ahead:
            assert ring.wait() is None
        result = ring.leader.exchange(None)
        assert result is not None
        ahead = Step(ring.plan(0, position, 1)) if position < 5 else None
        ring.leader.advance(ahead, mx.argmax(result.logits[:, -1:, :], axis=-1))
    assert done == ["F0", "S0", "F1", "R0", "S1", "F2", "R1", "S2", "R2"]


@pytest.mark.parametrize("split", [[3, 3], [2, 2, 2]])
def test_chunks_keep_no_result_waiting(folder: Path, split: list[int]) -> None:
    """A step that sends nothing back still has the oldest result received while it is computed."""
    ring = LocalRing(make_stages(open_folder(folder), split))
    leader, others = ring.leader, len(split) - 1
    for slot in range(others):
        assert ring.step(ring.plan(slot, 0, 3), [[1, 2, 3]]) is None
    for done in range(others):
        finished = ring.step(ring.plan(others, 4 * done, 4, wants_logits=False), [[1, 2, 3, 4]])
        assert (finished is not None) == (done == 0)
    assert leader.num_in_flight == others - 1


def test_positions_trim_what_is_longer(folder: Path) -> None:
    ring = LocalRing(make_stages(open_folder(folder), [3, 3]))
    ring.logits([1, 2, 3, 4, 5, 6], 0)
    again = ring.logits([7, 8], 4)
    fresh = LocalRing(make_stages(open_folder(folder), [3, 3]))
    fresh.logits([1, 2, 3, 4], 0)
    assert mx.array_equal(again, fresh.logits([7, 8], 4)).item()


def test_a_gap_in_positions_is_an_error(folder: Path) -> None:
    ring = LocalRing(make_stages(open_folder(folder), [3, 3]))
    ring.logits([1, 2, 3], 0)
    with pytest.raises(DesyncError, match="holds 3 tokens, but the step begins at 5"):
        ring.logits([1], 5)


def test_a_gap_in_serials_is_an_error(folder: Path) -> None:
    ring = LocalRing(make_stages(open_folder(folder), [3, 3]))
    ring.logits([1, 2, 3], 0)
    ring.plan(0, 3, 1)  # made, but never sent
    with pytest.raises(DesyncError, match="expected step 1, got 2"):
        ring.logits([4], 3)


def test_released_slots_are_gone_everywhere(folder: Path) -> None:
    ring = LocalRing(make_stages(open_folder(folder), [2, 2, 2]))
    ring.logits([1, 2, 3], 0, slot=5)
    ring.step(StepPlan(1, drops=(5,)), [])
    for follower in ring.followers:
        follower.follow()
        assert 5 not in follower.caches


@pytest.fixture(scope="module")
def wide_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Heads of 64, as quantised caches need."""
    config = {**tiny_models.VARIANTS["llama-full"][1], "head_dim": 64}
    tiny_models.VARIANTS["llama-wide"] = ("llama", config)
    try:
        return tiny_models.make_checkpoint("llama-wide", tmp_path_factory.mktemp("wide"))
    finally:
        del tiny_models.VARIANTS["llama-wide"]


@pytest.mark.parametrize("settings", [KVSettings(kv_bits=8, quantized_kv_start=4), KVSettings(max_kv_size=16)])
def test_cache_settings(wide_folder: Path, settings: KVSettings) -> None:
    """Quantised and rotating caches give what they give on one rank, phantoms and all."""
    checkpoint = open_folder(wide_folder)
    rings = [LocalRing(make_stages(checkpoint, split), settings) for split in ([6], [2, 4], [1, 2, 3])]
    for position, chunk in ((0, [5, 4, 3, 2, 1, 6, 7, 8, 9, 1]), (10, [2] * 8), (18, [3]), (19, [4])):
        logits = [ring.logits(chunk, position) for ring in rings]
        for other in logits[1:]:
            assert mx.array_equal(logits[0], other).item()


def test_cache_that_cannot_be_quantised(folder: Path) -> None:
    ring = LocalRing(make_stages(open_folder(folder), [3, 3]), KVSettings(kv_bits=8, quantized_kv_start=0))
    with pytest.raises(UserError, match="--kv-bits"):
        ring.logits([1, 2, 3], 0)
