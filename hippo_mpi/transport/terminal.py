"""Temporary changes of a terminal's settings, restored however this process ends."""

from __future__ import annotations

import contextlib
import os
import signal
import termios
from collections.abc import Iterator, Mapping
from typing import Any

_changed: list[tuple[int, list[Any]]] = []  # descriptors of terminals, with their original settings


def open_standard_streams() -> None:
    """Open /dev/null for each closed standard stream; otherwise the next file or socket would get its descriptor."""
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest free descriptor: this one


@contextlib.contextmanager
def changed_terminal(descriptor: int, characters: Mapping[int, bytes]) -> Iterator[None]:
    """Give a terminal other control characters during the block, and restore all of its settings afterwards.

    Args:
        descriptor: the terminal.
        characters: by index (`termios.VEOF` ...); may be empty if something else, such as readline, changes settings.
    """
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
    """Restore our terminal after the block from whatever state ended processes have left it in."""
    settings = termios.tcgetattr(0) if os.isatty(0) else None
    try:
        yield
    finally:
        with contextlib.suppress(OSError):  # the terminal is gone, or isn't this session's
            if settings and _is_foreground_ours():
                set_foreground(os.getpgrp())
                _set(0, settings)


def set_foreground(group: int) -> None:
    """Make a process group the foreground group of our terminal, which reads from it and gets its Ctrl-C."""
    with _allowed_in_background(), contextlib.suppress(OSError):
        os.tcsetpgrp(0, group)


def _is_foreground_ours() -> bool:
    """True if nobody else uses our terminal: its foreground group is our own, or has no living process."""
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
    """Restore all changed terminals; for code that ends this process at once, from any thread."""
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
    """Block SIGTTOU during the block, without which a background process can't change its terminal."""
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTTOU})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
