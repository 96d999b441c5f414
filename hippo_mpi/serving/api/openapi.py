"""The description of the API (GET /openapi.json): the requests and responses of each endpoint, as OpenAPI 3.1."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Any

from hippo_mpi.protocols.anthropic_messages import COUNT_TOKENS, MESSAGES
from hippo_mpi.protocols.ignored_fields import (
    CHAT_IGNORED,
    COMPLETION_IGNORED,
    MESSAGES_IGNORED,
    RESPONSES_IGNORED,
    Ignored,
)
from hippo_mpi.protocols.openai_messages import ROLES
from hippo_mpi.protocols.openai_requests import CHAT, COMPLETION, EFFORTS
from hippo_mpi.protocols.openai_responses import RESPONSES
from hippo_mpi.protocols.openai_sampling import field_schemas

_Schema = dict[str, Any]
_TEXT: _Schema = {"type": "string", "minLength": 1}
_PARTS: _Schema = {
    "anyOf": [
        _TEXT,
        {
            "type": "array",
            "items": {"type": "object", "required": ["text"], "properties": {"type": {"const": "text"}, "text": _TEXT}},
        },
    ]
}
_FUNCTION: _Schema = {
    "type": "object",
    "required": ["name"],
    "properties": {"name": _TEXT, "description": {"type": "string"}, "parameters": {"type": "object"}},
}
_BOOLEAN: _Schema = {"type": "boolean"}
_SALT: _Schema = {"type": "string", "minLength": 1, "maxLength": 256}
_CHOICE: _Schema = {"anyOf": [{"enum": ["auto", "none", "required"]}, {"type": "object"}]}
_ERRORS = {
    400: "Invalid body: the message names the field.",
    401: "Missing or unknown API key.",
    403: "Origin or Host not allowed, or only an admin key may change the model.",
    404: "No such model, or this key has no answer with this id.",
    408: "The body took too long.",
    413: "The body is too large.",
    415: "The Content-Type isn't application/json.",
    429: "Too many waiting requests, or a rate limit reached: see Retry-After.",
    503: "The ranks can't be restarted.",
}


def openapi_object(models: Sequence[str]) -> dict[str, Any]:
    """Return the OpenAPI description of a server of these models."""
    gets = {
        "/": "What this server is.",
        "/health": "Whether the front is alive; with deep=1, whether the ranks produce tokens (503 if not).",
        "/ready": "Whether the ranks are ready (503 if not), and why not.",
        "/metrics": "Metrics for Prometheus.",
        "/openapi.json": "This description.",
        "/v1/models": "The models of the catalogue.",
        "/v1/models/{model}": "One of its models.",
    }
    paths: dict[str, Any] = {path: {"get": _operation(path, text)} for path, text in gets.items()}
    paths["/health"]["get"]["parameters"] = [_parameter("query", "deep", {"enum": ["0", "1", "false", "true"]})]
    paths["/v1/models/{model}"]["parameters"] = [_parameter("path", "model", {"enum": list(models)})]
    for path in (CHAT, COMPLETION, RESPONSES, MESSAGES):
        paths[f"{path}/{{id}}"] = _of_kept(path)
    paths[f"{RESPONSES}/{{id}}/cancel"] = {
        "parameters": [_ID],
        "post": _operation(f"{RESPONSES}/cancel", "Cancel a background response."),
    }
    for path, body in _bodies({"type": "string", "enum": list(models)}).items():
        content = {"application/json": {"schema": body}}
        paths[path] = {"post": _operation(path, "") | {"requestBody": {"required": True, "content": content}}}
    return {
        "openapi": "3.1.0",
        "info": {"title": "Hippo MPI", "version": version("hippo-mpi")},
        "paths": paths,
        "components": {"securitySchemes": {"key": {"type": "http", "scheme": "bearer"}}},
    }


def _of_kept(path: str) -> dict[str, Any]:
    """Return the path item of an answer that a server with a journal keeps."""
    get = _operation(f"{path}/get", "An answer by its id, or its events after a given one.")
    get["parameters"] = [
        _parameter("query", "stream", {"enum": ["true", "false"]}),
        _parameter("query", "starting_after", {"type": "integer", "minimum": 0, "maximum": 999_999_999}),
        _parameter("header", "Last-Event-ID", {"type": "integer", "minimum": 0, "maximum": 999_999_999}),
    ]
    return {"parameters": [_ID], "get": get, "delete": _operation(f"{path}/delete", "Delete an answer.")}


def _bodies(model: _Schema) -> dict[str, _Schema]:
    """Return the schemas of the bodies of POST requests, by path."""
    of_messages = _of_messages(model)
    sampling = _of(field_schemas(True), "max_tokens", "temperature", "top_p", "top_k")
    stops = {"stop_sequences": field_schemas(True)["stop"]}
    asked = {"stream": _BOOLEAN, "cache_salt": _SALT}
    tokenized = {**_ignored(COMPLETION_IGNORED), **_of_chat(model), "prompt": _prompt(), "add_special_tokens": _BOOLEAN}
    return {
        CHAT: _body({**_of_chat(model), **field_schemas(True), **_choices(), **asked}, "messages"),
        COMPLETION: _body({**_of_completion(model), **asked}, "prompt"),
        RESPONSES: _body({**_of_responses(model), **asked}, "input"),
        MESSAGES: _body({**of_messages, **sampling, **stops, **asked}, "messages", "max_tokens"),
        COUNT_TOKENS: _body(of_messages, "messages"),
        "/tokenize": _body(tokenized),
        "/admin/model": _body({"model": model}, "model"),
    }


def _of_chat(model: _Schema) -> dict[str, _Schema]:
    return {
        **_ignored(CHAT_IGNORED),
        "model": model,
        "messages": _messages(ROLES),
        "tools": _tools({"type": {"const": "function"}, "function": _FUNCTION}),
        "tool_choice": _CHOICE,
        "parallel_tool_calls": _BOOLEAN,
        "reasoning_effort": {"enum": list(EFFORTS)},
        "chat_template_kwargs": {"type": "object"},
        "continue_final_message": _BOOLEAN,
        "add_generation_prompt": _BOOLEAN,
    }


def _of_completion(model: _Schema) -> dict[str, _Schema]:
    return {
        **_ignored(COMPLETION_IGNORED),
        "model": model,
        "prompt": {"anyOf": [_prompt(), {"type": "array", "items": _prompt(), "minItems": 1}]},
        "add_special_tokens": _BOOLEAN,
        "echo": _BOOLEAN,
        **_choices(),
        **field_schemas(False),
    }


def _of_responses(model: _Schema) -> dict[str, _Schema]:
    return {
        **_ignored(RESPONSES_IGNORED),
        "model": model,
        "store": _BOOLEAN,
        "background": _BOOLEAN,
        "input": {"anyOf": [_TEXT, _messages(ROLES)]},
        "instructions": _TEXT,
        **_of(field_schemas(True), "temperature", "top_p"),
        "tools": _tools({"type": {"type": "string"}, **_FUNCTION["properties"]}),
        "include": {"type": "array", "items": {"type": "string"}},
        "tool_choice": _CHOICE,
        "parallel_tool_calls": _BOOLEAN,
        "text": {"type": "object", "properties": {"format": {"type": "object", "required": ["type"]}}},
        "reasoning": {"type": "object", "properties": {"effort": {"enum": list(EFFORTS)}}},
        "max_output_tokens": field_schemas(True)["max_tokens"],
    }


def _of_messages(model: _Schema) -> dict[str, _Schema]:
    return {
        **_ignored(MESSAGES_IGNORED),
        "model": model,
        "messages": _messages(("user", "assistant", "system")),
        "system": _PARTS,
        "tools": _tools({"name": _TEXT, "input_schema": {"type": "object"}}),
        "tool_choice": _kinds("auto", "any", "tool", "none"),
        "thinking": _kinds("adaptive", "disabled", "enabled"),
        "output_config": {
            "type": "object",
            "properties": {"effort": {"enum": list(EFFORTS)}, "format": _kinds("json_schema")},
            "additionalProperties": False,
        },
        "output_format": _kinds("json_schema"),
    }


def _operation(path: str, text: str) -> dict[str, Any]:
    responses = {"200": {"description": text or "The answer; with stream: true, server-sent events."}}
    return {
        "operationId": path.strip("/").replace("/", "_") or "introduce",
        "summary": text or path,
        "security": [{}, {"key": []}],
        "responses": responses | {str(status): {"description": why} for status, why in _ERRORS.items()},
    }


def _parameter(where: str, name: str, schema: _Schema) -> dict[str, Any]:
    return {"in": where, "name": name, "required": where == "path", "schema": schema}


_ID = _parameter("path", "id", _TEXT)


def _body(properties: dict[str, _Schema], *required: str) -> _Schema:
    return {"type": "object", "required": list(required), "properties": properties, "additionalProperties": False}


def _messages(roles: Sequence[str]) -> _Schema:
    message = {
        "type": "object",
        "required": ["role", "content"],
        "properties": {"role": {"enum": list(roles)}, "content": _PARTS},
    }
    return {"type": "array", "minItems": 1, "items": message}


def _tools(properties: dict[str, _Schema]) -> _Schema:
    return {"type": "array", "items": {"type": "object", "required": list(properties)[:2], "properties": properties}}


def _kinds(*names: str) -> _Schema:
    return {"type": "object", "required": ["type"], "properties": {"type": {"enum": list(names)}}}


def _prompt() -> _Schema:
    return {"anyOf": [_TEXT, {"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 1}]}


def _ignored(ignored: Mapping[str, Ignored]) -> dict[str, _Schema]:
    return {name: one.schema() for name, one in ignored.items()}


def _choices() -> dict[str, _Schema]:
    return {"n": {"type": "integer", "minimum": 1, "maximum": 16}}


def _of(schemas: dict[str, _Schema], *names: str) -> dict[str, _Schema]:
    return {name: schemas[name] for name in names}
