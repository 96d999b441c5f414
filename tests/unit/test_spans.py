"""Spans of files, and stand-ins that are filled bit by bit."""

from __future__ import annotations

import itertools
import threading
from pathlib import Path

import mlx.core as mx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hippo_mpi.views.spans import (
    Span,
    header_bytes,
    merged,
    num_bytes,
    pieces,
    spans_here,
    spans_of,
    without,
    write_here,
)

SPANS = st.lists(st.tuples(st.integers(0, 60), st.integers(0, 60)), max_size=8)


def bytes_of(spans: list[Span]) -> set[int]:
    return {byte for start, stop in spans for byte in range(start, stop)}


@settings(deadline=None)
@given(SPANS, SPANS, st.integers(1, 20))
def test_spans_are_sets_of_bytes(some: list[Span], others: list[Span], most: int) -> None:
    assert bytes_of(merged(some)) == bytes_of(some)
    left = without(some, merged(others))
    assert bytes_of(left) == bytes_of(some) - bytes_of(others)
    assert num_bytes(left) == len(bytes_of(left))
    assert all(one[1] < other[0] for one, other in itertools.pairwise(left))
    cut = list(pieces(left, most))
    assert bytes_of(cut) == bytes_of(left) and all(0 < stop - start <= most for start, stop in cut)


def test_arrays_are_where_their_spans_say(tmp_path: Path) -> None:
    """A file that has the bytes of one array, and holes, gives that array."""
    real, stand_in = tmp_path / "real.safetensors", tmp_path / "model.safetensors"
    arrays = {f"a{number}": mx.random.normal((number + 1, 7)) for number in range(5)}
    mx.save_safetensors(str(real), arrays)
    data = real.read_bytes()
    stand_in.write_bytes(data[: header_bytes(data)])
    with stand_in.open("r+b") as stream:
        stream.truncate(len(data))
    for start, stop in pieces(spans_of(real, ["a3"]), 10):
        write_here(stand_in, start, data[start:stop])
    assert spans_here(stand_in) == spans_of(stand_in, ["a3"])
    loaded = mx.load(str(stand_in))
    assert isinstance(loaded, dict)
    assert mx.array_equal(loaded["a3"], arrays["a3"]) and not mx.array_equal(loaded["a4"], arrays["a4"])


def test_several_write_at_once(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(bytes(400))
    threads = [
        threading.Thread(target=lambda first=first: [write_here(file, at, b"x" * 10) for at in range(first, 400, 40)])
        for first in (0, 10, 20, 30)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert spans_here(file) == [(0, 400)] and file.read_bytes() == b"x" * 400


@pytest.mark.parametrize("record", ["", "[[1]]", "{", "[[0, null]]"])
def test_a_record_that_is_damaged_means_nothing_is_here(record: str, tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(bytes(8))
    (tmp_path / "model.safetensors.spans").write_text(record)
    assert spans_here(file) == []


@pytest.mark.parametrize("beginning", [b"", b"1234", bytes(8), b"\xff" * 8])
def test_what_is_no_safetensors_file(beginning: bytes) -> None:
    with pytest.raises(ValueError, match="invalid header size of"):
        header_bytes(beginning)
