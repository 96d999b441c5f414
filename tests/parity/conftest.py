"""What every parity test needs: model types that mlx-lm runs on a GPU only run on a CPU, too."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import mlx.core as mx
import pytest

from tests.parity import tiny_models
from tests.parity.metal_stand_ins import metal_stand_ins


@pytest.fixture(autouse=True)
def stand_ins() -> Iterator[None]:
    tiny_models.allow_olmo()
    with metal_stand_ins() if not mx.metal.is_available() else contextlib.nullcontext():
        yield
