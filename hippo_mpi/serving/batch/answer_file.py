"""The answers to a batch, in OpenAI's lines: in a file from which the same command goes on, or on standard output."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from hippo_mpi.errors import UserError
from hippo_mpi.serving.batch.batch_file import Task
from hippo_mpi.units import count_of


class Answers(ABC):
    """Where answers go, a line each."""

    def __init__(self) -> None:
        self.done: dict[str, str] = {}  # custom_id -> id of the record, which holds the task's digest

    def write(self, task: Task, response: dict[str, Any] | None, mistake: str = "") -> None:
        """Append a task's answer, or the mistake that prevents one.

        Raises:
            UserError: the disk is full, say; everything before is kept.
        """
        error = None if response else {"code": "invalid_request", "message": mistake, "param": None, "line": task.line}
        body = response and {"status_code": 200, "request_id": response["id"], "body": response}
        record = {"id": _record_id(task), "custom_id": task.custom_id, "response": body, "error": error}
        self._append(task, json.dumps(record, ensure_ascii=False).encode("utf-8", "replace") + b"\n")
        if response:
            self.done[task.custom_id] = _record_id(task)

    @abstractmethod
    def check(self, tasks: Iterable[Task]) -> int:
        """Return the number of tasks, if what is there already answers no other ones."""

    @abstractmethod
    def sort(self, order: Iterable[Task]) -> None:
        """Put the lines into the order of the input."""

    @abstractmethod
    def _append(self, task: Task, line: bytes) -> None: ...


class StandardOutput(Answers):
    """Answers for whoever reads our output; with `keeps_order`, none before the last has been made."""

    def __init__(self, keeps_order: bool) -> None:
        super().__init__()
        self._held: dict[str, bytes] | None = {} if keeps_order else None

    def __str__(self) -> str:
        return "standard output"

    def check(self, tasks: Iterable[Task]) -> int:
        return sum(1 for _ in tasks)

    def sort(self, order: Iterable[Task]) -> None:
        held, self._held = self._held or {}, None
        for task in order:
            self._append(task, held[task.custom_id])

    def _append(self, task: Task, line: bytes) -> None:
        if self._held is not None:
            self._held[task.custom_id] = line
            return
        sys.stdout.buffer.write(line)
        sys.stdout.buffer.flush()


class AnswerFile(Answers):
    """A file of answers, each flushed to disk as it is written.

    What is there already counts as done, but for lines with errors, which are tried again; a torn last line is
    cut off. The options that answers were made with are in a second file beside it, so that lines stay OpenAI's.

    Args:
        options: those that change what an answer is, with their values.
        restart: forget what is there.

    Raises:
        UserError: it can't be read or written, or holds something else, or answers that were made with other options.
    """

    def __init__(self, path: Path, options: Mapping[str, Any], restart: bool = False) -> None:
        super().__init__()
        self._path, self._options_path = path, path.with_name(f"{path.name}.options.json")
        if path.exists() and not path.is_file():
            raise UserError(f"{path} can't be written: it isn't a file")
        try:
            if path.exists() and not restart:
                self._take_over()
            self._keep_options(json.loads(json.dumps(options, default=str)))
            self._stream = path.open("wb" if restart else "ab")
        except OSError as error:
            raise UserError(f"{path} can't be written: {error.strerror}") from None

    def __str__(self) -> str:
        return str(self._path)

    def check(self, tasks: Iterable[Task]) -> int:
        """Return the number of tasks.

        Raises:
            UserError: what is there answers another task under the same custom_id.
        """
        count = 0
        for task in tasks:
            count += 1
            if self.done.get(task.custom_id, _record_id(task)) != _record_id(task):
                raise UserError(
                    f"{self._path} answers another request as {task.custom_id!r} than line {task.line} asks:"
                    " give another --output, or --restart"
                )
        return count

    def _append(self, task: Task, line: bytes) -> None:
        try:
            self._stream.write(line)
            self._stream.flush()
            os.fsync(self._stream.fileno())
        except OSError as problem:
            raise UserError(
                f"{self._path} can't be written: {problem.strerror}; {count_of(len(self.done), 'answer')} in it stay, and"
                " the same command goes on from there"
            ) from None

    def sort(self, order: Iterable[Task]) -> None:
        """Put the lines into the order of the input; lines of other tasks come last."""
        self._stream.close()
        places: dict[str, tuple[int, int]] = {}
        with self._path.open("rb") as old, _replacing(self._path) as new:
            start = 0
            for line in old:
                places[json.loads(line)["custom_id"]] = start, len(line)
                start += len(line)
            for name in (*(task.custom_id for task in order), *places):
                start, length = places.pop(name, (0, 0))
                old.seek(start)
                new.write(old.read(length))

    def _keep_options(self, options: dict[str, Any]) -> None:
        """Write down the options of answers to come, which must be those of the answers that are there."""
        if self.done and (before := _read_options(self._options_path)) is not None:
            names = [name for name in {**before, **options} if before.get(name) != options.get(name)]
            if names:
                old, new = (", ".join(_shown(name, of.get(name)) for name in names) for of in (before, options))
                raise UserError(
                    f"{self._path} has {count_of(len(self.done), 'answer')} that were made {old}, and not {new}:"
                    f" ask {old} again, or give another --output, or --restart"
                )
        with _replacing(self._options_path) as stream:
            stream.write(json.dumps(options, indent=1).encode())

    def _take_over(self) -> None:
        with self._path.open("rb") as old, _replacing(self._path) as new:
            for number, line in enumerate(old, 1):
                record = _read_record(line)
                if record is None and line.endswith(b"\n"):
                    raise UserError(
                        f"{self._path}, line {number}, is no answer of a batch: give another --output, or --restart"
                    )
                if record is not None and record["error"] is None:
                    self.done[record["custom_id"]] = record["id"]
                    new.write(line)


def _record_id(task: Task) -> str:
    return f"batch_req_{task.digest}"


def _read_record(line: bytes) -> dict[str, Any] | None:
    """A line of the output; None for one that is torn, or something else."""
    try:
        record = json.loads(line) if line.endswith(b"\n") else None
    except ValueError:
        return None
    if not isinstance(record, dict) or not {"id", "custom_id", "response", "error"} <= set(record):
        return None
    return record if isinstance(record["custom_id"], str) else None


@contextlib.contextmanager
def _replacing(path: Path) -> Iterator[BinaryIO]:
    """A file that takes the place of `path` once it is whole."""
    temporary = path.with_name(f"{path.name}.new")
    try:
        with temporary.open("wb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _read_options(path: Path) -> dict[str, Any] | None:
    """Read a file of options; None for one that isn't there, or was torn."""
    try:
        found = json.loads(path.read_text())
    except (FileNotFoundError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def _shown(option: str, value: Any) -> str:
    """Say in a command line's words how an option was given."""
    if value in (None, False, []):
        return f"without {option}"
    if value is True:
        return f"with {option}"
    return f"with {option} {shlex.join(map(str, value)) if isinstance(value, list) else shlex.quote(str(value))}"
