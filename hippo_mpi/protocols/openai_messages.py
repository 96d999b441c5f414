"""Messages and tools of OpenAI's chats, in the form that chat templates expect."""

from __future__ import annotations

import contextlib
import json
from typing import Any

from hippo_mpi.errors import FieldError

_PARTS = ("text", "input_text", "output_text", "refusal")
ROLES = ("system", "developer", "user", "assistant", "tool")


def read_messages(value: Any) -> list[dict[str, Any]]:
    """Check messages and return them as chat templates expect them: content as text, arguments of calls as objects.

    Raises:
        FieldError: they aren't valid messages.
    """
    if not isinstance(value, list) or not value or not all(isinstance(message, dict) for message in value):
        raise FieldError("messages", "messages must be a list of objects with role and content")
    return [_message(message) for message in value]


def _message(message: dict[str, Any]) -> dict[str, Any]:
    role, calls = message.get("role"), message.get("tool_calls")
    if role not in ROLES:
        raise FieldError("messages", f"messages: role must be one of {', '.join(ROLES)}, not {role!r}")
    content = message.get("content")
    if content is None and role in ("assistant", "tool"):
        content = message.get("refusal") or ""
    read = {**message, "content": _content(content)}
    if calls is not None:
        try:
            read["tool_calls"] = [{**call, "function": _called(call["function"])} for call in calls]
        except (AttributeError, TypeError, KeyError):
            raise FieldError("messages", "messages: tool_calls must be a list of OpenAI's calls") from None
    return read


def _called(function: dict[str, Any]) -> dict[str, Any]:
    """Return an earlier call with its arguments as an object, which templates rely on.

    A model may have written something else; that is kept under the name "arguments".
    """
    arguments = function.get("arguments") or {}
    if isinstance(arguments, str):
        with contextlib.suppress(ValueError, RecursionError):
            arguments = json.loads(arguments)
    return {**function, "arguments": arguments if isinstance(arguments, dict) else {"arguments": arguments}}


def read_tools(value: Any) -> list[dict[str, Any]]:
    """Check a list of OpenAI's function tools and return it.

    Raises:
        FieldError: it is something else.
    """

    def is_tool(tool: Any) -> bool:
        function = tool.get("function") if isinstance(tool, dict) and tool.get("type") == "function" else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            return False
        return function.get("parameters") is None or isinstance(function["parameters"], dict)

    if not isinstance(value, list) or not all(is_tool(tool) for tool in value):
        raise FieldError(
            "tools",
            "tools must be a list of objects with the type function, and a function with a name and, as an object,"
            " parameters",
        )
    return value


def _content(value: Any) -> str:
    """Return the text of a message whose content is a string or OpenAI's list of parts."""
    if isinstance(value, str):
        return value
    parts = value if isinstance(value, list) else [None]
    texts = [p.get("text", p.get("refusal")) for p in parts if isinstance(p, dict) and p.get("type", "text") in _PARTS]
    valid = [text for text in texts if isinstance(text, str)]
    if len(valid) < len(parts):
        raise FieldError("messages", "messages: content must be a string or a list of text parts")
    return "".join(valid)
