"""Every model type of the installed mlx-lm, cut into stages, against the whole model run by mlx-lm itself.

Each stage holds NaN in every weight that it must not own. Logits are compared bit for bit: in prefill, in a
second chunk and in decode; after a trim; with bfloat16 and 4-bit weights; with ragged batches.
"""

from __future__ import annotations

import functools
import itertools
import random
import tempfile
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten
from mlx_lm.models.cache import can_trim_prompt_cache, make_prompt_cache, trim_prompt_cache
from mlx_lm.tokenizer_utils import TokenizerWrapper
from mlx_lm.utils import load_adapters, load_model

from hippo_mpi.checkpoint.checkpoint import Checkpoint
from hippo_mpi.engine.engine import Engine
from hippo_mpi.engine.prefill import Limits
from hippo_mpi.engine.request import Propose, Request, SamplingParams, Sequence
from hippo_mpi.engine.row_check import RowCheck, check_rows
from hippo_mpi.engine.text import open_tokenizer
from hippo_mpi.errors import ForeignError, UserError
from hippo_mpi.parallel.step_plan import Returns, StepPlan
from hippo_mpi.planning.model_costs import model_info
from hippo_mpi.sharding.slot_caches import KVSettings
from hippo_mpi.sharding.stage import Forward, Stage
from hippo_mpi.transport.channel import Message
from tests.local_ring import LocalRing, make_stages, open_folder
from tests.parity import tiny_models
from tests.tiny_tokenizer import save_tokenizer

NAMES = [*tiny_models.CONFIGS, *tiny_models.VARIANTS]
# One per mechanism: a single array, a tuple, prepared inputs, shared caches, loops, mutated objects, experts, state.
SAMPLE = {
    "llama",
    "rwkv7",
    "talkie",
    "gemma3n",
    "nanbeige-loops",
    "kimi_k3",
    "dbrx",
    "mamba2",
    "deepseek_v41",
    "gemma4",
}
# Models that can't be cut at all, with what the planner says.
UNCUT = {
    "olmo": "inplace addition",  # mlx-lm itself can't run it on more than one token (UPSTREAM_FAILURES)
}
PREFILL, CHUNK = 7, 3


# For --quick: without those that take long to try.
QUICK_SAMPLE = SAMPLE - {"rwkv7", "kimi_k3"}


def every(names: list[str], sample: set[str] = SAMPLE) -> Any:
    marks = [pytest.param(n, marks=() if n in sample else pytest.mark.slow, id=n) for n in names]
    return pytest.mark.parametrize("name", marks)


_folder = tempfile.TemporaryDirectory(prefix="hippo-models-")


@functools.cache
def opened(name: str) -> Checkpoint:
    """A type's checkpoint in float32, made and traced once for all tests of this process."""
    return open_folder(tiny_models.make_checkpoint(name, Path(_folder.name) / name))


def splits(checkpoint: Checkpoint) -> list[list[int]]:
    """Uneven splits into 2 and 3 stages, as far as the model allows."""
    num = checkpoint.flow.num_layers
    cuts = [c for c in range(1, num) if c not in checkpoint.flow.forbidden_cuts()]
    found = [[cuts[0], num - cuts[0]], [cuts[-1], num - cuts[-1]]] if cuts else []
    if len(cuts) > 1:
        middle = cuts[len(cuts) // 2]
        found.append([cuts[0], cuts[-1] - cuts[0], num - cuts[-1]])
        found += [[cuts[0], middle - cuts[0], num - middle]] if cuts[0] < middle < num else []
    return [list(s) for s in {tuple(s) for s in found}]


def most_stages(checkpoint: Checkpoint) -> list[int]:
    """An uneven split into as many stages as `splits` has."""
    return max(splits(checkpoint), key=len, default=[checkpoint.flow.num_layers])


def test_what_is_handed_on_late_is_found(tmp_path: Path) -> None:
    """Of deepseek_v41's layers those after the first must stay together, however late they begin to share."""
    cuts = [
        set(open_folder(tiny_models.make_checkpoint(name, tmp_path / name)).flow.forbidden_cuts())
        for name in ("deepseek_v41", "deepseek_v41-slow")
    ]
    assert cuts[0] == cuts[1] != set()


def test_a_model_that_looks_at_values_is_known(tmp_path: Path) -> None:
    """dbrx picks its experts in Python: its graph can't be built before what it is made from has arrived."""
    checkpoints = {n: open_folder(tiny_models.make_checkpoint(n, tmp_path / n)) for n in ("dbrx", "mixtral", "llama")}
    assert [name for name, checkpoint in checkpoints.items() if checkpoint.flow.looks_at_values] == ["dbrx"]
    for name, awaited in (("dbrx", ["wait", "build"]), ("mixtral", ["build", "wait"])):
        ring = LocalRing(make_stages(checkpoints[name], splits(checkpoints[name])[0]))
        assert ring.leader.can_look_ahead == (name != "dbrx")
        assert _order_on_last_rank(ring) == awaited


def _order_on_last_rank(ring: LocalRing) -> list[str]:
    """Whether it waits for the arrays of a step, or builds its graph, first."""
    done: list[str] = []
    channel, stage = ring.followers[-1]._channel, ring.followers[-1]._stage
    receive, keep_outputs = channel.receive, Forward._keep_outputs

    def note_receive() -> Message:
        message = receive()
        return Message(message.header, message.arrays, lambda: done.append("wait"))

    def note_build(forward: Forward, *of: Any) -> None:
        done.extend(["build"] if forward.stage is stage else [])
        keep_outputs(forward, *of)

    channel.receive = note_receive  # type: ignore[method-assign]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Forward, "_keep_outputs", note_build)
        ring.logits([1, 2, 3], 0)
    return done


def tokens_for(name: str, seed: int = 0) -> list[int]:
    rng = random.Random(f"{name} {seed}")
    return [rng.randrange(1, 100) for _ in range(PREFILL + CHUNK + 2)]


def steps(name: str) -> list[tuple[int, int]]:
    """(position, number of tokens) of the steps that are compared."""
    if ("chunk", name) in {(cap, n) for n, cap in tiny_models.UPSTREAM_FAILURES}:
        return [(i, 1) for i in range(PREFILL)]
    return [(0, PREFILL), (PREFILL, CHUNK), (PREFILL + CHUNK, 1), (PREFILL + CHUNK + 1, 1)]


def reference(
    folder: Path, name: str, tokens: list[int], adapter: Path | None = None
) -> tuple[nn.Module, list[Any], list[mx.array]]:
    model, _ = load_model(folder)
    if adapter is not None:
        model = load_adapters(model, str(adapter))
        model.eval()
    cache, found = make_prompt_cache(model), []
    for position, count in steps(name):
        found.append(model(mx.array([tokens[position : position + count]]), cache=cache))
        mx.eval(found[-1], [c.state for c in cache])
    return model, cache, found


def assert_same(ours: mx.array, theirs: mx.array, what: str) -> None:
    if not mx.array_equal(ours, theirs).item():
        distance = mx.abs(ours.astype(mx.float32) - theirs.astype(mx.float32)).max().item()
        raise AssertionError(f"{what}: logits differ by up to {distance}")


def assert_parity(checkpoint: Checkpoint, name: str, cut: list[list[int]], trims: bool = False) -> None:
    """The same logits as mlx-lm's, for each of these splits."""
    tokens = tokens_for(name)
    model, cache, expected = reference(checkpoint.source.path, name, tokens)
    end = sum(steps(name)[-1])
    if trims:
        trim_prompt_cache(cache, 3)
        after_trim = model(mx.array([[5, 6]]), cache=cache)
    assert cut, "this model can't be cut at all"
    for split in cut:
        ring = LocalRing(make_stages(checkpoint, split))
        for (position, count), theirs in zip(steps(name), expected, strict=True):
            ours = ring.logits(tokens[position : position + count], position)
            assert_same(ours, theirs, f"split {split}, {count} tokens at {position}")
        if trims:
            assert_same(ring.logits([5, 6], end - 3), after_trim, f"split {split}, after a trim")


def fails_upstream(name: str, capability: str) -> bool:
    return (name, capability) in tiny_models.UPSTREAM_FAILURES


@every(NAMES, QUICK_SAMPLE)
def test_float32(name: str, tmp_path: Path) -> None:
    if name in UNCUT:
        with pytest.raises(ForeignError, match=UNCUT[name]):
            make_stages(open_folder(tiny_models.make_checkpoint(name, tmp_path)), [2, 4])
        return
    assert_parity(opened(name), name, splits(opened(name)), trims=not fails_upstream(name, "trim"))


@pytest.mark.slow
@pytest.mark.parametrize("name", [n for n in NAMES if n not in UNCUT and not fails_upstream(n, "bfloat16")])
def test_bfloat16(name: str, tmp_path: Path) -> None:
    checkpoint = open_folder(tiny_models.make_checkpoint(name, tmp_path, dtype=mx.bfloat16))
    assert_parity(checkpoint, name, [most_stages(checkpoint)])


@pytest.mark.slow
@pytest.mark.parametrize("name", [n for n in sorted(SAMPLE) if n not in UNCUT and not fails_upstream(n, "quantized")])
def test_4_bit(name: str, tmp_path: Path) -> None:
    """A sample: test_depth.py has every type in 4 bits."""
    dtype = mx.float32 if fails_upstream(name, "quantized-bfloat16") else mx.bfloat16
    checkpoint = open_folder(tiny_models.make_checkpoint(name, tmp_path, dtype=dtype, quantize_bits=4))
    assert_parity(checkpoint, name, splits(checkpoint))


def run_stages(stages: list[Stage], tokens: mx.array, caches: list[list[Any]]) -> mx.array:
    """One step of a batch (B, L) through all stages: logits (B, L, V)."""
    forwards: list[Forward] = []
    for stage, cache in zip(stages, caches, strict=True):
        shown = tokens if stage.holds_embedding else mx.zeros_like(tokens)
        forwards.append(stage.forward(shown, cache))
    arrays = None
    while not forwards[0].is_done:
        for forward in forwards:
            forward.run(arrays)
            arrays = forward.outgoing
            if forward is forwards[0] and forward.is_done:
                break
            if not forward.stage.holds_embedding:
                forward.run(None)
            mx.eval(arrays)
    mx.eval([c.state for cache in caches for c in cache])
    assert forwards[0].logits is not None
    return forwards[0].logits


def merged(caches: list[list[Any]]) -> list[Any]:
    """Caches of single rows as one ragged batch, layer by layer."""
    return [rows[0].merge(rows) for rows in map(list, zip(*caches, strict=True))]


BATCHED = [
    n
    for n in NAMES
    if n not in UNCUT
    and not fails_upstream(n, "chunk")
    and "rows differ" in tiny_models.UPSTREAM_FAILURES.get((n, "batch"), "rows differ")
]


@every(BATCHED, QUICK_SAMPLE)
def test_ragged_batch(name: str) -> None:
    """Two rows of different length are prefilled alone, then decoded together."""
    checkpoint = opened(name)
    model, _ = load_model(checkpoint.source.path)
    rows = [tokens_for(name, seed=1)[:6], tokens_for(name, seed=2)[:9]]
    last = mx.array([[11], [12]])

    def decoded(prefill: Any, decode: Any, new_cache: Any) -> mx.array:
        caches = []
        for row in rows:
            cache = new_cache()
            prefill(mx.array([row]), cache)
            caches.append(cache)
        return decode(last, caches)

    def whole(tokens: mx.array, cache: list[Any]) -> mx.array:
        logits = model(tokens, cache=cache)
        mx.eval(logits, [c.state for c in cache])
        return logits

    theirs = decoded(whole, lambda t, caches: whole(t, merged(caches)), lambda: make_prompt_cache(model))
    stages = make_stages(checkpoint, most_stages(checkpoint))
    ours = decoded(
        lambda t, cache: run_stages(stages, t, cache),
        lambda t, caches: run_stages(stages, t, [merged(c) for c in zip(*caches, strict=True)]),
        lambda: [make_prompt_cache(stage.model) for stage in stages],
    )
    assert_same(ours, theirs, "ragged batch")


def regrouped(ring: LocalRing, name: str) -> list[mx.array]:
    """Logits of steps whose rows are read together, join, leave, part and are copied."""
    serials = itertools.count()
    lengths = {0: 6, 1: 9, 2: 4}
    prompts = [tokens_for(name, seed=slot)[:length] for slot, length in lengths.items()]
    ring.step(StepPlan(next(serials), (0,), (0,), (3,)), [prompts[0][:3]])
    ring.step(StepPlan(next(serials), (0, 1), (3, 0), (3, 9)), [prompts[0][3:], prompts[1]])
    ring.step(StepPlan(next(serials), (2,), (0,), (4,)), [prompts[2]])
    found = []
    for slots, forks, drops in (
        ((0, 1), (), ()),
        ((0, 1, 2), (), ()),
        ((0, 2), ((1, 3),), (1,)),
        ((3, 2, 0), (), ()),
        ((2,), (), ()),
        ((0, 3), (), (2,)),
        ((3, 4, 0), (), ()),  # one of them a prompt of one token
    ):
        for source, slot in forks:
            lengths[slot] = lengths[source]
        positions = tuple(lengths.setdefault(slot, 0) for slot in slots)
        plan = StepPlan(next(serials), slots, positions, (1,) * len(slots), Returns.LOGITS, forks, drops=drops)
        finished = ring.step(plan, [[11 + slot] for slot in slots]) or ring.wait()
        assert finished is not None
        mx.eval(finished.logits)
        found.append(finished.logits)
        for slot in slots:
            lengths[slot] += 1
    return found


@every([n for n in BATCHED if not fails_upstream(n, "batch")], QUICK_SAMPLE)
def test_regrouping(name: str) -> None:
    """Rows that join, leave, part and are copied give the same logits on one stage and on several."""
    checkpoint = opened(name)
    theirs = regrouped(LocalRing(make_stages(checkpoint, [checkpoint.flow.num_layers])), name)
    ours = regrouped(LocalRing(make_stages(checkpoint, most_stages(checkpoint))), name)
    for step, (our, their) in enumerate(zip(ours, theirs, strict=True)):
        assert_same(our, their, f"step {step}")


@every([n for n in NAMES if n not in UNCUT and not fails_upstream(n, "chunk")], QUICK_SAMPLE)
def test_batching_is_found_out(name: str) -> None:
    """Models whose rows mlx-lm can't run together, or runs together wrongly, are known before a request comes."""
    checkpoint = opened(name)
    can_batch = model_info(checkpoint, KVSettings()).can_batch
    assert can_batch or fails_upstream(name, "batch")
    if can_batch:
        ring = LocalRing(make_stages(checkpoint, [checkpoint.flow.num_layers]))
        wanted = not fails_upstream(name, "batch")
        can_pad = wanted and not fails_upstream(name, "pad")
        serials = itertools.count()
        for deadline_s in (None, 1e-6):  # with rows as long as is best, and as short as a slow model needs them
            assert check_rows(ring.leader, serials, deadline_s) == RowCheck(wanted, can_pad)


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> TokenizerWrapper:
    folder = tmp_path_factory.mktemp("words")
    save_tokenizer(folder)
    (folder / "config.json").write_text('{"model_type": "llama"}')
    return open_tokenizer(folder, None, (), False)


@every([n for n in NAMES if n not in UNCUT and not fails_upstream(n, "trim")], QUICK_SAMPLE)
def test_drafts_change_no_token(name: str, words: TokenizerWrapper) -> None:
    """Right ones and wrong ones, unless the model is found to be unable to take tokens back."""
    checkpoint = opened(name)
    split, prompt, chance = splits(checkpoint)[0], tokens_for(name)[:3], random.Random(0)

    plain: list[int | None] = []

    def propose(sequence: Sequence, most: int) -> list[int]:
        made = len(sequence.tokens) - len(prompt)
        right = [token or 0 for token in plain[made : made + min(most, 4)]]
        return [token if chance.random() < 0.8 else (token + 1) % 100 for token in right]

    def make_engine(propose: Propose | None) -> Engine:
        return Engine(LocalRing(make_stages(checkpoint, split)).leader, words, Limits(), 500, 128, None, propose)

    def answer(engine: Engine) -> list[int | None]:
        engine.add(Request(0, prompt, SamplingParams(max_tokens=16, ignore_eos=True)))
        return [output.token for output in engine.run()]

    try:
        drafting = make_engine(propose)
    except UserError as error:
        assert "its caches can't be trimmed" in str(error) or name == "phi3small"
        return
    plain += answer(make_engine(None))
    assert answer(drafting) == plain


@pytest.mark.slow
@pytest.mark.parametrize(("name", "capability"), list(tiny_models.UPSTREAM_FAILURES))
def test_upstream_still_fails(name: str, capability: str, tmp_path: Path) -> None:
    """What the list says of mlx-lm itself is true; if this fails, upstream has mended it: shorten the list."""
    if capability == "trim":
        folder = tiny_models.make_checkpoint(name, tmp_path)
        _, cache, _ = reference(folder, name, tokens_for(name))
        assert not can_trim_prompt_cache(cache)
        return
    if capability in ("forward", "rechunk") or "rows differ" in tiny_models.UPSTREAM_FAILURES[name, capability]:
        pytest.skip("shows in wrong numbers or on a GPU only, and our stages give the same numbers")
    with pytest.raises(Exception):  # noqa: B017 - whatever mlx-lm raises
        _try_upstream(name, capability, tmp_path)


def _try_upstream(name: str, capability: str, folder: Path) -> None:
    dtype = mx.bfloat16 if "bfloat16" in capability else mx.float32
    bits = 4 if "quantized" in capability else None
    tiny_models.make_checkpoint(name, folder, dtype=dtype, quantize_bits=bits)
    model, _ = load_model(folder)
    if bits is not None and not any(k.endswith("scales") for k, _ in tree_flatten(model.parameters())):
        raise ValueError("nothing was quantised")
    caches = []
    for length in (6, 9):
        cache = make_prompt_cache(model)
        mx.eval(model(mx.array([list(range(1, length + 1))]), cache=cache))
        caches.append(cache)
    if capability == "batch":
        mx.eval(model(mx.array([[1], [2]]), cache=merged(caches)))


def test_no_model_type_is_missing() -> None:
    """A model type that a new mlx-lm release brings needs a line in tiny_models.CONFIGS."""
    assert set(tiny_models.model_types()) == set(tiny_models.CONFIGS)
