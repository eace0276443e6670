"""Who this process is among the ranks, by what its launcher left in the environment.

`deepspeed` and `torchrun` set RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT. `srun` and
`mpirun` have variables of their own, which are translated to these. Light: nothing of torch.
"""

from __future__ import annotations

import os
import subprocess

from gemoe_ds.errors import ConfigError

_MPI = (  # rank, ranks, rank on its host: of Open MPI; of MPICH, Intel MPI and others with Hydra
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK"),
    ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID"),
)
_FIRST_PORT, _PORTS = 20000, 20000  # what a job's port is chosen from, by its number


def adopt_launcher() -> None:
    """Set RANK, LOCAL_RANK and WORLD_SIZE, under srun also the master's address and port.

    What is set already stays. Under mpirun the address follows later, through MPI (`meet`).
    """
    env = os.environ
    if "RANK" in env:
        return
    if int(env.get("SLURM_STEP_NUM_TASKS", 1)) > 1 and "SLURM_PROCID" in env:
        env["RANK"], env["WORLD_SIZE"] = env["SLURM_PROCID"], env["SLURM_STEP_NUM_TASKS"]
        env["LOCAL_RANK"] = env["SLURM_LOCALID"]
        env.setdefault("MASTER_ADDR", _first_host(env["SLURM_STEP_NODELIST"]))
        env.setdefault("MASTER_PORT", str(_FIRST_PORT + int(env["SLURM_JOB_ID"]) % _PORTS))
    for rank, size, local in _MPI:
        if "RANK" not in env and int(env.get(size, 1)) > 1:
            env["RANK"], env["WORLD_SIZE"] = env[rank], env[size]
            env["LOCAL_RANK"] = env.get(local, "0")
    if "RANK" in env and len(env.get("CUDA_VISIBLE_DEVICES", "").split(",")) == 1:
        if env.get("CUDA_VISIBLE_DEVICES") and "SLURM_STEP_ID" in env:
            env["LOCAL_RANK"] = "0"  # --gpus-per-task: every rank sees its own GPU only


def launched_world_size() -> int:
    """The number of ranks that the launcher announced, before any group exists; 1 if none did."""
    adopt_launcher()
    return int(os.environ.get("WORLD_SIZE") or 1)


def _first_host(nodes: str) -> str:
    """`n[1-4,7]` -> `n1`, as SLURM says."""
    try:
        done = subprocess.run(
            ["scontrol", "show", "hostnames", nodes], capture_output=True, text=True, check=True
        )
        return done.stdout.split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError) as error:
        raise ConfigError(
            f"srun started this process on {nodes}, and scontrol, which knows the first host's "
            "name, cannot be run here; set MASTER_ADDR to it"
        ) from error
