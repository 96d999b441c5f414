"""The record of a request in an audit log, with digests instead of texts unless the log keeps texts."""

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
    """A request that has ended, as the audit log sees it.

    Args:
        id: of its answer.
        key: the name of its API key, from `key_id`; None: it had none.
        endpoint: path of the endpoint.
        sampling: the parameters of the request.
        prompts: the tokens of each prompt.
        answers: the tokens of each answer, and how it ended.
    """

    id: str
    key: str | None
    endpoint: str
    sampling: SamplingParams
    prompts: Sequence[list[int]]
    answers: Sequence[tuple[list[int], str]]


def request_record(log: AuditLog, ended: EndedRequest, model: ServedModel) -> dict[str, Any]:
    """Return the record of a request, as a JSON object."""
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
    # The message of an error may quote the prompt.
    told = {"tokens": len(tokens), "outcome": outcome if log.has_text else outcome.partition(":")[0]}
    return {**told, "digest": log.text_digest(text), **({"text": text} if log.has_text else {})}


def _parameters(log: AuditLog, sampling: SamplingParams, model: ServedModel) -> dict[str, Any]:
    """Return the parameters that differ from the model's defaults; texts as digests, unless the log keeps texts."""
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
