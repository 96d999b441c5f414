"""One conversation on rank 0, from text to text. It knows the Engine, but neither MLX nor ranks."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

from mlx_lm.tokenizer_utils import TokenizerWrapper

from hippo_mpi.engine.engine import Engine
from hippo_mpi.engine.request import Request, SamplingParams, Timings
from hippo_mpi.engine.text import ChatFormat
from hippo_mpi.offline.progress import Progress
from hippo_mpi.transport.launcher import Launcher
from hippo_mpi.transport.rank_status import RankStatistics
from hippo_mpi.transport.terminal import changed_terminal
from hippo_mpi.units import show_rate


@dataclass
class Answer:
    """The answer to one turn."""

    text: str
    finish_reason: str
    timings: Timings


class Conversation:
    """A chat. The engine keeps its cache between turns, so that each turn prefills only its new tokens."""

    engine: Engine  # set once the model is loaded

    def __init__(self, tokenizer: TokenizerWrapper, chat_format: ChatFormat, system_prompt: str | None) -> None:
        self._tokenizer, self._format = tokenizer, chat_format
        self._system = [{"role": "system", "content": system_prompt}] if system_prompt else []
        self.messages = list(self._system)
        self._turns = 0

    def reset(self) -> None:
        """Start a new conversation, and drop the cached prefixes on every rank."""
        self.messages = list(self._system)
        self.engine.forget_prefixes()

    def encode(self, text: str) -> list[int]:
        """Return the tokens of the conversation with `text` as the user's next turn.

        Raises:
            UserError: it is empty.
        """
        return self._format.encode(self._tokenizer, [*self.messages, {"role": "user", "content": text}])

    def say(
        self,
        text: str,
        sampling: SamplingParams,
        show: Callable[[str], None],
        progress: Progress,
        is_stopped: Callable[[], bool] = lambda: False,
    ) -> Answer:
        """Answer the user's next turn.

        Args:
            text: of the turn.
            sampling: parameters of the answer.
            show: called with each piece of the answer as it is generated.
            progress: shows the prefill.
            is_stopped: asked before every step; True ends the answer there, and what it has stays in the conversation.

        Raises:
            UserError: the turn is empty or too long.
            HippoError: the answer failed.
        """
        request = Request(self._turns, self.encode(text), sampling)
        self._turns += 1
        self.engine.on_prefill = progress.prefill
        self.engine.add(request)
        pieces = []
        while not self.engine.is_idle:
            if is_stopped():
                self.engine.abort(request.id)
            for output in self.engine.step():
                if output.error is not None:
                    raise output.error
                progress.clear()
                pieces.append(output.text)
                show(output.text)
        answer = Answer("".join(pieces), output.finish_reason or "length", output.timings)
        if answer.text or output.finish_reason != "abort":
            self.messages += [{"role": "user", "content": text}, {"role": "assistant", "content": answer.text}]
        return answer


def ask(launcher: Launcher, prompt: str) -> str | None:
    """Ask a person with a prompt, and read a line, on a terminal with readline's editing keys; None at the end of the input."""
    if not launcher.is_terminal:
        if launcher.may_be_typed:
            sys.stderr.write(prompt)
            sys.stderr.flush()
        return launcher.read_line()
    with contextlib.suppress(ImportError):  # a Python built without readline has no history
        import readline  # noqa: F401
    with launcher.foreground(), changed_terminal(0, {}):
        try:
            return input(prompt)
        except EOFError:
            return None


def write(text: str) -> None:
    """Write text to standard output at once."""
    sys.stdout.write(text)
    sys.stdout.flush()


def statistics_line(timings: Timings, ranks: Sequence[RankStatistics]) -> str:
    """Return the statistics that mlx_lm.generate prints after an answer, in one line, with every rank's peak memory."""
    draft = f"; {timings.num_accepted} of {timings.num_draft_tokens} draft tokens accepted"
    memory = ", ".join(f"{rank.peak_memory_bytes / 1e9:.3f}" for rank in ranks)
    return (
        f"prompt {timings.prompt_tokens} tokens, {show_rate(timings.prompt_tps)} tok/s; generation"
        f" {len(timings.token_ids)} tokens, {show_rate(timings.generation_tps)} tok/s; first token after"
        f" {timings.first_token_s - timings.started_s:.3f} s{draft if timings.num_draft_tokens else ''}; peak memory {memory} GB"
    )


def json_answer(answer: Answer, ranks: Sequence[RankStatistics]) -> str:
    """Return an answer with its statistics as a JSON object; `ranks` are those of every rank."""
    timings = answer.timings
    stats = {
        "prompt_tokens": timings.prompt_tokens,
        "prompt_tps": timings.prompt_tps,
        "generation_tokens": len(timings.token_ids),
        "generation_tps": timings.generation_tps,
        "time_to_first_token_s": timings.first_token_s - timings.started_s,
        "draft_tokens": timings.num_draft_tokens,
        "accepted_draft_tokens": timings.num_accepted,
        "ranks": [asdict(rank) for rank in ranks],
    }
    return json.dumps(
        {
            "text": answer.text,
            "token_ids": timings.token_ids,
            "finish_reason": answer.finish_reason,
            "stats": stats,
        }
    )
