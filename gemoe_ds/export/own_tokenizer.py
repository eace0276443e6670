"""The tokenizer of an exported folder, as training read it: for AutoTokenizer with its own code."""

from __future__ import annotations

from typing import Any

from tokenizers import processors
from transformers import PreTrainedTokenizerFast

from gemoe_ds.export.settings import local_folder, settings_of
from gemoe_ds.models.jinja import chat_jinja
from gemoe_ds.models.tokenizer import load_tokenizer

FILES = ("*.json", "*.tiktoken", "*.model", "*.txt")


class OwnTokenizer(PreTrainedTokenizerFast):
    """`from_pretrained` gives a fast tokenizer with the tokens, ids and chat template of training.

    It pads on the left, for answers to be written.
    """

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        folder = local_folder(pretrained_model_name_or_path, kwargs, FILES)
        settings = settings_of(folder)
        tokenizer = load_tokenizer(folder, settings.chat, settings.image_token)
        if settings.max_length is not None:
            tokenizer.model_max_length = settings.max_length
        tokenizer.padding_side = kwargs.get("padding_side") or "left"
        tokenizer.chat_template = chat_jinja(settings.chat, settings.image_mark)
        if settings.chat.bos_before_text:
            _begin_texts(tokenizer)
        return tokenizer


def _begin_texts(tokenizer: Any) -> None:
    """Plain text gets the first token before it, as it did from the class that the base names."""
    first, token = tokenizer.bos_token_id, tokenizer.bos_token
    if tokenizer("a")["input_ids"][:1] != [first]:
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
            f"{token} $A", special_tokens=[(token, first)]
        )
