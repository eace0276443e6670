"""config.json of an exported model that transformers has no class for, as transformers wants it."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedConfig

from gemoe_ds.models.deepseek_vl2.model import DeepseekVl2Config as Described

# What tools ask a language model's configuration for, whatever the public file calls it.
_OF_TEXT = (
    *("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads"),
    "max_position_embeddings",
)


class OwnConfig(PreTrainedConfig):
    """All keys of the public config.json, and those of the language model in it."""

    model_type = Described.model_type
    has_no_defaults_at_init = True

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**({"tie_word_embeddings": False} | kwargs))
        if kwargs:
            text = self.get_text_config()
            for name in _OF_TEXT:
                if not hasattr(self, name):
                    setattr(self, name, getattr(text, name))

    def described(self) -> Any:
        """What the model is built from."""
        return Described.from_json(self.to_dict())

    def get_text_config(self, decoder: Any = None, encoder: Any = None) -> Any:
        """That of the language model, by which transformers makes its caches and its masks: none,
        whatever is padding, unless it says by what attention is computed."""
        described = self.described()
        text = described.text() if callable(described.text) else described.text
        text._attn_implementation = self._attn_implementation
        return text
