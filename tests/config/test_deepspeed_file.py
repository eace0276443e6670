"""DeepSpeed files as people have them: the right value, or one line with the way out."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import pytest

from gemoe_ds.config import deepspeed_config
from gemoe_ds.config.deepspeed import check_deepspeed
from gemoe_ds.errors import ConfigError
from tests.config.deepspeed_files import ZERO, ignored, loaded, refusal, resolved
from tests.config.minimal import load


@pytest.mark.parametrize(
    "content",
    [
        b'\xef\xbb\xbf{"zero_optimization": {"stage": 1, "reduce_bucket_size": 5e8}}',
        '{"zero_optimization": {"stage": 1, "reduce_bucket_size": 5e8}}'.encode("utf-16"),
        '// mine\n{"zero_optimization": {"stage": "1", /* ! */ "reduce_bucket_size": "5e8",},}',
        "{\n zero_optimization: {\n  stage: 1\n  reduce_bucket_size: 500000000\n }\n}",
        {"_comment": "x", ZERO: {"_why": 1, "stage": 1.0, "reduce_bucket_size": 500000000.0}},
    ],
)
def test_whatever_deepspeed_reads_is_read_alike(tmp_path: Path, content: Any) -> None:
    zero = resolved(tmp_path, content)[ZERO]
    assert zero == {"stage": 1, "reduce_bucket_size": 500000000}
    assert all(type(value) is int for value in zero.values())


def test_base64_is_read_and_is_no_path(tmp_path: Path) -> None:
    text = base64.urlsafe_b64encode(json.dumps({ZERO: {"stage": 1}}).encode()).decode()
    config = loaded(tmp_path, {}, f"deepspeed={text}")
    assert config.zero_stage == 1
    config.check_paths("deepspeed")


def test_a_name_that_is_too_long_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot read it: File name too long"):
        check_deepspeed(loaded(tmp_path, {}, f"deepspeed={'x' * 300}"), 2)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "is empty"),
        ("[1]", "must hold a JSON object, got [1]"),
        (bytes(range(256)), "is no text file"),
        ('{"zero_optimization": {"stage": 2', "not valid JSON: Expecting ',' delimiter"),
        ('{"zero_optimization": {"stage": 1, "stage": 3}}', "key 'stage' stands twice"),
        ('{"zero_optimization": {"stage": 1, "stage": 3,},}', "key 'stage' stands twice"),
        ('{"a":' * 9999, "nested too deep"),
        ('{"gradient_clipping": NaN}', "gradient_clipping=NaN: should be a number"),
        ({ZERO: {"stage": "auto"}}, 'stage="auto": should be one of 0, 1, 2, 3'),
        ({ZERO: {"stage": True}}, "stage=true: should be one of 0, 1, 2, 3"),
        ({ZERO: "auto"}, 'zero_optimization="auto": should be an object'),
        ({ZERO: {"stage": 2, "reduce_bucket_size": -1}}, "should be a whole number, 1 or more"),
        ({ZERO: {"stage": 2, "reduce_bucket_size": 0.5}}, "should be a whole number, 1 or more"),
        ({ZERO: {"stage": 2, "reduce_bucket_size": None}}, "should be a whole number, 1 or more"),
        ({ZERO: {"stage": 2, "allgather_bucket_size": 3}}, "should be an even number"),
        ({ZERO: {"stage": 2, "overlap_comm": "yes"}}, "should be true or false"),
        ({ZERO: {"stage": 2, "offload_optimizer": True}}, 'such as {"device": "cpu"}'),
        ({"gradient_clipping": True}, "gradient_clipping=true: should be a number"),
        ({"wandb": {"enabled": True}}, "needs the package wandb"),
        ({ZERO: {"stage": 3, "max_live_parameters": 1, "stage3_max_live_parameters": 1}}, "keep"),
    ],
)
def test_what_cannot_be_used_is_one_line(tmp_path: Path, content: Any, message: str) -> None:
    assert message in refusal(tmp_path, content)


def test_a_folder_and_a_yaml_file_are_named_as_such(tmp_path: Path) -> None:
    config = loaded(tmp_path, {}, f"deepspeed={tmp_path}")
    with pytest.raises(ConfigError, match=r"is a folder; .* it holds ds.json"):
        check_deepspeed(config, 1)
    (tmp_path / "ds.yaml").write_text("zero_optimization:\n  stage: 2\n")
    config = loaded(tmp_path, {}, f"deepspeed={tmp_path}/ds.yaml")
    with pytest.raises(ConfigError, match="is a YAML file"):
        check_deepspeed(config, 1)


@pytest.mark.parametrize(
    ("content", "hint"),
    [
        ({"zero_optimisation": {}}, "did you mean zero_optimization?"),
        ({"gradient_cliping": 1}, "did you mean gradient_clipping?"),
        ({ZERO: {"reduce_bucket_sise": 1}}, "did you mean reduce_bucket_size?"),
        ({ZERO: {"offload_optimizer": {"devise": "cpu"}}}, "did you mean device?"),
        ({"activation_checkpointing": {"cpu_checkpoint": 1}}, "did you mean cpu_checkpointing?"),
        ({"timers": {"throughput": {"enable": True}}}, "did you mean enabled?"),
        ({"moe": {"enabled": True}}, "moe: DeepSpeed has no such key; remove it; parallel.ep_size"),
        ({"aio": {"thread_count": 2}}, "no such key; it is intra_op_parallelism now"),
        ({"zero3_init_flag": True}, "zero3_init_flag: DeepSpeed has no such key; remove it"),
        ({"stage3_max_reuse_distance": 1}, "it belongs in zero_optimization"),
        ({ZERO: {"gradient_clipping": 1.0}}, "it belongs in the top"),
        ({"optimizer": {"params": {"weight_decy": 0}}}, "did you mean weight_decay"),
    ],
)
def test_an_unknown_key_is_refused_with_the_nearest(
    tmp_path: Path, content: Any, hint: str
) -> None:
    assert hint in refusal(tmp_path, content)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"amp": {"enabled": True}}, "amp: DeepSpeed has removed it"),
        ({"sparse_gradients": True}, "sparse_gradients=true: DeepSpeed has removed it"),
        ({"elasticity": {"max_train_batch_size": 8}}, "train.global_batch_size"),
        ({ZERO: {"stage": 3, "mics_shard_size": 8}}, "mics_shard_size=8"),
        ({ZERO: {"stage": 3, "zero_hpz_partition_size": 8}}, "ZeRO++ is not proven"),
        ({"tensor_parallel": {"autotp_size": 2}}, "set parallel.ep_size"),
        ({"torch_autocast": {"enabled": True}}, "model.dtype of the recipe"),
        ({"data_types": {"grad_accum_dtype": "bf16"}}, "gradients are float32"),
        ({"communication_data_type": "fp16"}, "gradients are reduced in float32"),
        ({"bf16": {"enabled": True, "bf16_optimizer_states": True}}, "what trains is float32"),
    ],
)
def test_what_cannot_be_honoured_is_refused_with_the_way_out(
    tmp_path: Path, content: Any, message: str
) -> None:
    assert message in refusal(tmp_path, content)


def test_what_is_off_needs_no_line(tmp_path: Path) -> None:
    off = {
        "amp": {"enabled": False},
        "sparse_gradients": False,
        "tensor_parallel": {"autotp_size": 1},
        "torch_autocast": {"enabled": False, "dtype": "bfloat16"},
        "activation_checkpointing": {"partition_activations": False, "number_checkpoints": None},
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "auto",
        "gradient_allreduce_op": "mean",
        "fp16": {"enabled": "auto", "loss_scale": 0, "initial_scale_power": 32},
        ZERO: {"stage": 1, "zero_hpz_partition_size": 1, "offload_optimizer": None},
    }
    assert ignored(tmp_path, off) == []
    assert resolved(tmp_path, off)[ZERO] == {"stage": 1}


def test_what_has_no_effect_is_said(tmp_path: Path) -> None:
    lines = ignored(
        tmp_path,
        {
            "activation_checkpointing": {"partition_activations": True},
            "compile": {"disable": False, "backend": "inductor"},
            "monitor_config": {"enabled": True},
            ZERO: {"stage": 3, "gather_16bit_weights_on_model_save": True}
            | {"round_robin_gradients": True, "offload_param": {"device": "cpu"}},
        },
    )
    assert sorted(line.removeprefix("ignored: ").partition(":")[0] for line in lines) == [
        "activation_checkpointing",
        "compile",
        "monitor_config",
        f"{ZERO}.offload_param",
        f"{ZERO}.round_robin_gradients=true",
        f"{ZERO}.stage3_gather_16bit_weights_on_model_save=true",
    ]


def test_former_names_mean_what_they_meant(tmp_path: Path) -> None:
    assert resolved(tmp_path, {ZERO: True})[ZERO] == {"stage": 1}
    zero = resolved(tmp_path, {ZERO: {"stage": 2, "cpu_offload": True}})[ZERO]
    assert zero == {"stage": 2, "offload_optimizer": {"device": "cpu"}}
    assert "bf16.enabled=false" in refusal(tmp_path, {"bfloat16": {"enabled": False}})


@pytest.mark.parametrize(("text", "message"), [("{", "not valid JSON"), ("[]", "a JSON object")])
def test_damaged_deepspeed_file(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        resolved(tmp_path, text)


def test_absent_deepspeed_file(recipe: Path) -> None:
    with pytest.raises(ConfigError, match="^deepspeed=absent.json: cannot read it"):
        deepspeed_config(load(recipe, "deepspeed=absent.json"), 1, 16)
