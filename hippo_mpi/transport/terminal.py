"""A terminal whose settings are changed for a while, and put back however this process ends."""

from __future__ import annotations

import contextlib
import os
import signal
import termios
from collections.abc import Iterator, Mapping
from typing import Any

_changed: list[tuple[int, list[Any]]] = []  # the descriptor of a terminal, and its settings before


def open_standard_streams() -> None:
    """Put /dev/null where a standard stream is closed: else the next file, or socket, takes its place."""
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest that is free: this one


@contextlib.contextmanager
def changed_terminal(descriptor: int, characters: Mapping[int, bytes]) -> Iterator[None]:
    """Give a terminal other control characters (none: whatever else changes it, such as readline) during the block."""
    settings = termios.tcgetattr(descriptor)
    _changed.append((descriptor, settings))
    changed = [*settings[:6], [*settings[6]]]
    for index, character in characters.items():
        changed[6][index] = character
    previous = signal.signal(signal.SIGTERM, _end)
    _set(descriptor, changed)
    try:
        yield
    finally:
        put_back_terminal()
        signal.signal(signal.SIGTERM, previous)


@contextlib.contextmanager
def kept_terminal() -> Iterator[None]:
    """Put our terminal back after the block, whatever processes that are gone have made of it."""
    settings = termios.tcgetattr(0) if os.isatty(0) else None
    try:
        yield
    finally:
        with contextlib.suppress(OSError):  # the terminal is gone, or isn't this session's
            if settings and _is_foreground_ours():
                set_foreground(os.getpgrp())
                _set(0, settings)


def set_foreground(group: int) -> None:
    """Make a process group the one that reads from our terminal and gets its Ctrl-C."""
    with _allowed_in_background(), contextlib.suppress(OSError):
        os.tcsetpgrp(0, group)


def _is_foreground_ours() -> bool:
    """Whether nobody else uses our terminal: its group is our own, or none that lives."""
    group = os.tcgetpgrp(0)
    if group == os.getpgrp():
        return True
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        pass
    return False


def put_back_terminal() -> None:
    """Undo what was changed; for those who end this process at once, from any thread."""
    while _changed:
        _set(*_changed.pop())


def _end(number: int, frame: object) -> None:
    put_back_terminal()
    signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)


def _set(descriptor: int, settings: list[Any]) -> None:
    with _allowed_in_background(), contextlib.suppress(termios.error):  # the terminal is gone
        termios.tcsetattr(descriptor, termios.TCSANOW, settings)


@contextlib.contextmanager
def _allowed_in_background() -> Iterator[None]:
    """A process in the background may change its terminal only while SIGTTOU is blocked."""
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTTOU})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
