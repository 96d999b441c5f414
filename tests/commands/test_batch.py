"""hippo_mpi.batch: every kind of file, nothing lost by a kill, one clear message for each bad line or file."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from mlx_lm import load, stream_generate

from hippo_mpi import batch
from hippo_mpi.config.bundled import BUNDLED_MODEL
from hippo_mpi.durable_files import FileLock
from tests import ranks

BATCH = str(ranks.BIN / "hippo_mpi.batch")
PROMPTS = ["Tell me a story about a fox.", "What does a cow say?", "Tell me a story about a bear.", "Thank you!"]
TOKENS = 24


def reference(prompts: list[str], max_tokens: int = TOKENS) -> list[str]:
    """What mlx-lm itself answers."""
    model, tokenizer = load(str(BUNDLED_MODEL))
    texts = []
    for prompt in prompts:
        tokens = tokenizer.apply_chat_template([{"role": "user", "content": prompt}], add_generation_prompt=True)
        texts.append("".join(p.text for p in stream_generate(model, tokenizer, tokens, max_tokens=max_tokens)))
    return texts


def run(*arguments: object, num_ranks: int = 2, status: int = 0) -> str:
    """Run the command on a ring; rank 0's stderr."""
    command = [BATCH, *map(str, arguments)]
    with ranks.ring([command] * num_ranks) as running:
        codes = [rank.wait() for rank in running]
        assert codes[0] == status, running[0].err
        return running[0].err


def records(path: Path) -> dict[str, Any]:
    """The output's lines by custom_id; no id may be there twice."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert len({line["custom_id"] for line in lines}) == len(lines)
    return {line["custom_id"]: line for line in lines}


def text_of(record: dict[str, Any]) -> str:
    assert record["error"] is None
    assert record["response"]["status_code"] == 200
    return str(record["response"]["body"]["choices"][0]["message"]["content"])


def plain(path: Path) -> list[str]:
    path.write_text("".join(f"{prompt}\n" for prompt in PROMPTS))
    return [f"line-{number}" for number in range(1, len(PROMPTS) + 1)]


def short(path: Path) -> list[str]:
    asked = [{"prompt": PROMPTS[0]}, *({"messages": [{"role": "user", "content": p}]} for p in PROMPTS[1:])]
    path.write_text("".join(f"{json.dumps(line)}\n" for line in asked))
    return [f"line-{number}" for number in range(1, len(PROMPTS) + 1)]


def openai(path: Path) -> list[str]:
    ids = [f"task {number}" for number in range(len(PROMPTS))]
    lines = [
        {
            "custom_id": custom_id,
            "method": "POST",
            "url": "/v1/chat/completions",
            "body": {"model": "any", "messages": [{"role": "user", "content": [{"type": "text", "text": prompt}]}]},
        }
        for custom_id, prompt in zip(ids, PROMPTS, strict=True)
    ]
    path.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    return ids


def job(path: Path) -> list[str]:
    """With options of its own, of which the command line's win."""
    head = "#!/usr/bin/env hippo_mpi.batch\n#SBATCH --nodes=2\n#HIPPO --temp 5 --max-tokens 7\n#HIPPO --keep-order\n\n"
    path.write_text(head + "".join(f"{prompt}\n" for prompt in PROMPTS))
    return [f"line-{number}" for number in range(6, 6 + len(PROMPTS))]


@pytest.mark.parametrize(
    "write", [plain, *(pytest.param(write, marks=pytest.mark.slow) for write in (short, openai, job))]
)
def test_every_kind_of_file(write: Callable[[Path], list[str]], tmp_path: Path) -> None:
    source = tmp_path / "prompts.txt"
    ids = write(source)
    err = run(source, "--max-tokens", TOKENS, "--temp", 0, num_ranks=1 if write is short else 2)
    found = records(tmp_path / "prompts.answers.jsonl")
    assert [text_of(found[custom_id]) for custom_id in ids] == reference(PROMPTS)
    assert set(found) == set(ids)
    assert "4 of 4 done" in err
    if write is job:
        assert list(found) == ids


@pytest.mark.slow
def test_under_mpirun(tmp_path: Path) -> None:
    plain(tmp_path / "prompts")
    command = [BATCH, str(tmp_path / "prompts"), "-o", str(tmp_path / "out"), "--max-tokens", str(TOKENS)]
    with ranks.single(ranks.mpirun(3, command)) as launcher:
        assert launcher.wait() == 0, launcher.err
    assert [text_of(record) for _, record in sorted(records(tmp_path / "out").items())] == reference(PROMPTS)


@pytest.mark.slow
def test_a_body_s_own_parameters(tmp_path: Path) -> None:
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    bodies: list[tuple[str, dict[str, Any]]] = [
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": PROMPTS[0]}], "max_tokens": 5}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": PROMPTS[0]}], "stop": ["fox"]}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": PROMPTS[1]}],
                                  "logprobs": True, "top_logprobs": 2}),
        ("/v1/completions", {"prompt": "Once upon a", "max_tokens": 4, "logprobs": 1}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": PROMPTS[0]}],
                                  "temperature": 1.2, "seed": 3, "max_completion_tokens": 9}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": PROMPTS[0]}],
                                  "temperature": 1.2, "seed": 3, "max_completion_tokens": 9}),
    ]  # fmt: skip
    lines = [{"custom_id": str(n), "method": "POST", "url": url, "body": b} for n, (url, b) in enumerate(bodies)]
    source.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    run(source, "-o", output)
    choices = {n: record["response"]["body"]["choices"][0] for n, record in records(output).items()}
    usage = {n: record["response"]["body"]["usage"]["completion_tokens"] for n, record in records(output).items()}
    assert (usage["0"], choices["0"]["finish_reason"]) == (5, "length")
    assert "fox" not in choices["1"]["message"]["content"]
    assert choices["1"]["finish_reason"] == "stop"
    told = choices["2"]["logprobs"]["content"]
    assert all(len(entry["top_logprobs"]) == 2 and entry["logprob"] <= 0 for entry in told)
    assert len(choices["3"]["logprobs"]["tokens"]) == usage["3"] == 4
    assert choices["4"]["message"] == choices["5"]["message"]


@pytest.mark.slow
def test_a_kill_loses_nothing(tmp_path: Path) -> None:
    """Killed again and again, the same command ends with every answer once, equal to those of one run."""
    prompts = [f"Tell me a story about a {animal}." for animal in ("fox", "bear", "cow", "hen", "dog", "cat") * 4]
    source, output = tmp_path / "prompts", tmp_path / "out"
    source.write_text("".join(f"{prompt}\n" for prompt in prompts))
    command = [BATCH, str(source), "-o", str(output), "--max-batch-size", "4", "--max-tokens", "80"]
    kept = 0
    for _ in range(3):
        with ranks.ring([command] * 2) as running:
            ends = time.monotonic() + 60
            while time.monotonic() < ends and running[0].process.poll() is None:
                if output.exists() and output.read_bytes().count(b"\n") > kept + 3:
                    break
                time.sleep(0.01)
            running[0].process.kill()
            running[1].wait()
        kept = output.read_bytes().count(b"\n")
        with output.open("ab") as stream:
            stream.write(b'{"id": "torn", "custom_id": "li')
    assert 0 < kept < len(prompts)
    err = run(*command[1:])
    assert f"({kept} of them earlier)" in err
    found = records(output)
    wanted = dict(zip(prompts[:6], reference(prompts[:6], 80), strict=True))
    assert [text_of(found[f"line-{number + 1}"]) for number in range(len(prompts))] == [wanted[p] for p in prompts]


@pytest.mark.slow
def test_bad_lines_are_told_and_the_rest_goes_on(tmp_path: Path) -> None:
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    good = {"prompt": PROMPTS[1]}
    lines: list[tuple[bytes, str]] = [
        (json.dumps({**good, "custom_id": "same"}).encode(), ""),
        (b'{"prompt": "torn', "not JSON: Unterminated string"),
        (b'{"prompt": "\xff\xfe"}', "not UTF-8 (byte 13)"),
        (json.dumps({**good, "custom_id": "same"}).encode(), "duplicate custom_id 'same'"),
        (b'{"custom_id": "u", "method": "POST", "url": "/v1/embeddings", "body": {}}', "url must be /v1/chat/comp"),
        (json.dumps({**good, "temperature": "hot"}).encode(), "temperature must be a number from 0 to 100, not 'hot'"),
        (json.dumps({**good, "max_tokens": 0}).encode(), "max_tokens must be a whole number from 1"),
        (json.dumps({**good, "colour": 1}).encode(), "unknown field 'colour'"),
        (json.dumps({**good, "n": 2}).encode(), "n must be 1 here, not 2"),
        (b'{"messages": "hello"}', "messages must be a list of objects"),
        (b'{"text": "hello"}', "expected prompt, messages, or url"),
        (b'["a"]', "not a JSON object"),
        (json.dumps({"prompt": ""}).encode(), "the prompt is empty"),
        (json.dumps({"prompt": "fox " * 3000}).encode(), "tokens, but this model's maximum context length is"),
        (json.dumps(good).encode(), ""),
        (b'{"prompt": "a\\ud800b"}', "unpaired surrogate in a string"),
        (b'{"prompt": "a", "seed": 1' + b"0" * 5000 + b"}", "not JSON: Exceeds the limit"),
        (json.dumps({**good, "logit_bias": {"5": 10**400}}).encode(), "logit_bias must be an object of tokens and numbers from -10000 to 10000"),
        (b'{"prompt": "a", "logit_bias": {"5": NaN}}', "logit_bias must be an object of tokens and numbers from -10000 to 10000"),
        (b'{"prompt": [5, 99999999]}', "token 99999999 is not in the vocabulary of"),
    ]  # fmt: skip
    source.write_bytes(b"".join(line + b"\n" for line, _ in lines))
    err = run(source, "-o", output, status=4)
    num_failed = sum(1 for _, mistake in lines if mistake)
    told = err[err.index(f"{num_failed} requests failed; {output} says why:\n") :].splitlines()
    assert [line.split(":")[0] for line in told[1:4]] == ["  line 2", "  line 3", "  line 4"]
    assert "not UTF-8 (byte 13)" in told[2]
    assert told[4:] == [f"  ... and {num_failed - 3} more"]
    found = records(output)
    for number, (_, mistake) in enumerate(lines, 1):
        names = [name for name, record in found.items() if (record["error"] or {}).get("line") == number]
        if mistake:
            assert len(names) == 1, f"line {number}"
            assert mistake in found[names[0]]["error"]["message"]
            assert found[names[0]]["error"]["message"].startswith(f"line {number}: ")
    assert text_of(found["same"]) == text_of(found["line-15"]) == reference([PROMPTS[1]], 256)[0]
    source.write_bytes(source.read_bytes().replace(b'"prompt": "torn', b'"prompt": "What does a cow say?"}'))
    run(source, "-o", output, status=4)  # lines that failed are tried again
    assert text_of(records(output)["line-2"]) == text_of(found["same"])


@pytest.mark.slow
def test_one_that_fails(tmp_path: Path) -> None:
    source = tmp_path / "in.jsonl"
    source.write_text('{"prompt": "Hello"}\n{"prompt": "Hello", "colour": 1}\n')
    err = run(source, "--max-tokens", 2, num_ranks=1, status=4)
    assert err.splitlines()[-2:] == [
        f"1 request failed; {tmp_path / 'in.answers.jsonl'} says why:",
        "  line 2: unknown field 'colour'",
    ]


def refused(*arguments: object, limit: str = "") -> str:
    command = ["sh", "-c", f'{limit} exec "$@"', "sh", BATCH, *map(str, arguments)]
    with ranks.ring([command] * 2) as running:
        assert [rank.wait() for rank in running] == [2, 2], running[0].err
        lines = [line for rank in running for line in rank.err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, [rank.err for rank in running]
    return lines[0]


@pytest.mark.slow
def test_bad_files(tmp_path: Path) -> None:
    empty, prompts = tmp_path / "empty", tmp_path / "prompts"
    empty.write_text("\n  \n")
    plain(prompts)
    assert refused(empty) == f"error: {empty} has no prompts"
    assert refused(tmp_path / "none") == f"error: {tmp_path / 'none'} can't be read: No such file or directory"
    assert "no prompt file given" in refused()
    missing = tmp_path / "no" / "out"
    assert refused(prompts, "-o", missing) == f"error: {missing} can't be written: No such file or directory"
    assert refused(prompts, "-o", tmp_path) == f"error: {tmp_path} can't be written: it isn't a regular file"
    job_file = tmp_path / "job"
    job_file.write_text("#!/bin/sh\n#HIPPO --model 'x\nhello\n")
    assert refused(job_file) == f"error: {job_file}, line 2: No closing quotation"


@pytest.mark.slow
def test_a_full_disk(tmp_path: Path) -> None:
    """A limit on the size of files stands in for it: what was finished is kept, and goes on when there is room."""
    source, output = tmp_path / "prompts", tmp_path / "out"
    source.write_text("".join(f"{prompt}\n" for prompt in PROMPTS))
    options = (source, "-o", output, "--max-batch-size", 1, "--max-tokens", TOKENS)
    line = refused(*options, limit="ulimit -f 2;")
    assert line.startswith(f"error: {output} can't be written: ")
    kept = int(line.split("; ")[1].split()[0])
    assert 0 < kept < len(PROMPTS)
    assert f"({kept} of them earlier)" in run(*options)
    assert [text_of(record) for _, record in sorted(records(output).items())] == reference(PROMPTS)


@pytest.mark.slow
def test_other_files_and_other_requests_are_safe(tmp_path: Path) -> None:
    """An output that holds something else, or answers to other prompts, is refused and left as it is."""
    source, output = tmp_path / "prompts", tmp_path / "out"
    plain(source)
    before = source.read_bytes()
    assert "is the prompt file" in refused(source, "-o", source)
    output.write_text("my diary\n")
    assert refused(source, "-o", output).startswith(f"error: {output}, line 1, is not a batch answer")
    assert (source.read_bytes(), output.read_text()) == (before, "my diary\n")
    assert {path.name for path in tmp_path.iterdir()} == {"prompts", "out"}  # no options either
    output.unlink()
    lock = FileLock(output)
    assert refused(source, "-o", output).startswith(f"error: {output} is being written by process {os.getpid()} on ")
    lock.release()
    run(source, "-o", output, num_ranks=1)
    source.write_text("Another question\n")
    assert "has an answer 'line-1' to a different request than line 1" in refused(source, "-o", output)
    source.write_text(json.dumps({"prompt": "What does a dog say?", "custom_id": "dog"}))
    run(source, "-o", output, "--keep-order", num_ranks=1)
    assert next(iter(records(output))) == "dog"
    assert len(records(output)) == 1 + len(PROMPTS)


@pytest.mark.slow
def test_seeds_are_a_line_s_own(tmp_path: Path) -> None:
    source = tmp_path / "prompts"
    source.write_bytes("\ufeff".encode() + f"{PROMPTS[0]}\n{PROMPTS[0]}\n".encode())
    texts = []
    for size in (1, 4):
        output = tmp_path / f"out{size}"
        run(source, "-o", output, "--temp", 1, "--seed", 5, "--max-batch-size", size, "--max-tokens", 20, num_ranks=1)
        found = records(output)
        texts.append([text_of(found["line-1"]), text_of(found["line-2"])])
    assert texts[0] == texts[1]
    assert texts[0][0] != texts[0][1]


@pytest.mark.slow
def test_other_options_than_those_of_the_answers(tmp_path: Path) -> None:
    """Nothing is mixed: the line says what was asked with before. How many are answered at once doesn't matter."""
    source, output = tmp_path / "prompts", tmp_path / "out"
    plain(source)
    run(source, "-o", output, "--max-tokens", 3, "--stop-words", "a fox", "bear", num_ranks=1)
    before = output.read_bytes()
    line = refused(source, "-o", output, "--max-tokens", 5, "--seed", 1)
    old, new = (
        "with --max-tokens 3, without --seed, with --stop-words 'a fox' bear",
        "with --max-tokens 5, with --seed 1",
    )
    assert line == (
        f"error: {output} has 4 answers made {old}, not {new}, without --stop-words:"
        " give the same options again, or another --output, or --restart"
    )
    assert f"with --model {BUNDLED_MODEL}" in refused(source, "-o", output, "--model", "story-draft")
    assert output.read_bytes() == before
    same = (source, "-o", output, "--max-tokens", 3, "--stop-words", "a fox", "bear", "--max-batch-size", 2)
    assert "4 of 4 done (4 of them earlier)" in run(*same, num_ranks=1)
    assert "4 of 4 done (0 of them earlier)" in run(source, "-o", output, "--max-tokens", 5, "--restart", num_ranks=1)
    assert {record["response"]["body"]["usage"]["completion_tokens"] for record in records(output).values()} == {5}
    assert "4 of 4 done (4 of them earlier)" in run(source, "-o", output, "--max-tokens", 5, num_ranks=1)


def from_pipe(text: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = ["env", "PYTHONIOENCODING=utf-8:strict", BATCH, *map(str, arguments), "--max-tokens", str(TOKENS)]
    return subprocess.run(
        command, input=text, capture_output=True, encoding="utf-8", errors="surrogateescape", timeout=100
    )


@pytest.mark.slow
def test_standard_input_and_output(tmp_path: Path) -> None:
    """- for both; answers come as they are made, or in order; nothing else is on stdout."""
    texts = "".join(f"{prompt}\n" for prompt in PROMPTS)
    expected = reference(PROMPTS)
    found = from_pipe(texts, "-", "--keep-order")
    assert found.returncode == 0, found.stderr
    assert [text_of(json.loads(line)) for line in found.stdout.splitlines()] == expected
    found = from_pipe(texts, "-", "-o", tmp_path / "out")
    assert (found.returncode, found.stdout) == (0, ""), found.stderr
    assert [text_of(record) for _, record in sorted(records(tmp_path / "out").items())] == expected
    found = from_pipe("", *(plain(tmp_path / "prompts") and [tmp_path / "prompts"]), "-o", "-")
    assert sorted(text_of(json.loads(line)) for line in found.stdout.splitlines()) == sorted(expected), found.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("", "standard input has no prompts"),
        ("hello\n\udcff\n", "standard input is not UTF-8 (byte 7)"),
        ("#!/usr/bin/env hippo_mpi.batch\n#HIPPO --temp 1\nhello\n", "#HIPPO lines don't work from standard input"),
    ],
)
def test_bad_standard_input(text: str, line: str) -> None:
    found = from_pipe(text, "-")
    assert (found.returncode, found.stdout) == (2, "")
    assert found.stderr.strip().startswith(f"error: {line}")


def test_which_options_answers_depend_on() -> None:
    """A new option counts, unless it is said that it has no effect."""
    names = {action.dest for action in batch.make_parser()._actions} - {"help", argparse.SUPPRESS}
    assert names >= batch._WITHOUT_EFFECT
    assert names - batch._WITHOUT_EFFECT == {
        "precision", "adapter_path", "system_prompt", "prefill_response", "ignore_chat_template", "chat_template_config",
        "extra_eos_token", "max_tokens", "temp", "top_p", "min_p", "top_k", "min_tokens_to_keep", "xtc_probability",
        "xtc_threshold", "repetition_penalty", "repetition_context_size", "max_repeats", "seed", "stop_words",
        "max_kv_size", "kv_bits", "kv_group_size", "quantized_kv_start", "max_context", "parallel", "width_split", "plan_for",
        "layout", "stages", "tensor",
    }  # fmt: skip
