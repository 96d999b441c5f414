"""The supervisor over ranks that end, hang, lie and come back in every way, and what is left behind them: nothing."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest

from hippo_mpi.errors import ForeignError, HippoError, UserError
from hippo_mpi.serving.supervision import supervisor as product
from hippo_mpi.serving.supervision.supervisor import LaunchPlan
from tests.unit.fake_link import HANG_S, Client
from tests.unit.supervised import MAX_RESTARTS, READY_AND_ANSWERS, Kept, Run, is_alive, lives, plan_of, runner


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Iterator[Run]:
    found, folder = runner(monkeypatch)
    yield found
    folder.rmdir()


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where ranks fail to the last: when requests are given up, no others are begun."""
    monkeypatch.setattr(product, "_BACKOFF_S", (*[0.0] * MAX_RESTARTS, HANG_S))


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where ranks never end by themselves."""
    monkeypatch.setattr(product, "_END_S", 0.3)


@pytest.mark.parametrize(("code", "kind"), [(2, UserError), (1, ForeignError)])
@pytest.mark.parametrize("how", ["exits", "leaves a status", "connects"])
def test_a_mistake_at_the_first_start_ends_everything(run: Run, code: int, kind: type[HippoError], how: str) -> None:
    life = {
        "exits": f"os._exit({code})",
        "leaves a status": f"open(os.environ['HIPPO_STATUS_FILE'], 'w').write('{code}')",  # as under mlx.launch
        "connects": f"beat()\nos._exit({code})",
    }[how]

    async def work() -> None:
        kept = Kept(lives(life))
        await asyncio.wait({kept.running}, timeout=HANG_S)
        error = kept.running.exception()
        assert type(error) is kind and str(error) == "the ranks didn't start; see their error above"
        assert kept.num_starts == 1

    run(work())


FAULTS = {
    "exits before it connects": ("os._exit(3)", "exit status 3"),
    "exits with status 0": ("os._exit(0)", "exit status 0"),
    "is killed before it connects": ("os.kill(os.getpid(), signal.SIGKILL)", "exit status -9"),
    "says why before it connects": ("status(3, 'no more foxes')", "no more foxes"),
    "connects and exits": ("beat()\nos._exit(3)", "exit status 3"),
    "closes its connection": ("begin()\nfront.close()\ntime.sleep(60)", "lost the connection to rank 0"),
    "dies when it is ready": ("begin()\nos._exit(3)", "lost the connection to rank 0"),
    "says why when it was ready": ("begin()\nstatus(3, 'rank 1 (h1) died')", "rank 1 (h1) died"),
    "dies in the middle of a line": ("begin()\nsend('{\"type')\nos._exit(3)", "lost the connection to rank 0"),
    "says what is no JSON": ("begin()\nsend('fox\\n')\ntime.sleep(60)", "lost the connection to rank 0: "),
    "raises": ("begin()\nsys.stderr = None\n1 / 0", "lost the connection to rank 0"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_costs_nothing_but_time(run: Run, fault: str) -> None:
    async def work() -> None:
        life, why = FAULTS[fault]
        kept = Kept(lives(life, READY_AND_ANSWERS))
        client = Client(kept.front, "m", 3)
        await kept.until_answered()
        assert len(kept.whys) == 1 and kept.whys[0].startswith(why)
        assert kept.front.num_restarts == 1 and kept.num_starts == 2
        client.check()
        await kept.end()

    run(work())


@pytest.mark.parametrize(
    ("life", "why"),
    [
        ("time.sleep(60)", "no message from rank 0 for"),
        ("begin()\ntime.sleep(60)", "no message from rank 0 for"),
        ("begin()\nos.kill(os.getpid(), signal.SIGSTOP)", "no message from rank 0 for"),
        ("begin()\nsend('{')\ntime.sleep(60)", "no message from rank 0 for"),
    ],
    ids=["before it is ready", "behind that", "stopped", "in a line"],
)
def test_silence(run: Run, hasty: None, life: str, why: str) -> None:
    async def work() -> None:
        kept = Kept(lives(life, READY_AND_ANSWERS), silence_s=0.5)
        client = Client(kept.front, "m", 3)
        await kept.until_answered()
        assert kept.whys[0].startswith(why)
        client.check()
        await kept.end()

    run(work())


def test_a_rank_that_never_comes(run: Run, hasty: None) -> None:
    async def plans(model: str, start: int) -> LaunchPlan:
        return LaunchPlan(["-c", "import time; time.sleep(60)"], 1) if start == 1 else plan_of(READY_AND_ANSWERS)

    async def work() -> None:
        kept = Kept(plans, start_s=1.0)
        client = Client(kept.front, "m", 3)
        await kept.until_answered()
        assert kept.whys[0] == "no rank connected within 1 s"
        client.check()
        await kept.end()

    run(work())


STUBBORN = "signal.signal(signal.SIGTERM, signal.SIG_IGN)\nbegin()\n"


def test_what_never_ends_is_killed_with_its_children(tmp_path: Path, run: Run, hasty: None) -> None:
    """One that lets no SIGTERM end it, one that is stopped besides, and one that has ended before its child does."""
    note = f"\npid = os.fork()\nopen({str(tmp_path / 'pids')!r}, 'a').write(f'{{os.getpid()}}\\n')\n"
    ends = [
        "front.close()\ntime.sleep(60)",
        "os.kill(os.getpid(), signal.SIGSTOP)",
        "pid and os._exit(3)\ntime.sleep(60)",
    ]

    async def work() -> None:
        kept = Kept(lives(*(STUBBORN + note + end for end in ends), READY_AND_ANSWERS), silence_s=0.5)
        client = Client(kept.front, "m", 3)
        await kept.until_answered()
        client.check()
        await kept.end()
        pids = [int(line) for line in (tmp_path / "pids").read_text().split()]
        assert len(pids) == 6
        await kept.until(lambda: not any(map(is_alive, pids)), also_if_ended=True)

    run(work())


def test_an_answer_goes_on_from_life_to_life(run: Run, patient: None) -> None:
    """A token in each is enough; without one it is given up after its tries, and others aren't."""
    one_token = """
ready()
for number, prompt, tokens in told():
    begun(number)
    output(number, len(tokens), "length" if len(tokens) + 1 == prompt[0] else None)
    os._exit(3)
"""
    none = "\nready()\nfor number, prompt, tokens in told():\n    begun(number)\n    os._exit(3)\n"

    async def work() -> None:
        kept = Kept(lives(one_token))
        client = Client(kept.front, "m", 5)
        await kept.until_answered()
        client.check()
        assert kept.num_starts >= 5
        await kept.end()
        kept = Kept(lives(none))
        client = Client(kept.front, "m", 5)
        await kept.until_answered()
        assert client.error == "the ranks failed 3 times in a row, most recently: lost the connection to rank 0"
        assert kept.front.num_starts == MAX_RESTARTS + 1
        await kept.end()

    run(work())


def test_what_a_rank_said_before_a_reset_is_heard(run: Run, patient: None) -> None:
    """A request that it had begun is suspected of its death, and not only in its next life."""
    dies = """
ready()
while not front.recv(1, socket.MSG_PEEK):
    pass
for _ in range(100):
    beat()
begun(0)
os._exit(1)  # with a request unread: the front's next read fails
"""

    async def work() -> None:
        kept = Kept(lives(dies))
        client = Client(kept.front, "m", 1)
        await kept.until_answered()
        assert "the ranks failed 3 times in a row" in client.error
        assert kept.front.num_starts == MAX_RESTARTS + 1
        await kept.end()

    run(work())


def test_faults_during_the_recovery_of_another(run: Run) -> None:
    """One before the next life connects, one while it loads, one when it is ready."""

    async def work() -> None:
        in_turn = [
            "beat()\nos._exit(3)",
            "begin()\nos._exit(3)",
            "os._exit(3)",
            "beat()\nos._exit(3)",
            READY_AND_ANSWERS,
        ]
        kept = Kept(lives(*in_turn))
        client = Client(kept.front, "m", 3)
        await kept.until_answered()
        client.check()
        assert not client.error and kept.num_starts == 5
        await kept.end()

    run(work())


def test_ranks_that_never_come_up(run: Run, patient: None) -> None:
    async def work() -> None:
        kept = Kept(lives("os._exit(3)"))
        client = Client(kept.front, "m", 3)
        await kept.until_answered()
        assert client.error == "the ranks failed 3 times in a row, most recently: exit status 3"
        await kept.end()

    run(work())


RANK_1 = """
mark = os.path.dirname(os.environ["HIPPO_FRONT"]) + "/mark"
if os.environ["MLX_RANK"] == "1":
    while not os.path.exists(mark):
        time.sleep(0.01)
    sys.stderr = None
    1 / 0
"""


@pytest.mark.parametrize("rank_0", ["time.sleep(60)", "status(3, 'rank 1 died')", "sys.stderr = None\n1 / 0"])
def test_two_ranks(run: Run, hasty: None, rank_0: str) -> None:
    """Rank 1 raises, alone or as rank 0 does; whatever is left is ended."""
    first = f"{RANK_1}\nbegin()\nopen(mark, 'w').close()\n{rank_0}\n"
    later = f"\nif os.environ['MLX_RANK'] == '1':\n    time.sleep(60)\n{READY_AND_ANSWERS}"

    async def plans(model: str, start: int) -> LaunchPlan:
        return plan_of(first if start == 1 else later, num_local=2)

    async def work() -> None:
        kept = Kept(plans)
        client = Client(kept.front, "m", 3)
        await kept.until_answered()
        client.check()
        assert len(kept.whys) == 1 and kept.whys[0] in ("a rank exited", "rank 1 died", "lost the connection to rank 0")
        await kept.end()

    run(work())
