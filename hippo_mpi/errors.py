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
import traceback
from importlib.metadata import requires

INTERRUPTED = 130
"""Exit status after Ctrl-C, as shells have it."""
UNREAD = 141
"""Exit status after SIGPIPE, as shells have it."""
_LAST_WORDS_MS = 1000  # for a full pipe to be read


class HippoError(Exception):
    exit_code = 1


class ForeignError(HippoError):
    """MLX, mlx-lm or Python raised what nobody expected: our mistake, as long as nobody knows better."""

    @classmethod
    def caused_by(cls, error: BaseException, what: str = "") -> ForeignError:
        """Say `what` failed and how, and ask for a report; HIPPO_TRACEBACK=1 prints the traceback."""
        print_traceback(error)
        text = ": ".join(part for part in (what, type(error).__name__, " ".join(str(error).split())) if part)
        return cls(f"{text}; please report this, with what HIPPO_TRACEBACK=1 prints")


class UserError(HippoError):
    exit_code = 2


class ModelError(UserError):
    pass


class PlanError(UserError):
    pass


class LaunchError(UserError):
    pass


class FieldError(UserError):
    def __init__(self, field: str, message: str) -> None:
        super().__init__(message)
        self.field = field.encode("utf-8", "replace").decode()  # a body's own word may hold half a surrogate pair


class ContextError(UserError):
    def __init__(self, prompt_tokens: int, max_context: int) -> None:
        super().__init__(  # with words and digits that clients look for
            f"the prompt has {prompt_tokens} tokens, but this model's maximum context length is {max_context} tokens"
            " (--max-context): make it shorter"
        )
        self.prompt_tokens, self.max_context = prompt_tokens, max_context


class RankError(HippoError):
    exit_code = 3


class DesyncError(RankError):
    pass


def interrupted() -> HippoError:
    """Return the error of a run that a Ctrl-C has ended."""
    error = HippoError("left by Ctrl-C")
    error.exit_code = INTERRUPTED
    return error


def unread() -> HippoError:
    """Return the error of a run whose reader has had enough (`| head`)."""
    error = HippoError("nobody reads the answer any more")
    error.exit_code = UNREAD
    return error


def print_traceback(error: BaseException) -> None:
    """Print where an error comes from, if HIPPO_TRACEBACK asks for it."""
    if os.environ.get("HIPPO_TRACEBACK"):
        traceback.print_exception(error)


def install_hint(extra: str) -> str:
    """Return the pip command that installs what one of our extras lists, by the packages' own names.

    It works wherever hippo-mpi came from.
    """
    ends = (f"extra == '{extra}'", f'extra == "{extra}"')  # build backends differ
    listed = [line.partition(";")[0].strip() for line in requires("hippo-mpi") or () if line.endswith(ends)]
    return f"pip install {shlex.join(listed)}"


def print_error(line: str, starts_anew: bool = False) -> None:
    """Write one line on stderr, a new one if asked. Nobody may be left to read it: that never raises, nor waits for long."""
    data = f"{chr(10) * starts_anew}error: {line}\n".encode()
    with contextlib.suppress(OSError, ValueError):  # it is closed
        ready = select.poll()
        ready.register(2, select.POLLOUT)
        while data and ready.poll(_LAST_WORDS_MS):
            data = data[os.write(2, data[: select.PIPE_BUF]) :]  # so much doesn't wait, if anything doesn't
