"""One rank of N, whose collectives return at once: what its own CPU does, up to 4,096 ranks.

torch's fake process group answers every collective with what was put in. So what is measured is the
work that a rank does beside waiting: DeepSpeed's loops over ranks, groups, buffers and hooks. What
trains is OLMoE's gates and predictors, 2.4 million numbers in 16 layers.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

STEPS = 12
LAYERS, WIDTH, EXPERTS, KS = 16, 2048, 64, 8


def measure(zero: int, ranks: int) -> dict[str, Any]:
    """CPU seconds of one rank; in a process of its own, as a process group is the process's."""
    code = f"from tests.scale import one_of_many; one_of_many.run({zero}, {ranks})"
    where = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": str(ranks), "DS_ACCELERATOR": "cpu"}
    where |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29999", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | where, capture_output=True, text=True
    )
    if done.returncode:
        raise RuntimeError(f"ZeRO {zero}, {ranks} ranks: {done.stderr[-1000:]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def run(zero: int, ranks: int) -> None:
    """Prints a line of JSON."""
    import deepspeed
    import torch
    import torch.distributed as dist
    from torch import nn
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from gemoe_ds.engine.groups import expert_shard
    from gemoe_ds.engine.optimizer import GlobalNormAdamW
    from gemoe_ds.engine.world import World
    from gemoe_ds.engine.zero import create_moments

    class Routers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gates = nn.ModuleList(nn.Linear(WIDTH, EXPERTS, bias=False) for _ in range(LAYERS))
            self.predictors = nn.ModuleList(nn.Linear(WIDTH, KS) for _ in range(LAYERS))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            parts = [layer(x).square().mean() for layer in (*self.gates, *self.predictors)]
            return torch.stack(parts).sum()

    torch.set_num_threads(1)
    torch.manual_seed(0)
    dist.init_process_group("fake", rank=0, world_size=ranks, store=FakeStore())
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed("gloo", verbose=False)
    found: dict[str, Any] = {"zero": zero, "ranks": ranks}

    def timed(name: str, work: Callable[[], Any]) -> Any:
        began = time.process_time()
        result = work()
        found[name] = time.process_time() - began
        return result

    world = World(0, ranks, torch.device("cpu"))
    timed("groups", lambda: expert_shard(8, world))
    model = Routers()
    make = GlobalNormAdamW if zero == 0 else torch.optim.AdamW
    options: dict[str, Any] = {"max_grad_norm": 1.0} if zero == 0 else {}
    optimizer = make(
        [
            {"params": list(model.gates.parameters()), "name": "router"},
            {"params": list(model.predictors.parameters()), "name": "predictor"},
        ],
        lr=1e-3,
        **options,
    )
    section = {"stage": zero} | ({"reduce_bucket_size": 50_000_000} if zero else {})
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "train_batch_size": ranks,
        "gradient_clipping": 1.0 if zero else 0.0,
        "zero_optimization": section,
        "zero_force_ds_cpu_optimizer": False,
    }
    engine, *_ = timed(
        "engine", lambda: deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    )
    timed("moments", lambda: create_moments(engine))
    x = torch.randn(4, WIDTH)
    seconds = []
    for _ in range(STEPS):
        began = time.process_time()
        engine.backward(engine(x))
        engine.step()
        seconds.append(time.process_time() - began)
    found["step"] = min(seconds)  # a machine that is shared makes some of them longer
    print(json.dumps(found))
