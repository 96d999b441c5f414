"""What a ring's links cost in tokens per second: hippo_mpi.plan predicts it, over them and over what they should be."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from hippo_mpi.cluster.asking.facts import Probed
from hippo_mpi.cluster.link.link import Links, is_in_ring
from hippo_mpi.cluster.link.link_checks import kind_of
from hippo_mpi.cluster.link.link_measure import SIZES
from hippo_mpi.errors import UserError

_TIMEOUT_S = 3600.0  # it loads each rank's layers in turn
_PROMPT_TOKENS = 512
_UNKNOWN_GIBIBYTES = 1024
_NO_LOSS = 0.01  # which no prediction tells from none


@dataclass(frozen=True)
class Way:
    """A link as the prediction takes it: seconds for a hop, bytes per second; and tokens per second, predicted."""

    hop_s: float
    bytes_per_s: float
    prompt_tps: float = 0.0
    decode_tps: float = 0.0


@dataclass(frozen=True)
class Cost:
    """Predictions for a model over the slowest link that was measured, and over what it should be; None: unknown."""

    model: str
    measured: Way
    usual: Way | None

    @property
    def line(self) -> str:
        """What people are told."""
        one, usual = self.measured, self.usual
        told = (
            f"{self.model} over the slowest link ({one.hop_s * 1e3:.2f} ms a hop, {one.bytes_per_s * 8e-9:.3g} Gbit/s), as"
            f" predicted: {one.decode_tps:.1f} tokens/s, prompt {one.prompt_tps:.0f} tokens/s"
        )
        if usual is None:
            return told
        decode, prompt = _loss(one.decode_tps, usual.decode_tps), _loss(one.prompt_tps, usual.prompt_tps)
        return f"{told}; decode {decode}, prompt {prompt} than over a usual one"


def _loss(rate: float, usual: float) -> str:
    lost = 1 - rate / usual
    return f"{lost:.0%} slower" if lost > _NO_LOSS else "no slower"


def cost_of(model: str, links: Links, hosts: Sequence[Probed]) -> Cost | None:
    """Predict with the slowest hop and the lowest rate of the ring's links; None if no link of it was measured.

    Raises:
        UserError: the prediction says why it can't.
    """
    ring = [
        link for link in links.measured
        if is_in_ring(link.pair, len(hosts)) and link.there and not link.error
    ]  # fmt: skip
    if not ring:
        return None
    hop_s = max(link.round_trips[SIZES[0]].median_s / 2 for link in ring)
    ways = [Way(hop_s, min(link.there.one for link in ring if link.there))]  # MLX's ring has one connection per address
    kinds = [kind_of(link, links, hosts) for link in ring]
    known = [kind for kind in kinds if kind is not None]
    if len(known) == len(kinds):
        usual_s = max(kind.usual_s / 2 for kind in known)
        ways.append(Way(usual_s, min(kind.usual_bits_per_s for kind in known) / 8))
    predicted = _predict(model, ways, hosts)
    return Cost(model, predicted[0], predicted[1] if len(predicted) > 1 else None)


def _predict(model: str, ways: Sequence[Way], hosts: Sequence[Probed]) -> list[Way]:
    """Run the prediction in a process of its own: it needs MLX, the model, and this machine's time."""
    command = [sys.executable, "-m", "hippo_mpi.plan", "--model", model, "--simulate", "--json", "--concurrent", "1"]
    command += ["--prompt-tokens", str(_PROMPT_TOKENS)]
    for rank, host in enumerate(hosts):
        memory = host.facts.memory if host.facts else None
        command += ["--machine", f"rank{rank}:{memory[0] / 2**30 if memory else _UNKNOWN_GIBIBYTES:.2f}"]
    for way in ways:
        command += ["--link", f"{way.hop_s * 1e6:.3f}us,{way.bytes_per_s / 1e6:.6f}MB/s"]
    try:
        ended = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=_TIMEOUT_S)
        said = json.loads(ended.stdout)
        tokens = said["workload"]["prompt_tokens"]
        rates = [link["pipeline"]["typical"] for link in said["links"]]
        return [
            Way(way.hop_s, way.bytes_per_s, tokens / rate["first_token_s"], rate["decode_tps"]["1"])
            for way, rate in zip(ways, rates, strict=True)
        ]
    except subprocess.TimeoutExpired:
        raise UserError(f"--model {model}: the prediction took longer than {_TIMEOUT_S:.0f} s") from None
    except (ValueError, KeyError, TypeError):
        lines = [line for line in ended.stderr.splitlines() if line.strip()]
        why = lines[-1].removeprefix("error: ") if lines else f"it ended with status {ended.returncode}"
        raise UserError(f"--model {model}: no prediction: {why}") from None
