"""The catalogue: cards, hippo_mpi.models, and a server that changes its model while requests wait."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest

from hippo_mpi.config.bundled import BUNDLED_MODEL
from tests import ranks
from tests.servers import GOES_ON, JSON, SERVE, Server, server

MODELS = str(ranks.BIN / "hippo_mpi.models")
CARDS = str(BUNDLED_MODEL.parent)
FIRST, OTHER, DRAFT = "story-3m", "story-other-tokenizer", "story-draft"


@pytest.mark.slow
def test_models_are_listed_with_whether_they_fit() -> None:
    with ranks.single([MODELS, "--machine", "mini1:16", "--machine", "mini2:16"]) as running:
        assert running.wait() == 0, running.err
    rows = {line.split()[0]: line for line in running.out.splitlines()}
    assert set(rows) == {"model", FIRST, OTHER, DRAFT}
    assert "completion, chat" in rows[FIRST] and "yes: 6, 6 layers" in rows[FIRST] and "bfloat16" in rows[FIRST]
    assert " 100% " in rows[FIRST]  # of the weights are here
    with ranks.single([MODELS, "--machine", "mini1:16", "--paths"]) as running:
        assert running.wait() == 0, running.err
    assert f"{FIRST:<24} {BUNDLED_MODEL}" in running.out.splitlines()
    with ranks.single([MODELS, "--machine", "tiny:0.25"]) as running:
        assert running.wait() == 0, running.err
    assert all("no: the model doesn't fit: " in line for line in running.out.splitlines()[1:])


@pytest.mark.slow
def test_cards_that_are_wrong(tmp_path: Path) -> None:
    card = tmp_path / "tale.yaml"
    for text, line in (
        ("max-context: 100\n", f"{card}: a card needs the key 'model'"),
        ("model: x\nport: 80\n", f"{card}, line 2: unknown key 'port'"),
    ):
        card.write_text(text)
        with ranks.single([SERVE, "--catalogue", str(tmp_path)]) as refused:
            assert refused.wait() == 2
            assert line in refused.err
    config = tmp_path / "hippo.yaml"
    for text, line in (
        ("models: {tale: {max-context: 5}}\n", "line 1: 'tale' needs the key 'model'"),
        ("ranks: 2\nhosts: [{ssh: a}]\n", "line 1: 'ranks' conflicts with 'hosts' (line 2)"),
        ("hosts: [{ip: a}]\n", "line 1: unknown key 'ip'; did you mean 'ips'?"),
        ("hosts: [{ips: [a]}]\n", 'the entry of rank 0 has no "ssh"'),
        (
            f"models: {{tale: {{model: {BUNDLED_MODEL}}}}}\nmodel: fable\n",
            "--model fable is not in the catalogue: tale",
        ),
    ):
        config.write_text(text)
        with ranks.single([SERVE, "--config", str(config)]) as refused:
            assert refused.wait() == 2
            assert line in refused.err and refused.err.count("error:") == 1


def complete(running: Server, model: str, **options: Any) -> str:
    asked: dict[str, Any] = {"max_tokens": 60, "temperature": 0, "logit_bias": GOES_ON, **options}
    answer = running.client().completions.create(model=model, prompt="A fox and a hen", **asked)
    return answer.choices[0].text


def load(running: Server, model: str) -> dict[str, Any]:
    body = json.dumps({"model": model}).encode()
    request = urllib.request.Request(f"{running.url}/admin/model", body, JSON)
    with urllib.request.urlopen(request, timeout=60) as answer:
        return dict(json.loads(answer.read()))


@pytest.mark.slow
def test_models_take_turns_and_nothing_is_lost(tmp_path: Path) -> None:
    """Requests for three models at once, a rank killed meanwhile: every answer is that of its model alone."""
    big, missing = tmp_path / "big.yaml", tmp_path / "missing.yaml"
    for name, parallel in ((FIRST, "pipeline"), (OTHER, "tensor"), (DRAFT, "pipeline")):
        (tmp_path / f"{name}.yaml").write_text(
            f"model: {BUNDLED_MODEL.parent / name}\nmax-context: 1000\nparallel: {parallel}\n"
        )
    big.write_text(f"model: {BUNDLED_MODEL}\nmax-context: 2000000000\n")
    missing.write_text(f"model: {tmp_path / 'nowhere'}\n")
    with server("--catalogue", str(tmp_path), "--model", FIRST, "--timeout", "8") as running:
        assert set(model.id for model in running.client().models.list()) == {FIRST, OTHER, DRAFT, "big", "missing"}
        wanted = {name: complete(running, name) for name in (FIRST, OTHER, DRAFT)}
        assert len(set(wanted.values())) == 3
        assert load(running, FIRST) == {"model": FIRST, "state": "ready"}
        with ThreadPoolExecutor(12) as pool:
            answers = {n: [pool.submit(complete, running, n) for _ in range(4)] for n in (OTHER, FIRST, DRAFT)}
            running.await_status(lambda status: status["requests"] < 12)
            with contextlib.suppress(ProcessLookupError, IndexError):  # at a change of models there may be none
                os.kill(running.rank_pids()[-1], signal.SIGKILL)
            for name, found in answers.items():
                assert [one.result(60) for one in found] == [wanted[name]] * 4
        before = running.status()["model"]
        with pytest.raises(openai.BadRequestError, match="doesn't fit"):
            complete(running, "big")
        with pytest.raises(openai.BadRequestError, match="no such model folder"):
            complete(running, "missing")
        with pytest.raises(openai.NotFoundError, match="does not exist; this server has"):
            complete(running, "../story-3m")
        with pytest.raises(urllib.error.HTTPError, match="404"):
            load(running, "/etc")
        assert running.status()["model"] == before


@pytest.mark.slow
def test_a_model_that_was_there_and_is_gone(tmp_path: Path) -> None:
    """It could be loaded once: whoever asks for it again is told, and the model before comes back for good."""
    gone = tmp_path / "models" / "gone"
    shutil.copytree(BUNDLED_MODEL.parent / OTHER, gone)
    for name, folder in ((FIRST, BUNDLED_MODEL), ("gone", gone)):
        (tmp_path / f"{name}.yaml").write_text(f"model: {folder}\n")
    options = ("--model", FIRST, "--ranks", "1", "--max-restarts", "1")
    with server("--catalogue", str(tmp_path), *options) as running:
        wanted = complete(running, FIRST)
        load(running, "gone")
        load(running, FIRST)
        (gone / "model.safetensors").write_bytes(b"no model")
        with pytest.raises(urllib.error.HTTPError, match="400") as told:
            load(running, "gone")
        assert "the model 'gone' can't be loaded" in told.value.read().decode()
        running.await_ready()
        assert complete(running, FIRST) == wanted
        assert running.status()["model"] == FIRST


@pytest.mark.slow
def test_precision_draft_and_modes_of_a_card(tmp_path: Path) -> None:
    story, draft = BUNDLED_MODEL, BUNDLED_MODEL.parent / DRAFT
    for name, text in {
        "plain": "precision: float32",
        "drafted": f"precision: float32\ndraft-model: {draft}\nnum-draft-tokens: 4",
        "writer": "precision: 4bit\nmodes: [completion]",
        "wrong": "modes: [chat, thinking]",
    }.items():
        (tmp_path / f"{name}.yaml").write_text(f"model: {story}\nmax-context: 1000\n{text}\n")
    with ranks.single([MODELS, "--catalogue", str(tmp_path), "--machine", "a:16", "--machine", "b:16"]) as listed:
        assert listed.wait() == 0, listed.err
    rows = {line.split()[0]: line for line in listed.out.splitlines()}
    assert "float32" in rows["plain"] and "4bit" in rows["writer"]
    assert "chat" in rows["plain"] and "chat" not in rows["writer"]
    assert "modes of wrong: its chat template doesn't support thinking" in rows["wrong"]
    sizes = {name: float(rows[name].split()[1]) for name in ("plain", "drafted", "writer")}
    assert sizes["writer"] < sizes["plain"] < sizes["drafted"]

    with server("--catalogue", str(tmp_path), "--model", "plain") as running:
        found = {
            name: [complete(running, name), complete(running, name, temperature=1.0, seed=5)]
            for name in ("plain", "drafted", "writer")
        }
        assert found["drafted"] == found["plain"] != found["writer"]
        counted = dict(re.findall(r"^(hippo_\w*draft_tokens)_total (\S+)$", running.get("/metrics"), re.M))
        assert 20 < float(counted["hippo_accepted_draft_tokens"]) < float(counted["hippo_draft_tokens"])
        ask = running.client().chat.completions.create
        with pytest.raises(openai.BadRequestError, match="this model is served for completion only, not for chat"):
            ask(model="writer", messages=[{"role": "user", "content": "A fox?"}])
        with pytest.raises(openai.BadRequestError, match="modes of wrong: its chat template doesn't support thinking"):
            ask(model="wrong", messages=[{"role": "user", "content": "A fox?"}])
    with ranks.single([SERVE, "--modes", "thinking"]) as refused:
        assert refused.wait() == 2
    assert refused.err == "error: modes of story-3m: its chat template doesn't support thinking\n"


@pytest.mark.slow
def test_a_model_that_its_ranks_refuse(tmp_path: Path) -> None:
    """The one before comes back."""
    (tmp_path / "good.yaml").write_text(f"model: {BUNDLED_MODEL}\n")
    (tmp_path / "bad.yaml").write_text(f"model: {BUNDLED_MODEL}\nadapter-path: {tmp_path}\n")
    with server("--catalogue", str(tmp_path), "--model", "good") as running:
        wanted = complete(running, "good")
        with ThreadPoolExecutor(2) as pool:
            bad = pool.submit(complete, running, "bad")
            with pytest.raises(openai.BadRequestError):
                bad.result(60)
        assert complete(running, "good") == wanted
