"""The ranks find each other, or say in a line why they do not."""

from __future__ import annotations

import os
import socket
from datetime import timedelta

import deepspeed
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator

from gemoe_ds.errors import ConfigError

PATIENCE = 300.0  # seconds that ranks wait for each other; GEMOE_MEET_SECONDS overrides it
_COLLECTIVE = timedelta(minutes=30)  # that none of them takes


def meet() -> None:
    """Join the process group: NCCL on GPUs, gloo on CPUs. Collective.

    Raises ConfigError if the port is taken, a rank does not come in time, or the network interface
    that the environment names is not there.
    """
    backend = get_accelerator().communication_backend_name()
    if "MASTER_ADDR" not in os.environ:
        _ask_mpi()
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":  # torchrun's agents have met
        store = None
    else:
        store = _store()
    try:
        if store is not None:
            rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
            dist.init_process_group(
                backend, timeout=_COLLECTIVE, store=store, rank=rank, world_size=size
            )
        deepspeed.init_distributed(backend, timeout=_COLLECTIVE, verbose=False)
    except (RuntimeError, ValueError) as error:
        interface = next((v for v in _INTERFACES if os.environ.get(v)), None)
        if interface is None or dist.is_initialized():
            raise
        known = ", ".join(name for _, name in socket.if_nameindex())
        raise ConfigError(
            f"{interface}={os.environ[interface]}: {' '.join(str(error).split())[:200]}; "
            f"interfaces of host {socket.gethostname()}: {known}"
        ) from error


_INTERFACES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")


def _store() -> dist.Store:
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    patience = float(os.environ.get("GEMOE_MEET_SECONDS", PATIENCE))
    host = socket.gethostname()
    try:
        return dist.TCPStore(
            address, port, size, is_master=rank == 0, timeout=timedelta(seconds=patience)
        )
    except dist.DistError as error:
        text = " ".join(str(error).split())
        if "EADDRINUSE" in text:
            raise ConfigError(
                f"port {port} of host {host} is taken, by another job or a run that has not "
                "ended; set MASTER_PORT (deepspeed, torchrun: --master_port) to a free one"
            ) from error
        raise ConfigError(
            f"rank {rank} (host {host}) waited {patience:.0f} s for {size} ranks to meet at "
            f"{address}:{port}: did every node start, and can it reach that address? ({text[:120]})"
        ) from error


def _ask_mpi() -> None:
    """The first rank's address, through MPI."""
    try:
        import mpi4py  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            "mpirun started this process, and mpi4py, through which the ranks learn the first "
            "one's address, is not installed: pip install 'gemoe-ds[mpi]', or set MASTER_ADDR and "
            "MASTER_PORT for all of them (mpirun -x)"
        ) from error
    local_rank = os.environ["LOCAL_RANK"]
    port = int(os.environ.get("MASTER_PORT", 29500))
    deepspeed.comm.mpi_discovery(distributed_port=port, verbose=False)
    os.environ["LOCAL_RANK"] = local_rank  # MPI's own; that one counts equal host names
