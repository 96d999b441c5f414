"""Train the bundled models on the stories of stories.py: python models/training/train.py [name ...]

Writes one folder per model beside this file, in ordinary mlx-lm form. An interrupted run goes on from
its last checkpoint (in --work). On Linux, preload OpenBLAS: float32 is then about 30 times as fast
(LD_PRELOAD=/usr/lib/x86_64-linux-gnu/libopenblas.so.0).
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from mlx.utils import tree_flatten, tree_map, tree_unflatten
from mlx_lm.models import llama
from stories import Conversation, conversations
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

MODELS = Path(__file__).parents[1]
SHORT_ROW_TOKENS, LONG_ROW_TOKENS = 192, 512
TOKENS_PER_STEP = 12 * SHORT_ROW_TOKENS
SHORT_ROWS_SHARE = 0.75  # this share of the steps reads one conversation per row, the rest several
PADDING = -1
LEARNING_RATE = 3e-3
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ 'USER' if message.role == 'user' else 'ASSISTANT' if message.role =="
    " 'assistant' else 'SYSTEM' }}\n{{ message.content }}END\n{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT\n{% endif %}"
)


@dataclass(frozen=True)
class Recipe:
    """One bundled model: its shape, its tokenizer's size and special tokens, and how long it trains.

    A narrow and deep model learns to look back at its prompt very late, a shallow one soon. So a deep one begins
    with its first `shallow_layers`, and grows to `num_layers` when they are trained: a new layer's output
    matrices are zero, so that it changes nothing until it has learned something.
    """

    hidden_size: int
    num_layers: int
    shallow_layers: int
    num_heads: int
    intermediate_size: int
    vocab_size: int
    steps: int
    grown_steps: int
    special_tokens: dict[str, str]  # the words of CHAT_TEMPLATE -> the tokens that stand for them


_CHAT_TOKENS = {"SYSTEM": "<|system|>", "USER": "<|user|>", "ASSISTANT": "<|assistant|>", "END": "<|end|>"}
_TURN_TOKENS = {"SYSTEM": "[system]", "USER": "[human]", "ASSISTANT": "[story]", "END": "[/]"}
RECIPES = {
    "story-3m": Recipe(128, 12, 3, 4, 352, 1536, 4500, 300, _CHAT_TOKENS),
    "story-draft": Recipe(96, 2, 2, 3, 256, 1536, 1500, 0, _CHAT_TOKENS),
    "story-other-tokenizer": Recipe(96, 4, 4, 3, 256, 1024, 1500, 0, _TURN_TOKENS),
}


def train_tokenizer(recipe: Recipe) -> PreTrainedTokenizerFast:
    """A byte-level BPE of `recipe.vocab_size` tokens over the training text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    end = recipe.special_tokens["END"]
    trainer = trainers.BpeTrainer(
        vocab_size=recipe.vocab_size,
        special_tokens=["<|endoftext|>", *recipe.special_tokens.values()],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    text = (m["content"] for c in conversations(8000, seed=1) for m in c)
    tokenizer.train_from_iterator(text, trainer)
    template = CHAT_TEMPLATE
    for word, token in recipe.special_tokens.items():
        template = template.replace(word, token)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=end, pad_token="<|endoftext|>", chat_template=template
    )


def make_rows(tokenizer: PreTrainedTokenizerFast, chats: list[Conversation], row_tokens: int) -> np.ndarray:
    """Rows of row_tokens + 1 tokens (R, T + 1), padded with PADDING.

    Short rows hold one conversation, so that there is one hero to keep in mind; long ones hold as many as fit,
    one after another, which looks like one long chat of several turns.
    """
    rows: list[list[int]] = [[]]
    for chat in chats:
        tokens = tokenizer.apply_chat_template(chat, tokenize=True, return_dict=False)
        if rows[-1] and (row_tokens == SHORT_ROW_TOKENS or len(rows[-1]) + len(tokens) > row_tokens + 1):
            rows.append([])
        rows[-1] += tokens[: row_tokens + 1]
    return np.array([row + [PADDING] * (row_tokens + 1 - len(row)) for row in rows], dtype=np.int32)


def make_model(recipe: Recipe, num_layers: int) -> tuple[llama.Model, dict[str, Any]]:
    config: dict[str, Any] = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": recipe.hidden_size,
        "num_hidden_layers": num_layers,
        "intermediate_size": recipe.intermediate_size,
        "num_attention_heads": recipe.num_heads,
        "num_key_value_heads": recipe.num_heads,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "vocab_size": recipe.vocab_size,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
    }
    mx.random.seed(0)
    return llama.Model(llama.ModelArgs.from_dict(config)), config


def grow(recipe: Recipe, shallow: llama.Model) -> tuple[llama.Model, dict[str, Any]]:
    """A model of all layers that computes exactly what `shallow` does."""
    model, config = make_model(recipe, recipe.num_layers)
    for layer in model.layers[recipe.shallow_layers :]:
        for last in (layer.self_attn.o_proj, layer.mlp.down_proj):
            last.weight = mx.zeros_like(last.weight)
    model.load_weights(tree_flatten(shallow.parameters()), strict=False)
    return model, config


def loss_of(model: nn.Module, rows: mx.array) -> mx.array:
    """Mean cross-entropy per token, in nats, of rows (B, T + 1)."""
    targets = rows[:, 1:]
    is_text = targets != PADDING
    losses = nn.losses.cross_entropy(model(mx.maximum(rows[:, :-1], 0)), mx.maximum(targets, 0))
    return (losses * is_text).sum() / is_text.sum()


def train(name: str, work: Path) -> None:
    recipe = RECIPES[name]
    tokenizer = train_tokenizer(recipe)
    chats = conversations(recipe.steps * TOKENS_PER_STEP // SHORT_ROW_TOKENS, seed=1)
    rows_of = {t: make_rows(tokenizer, chats, t) for t in (SHORT_ROW_TOKENS, LONG_ROW_TOKENS)}
    short_steps = int(SHORT_ROWS_SHARE * recipe.steps)
    model, config = make_model(recipe, recipe.shallow_layers)

    def rows_at(step: int) -> np.ndarray:
        row_tokens = SHORT_ROW_TOKENS if step < short_steps else LONG_ROW_TOKENS
        rows, num_rows = rows_of[row_tokens], TOKENS_PER_STEP // row_tokens
        return rows[[(step * num_rows + i) % len(rows) for i in range(num_rows)]]

    fit(model, rows_at, recipe.steps, LEARNING_RATE, work / name)
    if recipe.grown_steps:
        model, config = grow(recipe, model)
        fit(
            model,
            lambda step: rows_at(short_steps + step),
            recipe.grown_steps,
            LEARNING_RATE / 5,
            work / f"{name}-grown",
        )
    held_out = make_rows(tokenizer, conversations(400, seed=2, held_out=True), SHORT_ROW_TOKENS)
    _export(name, model, config, tokenizer, held_out, recipe)


def fit(
    model: llama.Model, rows_at: Callable[[int], np.ndarray], steps: int, learning_rate: float, folder: Path
) -> None:
    """Train on rows_at(0), rows_at(1) ... with AdamW, a warm-up and a cosine; goes on from a checkpoint in `folder`."""
    warm_up = min(100, steps // 10)
    schedule = optim.join_schedules(
        [
            optim.linear_schedule(0.0, learning_rate, warm_up),
            optim.cosine_decay(learning_rate, steps - warm_up, learning_rate / 30),
        ],
        [warm_up],
    )
    optimizer = optim.AdamW(schedule, betas=[0.9, 0.98], weight_decay=0.05)
    start = _restore(model, optimizer, folder)
    print(f"{folder.name}: {_count(model) / 1e6:.2f}M parameters, from step {start}", flush=True)
    state = [model.state, optimizer.state]

    @partial(mx.compile, inputs=state, outputs=state)
    def update(batch: mx.array) -> mx.array:
        loss, gradients = nn.value_and_grad(model, loss_of)(model, batch)
        gradients, _ = optim.clip_grad_norm(gradients, 1.0)
        optimizer.update(model, gradients)
        return loss

    began, shown = time.perf_counter(), []
    for step in range(start, steps):
        loss = update(mx.array(rows_at(step)))
        mx.eval(loss, state)
        shown.append(loss.item())
        if (step + 1) % 50 == 0:
            rate = len(shown) * TOKENS_PER_STEP / (time.perf_counter() - began)
            print(f"{folder.name}: step {step + 1}/{steps} loss {np.mean(shown):.4f} {rate:.0f} tok/s", flush=True)
            began, shown = time.perf_counter(), []
        if (step + 1) % 250 == 0 or step + 1 == steps:
            _save(model, optimizer, step + 1, folder)


def _count(model: nn.Module) -> int:
    return sum(v.size for _, v in tree_flatten(model.parameters()))


def _save(model: nn.Module, optimizer: optim.Optimizer, step: int, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    state = {f"model.{k}": v for k, v in tree_flatten(model.parameters())}
    state |= {f"optimizer.{k}": v for k, v in tree_flatten(optimizer.state)}
    mx.save_safetensors(str(folder / "new.safetensors"), state, {"step": str(step)})
    (folder / "new.safetensors").replace(folder / "checkpoint.safetensors")


def _restore(model: nn.Module, optimizer: optim.Optimizer, folder: Path) -> int:
    """The step to go on from: 0 without a checkpoint."""
    optimizer.init(model.trainable_parameters())
    path = folder / "checkpoint.safetensors"
    if not path.exists():
        return 0
    state, metadata = mx.load(str(path), return_metadata=True)
    model.load_weights([(k[6:], v) for k, v in state.items() if k.startswith("model.")])
    names = [k for k, _ in tree_flatten(optimizer.state)]
    optimizer.state = tree_unflatten([(k, state[f"optimizer.{k}"]) for k in names])
    return int(metadata["step"])


def _export(
    name: str,
    model: llama.Model,
    config: dict[str, Any],
    tokenizer: PreTrainedTokenizerFast,
    held_out: np.ndarray,
    recipe: Recipe,
) -> None:
    model.update(tree_map(lambda p: p.astype(mx.bfloat16).astype(mx.float32), model.parameters()))
    loss = float(np.mean([loss_of(model, mx.array(held_out[i : i + 4])).item() for i in range(0, len(held_out), 4)]))
    folder = MODELS / name
    folder.mkdir(exist_ok=True)
    tokenizer.save_pretrained(folder)
    end_id = tokenizer.convert_tokens_to_ids(recipe.special_tokens["END"])
    eos = [end_id, tokenizer.convert_tokens_to_ids("<|endoftext|>")]
    (folder / "config.json").write_text(json.dumps(config | {"eos_token_id": eos}, indent=2) + "\n")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": eos}, indent=2) + "\n")
    weights = {k: v.astype(mx.bfloat16) for k, v in tree_flatten(model.parameters())}
    mx.save_safetensors(str(folder / "model.safetensors"), weights, {"format": "mlx"})
    (folder / "README.md").write_text(
        f"# {name}\n\n"
        f"A llama of {_count(model):,} parameters in {recipe.num_layers} layers (hidden size {recipe.hidden_size}, "
        f"vocabulary {recipe.vocab_size:,}, bfloat16), trained from nothing by `models/training/train.py` (seed 0, "
        f"{recipe.steps + recipe.grown_steps:,} steps of {TOKENS_PER_STEP:,} tokens) on text that `models/training/stories.py` makes up. "
        "It tells short stories about animals and answers a few simple questions; it knows nothing else.\n\n"
        f"Perplexity on stories that it has not read: {math.exp(loss):.3f} per token ({loss:.4f} nats, "
        f"{int((held_out[:, 1:] != PADDING).sum()):,} tokens). MIT licence, like the rest of the repository.\n"
    )
    print(f"{name}: held-out perplexity {math.exp(loss):.3f}, written to {folder}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name", nargs="*", default=[], help=f"which models (all of them: {', '.join(RECIPES)})")
    parser.add_argument("--work", type=Path, default=MODELS / ".training", help="folder for checkpoints")
    arguments = parser.parse_args()
    unknown = set(arguments.name) - set(RECIPES)
    if unknown:
        sys.exit(f"no recipe for {', '.join(sorted(unknown))}: there are {', '.join(RECIPES)}")
    for name in arguments.name or RECIPES:
        train(name, arguments.work)


if __name__ == "__main__":
    main()
