"""What launchers, shells and other jobs leave in the environment: a right start, or one line."""

from __future__ import annotations

import itertools

import pytest

from gemoe_ds.engine.launcher_env import (
    Start,
    device_index,
    first_host,
    read_start,
    refuse_hidden_gpus,
    settle_accelerator,
)
from gemoe_ds.errors import ConfigError

BY_HAND = {"RANK": "1", "WORLD_SIZE": "4", "LOCAL_RANK": "1"}
MASTER = {"MASTER_ADDR": "n1", "MASTER_PORT": "29501"}
TORCHRUN = (
    BY_HAND
    | MASTER
    | {"LOCAL_WORLD_SIZE": "2", "GROUP_RANK": "0", "GROUP_WORLD_SIZE": "2"}
    | {"TORCHELASTIC_RUN_ID": "none", "TORCHELASTIC_USE_AGENT_STORE": "True"}
)
DEEPSPEED = BY_HAND | MASTER | {"LOCAL_SIZE": "4", "CROSS_RANK": "0", "CROSS_SIZE": "1"}
OPEN_MPI = {
    "OMPI_COMM_WORLD_RANK": "5",
    "OMPI_COMM_WORLD_SIZE": "8",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "4",
}
HYDRA = {"PMI_RANK": "5", "PMI_SIZE": "8", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "4"}
JOB = {"SLURM_JOB_ID": "30123", "SLURM_NTASKS": "8", "SLURM_JOB_NUM_NODES": "2"}
BATCH = JOB | {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_JOB_NODELIST": "n[1-2]"}
SRUN = JOB | {
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_STEP_NUM_NODES": "2",
    "SLURM_STEP_NODELIST": "n[3-4]",
}
ONE_TASK = SRUN | {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_STEP_NUM_TASKS": "1"}
DAEMONS = SRUN | {"SLURM_PROCID": "1", "SLURM_LOCALID": "0", "SLURM_STEP_NUM_TASKS": "2"}
ALONE = Start()
FROM_SRUN = Start(5, 8, 1, "n3", 30123)
FROM_MPI = Start(5, 8, 1, None, 29500)

STARTS = {
    "nothing": ({}, ALONE),
    "empty": (dict.fromkeys([*TORCHRUN, *OPEN_MPI, *SRUN], ""), ALONE),
    "spaces": (BY_HAND | MASTER | {"RANK": " 1 "}, Start(1, 4, 1, "n1", 29501)),
    "by hand": (BY_HAND | MASTER, Start(1, 4, 1, "n1", 29501)),
    "by hand, no port": (BY_HAND | {"MASTER_ADDR": "n1"}, Start(1, 4, 1, "n1", 29500)),
    "no local rank": ({"RANK": "1", "WORLD_SIZE": "2"} | MASTER, Start(1, 2, None, "n1", 29501)),
    "one rank by hand": ({"RANK": "0", "WORLD_SIZE": "1"}, ALONE),
    "one rank needs no address": ({"RANK": "0", "WORLD_SIZE": "1"} | MASTER, ALONE),
    "address of nobody": (MASTER, ALONE),
    "world of one": ({"WORLD_SIZE": "1"}, ALONE),
    "local rank 0": ({"LOCAL_RANK": "0"}, ALONE),
    "IPv6": (BY_HAND | {"MASTER_ADDR": "fd00::1%eth0"}, Start(1, 4, 1, "fd00::1%eth0", 29500)),
    "IPv6 in brackets": (BY_HAND | {"MASTER_ADDR": "[::1]"}, Start(1, 4, 1, "::1", 29500)),
    "torchrun": (TORCHRUN, Start(1, 4, 1, "n1", 29501, has_agent=True)),
    "torchrun without its store": (
        TORCHRUN | {"TORCHELASTIC_USE_AGENT_STORE": "False"},
        Start(1, 4, 1, "n1", 29501),
    ),
    "torchrun of one rank": (
        TORCHRUN | {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"},
        Start(0, 1, 0, "n1", 29501, has_agent=True),
    ),
    "deepspeed": (DEEPSPEED, Start(1, 4, 1, "n1", 29501)),
    "left over from torchrun": ({"TORCHELASTIC_USE_AGENT_STORE": "True"}, ALONE),
    "left over, another way of starting": (
        BY_HAND | MASTER | {"TORCHELASTIC_USE_AGENT_STORE": "True"},
        Start(1, 4, 1, "n1", 29501),
    ),
    "left over, in srun": (
        SRUN | {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RUN_ID": "x"},
        FROM_SRUN,
    ),
    "Open MPI": (OPEN_MPI, FROM_MPI),
    "Open MPI, address given": (OPEN_MPI | MASTER, Start(5, 8, 1, "n1", 29501)),
    "Open MPI of one rank": (
        {"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "1", "PMIX_RANK": "0"},
        ALONE,
    ),
    "MPICH": (HYDRA, FROM_MPI),
    "MPICH, no local rank": ({"PMI_RANK": "5", "PMI_SIZE": "8"}, Start(5, 8, None, None, 29500)),
    "srun": (SRUN, FROM_SRUN),
    "srun, address given": (SRUN | {"MASTER_ADDR": "n9"}, Start(5, 8, 1, "n9", 30123)),
    "srun, port given": (SRUN | {"MASTER_PORT": "1"}, Start(5, 8, 1, "n3", 1)),
    "srun, size given": (SRUN | {"WORLD_SIZE": "8"}, FROM_SRUN),
    "srun, said by hand too": (
        SRUN | {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "2"},
        Start(5, 8, 2, "n3", 30123),
    ),
    "srun --gpus-per-task": (SRUN | {"CUDA_VISIBLE_DEVICES": "3"}, Start(5, 8, 0, "n3", 30123)),
    "srun, all GPUs": (SRUN | {"CUDA_VISIBLE_DEVICES": "0,1,2,3"}, FROM_SRUN),
    "srun, no GPU": (SRUN | {"CUDA_VISIBLE_DEVICES": ""}, FROM_SRUN),
    "srun of one task": (ONE_TASK | {"SLURM_NTASKS": "1"}, ALONE),
    "srun, no job": (
        {k: v for k, v in SRUN.items() if k != "SLURM_JOB_ID"},
        Start(5, 8, 1, "n3", 29500),
    ),
    "srun, job's list": (
        {k: v for k, v in SRUN.items() if k != "SLURM_STEP_NODELIST"}
        | {"SLURM_JOB_NODELIST": "n[7-8]"},
        Start(5, 8, 1, "n7", 30123),
    ),
    "srun --mpi=pmi2": (SRUN | {"PMI_RANK": "5", "PMI_SIZE": "8"}, FROM_SRUN),
    "srun --mpi=pmix": (SRUN | {"PMIX_RANK": "5"}, FROM_SRUN),
    "mpirun in an allocation": (BATCH | OPEN_MPI, FROM_MPI),
    "mpirun whose daemons srun started": (DAEMONS | OPEN_MPI, FROM_MPI),
    "mpirun of one rank a host": (DAEMONS | HYDRA | {"PMI_SIZE": "6"}, Start(5, 6, 1, None, 29500)),
    "torchrun in srun": (DAEMONS | TORCHRUN, Start(1, 4, 1, "n1", 29501, has_agent=True)),
    "torchrun alone in each task": (
        SRUN | TORCHRUN | {"MASTER_ADDR": "localhost"},
        Start(1, 4, 1, "localhost", 29501, has_agent=True),
    ),
    "torchrun in mpirun": (OPEN_MPI | TORCHRUN, Start(1, 4, 1, "n1", 29501, has_agent=True)),
    "torchrun in a batch job": (BATCH | TORCHRUN, Start(1, 4, 1, "n1", 29501, has_agent=True)),
    "deepspeed in a batch job": (BATCH | DEEPSPEED, Start(1, 4, 1, "n1", 29501)),
    "processes of a task, by hand": (
        DAEMONS | BY_HAND | MASTER | {"CUDA_VISIBLE_DEVICES": "0,1"},
        Start(1, 4, 1, "n1", 29501),
    ),
    "one rank of a batch job": (BATCH | {"RANK": "0", "WORLD_SIZE": "1"}, ALONE),
    "batch of one task": (BATCH | {"SLURM_NTASKS": "1", "SLURM_JOB_NUM_NODES": "1"}, ALONE),
}

REFUSALS = {
    "rank only": ({"RANK": "0"}, "RANK=0 is set and WORLD_SIZE is not;"),
    "size only": ({"WORLD_SIZE": "2"}, "WORLD_SIZE=2 is set and RANK is not;"),
    "local rank only": ({"LOCAL_RANK": "3"}, "LOCAL_RANK=3 is set, and no variable says"),
    "mpirun's local rank only": ({"MPI_LOCALRANKID": "1"}, "MPI_LOCALRANKID=1 is set, and no"),
    "more ranks here than there are": (
        BY_HAND | MASTER | {"LOCAL_WORLD_SIZE": "8"},
        "LOCAL_WORLD_SIZE=8 and WORLD_SIZE=4: no host",
    ),
    "a shell's text as address": (BY_HAND | {"MASTER_ADDR": "$(hostname)"}, "MASTER_ADDR=$(hostna"),
    "batch job, tasks of a node": (
        {"SLURM_PROCID": "0", "SLURM_NTASKS_PER_NODE": "8"},
        "SLURM_NTASKS_PER_NODE=8: this batch job starts one process",
    ),
    "batch job, old names": ({"SLURM_PROCID": "0", "SLURM_NNODES": "2"}, "SLURM_NNODES=2: this ba"),
    "no address": (BY_HAND, "MASTER_ADDR is not set, and RANK=1 of WORLD_SIZE=4"),
    "rank = size": (BY_HAND | MASTER | {"RANK": "4"}, "RANK=4 and WORLD_SIZE=4: ranks are numb"),
    "local rank = size": (
        BY_HAND | MASTER | {"LOCAL_RANK": "4"},
        "LOCAL_RANK=4 and WORLD_SIZE=4: ranks of a host",
    ),
    "local rank too large": (TORCHRUN | {"LOCAL_RANK": "2"}, "LOCAL_RANK=2 and LOCAL_WORLD_SIZE=2"),
    "one rank, not its GPU": (
        {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "3"},
        "LOCAL_RANK=3 and WORLD_SIZE=1",
    ),
    "address with a port": (BY_HAND | {"MASTER_ADDR": "n1:29500"}, "MASTER_ADDR=n1:29500: should"),
    "address is a URL": (BY_HAND | {"MASTER_ADDR": "tcp://n1"}, "MASTER_ADDR=tcp://n1: should"),
    "two addresses": (BY_HAND | {"MASTER_ADDR": "n1,n2"}, "MASTER_ADDR=n1,n2: should be one"),
    "localhost of several hosts": (
        SRUN | {"MASTER_ADDR": "localhost"},
        "MASTER_ADDR=localhost: the ranks are on several hosts",
    ),
    "localhost, Open MPI": (
        OPEN_MPI | {"MASTER_ADDR": "127.0.1.1"},
        "MASTER_ADDR=127.0.1.1: the r",
    ),
    "localhost, deepspeed": (
        DEEPSPEED | {"CROSS_SIZE": "2", "MASTER_ADDR": "::1"},
        "MASTER_ADDR=::1: the ranks are on several hosts",
    ),
    "localhost, by hand": (
        BY_HAND | {"LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "LOCALHOST"},
        "MASTER_ADDR=LOCALHOST: the ranks are on several hosts",
    ),
    "half of Open MPI": ({"OMPI_COMM_WORLD_RANK": "1"}, "OMPI_COMM_WORLD_RANK=1 is set and OMPI_"),
    "other half": ({"OMPI_COMM_WORLD_SIZE": "2"}, "OMPI_COMM_WORLD_SIZE=2 is set and OMPI_"),
    "half of MPICH": ({"PMI_RANK": "0"}, "PMI_RANK=0 is set and PMI_SIZE is not"),
    "PMIx only": ({"PMIX_RANK": "0"}, "PMIX_RANK=0 is set and WORLD_SIZE is not"),
    "a step without its size": ({"SLURM_PROCID": "3"}, "SLURM_PROCID=3 is set and SLURM_STEP_NUM_"),
    "a step without a rank": ({"SLURM_STEP_NUM_TASKS": "2"}, "SLURM_STEP_NUM_TASKS=2 is set and S"),
    "a step without hosts": (
        {"SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "1"},
        "SLURM_STEP_NUM_TASKS=2 is set and SLURM_STEP_NODELIST is not",
    ),
    "a rank beyond its step": (SRUN | {"SLURM_PROCID": "8"}, "SLURM_PROCID=8 and SLURM_STEP_NUM_"),
    "a rank beyond its step of one": (
        ONE_TASK | {"SLURM_PROCID": "3"},
        "SLURM_PROCID=3 and SLURM_",
    ),
    "a rank beyond MPI": (OPEN_MPI | {"OMPI_COMM_WORLD_RANK": "9"}, "OMPI_COMM_WORLD_RANK=9 and"),
    "hosts that are none": (
        SRUN | {"SLURM_STEP_NODELIST": "n[1-"},
        "SLURM_STEP_NODELIST=n[1-: not a list of hosts",
    ),
    "a batch job without srun": (BATCH, "SLURM_NTASKS=8: this batch job starts one process"),
    "nodes without srun": (
        {"SLURM_JOB_ID": "1", "SLURM_JOB_NUM_NODES": "4", "SLURM_PROCID": "0"},
        "SLURM_JOB_NUM_NODES=4: this batch job starts one process",
    ),
    "an old RANK in srun": (
        SRUN | {"RANK": "0", "WORLD_SIZE": "1"},
        "RANK=0, WORLD_SIZE=1 and SLURM_PROCID=5, SLURM_STEP_NUM_TASKS=8 cannot both be true",
    ),
    "an old size in srun": (SRUN | {"WORLD_SIZE": "4"}, "WORLD_SIZE=4 and SLURM_PROCID=5, SLURM_"),
    "an old rank in srun": (SRUN | {"RANK": "4"}, "RANK=4 and SLURM_PROCID=5, SLURM_STEP_NUM_T"),
    "another order by hand": (
        SRUN | {"RANK": "4", "WORLD_SIZE": "8"} | MASTER,
        "RANK=4, WORLD_SIZE=8 and SLURM_PROCID=5",
    ),
    "an old RANK in mpirun": (
        OPEN_MPI | {"RANK": "0", "WORLD_SIZE": "2"} | MASTER,
        "RANK=0, WORLD_SIZE=2 and OMPI_COMM_WORLD_RANK=5, OMPI_COMM_WORLD_SIZE=8 cannot both",
    ),
    "an old mpirun in srun": (
        SRUN
        | OPEN_MPI
        | {"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "2"}
        | {"OMPI_COMM_WORLD_LOCAL_SIZE": "2"},
        "OMPI_COMM_WORLD_RANK=0, OMPI_COMM_WORLD_SIZE=2 and SLURM_PROCID=5",
    ),
}

NUMBERS = {
    "RANK": BY_HAND | MASTER,
    "WORLD_SIZE": BY_HAND | MASTER,
    "LOCAL_RANK": BY_HAND | MASTER,
    "MASTER_PORT": BY_HAND | MASTER,
    "LOCAL_WORLD_SIZE": TORCHRUN,
    "CROSS_SIZE": DEEPSPEED,
    "OMPI_COMM_WORLD_RANK": OPEN_MPI,
    "OMPI_COMM_WORLD_SIZE": OPEN_MPI,
    "OMPI_COMM_WORLD_LOCAL_RANK": OPEN_MPI,
    "PMI_RANK": HYDRA,
    "PMI_SIZE": HYDRA,
    "MPI_LOCALRANKID": HYDRA,
    "SLURM_PROCID": SRUN,
    "SLURM_LOCALID": SRUN,
    "SLURM_STEP_NUM_TASKS": SRUN,
    "SLURM_JOB_ID": SRUN,
    "SLURM_NTASKS": BATCH,
    "PMIX_RANK": {},
}


def refusal(env: dict[str, str]) -> str:
    with pytest.raises(ConfigError) as error:
        read_start(env)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("case", STARTS)
def test_right_starts(case: str) -> None:
    env, start = STARTS[case]
    assert read_start(env) == start


@pytest.mark.parametrize("case", REFUSALS)
def test_refusals_name_the_variable_and_its_value(case: str) -> None:
    env, words = REFUSALS[case]
    assert refusal(env).startswith(words)


@pytest.mark.parametrize("name", NUMBERS)
def test_numbers(name: str) -> None:
    least = 0 if "RANK" in name or "ID" in name else 1
    bad = ["abc", "-1", "1.0", "0x1", "+1", "1 2", "١", "1e3", "99999999999999999999", "nan"]
    bad += ["0"] if least else []
    bad += ["65536", "99999"] if name == "MASTER_PORT" else []
    for value in bad:
        said = refusal(NUMBERS[name] | {name: value})
        assert said.startswith(f"{name}={value}: should be a whole number from {least} "), said


def test_any_part_of_any_set_is_a_start_or_a_line() -> None:
    """No other exception, and never a rank outside its world."""
    tried = 0
    for whole in (BY_HAND | MASTER, TORCHRUN, DEEPSPEED, OPEN_MPI, HYDRA, SRUN, BATCH):
        for other in ({}, SRUN, OPEN_MPI, BY_HAND):
            for names in itertools.chain.from_iterable(
                itertools.combinations(whole, n) for n in range(len(whole) + 1)
            ):
                tried += 1
                try:
                    start = read_start(other | {name: whole[name] for name in names})
                except ConfigError as error:
                    assert any(f"{name}" in str(error) for name in (whole | other))
                    continue
                assert 0 <= start.rank < start.world_size
                assert start.address or "OMPI_COMM_WORLD_RANK" in other | whole or whole is HYDRA
    assert tried > 5000


def test_a_shell_in_an_allocation_runs_one_rank_and_says_so() -> None:
    start = read_start(JOB)
    assert start.world_size == 1 and start.remark.startswith("SLURM_NTASKS=8, and srun did not")
    assert read_start(ONE_TASK).remark, "salloc with use_interactive_step"


@pytest.mark.parametrize(
    ("nodes", "first"),
    [  # as `scontrol show hostnames` of SLURM 22.05 prints them
        ("n1", "n1"),
        ("n[1-4,7],gpu,login", "n1"),
        ("r[1-2]n[1-3]", "r1n1"),
        ("n[7,1-4]", "n7"),
        ("n[09-11]", "n09"),
        ("n[098-102]", "n098"),
        ("n[001-3]", "n001"),
        ("a,b,a", "a"),
        ("n1,", "n1"),
        ("n[1]", "n1"),
        ("a[1-2]b[3-4]c[5-6]", "a1b3c5"),
        ("[1-3]", "1"),
        ("10.0.0.[1-3]", "10.0.0.1"),
        ("gpu-a[001-010]-ib,login", "gpu-a001-ib"),  # a suffix: newer versions
        ("rack[0-1]-[00-01].c.x", "rack0-00.c.x"),
    ],
)
def test_the_first_host_of_a_list(nodes: str, first: str) -> None:
    assert first_host("SLURM_STEP_NODELIST", nodes) == first


@pytest.mark.parametrize(
    "nodes", ["n[]", "n[a-b]", ",", "n[1,,2]", "n[1-2]]", "n[1-2:2]", "n1]", "["]
)
def test_no_list_of_hosts(nodes: str) -> None:
    with pytest.raises(ConfigError, match="set MASTER_ADDR to the first host's name"):
        first_host("SLURM_STEP_NODELIST", nodes)


@pytest.mark.parametrize(
    ("local_rank", "count", "env", "words"),
    [
        (2, 2, {}, "LOCAL_RANK=2: this host shows 2 GPUs; start fewer"),
        (
            1,
            1,
            {"CUDA_VISIBLE_DEVICES": "0"},
            "LOCAL_RANK=1: this host shows 1 GPUs (CUDA_VISIBLE_",
        ),
        (
            0,
            0,
            {"DS_ACCELERATOR": "cuda"},
            "LOCAL_RANK=0: this host shows 0 GPUs (DS_ACCELERATOR=c",
        ),
        (None, 8, {}, "LOCAL_RANK is not set, and this host shows 8 GPUs; set it"),
    ],
)
def test_a_rank_without_a_gpu(local_rank, count, env, words) -> None:
    with pytest.raises(ConfigError) as error:
        device_index(local_rank, count, env)
    assert str(error.value).startswith(words)


def test_a_rank_s_gpu() -> None:
    assert device_index(None, 1, {}) == 0
    assert device_index(3, 4, {}) == 3


def test_gpus_that_a_variable_hides() -> None:
    for env in ({}, {"CUDA_VISIBLE_DEVICES": ""}, {"CUDA_VISIBLE_DEVICES": "-1"}):
        refuse_hidden_gpus(env)
    refuse_hidden_gpus({"CUDA_VISIBLE_DEVICES": "7", "DS_ACCELERATOR": "cpu"})
    with pytest.raises(ConfigError, match="^CUDA_VISIBLE_DEVICES=7 shows none of this host's GPUs"):
        refuse_hidden_gpus({"CUDA_VISIBLE_DEVICES": "7"})


@pytest.mark.parametrize("value", ["gpu", "CPU", "auto", "0", "xpu"])
def test_an_accelerator_that_deepspeed_cannot_import_is_refused(value: str) -> None:
    with pytest.raises(ConfigError, match=f"DS_ACCELERATOR={value}: should be cpu or cuda"):
        settle_accelerator({"DS_ACCELERATOR": value})


CPU = {"DS_ACCELERATOR": "cpu"}


@pytest.mark.parametrize(("value", "left"), [("", {}), (" ", {}), ("cpu ", CPU)])
def test_an_empty_accelerator_is_none(value: str, left: dict[str, str]) -> None:
    env = {"DS_ACCELERATOR": value}
    settle_accelerator(env)
    assert env == left
