"""A private SLURM of several nodes on this machine: munge, slurmctld and a slurmd a node, as root.

Nothing under /etc is touched; every file is in the folder of the test. Nodes are names only: all
are 127.0.0.1, with a port each.
"""

from __future__ import annotations

import os
import secrets
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from tests.cluster import programs

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol")
ENDED = ("FAILED", "COMPLETED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
GRACE = 20  # seconds between a preemption's SIGTERM and its SIGKILL


why_not = partial(programs.why_not, PROGRAMS)


class Slurm:
    def __init__(self, folder: Path, nodes: int) -> None:
        self.folder, self.names = folder, [f"n{i + 1}" for i in range(nodes)]
        self.config = folder / "slurm.conf"
        self.environment = os.environ | {"SLURM_CONF": str(self.config)}

    def up(self) -> None:
        for name in ("run", "state", "spool", "log", *(f"tmp/{n}" for n in self.names)):
            (self.folder / name).mkdir(parents=True)
        key = self.folder / "munge.key"
        key.write_bytes(secrets.token_bytes(1024))
        key.chmod(0o600)
        run = self.folder / "run"
        run.chmod(0o755)
        self.config.write_text(self._config())
        (self.folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\nCgroupAutomount=yes\n")
        subprocess.run(
            [
                *("munged", f"--key-file={key}", f"--socket={run}/munge.sock"),
                *(f"--pid-file={run}/munged.pid", f"--log-file={self.folder}/log/munged.log"),
                *(f"--seed-file={run}/munged.seed", "--force"),
            ],
            check=True,
        )
        self.call("slurmctld", "-f", str(self.config))
        for name in self.names:
            self.call("slurmd", "-f", str(self.config), "-N", name)
        self.wait(lambda: self.call("sinfo", "-h", "-N", "-o", "%t").split(), ["idle"], 30)

    def down(self) -> None:
        subprocess.run(["scancel", "-u", "root"], env=self.environment, timeout=20)
        time.sleep(1)
        for name in ("slurmd-*", "slurmctld", "munged"):
            for path in (self.folder / "run").glob(f"{name}.pid"):
                os.kill(int(path.read_text()), signal.SIGTERM)
        time.sleep(1)

    def lose(self, node: str) -> None:
        """As if its power was cut: the daemon is gone, and SLURM finds out by itself."""
        os.kill(int((self.folder / f"run/slurmd-{node}.pid").read_text()), signal.SIGKILL)

    def revive(self, node: str) -> None:
        self.call("slurmd", "-f", str(self.config), "-N", node)

    def call(self, *command: str, cwd: Path | None = None, **changes: str) -> str:
        done = subprocess.run(
            command, env=self.environment | changes, cwd=cwd, capture_output=True, text=True
        )
        assert done.returncode == 0, (command, done.stderr)
        return done.stdout

    def state(self, job: str) -> str:
        """As squeue says, or what the job ended as."""
        lines = self.call("scontrol", "show", "job", job).split()
        return next(w.removeprefix("JobState=") for w in lines if w.startswith("JobState="))

    def wait_for_state(self, job: str, state: str, timeout: float = 120) -> None:
        end = time.monotonic() + timeout
        while (now := self.state(job)) != state:
            assert time.monotonic() < end and now not in ENDED, f"job {job} is {now}, not {state}"
            time.sleep(0.3)

    def wait_for_all(self, timeout: float) -> None:
        """Until no job waits or runs."""
        end = time.monotonic() + timeout
        while left := self.call("squeue", "-h", "-o", "%i %T").split("\n")[:-1]:
            assert time.monotonic() < end, left
            time.sleep(1)

    def start_now(self, job: str) -> None:
        """A requeued job waits for two minutes before it may start; here it need not."""
        self.wait_for_state(job, "PENDING")
        self.call("scontrol", "update", f"JobId={job}", "StartTime=now")

    @staticmethod
    def wait(look, wanted, timeout: float) -> None:
        end = time.monotonic() + timeout
        while set(look()) != set(wanted):
            assert time.monotonic() < end, look()
            time.sleep(0.2)

    def _config(self) -> str:
        folder, host, run = self.folder, socket.gethostname().split(".")[0], self.folder / "run"
        ports = _free_ports(len(self.names) + 1)
        nodes = "\n".join(
            f"NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs=4 "
            "RealMemory=4000 State=UNKNOWN"
            for name, port in zip(self.names, ports[1:], strict=True)
        )
        return f"""\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={run}/munge.sock
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
TmpFS={folder}/tmp/%n
SlurmctldPidFile={run}/slurmctld.pid
SlurmdPidFile={run}/slurmd-%n.pid
SlurmctldLogFile={folder}/log/slurmctld.log
SlurmdLogFile={folder}/log/slurmd-%n.log
SlurmctldPort={ports[0]}
SlurmdParameters=config_overrides
ProctrackType=proctrack/cgroup
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=2,bf_interval=2,batch_sched_delay=0
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
MpiDefault=none
ReturnToService=2
SlurmdTimeout=15
KillWait=10
{nodes}
PartitionName=batch Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1 GraceTime={GRACE}
PartitionName=urgent Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=OFF
"""


def _free_ports(number: int) -> list[int]:
    probes = [socket.socket() for _ in range(number)]
    for probe in probes:
        probe.bind(("127.0.0.1", 0))
    ports = [probe.getsockname()[1] for probe in probes]
    for probe in probes:
        probe.close()
    return ports


@contextmanager
def slurm(folder: Path, nodes: int = 2) -> Iterator[Slurm]:
    cluster = Slurm(folder, nodes)
    try:
        cluster.up()
        yield cluster
    finally:
        cluster.down()
