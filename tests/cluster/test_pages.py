"""The commands of docs/launching/*.md, as they stand there, from a clone to a trained run."""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cluster import hosts, slurm
from tests.helpers import repository

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(900)]
PAGES = sorted((repository() / "docs/launching").glob("*.md"))
NOT_RUN = "# not run here"
CPU = {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}


def blocks(page: Path) -> list[list[tuple[str, str]]]:
    """Of each `sh` block its commands: where (empty: here) and what."""
    found = []
    for block in re.findall(r"```sh\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL):
        lines = [re.match(r"(\w*)\$ (.*)", line) for line in block.splitlines()]
        assert all(lines), f"{page.name}: every line of a block is a command: {block}"
        found.append([(line[1], line[2]) for line in lines if line and NOT_RUN not in line[2]])
    return found


@pytest.fixture
def clone(tmp_path):
    """What is committed or about to be, with this environment."""
    folder = tmp_path / "gemoe_ds"
    known = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    files = subprocess.run(known, cwd=repository(), capture_output=True, text=True, check=True)
    for name in files.stdout.splitlines():
        if os.path.lexists(repository() / name):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(repository() / name, folder / name, follow_symlinks=False)
    (folder / ".venv").unlink(missing_ok=True)
    (folder / ".venv").symlink_to(Path(sys.prefix))
    return folder


def in_bash(clone: Path, lines: list[str]) -> list[str]:
    return ["bash", "-ec", "\n".join([f"cd {clone}", *lines])]


def run(clone: Path, command: list[str], **environment: str) -> str:
    done = subprocess.run(
        command, env=os.environ | CPU | environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    return done.stdout + done.stderr


def steps_of(run: Path) -> int:
    newest = (run / "checkpoints/latest").read_text()
    return int(newest.removeprefix("step-"))


def test_alone(clone):
    page = repository() / "docs/launching/alone.md"
    said = run(clone, in_bash(clone, [what for block in blocks(page) for _, what in block]))
    assert "nothing written" in said
    assert steps_of(clone / "runs/trial/run") == 120
    assert (clone / "runs/trial/eval/eval.json").exists()


LAUNCHED = {
    "torchrun": ("run", "two", "restarted"),
    "deepspeed": ("run", "two"),
    "mpirun": ("run", "two"),
}


@pytest.mark.skipif(bool(hosts.why_not()), reason=hosts.why_not())
@pytest.mark.parametrize("launcher", LAUNCHED)
def test_one_host_and_two(clone, tmp_path, launcher):
    """What has no host before its `$` runs on node1; lines of several hosts run at once."""
    folder = tmp_path / "network"
    folder.mkdir()
    variables = os.environ | CPU | {"GLOO_SOCKET_IFNAME": "eth0"}
    with hosts.hosts(folder) as two:
        name_of = dict(zip(("node1", "node2"), two.names, strict=True))
        kept: list[str] = []  # exports and the environment last for the page
        for block in blocks(repository() / f"docs/launching/{launcher}.md"):
            started = []
            for where, written in block:
                what = re.sub(r"node[12]", lambda match: name_of[match[0]], written)
                if re.match("source|export", what):
                    kept.append(what)
                    continue
                command = two.command(name_of[where or "node1"], *in_bash(clone, [*kept, what]))
                if where:
                    started.append(subprocess.Popen(command, env=variables))
                else:
                    run(clone, command, GLOO_SOCKET_IFNAME="eth0")
            assert [process.wait(300) for process in started] == [0] * len(started)
    for name in LAUNCHED[launcher]:
        assert steps_of(clone / "runs/trial" / name) == 120


@pytest.mark.skipif(bool(slurm.why_not()), reason=slurm.why_not())
def test_slurm(clone, tmp_path):
    page = repository() / "docs/launching/slurm.md"
    folder = tmp_path / "cluster"
    folder.mkdir()
    with slurm.slurm(folder) as cluster:
        variables = {"SLURM_CONF": str(cluster.config), "MASTER_ADDR": socket.gethostname()}
        said = run(
            clone,
            in_bash(clone, [what for block in blocks(page) for _, what in block]),
            **variables,
        )
        assert "#SBATCH --nodes=2" in said and "RANK='0'" in said
        jobs = re.findall(r"Submitted batch job (\d+)", said)
        assert len(jobs) == 4
        cluster.wait_for_all(400)
        logs = "\n".join(path.read_text() for path in clone.glob("*.log"))
    trial = clone / "runs/trial"
    assert steps_of(trial / "run") == steps_of(trial / "one") == 120, logs[-3000:]
    assert steps_of(trial / "seed_0") == steps_of(trial / "seed_1") == 20, logs[-3000:]
    assert (trial / "eval/k_8/eval.json").exists() and (trial / "eval/k_5/eval.json").exists(), logs


def test_every_command_is_run_or_marked():
    """A page has no other blocks, and every page has a test above."""
    assert {page.stem for page in PAGES} == {"alone", "slurm", *LAUNCHED}
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        assert text.count("```sh\n") * 2 == text.count("```"), page.name
        assert any(blocks(page))
