"""launch/slurm.sbatch under a real Slurm of one machine: submitted, run by srun and by mpirun, and its answers read."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import ranks
from tests.commands.test_batch import PROMPTS, plain, records, reference, text_of

ROOT = Path(__file__).parents[2]
DAEMONS = ("slurmctld", "slurmd", "sbatch", "srun")
WAIT_S = 90.0

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not all(shutil.which(name) for name in DAEMONS) or os.geteuid() != 0,
        reason="needs Debian's slurmctld, slurmd, slurm-client and libpmix-dev, and root to run them without munge",
    ),
]


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """A cluster of this one machine; the environment in which sbatch finds it."""
    folder, host = tmp_path_factory.mktemp("slurm"), socket.gethostname()
    control, node = ranks.free_ports(2)
    config = folder / "slurm.conf"
    config.write_text(
        f"""ClusterName=hippo
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={control}
SlurmdPort={node}
SlurmUser=root
AuthType=auth/none
CredType=cred/none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
ReturnToService=2
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
SlurmdParameters=config_overrides
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
NodeName={host} NodeAddr=127.0.0.1 CPUs=4 State=UNKNOWN
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""
    )
    env = {**os.environ, "SLURM_CONF": str(config)}
    daemons = [ranks.start([name, "-D"], env) for name in ("slurmctld", "slurmd")]
    try:
        ends = time.monotonic() + 30
        while "idle" not in subprocess.run(["sinfo", "-h"], env=env, capture_output=True, text=True).stdout:
            assert time.monotonic() < ends, [daemon.err for daemon in daemons]
            time.sleep(0.2)
        yield env
    finally:
        below = [pid for daemon in daemons for pid in ranks.descendants(daemon.process.pid)]
        ranks.end(daemons)
        for pid in below:
            subprocess.run(["kill", "-9", str(pid)], capture_output=True)


@pytest.mark.parametrize("launcher", ["srun", "mpirun"])
def test_a_job(slurm: dict[str, str], launcher: str, tmp_path: Path) -> None:
    ids = plain(tmp_path / "prompts")
    env = {**slurm, "HIPPO_LAUNCHER": launcher, "PATH": f"{ranks.BIN}:{slurm['PATH']}"}
    # One node stands for two; the rest is as a person types it.
    typed = ["sbatch", "--nodes=1", "--ntasks=2", "--ntasks-per-node=2", f"--output={tmp_path}/log"]
    command = [*typed, str(ROOT / "launch" / "slurm.sbatch"), str(tmp_path / "prompts"), "--max-tokens", "24"]
    submitted = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert submitted.returncode == 0, submitted.stderr
    job = submitted.stdout.split()[-1]
    ends = time.monotonic() + WAIT_S
    while subprocess.run(["squeue", "-h", "-j", job], env=env, capture_output=True, text=True).stdout.strip():
        assert time.monotonic() < ends, (tmp_path / "log").read_text()
        time.sleep(0.2)
    log = (tmp_path / "log").read_text()
    assert "4 of 4 done" in log
    assert f"started by {launcher}" in log, "srun needs Debian's libpmix-dev"
    found = records(tmp_path / "prompts.answers.jsonl")
    assert [text_of(found[custom_id]) for custom_id in ids] == reference(PROMPTS)
