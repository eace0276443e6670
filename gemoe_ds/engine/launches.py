"""The variables that launchers leave to their ranks."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace

from gemoe_ds.errors import ConfigError


class Variables:
    """An environment whose values are checked as they are read; an empty one is not set."""

    def __init__(self, env: Mapping[str, str]) -> None:
        self._env = env

    def text(self, name: str) -> str | None:
        return self._env.get(name, "").strip() or None

    def number(self, name: str, least: int = 0, most: int = 10**18) -> int | None:
        text = self.text(name)
        if text is None:
            return None
        if not re.fullmatch("[0-9]{1,18}", text) or not least <= int(text) <= most:
            upper = f"to {most}" if most < 10**18 else "on"
            raise ConfigError(
                f"{name}={text}: should be a whole number from {least} {upper}; correct it or "
                "unset it"
            )
        return int(text)

    def address(self) -> str | None:
        text = self.text("MASTER_ADDR")
        if text and (inside := re.fullmatch(r"\[(.+)\]", text)):
            text = inside[1]  # as IPv6 addresses stand before a port
        if text and (not re.fullmatch(r"[\w.:%-]+", text) or re.fullmatch(r"[^:]*:\d*", text)):
            raise ConfigError(
                f"MASTER_ADDR={text}: should be one host's name or address; its port belongs into "
                "MASTER_PORT"
            )
        return text


@dataclass(frozen=True)
class Launch:
    """What one launcher's variables say, and how they are called."""

    rank_name: str
    size_name: str
    local_name: str
    here_name: str
    rank: int | None
    size: int | None
    local_rank: int | None
    ranks_here: int | None  # on this host
    hosts: int = 1  # 2 stands for several

    @classmethod
    def of(cls, found: Variables, rank: str, size: str, local: str = "", here: str = "") -> Launch:
        ranks, ranks_here = found.number(size, 1), found.number(here, 1)
        if ranks and ranks_here and ranks_here > ranks:
            raise ConfigError(
                f"{here}={ranks_here} and {size}={ranks}: no host can have more ranks than there "
                "are; correct one of the two"
            )
        hosts = 2 if ranks and ranks_here and ranks_here < ranks else 1
        values = found.number(rank), ranks, found.number(local), ranks_here
        return cls(rank, size, local, here, *values, hosts)

    @property
    def says_something(self) -> bool:
        return self.rank is not None or self.size is not None

    @property
    def is_whole(self) -> bool:
        return self.rank is not None and self.size is not None

    def agrees_with(self, other: Launch) -> bool:
        return self.rank in (None, other.rank) and self.size in (None, other.size)

    def may_be_inside(self, other: Launch) -> bool:
        """Whether the processes of `other` may have started these ranks, each of them some."""
        if self.agrees_with(other) or not self.is_whole:
            return self.agrees_with(other)
        assert self.size is not None and other.size is not None
        is_numbered_anew = self.rank_name != "RANK"  # by mpirun, and not by hand
        return self.size > other.size or (self.size == other.size and is_numbered_anew)

    def __str__(self) -> str:
        said = ((self.rank_name, self.rank), (self.size_name, self.size))
        return ", ".join(f"{name}={value}" for name, value in said if value is not None)


def launches_in(found: Variables) -> list[Launch]:
    """Of mpirun and srun, the innermost first: mpirun starts ranks inside srun's steps."""
    launches = [
        Launch.of(
            *(found, "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"),
            *("OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE"),
        ),
        # MPICH, Intel MPI and others with Hydra
        Launch.of(found, "PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
    ]
    launches = [launch for launch in launches if launch.says_something]
    srun = Launch.of(found, "SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID")
    if srun.size is not None or srun.rank:  # a batch script is SLURM_PROCID 0 of nothing
        srun = replace(srun, hosts=found.number("SLURM_STEP_NUM_NODES", 1) or 1)
        said_twice = bool(launches) and srun.agrees_with(launches[0])  # srun --mpi=pmi2
        launches.insert(0 if said_twice else len(launches), srun)
    if not launches:  # PMIx alone does not say how many ranks there are
        pmix = Launch.of(found, "PMIX_RANK", "")
        launches += [replace(pmix, size_name="WORLD_SIZE")] if pmix.says_something else []
    return launches
