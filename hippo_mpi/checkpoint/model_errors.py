"""Whose mistake it is when mlx-lm can't load or run a model: the checkpoint's, in a line that says what, or ours."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path

from hippo_mpi.errors import ForeignError, HippoError, ModelError, print_traceback

_MOST_CHARACTERS = 300


@contextlib.contextmanager
def loading_errors(path: Path, what: str = "can't be loaded") -> Iterator[None]:
    """Turn what mlx-lm raises for a bad checkpoint into a ModelError, and anything else into a ForeignError."""
    try:
        yield
    except HippoError:
        raise
    except (Exception, SystemExit) as error:  # olmo's file ends the program if a package is missing
        if why := _fault_of_checkpoint(error):
            print_traceback(error)
            raise ModelError(f"{path} {what}: {why}") from error
        raise ForeignError.caused_by(error, f"{path} {what}") from error


@contextlib.contextmanager
def running_errors(path: Path) -> Iterator[None]:
    """Turn what a model's own code raises while it is run into a ForeignError: its checkpoint was good enough to load."""
    try:
        yield
    except HippoError:
        raise
    except Exception as error:
        if "No Metal back-end" in str(error):
            raise ModelError(f"{path} can't be run here: its model type has kernels for Apple's GPUs only") from error
        raise ForeignError.caused_by(error, f"{path} can't be run") from error


def _fault_of_checkpoint(error: BaseException) -> str | None:
    """Say what is wrong with the checkpoint, or with what is installed for it; None if it needn't be either's fault."""
    text = " ".join(str(error).split())
    missing = error if isinstance(error, ImportError) else error.__cause__
    if isinstance(missing, ImportError) and not (missing.name or "").startswith("mlx_lm.models"):
        return f"its model type needs the package {missing.name}, which isn't installed"
    if isinstance(error, SystemExit):
        return "its model type needs a package that isn't installed"
    if isinstance(error, KeyError):
        return f"it lacks {text}"
    if isinstance(error, TypeError) and (lacking := re.search(r"__init__\(\) missing \d+ .*arguments?: (.*)", text)):
        return f"config.json lacks {lacking[1]}"
    if isinstance(error, OSError | ValueError | RuntimeError):  # mlx-lm's own checks, and MLX's of files
        return text if len(text) <= _MOST_CHARACTERS else f"{text[:_MOST_CHARACTERS]} ..."
    return None
