"""Batch input files, read line by line.

The format is recognised by its content: OpenAI's batch lines, short JSON lines ({"prompt": ...} or
{"messages": [...]}), or plain text with one prompt per line; a job script (#!) has options in #HIPPO lines in front of
any of them. Files are read as needed, in several passes.
"""

from __future__ import annotations

import codecs
import contextlib
import hashlib
import io
import itertools
import json
import re
import shlex
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

from hippo_mpi.engine.request import SamplingParams
from hippo_mpi.errors import UserError
from hippo_mpi.protocols.openai_requests import CHAT, COMPLETION, GenerationRequest, read_body

_MAX_LINE_BYTES = 64 << 20
_GENERATED_ID = re.compile(r"^line-|\(line \d+\)")
"""Matches custom_ids as we generate them, for lines without one, or with one that an earlier line has."""


@dataclass(frozen=True)
class Task:
    """One line of the input: its request, or the mistake for which it can't be answered."""

    line: int  # counted from 1
    custom_id: str
    digest: str  # of the line; distinguishes requests with the same custom_id
    asked: GenerationRequest | None
    mistake: str = ""


@dataclass(frozen=True)
class Prompts:
    """A batch input that can be read repeatedly: a file, or a copy of what came from a pipe.

    Args:
        name: of the source, for messages.
        stream: open and seekable; closed at the end of a `with` block.
    """

    name: str
    stream: BinaryIO

    def __str__(self) -> str:
        return self.name

    def __enter__(self) -> Prompts:
        return self

    def __exit__(self, *_: object) -> None:
        self.stream.close()

    def lines(self) -> Iterator[tuple[int, bytes]]:
        """Yield (number from 1, line), without a byte order mark; lines are cut after _MAX_LINE_BYTES + 1 bytes.

        Raises:
            UserError: the file can't be read.
        """
        number, max_bytes = 0, _MAX_LINE_BYTES + 1
        try:
            self.stream.seek(0)
            while line := self.stream.readline(max_bytes):
                number += 1
                yield number, line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
                while len(line) == max_bytes and not line.endswith(b"\n"):  # skip the rest of it
                    line = self.stream.readline(max_bytes)
        except OSError as error:
            raise UserError(f"{self} can't be read: {error.strerror}") from None

    @cached_property
    def given_names(self) -> set[str]:
        """The custom_ids of the input that look like generated ones."""
        names: set[str] = set()
        for _, line in self.lines():
            if (b"line" in line or b"\\u" in line) and line.lstrip().startswith(b"{"):
                with contextlib.suppress(ValueError, RecursionError):
                    name = json.loads(line).get("custom_id")
                    names |= {name} if isinstance(name, str) and _GENERATED_ID.search(name) else set()
        return names


def open_prompts(path: Path) -> Prompts:
    """Open a file of prompts; what can be read only once, such as a pipe, is copied to a temporary file.

    Raises:
        UserError: it can't be read or copied, or a pipe has #HIPPO lines, whose options come too late.
    """
    try:
        stream = path.open("rb")
    except OSError as error:
        raise UserError(f"{path} can't be read: {error.strerror}") from None
    if path.is_file():
        return Prompts(str(path), stream)
    with stream:
        return _spooled(str(path), stream)


def kept_prompts(name: str, text: bytes) -> Prompts:
    """Return prompts of text that was read already, copied to a temporary file; raises as `open_prompts`.

    Args:
        name: of the source, for messages.
        text: the content of a batch input.
    """
    return _spooled(name, io.BytesIO(text))


def _spooled(name: str, source: BinaryIO) -> Prompts:
    try:
        spool = tempfile.TemporaryFile()  # noqa: SIM115  # the caller closes it
        shutil.copyfileobj(source, spool)
        spool.flush()
    except OSError as error:
        raise UserError(
            f"the prompts from {name} can't be stored in {tempfile.gettempdir()}: {error.strerror}; give them as a file"
        ) from None
    prompts = Prompts(name, spool)
    if job_options(prompts):
        raise UserError(f"#HIPPO lines don't work from {name}: give their options on the command line")
    return prompts


def job_options(prompts: Prompts) -> list[str]:
    """Return the options of a job script's #HIPPO lines; other files have none.

    Raises:
        UserError: the file can't be read, or a quote isn't closed.
    """
    options: list[str] = []
    for number, line in prompts.lines():
        if number == 1 and not line.startswith(b"#!"):
            return []
        if line.strip() and not line.startswith(b"#"):
            break
        if line.startswith(b"#HIPPO"):
            try:
                options += shlex.split(line.removeprefix(b"#HIPPO").decode())
            except ValueError as error:
                raise UserError(f"{prompts}, line {number}: {error}") from None
    return options


def read_tasks(prompts: Prompts, defaults: SamplingParams) -> Iterator[Task]:
    """Yield the tasks in order; an invalid line is a task with a mistake.

    Args:
        prompts: the input.
        defaults: of fields that a line doesn't have; a seed becomes another one for each line.

    Raises:
        UserError: the file can't be read.
    """
    seen: set[str] = set()
    given = prompts.given_names  # read before the loop: both move the file's one position
    is_job = is_json = None
    for number, line in prompts.lines():
        is_job = line.startswith(b"#!") if number == 1 else is_job
        if not line.strip() or (is_job and line.startswith(b"#")):
            continue
        is_json = line.lstrip().startswith(b"{") if is_json is None else is_json
        seeded = defaults if defaults.seed is None else replace(defaults, seed=defaults.seed + number)
        task = _read_line(number, line, is_json, seeded, _unlike(f"line-{number}", given))
        if task.custom_id in seen:
            mistake = f"line {number}: duplicate custom_id {task.custom_id!r}"
            name = _unlike(f"{task.custom_id} (line {number})", given)
            task = Task(number, name, task.digest, None, mistake)
        seen.add(task.custom_id)
        yield task


def _unlike(name: str, given: set[str]) -> str:
    """Return the name, with a suffix if a line was given it as its custom_id; lines' names differ by their numbers."""
    tried = itertools.chain([name], (f"{name}-{count}" for count in itertools.count(2)))
    return next(one for one in tried if one not in given)


def _read_line(number: int, line: bytes, is_json: bool, defaults: SamplingParams, custom_id: str) -> Task:
    digest = hashlib.sha256(line.strip()).hexdigest()[:16]
    try:
        if len(line.removesuffix(b"\n")) > _MAX_LINE_BYTES:
            raise UserError(f"longer than {_MAX_LINE_BYTES:,} bytes")
        text = line.decode().strip()
        if not is_json:
            return Task(
                number, custom_id, digest, GenerationRequest(CHAT, defaults, [{"role": "user", "content": text}])
            )
        fields = json.loads(text)
        if not isinstance(fields, dict):
            raise UserError("not a JSON object")
        given = fields.pop("custom_id", custom_id)
        if not isinstance(given, str) or not given:
            raise UserError("custom_id must be a string")
        json.dumps([given, fields], ensure_ascii=False).encode()
        custom_id = given
        return Task(number, custom_id, digest, _read_fields(fields, defaults))
    except UnicodeDecodeError as error:
        mistake = f"not UTF-8 (byte {error.start + 1})"
    except UnicodeEncodeError:
        mistake = "unpaired surrogate in a string"
    except json.JSONDecodeError as error:
        mistake = f"not JSON: {error.msg} at column {error.colno}"
    except (ValueError, OverflowError, RecursionError) as error:
        mistake = f"not JSON: {error}"
    except UserError as error:
        mistake = str(error)
    return Task(number, custom_id, digest, None, f"line {number}: {mistake}")


def _read_fields(fields: dict[str, Any], defaults: SamplingParams) -> GenerationRequest:
    if "body" in fields or "url" in fields:
        if (method := fields.get("method", "POST")) != "POST":
            raise UserError(f"method must be POST, not {method!r}")
        if extra := set(fields) - {"method", "url", "body"}:
            raise UserError(f"unknown field {min(extra)!r}; expected custom_id, method, url and body")
        return read_body(str(fields.get("url")), fields.get("body"), defaults)
    if "messages" in fields:
        return read_body(CHAT, fields, defaults)
    if isinstance(fields.get("prompt"), str):  # a user's message, as on a line of plain text
        prompt = fields.pop("prompt")
        return read_body(CHAT, {**fields, "messages": [{"role": "user", "content": prompt}]}, defaults)
    if "prompt" in fields:
        return read_body(COMPLETION, fields, defaults)
    raise UserError("expected prompt, messages, or url and body")
