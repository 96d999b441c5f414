"""Who may ask, and how often."""

from __future__ import annotations

import hmac
import math
import time
from dataclasses import dataclass

from starlette.exceptions import HTTPException
from starlette.requests import Request

_MOST_CLIENTS = 10_000  # buckets that are remembered; beyond that, full ones are forgotten


def _keys_of(request: Request) -> list[str]:
    """The API keys that a request brings, in OpenAI's header, Anthropic's or Azure's. Some clients fill several, one with
    a key of somewhere else."""
    scheme, _, key = request.headers.get("authorization", "").partition(" ")
    bearer = key.strip() if scheme.lower() == "bearer" else request.headers.get("authorization", "")
    found = [bearer, *(request.headers.get(name, "") for name in ("x-api-key", "api-key"))]
    return [key for key in found if key]


@dataclass
class _Bucket:
    """A token bucket: it holds a minute's worth, and fills as time goes by."""

    level: float
    filled_s: float


class Rate:
    """So much per minute for each client.

    Args:
        per_minute: 0: no limit.
    """

    def __init__(self, per_minute: int) -> None:
        self._per_minute = per_minute
        self._buckets: dict[str, _Bucket] = {}

    def wait_s(self, client: str) -> float:
        """Seconds until this client may go on; 0: now."""
        if not self._per_minute:
            return 0.0
        return max(0.0, 1 - self._filled(client).level) * 60 / self._per_minute

    def spend(self, client: str, amount: float) -> None:
        """Count something; what was spent beyond the limit must be waited for."""
        if self._per_minute:
            self._filled(client).level -= amount

    def _filled(self, client: str) -> _Bucket:
        now = time.monotonic()
        bucket = self._buckets.get(client)
        if bucket is None:
            if len(self._buckets) >= _MOST_CLIENTS:
                self._buckets = {c: b for c, b in self._buckets.items() if now - b.filled_s < 60}
            bucket = self._buckets[client] = _Bucket(self._per_minute, now)
        bucket.level = min(self._per_minute, bucket.level + (now - bucket.filled_s) * self._per_minute / 60)
        bucket.filled_s = now
        return bucket


class Access:
    """What is checked before a request is read.

    Args:
        keys: one of them must come; none: everybody may ask, and counts by address.
        requests_per_minute, tokens_per_minute: of each key, prompt and answer together; 0: any number.
    """

    def __init__(self, keys: tuple[str, ...], requests_per_minute: int = 0, tokens_per_minute: int = 0) -> None:
        self._keys = keys
        self._requests, self._tokens = Rate(requests_per_minute), Rate(tokens_per_minute)

    def has_key(self, request: Request) -> bool:
        """Whether a request brings a key of ours, or needs none."""
        return not self._keys or any(self._is_ours(key) for key in _keys_of(request))

    def key_of(self, request: Request) -> str:
        """Return the key that a request brings, ours if there are several; empty if none."""
        found = _keys_of(request)
        return next((key for key in found if self._is_ours(key)), found[0] if found else "")

    def _is_ours(self, given: str) -> bool:
        # Every key is compared, in constant time, so that how long it takes says nothing.
        return any([hmac.compare_digest(given.encode(), key.encode()) for key in self._keys])

    def check_key(self, request: Request) -> None:
        """Raise an HTTPException if a request needs a key and brings none."""
        if not self.has_key(request):
            raise HTTPException(401, "this server needs an API key: Authorization: Bearer KEY")

    def count_request(self, request: Request) -> None:
        """Raise an HTTPException if this client has had enough for now."""
        client = self._client(request)
        wait_s = max(self._requests.wait_s(client), self._tokens.wait_s(client))
        if wait_s > 0:
            seconds = math.ceil(wait_s)
            headers = {"Retry-After": str(seconds)}
            raise HTTPException(429, f"this key has had its requests or tokens for now: wait {seconds} s", headers)
        self._requests.spend(client, 1)

    def count_tokens(self, request: Request, number: int) -> None:
        self._tokens.spend(self._client(request), number)

    def _client(self, request: Request) -> str:
        return self.key_of(request) if self._keys else (request.client.host if request.client else "")
