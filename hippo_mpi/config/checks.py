"""Checks of options' values: each takes what was typed, and returns the value.

All raise argparse.ArgumentTypeError with what is wrong; argparse puts the message behind "argument --name:".
"""

from __future__ import annotations

import argparse
import contextlib
import ipaddress
import re
from typing import Any

_MAX_S = 1_000_000  # eleven days; poll(2) counts milliseconds in 32 bits
_MAX_BYTES = 1 << 60
_MAX_NUMBER = 1e12


def _number(
    text: str, kind: type[float] | type[int], what: str, low: float, high: float = float("inf"), open_low: bool = False
) -> Any:
    try:
        value = kind(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not {what}") from None
    if not low <= value <= high or value == float("inf") or (open_low and value == low):
        raise argparse.ArgumentTypeError(f"{text.strip()} is not {what}")
    return value


def text(typed: str) -> str:
    """Return what was typed if it is text: on a command line, bytes that aren't UTF-8 become halves of surrogate pairs."""
    try:
        typed.encode()
    except UnicodeEncodeError:
        raise argparse.ArgumentTypeError(f"{typed[:100]!a} is not UTF-8") from None
    return typed


def positive(text: str) -> int:
    """Return a whole number above 0."""
    return int(_number(text, int, "a whole number above 0", 1))


def whole(text: str) -> int:
    """Return a whole number of at least 0."""
    return int(_number(text, int, "a whole number", 0))


def port(text: str) -> int:
    """Return a port."""
    return int(_number(text, int, "a port, from 0 to 65535", 0, 65535))


def network(text: str) -> str:
    """Return an address or a network, in its normal form."""
    try:
        return str(ipaddress.ip_network(text, strict=False))
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not an address such as 10.0.0.1, or a network 10.0.0.0/8"
        ) from None


def seed(text: str) -> int:
    """Return a seed."""
    return int(_number(text, int, "a seed, from 0 to 2**64 - 1", 0, 2**64 - 1))


def at_least_0(text: str) -> float:
    """Return a number of at least 0."""
    return float(_number(text, float, "a number of at least 0", 0.0))


def above_0(text: str) -> float:
    """Return a number above 0."""
    return float(_number(text, float, f"a number above 0, up to {_MAX_NUMBER:g}", 0.0, _MAX_NUMBER, open_low=True))


def seconds(text: str) -> float:
    """Return a number of seconds above 0, for which sockets can wait."""
    return float(_number(text, float, f"a number of seconds above 0, up to {_MAX_S}", 0.0, _MAX_S, open_low=True))


def two_beats(text: str) -> float:
    """Return a number of seconds, in which a rank says at least twice that it lives."""
    what = f"a number of seconds from 1 to {_MAX_S}: ranks send two heartbeats a second"
    return float(_number(text, float, what, 1.0, _MAX_S))


def share(text: str) -> float:
    """Return a number from 0 to 1."""
    return float(_number(text, float, "a number from 0 to 1", 0.0, 1.0))


def half(text: str) -> float:
    """Return a number from 0 to 0.5."""
    return float(_number(text, float, "a number from 0 to 0.5", 0.0, 0.5))


def size(text: str) -> int:
    """Return a number of bytes, from one or one with K, M or G behind it, as for mlx_lm.server."""
    shift = {"K": 10, "M": 20, "G": 30}.get(text.upper().removesuffix("B")[-1:], 0)
    number = text.upper().removesuffix("B").rstrip("KMG") if shift else text
    return int(_number(number, float, "a size such as 512M or 2G", 0.0, _MAX_BYTES >> shift) * (1 << shift))


def some_bytes(text: str) -> int:
    """Return a number of bytes above 0."""
    return int(_number(str(size(text)), int, "a size above 0", 1))


def origin(text: str) -> str:
    """Return an origin of web pages, or *."""
    if text != "*" and not re.fullmatch(r"[a-z][a-z0-9+.-]*://[^/\s]+", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not an origin such as https://example.org")
    return text


def host_name(text: str) -> str:
    """Return a host's name or address, as in a Host header, but without brackets and port."""
    name = text.strip("[]")
    with contextlib.suppress(ValueError):
        return str(ipaddress.ip_address(name))
    if not re.fullmatch(r"[^/\s:]+", name):
        raise argparse.ArgumentTypeError(f"{text!r} is not a host's name such as example.org, without scheme and port")
    return name


def counts(text: str) -> tuple[int, ...]:
    """Return numbers of layers, such as 14,10."""
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of layer counts such as 14,10") from None


def parts(text: str) -> tuple[int, ...]:
    """Return parts of a whole, such as 5,3."""
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of parts such as 5,3") from None


def request_counts(text: str) -> tuple[int, ...]:
    """Return numbers of requests, such as 1,4,16."""
    try:
        return tuple(positive(part) for part in text.split(","))
    except argparse.ArgumentTypeError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of numbers of requests such as 1,4,16") from None
