"""Whose mistake it is when a model can't be loaded: what the user can mend, and what should be reported."""

from __future__ import annotations

from pathlib import Path

import pytest

from hippo_mpi.checkpoint.model_errors import loading_errors, running_errors
from hippo_mpi.errors import ForeignError, HippoError, ModelError

PATH = Path("somewhere")


def loaded(error: BaseException) -> HippoError:
    with pytest.raises(HippoError) as caught, loading_errors(PATH):
        raise error
    return caught.value


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("Missing 3 parameters: \n a, b, c"), "somewhere can't be loaded: Missing 3 parameters: a, b, c"),
        (RuntimeError("[load_safetensors] Invalid json header length"), "Invalid json header"),
        (FileNotFoundError(2, "No such file", "adapters"), "No such file"),
        (KeyError("model.layers.0.mlp.weight"), "somewhere can't be loaded: missing key 'model.layers.0.mlp.weight'"),
        (ModuleNotFoundError("No module", name="hf_olmo"), "needs the package hf_olmo, which isn't installed"),
        (SystemExit(1), "needs a package that isn't installed"),
        (
            TypeError("ModelArgs.__init__() missing 2 required positional arguments: 'vocab_size' and 'n_layers'"),
            "config.json is missing 'vocab_size' and 'n_layers'",
        ),
    ],
)
def test_the_checkpoint_s(error: BaseException, line: str) -> None:
    found = loaded(error)
    assert isinstance(found, ModelError) and found.exit_code == 2
    assert line in str(found) and "\n" not in str(found)


@pytest.mark.parametrize(
    "error", [TypeError("nanobind: incompatible arguments"), AttributeError("no such"), IndexError()]
)
def test_ours(error: Exception) -> None:
    found = loaded(error)
    assert isinstance(found, ForeignError) and found.exit_code == 1
    name = type(error).__name__
    assert str(found).startswith(f"somewhere can't be loaded: {name}")
    assert str(found).endswith("; please report this with the traceback that HIPPO_TRACEBACK=1 prints")


def test_an_unknown_type_is_no_missing_package() -> None:
    """mlx-lm says the same of both; what it caught tells them apart."""
    for module, line in (("mlx_lm.models.nonesuch", "type nonesuch not supported"), ("hf_olmo", "the package hf_olmo")):
        error = ValueError("Model type nonesuch not supported.")
        error.__cause__ = ModuleNotFoundError("No module", name=module)
        assert line in str(loaded(error))


def test_running() -> None:
    for error, kind in (
        (ValueError("shapes"), ForeignError),
        (RuntimeError("[metal_kernel] No Metal back-end."), ModelError),
    ):
        with pytest.raises(kind), running_errors(PATH):
            raise error
