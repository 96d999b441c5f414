"""OpenAI's words for answers: whole objects, the chunks of a stream, and errors."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from mlx_lm.tokenizer_utils import TokenizerWrapper

from hippo_mpi.engine.request import RequestOutput, Timings
from hippo_mpi.serving.openai_protocol import CHAT, Asked


def answer_object(
    asked: Asked, model: str, request_id: str, choices: Sequence[Sequence[RequestOutput]], tokenizer: TokenizerWrapper
) -> dict[str, Any]:
    """The chat completion or text completion that the outputs of its choices amount to."""
    is_chat = asked.url == CHAT
    found = []
    for index, outputs in enumerate(choices):
        text = "".join(output.text for output in outputs)
        content: dict[str, Any] = {"message": {"role": "assistant", "content": text}} if is_chat else {"text": text}
        told = _logprobs(asked, outputs, tokenizer)
        found.append({"index": index, **content, "logprobs": told, "finish_reason": outputs[-1].finish_reason})
    kind = "chat.completion" if is_chat else "text_completion"
    usage = usage_object([outputs[-1].timings for outputs in choices])
    return {**_head(request_id, kind, model), "choices": found, "usage": usage}


def chunk_object(
    asked: Asked, model: str, request_id: str, index: int, output: RequestOutput | None, tokenizer: TokenizerWrapper
) -> dict[str, Any]:
    """What a stream says of one output; without one, how the choice begins."""
    is_chat = asked.url == CHAT
    text = output.text if output else ""
    content: dict[str, Any] = {"text": text}
    if is_chat:
        content = {"delta": {"content": text} if output else {"role": "assistant", "content": ""}}
    told = _logprobs(asked, [output], tokenizer) if output else None
    reason = output.finish_reason if output else None
    kind = "chat.completion.chunk" if is_chat else "text_completion"
    choice = {"index": index, **content, "logprobs": told, "finish_reason": reason}
    return {**_head(request_id, kind, model), "choices": [choice]}


def usage_chunk(asked: Asked, model: str, request_id: str, timings: Sequence[Timings]) -> dict[str, Any]:
    """The last chunk of a stream that was asked for its usage."""
    kind = "chat.completion.chunk" if asked.url == CHAT else "text_completion"
    return {**_head(request_id, kind, model), "choices": [], "usage": usage_object(timings)}


def usage_object(timings: Sequence[Timings]) -> dict[str, Any]:
    """Tokens of all choices of a request; they share its prompt."""
    prompt, made = timings[0].prompt_tokens, sum(len(one.token_ids) for one in timings)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": made,
        "total_tokens": prompt + made,
        "prompt_tokens_details": {"cached_tokens": timings[0].cached_tokens},
    }


def error_object(message: str, kind: str, code: str | None = None) -> dict[str, Any]:
    return {"error": {"message": message, "type": kind, "param": None, "code": code}}


def _head(request_id: str, kind: str, model: str) -> dict[str, Any]:
    return {"id": request_id, "object": kind, "created": int(time.time()), "model": model}


def _logprobs(asked: Asked, outputs: Sequence[RequestOutput], tokenizer: TokenizerWrapper) -> dict[str, Any] | None:
    if asked.sampling.logprobs is None:
        return None
    return (_chat_logprobs if asked.url == CHAT else _completion_logprobs)(outputs, tokenizer)


def _chat_logprobs(outputs: Sequence[RequestOutput], tokenizer: TokenizerWrapper) -> dict[str, Any]:
    def entry(token: int, logprob: float) -> dict[str, Any]:
        text = tokenizer.decode([token])
        return {"token": text, "logprob": logprob, "bytes": list(text.encode())}

    content = []
    for output in outputs:
        if output.token is not None and output.logprobs is not None:
            top = [entry(token, logprob) for token, logprob in output.logprobs.top]
            content.append({**entry(output.token, output.logprobs.chosen), "top_logprobs": top})
    return {"content": content}


def _completion_logprobs(outputs: Sequence[RequestOutput], tokenizer: TokenizerWrapper) -> dict[str, Any]:
    told = [(o.token, o.logprobs) for o in outputs if o.token is not None and o.logprobs is not None]
    texts = [tokenizer.decode([token]) for token, _ in told]
    return {
        "tokens": texts,
        "token_logprobs": [logprobs.chosen for _, logprobs in told],
        "top_logprobs": [{tokenizer.decode([t]): value for t, value in logprobs.top} for _, logprobs in told],
        "text_offset": [len("".join(texts[:i])) for i in range(len(texts))],
    }
