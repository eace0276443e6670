"""Which code an exported folder gets: modules of the package, and the class for each Auto class.

A model that transformers has a class for gets our routing alone. One that is put together here
(`VisionLanguageModel`) gets the model too, and its configuration. Whatever reads pictures by a
layout of ours gets that as a processor, with the tokenizer and the chat of training.
"""

from __future__ import annotations

import importlib
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from gemoe_ds.data.conversation import ConversationTokenizer
from gemoe_ds.export.settings import PromptSettings
from gemoe_ds.export.sources import MODELING, PACKAGE, write_sources
from gemoe_ds.models.chat import ChatTemplate
from gemoe_ds.models.moe_model import MoEModel
from gemoe_ds.models.tokenizer import load_tokenizer
from gemoe_ds.models.vision_language import VisionLanguageModel

CLASS = "modeling_gemoe.GemoeForConditionalGeneration"
_OWN = f"{PACKAGE}.export.own_"
_DEFAULT = f"from {PACKAGE}.models.deepseek_vl2"  # what stands in the package's own files
_STOCK = "from transformers import LlavaForConditionalGeneration as Stock"


@dataclass(frozen=True)
class Code:
    """Of one model."""

    router: str  # module
    auto_map: dict[str, str]  # of config.json
    roots: list[str] = field(default_factory=list)
    replaced: dict[str, dict[str, str]] = field(default_factory=dict)
    layout: dict[str, Any] | None = None  # of the processor, if it is ours

    def write(self, folder: Path) -> None:
        write_sources(folder, self.roots, self.replaced, self.router)

    @property
    def made_from(self) -> dict[str, Any]:
        """What `write` depends on beside the package's own sources, for a JSON file."""
        return {"roots": self.roots, "replaced": self.replaced, "router": self.router}

    @property
    def has_processor(self) -> bool:
        return self.layout is not None


def code_of(model: MoEModel) -> Code:
    """The code that the export of a model gets."""
    model_class, layout = type(model.hf), model.image_layout
    is_own = isinstance(model.hf, VisionLanguageModel)
    router = type(model.moe_layers[0].router).__module__
    auto_map: dict[str, str] = {}
    roots: list[str] = []
    replaced = {MODELING: {_STOCK: _stock(model_class, is_own)}}
    if is_own:
        auto_map["AutoConfig"] = "gemoe_export_own_config.OwnConfig"
        replaced |= _of_model(model)
    if is_own or layout is None:
        auto_map["AutoModelForCausalLM"] = CLASS
    if layout is not None:
        auto_map |= {"AutoModelForImageTextToText": CLASS, "AutoModel": CLASS}
    has_processor = layout is not None and not hasattr(layout, "processor")  # transformers' own
    if has_processor:
        auto_map |= processor_map()
        roots.append(f"{_OWN}processor")
        replaced[f"{_OWN}processor"] = _of_layout(layout, is_own)
    settings: Any = layout
    return Code(router, auto_map, roots, replaced, asdict(settings) if has_processor else None)


def processor_map() -> dict[str, str]:
    module = "gemoe_export_own_processor"
    return {
        "AutoProcessor": f"{module}.OwnProcessor",
        "AutoImageProcessor": f"{module}.OwnImageProcessor",
    }


def image_mark(chat: ChatTemplate) -> str:
    """What stands for a picture in a prompt that is text."""
    return "<|image|>" if "<|image|>" in chat.added else "<image>"


def prompt_section(model: MoEModel, tokenizer: Path) -> dict[str, Any]:
    """What config.json says under `gemoe` of prompts, and of the tokens that end an answer."""
    chat, layout = model.backbone.chat, model.image_layout
    token = None if layout is None else layout.token
    loaded: Any = load_tokenizer(tokenizer, chat, token)
    settings = PromptSettings(chat, token, image_mark(chat), model.context_length)
    return {
        "prompts": settings.to_json(),
        "stop_ids": sorted(ConversationTokenizer(loaded, chat).end_ids),
        "pad_id": loaded.pad_token_id,
    }


def _stock(model_class: type, is_own: bool) -> str:
    if is_own:
        return f"from {_OWN}model import OwnModel as Stock"
    place = model_class.__module__
    place = place if place.startswith(PACKAGE) else "transformers"
    return f"from {place} import {model_class.__name__} as Stock"


def _of_model(model: MoEModel) -> dict[str, dict[str, str]]:
    """The lines that name a model of ours, its configuration and its keys."""
    model_class, config_class = type(model.hf), type(model.hf.config)
    family = model_class.__module__.rpartition(".")[0]
    keys = importlib.import_module(f"{family}.keys")
    (name,) = (n for n, found in vars(keys).items() if found is model.backbone.keys)
    return {
        f"{_OWN}config": {
            f"{_DEFAULT}.model import DeepseekVl2Config as Described": (
                f"from {config_class.__module__} import {config_class.__name__} as Described"
            )
        },
        f"{_OWN}model": {
            f"{_DEFAULT}.keys import KEYS": f"from {family}.keys import {name} as KEYS",
            f"{_DEFAULT}.model import DeepseekVl2Model as Model": (
                f"from {model_class.__module__} import {model_class.__name__} as Model"
            ),
        },
    }


def _of_layout(layout: Any, is_own: bool) -> dict[str, str]:
    layout_class = type(layout)
    return {
        f"{_DEFAULT}.images import DeepseekVl2Images as Layout": (
            f"from {layout_class.__module__} import {layout_class.__name__} as Layout"
        ),
        "gives_rows = True": f"gives_rows = {is_own}",
    }
