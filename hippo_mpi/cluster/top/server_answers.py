"""What a server says of itself: GET /ready, and GET /metrics."""

from __future__ import annotations

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
        return dict(json.loads(_fetch(f"{url}/ready")))
    except urllib.error.HTTPError as error:  # status 503: the body says why it isn't ready
        return dict(json.loads(error.read(_MAX_BYTES)))


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
    with urllib.request.urlopen(request, timeout=_REQUEST_TIMEOUT_S) as answer:
        return bytes(answer.read(_MAX_BYTES))
