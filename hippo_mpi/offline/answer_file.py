"""The answers to a batch as OpenAI's batch output lines: in a file that an interrupted run resumes, or on stdout."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import sys
from abc import ABC, abstractmethod
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from hippo_mpi.durable_files import FileLock, replacing, sync_folder
from hippo_mpi.errors import UserError
from hippo_mpi.offline.batch_file import Task
from hippo_mpi.units import count_of


class Answers(ABC):
    """A destination of answers, one line each."""

    def __init__(self) -> None:
        self.done: dict[str, str] = {}  # custom_id -> id of the record, which contains the task's digest

    def write(self, task: Task, response: dict[str, Any] | None, mistake: str = "") -> None:
        """Append a task's answer, or the mistake that prevents one.

        Raises:
            UserError: it can't be written, for example to a full disk; earlier answers are kept.
            BrokenPipeError: nobody reads standard output any more.
        """
        error = None if response else {"code": "invalid_request", "message": mistake, "param": None, "line": task.line}
        body = response and {"status_code": 200, "request_id": response["id"], "body": response}
        record = {"id": _record_id(task), "custom_id": task.custom_id, "response": body, "error": error}
        self._append(task, json.dumps(record, ensure_ascii=False).encode("utf-8", "replace") + b"\n")
        if response:
            self.done[task.custom_id] = _record_id(task)

    def is_done(self, task: Task) -> bool:
        """Return whether a task has its answer; an invalid task never has."""
        return task.asked is not None and task.custom_id in self.done

    @abstractmethod
    def check(self, tasks: Iterable[Task]) -> int:
        """Return the number of tasks, after checking that the answers so far are to these tasks.

        Raises:
            UserError: they aren't.
        """

    @abstractmethod
    def sort(self, order: Iterable[Task]) -> None:
        """Put the lines into the order of the input; to be called when all have been written.

        Raises:
            UserError: they can't be written.
        """

    @abstractmethod
    def close(self) -> None:
        """Release the destination, so that others may write it."""

    @abstractmethod
    def _append(self, task: Task, line: bytes) -> None: ...


class StandardOutput(Answers):
    """Answers on standard output.

    Args:
        keeps_order: hold all answers back until `sort`; otherwise each is written at once.
    """

    def __init__(self, keeps_order: bool) -> None:
        super().__init__()
        self._held: dict[str, bytes] | None = {} if keeps_order else None

    def __str__(self) -> str:
        return "standard output"

    def check(self, tasks: Iterable[Task]) -> int:
        """Return the number of tasks."""
        return sum(1 for _ in tasks)

    def sort(self, order: Iterable[Task]) -> None:
        """Write the answers that were held back, in the order of the input."""
        held, self._held = self._held or {}, None
        for task in order:
            self._append(task, held.pop(task.custom_id, b""))

    def close(self) -> None:
        """Do nothing: standard output stays open."""

    def _append(self, task: Task, line: bytes) -> None:
        if self._held is not None:
            self._held[task.custom_id] = line
            return
        try:
            sys.stdout.buffer.write(line)
            sys.stdout.buffer.flush()
        except BrokenPipeError:
            raise  # the reader has closed the pipe, which is no mistake
        except OSError as error:
            raise UserError(f"{self} can't be written: {error.strerror}") from None


class AnswerFile(Answers):
    """A file of answers, locked until it is closed; each answer is synced to disk when it is written.

    Answers that the file already has count as done, except lines with errors, whose tasks are tried again; an
    incomplete last line is cut off. The options that answers were made with are in a second file beside it, so that
    the lines stay in OpenAI's format.

    Args:
        path: of the file.
        options: those that affect answers, with their values.
        restart: discard what the file has.

    Raises:
        UserError: the file can't be read or written, is being written by another process, is no file of answers, or has
            answers that were made with other options.
    """

    def __init__(self, path: Path, options: Mapping[str, Any], restart: bool = False) -> None:
        super().__init__()
        self._name, path = str(path), path.resolve()  # replacing the file keeps a link to it
        self._path, self._options_path = path, path.with_name(f"{path.name}.options.json")
        if path.exists() and not path.is_file():
            raise UserError(f"{self} can't be written: it isn't a regular file")
        try:
            self._lock = FileLock(path)
            try:
                self._open(json.loads(json.dumps(options, default=str)), restart)
            except BaseException:
                self._lock.release()
                raise
        except OSError as error:
            raise UserError(f"{self} can't be written: {error.strerror}") from None

    def __str__(self) -> str:
        return self._name

    def _open(self, options: dict[str, Any], restart: bool) -> None:
        if restart:  # before the options are written: a kill between must not leave old answers with new options
            self._path.write_bytes(b"")
        elif self._path.exists():
            self._take_over()
        self._keep_options(options)
        self._stream = self._path.open("ab", buffering=0)
        sync_folder(self._path.parent)

    def close(self) -> None:
        """Close the file and release its lock."""
        self._stream.close()
        self._lock.release()

    def check(self, tasks: Iterable[Task]) -> int:
        """Return the number of tasks, after checking that the answers so far are to these tasks.

        Answers to tasks whose lines have moved, and whose generated custom_ids have changed with that, are renamed.

        Raises:
            UserError: the file answers another task under the same custom_id, or can't be rewritten.
        """
        count, in_place, kept = 0, set(), set(self.done.values())
        moved: list[tuple[str, str]] = []  # (record, custom_id) of tasks that may have had another custom_id
        taken: dict[str, int] = {}  # custom_id that another task's answer has -> line
        for task in tasks:
            count += 1
            if task.asked is None:
                continue
            if self.done.get(task.custom_id) == _record_id(task):
                in_place.add(task.custom_id)
                continue
            if _record_id(task) in kept:
                moved.append((_record_id(task), task.custom_id))
            if task.custom_id in self.done:
                taken[task.custom_id] = task.line
        names = self._new_names(moved, in_place)
        for custom_id, line in taken.items():
            if custom_id not in names:
                raise UserError(
                    f"{self} has an answer {custom_id!r} to a different request than line {line}:"
                    " give another --output, or --restart"
                )
        if names:
            self._rename(names)
        return count

    def _new_names(self, moved: list[tuple[str, str]], in_place: set[str]) -> dict[str, str]:
        """Return old custom_id -> new custom_id for answers whose tasks now have another one."""
        displaced: defaultdict[str, deque[str]] = defaultdict(deque)
        for custom_id, record in self.done.items():
            if custom_id not in in_place:
                displaced[record].append(custom_id)
        return {displaced[record].popleft(): custom_id for record, custom_id in moved if displaced[record]}

    def _rename(self, names: dict[str, str]) -> None:
        def renamed(line: bytes) -> bytes:
            record = json.loads(line)
            name = names.get(record["custom_id"])
            if name is None:
                return line
            return json.dumps({**record, "custom_id": name}, ensure_ascii=False).encode("utf-8", "replace") + b"\n"

        try:
            self._stream.close()
            self._rewrite(renamed)
            self._stream = self._path.open("ab", buffering=0)
        except OSError as error:
            raise UserError(f"{self} can't be written: {error.strerror}") from None
        self.done = {names.get(custom_id, custom_id): record for custom_id, record in self.done.items()}

    def _rewrite(self, changed: Callable[[bytes], bytes]) -> None:
        with self._path.open("rb") as old, replacing(self._path) as new:
            new.writelines(map(changed, old))

    def _append(self, task: Task, line: bytes) -> None:
        end = self._stream.tell()
        try:
            while line:
                line = line[self._stream.write(line) :]
            os.fsync(self._stream.fileno())
        except OSError as problem:
            with contextlib.suppress(OSError):
                self._stream.truncate(end)
            raise UserError(
                f"{self} can't be written: {problem.strerror}; {count_of(len(self.done), 'answer')} kept, and"
                " the same command continues from there"
            ) from None

    def sort(self, order: Iterable[Task]) -> None:
        """Put the lines into the order of the input; lines of other tasks come last.

        Raises:
            UserError: the file can't be written, for example on a full disk; it stays as it was.
        """
        places: defaultdict[str, list[tuple[int, int]]] = defaultdict(list)
        try:
            with self._path.open("rb") as old, replacing(self._path) as new:
                start = 0
                for line in old:
                    places[json.loads(line)["custom_id"]].append((start, len(line)))
                    start += len(line)
                for name in (*(task.custom_id for task in order), *places):
                    for start, length in places.pop(name, ()):
                        old.seek(start)
                        new.write(old.read(length))
        except OSError as error:
            raise UserError(
                f"{self} can't be sorted into the order of the prompts: {error.strerror};"
                f" {count_of(len(self.done), 'answer')} kept, and the same command sorts them once there is space"
            ) from None

    def _keep_options(self, options: dict[str, Any]) -> None:
        """Write the options to their file, after checking that the answers so far were made with the same ones."""
        before = _read_options(self._options_path) if self.done else options
        if before is None:
            sys.stderr.write(
                f"note: {self} has {count_of(len(self.done), 'answer')} made with unknown options:"
                f" {self._options_path.name} is missing\n"
            )
        elif names := [name for name in {**before, **options} if before.get(name) != options.get(name)]:
            old, new = (", ".join(_shown(name, of.get(name)) for name in names) for of in (before, options))
            raise UserError(
                f"{self} has {count_of(len(self.done), 'answer')} made {old}, not {new}:"
                " give the same options again, or another --output, or --restart"
            )
        with replacing(self._options_path) as stream:
            stream.write(json.dumps(options, indent=1).encode())

    def _take_over(self) -> None:
        """Count the file's answers as done, and remove lines with errors and an incomplete last line."""
        is_whole = True
        with self._path.open("rb") as stream:
            for number, line in enumerate(stream, 1):
                record = _read_record(line)
                if record is None and line.endswith(b"\n"):
                    raise UserError(
                        f"{self}, line {number}, is not a batch answer: give another --output, or --restart"
                    )
                if record is not None and record["error"] is None:
                    self.done[record["custom_id"]] = record["id"]
                else:
                    is_whole = False
        if not is_whole:
            self._rewrite(lambda line: line if (record := _read_record(line)) and record["error"] is None else b"")


def _record_id(task: Task) -> str:
    return f"batch_req_{task.digest}"


def _read_record(line: bytes) -> dict[str, Any] | None:
    """Parse a line of the file; None if it is incomplete or no answer."""
    try:
        record = json.loads(line) if line.endswith(b"\n") else None
    except ValueError:
        return None
    if not isinstance(record, dict) or not {"id", "custom_id", "response", "error"} <= set(record):
        return None
    return record if isinstance(record["custom_id"], str) else None


def _read_options(path: Path) -> dict[str, Any] | None:
    """Read a file of options; None if it is missing or incomplete."""
    try:
        options = json.loads(path.read_text())
    except (FileNotFoundError, ValueError):
        return None
    return options if isinstance(options, dict) else None


def _shown(option: str, value: Any) -> str:
    """Return a phrase that says how an option was given, quoted as on a command line."""
    if value in (None, False, []):
        return f"without {option}"
    if value is True:
        return f"with {option}"
    return f"with {option} {shlex.join(map(str, value)) if isinstance(value, list) else shlex.quote(str(value))}"
