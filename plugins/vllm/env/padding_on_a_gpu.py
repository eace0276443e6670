"""The slots `padding` beside `fold` in vLLM's own kernels on a GPU: one line of JSON.

Run by tests/plugins/vllm/test_padding.py, with the interpreter of a serving environment. It was
written without a GPU, from vLLM's code, and has not been run on one.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from functools import partial

import torch
from gemoe_vllm.options import FOLD, PADDING
from gemoe_vllm.padding import padded_map
from gemoe_vllm.routing import in_slots
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.model_executor.layers.fused_moe import fused_experts

EXPERTS, WIDTH, INNER, SLOTS = 64, 2048, 1024, 8  # OLMoE-1B-7B


def main() -> None:
    device = torch.device("cuda")
    torch.manual_seed(0)
    w1 = torch.randn(EXPERTS, 2 * INNER, WIDTH, device=device, dtype=torch.bfloat16) * WIDTH**-0.5
    w2 = torch.randn(EXPERTS, WIDTH, INNER, device=device, dtype=torch.bfloat16) * INNER**-0.5
    expert_map = padded_map(None, EXPERTS, device)
    rows = []
    for tokens in (1, 8, 32, 512):
        x_TD = torch.randn(tokens, WIDTH, device=device, dtype=torch.bfloat16)
        scores_TE = torch.randn(tokens, EXPERTS, device=device).softmax(-1)
        k_T1 = torch.randint(0, SLOTS + 1, (tokens, 1), device=device)
        mask_TE = scores_TE.argsort(descending=True).argsort() < k_T1
        calls = {
            FOLD: (in_slots(mask_TE, scores_TE, SLOTS, FOLD), {}),
            PADDING: (
                in_slots(mask_TE, scores_TE, SLOTS, PADDING),
                {"global_num_experts": EXPERTS + 1, "expert_map": expert_map},
            ),
        }
        outputs, row = [], {"tokens": tokens, "mean_k": float(k_T1.float().mean())}
        for slots, (routed, options) in calls.items():
            call = partial(fused_experts, x_TD, w1, w2, *routed, **options)
            row[slots], y_TD = timed(call)
            outputs.append(y_TD.float())
        row["difference"] = float((outputs[0] - outputs[1]).abs().max())
        row["largest"] = float(outputs[0].abs().max())
        rows.append(row)
    print(json.dumps(rows))


def timed(call: Callable[[], torch.Tensor], times: int = 50) -> tuple[float, torch.Tensor]:
    for _ in range(5):
        found = call()
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(times):
        found = call()
    torch.cuda.synchronize()
    return (time.perf_counter() - start) / times, found


with set_current_vllm_config(VllmConfig()):
    main()
