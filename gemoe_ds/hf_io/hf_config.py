"""The model that a Hugging Face folder's config.json describes: its shapes, without memory.

The file is a user's, and may say anything: what cannot be built is refused by the file's name.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from gemoe_ds.errors import CheckpointError, ConfigError
from gemoe_ds.hf_io.quantised_tensor import BLOCK, METHOD
from gemoe_ds.hf_io.safetensors_reader import read_json, refuse_dead_links
from gemoe_ds.moe.experts.quantised import FORMATS

_SIZES = {
    *("vocab_size", "embedding_size", "hidden_size", "d_model", "width", "head_dim"),
    *("num_hidden_layers", "n_layers", "layers", "depth"),
    *("num_attention_heads", "num_key_value_heads", "n_heads", "n_kv_heads", "num_heads", "heads"),
    *("intermediate_size", "moe_intermediate_size"),
    *("num_experts", "moe_num_experts", "n_routed_experts"),
    *("num_experts_per_tok", "moe_top_k", "top_k_experts"),
    *("patch_size", "image_size"),
}


def meta_model(model_class: type[nn.Module], config: object) -> nn.Module:
    """A model whose parameters are shapes without memory; buffers, which no file has, are real.

    It draws no random numbers, so that what is drawn afterwards does not depend on it.
    """
    register = nn.Module.register_parameter

    def without_memory(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None and not parameter.is_meta:  # if it is, it is being tied
            parameter = nn.Parameter(parameter.to("meta"), parameter.requires_grad)
        register(module, name, parameter)

    # Not `torch.device("meta")`: rotary frequencies and position ids would be lost. Not the
    # accelerate library's way of doing this: its presence changes how transformers loads.
    nn.Module.register_parameter = without_memory  # type: ignore[method-assign, assignment]
    try:
        with torch.random.fork_rng(devices=[]):
            return model_class(config)
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of model.checkpoint; CheckpointError without one."""
    path = folder / "config.json"
    try:
        refuse_dead_links(folder)
        if path.read_bytes().startswith(codecs.BOM_UTF8):
            raise ValueError("a byte order mark begins it, which transformers does not read")
        return read_json(path)
    except CheckpointError as error:
        reason = str(error).removeprefix(f"{folder}: ")
        raise CheckpointError(f"model.checkpoint={folder}: {reason}") from error
    except OSError as error:
        snapshots = sorted((folder / "snapshots").glob("*/config.json"))
        given = f"{snapshots[-1].parent}" if snapshots else "a Hugging Face folder"
        raise CheckpointError(
            f"model.checkpoint={folder}: no config.json there; give {given}"
        ) from error
    except ValueError as error:
        raise CheckpointError(
            f"model.checkpoint={folder}: config.json is damaged ({error}); download it again"
        ) from error


@contextmanager
def as_checkpoint_error(folder: Path, file: str = "config.json") -> Iterator[None]:
    """Any error of code that reads or uses this file becomes a CheckpointError that names the file.

    A damaged file can raise an error of any class, even ZeroDivisionError.
    """
    try:
        yield
    except CheckpointError as error:
        if "model.checkpoint=" in str(error):
            raise
        raise CheckpointError(f"model.checkpoint={folder}: {file}: {error}") from error
    except Exception as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        name = type(error).__name__
        reason = f"{name}: {' '.join(lines[:2])}" if lines else name
        raise CheckpointError(f"model.checkpoint={folder}: {file}: {reason}") from error


def config_of(config_class: Any, folder: Path | None, backbone: str) -> Any:
    """The configuration in a folder, which must be of this class's model type.

    `config_class` is transformers', or has `from_json`.
    """
    if folder is None:
        raise ConfigError(f"model.checkpoint: backbone {backbone!r} starts from one; give a folder")
    found = read_config(folder)
    kind = found.get("model_type")
    if kind != config_class.model_type:
        raise CheckpointError(
            f"model.checkpoint={folder} is of model_type {kind!r}, backbone {backbone!r} has "
            f"{config_class.model_type!r}"
        )
    with as_checkpoint_error(folder):
        _refuse_quantised(found)
        _refuse_other_activations(found)
        try:
            if hasattr(config_class, "from_json"):
                config = config_class.from_json(found)
            else:
                config = config_class.from_pretrained(folder, trust_remote_code=False)
        except CheckpointError:
            raise
        except Exception:
            _refuse_no_sizes(found)  # the better reason, if it is the reason
            raise
        _refuse_no_sizes(found)
        return config


def quantisation_of(found: Mapping[str, Any]) -> object:
    """What a config.json says of it; None: nothing."""
    sections = (found, *(value for value in found.values() if isinstance(value, dict)))
    return next(filter(None, (section.get("quantization_config") for section in sections)), None)


def in_own_format(folder: Path) -> bool:
    """Whether a folder's few bits are those of quantised_tensor.py that nobody else reads."""
    method = quantisation_of(read_config(folder))
    return isinstance(method, dict) and method.get("quant_method") == METHOD


def refuse_others(
    found: Mapping[str, Any], fixed: Mapping[str, Any], whose: str, section: str = ""
) -> None:
    """CheckpointError for a key of `fixed` that is there with another value."""
    for key, value in fixed.items():
        if found.get(key, value) != value:
            raise CheckpointError(f"{section}{key}={found[key]}, {whose} has {value}")


def _refuse_quantised(found: Mapping[str, Any]) -> None:
    """Weights are read as they are, or in the formats of quantised_tensor.py."""
    method = quantisation_of(found)
    if method is None:
        return
    name = method.get("quant_method") if isinstance(method, dict) else method
    blocks = method.get("weight_block_size") if isinstance(method, dict) else None
    if name != METHOD and (name != "fp8" or blocks != [BLOCK, BLOCK]):
        raise CheckpointError(
            f"quantization_config says {name}{f' with blocks of {blocks}' if blocks else ''}; fp8 "
            f"with a weight_block_size of [{BLOCK}, {BLOCK}] is supported, and what gemoe export "
            "--quantise writes; give the folder before it was quantised (model.experts_dtype "
            "quantises it), or remove the section if its weights are not"
        )
    formats = method.get("formats", []) if isinstance(method, dict) and name == METHOD else []
    if unknown := sorted({*formats} - FORMATS.keys()):
        raise CheckpointError(
            f"quantization_config has the formats {', '.join(unknown)}; "
            f"{', '.join(sorted(FORMATS))} are known to this version"
        )


def _refuse_other_activations(found: Mapping[str, Any]) -> None:
    """Experts are computed with SiLU here, whatever the model's own blocks would do."""
    for name in ("", "text_config", "language_config"):
        section = found.get(name, {}) if name else found
        act = section.get("hidden_act", "silu") if isinstance(section, dict) else "silu"
        if act not in ("silu", "swish"):
            key = f"{name}.hidden_act" if name else "hidden_act"
            raise CheckpointError(f"{key}={act!r}, experts with 'silu' are supported")


def _refuse_no_sizes(found: Mapping[str, Any], section: str = "") -> None:
    """What counts layers, heads, experts or numbers is a whole number from 1 on."""
    for key, value in found.items():
        if isinstance(value, dict):
            _refuse_no_sizes(value, f"{section}{key}.")
        elif key in _SIZES and value is not None and not isinstance(value, list):
            if type(value) is not int or value < 1:
                raise CheckpointError(
                    f"{section}{key}={value!r}, a whole number from 1 on is wanted"
                )
