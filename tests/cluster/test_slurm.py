"""Real sbatch and srun on two nodes: trained, warned, preempted, requeued, and as if uncut."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest

from gemoe_ds.train.ledger import read_ledger
from tests.cluster.launches import metrics
from tests.cluster.slurm import slurm, why_not
from tests.cluster.test_stopping import write_recipe
from tests.helpers import repository
from tests.train.resuming import write_setting

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.skipif(bool(why_not()), reason=why_not()),
    pytest.mark.timeout(600),
]
STEPS = {"train": {"steps": 600, "micro_batch": 1, "global_batch": 2}}  # some 20 seconds


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    return write_setting(tmp_path_factory.mktemp("slurm"))


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    with slurm(tmp_path_factory.mktemp("cluster")) as running:
        yield running


def submit(cluster, recipe, *arguments: str, nodes: int = 2) -> str:
    said = cluster.call(
        *(sys.executable, "launch/submit.py", str(recipe), "--nodes", str(nodes)),
        *("--ranks-per-node", "1", "--no-gpus", "--cpus-per-task", "1", *arguments),
        cwd=repository(),
        DS_ACCELERATOR="cpu",
        OMP_NUM_THREADS="1",
        MASTER_ADDR="127.0.0.1",  # n1 and n2 are no names of hosts
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


@pytest.fixture(scope="module")
def uncut(setting, cluster):
    recipe, output = write_recipe(setting, setting["root"] / "uncut", **STEPS)
    job = submit(cluster, recipe)
    cluster.wait_for_state(job, "COMPLETED", 200)
    next(repository().glob(f"*-{job}.log")).unlink()
    return losses(output), read_ledger(output)


@pytest.mark.parametrize("how", ["warned", "preempted", "a node is lost"])
def test_a_job_that_is_cut_goes_on_as_if_it_was_not(
    setting, cluster, uncut, tmp_path, forget_logs, how
):
    recipe, output = write_recipe(setting, tmp_path, **STEPS, checkpoint={"every": 50, "keep": 2})
    job = submit(cluster, recipe)
    wait_for_step(output, 60)
    if how == "warned":
        cluster.call("scancel", "--signal=USR1", f"{job}.0")
    elif how == "preempted":
        urgent = cluster.call(
            *("sbatch", "-p", "urgent", "--exclusive", "-N2", "--output=/dev/null"),
            *("--wrap", "sleep 5"),
        ).split()[-1]
        cluster.wait_for_state(urgent, "COMPLETED")
    else:  # as SLURM sees it: the ranks of one node are gone
        found = subprocess.run(
            ["pgrep", "-f", f"launch/train.py {recipe}"], capture_output=True, text=True
        ).stdout.split()
        os.kill(int(found[-1]), signal.SIGKILL)
    cluster.start_now(job)
    cluster.wait_for_state(job, "COMPLETED", 200)
    said = log_of(job)
    assert "resumed from" in said, said[-3000:]
    if how != "a node is lost":
        assert "stopped: SIG" in said and "after step" in said, said[-3000:]
    assert losses(output) == uncut[0]
    assert read_ledger(output) == uncut[1]


def test_a_mistake_is_not_requeued(setting, cluster, tmp_path, forget_logs):
    recipe, output = write_recipe(setting, tmp_path, **STEPS)
    job = submit(cluster, recipe)
    recipe.unlink()
    cluster.wait_for_state(job, "FAILED")
    assert "error: " in log_of(job) and not output.exists()
