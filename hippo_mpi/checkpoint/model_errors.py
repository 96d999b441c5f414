"""Decides whether the checkpoint or the program is at fault when mlx-lm can't load or run a model."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path

from hippo_mpi.errors import ForeignError, HippoError, ModelError, print_traceback

_MAX_CHARACTERS = 300


@contextlib.contextmanager
def loading_errors(path: Path, what: str = "can't be loaded") -> Iterator[None]:
    """Convert exceptions of mlx-lm in the block: a bad checkpoint's to a ModelError, any other to a ForeignError.

    Args:
        path: of the checkpoint, for the message.
        what: the message's verb.

    Raises:
        ModelError: the checkpoint is at fault; one line says what is wrong.
        ForeignError: anything else was raised.
    """
    try:
        yield
    except HippoError:
        raise
    except (Exception, SystemExit) as error:  # olmo's module exits if a package is missing
        if why := _fault_of_checkpoint(error):
            print_traceback(error)
            raise ModelError(f"{path} {what}: {why}") from error
        raise ForeignError.caused_by(error, f"{path} {what}") from error


@contextlib.contextmanager
def running_errors(path: Path) -> Iterator[None]:
    """Convert exceptions that a model's own code raises in the block, after its checkpoint has been loaded.

    Raises:
        ModelError: the model type runs on Apple's GPUs only.
        ForeignError: anything else was raised.
    """
    try:
        yield
    except HippoError:
        raise
    except Exception as error:
        if "No Metal back-end" in str(error):
            raise ModelError(f"{path} can't be run here: its model type has kernels for Apple GPUs only") from error
        raise ForeignError.caused_by(error, f"{path} can't be run") from error


def _fault_of_checkpoint(error: BaseException) -> str | None:
    """Return what is wrong with the checkpoint, or which package is missing; None if it may be neither."""
    text = " ".join(str(error).split())
    missing = error if isinstance(error, ImportError) else error.__cause__
    if isinstance(missing, ImportError) and not (missing.name or "").startswith("mlx_lm.models"):
        return f"its model type needs the package {missing.name}, which isn't installed"
    if isinstance(error, SystemExit):
        return "its model type needs a package that isn't installed"
    if isinstance(error, KeyError):
        return f"missing key {text}"
    if isinstance(error, TypeError) and (lacking := re.search(r"__init__\(\) missing \d+ .*arguments?: (.*)", text)):
        return f"config.json is missing {lacking[1]}"
    if isinstance(error, OSError | ValueError | RuntimeError):  # mlx-lm's own checks, and MLX's of files
        return text if len(text) <= _MAX_CHARACTERS else f"{text[:_MAX_CHARACTERS]} ..."
    return None
