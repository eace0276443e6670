"""Who this process is among the ranks: from the environment alone, or a line that says why not.

`deepspeed` and `torchrun` set RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT. `srun` and
`mpirun` have variables of their own. Several launchers' may be there at once: the innermost counts
(torchrun inside srun, mpirun inside an allocation); what cannot be true at once is refused.
An empty variable is none. Light: nothing of torch.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass

from gemoe_ds.engine.launches import Launch, Variables, launches_in
from gemoe_ds.errors import ConfigError

PORT = 29500  # as torchrun's and DeepSpeed's
_FIRST_PORT, _PORTS = 20000, 20000  # what a SLURM job's port is chosen from, by its number
_LOCAL_RANKS = ("LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_RANK", "MPI_LOCALRANKID", "SLURM_LOCALID")
_THIS_HOST = re.compile(r"localhost|127\.\d+\.\d+\.\d+|0\.0\.0\.0|::1?", re.IGNORECASE)
_HOST = re.compile(r"(?:[^][,\s]+|\[\d+(?:-\d+)?(?:,\d+(?:-\d+)?)*\])+")  # in a list of SLURM


@dataclass(frozen=True)
class Start:
    """This process among `world_size`."""

    rank: int = 0
    world_size: int = 1
    local_rank: int | None = 0  # None: nobody says, which matters where there are several GPUs
    address: str | None = "127.0.0.1"  # of the first rank; None: MPI knows
    port: int | None = None  # None: any that is free
    has_agent: bool = False  # torchrun's agent keeps the store at that address
    remark: str = ""


def read_start(env: Mapping[str, str]) -> Start:
    """What the environment says; ConfigError names the variable, its value and the way out."""
    found = Variables(env)
    own = Launch.of(found, "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    address, port = found.address(), found.number("MASTER_PORT", 1, 65535)
    outer = [launch for launch in launches_in(found) if launch.size != 1 or launch.rank]
    if own.rank is None and own.size in (None, 1) and not outer:
        return _alone(found)
    # by torchrun or deepspeed: they number ranks and devices anew, whatever started them
    is_numbered = bool(found.text("TORCHELASTIC_RUN_ID") or found.text("CROSS_RANK"))
    is_numbered = is_numbered and None not in (own.rank, own.size, address, port)
    by = own if is_numbered else _innermost(own, outer)
    rank, size = _rank_and_size(by)
    local_rank = _local_rank(found, own, by, size, is_numbered=is_numbered)
    has_agent = is_numbered and found.text("TORCHELASTIC_USE_AGENT_STORE") == "True"
    if size == 1 and not has_agent:
        return Start(local_rank=local_rank or 0)
    hosts = max(launch.hosts for launch in (own, *outer))
    if is_numbered:  # torchrun's agents have met; deepspeed says how many hosts there are
        hosts = found.number("CROSS_SIZE", 1) or 1
    if address is None:
        address = _first_address(found, by, rank, size)
    elif hosts > 1 and _THIS_HOST.fullmatch(address):
        raise ConfigError(
            f"MASTER_ADDR={address}: the ranks are on several hosts, and on each of them this is "
            "another one; set MASTER_ADDR to the first host's name or address as all know it"
        )
    return Start(rank, size, local_rank, address, port or _port(found, by), has_agent)


def _alone(found: Variables) -> Start:
    """Nobody says that there are several ranks."""
    for name in _LOCAL_RANKS:
        if local_rank := found.number(name):
            raise ConfigError(
                f"{name}={local_rank} is set, and no variable says which rank of how many this is; "
                "start with torchrun, deepspeed, srun or mpirun, or unset it to run alone "
                "(CUDA_VISIBLE_DEVICES chooses the GPU)"
            )
    is_step = found.text("SLURM_STEP_NUM_TASKS") is not None
    said = _several(found, "SLURM_NTASKS", "SLURM_NPROCS", "SLURM_NTASKS_PER_NODE")
    if not (said or is_step):
        said = _several(found, "SLURM_JOB_NUM_NODES", "SLURM_NNODES")
    if not said:
        return Start()
    if found.text("SLURM_PROCID") is not None and not is_step:  # a batch script
        raise ConfigError(
            f"{said}: this batch job starts one process without srun, and the rest of it would "
            "idle; start it with srun, torchrun, deepspeed or mpirun (`gemoe submit` writes "
            "such a script), or set RANK=0 and WORLD_SIZE=1 if one rank is meant"
        )
    return Start(
        remark=f"{said}, and srun did not start this process: one rank runs; srun ... "
        "gemoe train starts one a task"
    )


def _several(found: Variables, *names: str) -> str:
    """The first of these that is set, as it is written, if it counts more than one."""
    counts = ((name, found.number(name, 1)) for name in names)
    name, count = next(((name, count) for name, count in counts if count), ("", 1))
    return f"{name}={count}" if count > 1 else ""


def _innermost(own: Launch, outer: list[Launch]) -> Launch:
    """The launch that counts: RANK and WORLD_SIZE, which another launch may complete, or that."""
    same = [launch for launch in outer if launch.is_whole and own.agrees_with(launch)]
    first = same[0] if same else own if own.says_something else outer[0]
    for launch in outer:
        if launch.is_whole and launch is not first and not first.may_be_inside(launch):
            raise ConfigError(
                f"{first} and {launch} cannot both be true; unset those that are left over from "
                "another start"
            )
    return first


def _rank_and_size(by: Launch) -> tuple[int, int]:
    for value, name, other, its_name in (
        (by.rank, by.rank_name, by.size, by.size_name),
        (by.size, by.size_name, by.rank, by.rank_name),
    ):
        if value is None:
            raise ConfigError(
                f"{its_name}={other} is set and {name} is not; start with torchrun, deepspeed, "
                "srun or mpirun, set RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT for "
                f"each rank, or unset {its_name}"
            )
    assert by.rank is not None and by.size is not None
    if by.rank >= by.size:
        raise ConfigError(
            f"{by.rank_name}={by.rank} and {by.size_name}={by.size}: ranks are numbered from 0 to "
            f"{by.size - 1}; correct one of the two"
        )
    return by.rank, by.size


def _local_rank(
    found: Variables, own: Launch, by: Launch, size: int, *, is_numbered: bool
) -> int | None:
    said = own if own.local_rank is not None else by
    here = min(said.ranks_here or size, size)
    if said.local_rank is not None and said.local_rank >= here:
        of = said.here_name if said.ranks_here == here else by.size_name
        raise ConfigError(
            f"{said.local_name}={said.local_rank} and {of}={here}: ranks of a host are numbered "
            f"from 0 to {here - 1}; correct one of the two"
        )
    visible = (found.text("CUDA_VISIBLE_DEVICES") or "").split(",")
    if visible[0] and len(visible) == 1 and not is_numbered:
        return 0  # srun --gpus-per-task: every rank sees its own GPU only
    return said.local_rank


def _first_address(found: Variables, by: Launch, rank: int, size: int) -> str | None:
    if by.rank_name == "RANK":
        raise ConfigError(
            f"MASTER_ADDR is not set, and RANK={rank} of WORLD_SIZE={size} has to meet the others; "
            "set MASTER_ADDR to the first rank's host and MASTER_PORT to a free port of it"
        )
    if by.rank_name != "SLURM_PROCID":
        return None
    for name in ("SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST"):
        if nodes := found.text(name):
            return first_host(name, nodes)
    raise ConfigError(
        f"SLURM_STEP_NUM_TASKS={size} is set and SLURM_STEP_NODELIST is not; set MASTER_ADDR to "
        "the first host's name, or start with srun"
    )


def first_host(name: str, nodes: str) -> str:
    """`n[01-04,7],login` -> `n01`, as `scontrol show hostnames` says."""
    match = _HOST.match(nodes)
    if match is None or nodes[match.end() : match.end() + 1] not in ("", ","):
        raise ConfigError(
            f"{name}={nodes}: not a list of hosts as SLURM writes them; set MASTER_ADDR to the "
            "first host's name"
        )
    return re.sub(r"\[(\d+)[^]]*\]", r"\1", match[0])


def _port(found: Variables, by: Launch) -> int:
    job = found.number("SLURM_JOB_ID") if by.rank_name == "SLURM_PROCID" else None
    return PORT if job is None else _FIRST_PORT + job % _PORTS


def settle_accelerator(env: MutableMapping[str, str]) -> None:
    """DS_ACCELERATOR as DeepSpeed can read it when it is imported; an empty one is none."""
    value = env.get("DS_ACCELERATOR", "").strip()
    if value not in ("", "cpu", "cuda"):
        raise ConfigError(
            f"DS_ACCELERATOR={value}: should be cpu or cuda; unset it, and DeepSpeed takes what is "
            "there"
        )
    if value:
        env["DS_ACCELERATOR"] = value
    else:
        env.pop("DS_ACCELERATOR", None)


def device_index(local_rank: int | None, count: int, env: Mapping[str, str]) -> int:
    """Which of the `count` GPUs that this process sees is its own."""
    names = ("CUDA_VISIBLE_DEVICES", "DS_ACCELERATOR")
    shown = ", ".join(f"{name}={env[name]}" for name in names if name in env)
    shows = f"this host shows {count} GPUs" + (f" ({shown})" if shown else "")
    if local_rank is None and count > 1:
        raise ConfigError(
            f"LOCAL_RANK is not set, and {shows}; set it to this rank's number on its host"
        )
    if (local_rank or 0) >= count:
        raise ConfigError(
            f"LOCAL_RANK={local_rank or 0}: {shows}; start fewer ranks per host, or show more"
        )
    return local_rank or 0


def refuse_hidden_gpus(env: Mapping[str, str]) -> None:
    """For a process that is about to run on CPUs, on a host with NVIDIA GPUs that it cannot see."""
    visible = env.get("CUDA_VISIBLE_DEVICES", "").strip()
    if visible not in ("", "-1") and not env.get("DS_ACCELERATOR"):
        raise ConfigError(
            f"CUDA_VISIBLE_DEVICES={visible} shows none of this host's GPUs; correct it, or set "
            "DS_ACCELERATOR=cpu to run on CPUs"
        )
