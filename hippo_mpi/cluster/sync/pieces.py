"""Which pieces go where, and who has them: pure arithmetic on spans. Loads no MLX."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from hippo_mpi.views.spans import Span, pieces, without

Content = Mapping[str, Sequence[Span]]
"""Spans by files."""


@dataclass(frozen=True)
class Piece:
    """Bytes [start, stop) of a file, for some sites, which other sites have.

    Args:
        name: of the file.
        goal: numbers of the sites that it goes to.
        holders: numbers of those that have all of it.
    """

    name: str
    start: int
    stop: int
    goal: tuple[int, ...]
    holders: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        """Return how long it is."""
        return self.stop - self.start


def missing(needs: Content, here: Content) -> dict[str, list[Span]]:
    """Return what is needed and isn't here."""
    found = {name: without(spans, here.get(name, ())) for name, spans in needs.items()}
    return {name: spans for name, spans in found.items() if spans}


def pieces_to_move(lacks: Sequence[Content], here: Sequence[Content], most_bytes: int) -> list[Piece]:
    """Return pieces that together are what sites lack, each byte in one piece, whoever lacks it.

    Args:
        lacks: what each site needs and doesn't have.
        here: what each site has.
        most_bytes: of a piece.
    """
    found = []
    for name in sorted({name for content in lacks for name in content}):
        wanted = [content.get(name, ()) for content in lacks]
        held = [content.get(name, ()) for content in here]
        edges = sorted({edge for spans in (*wanted, *held) for span in spans for edge in span})
        runs: list[Piece] = []
        for start, stop in pairwise(edges):
            goal = _covering(wanted, start)
            if not goal:
                continue
            run = Piece(name, start, stop, goal, _covering(held, start))
            last = runs[-1] if runs else None
            if last and (last.stop, last.goal, last.holders) == (start, goal, run.holders):
                runs[-1] = Piece(name, last.start, stop, goal, run.holders)
            else:
                runs.append(run)
        for run in runs:
            cut = pieces([(run.start, run.stop)], most_bytes)
            found += [Piece(name, start, stop, run.goal, run.holders) for start, stop in cut]
    return found


def _covering(contents: Sequence[Sequence[Span]], offset: int) -> tuple[int, ...]:
    """Return the numbers of those, of spans in order, that have the byte at an offset."""
    found = []
    for number, spans in enumerate(contents):
        place = bisect_right(spans, offset, key=lambda span: span[0])
        if place and offset < spans[place - 1][1]:
            found.append(number)
    return tuple(found)
