"""One vLLM with one folder, which generates when it is told to: a contender of benchmarks/serving.

    speed_worker.py FOLDER SLOTS     (SLOTS `stock`: without the plugin)

Each line of its input is a question, {"batch", "prompt", "new", "k"}; the answer is a line with the
CPU seconds of this process, and the mean k. `k`: the mean k that the dial is set to, null for a
stock server. Runs in the environment of `make serve-env`.
"""

from __future__ import annotations

import json
import os
import sys
import time
from typing import Any

VOCABULARY = 4000
CALIBRATION = {"batch": 8, "prompt": 8, "new": 3}


def main(folder: str, slots: str) -> None:
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    if slots == "stock":
        os.environ["VLLM_PLUGINS"] = ""
    answers = os.dup(1)  # what vLLM prints goes elsewhere
    os.dup2(2, 1)
    worker = Worker(folder, slots)
    with os.fdopen(answers, "w", buffering=1) as out:
        print("ready", file=out)
        for line in sys.stdin:
            print(json.dumps(worker.answer(**json.loads(line))), file=out)


class Worker:
    def __init__(self, folder: str, slots: str) -> None:
        from vllm import LLM

        more = {} if slots == "stock" else {"additional_config": {"gemoe": {"slots": slots}}}
        options = {"max_model_len": 256, "max_num_seqs": 32, "max_num_batched_tokens": 1024}
        options |= {"enforce_eager": True, "enable_prefix_caching": False, "seed": 0}
        options |= {"distributed_executor_backend": "uni"}  # all in this process
        self.llm = LLM(folder, dtype="bfloat16", **options, **more)
        self.model: Any = None
        if slots != "stock":
            (self.model,) = self.llm.apply_model(lambda model: model)
        self.dials: dict[float, float] = {}

    def answer(self, batch: int, prompt: int, new: int, k: float | None) -> dict[str, Any]:
        if k is not None:
            self.set_mean_k(k)
        before = self.counts()
        seconds = self.generate(batch, prompt, new)
        return {"seconds": seconds, "mean_k": self.mean_k(before)}

    def generate(self, batch: int, prompt: int, new: int) -> float:
        import torch
        from vllm import SamplingParams

        g = torch.Generator().manual_seed(batch)
        ids = torch.randint(6, VOCABULARY, (batch, prompt), generator=g).tolist()
        asked = [{"prompt_token_ids": row} for row in ids]
        options = SamplingParams(temperature=0, max_tokens=new, ignore_eos=True)
        start = time.process_time()
        self.llm.generate(asked, options, use_tqdm=False)
        return time.process_time() - start

    def counts(self) -> Any:
        return None if self.model is None else self.model.gemoe[1].file_L2.sum(0).copy()

    def mean_k(self, before: Any) -> float | None:
        if before is None:
            return None
        tokens, experts = self.counts() - before
        return float(experts / tokens)

    def set_mean_k(self, k: float) -> None:
        """By bisection of `k_shift` on tokens like those that are timed, once for each k."""
        if k not in self.dials:
            low, high = -7.0, 9.0
            for _ in range(6):
                self.set_dial((low + high) / 2)
                before = self.counts()
                self.generate(**CALIBRATION)
                if self.mean_k(before) < k:
                    low = (low + high) / 2
                else:
                    high = (low + high) / 2
            self.dials[k] = high
        self.set_dial(self.dials[k])

    def set_dial(self, value: float) -> None:
        for router in self.model.gemoe[0].values():
            router.k_shift = value


if __name__ == "__main__":
    main(*sys.argv[1:])
