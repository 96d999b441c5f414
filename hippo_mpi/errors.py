"""Everything that can go wrong, as a tree. `exit_code` is the status with which every rank ends.

HippoError                 one clear line for the user, no traceback
|-- ForeignError    1      something below us raised what nobody expected
|-- UserError       2      something that was typed or configured
|   |-- ModelError         the checkpoint can't be used
|   |-- PlanError          the layers don't fit the ranks or their memory
|   |-- LaunchError        the ranks don't form one world
|   |-- FieldError         a field of a request's body; `field` is its name
|   `-- ContextError       a prompt that leaves no room for an answer
`-- RankError       3      a rank failed, fell silent, or lost its link
    `-- DesyncError        a rank got another step than it expected
"""

from __future__ import annotations

import contextlib
import os
import select
import shlex
import shutil
import sys
import time
import traceback
from importlib.metadata import requires
from pathlib import Path

from hippo_mpi.environment import LOG_LINES, TRACEBACK

INTERRUPTED = 130
"""Exit status after Ctrl-C, as shells have it."""
UNREAD = 141
"""Exit status after SIGPIPE, as shells have it."""
LOG_TIME = "%Y-%m-%d %H:%M:%S"
"""Format of the times in a server's log."""
_PIPE_TIMEOUT_MS = 1000  # for the reader of a full pipe to make room for the last error line


def printable(text: str) -> str:
    """Return a text with bytes that weren't UTF-8 escaped, so that it can be printed, sent and compared."""
    return text.encode(errors="backslashreplace").decode()


class HippoError(Exception):
    """The base of all errors that are shown to the user as one line, without a traceback."""

    exit_code = 1

    def __str__(self) -> str:
        """Return the line, in characters that can be written: names of files may hold bytes that aren't UTF-8."""
        return printable(super().__str__())


class ForeignError(HippoError):
    """An unexpected error of MLX, mlx-lm or Python; treated as a bug of this project until shown otherwise."""

    @classmethod
    def caused_by(cls, error: BaseException, what: str = "") -> ForeignError:
        """Say `what` failed and how, and ask for a report; HIPPO_TRACEBACK=1 prints the traceback."""
        print_traceback(error)
        text = ": ".join(part for part in (what, type(error).__name__, " ".join(str(error).split())) if part)
        return cls(f"{text}; please report this with the traceback that HIPPO_TRACEBACK=1 prints")


class UserError(HippoError):
    """A mistake in the user's input or configuration."""

    exit_code = 2


class ModelError(UserError):
    """A checkpoint that can't be used."""


class PlanError(UserError):
    """Layers that don't fit the ranks or their memory."""


class LaunchError(UserError):
    """Ranks that don't form one world, or hosts on which they can't start."""


class FieldError(UserError):
    """An invalid field of a request's body; `field` is its name."""

    def __init__(self, field: str, message: str) -> None:
        super().__init__(message)
        self.field = field.encode("utf-8", "replace").decode()  # names from a body may hold half a surrogate pair


class ContextError(UserError):
    """A prompt that leaves no room for an answer; its length and the maximum are in tokens."""

    def __init__(self, prompt_tokens: int, max_context: int) -> None:
        super().__init__(  # clients search the text for "maximum context length" and for plain digits
            f"the prompt has {prompt_tokens} tokens, but this model's maximum context length is {max_context} tokens"
            " (--max-context): make it shorter"
        )
        self.prompt_tokens, self.max_context = prompt_tokens, max_context


class RankError(HippoError):
    """A rank that failed, fell silent, or lost its link."""

    exit_code = 3


class DesyncError(RankError):
    """A rank that received another step than it expected."""


def error_with_status(exit_code: int, line: str) -> HippoError:
    """Return an error of another process, of the kind that has this exit status."""
    kinds: tuple[type[HippoError], ...] = (ForeignError, UserError, RankError)
    error = next((kind for kind in kinds if kind.exit_code == exit_code), HippoError)(line)
    error.exit_code = exit_code
    return error


def interrupted() -> HippoError:
    """Return the error of a run that was ended by Ctrl-C."""
    error = HippoError("interrupted by Ctrl-C")
    error.exit_code = INTERRUPTED
    return error


def unread() -> HippoError:
    """Return the error of a run whose output pipe was closed by its reader (`| head`)."""
    error = HippoError("broken pipe: the reader closed the output")
    error.exit_code = UNREAD
    return error


def print_traceback(error: BaseException) -> None:
    """Print the traceback of an error if HIPPO_TRACEBACK is set."""
    if os.environ.get(TRACEBACK):
        traceback.print_exception(error)


def install_hint(extra: str) -> str:
    """Return the pip command that installs the requirements of one of our extras.

    It names the packages themselves, so that it works wherever hippo-mpi was installed from, and the pip of this Python.
    """
    ends = (f"extra == '{extra}'", f'extra == "{extra}"')  # build backends differ
    listed = [line.partition(";")[0].strip() for line in requires("hippo-mpi") or () if line.endswith(ends)]
    own = Path(sys.executable).with_name("pip")
    is_first = shutil.which("pip") == str(own) or not own.exists()
    pip = "pip" if is_first else str(own.relative_to(Path.cwd()) if own.is_relative_to(Path.cwd()) else own)
    return f"{shlex.quote(pip)} install {shlex.join(listed)}"


def print_error(line: str, starts_anew: bool = False) -> None:
    """Write one error line to stderr, after a newline if `starts_anew`.

    Never raises; if stderr is a full pipe that nobody reads, gives up after a second.
    """
    data = f"{chr(10) * starts_anew}{_error_prefix()}: {line}\n".encode()
    with contextlib.suppress(OSError, ValueError):  # stderr is closed
        ready = select.poll()
        ready.register(2, select.POLLOUT)
        while data and ready.poll(_PIPE_TIMEOUT_MS):
            data = data[os.write(2, data[: select.PIPE_BUF]) :]  # no more than a writable pipe takes without blocking


def _error_prefix() -> str:
    """Return what an error line begins with; in a server's log its time, level and rank."""
    if LOG_LINES not in os.environ:
        return "error"
    rank = next((os.environ[name] for name in ("MLX_RANK", "OMPI_COMM_WORLD_RANK") if name in os.environ), None)
    return f"{time.strftime(LOG_TIME)} ERROR {'starter' if rank is None else f'rank {rank}'}"
