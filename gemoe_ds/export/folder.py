"""Write a trained model as a Hugging Face folder, whole or not at all."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from gemoe_ds import __version__
from gemoe_ds.export.code_record import KEY, PROVENANCE, checksums
from gemoe_ds.export.modeling import ROUTERS
from gemoe_ds.export.sources import can_carry, write_sources
from gemoe_ds.files import whole_folder
from gemoe_ds.hf_io.companions import TOKENIZER, companions, write_index
from gemoe_ds.hf_io.safetensors_reader import INDEX, open_stored
from gemoe_ds.models.images import ImageLayout, SquareImages
from gemoe_ds.models.moe_model import MoEModel


def export(
    model: MoEModel,
    trained: dict[str, Tensor],
    *,
    base: Path | None,
    tokenizer: Path,
    router: dict[str, Any],
    provenance: dict[str, Any],
    out: Path,
) -> None:
    """`trained` (by name, experts stacked) over `base`, with routers and model code, in `out`.

    `model` has its routers trained (`load_trained_weights`). Raises ConfigError if `out` exists.
    """
    with whole_folder(out, (OSError, SafetensorError)) as folder:  # the latter for a full disk, too
        trains = model.trainable()  # what does not stays as the base stores it
        weights = model.stock_tensors({n: t for n, t in trained.items() if n in trains})
        model.backbone.save_trained(model.hf, weights, base, folder)
        if not (folder / INDEX).exists():  # or who takes every *.safetensors takes the routers too
            write_index(folder, {k: t.file.name for k, t in open_stored(folder).items()})
        for path in companions(folder, TOKENIZER):
            path.unlink()
        for path in companions(tokenizer, TOKENIZER):
            shutil.copyfile(path, folder / path.name)
        save_file(_router_tensors(model), folder / ROUTERS)
        of_base = checksums(folder)
        if can_carry(type(model.hf)):
            router_module = type(model.moe_layers[0].router).__module__
            write_sources(folder, type(model.hf), router_module)
        _extend_config(folder / "config.json", router, model)
        ours = {n: sum_ for n, sum_ in checksums(folder).items() if of_base.get(n) != sum_}
        _write_json(folder / PROVENANCE, provenance | {"gemoe_ds": __version__, KEY: ours})
        (folder / "README.md").write_text(_card(router, provenance, model), encoding="utf-8")


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _extend_config(path: Path, router: dict[str, Any], model: MoEModel) -> None:
    """What is needed to route as in training, and where transformers finds code that does."""
    config = json.loads(path.read_text(encoding="utf-8"))
    config["gemoe"] = {"router": router, "blocks": _blocks(model)}
    if can_carry(type(model.hf)):  # else whatever code the base names
        config["auto_map"] = {_auto_class(model): "modeling_gemoe.GemoeForConditionalGeneration"}
    _write_json(path, config)


def _auto_class(model: MoEModel) -> str:
    return "AutoModelForImageTextToText" if model.image_layout else "AutoModelForCausalLM"


def _router_tensors(model: MoEModel) -> dict[str, Tensor]:
    return {
        f"{slot}.{name}": tensor.detach().clone().contiguous()
        for slot, layer in enumerate(model.moe_layers)
        for name, tensor in layer.router.state_dict().items()
    }


def _blocks(model: MoEModel) -> list[dict[str, Any]]:
    """Where each block is in the stock model, and which of its parameters are the experts."""
    return [
        {"path": path, "gate_up": gate_up, "down": down, "routing": asdict(routing)}
        for path, (gate_up, down), routing in zip(
            model.block_paths, model.expert_names, model.routing, strict=True
        )
    ]


def _card(router: dict[str, Any], provenance: dict[str, Any], model: MoEModel) -> str:
    options = "\n".join(f"    {key}: {value}" for key, value in router.items())
    carried = can_carry(type(model.hf))
    use = _USE_WITH_CODE if carried else _USE_WITHOUT_CODE
    return f"""# {router["name"]} on {provenance["base"]}

Trained with gemoe_ds. Router:

{options}

{use.format(auto_class=_auto_class(model))}
{_about_images(model.image_layout)}`provenance.json` says what this was made from.
"""


def _about_images(layout: ImageLayout | None) -> str:
    if layout is None:
        return ""
    if isinstance(layout, SquareImages):
        return (
            f"An image is {layout.size} x {layout.size} pixels in [-1, 1] and stands for "
            f"{layout.tokens} tokens of id {layout.token_id} after the first token. "
        )
    return "Images were prepared in training as this model's own processor does. "


_USE_WITH_CODE = """\
With its own routing (needs torch, transformers, pydantic and safetensors):

    from transformers import {auto_class}
    model = {auto_class}.from_pretrained(FOLDER, trust_remote_code=True)
    model.k_per_layer  # after a forward: how many experts every token got

As a stock model with the base model's fixed number of experts: the same without
`trust_remote_code`. Servers such as vLLM do this too, and do not mention the trained routing.
"""
_USE_WITHOUT_CODE = """\
Anything that runs the base model runs this folder: base layout, trained gates, and the base
model's fixed number of experts. `routers.safetensors` holds the state of the routers. To route as
in training, use the run with gemoe_ds (`gemoe generate RECIPE --trained RUN`).
"""
