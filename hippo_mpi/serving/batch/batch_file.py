"""Batch prompt files: what is asked, line by line, and the answers, line by line.

Input is recognised by its content: OpenAI batch lines, short JSON lines ({"prompt": ...} or {"messages": [...]}),
or plain text, a prompt a line; a job script (#!) carries options in #HIPPO lines in front of any of them. Files are
read as needed. Output lines are OpenAI's, each on disk when its request ends.
"""

from __future__ import annotations

import codecs
import contextlib
import hashlib
import json
import os
import shlex
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

from hippo_mpi.engine.request import SamplingParams
from hippo_mpi.errors import UserError
from hippo_mpi.serving.protocols.openai_requests import CHAT, COMPLETION, Asked, read_body

_MAX_LINE_BYTES = 64 << 20


@dataclass(frozen=True)
class Task:
    """One line of the input: what it asks, or why it can't be answered."""

    line: int  # counted from 1
    custom_id: str
    digest: str  # of the line: tells another request with the same custom_id
    asked: Asked | None
    mistake: str = ""


def job_options(path: Path) -> list[str]:
    """The options of a job script's #HIPPO lines; none for other files.

    Raises:
        UserError: the file can't be read, or a quote isn't closed.
    """
    found: list[str] = []
    for number, line in _lines(path):
        if number == 1 and not line.startswith(b"#!"):
            return []
        if line.strip() and not line.startswith(b"#"):
            break
        if line.startswith(b"#HIPPO"):
            try:
                found += shlex.split(line.removeprefix(b"#HIPPO").decode())
            except ValueError as error:
                raise UserError(f"{path}, line {number}: {error}") from None
    return found


def read_tasks(path: Path, defaults: SamplingParams) -> Iterator[Task]:
    """The tasks of a file, in order. A line that can't be understood is a task with a mistake.

    Raises:
        UserError: the file can't be read.
    """
    seen: set[str] = set()
    is_job = is_json = None
    for number, line in _lines(path):
        is_job = line.startswith(b"#!") if number == 1 else is_job
        if not line.strip() or (is_job and line.startswith(b"#")):
            continue
        is_json = line.lstrip().startswith(b"{") if is_json is None else is_json
        seeded = defaults if defaults.seed is None else replace(defaults, seed=defaults.seed + number)
        task = _read_line(number, line, is_json, seeded)
        if task.custom_id in seen:
            mistake = f"line {number}: custom_id {task.custom_id!r} was there before"
            task = Task(number, f"{task.custom_id} (line {number})", task.digest, None, mistake)
        seen.add(task.custom_id)
        yield task


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    try:
        with path.open("rb") as stream:
            number = 0
            while line := stream.readline(_MAX_LINE_BYTES):
                number += 1
                yield number, line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
    except OSError as error:
        raise UserError(f"{path} can't be read: {error.strerror}") from None


def _read_line(number: int, line: bytes, is_json: bool, defaults: SamplingParams) -> Task:
    custom_id, digest = f"line-{number}", hashlib.sha256(line.strip()).hexdigest()[:16]
    try:
        text = line.decode().strip()
        if not is_json:
            return Task(number, custom_id, digest, Asked(CHAT, defaults, [{"role": "user", "content": text}]))
        fields = json.loads(text)
        if not isinstance(fields, dict):
            raise UserError("not a JSON object")
        given = fields.pop("custom_id", custom_id)
        if not isinstance(given, str) or not given:
            raise UserError("custom_id must be a text")
        json.dumps([given, fields], ensure_ascii=False).encode()
        custom_id = given
        return Task(number, custom_id, digest, _read_fields(fields, defaults))
    except UnicodeDecodeError as error:
        mistake = f"not UTF-8 (byte {error.start + 1})"
    except UnicodeEncodeError:
        mistake = "half of a surrogate pair in a text"
    except json.JSONDecodeError as error:
        mistake = f"not JSON: {error.msg} at column {error.colno}"
    except (ValueError, OverflowError, RecursionError) as error:
        mistake = f"not JSON: {error}"
    except UserError as error:
        mistake = str(error)
    return Task(number, custom_id, digest, None, f"line {number}: {mistake}")


def _read_fields(fields: dict[str, Any], defaults: SamplingParams) -> Asked:
    if "body" in fields or "url" in fields:
        if (method := fields.get("method", "POST")) != "POST":
            raise UserError(f"method must be POST, not {method!r}")
        if extra := set(fields) - {"method", "url", "body"}:
            raise UserError(f"unknown field {min(extra)!r} beside custom_id, method, url and body")
        return read_body(str(fields.get("url")), fields.get("body"), defaults)
    if "messages" in fields:
        return read_body(CHAT, fields, defaults)
    if isinstance(fields.get("prompt"), str):  # asked, as on a line of plain text
        prompt = fields.pop("prompt")
        return read_body(CHAT, {**fields, "messages": [{"role": "user", "content": prompt}]}, defaults)
    if "prompt" in fields:
        return read_body(COMPLETION, fields, defaults)
    raise UserError("neither prompt, nor messages, nor url and body")


class AnswerFile:
    """The output: one line per task, flushed to disk as it is written.

    What is there already counts as done, but for lines with errors, which are tried again; a torn last line is
    cut off.

    Args:
        restart: forget what is there.

    Raises:
        UserError: it can't be read or written, or holds something else.
    """

    def __init__(self, path: Path, restart: bool = False) -> None:
        self._path = path
        self.done: dict[str, str] = {}  # custom_id -> id of the record, which holds the task's digest
        if path.exists() and not path.is_file():
            raise UserError(f"{path} can't be written: it isn't a file")
        try:
            if path.exists() and not restart:
                self._take_over()
            self._stream = path.open("wb" if restart else "ab")
        except OSError as error:
            raise UserError(f"{path} can't be written: {error.strerror}") from None

    def check(self, tasks: Iterable[Task]) -> int:
        """The number of tasks.

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

    def write(self, task: Task, response: dict[str, Any] | None, mistake: str = "") -> None:
        """Append a task's answer, or the mistake that prevents one.

        Raises:
            UserError: the disk is full, say; everything before is kept.
        """
        error = None if response else {"code": "invalid_request", "message": mistake, "param": None, "line": task.line}
        body = response and {"status_code": 200, "request_id": response["id"], "body": response}
        record = {"id": _record_id(task), "custom_id": task.custom_id, "response": body, "error": error}
        try:
            self._stream.write(json.dumps(record, ensure_ascii=False).encode("utf-8", "replace") + b"\n")
            self._stream.flush()
            os.fsync(self._stream.fileno())
        except OSError as problem:
            raise UserError(
                f"{self._path} can't be written: {problem.strerror}; {len(self.done):,} answers are kept, and the same"
                " command goes on from there"
            ) from None
        if response:
            self.done[task.custom_id] = _record_id(task)

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
