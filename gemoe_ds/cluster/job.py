"""A run on several hosts, as the script, commands and environments that start it.

Every launcher starts the same program with the same recipe; what differs is who tells a rank its
number. Light: nothing of torch.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field

from gemoe_ds.errors import ConfigError

LAUNCHERS = ("srun", "torchrun", "deepspeed", "mpirun")
PORT = 29500
FOR_RANKS = (
    *("NCCL_", "GLOO_", "UCX_", "FI_"),
    *("CUDA_", "NVIDIA_", "TORCH_", "PYTORCH_", "TRITON_"),
    *("OMP_", "DS_", "HF_", "GEMOE_"),
)
OF_ONE_HOST = ("CUDA_VISIBLE_DEVICES", "NVIDIA_VISIBLE_DEVICES")  # which GPUs it shows


@dataclass(frozen=True)
class Job:
    """`hosts`: their names where no SLURM chooses them, the first one the master."""

    recipe: str
    overrides: tuple[str, ...] = ()
    nodes: int = 1
    ranks_per_node: int = 8
    hosts: tuple[str, ...] = ()
    port: int = PORT
    sbatch: Mapping[str, str] = field(default_factory=dict)  # --time ...; "": without a value
    variables: tuple[str, ...] = ()  # of the environment, that ssh would not carry over
    program: tuple[str, ...] = ("launch/train.py",)  # or -m and a module
    scripts: str = "launch/slurm"  # where run.sh is
    python: str = ""  # of the ranks, where run.sh and mpirun would not find the right one

    def __post_init__(self) -> None:
        if self.hosts and len(self.hosts) != self.nodes:
            raise ConfigError(
                f"--hosts names {len(self.hosts)} hosts and --nodes is {self.nodes}; leave one out"
            )

    @staticmethod
    def concerning_ranks(environment: Mapping[str, str]) -> tuple[str, ...]:
        """The names of what a user has set for ranks."""
        names = (name for name in environment if name.startswith(FOR_RANKS))
        return tuple(sorted(name for name in names if name not in OF_ONE_HOST))

    @property
    def words(self) -> list[str]:
        """What every rank runs, after the launcher's own words."""
        return [*self.program, self.recipe, *self.overrides]

    def sbatch_script(self, template: str) -> str:
        """The template with this job's numbers, and its recipe in the place of `"$@"`."""
        wanted = {
            "nodes": str(self.nodes),
            "ntasks-per-node": str(self.ranks_per_node),
            "gpus-per-node": str(self.ranks_per_node),
        } | dict(self.sbatch)
        if wanted["gpus-per-node"] == "0":
            template = re.sub(r"^#SBATCH --gpus-per-node=.*\n", "", template, flags=re.MULTILINE)
            del wanted["gpus-per-node"]
        for name, value in wanted.items():
            line = f"#SBATCH --{name}={value}" if value else f"#SBATCH --{name}"
            known = rf"^#SBATCH --{name}(=.*)?$"
            if re.search(known, template, flags=re.MULTILINE):
                template = re.sub(known, line, template, flags=re.MULTILINE)
            else:
                template = template.replace("#SBATCH --output", f"{line}\n#SBATCH --output", 1)
        for ours, own in (
            ("source launch/slurm", f"source {shlex.quote(self.scripts)}"),
            ("run launch/train.py", f"run {shlex.join(self.program)}"),
        ):
            literal = own.replace("\\", r"\\")
            template = re.sub(f"^{ours}", literal, template, flags=re.MULTILINE)
        if self.python:
            line = f'[ -n "$GEMOE_PYTHON" ] || GEMOE_PYTHON={shlex.quote(self.python)}'
            template = template.replace("\nsource ", f"\n{line}\nsource ", 1)
        words = shlex.join([self.recipe, *self.overrides])
        return template.replace('"$@"', words)

    def command(self, launcher: str, node: int = 0, hostfile: str = "hostfile") -> list[str]:
        """What is typed on the first host, with torchrun on each. `hostfile`: for deepspeed."""
        master = self.hosts[0] if self.hosts else "127.0.0.1"
        ranks = self.nodes * self.ranks_per_node
        if launcher == "torchrun":
            many = [
                f"--nnodes={self.nodes}",
                f"--node-rank={node}",
                f"--master-addr={master}",
                f"--master-port={self.port}",
            ]
            own = many if self.nodes > 1 else ["--standalone"]
            return ["torchrun", *own, f"--nproc-per-node={self.ranks_per_node}", *self.words]
        if launcher == "deepspeed":
            where = (
                ["--hostfile", hostfile, "--master_addr", master]
                if self.hosts
                else [f"--num_gpus={self.ranks_per_node}"]
            )
            words = [{"-m": "--module"}.get(word, word) for word in self.program]
            words += [self.recipe, *self.overrides]
            return ["deepspeed", *where, f"--master_port={self.port}", *words]
        if launcher == "mpirun":
            slots = ",".join(f"{host}:{self.ranks_per_node}" for host in self.hosts)
            where = ["--host", slots] if slots else []
            given = ["-x", "PATH", "-x", f"MASTER_PORT={self.port}"]
            given += [word for name in self.variables for word in ("-x", name)]
            given.append(self.python or "python")
            return ["mpirun", "-np", str(ranks), *where, *given, *self.words]
        raise AssertionError(launcher)

    def hostfile(self) -> str:
        """DeepSpeed's."""
        return "".join(f"{host} slots={self.ranks_per_node}\n" for host in self.hosts)

    def environment(self, launcher: str, node: int) -> dict[str, str]:
        """What the ranks of a host will find, of those that a launcher decides."""
        first = node * self.ranks_per_node
        last = first + self.ranks_per_node - 1
        in_slurm = launcher == "srun"
        master = self.hosts[0] if self.hosts else "127.0.0.1"
        return {
            "RANK": f"{first}..{last}" if last > first else str(first),
            "LOCAL_RANK": f"0..{self.ranks_per_node - 1}" if self.ranks_per_node > 1 else "0",
            "WORLD_SIZE": str(self.nodes * self.ranks_per_node),
            "MASTER_ADDR": "the first host of the job" if in_slurm else master,
            "MASTER_PORT": "20000 + job id % 20000" if in_slurm else str(self.port),
        }
