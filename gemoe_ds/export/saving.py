"""`save_pretrained` of an exported model: the stock weights, and the routers in a file of their own
as in the folder that it was loaded from."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from gemoe_ds.hf_io.companions import write_index
from gemoe_ds.hf_io.safetensors_reader import INDEX, open_file

ROUTERS = "routers.safetensors"  # every router's parameters, float32
_WHOLE = "model.safetensors"  # what transformers calls the weights that fit into one file


def router_prefixes(model: Any) -> list[str]:
    """What stands before the parameters of every router in `model.state_dict()`, by slot."""
    below = getattr(model, "blocks_below", "")
    return [f"{below}{entry['path']}.gemoe.router." for entry in model.config.gemoe["blocks"]]


def routers_in(state: Mapping[str, Tensor], prefixes: list[str]) -> dict[str, Tensor]:
    """As `routers.safetensors` has them. ValueError if one is missing."""
    found: dict[str, Tensor] = {}
    for slot, prefix in enumerate(prefixes):
        own = {name[len(prefix) :]: t for name, t in state.items() if name.startswith(prefix)}
        if not own:
            raise ValueError(
                f"state_dict has no {prefix}*, without which the saved folder cannot route: give "
                "all of model.state_dict(), or leave state_dict out"
            )
        found |= {f"{slot}.{name}": tensor for name, tensor in own.items()}
    return found


def add_to_saved(folder: Path, model: Any, routers: Mapping[str, Tensor]) -> None:
    """What transformers does not write of an exported model, into the folder that it has written.

    An index is among it: without one some loaders take every *.safetensors for weights.
    """
    model.config.save_pretrained(folder)  # again: with the architecture of the base
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in routers.items()}
    save_file(tensors, folder / ROUTERS)
    if not (folder / INDEX).exists() and (folder / _WHOLE).exists():
        write_index(folder, dict.fromkeys(open_file(folder / _WHOLE), _WHOLE))
