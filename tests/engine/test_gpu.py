"""What is settled before CUDA starts, and refused on a GPU that cannot do it."""

from __future__ import annotations

import pytest
import torch

from gemoe_ds.engine.gpu import check_dtype, settle_gpu
from gemoe_ds.errors import ConfigError


@pytest.fixture(autouse=True)
def _as_it_was():
    before = torch.backends.cuda.matmul.allow_tf32
    yield
    torch.backends.cuda.matmul.allow_tf32 = before


def test_float32_is_float32_and_segments_grow():
    torch.backends.cuda.matmul.allow_tf32 = True  # as some containers have it
    env: dict[str, str] = {}
    settle_gpu(env)
    assert not torch.backends.cuda.matmul.allow_tf32
    assert env == {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}


@pytest.mark.parametrize("name", ["PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"])
def test_a_user_s_own_allocator_stands(name):
    env = {name: "max_split_size_mb:64", "NVIDIA_TF32_OVERRIDE": "0"}
    settle_gpu(env)
    assert env[name] == "max_split_size_mb:64" and len(env) == 2


def test_an_override_that_nothing_can_undo_is_refused():
    with pytest.raises(ConfigError, match="NVIDIA_TF32_OVERRIDE=1 rounds every float32 product"):
        settle_gpu({"NVIDIA_TF32_OVERRIDE": "1"})


@pytest.mark.parametrize(
    "capability, fits", [((7, 0), False), ((7, 5), False), ((8, 0), True), ((12, 0), True)]
)
def test_bfloat16_begins_at_8_0(monkeypatch, capability, fits):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA X")
    device = torch.device("cuda", 0)
    check_dtype("float32", device)
    check_dtype("bfloat16", torch.device("cpu"))
    if fits:
        check_dtype("bfloat16", device)
        return
    with pytest.raises(ConfigError, match=r"NVIDIA X \(compute capability 7\.\d\) has no bfloat16"):
        check_dtype("bfloat16", device)
