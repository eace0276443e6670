"""Collators of every backbone, on tokenizers of the kind that each model has."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from gemoe_ds.data.collate import Collator
from gemoe_ds.models.backbone import Backbone
from gemoe_ds.models.deepseek_vl2.images import DeepseekVl2Images
from gemoe_ds.models.moe_llava.images import PaddedSquare
from gemoe_ds.models.molmoe.images import MolmoeImages
from gemoe_ds.models.qwen3_vl.images import Qwen3VLImages
from gemoe_ds.models.tokenizer import load_tokenizer
from tests.models.published import write_published
from tests.models.qwen3_vl.small import PUBLIC

LAYOUTS = {
    "olmoe": lambda: None,
    "molmoe": MolmoeImages,
    "deepseek_vl2": DeepseekVl2Images,
    "qwen3_vl_moe": lambda: Qwen3VLImages(Qwen2VLImageProcessorPil(**PUBLIC)),
    "moe_llava_stablelm": PaddedSquare,
    "moe_llava_qwen": PaddedSquare,
}


def make_collator(name, folder, **changes):
    layout, chat = LAYOUTS[name](), Backbone.named(name).chat
    tokenizer = load_tokenizer(
        write_published(name, folder, **changes), chat, layout and layout.token
    )
    return Collator(tokenizer, layout, chat, max_length=4000)


def picture(width: int, height: int) -> bytes:
    grey = (np.add.outer(np.arange(height), np.arange(width)) % 256).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(grey[..., None].repeat(3, -1)).save(buffer, "PNG")
    return buffer.getvalue()


def shown(width: int, height: int) -> Image.Image:
    return Image.open(io.BytesIO(picture(width, height)))
