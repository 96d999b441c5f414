"""Fields of requests that are accepted without effect on the answer: one table per API, with the reason for each.

Some are hints, accepted with any value. Others are accepted only with values that ask for what is done anyway; other
values are refused by name, as are fields that no table has.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from hippo_mpi.errors import FieldError


@dataclass(frozen=True)
class Ignored:
    """The reason why a field has no effect, and the values with which it is accepted; None: any."""

    reason: str
    values: tuple[Any, ...] | None = None

    def schema(self) -> dict[str, Any]:
        """Return the field's JSON schema for the OpenAPI description."""
        return {"description": self.reason} | ({} if self.values is None else {"enum": [None, *self.values]})


_ENDPOINT = Ignored("handled by the endpoint")
_STORE = Ignored("handled by the endpoint: a server with --journal keeps the answer, unchanged, for GET")
_RECORDS = Ignored("for a provider's records")
_ROUTE = Ignored("chooses machines or caches; here there is one set of ranks, which finds shared prefixes by itself")
_LENGTH = Ignored("for models trained for it; no chat template supports it")
_SPEED = Ignored("affects the speed of an answer only")
_ALL_TOOLS_ARE_YOURS = Ignored("for tools that a provider runs; there are none here")
_NEUTRAL = Ignored("requests the default behavior")

_OPENAI: dict[str, Ignored] = {
    "model": _ENDPOINT,
    "store": _STORE,
    **dict.fromkeys(("user", "metadata", "safety_identifier", "request_id", "client_metadata"), _RECORDS),
    **dict.fromkeys(("service_tier", "prompt_cache_key", "prompt_cache_retention", "cache_prompt", "priority"), _ROUTE),
}
"""Fields of all of OpenAI's endpoints."""


def _only(*values: Any, reason: str = _NEUTRAL.reason) -> Ignored:
    return Ignored(reason, values)


_TOKENS: dict[str, Ignored] = {
    "use_beam_search": _only(False),
    "best_of": _only(1),
    "length_penalty": _only(1, 1.0),
    "skip_special_tokens": _only(True),
    "spaces_between_special_tokens": _only(True),
    "include_stop_str_in_output": _only(False),
    "stop_token_ids": _only([]),
}
"""Fields of vLLM and other servers, for clients that always send all of them."""

CHAT_IGNORED: dict[str, Ignored] = {
    **_OPENAI,
    **_TOKENS,
    "stream_options": _ENDPOINT,
    "stream": _only(False),
    "verbosity": _LENGTH,
    "prediction": _SPEED,
    "modalities": _only(["text"]),
    "functions": _only([]),
    "function_call": _only("none", "auto", reason="without functions there is nothing to call"),
    "n": _only(1),
    "add_special_tokens": _only(False, reason="the chat template adds them"),
    "echo": _only(False),
}
COMPLETION_IGNORED: dict[str, Ignored] = {
    **_OPENAI,
    **_TOKENS,
    "stream_options": _ENDPOINT,
    "stream": _only(False),
    "suffix": _only(""),
    "n": _only(1),
}
RESPONSES_IGNORED: dict[str, Ignored] = {
    **_OPENAI,
    "stream_options": _SPEED,  # its only field is about padding of chunks
    "max_tool_calls": _ALL_TOOLS_ARE_YOURS,
    "truncation": _only("disabled", "auto", reason="an input that is too long is refused, never truncated"),
    "stream": _only(False),
    "background": _only(False, reason="true needs a server with --journal"),
    "previous_response_id": _only(reason="a request must contain its whole conversation"),
    "top_logprobs": _only(0),
}
MESSAGES_IGNORED: dict[str, Ignored] = {
    **dict.fromkeys(("model", "stream"), _ENDPOINT),
    **dict.fromkeys(("metadata", "thread", "diagnostics"), _RECORDS),
    **dict.fromkeys(("service_tier", "inference_geo", "cache_control"), _ROUTE),
    "speed": _SPEED,
    "container": _ALL_TOOLS_ARE_YOURS,
    "mcp_servers": _only([]),
    "context_management": Ignored("truncates long conversations; here all of a conversation is read"),
}


def without_ignored(body: Mapping[str, Any], ignored: Mapping[str, Ignored]) -> dict[str, Any]:
    """Return the fields of a body that may have an effect; null counts as absent.

    Raises:
        FieldError: a field of the table has a value that it isn't accepted with.
    """
    fields: dict[str, Any] = {}
    for name, value in body.items():
        if value is None:
            continue
        if name not in ignored:
            fields[name] = value
            continue
        values = ignored[name].values
        if values is not None and not any(type(value) is type(one) and value == one for one in values):
            taken = " or ".join(json.dumps(one) for one in values or (None,))
            raise FieldError(name, f"{name} must be {taken} here, not {value!r}")
    return fields
