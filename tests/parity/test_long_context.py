"""Long contexts on narrow models: prefixes that are reused, windows that rotate, caches that are quantised."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from mlx_lm.generate import generate_step
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.tokenizer_utils import TokenizerWrapper
from mlx_lm.utils import load_model

from hippo_mpi.engine.engine import Engine
from hippo_mpi.engine.prefill import Limits
from hippo_mpi.engine.prefix_cache import PrefixBudget
from hippo_mpi.engine.request import Request, SamplingParams, Timings
from hippo_mpi.engine.text import open_tokenizer
from hippo_mpi.sharding.slot_caches import KVSettings
from tests.local_ring import LocalRing, make_stages, open_folder
from tests.parity.tiny_models import make_checkpoint
from tests.tiny_tokenizer import save_tokenizer

CONTEXT = 32_768
SHORTER = 12_288  # what takes several steps a chunk, or is quantised: twelve windows, and long after quantising begins
CHUNK = 512
ANSWER = 8
NARROW = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 1, "num_key_value_heads": 1}

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


def prompt_of(length: int) -> list[int]:
    return [(i * i * 7 + i // 97) % 97 + 1 for i in range(length)]


class Pair:
    """The same narrow model as mlx-lm runs it and as two stages, both with the caches of earlier turns."""

    def __init__(
        self, folder: Path, settings: KVSettings, name: str = "llama-full", num_layers: int = 2, head_dim: int = 16
    ) -> None:
        sizes = {"head_dim": head_dim, "num_hidden_layers": num_layers, "max_position_embeddings": 2 * CONTEXT}
        make_checkpoint(name, folder, overrides={**NARROW, **sizes})
        save_tokenizer(folder)
        self.settings = settings
        self.model, _ = load_model(folder)
        self.cache = make_prompt_cache(self.model, settings.max_kv_size)
        checkpoint = open_folder(folder)
        num = checkpoint.flow.num_layers
        tokenizer: TokenizerWrapper = open_tokenizer(folder, None, (), False)
        budget = PrefixBudget(2 * CONTEXT, lambda num_tokens: num_tokens)
        leader = LocalRing(make_stages(checkpoint, [num // 2, num - num // 2]), settings).leader
        self.engine = Engine(leader, tokenizer, Limits(prefill_chunk=CHUNK), 2 * CONTEXT, 128, budget)

    def theirs(self, new_tokens: list[int]) -> list[int]:
        """What mlx-lm answers to what its cache holds and `new_tokens`."""
        options: dict[str, Any] = {
            "kv_bits": self.settings.kv_bits,
            "kv_group_size": self.settings.kv_group_size,
            "quantized_kv_start": self.settings.quantized_kv_start,
        }
        steps = generate_step(
            mx.array(new_tokens),
            self.model,
            max_tokens=ANSWER,
            prompt_cache=self.cache,
            prefill_step_size=CHUNK,
            **options,
        )
        return [int(token) for token, _ in steps]

    def ours(self, prompt: list[int]) -> tuple[list[int], Timings]:
        self.engine.add(Request(0, prompt, SamplingParams(max_tokens=ANSWER, ignore_eos=True)))
        outputs = list(self.engine.run())
        return [output.token for output in outputs if output.token is not None], outputs[-1].timings


def test_a_long_prompt_and_what_comes_after_it(tmp_path: Path) -> None:
    pair, prompt = Pair(tmp_path, KVSettings()), prompt_of(CONTEXT - ANSWER)
    first = pair.theirs(prompt)
    assert pair.ours(prompt)[0] == first
    turn = [5, 6, 7]
    answer, timings = pair.ours([*prompt, *first, *turn])
    assert answer == pair.theirs([first[-1], *turn])
    assert timings.cached_tokens >= CONTEXT - 1


def test_a_cache_that_rotates(tmp_path: Path) -> None:
    pair, prompt = Pair(tmp_path, KVSettings(max_kv_size=1024)), prompt_of(SHORTER)
    assert pair.ours(prompt)[0] == pair.theirs(prompt)


def test_windows_of_the_model_itself(tmp_path: Path) -> None:
    """Two layers with a window, and one without."""
    pair, prompt = Pair(tmp_path, KVSettings(), "gemma3_text", num_layers=3), prompt_of(CONTEXT - ANSWER)
    assert pair.ours(prompt)[0] == pair.theirs(prompt)


def test_quantised_caches(tmp_path: Path) -> None:
    settings = KVSettings(kv_bits=8, kv_group_size=32, quantized_kv_start=5000)
    pair, prompt = Pair(tmp_path, settings, head_dim=32), prompt_of(SHORTER)
    assert pair.ours(prompt)[0] == pair.theirs(prompt)
