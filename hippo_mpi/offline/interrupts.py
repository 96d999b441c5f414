"""Ctrl-C in a conversation: during an answer it ends the answer; a second one, or one at the prompt, ends the chat."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator


class Interrupts:
    """A handler of SIGINT for the rest of the process.

    At the prompt, SIGINT raises KeyboardInterrupt. During an answer the main thread may be inside MLX, where no Python
    signal handler runs; so a thread counts the bytes that the signal writes to a wakeup pipe.

    Args:
        leave: called by that thread at the second Ctrl-C during an answer; ends the process.
    """

    def __init__(self, leave: Callable[[], None]) -> None:
        self.is_stopped = False  # Ctrl-C was pressed during the current answer
        self._is_asking = False
        self._leave = leave
        self._read, write = os.pipe()
        os.set_blocking(write, False)
        signal.set_wakeup_fd(write)
        signal.signal(signal.SIGINT, self._handle)
        threading.Thread(target=self._count, name="hippo-interrupts", daemon=True).start()

    @contextlib.contextmanager
    def asking(self) -> Iterator[None]:
        """Let SIGINT raise KeyboardInterrupt in the block, where the user is asked; outside it an answer is made."""
        self._is_asking = True
        try:
            yield
        finally:
            self._is_asking = self.is_stopped = False

    def _handle(self, number: int, frame: object) -> None:
        if self._is_asking:
            raise KeyboardInterrupt

    def _count(self) -> None:
        while True:
            if os.read(self._read, 1)[0] == signal.SIGINT and not self._is_asking:
                if self.is_stopped:
                    self._leave()
                self.is_stopped = True
