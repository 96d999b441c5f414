"""Bodies that are read, and those that aren't."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from starlette.requests import Request
from starlette.types import Message

from hippo_mpi.errors import UserError
from hippo_mpi.serving.api.request_bodies import ApiSettings, read_json


def read(data: bytes) -> dict[str, Any]:
    async def receive() -> Message:
        return {"type": "http.request", "body": data}

    return asyncio.run(read_json(Request({"type": "http"}, receive), ApiSettings()))


@pytest.mark.parametrize(("begin", "end", "count"), [("[", "]", 199), ('{"a":', "}", 199), ('[{"b":', "}]", 99)])
def test_bodies_may_be_nested_two_hundred_deep(begin: str, end: str, count: int) -> None:
    """More would fail in a template or in the journal, with the reason nowhere in it."""

    def body(times: int) -> bytes:
        return b'{"x": %b}' % (begin * times + "1" + end * times).encode()

    read(body(count))
    for times in (count + 1, 966, 100_000):
        with pytest.raises(UserError, match=r"^the body is nested more than 200 levels deep$"):
            read(body(times))


def test_bodies_with_much_in_them_are_not_deep() -> None:
    assert len(read(b'{"x": [%b[]]}' % (b'[{"a": 1}], ' * 100_000))["x"]) == 100_001
    assert read(b'{"x": "%b"}' % (b"[" * 300)) == {"x": "[" * 300}


@pytest.mark.parametrize(("data", "why"), [(b"{", "is not JSON"), (b"[]", "must be a JSON object")])
def test_bodies_that_are_no_objects(data: bytes, why: str) -> None:
    with pytest.raises(UserError, match=why):
        read(data)


@pytest.mark.parametrize(
    "data",
    [
        b'{"stop": ["\xed\xa0\x80"]}', b'{"stop": ["\xff"]}',
        *('{"stop": ["a"]}'.encode(encoding) for encoding in ("utf-16", "utf-16-le", "utf-32")),
        '{"stop": ["\ud800"]}'.encode("utf-16-le", "surrogatepass"),
    ],
)  # fmt: skip
def test_texts_that_are_not_utf_8_are_refused(data: bytes) -> None:
    """Python's json takes UTF-16, and half of a surrogate pair in bytes, which nothing can write down afterwards."""
    with pytest.raises(UserError, match="is not JSON in UTF-8"):
        read(data)


def test_half_of_a_surrogate_pair_is_refused() -> None:
    with pytest.raises(UserError, match="unpaired surrogate"):
        read(b'{"stop": ["\\ud800"]}')
    assert read(b'\xef\xbb\xbf{"stop": ["\\ud83d\\ude00"]}') == {"stop": ["\U0001f600"]}
