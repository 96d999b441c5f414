"""A cache of a given size (--max-kv-size): what it attends to depends on how prompts are read, which must be mlx-lm's way."""

from __future__ import annotations

import random
from pathlib import Path

import mlx.core as mx
import pytest
from mlx_lm.generate import generate_step
from mlx_lm.utils import load_model

from hippo_mpi.config.options import ManyOptions
from hippo_mpi.engine.engine import Engine
from hippo_mpi.engine.prefill import Limits
from hippo_mpi.engine.prefix_cache import PrefixBudget
from hippo_mpi.engine.request import Request, SamplingParams
from hippo_mpi.engine.text import open_tokenizer
from hippo_mpi.runtime.assembly import with_chunks
from hippo_mpi.sharding.slot_caches import KVSettings
from tests.local_ring import LocalRing, make_stages, open_folder
from tests.parity.tiny_models import make_checkpoint
from tests.tiny_tokenizer import save_tokenizer

NUM_TOKENS = 24
DRAW = random.Random(1)
PROMPT, OTHER = ([DRAW.randrange(1, 100) for _ in range(length)] for length in (100, 60))


SLOW = pytest.mark.slow


@pytest.mark.parametrize("name", [pytest.param("llama", marks=SLOW), "qwen3_moe"])
@pytest.mark.parametrize(
    ("size", "step"), [(16, None), pytest.param(64, None, marks=SLOW), pytest.param(16, 32, marks=SLOW)]
)
@pytest.mark.slow
def test_answers_are_mlx_lm_s(name: str, size: int, step: int | None, tmp_path: Path) -> None:
    """Alone and beside another answer, on one stage and on two."""
    make_checkpoint(name, tmp_path, seed=5021)
    save_tokenizer(tmp_path)
    model, _ = load_model(tmp_path)
    checkpoint, tokenizer = open_folder(tmp_path), open_tokenizer(tmp_path, None, (), False)
    whole, options = checkpoint.flow.num_layers, ManyOptions(max_kv_size=size, prefill_step_size=step)
    wanted = [
        int(token)
        for token, _ in generate_step(
            mx.array(PROMPT), model, max_tokens=NUM_TOKENS, max_kv_size=size, prefill_step_size=step or 2048
        )
    ]
    for split in ([whole], [1, whole - 1]):
        limits = with_chunks(Limits(max_batch_size=4, max_batch_tokens=8, can_batch=False, deadline_s=30.0), options)
        leader = LocalRing(make_stages(checkpoint, split), KVSettings(max_kv_size=size)).leader
        engine = Engine(leader, tokenizer, limits, 500, 128, PrefixBudget(2_000, lambda num_tokens: num_tokens))
        for has_company in (False, True):
            if has_company:
                engine.add(Request(2, OTHER, SamplingParams(max_tokens=200, ignore_eos=True)))
                for _ in range(12):
                    engine.step()
            engine.add(Request(int(has_company), PROMPT, SamplingParams(max_tokens=NUM_TOKENS, ignore_eos=True)))
            found = [output.token for output in engine.run() if output.request_id == int(has_company)]
            assert found == wanted, f"{split}, {'in company' if has_company else 'alone'}"
