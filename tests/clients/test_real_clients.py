"""Clients as their users run them, newest versions, against a server of two ranks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.clients.conftest import CLIENTS, SENTENCE, Run
from tests.servers import Server

HERE = Path(__file__).parent
PYTHON, BIN, NODE_BIN = CLIENTS / "venv/bin/python", CLIENTS / "venv/bin", CLIENTS / "node_modules/.bin"


@pytest.mark.timeout(300)
@pytest.mark.parametrize("script", sorted((HERE / "python").glob("*.py")), ids=lambda path: path.stem)
def test_clients_for_python(run: Run, script: Path) -> None:
    run(PYTHON, script)


@pytest.mark.timeout(300)
@pytest.mark.parametrize("script", sorted((HERE / "node").glob("*.mjs")), ids=lambda path: path.stem)
def test_clients_for_node(run: Run, script: Path) -> None:
    here = CLIENTS / script.name  # node looks for packages beside the script
    here.write_text(script.read_text())
    run("node", here)


@pytest.mark.timeout(300)
def test_claude_code(run: Run) -> None:
    """With its own prompt of 43,000 tokens and its tools; and a second turn, whose prompt is mostly cached."""
    claude = NODE_BIN / "claude"
    first = json.loads(run(claude, "-p", "Say hello.", "--output-format", "json").stdout)
    assert (first["result"], first["is_error"], first["stop_reason"]) == (SENTENCE, False, "end_turn")
    second = json.loads(run(claude, "-p", "Again.", "--continue", "--output-format", "json").stdout)
    assert second["result"] == SENTENCE
    assert second["usage"]["cache_read_input_tokens"] > 10 * second["usage"]["input_tokens"]


@pytest.mark.timeout(300)
def test_codex(run: Run, running: Server, model: Path) -> None:
    provider = f'{{name="hippo", base_url="{running.url}/v1", wire_api="responses", env_key="OPENAI_API_KEY"}}'
    ended = run(
        NODE_BIN / "codex", "exec", "--skip-git-repo-check", "-c", "model_provider=hippo", "-c", f"model_providers.hippo={provider}",
        "-m", model.name, "Say hello.",
    )  # fmt: skip
    assert ended.stdout.strip() == SENTENCE
    assert "only functions can be called" in running.running.err


TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: {kind}
doc_to_text: "{{{{question}}}}"
"""
CHOICES = 'target_delimiter: ""\ndoc_to_choice: ["Hello", " fox"]\ndoc_to_target: 0\nmetric_list: [{metric: acc}]\n'
UNTIL = 'doc_to_target: "{{answer}}"\ngeneration_kwargs: {until: ["\\n"], max_gen_toks: 8}\nmetric_list: [{metric: exact_match}]\n'


@pytest.mark.timeout(300)
def test_lm_eval(run: Run, running: Server, model: Path, tmp_path: Path) -> None:
    """Multiple choice by the likelihood of a prompt's tokens, and texts that are generated; both with prompts of tokens."""
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps({"question": f"Once {i}", "answer": SENTENCE}) + "\n" for i in range(3)))
    for name, kind, rest in (("choices", "multiple_choice", CHOICES), ("texts", "generate_until", UNTIL)):
        (tmp_path / f"{name}.yaml").write_text(TASK.format(name=name, data=data, kind=kind) + rest)
    arguments = (
        f"model={model.name},base_url={running.url}/v1/completions,tokenizer={model},num_concurrent=1,max_retries=1"
    )
    run(
        BIN / "lm_eval", "--model", "local-completions", "--model_args", arguments, "--tasks", "choices,texts",
        "--include_path", tmp_path, "--output_path", tmp_path / "out",
    )  # fmt: skip
    (results,) = (json.loads(path.read_text())["results"] for path in (tmp_path / "out").rglob("results*.json"))
    assert results["choices"]["acc,none"] == 1.0
    assert results["texts"]["exact_match,none"] == 1.0


@pytest.mark.timeout(300)
def test_guidellm(run: Run, running: Server, model: Path, tmp_path: Path) -> None:
    """As many tokens as it says, though the model would rather end."""
    run(
        BIN / "guidellm", "run", "--backend", f"kind=openai_http,target={running.url},model={model.name}",
        "--profile", "kind=synchronous", "--constraint", "kind=max_requests,count=3", "--disable-console",
        "--tokenizer", f"kind=huggingface_auto,model={model}", "--data", "kind=synthetic_text,prompt_tokens=20,output_tokens=30",
        "--output", f"kind=json,path={tmp_path / 'out.json'}",
    )  # fmt: skip
    found = json.loads((tmp_path / "out.json").read_text())["benchmarks"][0]["metrics"]
    assert found["request_totals"]["successful"] == 3
    assert found["output_token_count"]["successful"]["mean"] == 30
