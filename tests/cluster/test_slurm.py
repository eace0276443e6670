"""Real sbatch and srun on two nodes, the demo's recipe: trained, warned, preempted, robbed of a
rank and of a node, requeued, and as if uncut."""

from __future__ import annotations

import os
import signal
import socket
import sys
import time
from pathlib import Path

import pytest

from tests.cluster.launches import metrics
from tests.cluster.slurm import slurm, why_not
from tests.cluster.trial import RECIPE, options, write_trial
from tests.helpers import repository
from tests.train.sample_logs import read_sample_log

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.skipif(bool(why_not()), reason=why_not()),
    pytest.mark.timeout(600),
]


@pytest.fixture(scope="module")
def trial(tmp_path_factory):
    return write_trial(tmp_path_factory.mktemp("trial"))


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    with slurm(tmp_path_factory.mktemp("cluster")) as running:
        yield running


def submit(cluster, *arguments: str, nodes: int = 2) -> str:
    said = cluster.call(
        *(sys.executable, "launch/submit.py", RECIPE, *arguments, "--nodes", str(nodes)),
        *("--ranks-per-node", "1", "--no-gpus", "--cpus-per-task", "1"),
        cwd=repository(),
        DS_ACCELERATOR="cpu",
        OMP_NUM_THREADS="1",
        MASTER_ADDR=socket.gethostname(),  # n1 and n2 are no names of hosts
        GEMOE_PYTHON=sys.executable,
    )
    return said.split()[-1]


def log_of(job: str) -> str:
    path = next(repository().glob(f"*-{job}.log"), None)
    return path.read_text(errors="replace") if path else ""


@pytest.fixture
def forget_logs():
    """Each test's logs are printed, which pytest shows if it fails, and removed."""
    before = set(repository().glob("*.log"))
    yield
    for path in set(repository().glob("*.log")) - before:
        print(path.read_text(errors="replace")[-5000:])
        path.unlink()


def wait_for_step(output, step: int, timeout: float = 120) -> None:
    end = time.monotonic() + timeout
    while not any(line["step"] >= step for line in metrics(output)):
        assert time.monotonic() < end
        time.sleep(0.1)


def losses(output) -> dict[int, float]:
    found = [(line["step"], line["loss/lm"]) for line in metrics(output)]
    assert len(dict(found)) == len(found), "no step twice"
    return dict(found)


def rank_on(node: str, recipe: str) -> int:
    """The process of the only rank there."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            words = (folder / "cmdline").read_bytes().split(b"\0")
            variables = (folder / "environ").read_bytes().split(b"\0")
        except OSError:  # it has gone
            continue
        if recipe.encode() in words and f"SLURMD_NODENAME={node}".encode() in variables:
            if b"launch/train.py" in words and words[0].endswith(b"python"):
                return int(folder.name)
    raise AssertionError(f"no rank on {node}")


@pytest.fixture(scope="module")
def uncut(trial, cluster):
    output = trial / "uncut"
    job = submit(cluster, *options(trial, output))
    cluster.wait_for_state(job, "COMPLETED", 300)
    assert "preflight: 2 ranks on 1 hosts are fit" in log_of(job)
    next(repository().glob(f"*-{job}.log")).unlink()
    return losses(output), read_sample_log(output)


@pytest.mark.parametrize("how", ["warned", "preempted", "a rank is lost", "a node is lost"])
def test_a_job_that_is_cut_goes_on_as_if_it_was_not(
    trial, cluster, uncut, tmp_path, forget_logs, how
):
    output = tmp_path / "run"
    job = submit(cluster, *options(trial, output, "checkpoint.every=10"))
    wait_for_step(output, 25)
    if how == "warned":
        cluster.call("scancel", "--signal=USR1", f"{job}.0")
    elif how == "preempted":
        urgent = cluster.call(
            *("sbatch", "-p", "urgent", "--exclusive", "-N2", "--output=/dev/null"),
            *("--wrap", "sleep 5"),
        ).split()[-1]
        cluster.wait_for_state(urgent, "COMPLETED")
    elif how == "a rank is lost":
        os.kill(rank_on("n2", RECIPE), signal.SIGKILL)
    else:
        rank = rank_on("n2", RECIPE)
        cluster.lose("n2")
        os.kill(rank, signal.SIGKILL)
        cluster.wait_for_state(job, "PENDING")
        cluster.revive("n2")
    cluster.start_now(job)
    cluster.wait_for_state(job, "COMPLETED", 300)
    said = log_of(job)
    assert "resumed from" in said, said[-3000:]
    if how in ("warned", "preempted"):
        assert "stopped: SIG" in said and "after step" in said, said[-3000:]
    else:
        assert "error: rank 1 (host " in said, said[-3000:]
    assert losses(output) == uncut[0]
    assert read_sample_log(output) == uncut[1]


def test_a_mistake_is_not_requeued(trial, cluster, tmp_path, forget_logs):
    moved = trial.with_name("moved")
    output = tmp_path / "run"
    job = submit(cluster, *options(trial, output))
    trial.rename(moved)  # while the job waits
    try:
        cluster.wait_for_state(job, "FAILED")
    finally:
        moved.rename(trial)
    assert "error: " in log_of(job) and not output.exists()
