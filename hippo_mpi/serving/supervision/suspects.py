"""What ranks may have failed of: requests that were at work when they did, and how those come back.

The first failure may be anybody's. A request that was at work in two of them, without a token between, is a suspect:
one of these at a time, the least suspicious first, beside all that aren't. So the one that ranks do fail of fails alone
with its tries, and takes nobody else's; with its first token a suspect is none any more.
Must not know ranks or what a request is.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

_LEAST_FAILURES = 2


def is_suspect(num_failures: int) -> bool:
    """Whether ranks may fail of a request that was at work in so many failures without a token between."""
    return num_failures >= _LEAST_FAILURES


def may_begin(failures: Mapping[int, int], begun: Collection[int]) -> list[int]:
    """Requests that may begin now.

    Args:
        failures: of each request, in the order in which they came.
        begun: those that ranks are at work on, or have waiting.
    """
    found = [number for number, count in failures.items() if number not in begun and not is_suspect(count)]
    suspects = {number: count for number, count in failures.items() if is_suspect(count)}
    if suspects and not any(number in begun for number in suspects):
        found.append(min(suspects, key=lambda number: suspects[number]))
    return found
