"""What a server says of itself: GET /ready, and GET /metrics."""

from __future__ import annotations

import http.client
import json
import os
import re
import urllib.error
import urllib.request
from typing import Any

from hippo_mpi.config.serve_options import API_KEYS

_REQUEST_TIMEOUT_S = 5.0
_MAX_BYTES = 4 << 20


def own_key() -> str:
    """Return the first API key in the environment; "none" if it has none."""
    return os.environ.get(API_KEYS, "").split(",")[0].strip() or "none"


def fetch_status(url: str) -> dict[str, Any]:
    """Return the body of GET /ready of the server at `url`, ready or not.

    Raises:
        OSError: it doesn't answer.
        ValueError: its answer isn't JSON.
    """
    try:
        return _object(_fetch(f"{url}/ready"))
    except urllib.error.HTTPError as error:  # status 503: the body says why it isn't ready
        return _object(_body(error))


def fetch_tokens(url: str) -> float:
    """Return how many tokens the server at `url` has generated since it was started.

    Raises:
        OSError: it doesn't answer.
        ValueError: its metrics don't say.
    """
    found = re.search(r"^hippo_generated_tokens_total (\S+)$", _fetch(f"{url}/metrics").decode(), re.MULTILINE)
    if not found:
        raise ValueError("no hippo_generated_tokens_total")
    return float(found[1])


def _fetch(url: str) -> bytes:
    request = urllib.request.Request(url, headers={"Authorization": f"Bearer {own_key()}"})
    try:
        with urllib.request.urlopen(request, timeout=_REQUEST_TIMEOUT_S) as answer:
            return _body(answer)
    except http.client.HTTPException as error:
        raise OSError(f"what it says isn't HTTP: {type(error).__name__}") from None


def _body(answer: http.client.HTTPResponse | urllib.error.HTTPError) -> bytes:
    try:
        return bytes(answer.read(_MAX_BYTES))
    except http.client.HTTPException as error:
        raise OSError(f"what it says isn't HTTP: {type(error).__name__}") from None


def _object(text: bytes) -> dict[str, Any]:
    found = json.loads(text)
    if not isinstance(found, dict):
        raise ValueError("no object")
    return found
