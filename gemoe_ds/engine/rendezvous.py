"""The ranks find each other, or say in a line why they do not."""

from __future__ import annotations

import math
import os
import resource
import socket
import time
from datetime import timedelta
from typing import Any

import deepspeed
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator

from gemoe_ds.engine.launcher_env import Start
from gemoe_ds.errors import ConfigError

PATIENCE = 300.0  # seconds that ranks wait for each other; GEMOE_RENDEZVOUS_SECONDS overrides it
_COLLECTIVE = timedelta(minutes=30)  # that none of them takes
# Of a rank: connections to every other one, in several groups of gloo, and on the first rank to the
# store too; and what else a process has open.
_FILES_A_RANK, _FILES = 5, 512
# For every connection torch asks whose address it is. Name servers drop questions that come all at
# once, and each is asked again after 5 s. So the ranks of a host come in turn.
_IN_TURN = 0.01  # seconds between two ranks of a host
_ASK_AGAIN = (0.0, 1.0, 4.0)  # seconds before a name is looked up, or an agent called


def init_process_group(start: Start) -> None:
    """Join the process group: gloo, and NCCL between GPUs. Collective.

    Objects are gathered from CPUs in either case. So the watch over a run, which does nothing else,
    is up before the first word of NCCL, whose connections are made when they are first used.

    Raises ConfigError if the address is unknown, the port is taken, a rank does not come in time,
    the network interface that the environment names is not there, or too few files may be open.
    """
    _allow_files(start.world_size)
    accelerator = get_accelerator()
    backend = accelerator.communication_backend_name()
    if "MASTER_ADDR" not in os.environ:
        _ask_mpi()
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    _look_up(address)
    store = None
    if start.has_agent:  # torchrun's agents have met
        _call_agent(address, port)
    else:
        store = _store(start, address, port)
    try:
        own: dict[str, Any] = (
            {} if store is None else {"rank": start.rank, "world_size": start.world_size}
        )
        backends = backends_of(accelerator.device_name(), backend)
        dist.init_process_group(backends, timeout=_COLLECTIVE, store=store, **own)
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


def _allow_files(num_ranks: int) -> None:
    """Raise this process's limit of open files as far as so many ranks need it; or ConfigError."""
    needed = _FILES_A_RANK * num_ranks + _FILES
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    unlimited = resource.RLIM_INFINITY
    if soft == unlimited or soft >= needed:
        return
    if hard != unlimited and hard < needed:
        raise ConfigError(
            f"host {socket.gethostname()}: a process may open {hard} files here, and one of "
            f"{num_ranks} ranks needs {needed}, most of them connections; raise the hard limit on "
            f"every node (ulimit -Hn, limits.conf, or LimitNOFILE of what starts the job)"
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))


def backends_of(device: str, backend: str) -> str:
    """For tensors of each kind of device, as torch wants it written."""
    return backend if device == "cpu" else f"cpu:gloo,{device}:{backend}"


_INTERFACES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")


def _look_up(address: str) -> None:
    """ConfigError if this host does not know a host of that name."""
    for seconds in _ASK_AGAIN:
        time.sleep(seconds)
        try:
            socket.getaddrinfo(address, None)
            return
        except (socket.gaierror, UnicodeError) as error:
            reason = error
    raise ConfigError(
        f"MASTER_ADDR={address}: host {socket.gethostname()} does not know it ({reason}); set "
        "MASTER_ADDR to the first rank's host, as all hosts know it, or to its address"
    )


def _call_agent(address: str, port: int) -> None:
    """ConfigError if nobody is there: the agent was, before it started this process."""
    for seconds in _ASK_AGAIN:
        time.sleep(seconds)
        try:
            socket.create_connection((address, port), timeout=10).close()
            return
        except OSError as error:
            reason = error
    raise ConfigError(
        f"TORCHELASTIC_USE_AGENT_STORE=True: torchrun's agent does not answer at MASTER_ADDR="
        f"{address}, MASTER_PORT={port} ({reason.strerror or reason}); if torchrun did not start "
        "this process, its variables are left over from another job: unset them"
    )


def _patience() -> float:
    text = os.environ.get("GEMOE_RENDEZVOUS_SECONDS", "").strip()
    text = text or os.environ.get("GEMOE_MEET_SECONDS", "").strip()  # its name before 0.2
    try:
        seconds = float(text or PATIENCE)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds < 1e6:
        raise ConfigError(f"GEMOE_RENDEZVOUS_SECONDS={text}: should be a number of seconds above 0")
    return seconds


def _reach(address: str, port: int, patience: float) -> None:
    """Wait until somebody listens there; torch would log a stack at every try. OSError if not."""
    until = time.monotonic() + patience
    while True:
        try:
            left = max(until - time.monotonic(), 1.0)
            socket.create_connection((address, port), timeout=left).close()
            return
        except OSError:
            if time.monotonic() >= until:
                raise
            time.sleep(0.2)


def _store(start: Start, address: str, port: int) -> dist.Store:
    rank, size, patience = start.rank, start.world_size, _patience()
    host = socket.gethostname()
    try:
        if rank:
            time.sleep(_IN_TURN * (start.local_rank or 0))
            _reach(address, port, patience)
        # The first one's own store answers whichever of its addresses the others use.
        called = address if rank else "localhost"
        return dist.TCPStore(
            called, port, size, is_master=rank == 0, timeout=timedelta(seconds=patience)
        )
    except (dist.DistError, OSError) as error:
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
    local_rank = os.environ.get("LOCAL_RANK")
    port = int(os.environ["MASTER_PORT"])
    deepspeed.comm.mpi_discovery(distributed_port=port, verbose=False)
    if local_rank is not None:  # mpirun's own; that one counts equal host names
        os.environ["LOCAL_RANK"] = local_rank
