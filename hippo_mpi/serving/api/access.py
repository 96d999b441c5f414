"""Who may ask, how often, and how much at once."""

from __future__ import annotations

import hashlib
import hmac
import json
import math
import secrets
import time
from collections import Counter
from dataclasses import dataclass
from typing import Any

from starlette.exceptions import HTTPException
from starlette.requests import Request

from hippo_mpi.errors import FieldError
from hippo_mpi.serving.addresses import network_of
from hippo_mpi.units import count_of

_MOST_CLIENTS = 10_000  # buckets that are remembered; beyond that, full ones are forgotten
_LONGEST_SALT = 256
_RETRY_AFTER = {"Retry-After": "2"}


def _keys_of(request: Request) -> list[str]:
    """The API keys that a request brings, in OpenAI's header, Anthropic's or Azure's. Some clients fill several, one with
    a key of somewhere else."""
    scheme, _, key = request.headers.get("authorization", "").partition(" ")
    bearer = key.strip() if scheme.lower() == "bearer" else request.headers.get("authorization", "")
    found = [bearer, *(request.headers.get(name, "") for name in ("x-api-key", "api-key"))]
    return [key for key in found if key]


def _is_one_of(given: str, keys: tuple[str, ...]) -> bool:
    # Every key is compared, in constant time, so that how long it takes says nothing.
    return any([hmac.compare_digest(given.encode(), key.encode()) for key in keys])


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


@dataclass
class _Held:
    """Places of a request, and how many must free them: itself, and its answers."""

    client: str
    count: int = 0
    num_holders: int = 1


@dataclass(frozen=True)
class AccessRules:
    """What is asked of clients.

    Args:
        keys: one of them must come; none: everybody may ask, and counts by address.
        admin_keys: keys that may also change the model; none: every client may.
        requests_per_minute, tokens_per_minute: of each key, prompt and answer together; 0: any number.
        most_requests: under way or waiting at once, of all clients; 0: any number.
        requests_per_key: of them, those of one key; 0: any number.
        shares_prefixes: whether a prompt may begin with what was computed for another key.
    """

    keys: tuple[str, ...] = ()
    admin_keys: tuple[str, ...] = ()
    requests_per_minute: int = 0
    tokens_per_minute: int = 0
    most_requests: int = 0
    requests_per_key: int = 0
    shares_prefixes: bool = False


class Access:
    """What is checked before a request is read, and counted until it has ended."""

    def __init__(self, rules: AccessRules) -> None:
        self._rules = rules
        self._known_keys = rules.keys + rules.admin_keys
        self._requests, self._tokens = Rate(rules.requests_per_minute), Rate(rules.tokens_per_minute)
        self._places: Counter[str] = Counter()  # that each client's requests have now
        self._salt_key = secrets.token_bytes(32)

    # ---- keys

    def has_key(self, request: Request) -> bool:
        """Whether a request brings a key of ours, or needs none."""
        return not self._rules.keys or any(_is_one_of(key, self._known_keys) for key in _keys_of(request))

    def key_of(self, request: Request) -> str:
        """Return the key that a request brings, ours if there are several; empty if none."""
        found = _keys_of(request)
        return next((key for key in found if _is_one_of(key, self._known_keys)), found[0] if found else "")

    def check_key(self, request: Request) -> None:
        """Raise an HTTPException if a request needs a key and brings none."""
        if not self.has_key(request):
            raise HTTPException(401, "this server needs an API key: Authorization: Bearer KEY")

    def check_admin(self, request: Request) -> None:
        """Raise an HTTPException if a request may not change the model."""
        if self._rules.admin_keys and not any(_is_one_of(key, self._rules.admin_keys) for key in _keys_of(request)):
            raise HTTPException(403, "another model is loaded now, and only a key of --admin-key-file may change that")

    # ---- rates

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

    # ---- places

    def check_choices(self, request: Request, field: str, count: int) -> None:
        """Raise a FieldError if so many answers to one request can never be under way at once.

        Args:
            field: of the body, that asks for so many.
        """
        rules, who = self._rules, self._client(request).partition(" ")[0]
        for most, whose, options in (
            (rules.requests_per_key, f"this {who}", "--requests-per-key"),
            (rules.most_requests, "this server", "--max-batch-size and --max-queue"),
        ):
            if most and count > most:
                why = f"{field} asks for {count} answers at once, and {whose} may have {most} ({options})"
                raise FieldError(field, why)

    def take_places(self, request: Request, count: int) -> None:
        """Count so many answers more as under way, until all who hold the request's places have freed them.

        Raises:
            HTTPException: that would be too many, of this client or of all.
        """
        client, rules = self._client(request), self._rules
        taken = self._places[client]
        if rules.requests_per_key and taken + count > rules.requests_per_key:
            who, most = client.partition(" ")[0], rules.requests_per_key
            has = f"{count_of(taken, 'request')} under way or waiting"
            why = f"this {who} has {has}, and may have {most} at once: try again later"
            raise HTTPException(429, why, _RETRY_AFTER)
        if rules.most_requests and self._places.total() + count > rules.most_requests:
            has = f"{count_of(self._places.total(), 'request')} under way or waiting"
            why = f"this server has {has}, and may have {rules.most_requests} at once: try again later"
            raise HTTPException(429, why, _RETRY_AFTER)
        self._places[client] += count
        held = self._held_by(request) or _Held(client)
        held.count += count
        request.state.places = held

    def hold_places(self, request: Request) -> None:
        """Let a request's places last for one more who frees them: its answers may go on without it."""
        if held := self._held_by(request):
            held.num_holders += 1

    def free_places(self, request: Request) -> None:
        """One of those who hold a request's places doesn't need them any more."""
        held = self._held_by(request)
        if held is None:
            return
        held.num_holders -= 1
        if held.num_holders == 0:
            self._places[held.client] -= held.count
            if not self._places[held.client]:
                del self._places[held.client]

    def _held_by(self, request: Request) -> _Held | None:
        return getattr(request.state, "places", None)

    def _client(self, request: Request) -> str:
        """Whose rate and places a request counts in: its key's, or else its address's."""
        if self._rules.keys and self.has_key(request):
            return f"key {self.key_of(request)}"
        return f"address {network_of(request.client.host)}" if request.client else ""

    # ---- prefixes

    def cache_salt(self, request: Request, body: dict[str, Any]) -> str:
        """Return whose cached prompts a request may begin with: those with the same salt. Takes `cache_salt` out of a
        body, which parts a key's own requests further, as vLLM has it.

        Raises:
            FieldError: it is no text.
        """
        given = body.pop("cache_salt", None)
        if given is not None and not (isinstance(given, str) and 0 < len(given) <= _LONGEST_SALT):
            raise FieldError("cache_salt", f"cache_salt must be a text of 1 to {_LONGEST_SALT} characters")
        key = self.key_of(request) if self._rules.keys and not self._rules.shares_prefixes else ""
        if not key and given is None:
            return ""
        # Ranks learn neither the key nor what could be compared with guesses of it.
        return hmac.new(self._salt_key, json.dumps([key, given]).encode(), hashlib.sha256).hexdigest()
