"""Numbers, and texts that come from elsewhere, as people read them."""

from __future__ import annotations


def count_of(number: int, noun: str) -> str:
    """Return a number with its noun: 1 rank, 2 ranks, 1,024 ranks."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def show_bytes(count: int) -> str:
    """Return a number of bytes with a binary unit that keeps it short: 12.5 MiB."""
    sign, size = ("-" if count < 0 else ""), float(abs(count))
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{sign}{size:.0f} {unit}" if unit == "B" else f"{sign}{size:.1f} {unit}"
        size /= 1024
    return f"{sign}{size:.2f} GiB"


def show_rate(per_s: float) -> str:
    """Return tokens per second with two decimals below 10, as 0.44 and 0.36 differ much: 0.44, 12.5, 1,204.1."""
    return f"{per_s:,.2f}" if per_s < 10 else f"{per_s:,.1f}"


def show_layers(start: int, stop: int) -> str:
    """Return the half-open range [start, stop) of layers as text: no layers, layer 3, layers 0-3."""
    if stop - start < 2:
        return "no layers" if stop == start else f"layer {start}"
    return f"layers {layer_range(start, stop)}"


def layer_range(start: int, stop: int) -> str:
    """Return the half-open range [start, stop) of layers for a table: none, 0-3."""
    return "none" if stop == start else f"{start}-{stop - 1}"


def waiting_requests(count: int) -> str:
    """Return how many requests wait, in words."""
    return f"{'no' if not count else f'{count:,}'} request{' waits' if count < 2 else 's wait'}"


def visible(text: object, most: int = 300) -> str:
    """Return a text from another machine as a line that a terminal can be given: no control characters, not too long."""
    line = "".join(one if one.isprintable() else ascii(one)[1:-1] for one in str(text))
    return line if len(line) <= most else f"{line[:most]}..."
