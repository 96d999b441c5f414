"""What an audit log says of a request. Texts are digests, unless the log has texts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from hippo_mpi.serving.api.audit_log import AuditLog, key_id
from hippo_mpi.serving.protocols.openai_requests import Asked
from hippo_mpi.serving.supervision.catalogue import ServedModel
from hippo_mpi.serving.supervision.front import Answer


def request_record(
    log: AuditLog, name: str, key: str, endpoint: str, asked: Asked, answers: Sequence[Answer], model: ServedModel
) -> dict[str, Any]:
    """Return the record of a request that has ended.

    Args:
        name: the id that its answer went out with.
        key: that it brought; empty if none.
    """
    prompts = {id(one.request.prompt): [*one.request.prompt, *one.request.sampling.forced] for one in answers}
    prompt = "".join(model.tokenizer.decode(tokens) for tokens in prompts.values())
    record: dict[str, Any] = {
        "id": name,
        "key": key_id(key) if key else None,
        "model": model.name,
        "endpoint": endpoint,
        "parameters": _parameters(log, asked, model),
        "prompt_tokens": sum(map(len, prompts.values())),
        "prompt_digest": log.text_digest(prompt),
        "choices": [_choice(log, answer, model) for answer in answers],
    }
    return {**record, "prompt": prompt} if log.has_text else record


def _choice(log: AuditLog, answer: Answer, model: ServedModel) -> dict[str, Any]:
    tokens = answer.timings.token_ids[len(answer.request.sampling.forced) :]
    text = model.tokenizer.decode(tokens)
    # The message of an error may quote what was asked.
    outcome = answer.outcome if log.has_text else answer.outcome.partition(":")[0]
    told = {"tokens": len(tokens), "outcome": outcome, "digest": log.text_digest(text)}
    return {**told, "text": text} if log.has_text else told


def _parameters(log: AuditLog, asked: Asked, model: ServedModel) -> dict[str, Any]:
    """Return those that aren't the model's defaults."""
    given = {name: v for name, v in asdict(asked.sampling).items() if v != getattr(model.defaults, name)}
    if log.has_text:
        return given
    if "stop_words" in given:
        given["stop_words"] = [log.text_digest(word) for word in given["stop_words"]]
    if given.get("grammar") is not None:
        given["grammar"] = log.text_digest(given["grammar"])
    return given
