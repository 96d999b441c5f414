"""Which requests may have made ranks fail, and how these are tried again.

One failure may be anybody's. A request that was at work in two consecutive failures, without a token in between, is a
suspect. Suspects run one at a time, those with the fewest failures first, beside all other requests. So the request that
does make ranks fail uses up its own retries and nobody else's; a suspect that gets a token is cleared.
Must not know ranks or what a request is.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

_LEAST_FAILURES = 2


def is_suspect(num_failures: int) -> bool:
    """Return whether a request with so many consecutive failures may be what makes ranks fail."""
    return num_failures >= _LEAST_FAILURES


def may_begin(failures: Mapping[int, int], begun: Collection[int]) -> list[int]:
    """Return the requests that may begin now.

    Args:
        failures: consecutive failures of each request, in order of arrival.
        begun: requests that the ranks have already.
    """
    found = [number for number, count in failures.items() if number not in begun and not is_suspect(count)]
    suspects = {number: count for number, count in failures.items() if is_suspect(count)}
    if suspects and not any(number in begun for number in suspects):
        found.append(min(suspects, key=lambda number: suspects[number]))
    return found
