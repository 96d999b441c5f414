"""A server for the real clients of ./launch/test --clients, and what they are run with."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import mlx.core as mx
import pytest

from hippo_mpi.config.bundled import BUNDLED_MODEL
from hippo_mpi.engine.text import open_tokenizer
from tests.commands.test_tools import TEMPLATE
from tests.servers import Server, server

CLIENTS = Path(__file__).parents[2] / ".clients"  # made by tests/clients/install
SENTENCE = "Hello, said the fox."
_TIMEOUT_S = 200
_WIDTH = 64

if not (CLIENTS / "installed").exists():
    collect_ignore_glob = ["test_*.py"]  # ./launch/test --clients installs them


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that says one sentence, and ends, after whatever prompt: so that clients meet what they expect of one, in
    no time, though their prompts have 40,000 tokens. With the bundled model's tokenizer, and a template with tools."""
    folder = tmp_path_factory.mktemp("clients") / "talker"
    shutil.copytree(BUNDLED_MODEL, folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    config = json.loads((folder / "config.json").read_text())
    config |= {"hidden_size": _WIDTH, "num_hidden_layers": 2, "intermediate_size": 32, "num_attention_heads": 1}
    config |= {
        "num_key_value_heads": 1,
        "head_dim": 16,
        "max_position_embeddings": 1 << 17,
        "tie_word_embeddings": False,
    }
    (folder / "config.json").write_text(json.dumps(config))
    words = open_tokenizer(folder, config["eos_token_id"], (), False).encode(SENTENCE, add_special_tokens=False)
    end, vocab_size = config["eos_token_id"][0], config["vocab_size"]
    # Every token but those of the sentence leads to its first; each of these to the next.
    embedding, head = mx.zeros((vocab_size, _WIDTH)), mx.zeros((vocab_size, _WIDTH))
    embedding[:, 0], head[words[0], 0] = 1, 9
    for place, (word, following) in enumerate(zip(words, [*words[1:], end], strict=True), 1):
        embedding[word, place], head[following, place] = 3, 9
    weights = {"model.embed_tokens.weight": embedding, "lm_head.weight": head, "model.norm.weight": mx.ones(_WIDTH)}
    for layer in ("model.layers.0", "model.layers.1"):
        shapes = {"q_proj": (16, _WIDTH), "k_proj": (16, _WIDTH), "v_proj": (16, _WIDTH), "o_proj": (_WIDTH, 16)}
        weights |= {f"{layer}.self_attn.{name}.weight": mx.zeros(shape) for name, shape in shapes.items()}
        for name, shape in {"gate_proj": (32, _WIDTH), "up_proj": (32, _WIDTH), "down_proj": (_WIDTH, 32)}.items():
            weights[f"{layer}.mlp.{name}.weight"] = mx.zeros(shape)
        for name in ("input_layernorm", "post_attention_layernorm"):
            weights[f"{layer}.{name}.weight"] = mx.ones(_WIDTH)
    mx.save_safetensors(str(folder / "model.safetensors"), weights)
    return folder


@pytest.fixture(scope="session")
def running(model: Path) -> Iterator[Server]:
    with server("--model", str(model), "--max-context", "100000", "--max-tokens", "100") as found:
        yield found


Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def run(running: Server, model: Path, tmp_path: Path) -> Run:
    """Run a client, in an empty home and folder of its own; it must end well within its time."""
    home = {name: str(tmp_path) for name in ("HOME", "CLAUDE_CONFIG_DIR", "CODEX_HOME", "XDG_CONFIG_HOME", "HF_HOME")}
    env = {
        **os.environ, **home, "HIPPO_URL": running.url, "HIPPO_MODEL": model.name, "HIPPO_SAYS": SENTENCE,
        "OPENAI_API_KEY": "none", "OPENAI_BASE_URL": f"{running.url}/v1", "ANTHROPIC_AUTH_TOKEN": "none",
        "ANTHROPIC_BASE_URL": running.url, "ANTHROPIC_MODEL": model.name, "ANTHROPIC_SMALL_FAST_MODEL": model.name,
        "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1", "HF_HUB_OFFLINE": "1", "NO_COLOR": "1",
    }  # fmt: skip

    def call(*command: str | Path, **more_env: str) -> subprocess.CompletedProcess[str]:
        ended = subprocess.run(
            [str(word) for word in command], env={**env, **more_env}, cwd=tmp_path, stdin=subprocess.DEVNULL,
            capture_output=True, text=True, timeout=_TIMEOUT_S,
        )  # fmt: skip
        assert ended.returncode == 0, f"{ended.stdout[-3000:]}\n{ended.stderr[-5000:]}"
        return ended

    return call
