"""How `top` looks: a table that fits a terminal, and an object for programs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.text import Text

from hippo_mpi.cluster.top.top_state import HostState, RankState, ServerState
from hippo_mpi.units import count_of, layer_range

_GIB = 1 << 30
_EMPTY = ("", "", "")
_LEFT = ("", "link", "layers")  # columns of words
_MIN_NAME = 6


def screen(
    hosts: Sequence[HostState], server: ServerState | None, now_s: float, size: tuple[int, int], keys: str = ""
) -> Text:
    """Return what is shown.

    Args:
        hosts: by rank.
        server: None: none is asked.
        now_s: on the clock of the hosts' states.
        size: columns and lines of the terminal; no more are used.
        keys: what may be pressed.
    """
    width, height = size
    head = [f"{count_of(len(hosts), 'host')}; memory in GiB, links in bit/s{keys}"]
    if server:
        rate = f", {server.tokens_per_s:.1f} tokens/s" if server.tokens_per_s is not None else ""
        head.append(f"server  {server.line}{rate}")
    rows = _rows(hosts, server, now_s)
    notes = [f"{host.name}: {host.why_lost}" for host in hosts if host.why_lost]
    room = max(1, height - 2 - len(head))  # the last line stays free: a newline there would scroll
    notes = notes[: room // 3]
    fitting = rows[1 : 1 + room - len(notes)]
    if len(fitting) < len(rows) - 1:
        fitting = fitting[:-1]
        notes.append(f"{len(rows) - 1 - len(fitting)} more lines: enlarge the window")
    lines = [*head, *_aligned([rows[0], *fitting], width), *notes]
    cut = [line if len(line) <= width else f"{line[: width - 1]}…" for line in lines]
    troubled = {len(head) + 1 + number for number, row in enumerate(fitting) if row[1]}
    styles = {len(head): "bold"} | dict.fromkeys(troubled, "red")
    return Text("\n").join(Text(line, styles.get(number, "")) for number, line in enumerate(cut))


def _rows(hosts: Sequence[HostState], server: ServerState | None, now_s: float) -> list[list[str]]:
    """Return the table, its names of columns first."""
    has_gpu = any(host.sample and host.sample.gpu is not None for host in hosts)
    has_ranks = bool(server and server.ranks)
    rows = [["host", "", "ours", "others", "free", "CPU", *["GPU"] * has_gpu, "link", "in", "out"]]
    rows[0] += ["layers", "busy", "hop ms"] * has_ranks
    for number, host in enumerate(hosts):
        trouble = host.trouble(now_s)
        links = [_link(*one) for one in host.links() if not trouble] or [_EMPTY]
        rank = _rank(rank_of(number, host, hosts, server)) if has_ranks else []
        state = _cells(host, has_gpu, bool(trouble))
        rows.append([host.name, trouble, *state, *links[0], *rank])
        rows += [["", "", *[""] * len(state), *link, *[""] * len(rank)] for link in links[1:]]
    return rows


def _aligned(rows: Sequence[Sequence[str]], width: int) -> list[str]:
    """Return rows as lines; names of hosts give way to what doesn't fit beside them."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    gaps = sum(1 for one in widths[1:] if one)
    widths[0] = max(_MIN_NAME, min(widths[0], width - sum(widths[1:]) - gaps))
    lines = []
    for row in rows:
        name = row[0] if len(row[0]) <= widths[0] else f"{row[0][: widths[0] - 1]}…"
        cells = [f"{name:{widths[0]}}"]
        for title, cell, room in zip(rows[0][1:], row[1:], widths[1:], strict=True):
            if room:
                cells.append(f"{cell:{room}}" if title in _LEFT else f"{cell:>{room}}")
        lines.append(" ".join(cells).rstrip())
    return lines


def rank_of(number: int, host: HostState, hosts: Sequence[HostState], server: ServerState | None) -> RankState | None:
    """Return the server's rank on a host: that of the same number, if there are as many, else of the same name."""
    ranks = server.ranks if server else ()
    if len(ranks) == len(hosts):
        return ranks[number]
    return next((one for one in ranks if one.host == host.name), None)


def _cells(host: HostState, has_gpu: bool, is_silent: bool) -> list[str]:
    one = host.sample
    if one is None or is_silent:
        return [""] * (4 + has_gpu)
    memory = [f"{count / _GIB:.1f}" for count in (one.our_bytes, one.other_bytes, one.free_bytes)]
    gpu = ["" if one.gpu is None else f"{one.gpu:.0%}"] if has_gpu else []
    return [*memory, f"{one.cpu:.0%}", *gpu]


def _link(name: str, received: float, sent: float) -> tuple[str, str, str]:
    return name, _rate(received), _rate(sent)


def _rate(bytes_per_s: float) -> str:
    """Return bytes per second as bits per second, in five letters at most."""
    bits = bytes_per_s * 8
    for unit in ("", "k", "M"):
        if bits < 999.5:
            return f"{bits:.0f}{unit}" if unit else f"{bits:.0f}"
        bits /= 1e3
    return f"{bits:.1f}G"


def _rank(one: RankState | None) -> list[str]:
    if one is None:
        return ["", "", ""]
    return [layer_range(*one.layers), f"{one.busy:.0%}", f"{one.hop_ms:.2f}"]


def to_object(hosts: Sequence[HostState], server: ServerState | None, now_s: float) -> dict[str, Any]:
    """Return everything for JSON: bytes, bytes per second, shares, seconds."""
    found: dict[str, Any] = {"hosts": [_host_object(number, hosts, server, now_s) for number in range(len(hosts))]}
    if server:
        found["server"] = {"state": server.line, "tokens_per_s": server.tokens_per_s}
    return found


def _host_object(number: int, hosts: Sequence[HostState], server: ServerState | None, now_s: float) -> dict[str, Any]:
    host, rank = hosts[number], rank_of(number, hosts[number], hosts, server)
    one = host.sample
    said: dict[str, Any] = {"host": host.name, "trouble": host.trouble(now_s), "why": host.why_lost or None}
    if one:
        said |= {
            "silent_s": round(now_s - host.heard_s, 1), "total_bytes": one.total_bytes, "free_bytes": one.free_bytes,
            "our_bytes": one.our_bytes, "cpu": one.cpu, "gpu": one.gpu,
            "links": {name: {"in": received, "out": sent} for name, received, sent in host.links()},
        }  # fmt: skip
    if rank:
        said |= {"layers": list(rank.layers), "busy": rank.busy, "hop_ms": rank.hop_ms}
    return said
