"""Access control: who may send requests, how often, and how many at once."""

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

_MAX_CLIENTS = 10_000  # whose buckets are remembered; beyond that, full ones are forgotten, which says the same
_CLEAN_INTERVAL_S = 1.0  # between two looks for them
_MAX_SALT_CHARS = 256
_RETRY_AFTER = {"Retry-After": "2"}


def _keys_of(request: Request) -> list[str]:
    """Return the API keys in a request's headers: OpenAI's, Anthropic's and Azure's.

    Some clients send several of these, one of them with another server's key.
    """
    scheme, _, key = request.headers.get("authorization", "").partition(" ")
    bearer = key.strip() if scheme.lower() == "bearer" else request.headers.get("authorization", "")
    keys = [bearer, *(request.headers.get(name, "") for name in ("x-api-key", "api-key"))]
    return [key for key in keys if key]


def _is_one_of(given: str, keys: tuple[str, ...]) -> bool:
    # Every key is compared, each in constant time, so that the duration reveals nothing.
    return any([hmac.compare_digest(given.encode(), key.encode()) for key in keys])


@dataclass
class _Bucket:
    """A token bucket: it holds what a client may use in a minute, and refills steadily."""

    level: float
    filled_s: float


class Rate:
    """A rate limit that applies to each client separately.

    Args:
        per_minute: the limit; 0: none.
    """

    def __init__(self, per_minute: int) -> None:
        self._per_minute = per_minute
        self._buckets: dict[str, _Bucket] = {}
        self._cleaned_s = 0.0

    def wait_s(self, client: str) -> float:
        """Return the seconds until this client may go on; 0: now."""
        if not self._per_minute:
            return 0.0
        return max(0.0, 1 - self._filled(client).level) * 60 / self._per_minute

    def spend(self, client: str, amount: float) -> None:
        """Count an amount; what exceeds the limit has to be waited for."""
        if self._per_minute:
            self._filled(client).level -= amount

    def _filled(self, client: str) -> _Bucket:
        now = time.monotonic()
        bucket = self._buckets.get(client)
        if bucket is None:
            if len(self._buckets) >= _MAX_CLIENTS and now > self._cleaned_s + _CLEAN_INTERVAL_S:
                self._cleaned_s = now
                self._buckets = {c: b for c, b in self._buckets.items() if self._level(b, now) < self._per_minute}
            bucket = self._buckets[client] = _Bucket(self._per_minute, now)
        bucket.level, bucket.filled_s = self._level(bucket, now), now
        return bucket

    def _level(self, bucket: _Bucket, now: float) -> float:
        return min(self._per_minute, bucket.level + (now - bucket.filled_s) * self._per_minute / 60)


@dataclass
class _Held:
    """The places of a request, and how many holders have to free them: the request itself, and its answers."""

    client: str
    count: int = 0
    num_holders: int = 1


@dataclass(frozen=True)
class AccessRules:
    """The limits for clients.

    Args:
        keys: of which a request needs one; none: anybody may send requests, and is counted by address.
        admin_keys: keys that may also change the model; none: every client may.
        requests_per_minute: of each key; 0: no limit.
        tokens_per_minute: of each key, prompts and answers together; 0: no limit.
        max_requests: under way or waiting at once, of all clients; 0: no limit.
        requests_per_key: under way or waiting at once, of one key; 0: no limit.
        shares_prefixes: whether a prompt may use a prefix that was computed for another key.
    """

    keys: tuple[str, ...] = ()
    admin_keys: tuple[str, ...] = ()
    requests_per_minute: int = 0
    tokens_per_minute: int = 0
    max_requests: int = 0
    requests_per_key: int = 0
    shares_prefixes: bool = False


class Access:
    """The checks of requests before they are read, and the counts of those under way."""

    def __init__(self, rules: AccessRules) -> None:
        self._rules = rules
        self._known_keys = rules.keys + rules.admin_keys
        self._requests, self._tokens = Rate(rules.requests_per_minute), Rate(rules.tokens_per_minute)
        self._places: Counter[str] = Counter()  # client -> places that its requests hold now
        self._salt_key = secrets.token_bytes(32)

    # ---- keys

    def has_key(self, request: Request) -> bool:
        """Return whether a request has a valid key, or needs none."""
        return not self._rules.keys or any(_is_one_of(key, self._known_keys) for key in _keys_of(request))

    def key_of(self, request: Request) -> str:
        """Return the key of a request, a valid one if it has several; empty if none."""
        keys = _keys_of(request)
        return next((key for key in keys if _is_one_of(key, self._known_keys)), keys[0] if keys else "")

    def check_key(self, request: Request) -> None:
        """Check a request's key.

        Raises:
            HTTPException: it needs a key and has no valid one.
        """
        if not self.has_key(request):
            raise HTTPException(401, "missing or unknown API key: send it in the header Authorization: Bearer KEY")

    def check_admin(self, request: Request) -> None:
        """Check that a request may change the model.

        Raises:
            HTTPException: it may not.
        """
        if self._rules.admin_keys and not any(_is_one_of(key, self._rules.admin_keys) for key in _keys_of(request)):
            raise HTTPException(403, "another model is loaded, and only a key of --admin-key-file may change it")

    # ---- rates

    def count_request(self, request: Request) -> None:
        """Count a request against the rate of its client.

        Raises:
            HTTPException: the client has used up its requests or tokens for now.
        """
        client = self._client(request)
        wait_s = max(self._requests.wait_s(client), self._tokens.wait_s(client))
        if wait_s > 0:
            seconds, who = math.ceil(wait_s), client.partition(" ")[0] or "client"
            why = f"rate limit of requests or tokens per minute reached for this {who}: try again in {seconds} s"
            raise HTTPException(429, why, {"Retry-After": str(seconds)})
        self._requests.spend(client, 1)

    def count_tokens(self, request: Request, number: int) -> None:
        """Count tokens against the rate of a request's client."""
        self._tokens.spend(self._client(request), number)

    # ---- places

    def check_choices(self, request: Request, field: str, count: int) -> None:
        """Check that this many answers to one request can be under way at once, when nothing else is.

        Args:
            request: the request.
            field: of the body, which asks for this many.
            count: number of answers.

        Raises:
            FieldError: they never can.
        """
        rules, who = self._rules, self._client(request).partition(" ")[0]
        for limit, whose, options in (
            (rules.requests_per_key, f"this {who}", "--requests-per-key"),
            (rules.max_requests, "this server", "--max-batch-size and --max-queue"),
        ):
            if limit and count > limit:
                why = f"{field} asks for {count} answers at once; the limit of {whose} is {limit} ({options})"
                raise FieldError(field, why)

    def take_places(self, request: Request, count: int) -> None:
        """Count this many more answers as under way, until every holder of the request's places has freed them.

        Raises:
            HTTPException: that would be too many, of this client or of all.
        """
        client, rules = self._client(request), self._rules
        taken = self._places[client]
        if rules.requests_per_key and taken + count > rules.requests_per_key:
            who, limit = client.partition(" ")[0], rules.requests_per_key
            has = f"{count_of(taken, 'request')} running or waiting"
            why = f"this {who} has {has}; its limit is {limit}: try again later"
            raise HTTPException(429, why, _RETRY_AFTER)
        if rules.max_requests and self._places.total() + count > rules.max_requests:
            has = f"{count_of(self._places.total(), 'request')} running or waiting"
            why = f"this server has {has}; its limit is {rules.max_requests}: try again later"
            raise HTTPException(429, why, _RETRY_AFTER)
        self._places[client] += count
        held = self._held_by(request) or _Held(client)
        held.count += count
        request.state.places = held

    def hold_places(self, request: Request) -> None:
        """Add a holder who has to free a request's places, too: its answers may go on without it."""
        if held := self._held_by(request):
            held.num_holders += 1

    def free_places(self, request: Request) -> None:
        """Free a request's places on behalf of one holder; they are free when all holders have done so."""
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
        """Return whom a request counts for: the holder of its key, or else its address."""
        if self._rules.keys and self.has_key(request):
            return f"key {self.key_of(request)}"
        return f"address {network_of(request.client.host)}" if request.client else ""

    # ---- prefixes

    def cache_salt(self, request: Request, body: dict[str, Any]) -> str:
        """Return the salt of a request's cached prompts; it may use prefixes only of requests with the same salt.

        Removes `cache_salt` from the body, with which clients can separate requests of one key further, as in vLLM.

        Raises:
            FieldError: `cache_salt` isn't a text, or too long.
        """
        given = body.pop("cache_salt", None)
        if given is not None and not (isinstance(given, str) and 0 < len(given) <= _MAX_SALT_CHARS):
            raise FieldError("cache_salt", f"cache_salt must be a string of 1 to {_MAX_SALT_CHARS} characters")
        key = self.key_of(request) if self._rules.keys and not self._rules.shares_prefixes else ""
        if not key and given is None:
            return ""
        # A keyed hash: ranks learn neither the key nor anything that guesses of it could be compared with.
        return hmac.new(self._salt_key, json.dumps([key, given]).encode(), hashlib.sha256).hexdigest()
