"""Random arrivals, departures and loads beside ranks that fail at random: each answer gets each token once, in order,
and ends once; afterwards no process, descriptor, task or file is left."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterator
from contextlib import suppress

import pytest

from hippo_mpi.errors import UserError
from hippo_mpi.serving.supervision import supervisor as product
from hippo_mpi.serving.supervision.supervisor import LaunchPlan
from tests.unit.fake_link import HANG_S, Client
from tests.unit.supervised import Kept, Run, plan_of, runner

_STORMY = """
state = {seed}
def draw(count):
    global state
    state = (state * 1103515245 + 12345) % (1 << 31)
    return (state >> 12) % count
def fail():
    kind = draw(9)
    if kind == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    if kind == 1:
        send('{{"output": {{"id": 0, "tok')
    if kind == 2:
        send("fox\\n")
        time.sleep(60)
    if kind == 3:
        status(3, "rank 1 died")
    if kind == 4:
        front.close()
        time.sleep(60)
    if kind == 5:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        front.shutdown(socket.SHUT_RDWR)
        time.sleep(60)
    if kind == 6:
        taking(draw(9))
    if kind == 7:
        for _ in range(500):
            beat()
    os._exit(3)
if os.environ["MLX_RANK"] == "1":
    time.sleep(0.02 * draw(40) if draw(4) == 0 else 60)
    os._exit(3)
left = {calm} or draw(25)
if left == 0:
    os._exit(3)
beat()
if left == 1:
    os._exit(1 + draw(3))
ready()
for number, prompt, tokens in told():
    if prompt is None:
        continue
    taking(number)
    if draw(6) == 0 and not {calm}:
        fail()
    taking(None)
    begun(number)
    for token in range(len(tokens), prompt[0]):
        left -= 1
        if left <= 0:
            fail()
        output(number, token, "length" if token + 1 == prompt[0] else None)
        time.sleep(0.001 * draw(3))
"""


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Iterator[Run]:
    found, folder = runner(monkeypatch)
    monkeypatch.setattr(product, "_END_S", 0.2)
    yield found
    folder.rmdir()


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.slow
def test_storm(run: Run, seed: int) -> None:
    """In the end ranks come that stay, so that whoever still waits is answered."""
    chance = random.Random(seed)

    async def plans(model: str, start: int) -> LaunchPlan:
        calm = 5 if start == 1 else 0 if start < 14 else 10**6  # outputs before the first fault
        life = _STORMY.format(seed=1000 * seed + start, calm=calm)
        return plan_of(life, num_local=1 + (start % 4 == 3))

    async def work() -> None:
        kept, clients, loads = Kept(plans, silence_s=0.6), list[Client](), list[asyncio.Future[None]]()
        models = ["m", "m", "n"]
        for _ in range(30):
            what = chance.choice(["ask", "ask", "ask", "leave", "load", "wait"])
            if what == "ask":
                clients.append(Client(kept.front, chance.choice(models), chance.randint(1, 30)))
            elif what == "leave" and clients:
                chance.choice(clients).leave()
            elif what == "load":
                loads.append(asyncio.ensure_future(kept.front.load(chance.choice(models))))
                if chance.random() < 0.3:
                    loads[-1].cancel()
            else:
                await asyncio.sleep(0.01 * chance.randint(0, 6))
        await kept.until_answered()
        for loaded in loads:
            with suppress(UserError, asyncio.CancelledError):
                await asyncio.wait_for(loaded, HANG_S)
        for client in clients:
            client.check()
            assert not client.error or "times in a row" in client.error or "can't be loaded" in client.error
        assert sum(not client.error and not client.is_gone for client in clients) > len(clients) / 4
        await kept.end()

    run(work())
