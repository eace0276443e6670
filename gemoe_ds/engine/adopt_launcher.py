"""Take over from the launcher what it left in the environment (launcher_env.py).

Light: nothing of torch.
"""

from __future__ import annotations

import functools
import os

from gemoe_ds.engine.launcher_env import Start, read_start


def adopt_launcher() -> Start:
    """Set what torch and DeepSpeed read: RANK, LOCAL_RANK, WORLD_SIZE, the master's address, port.

    Under mpirun the address follows later, through MPI (rendezvous.py). A process that is alone
    gets none of them here. Raises ConfigError for variables that cannot be.
    """
    start = read_start(os.environ)
    if start.remark:
        _say_once(start.remark)
    if not start.has_agent:  # left over from another job, it would wait for that job's store
        os.environ.pop("TORCHELASTIC_USE_AGENT_STORE", None)
    if start.world_size > 1:
        os.environ |= {"RANK": str(start.rank), "WORLD_SIZE": str(start.world_size)}
        found = {"LOCAL_RANK": start.local_rank, "MASTER_ADDR": start.address}
        found |= {"MASTER_PORT": start.port}
        os.environ |= {name: str(value) for name, value in found.items() if value is not None}
    return start


def launched_world_size() -> int:
    """The number of ranks that the launcher announced, before any group exists; 1 if none did."""
    return adopt_launcher().world_size


@functools.cache
def _say_once(remark: str) -> None:
    print(remark, flush=True)
