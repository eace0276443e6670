"""What a GPU is asked before its first use. None was at hand: this did not run on one."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping

import torch

from gemoe_ds.errors import ConfigError

_BFLOAT16 = (8, 0)  # the first compute capability that has it
_ALLOCATOR = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
_SEGMENTS = "expandable_segments:True"


def settle_gpu(env: MutableMapping[str, str]) -> None:
    """Before CUDA starts: segments that grow, and float32 that is float32.

    The shapes of a step follow its routing, so that no two are alike: an allocator whose segments
    cannot grow keeps many that nothing fits into. A user's own words stand.

    Routing is float32. Weights rounded to TF32 would change the k of 2 tokens in 10,000, and which
    experts are the best eight for 11 (docs/engine.md).
    """
    _refuse_tf32(env)
    if not any(env.get(name) for name in _ALLOCATOR):
        env[_ALLOCATOR[0]] = _SEGMENTS
    torch.backends.cuda.matmul.allow_tf32 = False  # containers switch it on


def _refuse_tf32(env: Mapping[str, str]) -> None:
    if env.get("NVIDIA_TF32_OVERRIDE", "").strip() == "1":
        raise ConfigError(
            "NVIDIA_TF32_OVERRIDE=1 rounds every float32 product, and routing with them; unset it "
            "(model.dtype=bfloat16 is the fast way)"
        )


def check_dtype(dtype: str, device: torch.device) -> None:
    """ConfigError where the GPU has no such arithmetic, and would be slow without a word."""
    if device.type != "cuda" or dtype != "bfloat16":
        return
    capability = torch.cuda.get_device_capability(device)
    if capability < _BFLOAT16:
        name, has = torch.cuda.get_device_name(device), ".".join(map(str, capability))
        raise ConfigError(
            f"model.dtype=bfloat16: {name} (compute capability {has}) has no bfloat16 (8.0 "
            "has); set model.dtype=float32, or take another GPU"
        )
