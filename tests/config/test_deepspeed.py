"""What a DeepSpeed file and a recipe come to together, or how they contradict each other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from gemoe_ds.config import deepspeed_config
from gemoe_ds.config.deepspeed import summary
from gemoe_ds.errors import ConfigError
from tests.config.deepspeed_files import ZERO, ignored, loaded, refusal, resolved
from tests.helpers import repository

ZERO_2 = {"zero_optimization": {"stage": 2}}


@pytest.mark.parametrize("extra", [{}, {"train_batch_size": "auto", "gradient_clipping": "auto"}])
def test_batch_sizes_and_clipping_come_from_the_recipe(
    tmp_path: Path, extra: dict[str, Any]
) -> None:
    assert resolved(tmp_path, ZERO_2 | extra, "train.gradient_accumulation_steps=3") == {
        "zero_optimization": {"stage": 2},
        "zero_force_ds_cpu_optimizer": False,
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": 3,
        "train_batch_size": 12,
        "gradient_clipping": 1.0,
    }
    assert resolved(tmp_path, ZERO_2, "optim.max_grad_norm=null")["gradient_clipping"] == 0.0


def test_other_keys_pass_and_auto_inside_is_filled_in(tmp_path: Path) -> None:
    options = {
        "zero_optimization": {"stage": 1, "reduce_bucket_size": "auto", "overlap_comm": False},
        "comms_logger": {"enabled": True},
        "bf16": {"enabled": "auto"},
        "fp16": {"enabled": False},
        "optimizer": {"type": "AdamW", "params": {"lr": "auto", "betas": [0.9, 0.999]}},
    }
    result = resolved(tmp_path, options)
    assert result["zero_optimization"] == {
        "stage": 1,
        "overlap_comm": False,
        "reduce_bucket_size": 20**2,  # as Hugging Face has it
    }
    assert result["comms_logger"] == {"enabled": True}
    assert not result.keys() & {"bf16", "fp16", "optimizer"}  # the model's and the recipe's own


def test_what_writes_metrics_is_left_out_of_a_dry_run(tmp_path: Path) -> None:
    content = ZERO_2 | {"csv_monitor": {"enabled": True}, "comms_logger": {"enabled": True}}
    config = loaded(tmp_path, content)
    assert "csv_monitor" in deepspeed_config(config, 2, 20)
    dry = deepspeed_config(config, 2, 20, may_write=False)
    assert "comms_logger" in dry and "csv_monitor" not in dry


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (
            {"train_micro_batch_size_per_gpu": 4},
            "train_micro_batch_size_per_gpu=4 contradicts train.micro_batch_size=2",
        ),
        ({"gradient_accumulation_steps": 2}, "contradicts train.gradient_accumulation_steps=1"),
        ({"train_batch_size": 2}, r"train_batch_size=2 contradicts .*=4"),
        ({"gradient_clipping": 0.5}, "contradicts optim.max_grad_norm=1.0"),
        ({"bf16": {"enabled": False}}, "bf16.enabled=false contradicts model.dtype=bfloat16"),
        ({"fp16": {"enabled": True}}, "fp16.enabled=true contradicts model.dtype"),
        ({"bf16": True}, "bf16=true: should be an object"),
        ({"optimizer": {"type": "Lamb"}}, "optimizer.type=Lamb contradicts"),
        ({"optimizer": {"params": {"lr": 1}}}, "optimizer.params.lr=1 contradicts optim.lr=0.001"),
        ({"optimizer": {"params": {"momentum": 1}}}, "optimizer.params.momentum: the recipe sets"),
        ({"scheduler": {"type": "WarmupLR"}}, "WarmupLR contradicts optim.schedule=cosine"),
        ({"expert_parallel": {"enabled": True}}, "set parallel.ep_size in the recipe"),
        ({"zero_optimization": {"stage": 4}}, "stage=4: should be one of 0, 1, 2, 3"),
        (
            {"zero_optimization": {"stage": 2, "offload_param": {"device": "cpu"}}},
            "offload_param needs stage 3",
        ),
        (
            {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "nvme"}}},
            "offload_optimizer.device=nvme is not supported",
        ),
    ],
)
def test_contradictions_are_refused(tmp_path: Path, extra: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        resolved(tmp_path, ZERO_2 | extra)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "file", sorted((repository() / "ds_configs").glob("*.json")), ids=lambda path: path.name
)
def test_shipped_files_fit_any_recipe(tmp_path: Path, file: Path) -> None:
    result = resolved(tmp_path, file.read_text(), "model.dtype=float32")
    assert file.name.startswith(f"zero{result['zero_optimization']['stage']}")
    assert "offload" not in file.name or "offload_optimizer" in result["zero_optimization"]


def test_auto_is_what_hugging_face_fills_in(tmp_path: Path) -> None:
    names = ("reduce_bucket_size", "prefetch_bucket_size", "stage3_param_persistence_threshold")
    config = loaded(
        tmp_path, {ZERO: {"stage": 3, "overlap_comm": "auto"} | dict.fromkeys(names, "auto")}
    )
    assert deepspeed_config(config, 2, hidden_size=20)[ZERO] == {
        "stage": 3,
        "reduce_bucket_size": 400,
        "stage3_prefetch_bucket_size": 360,
        "stage3_param_persistence_threshold": 200,
    }
    assert summary(config, 2, 2048).endswith(
        "ZeRO 3; bfloat16, what trains float32; reduce_bucket_size 4,194,304; "
        "stage3_prefetch_bucket_size 3,774,873; stage3_param_persistence_threshold 20,480"
    )


def test_sharded_experts_need_the_way_that_deepspeed_reduces_rightly(tmp_path: Path) -> None:
    content = {ZERO: {"stage": 1, "contiguous_gradients": False}}
    trains = ["model.trainable=experts", "parallel.ep_size=2"]
    assert "over the wrong ranks" in refusal(tmp_path, content, *trains)
    assert ignored(tmp_path, content, "parallel.ep_size=2") == []


def test_without_zero_the_recipe_s_optimizer_clips_and_nothing_is_offloaded(tmp_path: Path) -> None:
    assert deepspeed_config(loaded(tmp_path, {ZERO: {"stage": 0}}), 2, 8)["gradient_clipping"] == 0
    assert deepspeed_config(loaded(tmp_path, {ZERO: {"stage": 1}}), 2, 8)["gradient_clipping"] == 1
    offload = {ZERO: {"stage": 0, "offload_optimizer": {"device": "cpu"}}}
    with pytest.raises(ConfigError, match="offload_optimizer needs stage 1, 2 or 3: with ZeRO 0"):
        deepspeed_config(loaded(tmp_path, offload), 2, 8)
