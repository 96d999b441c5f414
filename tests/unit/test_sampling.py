"""What is told of tokens that were chosen."""

from __future__ import annotations

import math

import mlx.core as mx
import msgspec
import pytest

from hippo_mpi.engine.sampling import _tell


@pytest.mark.parametrize("odd", [math.nan, -math.inf])
def test_log_probabilities_can_always_be_written(odd: float) -> None:
    """A forbidden token has none, and a model whose numbers overflow has NaN: JSON has neither."""
    told = _tell(mx.array([odd, -0.5, odd]), 0, 3)
    assert told.chosen == -9999.0
    assert msgspec.json.decode(msgspec.json.encode(told), type=type(told)) == told
