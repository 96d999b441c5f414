"""hippo_mpi.page in a real browser: a question typed, an answer streamed, a rank killed meanwhile, the answer complete."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from hippo_mpi.config.bundled import DEFAULT_PROMPT
from hippo_mpi.serving.page.cluster_view import COLUMNS, ClusterView
from tests import ranks
from tests.servers import JSON, MODEL, Server, server

PAGE = str(ranks.BIN / "hippo_mpi.page")
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
QUIET = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
DESKTOP, PHONE = {"width": 1280, "height": 850}, {"width": 375, "height": 812}
WAIT_MS = 40_000


@pytest.fixture(scope="module")
def running() -> Iterator[Server]:
    with server("--timeout", "8", "--max-context", "2000") as found:
        yield found


@pytest.fixture(scope="module")
def url(running: Server) -> Iterator[str]:
    (port,) = ranks.free_ports(1)
    with ranks.single([PAGE, "--url", running.url, "--port", str(port)]) as page:
        page.await_output("page: http://", "stderr")
        yield f"http://127.0.0.1:{port}"


@pytest.fixture
def browser() -> Iterator[Any]:
    if CHROMIUM is None:
        pytest.skip("no Chromium on this machine")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=CHROMIUM, args=QUIET)
        yield opened
        opened.close()


def ask(page: Any, text: str) -> Any:
    page.locator("#message textarea").fill(text)
    page.keyboard.press("Enter")
    return page.locator("#chat .bot .md, #chat .bot .prose").last


@pytest.mark.slow
def test_a_chat_and_a_rank_that_dies(running: Server, url: str, browser: Any, tmp_path: Path) -> None:
    client = running.client()
    asked: Any = [{"role": "user", "content": DEFAULT_PROMPT}]
    wanted = client.chat.completions.create(model=MODEL, messages=asked, max_tokens=256, temperature=0)
    text = " ".join((wanted.choices[0].message.content or "").split())
    page = browser.new_page(viewport=DESKTOP)
    problems: list[str] = []
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.goto(url)
    page.get_by_text("Ready: story-3m, 2 ranks").wait_for(timeout=WAIT_MS)
    answer = ask(page, DEFAULT_PROMPT)
    answer.wait_for(timeout=WAIT_MS)
    os.kill(running.rank_pids()[1], signal.SIGKILL)
    page.wait_for_function(
        "wanted => document.querySelector('#chat').innerText.replace(/\\s+/g, ' ').includes(wanted)",
        arg=text[-60:],
        timeout=WAIT_MS,
    )
    assert text in " ".join(page.locator("#chat").inner_text().split())
    page.screenshot(path=str(tmp_path / "chat.png"))
    for size in (DESKTOP, PHONE):
        page.set_viewport_size(size)
        page.get_by_role("tab", name="Cluster").click()
        page.locator("#ranks tr", has_text="0-5 and head").wait_for(timeout=WAIT_MS)
        for column in COLUMNS:
            box = page.locator(f"#ranks [data-name='{column}']").last.bounding_box()
            assert box and box["x"] >= 0 and box["x"] + box["width"] <= size["width"], f"{column} is cut off"
        page.screenshot(path=str(tmp_path / f"cluster-{size['width']}.png"))
        page.get_by_role("tab", name="Chat").click()
        page.locator("#message").wait_for(timeout=WAIT_MS)
        buttons, answers = (page.locator(f"#chat {part}").bounding_box() for part in (".top-panel", ".bubble-wrap"))
        assert buttons and answers and buttons["y"] + buttons["height"] <= answers["y"] + 1, "buttons cover answers"
        page.screenshot(path=str(tmp_path / f"chat-{size['width']}.png"))
        assert page.evaluate("document.documentElement.scrollWidth") <= size["width"] + 1, "wider than the screen"
    assert not problems


@pytest.mark.slow
def test_rates_are_shown_and_not_sent_back(running: Server, url: str, browser: Any) -> None:
    page = browser.new_page(viewport=PHONE)
    page.goto(url)
    page.get_by_role("heading", name="Hippo MPI").wait_for(timeout=WAIT_MS)
    page.get_by_text("Ready: story-3m, 2 ranks").wait_for(timeout=WAIT_MS)
    rates = page.locator("#chat .thought", has_text=re.compile(r"^\s*\d+ tokens, \d+\.\d tok/s\s*$"))
    answer = ask(page, DEFAULT_PROMPT)
    rates.first.wait_for(timeout=WAIT_MS)
    said = page.locator("#chat .bot .md").first.inner_text()
    ask(page, "And a hen?")
    rates.nth(1).wait_for(timeout=WAIT_MS)
    assert answer.count() and not page.get_by_text("Answers", exact=True).count()
    turns = [("user", DEFAULT_PROMPT), ("assistant", said), ("user", "And a hen?")]
    body = json.dumps({"messages": [{"role": role, "content": text} for role, text in turns]}).encode()
    with urllib.request.urlopen(urllib.request.Request(f"{running.url}/tokenize", body, JSON), timeout=10) as counted:
        count = json.loads(counted.read())["count"]
    assert f"story-3m, prompt {count} tokens" in running.running.err


@pytest.mark.slow
def test_an_answer_is_stopped_and_another_made(running: Server, url: str, browser: Any) -> None:
    page = browser.new_page(viewport=PHONE)
    page.goto(url)
    page.get_by_text("Ready: story-3m, 2 ranks").wait_for(timeout=WAIT_MS)
    page.get_by_text("Model and sampling").click()
    page.get_by_label("Temperature").first.fill("2")
    ask(page, DEFAULT_PROMPT).wait_for(timeout=WAIT_MS)
    stop = page.locator("button.stop-button")
    if stop.is_visible():
        stop.click()
    running.await_status(lambda status: status["requests"] == 0)
    page.get_by_label("Retry").last.click()
    page.wait_for_function("document.querySelectorAll('#chat .bot').length >= 1", timeout=WAIT_MS)
    running.await_status(lambda status: status["requests"] == 0)


@pytest.mark.slow
def test_a_page_without_a_server() -> None:
    with ranks.single([PAGE, "--url", "http://127.0.0.1:9"]) as page:
        assert page.wait() == 2
        assert page.err.startswith("error: can't use the server at http://127.0.0.1:9: ")
    with ranks.single([PAGE, "--address", "0.0.0.0"]) as page:
        assert page.wait() == 2
        assert page.err.startswith("error: others could reach 0.0.0.0")


def test_shares_and_hops_are_of_the_last_second(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks that were started anew count from 0, and a server that is gone is told."""
    now = [100.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    ranks_now = [{"busy_s": 5.0, "num_hops": 100, "hop_s": 1.0}]
    about = {"ready": True, "ranks": [{"host": "a", "layers": [0, 12], "weight_bytes": 1 << 20}], "model": "m"}
    beat_s = [10.0]
    view = ClusterView(lambda: {**about, "now": [dict(rank) for rank in ranks_now], "beat_s": beat_s[0]})
    view.look()
    now[0] += 1.5
    beat_s[0] += 2
    ranks_now[0] = {"busy_s": 6.0, "num_hops": 110, "hop_s": 1.02}
    view.look()
    now[0] += 1
    view.look()  # they have said nothing new
    assert view.rows[0][-2:] == ["50 %", "2.00 ms"]
    now[0] += 1
    beat_s[0] += 2
    ranks_now[0] = {"busy_s": 0.5, "num_hops": 1, "hop_s": 0.001}
    view.look()
    assert view.rows[0][-2:] == ["0 %", "0.00 ms"]
    assert [round(point.seconds) for point in view.points] == [-2, 0]
    assert view.line == "Ready: m, 1 rank, 0 requests."
