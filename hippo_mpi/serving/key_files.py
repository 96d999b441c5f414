"""API keys from files and from the environment. A source without keys is an error: it never means "no key needed"."""

from __future__ import annotations

import logging
import os
from pathlib import Path

from hippo_mpi.config.serve_options import API_KEYS
from hippo_mpi.errors import UserError

_log = logging.getLogger(__name__)
_OTHERS_MAY_READ = 0o044


def keys_of_environment() -> tuple[str, ...]:
    """Return the keys of the environment variable API_KEYS, separated by commas; none if it isn't set.

    Raises:
        UserError: it is set and has no key in it, or one that can't be sent in a header.
    """
    text = os.environ.get(API_KEYS)
    if text is None:
        return ()
    keys = tuple(key for part in text.split(",") if (key := part.strip()))
    if not keys:
        raise UserError(f"{API_KEYS} is set, but contains no key: set it to one, or unset it")
    for number, key in enumerate(keys, start=1):
        _check(key, f"{API_KEYS}, key {number}", "separate keys with commas")
    return keys


def read_key_file(path: Path, option: str) -> tuple[str, ...]:
    """Return the keys of a file, one per line; blank lines and those that begin with # are skipped.

    Args:
        path: of the file.
        option: that has named the file, for messages.

    Raises:
        UserError: it can't be read, has no key in it, or has a line that isn't a valid key.
    """
    try:
        text, mode = path.read_text(encoding="utf-8"), path.stat().st_mode
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{option} {path} can't be read: {error}") from None
    if path.is_file() and mode & _OTHERS_MAY_READ:
        _log.warning("other users may read the keys in %s: chmod 600 %s", path, path)
    keys = []
    for number, line in enumerate(text.splitlines(), start=1):
        key = line.strip()
        if key and not key.startswith("#"):
            _check(
                key, f"{option} {path}, line {number}", "one key per line and nothing else; put names into # comments"
            )
            keys.append(key)
    if not keys:
        raise UserError(f"{option} {path} contains no key: write one per line, or omit the option")
    return tuple(keys)


def _check(key: str, where: str, rule: str) -> None:
    if any(character.isspace() for character in key):
        raise UserError(f"{where}: a key can't contain spaces ({rule})")
    if not (key.isascii() and key.isprintable()):
        raise UserError(f"{where}: a key must consist of printable ASCII characters")
