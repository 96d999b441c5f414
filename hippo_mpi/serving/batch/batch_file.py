"""Batch prompt files: what is asked, line by line.

Input is recognised by its content: OpenAI batch lines, short JSON lines ({"prompt": ...} or {"messages": [...]}),
or plain text, a prompt a line; a job script (#!) carries options in #HIPPO lines in front of any of them. Files are
read as needed.
"""

from __future__ import annotations

import codecs
import hashlib
import io
import json
import shlex
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

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


@dataclass(frozen=True)
class Prompts:
    """Where prompts come from: a file, which is read as needed, or all that came from standard input."""

    path: Path
    content: bytes | None = None

    def __str__(self) -> str:
        return str(self.path) if self.content is None else "standard input"

    def lines(self) -> Iterator[tuple[int, bytes]]:
        """Yield (number from 1, line) without a byte order mark.

        Raises:
            UserError: the file can't be read.
        """
        try:
            with self.path.open("rb") if self.content is None else io.BytesIO(self.content) as stream:
                number = 0
                while line := stream.readline(_MAX_LINE_BYTES):
                    number += 1
                    yield number, line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
        except OSError as error:
            raise UserError(f"{self} can't be read: {error.strerror}") from None


def job_options(prompts: Prompts) -> list[str]:
    """The options of a job script's #HIPPO lines; none for other files.

    Raises:
        UserError: the file can't be read, or a quote isn't closed.
    """
    found: list[str] = []
    for number, line in prompts.lines():
        if number == 1 and not line.startswith(b"#!"):
            return []
        if line.strip() and not line.startswith(b"#"):
            break
        if line.startswith(b"#HIPPO"):
            try:
                found += shlex.split(line.removeprefix(b"#HIPPO").decode())
            except ValueError as error:
                raise UserError(f"{prompts}, line {number}: {error}") from None
    return found


def read_tasks(prompts: Prompts, defaults: SamplingParams) -> Iterator[Task]:
    """The tasks, in order. A line that can't be understood is a task with a mistake.

    Raises:
        UserError: the file can't be read.
    """
    seen: set[str] = set()
    is_job = is_json = None
    for number, line in prompts.lines():
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
