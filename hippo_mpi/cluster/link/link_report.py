"""Shows what was found about links: a table for people, an object for programs."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

from hippo_mpi.cluster.asking.facts import Probed
from hippo_mpi.cluster.doctor.findings import Finding
from hippo_mpi.cluster.link.link import Links, name_of
from hippo_mpi.cluster.link.link_checks import findings_of, interfaces_of, kind_of, ms_of, rate_of, used
from hippo_mpi.cluster.link.link_cost import Cost
from hippo_mpi.cluster.link.link_measure import SIZES, Measured, Rate

_COLUMNS = (
    "link", "by", "kind", "ms", "p95", "p99", "8 KiB", "Gbit/s", "by 4", "back", "by 4", "in ring", "ms", "usual", "verdict",
)  # fmt: skip
_EXPLANATION = (
    "ms: there and back, of 64 bytes; Gbit/s: of one connection, and of four; in ring: while all neighbors send;"
    " usual: what such a link gives"
)


def lines_of(links: Links, hosts: Sequence[Probed], findings: Sequence[Finding], cost: Cost | None) -> Iterator[str]:
    """Return what people are told: a row per link, then what is wrong, then what it costs."""
    rows = [_COLUMNS, *(_row(link, links, hosts) for link in links.measured)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows if links.measured else ():
        yield "  ".join(f"{cell:{width}}" for cell, width in zip(row, widths, strict=True)).rstrip()
    if links.measured:
        yield _EXPLANATION
    for one in findings:
        yield f"{one.weight}: {one.check} on {one.host}: {one.found}"
        yield f"  {one.fix}"
    if links.measured and not findings:
        yield "nothing is wrong"
    if cost:
        yield cost.line


def _row(link: Measured, links: Links, hosts: Sequence[Probed]) -> tuple[str, ...]:
    ends = f"{name_of(hosts, link.pair.rank)} > {name_of(hosts, link.pair.other)}"
    if link.there is None or link.back is None:
        return ends, *[""] * (len(_COLUMNS) - 2), _verdict(link, links, hosts)
    kind, small, large = kind_of(link, links, hosts), *(link.round_trips[size] for size in SIZES)
    times = [ms_of(one) for one in (small.median_s, small.p95_s, small.p99_s, large.median_s)]
    rates = [rate_of(8 * one) for one in (link.there.one, link.there.several, link.back.one, link.back.several)]
    at_once = rate_of(8 * link.there.at_once) if link.there.at_once is not None else ""
    loaded = ms_of(link.loaded.median_s) if link.loaded else ""
    usual = rate_of(kind.usual_bits_per_s) if kind else "?"
    near, far = interfaces_of(link, hosts)
    by = f"{used(link.traffic_there, 'sent', near)} {used(link.traffic_there, 'received', far)}"
    verdict = _verdict(link, links, hosts)
    return ends, by, kind.name if kind else "?", *times, *rates, at_once, loaded, usual, verdict


def _verdict(link: Measured, links: Links, hosts: Sequence[Probed]) -> str:
    found = findings_of(Links([link], links.kinds, {}), hosts)
    return ", ".join(dict.fromkeys(one.check for one in found)) or "good"


def to_json(links: Links, hosts: Sequence[Probed], findings: Sequence[Finding], cost: Cost | None) -> str:
    """Return everything as a JSON object; seconds, and bytes per second."""
    said: dict[str, Any] = {
        "hosts": [{"host": host.host.ssh, "answered": host.facts is not None} for host in hosts],
        "links": [_object(link, links, hosts) for link in links.measured],
        "findings": [asdict(one) for one in findings],
    }
    return json.dumps(said | ({"cost": asdict(cost)} if cost else {}), indent=1)


def _object(link: Measured, links: Links, hosts: Sequence[Probed]) -> dict[str, Any]:
    kind, (near, far) = kind_of(link, links, hosts), interfaces_of(link, hosts)

    def way(rate: Rate | None, sent: str, received: str) -> dict[str, Any] | None:
        return asdict(rate) | {"sent_by": sent, "received_by": received} if rate else None

    there, back = link.traffic_there, link.traffic_back
    return {
        "rank": link.pair.rank,
        "other": link.pair.other,
        "address": link.pair.address,
        "error": link.error or None,
        "round_trips": {size: asdict(times) for size, times in link.round_trips.items()},
        "there": way(link.there, used(there, "sent", near), used(there, "received", far)),
        "back": way(link.back, used(back, "sent", far), used(back, "received", near)),
        "loaded": asdict(link.loaded) if link.loaded else None,
        "kind": asdict(kind) if kind else None,
        "verdict": _verdict(link, links, hosts),
    }
