"""What an audit log says of a request. Texts are digests, unless the log has texts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from hippo_mpi.engine.request import SamplingParams
from hippo_mpi.protocols.openai_sampling import IGNORING_EOS
from hippo_mpi.serving.api.audit_log import AuditLog
from hippo_mpi.serving.supervision.catalogue import ServedModel


@dataclass(frozen=True)
class EndedRequest:
    """What is told of a request that has ended.

    Args:
        id: that its answer went out with.
        key: the name of the key that it brought, from `key_id`.
        sampling: as it was asked for.
        prompts: tokens of each.
        answers: tokens of each, and how it ended.
    """

    id: str
    key: str | None
    endpoint: str
    sampling: SamplingParams
    prompts: Sequence[list[int]]
    answers: Sequence[tuple[list[int], str]]


def request_record(log: AuditLog, ended: EndedRequest, model: ServedModel) -> dict[str, Any]:
    """Return the record of a request."""
    prompt = "".join(model.tokenizer.decode(tokens) for tokens in ended.prompts)
    record: dict[str, Any] = {
        "id": ended.id,
        "key": ended.key,
        "model": model.name,
        "endpoint": ended.endpoint,
        "parameters": _parameters(log, ended.sampling, model),
        "prompt_tokens": sum(map(len, ended.prompts)),
        "prompt_digest": log.text_digest(prompt),
        "choices": [_choice(log, tokens, outcome, model) for tokens, outcome in ended.answers],
    }
    return {**record, "prompt": prompt} if log.has_text else record


def _choice(log: AuditLog, tokens: list[int], outcome: str, model: ServedModel) -> dict[str, Any]:
    text = model.tokenizer.decode(tokens)
    # The message of an error may quote what was asked.
    told = {"tokens": len(tokens), "outcome": outcome if log.has_text else outcome.partition(":")[0]}
    return {**told, "digest": log.text_digest(text), **({"text": text} if log.has_text else {})}


def _parameters(log: AuditLog, sampling: SamplingParams, model: ServedModel) -> dict[str, Any]:
    """Return those that aren't the model's defaults, as they were asked for."""
    given = {name: value for name, value in asdict(sampling).items() if value != getattr(model.defaults, name)}
    if given.get("min_tokens") == IGNORING_EOS:
        del given["min_tokens"]
        given["ignore_eos"] = True
    if log.has_text:
        return given
    if "stop_words" in given:
        given["stop_words"] = [log.text_digest(word) for word in given["stop_words"]]
    if given.get("grammar") is not None:
        given["grammar"] = log.text_digest(given["grammar"])
    return given
