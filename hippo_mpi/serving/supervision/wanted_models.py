"""Models that are to be loaded though no request asks for them, and those who wait for it."""

from __future__ import annotations

import asyncio

from hippo_mpi.errors import UserError


class WantedModels:
    """Who waits for which model, in order of arrival."""

    def __init__(self) -> None:
        self._waiting: list[tuple[str, asyncio.Future[None]]] = []

    @property
    def names(self) -> list[str]:
        """The models that somebody still waits for."""
        self._waiting = [(name, loaded) for name, loaded in self._waiting if not loaded.done()]  # some have gone
        return [name for name, _ in self._waiting]

    def add(self, model: str) -> asyncio.Future[None]:
        """Return what is done once the model is loaded, or can't be."""
        loaded: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append((model, loaded))
        return loaded

    def answer(self, model: str, error: UserError | None = None) -> None:
        """Tell those who wait for a model that it is loaded, or why it can't be."""
        for name, loaded in self._waiting:
            if name == model and not loaded.done():
                if error is None:
                    loaded.set_result(None)
                else:
                    loaded.set_exception(error)
        self._waiting = [(name, loaded) for name, loaded in self._waiting if name != model]
