"""hippo_mpi.generate: answer one prompt with a model that is split over the launched ranks.

mlx.launch --hostfile hostfile -n 2 hippo_mpi.generate --model M --prompt "..."
"""

from __future__ import annotations

import sys

import mlx.core as mx
from mlx_lm.tokenizer_utils import TokenizerWrapper

from hippo_mpi import command, config
from hippo_mpi.command import Session
from hippo_mpi.engine.drafting import Drafter
from hippo_mpi.engine.engine import Engine, check_context
from hippo_mpi.engine.prefix_cache import PrefixBudget
from hippo_mpi.engine.request import Propose, SamplingParams
from hippo_mpi.engine.scheduler import Limits
from hippo_mpi.engine.text import ChatFormat, open_tokenizer
from hippo_mpi.errors import UserError
from hippo_mpi.parallel.pipeline import Pipeline
from hippo_mpi.plan import show_plan
from hippo_mpi.serving.terminal.console import Conversation, json_answer, statistics_line, write
from hippo_mpi.shard import pipeline


def make_parser() -> config.Parser:
    parser = config.Parser(prog="hippo_mpi.generate", description=(__doc__ or "").splitlines()[0])
    config.add_model_options(parser)
    config.add_draft_options(parser)
    parser.add_argument("--prompt", default=config.DEFAULT_PROMPT, help="what to answer; - reads standard input")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    parser.add_argument("--show-plan", action="store_true", help="print what each rank would hold, and stop")
    config.add_prompt_options(parser)
    config.add_sampling_options(parser, max_tokens=256)
    config.add_cache_options(parser)
    config.add_run_options(parser)
    return parser


def open_model_tokenizer(session: Session, extra_eos: tuple[str, ...] = ()) -> TokenizerWrapper:
    """The tokenizer of the model that the ranks agreed on.

    Raises:
        UserError: it can't be used.
    """
    checkpoint = session.agreement.checkpoint
    eos, trusts = checkpoint.config.get("eos_token_id"), checkpoint.source.trust_remote_code
    return open_tokenizer(checkpoint.source.path, eos, extra_eos, trusts)


def open_text(session: Session) -> tuple[TokenizerWrapper, ChatFormat]:
    """The model's tokenizer, and how messages become a prompt.

    Raises:
        UserError: the tokenizer can't be used.
    """
    arguments, draft = session.arguments, session.agreement.draft
    tokenizer = open_model_tokenizer(session, tuple(arguments.extra_eos_token))
    if draft is not None:
        drafts = open_tokenizer(draft.checkpoint.source.path, None, (), arguments.trust_remote_code).vocab_size
        if drafts != tokenizer.vocab_size:
            raise UserError(
                f"--draft-model {arguments.draft_model} has {drafts:,} tokens and the model {tokenizer.vocab_size:,}:"
                " they must have the same tokenizer"
            )
    return tokenizer, ChatFormat.from_options(arguments)


def load_drafter(session: Session) -> Propose | None:
    """The draft model, loaded, if there is one: rank 0 calls it when the pipeline is loaded."""
    agreement = session.agreement
    if agreement.draft is None:
        return None
    checkpoint, info = agreement.draft.checkpoint, agreement.draft.info
    stage = pipeline(checkpoint, [info.num_layers], 0, lambda _: session.control.progress("loading the draft model"))
    vocab_size = min(info.vocab_size, agreement.vocab_size)
    return Drafter(stage.model, vocab_size, info.max_positions, session.arguments.num_draft_tokens).propose


def lead(session: Session, first_prompt: str | None = None) -> tuple[Pipeline, Conversation]:
    """Rank 0's part of the model, loaded, with a conversation on top.

    Raises:
        UserError: the tokenizer can't be used, or `first_prompt` can't be answered; nothing is loaded then.
    """
    arguments = session.arguments
    tokenizer, chat_format = open_text(session)
    conversation = Conversation(tokenizer, chat_format, arguments.system_prompt)
    max_context = session.agreement.max_context
    if first_prompt is not None:
        check_context(len(conversation.encode(first_prompt)), max_context)
    loaded = session.load()
    if arguments.seed is not None:
        mx.random.seed(arguments.seed)
    limits = Limits(prefill_chunk=arguments.prefill_step_size, deadline_s=arguments.timeout)
    # The conversation so far is all that is kept, and at most the context: the plan has counted it.
    budget = PrefixBudget(max_context, lambda num_tokens: num_tokens)
    vocab_size = session.agreement.vocab_size
    propose = load_drafter(session)
    conversation.engine = Engine(loaded.leader(), tokenizer, limits, max_context, vocab_size, budget, propose)
    return loaded, conversation


def answer(session: Session) -> int:
    arguments = session.arguments
    if arguments.show_plan:
        show_plan(session)
        session.control.close()
        return 0
    if session.world.rank > 0:
        command.follow(session)
        return 0
    prompt = arguments.prompt.replace("\\n", "\n").replace("\\t", "\t")
    if prompt == "-":
        session.control.idle()
        prompt = session.launcher.read_all()
        session.control.progress("loading")
    loaded, conversation = lead(session, prompt)
    show_text = (lambda text: None) if arguments.json else session.show
    result = conversation.say(prompt, SamplingParams.from_options(arguments), show_text, session.progress)
    ranks = loaded.end() or []
    if arguments.json:
        write(json_answer(result, ranks) + "\n")
    else:
        write("\n")
        sys.stderr.write(statistics_line(result.timings, ranks) + "\n")
    return 0


def main() -> None:
    command.run(make_parser(), answer)


if __name__ == "__main__":
    main()
