"""What gemoe submit would start, letter by letter; `python -m tests.cli.test_submit` writes
the golden files anew."""

from __future__ import annotations

import contextlib
import io
import os
import re
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest

from gemoe_ds.cli.submit import main
from gemoe_ds.cluster.job import Job
from gemoe_ds.errors import REQUEUE
from tests.helpers import repository

GOLDEN = repository() / "tests/cli/golden"
RECIPE = "launch/recipes/molmoe_gemoe_4_nodes.yaml"
CASES = {
    "srun": [RECIPE, "--nodes", "4", "--time", "12:00:00", "--partition", "gpu", "seed=3"],
    "srun_cpu": [RECIPE, "parallel.ep_size=2", "--nodes", "2", "--ranks-per-node=1", "--no-gpus"],
    "torchrun": [RECIPE, "--launcher", "torchrun", "--hosts", "n1", "n2", "n3", "n4"],
    "torchrun_alone": [RECIPE, "--launcher", "torchrun"],
    "deepspeed": [RECIPE, "--launcher", "deepspeed", "--hosts", "n1", "n2", "n3", "n4"],
    "mpirun": [RECIPE, "--launcher", "mpirun", "--hosts", "n1", "n2", "--master-port", "29511"],
}


@contextlib.contextmanager
def as_a_user():
    """In the checkout, with a variable that ranks need and one that they do not."""
    own = {"GLOO_SOCKET_IFNAME": "ib0", "HOME": "/root"}
    with mock.patch.dict(os.environ, own, clear=True), contextlib.chdir(repository()):
        yield


def printed(name: str) -> str:
    said = io.StringIO()
    with as_a_user(), contextlib.redirect_stdout(said):
        main([*CASES[name], "--dry-run"])
    return said.getvalue()


@pytest.mark.parametrize("name", CASES)
def test_as_in_the_golden_file(name):
    assert printed(name) == (GOLDEN / f"submit_{name}.txt").read_text()


@pytest.mark.parametrize("name", ["srun", "srun_cpu"])
def test_the_script_is_bash(name, tmp_path):
    script = tmp_path / "job.sbatch"
    script.write_text(printed(name).split("$ sbatch")[0])
    subprocess.run(["bash", "-n", script], check=True)
    assert '"$@"' not in script.read_text()


def test_from_another_folder_the_checkout_s_scripts_and_templates_are_named(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    main([*CASES["srun"], "--dry-run"])
    script = capsys.readouterr().out
    assert f"\nsource {repository()}/launch/slurm/run.sh\n" in script
    assert f"\nrun {repository()}/launch/train.py {RECIPE} seed=3 --resume auto" in script
    main([*CASES["deepspeed"], "--dry-run"])
    assert f" {repository()}/launch/train.py {RECIPE}" in capsys.readouterr().out


def test_the_hosts_are_written_beside_the_run_and_not_over_a_file_of_the_user(
    tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("gemoe_ds.config.validate_run", lambda *_, **__: None)
    started = []
    monkeypatch.setattr(os, "execvp", lambda program, words: started.append(words))
    (tmp_path / "hostfile").write_text("mine")
    main(CASES["deepspeed"])
    path = "runs/molmoe_gemoe.hostfile"
    assert started[0][:3] == ["deepspeed", "--hostfile", path]
    assert (tmp_path / path).read_text() == "".join(f"n{n} slots=8\n" for n in (1, 2, 3, 4))
    assert (tmp_path / "hostfile").read_text() == "mine"


@pytest.mark.parametrize("path", sorted((repository() / "launch/slurm").iterdir()), ids=str)
def test_templates_are_bash(path):
    subprocess.run(["bash", "-n", path], check=True)


def test_the_scripts_wait_for_the_requeue_code():
    script = (repository() / "launch/slurm/run.sh").read_text()
    assert f"# {REQUEUE}: asked to stop" in script


@pytest.mark.parametrize(
    "arguments, words",
    [
        ([RECIPE, "--nodes", "2", "--hosts", "a"], "--hosts names 1 hosts and --nodes is 2"),
        (
            [RECIPE, "--nodes", "1", "--ranks-per-node", "3", "parallel.ep_size=8"],
            "parallel.ep_size=8 does not divide",
        ),
        ([RECIPE, "--nodes", "1", "--ranks-per-node", "3"], "is not a multiple of"),
        ([RECIPE, "--nodes", "4", "--launcher", "mpirun"], "on 4 nodes needs --hosts"),
        ([RECIPE, "--hosts", "a"], "SLURM chooses them"),
        ([RECIPE, "--nodes", "4"], "no such file or folder"),
        ([RECIPE, "--nodes", "4", "output_dir=/", "--dry-run"], "output_dir=/: the script is kept"),
        ([RECIPE, "--nodes", "4", "optim.rate=1", "--dry-run"], "optim.rate: no such option"),
        (
            [RECIPE, "--nodes", "4", "resume=DIR", "--dry-run"],
            "give one of them, or start_from=DIR",
        ),
    ],
)
def test_mistakes_cost_a_line(arguments, words, capsys, monkeypatch):
    monkeypatch.chdir(repository())
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and words in line


@pytest.mark.parametrize("given, kept", [(".", "here.sbatch"), ("../here/..", "{above}.sbatch")])
def test_the_script_of_a_run_in_this_folder_is_beside_it(
    given, kept, tmp_path, monkeypatch, capsys
):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    main([RECIPE, "--nodes", "4", "--dry-run", f"output_dir={given}"])
    above = tmp_path if given == "." else tmp_path.parent
    assert f"# {above / kept.format(above=tmp_path.name)}\n" in capsys.readouterr().out


def test_any_option_of_sbatch_goes_into_the_script(capsys):
    given = ["--sbatch", "mem=64G", "--sbatch", "exclusive", "--sbatch=gres=gpu:h200:8"]
    main([*CASES["srun"], *given, "--dry-run"])
    script = capsys.readouterr().out
    for line in ("--mem=64G", "--exclusive", "--gres=gpu:h200:8", "--time=12:00:00"):
        assert f"\n#SBATCH {line}\n" in script


@pytest.mark.parametrize(
    "given, words",
    [
        (["--time", "2days"], "'2days' is no time limit; write minutes"),
        (["--sbatch", "mem 64G"], "'mem 64G': write NAME or NAME=VALUE"),
        (["--sbatch", "time=1:00:00"], "time is an option of its own: --time"),
        (["--sbatch", "ntasks-per-node=4"], "ntasks-per-node is --ranks-per-node"),
    ],
)
def test_wrong_options_of_sbatch_cost_a_line(given, words, capsys):
    with pytest.raises(SystemExit) as stop:
        main([*CASES["srun"], *given, "--dry-run"])
    assert stop.value.code == 2 and words in capsys.readouterr().err


@pytest.mark.parametrize("time", ["90", "12:00:00", "2-0", "2-12:30:00", "infinite"])
def test_times_that_sbatch_reads(time, capsys):
    main([RECIPE, "--nodes", "4", "--time", time, "--dry-run"])
    assert f"\n#SBATCH --time={time}\n" in capsys.readouterr().out


def test_options_of_an_array_keep_their_spaces():
    script = (repository() / "launch/slurm/array.sbatch").read_text()
    source = re.search(r"-c '(.*?)' ", script, re.DOTALL)[1]
    line = "optim.betas=[0.9, 0.95] model.router={name: gemoe, k_low: 1} seed=0"
    done = subprocess.run([sys.executable, "-c", source, line], capture_output=True, text=True)
    assert done.stdout.splitlines() == [
        "optim.betas=[0.9, 0.95]",
        "model.router={name: gemoe, k_low: 1}",
        "seed=0",
    ]


def test_a_job_takes_the_checkpoint_that_it_starts_from(capsys, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"extends: {repository() / RECIPE}\nresume: DIR\n")
    job = ["--nodes", "4", "--dry-run"]
    with pytest.raises(SystemExit):
        main([str(recipe), *job])
    assert f"resume=DIR in {recipe}: a SLURM job has" in capsys.readouterr().err
    main([str(recipe), *job, "resume=auto", "start_from=DIR"])
    assert f" {recipe} resume=auto start_from=DIR --resume auto\n" in capsys.readouterr().out


if __name__ == "__main__":
    for case in CASES:
        Path(GOLDEN / f"submit_{case}.txt").write_text(printed(case))
        print(f"wrote submit_{case}.txt", file=sys.stderr)


def test_what_a_user_has_set_for_ranks_goes_with_them():
    mine = {"NCCL_DEBUG": "INFO", "PYTORCH_ALLOC_CONF": "x", "CUDA_LAUNCH_BLOCKING": "1"}
    others = {"CUDA_VISIBLE_DEVICES": "3", "HOME": "/root", "TORCHELASTIC_RUN_ID": "7"}
    assert Job.concerning_ranks(mine | others) == tuple(sorted(mine))
