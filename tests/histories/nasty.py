"""Hostile requests: drawn from the API's own description, from anything at all, and made by hand. Pure."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from random import Random
from typing import Any

from hypothesis import Phase, given, seed, settings
from hypothesis import strategies as st

from tests.commands.test_fuzz import ANYTHING, FIELDS, MESSAGES, POSTS, QUIET, SCHEMA, short
from tests.histories.kinds import CHAT, COMPLETIONS, RESPONSES, THINKS
from tests.histories.kinds import MESSAGES as ANTHROPIC

WAYS = ("whole", "dribbled", "cut off", "left", "unread")
"""How a body is sent: at once; a few bytes at a time; half of it; all, but for the answer nobody stays; or reads it."""
_USER = [{"role": "user", "content": "a fox"}]
_LARGE = 10**6


@dataclass(frozen=True)
class Attack:
    """One request.

    Args:
        headers: a line each.
    """

    path: str
    body: bytes
    way: str = "whole"
    headers: tuple[str, ...] = ()


def draw_attacks(seed_number: int, count: int) -> list[Attack]:
    """`count` of them: three tenths each from the description, from anything, and by hand, and the rest no JSON."""
    draw = Random(seed_number)
    described, anything = _described(seed_number, count * 3 // 10), _anything(seed_number, count * 3 // 10)
    made = [make(draw) for make in itertools.islice(itertools.cycle(_BY_HAND.values()), count * 3 // 10)]
    rest = count - len(described) - len(anything) - len(made)
    noise = [Attack(draw.choice(POSTS), draw.randbytes(draw.randrange(300))) for _ in range(rest)]
    found = [*described, *anything, *made, *noise]
    draw.shuffle(found)
    return found


def _described(seed_number: int, count: int) -> list[Attack]:
    """Bodies that fit the API's description, or nearly."""
    found: list[Attack] = []
    each = count // len(POSTS)
    for path in POSTS:
        for attack in _examples(SCHEMA[path]["POST"].as_strategy(), seed_number, each):
            with_body = attack.body if isinstance(attack.body, (dict, list, str, int, float, type(None))) else {}
            found.append(Attack(path, _encode(short(with_body))))
    return found


def _anything(seed_number: int, count: int) -> list[Attack]:
    bodies = st.tuples(
        st.sampled_from(POSTS), st.dictionaries(st.sampled_from(FIELDS), ANYTHING, max_size=6), st.none() | MESSAGES
    )
    return [
        Attack(path, _encode(short({"max_tokens": 2, **body, **({"messages": messages} if messages else {})})))
        for path, body, messages in _examples(bodies, seed_number, count)
    ]


def _examples(strategy: st.SearchStrategy[Any], seed_number: int, count: int) -> list[Any]:
    found: list[Any] = []

    @seed(seed_number)
    @settings(max_examples=count, deadline=None, database=None, phases=[Phase.generate], suppress_health_check=QUIET)
    @given(strategy)
    def collect(example: Any) -> None:
        found.append(example)

    collect()
    return found


def _encode(body: Any) -> bytes:
    return json.dumps(body, default=str).encode()


# ---- by hand


def _post(path: str, **fields: Any) -> Attack:
    asked = {COMPLETIONS: {"prompt": "a fox"}, RESPONSES: {"input": "a fox"}}.get(path, {"messages": _USER})
    most = "max_output_tokens" if path == RESPONSES else "max_tokens"
    return Attack(path, _encode({"model": THINKS, most: 4, **asked, **fields}))


def _json_schema(draw: Random, schema: Any, **fields: Any) -> Attack:
    asked = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    return _post(draw.choice((CHAT, COMPLETIONS)), response_format=asked, **fields)


def _nested(depth: int, inner: Any, wrap: Callable[[Any], Any]) -> Any:
    for _ in range(depth):
        inner = wrap(inner)
    return inner


def _wide(draw: Random) -> dict[str, Any]:
    count = draw.choice((50, 500, 2000))
    return {"type": "object", "properties": {f"p{i}": {"type": "integer"} for i in range(count)}}


def _raw(draw: Random, text: str) -> Attack:
    return Attack(draw.choice(POSTS), text.encode(errors="surrogatepass"))


def _slow(draw: Random, way: str) -> Attack:
    attack = _post(draw.choice((COMPLETIONS, CHAT, ANTHROPIC, RESPONSES)), stream=draw.random() < 0.7)
    if way in ("left", "unread"):
        body = json.loads(attack.body) | {"stream": True, "temperature": 1.0}
        body["max_output_tokens" if "input" in body else "max_tokens"] = 400
        attack = Attack(attack.path, _encode(body))
    return Attack(attack.path, attack.body, way)


_BY_HAND: dict[str, Callable[[Random], Attack]] = {
    "deep lists": lambda draw: _raw(draw, "[" * draw.choice((1000, _LARGE))),
    "deep objects": lambda draw: _raw(draw, '{"a":' * draw.choice((1000, _LARGE // 5))),
    "a deep message": lambda draw: _raw(draw, '{"messages":' + "[" * 5000 + "]" * 5000 + "}"),
    "a deep schema": lambda draw: _json_schema(
        draw, _nested(draw.choice((20, 200)), {"type": "integer"}, lambda inner: {"type": "array", "items": inner})
    ),
    "a wide schema": lambda draw: _json_schema(draw, _wide(draw), n=draw.choice((1, 16))),
    "many alternatives": lambda draw: _json_schema(
        draw, {"anyOf": [{"const": f"{i} {'x' * (i % 9)}"} for i in range(draw.choice((50, 2500)))]}
    ),
    "many words": lambda draw: _json_schema(draw, {"enum": [f"word {i}" for i in range(draw.choice((100, 5000)))]}),
    "a greedy pattern": lambda draw: _json_schema(draw, {"type": "string", "pattern": "^((a{1,99}){1,99}){1,99}$"}),
    "a long string": lambda draw: _json_schema(draw, {"type": "string", "minLength": 10**6, "maxLength": 10**9}),
    "a schema of itself": lambda draw: _json_schema(
        draw, {"$ref": "#/$defs/a", "$defs": {"a": {"anyOf": [{"$ref": "#/$defs/a"}, {"type": "null"}]}}}
    ),
    "no such schema": lambda draw: _json_schema(draw, draw.choice((None, 5, {"$ref": "http://x/y"}, {"type": "fairy"}))),
    "a huge whole number": lambda draw: _raw(draw, f'{{"prompt": "a", "messages": [], "seed": {"9" * 5000}}}'),
    "no numbers": lambda draw: _raw(
        draw, f'{{"prompt": "a fox", "max_tokens": 2, "temperature": {draw.choice(("NaN", "1e400", "-Infinity", "1e-39"))}}}'
    ),
    "bounds": lambda draw: _post(
        draw.choice((COMPLETIONS, CHAT)),
        **{draw.choice(("seed", "top_k", "n", "logprobs", "min_tokens", "max_tokens", "top_logprobs", "max_repeats")): draw.choice(
            (-1, 0, 2**31, 2**53, 2**63, 2**64, 10**30, 1.5, True)
        )},
    ),
    "an empty prompt": lambda draw: _post(COMPLETIONS, prompt=draw.choice(("", [], [[]], [""], ["a", ""], [0] * 5000))),
    "an empty message": lambda draw: _post(
        draw.choice((CHAT, ANTHROPIC)),
        messages=[{"role": draw.choice(("assistant", "user", "system")), "content": draw.choice(("", [], None))}],
    ),
    "no input": lambda draw: _post(RESPONSES, input=draw.choice(("", [], None, [{"role": "assistant", "content": ""}]))),
    "padded tokens": lambda draw: _post(COMPLETIONS, prompt=[draw.randrange(1431, 1536) for _ in range(5)]),
    "tokens that are none": lambda draw: _post(COMPLETIONS, prompt=[draw.choice((-1, 1536, 2**31, 2**64, 1.5))]),
    "a padded token wanted": lambda draw: _post(
        draw.choice((COMPLETIONS, CHAT)), logit_bias={str(draw.randrange(1431, 1536)): 100}, n=draw.choice((1, 4))
    ),
    "a long prompt": lambda draw: _post(COMPLETIONS, prompt="fox " * draw.choice((1500, 3000, 10**6))),
    "half characters": lambda draw: _post(draw.choice((COMPLETIONS, CHAT)), stop=["\ud800"], prompt="\ud800 \x00 \u202e"),
    "many stop words": lambda draw: _post(COMPLETIONS, stop=["x" * 256 + str(i) for i in range(16)]),
    "wrong types": lambda draw: _post(
        draw.choice((COMPLETIONS, CHAT, ANTHROPIC, RESPONSES)), **{draw.choice(FIELDS): draw.choice(([], {}, "x", 5, None, True, [[]]))}
    ),
    "many tools": lambda draw: _post(
        CHAT, tools=[{"type": "function", "function": {"name": f"f{i}", "parameters": {}}} for i in range(draw.choice((3, 500)))],
        tool_choice="required",
    ),
    "other models": lambda draw: _post(draw.choice((CHAT, ANTHROPIC)), model=draw.choice(("../../etc", "", 5, "x" * 10**5))),
    "another encoding": lambda draw: Attack(CHAT, json.dumps({"messages": _USER, "max_tokens": 2}).encode("utf-16")),
    "a lie about its length": lambda draw: Attack(CHAT, b"{}", headers=(f"Content-Length: {draw.choice((-1, 10**18))}",)),
    "too many bytes": lambda draw: Attack(COMPLETIONS, b" " * (5 << 20)),
    "many headers": lambda draw: Attack(CHAT, b"{}", headers=tuple(f"X-{i}: {'y' * 100}" for i in range(500))),
    "nothing": lambda draw: Attack(draw.choice(POSTS), b""),
    **{way: lambda draw, way=way: _slow(draw, way) for way in WAYS[1:]},
}  # fmt: skip


def names() -> Iterator[str]:
    yield from _BY_HAND
