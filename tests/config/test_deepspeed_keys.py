"""The table of keys against the installed DeepSpeed: its pydantic models, and what its code reads.

A new DeepSpeed that knows a key more, or one less, turns this red with the key's name.
"""

from __future__ import annotations

from typing import Any, get_args

import pytest
from deepspeed.autotuning.config import DeepSpeedAutotuningConfig
from deepspeed.comm.config import CommsLoggerConfig
from deepspeed.compile.config import CompileConfig
from deepspeed.inference.config import WeightQuantConfig
from deepspeed.module_inject.auto_ep_config import parse_autoep_config
from deepspeed.monitor.config import CometConfig, CSVConfig, TensorBoardConfig, WandbConfig
from deepspeed.profiling.config import DeepSpeedFlopsProfilerConfig
from deepspeed.runtime import config as deepspeed_config
from deepspeed.runtime.activation_checkpointing.config import DeepSpeedActivationCheckpointingConfig
from deepspeed.runtime.data_pipeline.config import get_data_efficiency_config
from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config
from deepspeed.runtime.swap_tensor.aio_config import get_aio_config
from deepspeed.runtime.tensor_parallel.config import TPTrainingConfig
from deepspeed.runtime.zenflow.zenflow_config import ZenFlowConfig
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from deepspeed.runtime.zero.leaf_module_config import DeepSpeedZeroLeafModuleConfig
from deepspeed.runtime.zero.offload_config import (
    DeepSpeedZeroOffloadOptimizerConfig,
    DeepSpeedZeroOffloadParamConfig,
)
from deepspeed.utils.config import DeepSpeedThroughputTimerConfig
from pydantic import BaseModel

from gemoe_ds.config.deepspeed_keys import KEYS, RENAMED

MODELS: dict[str, type[BaseModel]] = {
    "bf16": DeepSpeedBF16Config,
    "fp16": DeepSpeedFP16Config,
    "zero_optimization": DeepSpeedZeroConfig,
    "zero_optimization.leaf_module": DeepSpeedZeroLeafModuleConfig,
    "zero_optimization.offload_param": DeepSpeedZeroOffloadParamConfig,
    "zero_optimization.offload_optimizer": DeepSpeedZeroOffloadOptimizerConfig,
    "zero_optimization.zenflow": ZenFlowConfig,
    "comms_logger": CommsLoggerConfig,
    "tensorboard": TensorBoardConfig,
    "csv_monitor": CSVConfig,
    "wandb": WandbConfig,
    "comet": CometConfig,
    "compile": CompileConfig,
    "timers.throughput": DeepSpeedThroughputTimerConfig,
    "hybrid_engine": deepspeed_config.HybridEngineConfig,
    "weight_quantization": WeightQuantConfig,
    "tensor_parallel": TPTrainingConfig,
}
READERS = {  # sections that DeepSpeed reads key by key
    "activation_checkpointing": DeepSpeedActivationCheckpointingConfig,
    "flops_profiler": DeepSpeedFlopsProfilerConfig,
    "autotuning": DeepSpeedAutotuningConfig,
    "aio": get_aio_config,
    "checkpoint": deepspeed_config.DeepSpeedConfig,
    "data_efficiency": get_data_efficiency_config,
    "data_types": deepspeed_config.DeepSpeedConfig,
    "torch_autocast": deepspeed_config.DeepSpeedConfig,
}


class Asked(dict):
    """Empty, or with sections in it; remembers the keys that somebody asked for."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.keys_asked: set[str] = set()

    def get(self, key: Any, default: Any = None) -> Any:
        self.keys_asked.add(key)
        return super().get(key, default)

    def __contains__(self, key: Any) -> bool:
        self.keys_asked.add(key)
        return super().__contains__(key)

    def keys(self) -> Any:
        return self

    def __copy__(self) -> Asked:
        return self


def in_table(section: str) -> set[str]:
    inside = f"{section}." if section else ""
    return {
        path.removeprefix(inside)
        for path, key in KEYS.items()
        if path.startswith(inside) and "." not in path.removeprefix(inside) and key.of_deepspeed
    }


def names_of(section: str, field: str) -> str:
    """The name that the table has for a field."""
    path = f"{section}.{field}"
    return RENAMED.get(path, path).rpartition(".")[2]


@pytest.mark.parametrize("section", MODELS)
def test_sections_have_the_fields_of_deepspeed_s_models(section: str) -> None:
    fields = MODELS[section].model_fields
    spelled = {names_of(section, name) for name in fields}
    spelled |= {names_of(section, f.alias) for f in fields.values() if f.alias}
    known = in_table(section)
    if section == "zero_optimization":  # of which DeepSpeed says that they were removed
        known -= deepspeed_config._REMOVED_ZERO_CONFIG_KEYS.keys()
    assert spelled - known == set(), "DeepSpeed knows keys that the table lacks"
    assert known - spelled == set(), "the table has keys that DeepSpeed does not know"


@pytest.mark.parametrize("section", MODELS)
def test_honoured_values_have_the_types_of_deepspeed_s_models(section: str) -> None:
    for name, field in MODELS[section].model_fields.items():
        key = KEYS[f"{section}.{names_of(section, field.alias or name)}"]
        if key.fate != "honoured" or key.kind.startswith("section"):
            continue
        types = {t for t in (get_args(field.annotation) or (field.annotation,)) if t}
        wanted = {
            "flag": bool,
            "count": int,
            "size": int,
            "even": int,
            "whole": int,
            "number": float,
            "share": float,
            "text": str,
        }.get(key.kind.removesuffix("?"))
        if wanted:
            named = {getattr(t, "__name__", str(t)) for t in types}
            assert named & {wanted.__name__, "Path"}, f"{section}.{name} is {named}"
        if key.kind.endswith("?"):
            assert type(None) in types, f"{section}.{name}: null is an error to DeepSpeed"


@pytest.mark.parametrize("section", READERS)
def test_sections_have_the_keys_that_deepspeed_reads(section: str) -> None:
    asked = Asked()
    READERS[section](Asked({section: asked, "train_batch_size": 1}))
    assert asked.keys_asked == in_table(section)


def test_sections_that_deepspeed_reads_by_other_means() -> None:
    asked = Asked({"enabled": True})
    parse_autoep_config(asked)
    assert asked.keys_asked == in_table("expert_parallel")
    assert set(deepspeed_config.get_pipeline_config({})) == in_table("pipeline")


def test_the_top_has_the_keys_that_deepspeed_reads() -> None:
    asked = Asked({"train_batch_size": 1, "optimizer": {"type": "Adam"}})
    deepspeed_config.DeepSpeedConfig(asked)
    removed = set(deepspeed_config._REMOVED_TOP_LEVEL_CONFIG_KEYS)
    read = {RENAMED.get(key, key) for key in asked.keys_asked} - {"step_batch_size"}
    # these are asked for only beside others: zero_optimization=true, and by deepspeed.initialize
    read |= removed | {"allgather_size", "data_parallel_size", "sequence_parallel_size"}
    assert read - in_table("") == set(), "DeepSpeed reads keys that the table lacks"
    assert in_table("") - read == set(), "the table has keys that DeepSpeed does not read"


def test_removed_keys_are_refused() -> None:
    top, zero = (
        deepspeed_config._REMOVED_TOP_LEVEL_CONFIG_KEYS,
        deepspeed_config._REMOVED_ZERO_CONFIG_KEYS,
    )
    paths = [*top, *(f"zero_optimization.{key}" for key in zero)]
    assert {path: KEYS[path].fate for path in paths} == dict.fromkeys(paths, "refused")


def test_every_fate_says_why() -> None:
    silent = [p for p, key in KEYS.items() if key.fate in ("ignored", "refused") and not key.why]
    assert silent == []
