"""Build what a command's body works with on rank 0: tokenizer, draft model, engine, conversation."""

from __future__ import annotations

from dataclasses import replace

import mlx.core as mx
from mlx_lm.tokenizer_utils import TokenizerWrapper

from hippo_mpi.config.options import ManyOptions, RunOptions, TextOptions
from hippo_mpi.engine.drafting import Drafter
from hippo_mpi.engine.engine import Engine
from hippo_mpi.engine.prefill import Limits
from hippo_mpi.engine.prefix_cache import PrefixBudget
from hippo_mpi.engine.request import Propose, check_context
from hippo_mpi.engine.text import ChatFormat, open_tokenizer
from hippo_mpi.errors import UserError
from hippo_mpi.offline.conversation import Conversation
from hippo_mpi.runtime.agreement import Agreement
from hippo_mpi.runtime.pipeline import Pipeline
from hippo_mpi.runtime.session import Session
from hippo_mpi.sharding.stage import load_stage

_MLX_LM_CHUNK = 2048  # tokens of a prompt that mlx-lm reads in a step


def open_model_tokenizer(session: Session[RunOptions], extra_eos: tuple[str, ...] = ()) -> TokenizerWrapper:
    """Open the tokenizer of the model that the ranks agreed on.

    Raises:
        UserError: it can't be used.
    """
    checkpoint = session.agreement.checkpoint
    eos, trusts = checkpoint.config.get("eos_token_id"), checkpoint.source.trust_remote_code
    return open_tokenizer(checkpoint.source.path, eos, extra_eos, trusts)


def open_text(session: Session[TextOptions]) -> tuple[TokenizerWrapper, ChatFormat]:
    """Return the model's tokenizer, and how messages become a prompt.

    Raises:
        UserError: the tokenizer can't be used, or the draft model has another.
    """
    options, draft = session.options, session.agreement.draft
    tokenizer = open_model_tokenizer(session, tuple(options.extra_eos_token))
    if draft is not None:
        drafts = open_tokenizer(draft.checkpoint.source.path, None, (), options.trust_remote_code).vocab_size
        if drafts != tokenizer.vocab_size:
            raise UserError(
                f"--draft-model {options.draft_model} has {drafts:,} tokens and the model {tokenizer.vocab_size:,}:"
                " they must have the same tokenizer"
            )
    return tokenizer, ChatFormat.from_options(options)


def build_conversation(session: Session[TextOptions], first_prompt: str | None = None) -> tuple[Pipeline, Conversation]:
    """Load rank 0's part of the model, and build a conversation on top.

    Raises:
        UserError: the tokenizer can't be used, or `first_prompt` can't be answered; nothing is loaded then.
    """
    options, max_context = session.options, session.agreement.max_context
    tokenizer, chat_format = open_text(session)
    conversation = Conversation(tokenizer, chat_format, options.system_prompt)
    if first_prompt is not None:
        check_context(len(conversation.encode(first_prompt)), max_context)
    pipeline = session.load()
    if options.seed is not None:
        mx.random.seed(options.seed)
    limits = with_chunks(Limits(deadline_s=options.timeout), options)
    # The conversation so far is all that is kept, and at most the context: the plan has counted it.
    budget = PrefixBudget(max_context, lambda num_tokens: num_tokens)
    conversation.engine = _build_engine(session, pipeline, tokenizer, limits, budget)
    return pipeline, conversation


def build_engine(session: Session[ManyOptions], pipeline: Pipeline, tokenizer: TokenizerWrapper) -> Engine:
    """Build an engine for many requests, within what the memory guard leaves for caches."""
    options = session.options
    limits, budget = room_for_many(session.agreement, options.max_batch_size, options.prompt_cache_bytes)
    limits = replace(limits, max_batch_tokens=options.max_batch_tokens, deadline_s=options.timeout)
    limits = with_chunks(limits, options)
    return _build_engine(session, pipeline, tokenizer, limits, budget)


def with_chunks(limits: Limits, options: RunOptions) -> Limits:
    """Return the limits with the steps in which prompts are read.

    What a rotating cache of a given size attends to depends on the step's length, in mlx-lm, too: so these are mlx-lm's.
    """
    if options.max_kv_size is None:
        return replace(limits, prefill_chunk=options.prefill_step_size)
    return replace(limits, prefill_chunk=options.prefill_step_size or _MLX_LM_CHUNK, keeps_chunks=True)


def room_for_many(
    agreement: Agreement, max_batch_size: int, prefix_bytes: int | None = None
) -> tuple[Limits, PrefixBudget | None]:
    """Return how many requests the plan has room for, and what may be kept of ended ones.

    Args:
        agreement: rank 0's, which has the plan.
        max_batch_size: most requests at once, whatever the plan has room for.
        prefix_bytes: for what is kept; None: what the plan can spare.
    """
    split = agreement.split
    assert split is not None  # rank 0 has planned
    size, cache_tokens = split.cache_room(max_batch_size)
    num_bytes = split.prefix_room_bytes() if prefix_bytes is None else prefix_bytes
    budget = PrefixBudget(num_bytes, split.sequence_bytes) if num_bytes else None
    return Limits(size, cache_tokens=cache_tokens, can_batch=agreement.can_batch), budget


def _build_engine(
    session: Session[TextOptions],
    pipeline: Pipeline,
    tokenizer: TokenizerWrapper,
    limits: Limits,
    budget: PrefixBudget | None,
) -> Engine:
    agreement, propose = session.agreement, _load_drafter(session)
    return Engine(pipeline.leader(), tokenizer, limits, agreement.max_context, agreement.vocab_size, budget, propose)


def _load_drafter(session: Session[TextOptions]) -> Propose | None:
    """Load the draft model, if there is one: rank 0 calls it when the pipeline is loaded."""
    agreement = session.agreement
    if agreement.draft is None:
        return None
    checkpoint, info = agreement.draft.checkpoint, agreement.draft.info
    stage = load_stage(checkpoint, 0, info.num_layers, lambda _: session.control.progress("loading the draft model"))
    vocab_size = min(info.vocab_size, agreement.vocab_size)
    return Drafter(stage.model, vocab_size, info.max_positions, session.options.num_draft_tokens).propose
