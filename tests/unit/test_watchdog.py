"""Ranks that die, fall silent, fail or stall, alone and in the middle of another's failure: one line says why, all end."""

from __future__ import annotations

import contextlib
import random
import re
import socket
import struct
import threading
from collections.abc import Iterator

import msgspec
import pytest

from hippo_mpi.errors import ForeignError, HippoError, RankError, UserError
from hippo_mpi.transport import control
from hippo_mpi.transport.frames import framed
from hippo_mpi.transport.rank_messages import Report, encode
from hippo_mpi.transport.rank_status import RankStatus
from tests.unit.fake_world import HANG_S, TIMEOUT_S, Make, Rank, some_beats, wait_until, worlds


@pytest.fixture
def make(monkeypatch: pytest.MonkeyPatch) -> Iterator[Make]:
    with worlds(monkeypatch) as found:
        yield found


def await_ends(ranks: list[Rank], speaker: int, code: int = RankError.exit_code) -> str:
    """All of these end with this status, and `speaker` alone prints a line, which is returned."""
    ends = {rank.world.rank: rank.await_end() for rank in ranks}
    assert {status for _, status in ends.values()} == {code}
    assert [number for number, (line, _) in ends.items() if line is not None] == [speaker]
    return str(ends[speaker][0])


@pytest.mark.parametrize("victim", [1, 2])
def test_a_rank_dies(make: Make, victim: int, capfd: pytest.CaptureFixture[str]) -> None:
    ranks, told = make(3), list[tuple[int, str]]()
    ranks[0].on_end = lambda code, why: told.append((code, why))
    ranks[0].progress("computing step 8")
    ranks[victim].awaits("waiting for step 8")
    ranks[0].heard(victim, lambda peer: peer.doing == "waiting for step 8")
    ranks.pop(victim).die()
    line = await_ends(ranks, 0)
    name = f"rank {victim} (h{victim})"
    assert line == f"{name} died; it was waiting for step 8, and rank 0 (h0) was computing step 8"
    assert told == [(3, line)] and capfd.readouterr().err == f"error: {line}\n"


def test_rank_0_dies(make: Make, capfd: pytest.CaptureFixture[str]) -> None:
    """Of the others rank 1 speaks."""
    first, *others = make(4)
    first.die()
    line = await_ends(others, 1)
    assert re.fullmatch(r"rank 0 \(h0\) died; it was starting, and rank 1 \(h1\) was starting", line)
    assert capfd.readouterr().err == f"error: {line}\n"


@pytest.mark.parametrize("silent", [0, 1, 2])
def test_a_rank_falls_silent(make: Make, silent: int) -> None:
    ranks = make(3)
    ranks[silent].fall_silent()
    others = [rank for rank in ranks if rank is not ranks[silent]]
    for rank in others if silent == 0 else ranks[:1]:
        rank.age_word_of(silent)
    line = await_ends(others, 1 if silent == 0 else 0)
    assert re.match(rf"rank {silent} \(h{silent}\) sent no heartbeat for 6\d\.\d s; it was starting, and rank", line)


@pytest.mark.parametrize("error", [UserError("a"), RankError("b"), ForeignError("c")])
@pytest.mark.parametrize("who", [0, 2])
def test_a_rank_says_that_it_failed(make: Make, who: int, error: HippoError) -> None:
    ranks = make(3)
    ranks[who].fail_beside(error)
    line = await_ends(ranks, 0, error.exit_code)
    assert line == (str(error) if who == 0 else f"rank 2 (h2): {error}")


def test_what_every_rank_finds_is_said_once_by_rank_0(
    make: Make, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who finds it sooner leaves it the word for a while."""
    monkeypatch.setattr(control, "_SAME_S", 20.0)  # times as quick here
    ranks = make(4)
    for rank in ranks[1:]:
        rank.fail_beside(UserError("no such file"))
    some_beats()
    ranks[0].fail_beside(UserError("no such file"))
    assert await_ends(ranks, 0, 2) == "no such file"
    assert capfd.readouterr().err == "error: no such file\n"


def test_two_ranks_fail_at_once(make: Make, capfd: pytest.CaptureFixture[str]) -> None:
    """The first one's error is the cause, and the only one that is told."""
    ranks = make(3)
    ranks[1].fail_beside(RankError("of one"))
    ranks[2].fail_beside(RankError("of two"))
    assert await_ends(ranks, 0) in ("rank 1 (h1): of one", "rank 2 (h2): of two")
    assert len(ranks[0].lines) == 1 and capfd.readouterr().err.count("error:") == 1


def test_a_rank_dies_while_rank_0_says_what_it_failed_of(make: Make, capfd: pytest.CaptureFixture[str]) -> None:
    """As all do that see its end: what follows from a failure isn't told as its cause."""
    ranks, is_ending, may_end = make(3), threading.Event(), threading.Event()

    def on_end(code: int, why: str) -> None:
        is_ending.set()
        may_end.wait(20)

    ranks[0].on_end = on_end
    ranks[0].fail_beside(UserError("the cause"))
    assert is_ending.wait(20)
    ranks[2].die()
    ranks[1].await_end()
    some_beats()
    may_end.set()
    assert ranks[0].await_end() == ("the cause", 2)
    assert ranks[0].lines == ["the cause"] and capfd.readouterr().err == "error: the cause\n"


def test_rank_0_dies_while_another_says_that_it_failed(make: Make) -> None:
    ranks = make(3)
    ranks[0].fall_silent()
    ranks[2].fail_beside(RankError("unheard"))
    ranks[0].die()
    assert ranks[1].await_end()[1] == ranks[2].await_end()[1] == 3
    assert str(ranks[1].end).startswith("('rank 0 (h0) died")


HALF = struct.pack("<I", 200) + b'{"type": "be'


@pytest.mark.parametrize("sent", [b"", b"\1", HALF], ids=["nothing", "half a length", "half a frame"])
@pytest.mark.parametrize("then", ["dies", "falls silent"])
def test_an_end_in_the_middle_of_a_frame(make: Make, sent: bytes, then: str) -> None:
    ranks = make(2)
    ranks[1].fall_silent()
    ranks[1].send_raw(sent)
    some_beats()
    assert ranks[0].end is None
    if then == "dies":
        ranks[1].die()
    else:
        ranks[0].age_word_of(1)
    assert ("died" if then == "dies" else "sent no heartbeat for") in await_ends(ranks[:1], 0)


def test_a_frame_in_two_parts(make: Make) -> None:
    ranks = make(2)
    ranks[1].fall_silent()
    frame = framed(encode(Report(msgspec.Raw(b'{"x": 1}'))))
    ranks[1].send_raw(frame[:9])
    some_beats()
    ranks[1].send_raw(frame[9:])
    assert ranks[0].next_report(dict[str, int]) == {"x": 1}
    some_beats()
    assert ranks[0].end is None


def test_a_frame_that_is_too_long_is_an_end(make: Make) -> None:
    ranks = make(2)
    ranks[1].fall_silent()
    ranks[1].send_raw(struct.pack("<I", 1 << 30))
    assert "rank 1 (h1) died" in await_ends(ranks[:1], 0)


@pytest.mark.parametrize("size", [1, 3])
def test_nobody_gets_on(make: Make, size: int) -> None:
    ranks = make(size)
    for rank in ranks:
        rank.awaits("waiting for step 3")
    some_beats()
    assert ranks[0].stalled_s == 0
    ranks[0].age_progress()
    line = await_ends(ranks, 0)
    assert re.match(r"no rank made progress for 6\d s: rank 0 \(h0\) is waiting for step 3", line)
    assert line.count("is waiting for step 3") == size


def test_nothing_is_due_while_idle(make: Make) -> None:
    ranks = make(2)
    ranks[0].idle()
    ranks[1].awaits("waiting for a step")
    some_beats()
    ranks[0].age_progress()
    some_beats()
    assert ranks[0].stalled_s == 0 and ranks[0].end is None
    ranks[0].awaits("waiting for step 1")
    some_beats()
    assert ranks[0].end is None
    ranks[0].age_progress()
    assert "no rank made progress" in await_ends(ranks, 0)


def test_nothing_is_due_in_a_pause(make: Make) -> None:
    """Also if what is done in it fails; then all is as before."""
    (rank,) = make(1)
    rank.awaits("waiting for step 1")
    with contextlib.suppress(ValueError), rank.pausing():
        rank.age_progress()
        some_beats()
        assert rank.end is None and rank.doing == "idle"
        raise ValueError
    some_beats()
    assert rank.end is None and rank.doing == "waiting for step 1"
    rank.age_progress()
    assert "no rank made progress" in str(rank.await_end())


def test_what_one_rank_does_is_progress_of_all(make: Make) -> None:
    ranks = make(2)
    for rank in ranks:
        rank.awaits("waiting for step 1")
    some_beats()
    ranks[0].age_progress(TIMEOUT_S - 20)
    assert ranks[0].stalled_s > TIMEOUT_S - 20
    ranks[1].awaits("waiting after step 1")
    wait_until(lambda: ranks[0].stalled_s == 0, "progress wasn't heard of")
    assert ranks[0].end is None


def test_a_step_as_long_as_the_longest_is_let_be(make: Make) -> None:
    ranks = make(2)
    ranks[0].awaits("waiting for step 1")
    ranks[1]._pulse.longest_s = 100.0
    ranks[1].awaits("waiting after step 0")
    ranks[0].heard(1, lambda peer: peer.longest_s == 100)
    some_beats()
    ranks[0].age_progress(TIMEOUT_S + 190)
    some_beats()
    assert ranks[0].end is None and ranks[0].stalled_s > TIMEOUT_S + 189
    ranks[0].age_progress(11)
    assert "no rank made progress for 26" in await_ends(ranks, 0)


@pytest.mark.parametrize("number", [0, 1])
def test_a_cut_link_is_named(make: Make, number: int) -> None:
    """A main thread that loses its neighbour leaves the watch thread the word for a while: here that sees nothing."""
    ranks = make(2)
    ranks[number].awaits("waiting for step 4")
    thread = threading.Thread(target=ranks[number].await_announcement, daemon=True)
    thread.start()
    ranks[1 - number].announce(b"step 3")
    thread.join(20)
    assert not thread.is_alive()
    threading.Thread(target=ranks[number].await_announcement, daemon=True).start()
    ranks[1 - number]._next.shutdown(socket.SHUT_RDWR)
    what = f"lost rank {1 - number} (h{1 - number}) while waiting for step 4: its connection closed"
    assert await_ends(ranks, 0) == (what if number == 0 else f"rank 1 (h1): {what}")


def test_a_link_that_is_cut_behind_the_end_is_no_failure(make: Make) -> None:
    ranks = make(2)
    ranks[1].close()
    thread = threading.Thread(target=ranks[1].await_announcement, daemon=True)
    thread.start()
    ranks[0]._next.shutdown(socket.SHUT_RDWR)
    thread.join(HANG_S)
    assert not thread.is_alive() and ranks[1].end is None and ranks[0].end is None


def test_who_announces_to_a_dead_rank_leaves_the_word_to_its_watch_thread(make: Make) -> None:
    ranks = make(3)

    def announce() -> None:
        while True:
            ranks[0].announce(bytes(1000))

    ranks[1].die()
    threading.Thread(target=announce, daemon=True).start()
    assert await_ends([ranks[0], ranks[2]], 0).startswith("rank 1 (h1) died")


def test_a_good_end_is_nobodys_failure(make: Make) -> None:
    """Whoever hangs up first, and rank 0 last; a death behind the end is none either."""
    ranks = make(4)
    threads = [threading.Thread(target=rank.part) for rank in ranks]
    for rank in ranks:
        rank.close()
    ranks[0].heard(3, lambda peer: peer.said_bye)
    threads[0].start()
    for thread, rank in list(zip(threads, ranks, strict=True))[1:3]:
        thread.start()
        rank.age_word_of(0)
    some_beats()
    assert threads[0].is_alive()
    ranks[3].die()
    for thread in threads[:3]:
        thread.join(20)
        assert not thread.is_alive()
    assert [rank.end for rank in ranks] == [None] * 4


def test_rank_0_closes_first(make: Make) -> None:
    ranks = make(3)
    ranks[0].close()
    ranks[1].heard(0, lambda peer: peer.said_bye)
    ranks[2].heard(0, lambda peer: peer.said_bye)
    ranks[1].die()  # without a word: it may
    some_beats()
    ranks[0].die()
    some_beats()
    assert [rank.end for rank in ranks] == [None] * 3


def test_reports_and_statuses(make: Make) -> None:
    ranks = make(3)
    found: dict[int, object] = {}
    statuses = [RankStatus(number, 0, 0, 0, 0) for number in range(3)]
    for rank in ranks:
        rank.own_status = lambda rank=rank: statuses[rank.world.rank]  # type: ignore[misc]

    def agree(rank: Rank) -> None:
        gathered = rank.gather({"from": rank.world.rank})
        found[rank.world.rank] = gathered, rank.share({"go": 1} if gathered else None, dict[str, int])

    threads = [threading.Thread(target=agree, args=[rank]) for rank in ranks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    everything = [{"from": 0}, {"from": 1}, {"from": 2}]
    assert found == {0: (everything, {"go": 1}), 1: (None, {"go": 1}), 2: (None, {"go": 1})}
    wait_until(lambda: ranks[0].statuses() == statuses, "statuses don't come")


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("how", ["its own status can't be asked", "a frame isn't JSON"])
def test_a_mistake_of_the_watch_thread_is_an_end(make: Make, how: str) -> None:
    ranks = make(2)
    if how == "a frame isn't JSON":
        ranks[1].send_raw(framed(b"fox"))
    else:
        ranks[0].own_status = lambda: dict[str, int]()["fox"]  # type: ignore[return-value,assignment]
    wait_until(lambda: ranks[0].end is not None or num_watchers() < 2, "it goes on")
    some_beats()
    assert ranks[0].end is not None


def num_watchers() -> int:
    return sum(thread.name == "hippo-watch" for thread in threading.enumerate())


def befall(victim: Rank, kind: str, others: list[Rank]) -> None:
    """Let something happen to a rank, which those that know of it notice at once."""
    if kind == "fails":
        victim.fail_beside(RankError("a fault"))
    elif kind == "falls silent":
        victim.fall_silent()
        for other in others:
            if victim.world.rank in other._peers:
                other.age_word_of(victim.world.rank)
    elif kind == "stalls" and others[0].world.rank == 0:
        others[0].age_progress()
    else:
        if kind == "dies in a frame":
            victim.send_raw(HALF)
        victim.die()


FAULTS = ["fails", "falls silent", "stalls", "dies in a frame", "dies"]


@pytest.mark.parametrize("seed", range(10))
def test_storms(make: Make, seed: int, capfd: pytest.CaptureFixture[str]) -> None:
    """Whatever is told before, and whichever two faults come one upon the other: one line at most, and all end."""
    chance = random.Random(seed)
    ranks = make(chance.randint(3, 5))
    for _ in range(30):
        rank, step = chance.choice(ranks), chance.randint(0, 9)
        kind = chance.choice(["progress", "idle", "report", "announce"])
        if kind == "progress":
            rank.awaits(f"waiting for step {step}")
        elif kind == "idle":
            rank.idle()
        elif kind == "report":
            rank.report({"x": step}, 0 if rank.world.rank else step % len(ranks))
        else:
            rank.announce(b"step")
    for rank in ranks:
        rank.awaits("waiting for step 10")
    some_beats()
    assert [rank.end for rank in ranks] == [None] * len(ranks)
    victims = chance.sample(ranks, 2)
    for victim in victims:
        befall(victim, chance.choice(FAULTS), [rank for rank in ranks if rank is not victim])
    for rank in ranks:
        if rank not in victims:
            assert rank.await_end()[1] == 3
    assert all(len(rank.lines) <= 1 for rank in ranks)
    assert capfd.readouterr().err.count("error: ") <= 1
