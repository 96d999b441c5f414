"""A terminal whose settings are changed for a while, and put back however this process ends."""

from __future__ import annotations

import contextlib
import os
import signal
import termios
from collections.abc import Iterator, Mapping
from typing import Any

_changed: list[tuple[int, list[Any]]] = []  # the descriptor of a terminal, and its settings before


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
    """Put our terminal back after the block, if it is ours then, whatever another process has made of it."""
    settings = termios.tcgetattr(0) if os.isatty(0) else None
    try:
        yield
    finally:
        if settings and os.isatty(0) and os.tcgetpgrp(0) == os.getpgrp():
            _set(0, settings)


def put_back_terminal() -> None:
    """Undo what was changed; for those who end this process at once, from any thread."""
    while _changed:
        _set(*_changed.pop())


def _end(number: int, frame: object) -> None:
    put_back_terminal()
    signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)


def _set(descriptor: int, settings: list[Any]) -> None:
    """A process in the background may do so only while SIGTTOU is blocked."""
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTTOU})
    try:
        with contextlib.suppress(termios.error):  # the terminal is gone
            termios.tcsetattr(descriptor, termios.TCSANOW, settings)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
