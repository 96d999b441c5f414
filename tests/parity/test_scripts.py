"""Every model type of mlx-lm, called by a script on every rank, against the whole model: all ranks in one process."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx_lm.generate import BatchGenerator, generate_step, speculative_generate_step
from mlx_lm.models.cache import load_prompt_cache, make_prompt_cache, save_prompt_cache, trim_prompt_cache
from mlx_lm.utils import load_model

from hippo_mpi.checkpoint.adapters import adapt
from hippo_mpi.checkpoint.checkpoint import Checkpoint
from hippo_mpi.config.bundled import BUNDLED_MODEL
from hippo_mpi.errors import DesyncError
from hippo_mpi.library.pipelined import find_dataflow, take_stage
from hippo_mpi.sharding.stage import Stage
from hippo_mpi.tracing.graph import ancestors
from tests.local_ring import open_folder
from tests.local_script import pipelined, run_script
from tests.parity import tiny_models
from tests.parity.test_every_model import (
    BATCHED,
    NAMES,
    SAMPLE,
    UNCUT,
    assert_same,
    every,
    fails_upstream,
    opened,
    splits,
    steps,
    tokens_for,
)

# Not nemotron-nas: mlx-lm's batches of prompts expect every cache to be filled, and some of its layers have none to fill.
PADDED = [
    n for n in BATCHED if not {(n, "batch"), (n, "pad")} & set(tiny_models.UPSTREAM_FAILURES) and n != "nemotron-nas"
]


SLOW = {"rwkv7", "kimi_k3", "gemma4", "talkie"}
"""Of the sample, those that take long to try: not for --quick, nor in bfloat16."""


def stages_of(folder: Path, counts: list[int]) -> list[Stage]:
    """Load the model once for each rank, as `hippo_mpi.pipeline` finds it; rank 0 asks it, the others read its notes."""
    models = []
    for _ in counts:
        model, config = load_model(folder, lazy=True)
        adapt(model, config["model_type"])
        models.append(model)
    flow = find_dataflow(models[0])
    return [take_stage(model, flow, counts, rank) for rank, model in enumerate(models)]


def in_batches(model: nn.Module, prompts: list[list[int]], max_tokens: list[int]) -> list[int]:
    """Return the tokens of all answers, one after another, as mlx_lm.batch_generate makes them."""
    generator = BatchGenerator(model, prefill_step_size=4)
    answers: dict[int, list[int]] = {number: [] for number in generator.insert(prompts, max_tokens)}
    while responses := generator.next_generated():
        for response in responses:
            answers[response.uid].append(response.token)
    generator.close()
    return [token for answer in answers.values() for token in answer]


def script_for(name: str) -> Callable[[nn.Module], list[mx.array]]:
    tokens = tokens_for(name)

    def script(model: nn.Module) -> list[mx.array]:
        found = []
        cache = make_prompt_cache(model)
        for position, count in steps(name):
            found.append(model(mx.array([tokens[position : position + count]]), cache=cache))
            mx.eval(found[-1])
        if name != "gemma3n":  # in mlx-lm, its layers that share a cache share nothing without one
            found.append(model(mx.array([tokens[: steps(name)[0][1]]])))
        if not fails_upstream(name, "chunk"):
            made = generate_step(mx.array(tokens[:6]), model, max_tokens=3, prefill_step_size=4)
            found.append(mx.array([token for token, _ in made]))
        if name in PADDED:
            found.append(mx.array(in_batches(model, [tokens[:6], tokens[2:5], tokens[1:9]], [2, 3, 1])))
        return found

    return script


def assert_parity(checkpoint: Checkpoint, name: str) -> None:
    folder = checkpoint.source.path
    whole, _ = load_model(folder)
    script = script_for(name)
    expected = script(whole)
    # Every cut is tried in test_every_model.py; more than two ranks, which all make all logits, with a sample.
    split = (max if name in SAMPLE else min)((one for one in splits(checkpoint) if len(one) > 1), key=len)
    for rank, found in enumerate(run_script(script, pipelined(stages_of(folder, split)))):
        for number, (ours, theirs) in enumerate(zip(found, expected, strict=True)):
            assert_same(ours, theirs, f"split {split}, rank {rank}, result {number}")


@every([name for name in NAMES if name not in UNCUT], SAMPLE - SLOW)
def test_float32(name: str) -> None:
    assert_parity(opened(name), name)


@pytest.mark.slow
@pytest.mark.parametrize("name", [n for n in sorted(SAMPLE - SLOW) if not fails_upstream(n, "bfloat16")])
def test_bfloat16(name: str, tmp_path: Path) -> None:
    assert_parity(open_folder(tiny_models.make_checkpoint(name, tmp_path, dtype=mx.bfloat16)), name)


@pytest.mark.parametrize("name", ["llama", "mamba2", "deepseek_v3"])
def test_the_model_is_left_as_it_was_by_asking_it(name: str, tmp_path: Path) -> None:
    folder = tiny_models.make_checkpoint(name, tmp_path)
    asked, _ = load_model(folder)
    found = find_dataflow(asked)
    assert found.digest() == open_folder(folder).flow.digest()
    for ours, theirs in zip(script_for(name)(asked), script_for(name)(load_model(folder)[0]), strict=True):
        assert_same(ours, theirs, "after the question")


@pytest.mark.slow
def test_options_of_mlx_lm_work_as_on_the_whole_model(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Windows, quantised caches, a draft model, and prompt caches that are trimmed, saved and loaded."""
    draft, _ = load_model(BUNDLED_MODEL)
    prompt = mx.array([5, 300, 262, 41, 77, 18, 262, 9])

    def script(model: nn.Module) -> list[list[int]]:
        options = [{"max_kv_size": 16}, *({"kv_bits": 8, "kv_group_size": 32, "quantized_kv_start": n} for n in (0, 6))]
        found = [[token for token, _ in generate_step(prompt, model, max_tokens=20, **option)] for option in options]
        found.append([token for token, *_ in speculative_generate_step(prompt, model, draft, max_tokens=20)])
        cache = make_prompt_cache(model)
        found.append([token for token, _ in generate_step(prompt, model, max_tokens=5, prompt_cache=cache)])
        trim_prompt_cache(cache, 4)
        file = str(tmp_path_factory.mktemp("cache") / "prompt.safetensors")
        save_prompt_cache(file, cache)
        cache = load_prompt_cache(file)
        found.append([token for token, _ in generate_step(prompt[:3], model, max_tokens=8, prompt_cache=cache)])
        return found

    expected = script(load_model(BUNDLED_MODEL)[0])
    assert run_script(script, pipelined(stages_of(BUNDLED_MODEL, [5, 4, 3]))) == [expected] * 3


def test_phantom_caches_make_no_longer_and_longer_graph(tmp_path: Path) -> None:
    """What nobody reads is evaluated all the same, or a long answer would run out of memory."""

    def script(model: nn.Module) -> list[int]:
        cache = make_prompt_cache(model)
        sizes = []
        for _ in generate_step(mx.array([1, 2, 3]), model, max_tokens=12, prompt_cache=cache):
            sizes.append(sum(ancestors([entry.state[0]], [mx.array(0)])[1] for entry in cache))
        return sizes

    folder = tiny_models.make_checkpoint("llama", tmp_path)
    for sizes in run_script(script, pipelined(stages_of(folder, [2, 4]))):
        assert sizes[-1] <= sizes[2]


def test_ranks_that_call_different_things_are_told_apart(tmp_path: Path) -> None:
    models = pipelined(stages_of(tiny_models.make_checkpoint("llama", tmp_path), [3, 3]))

    def script(model: nn.Module) -> Any:
        return model(mx.array([[1, 2]] if model is models[0] else [[1, 2, 3]]))

    with pytest.raises(DesyncError, match=r"every rank of a script must call its models in the same order"):
        run_script(script, models)
