"""Load a tokenizer folder and check that it has every special token that sequences are built of."""

from __future__ import annotations

from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from gemoe_ds.backbones.chat import ChatTemplate
from gemoe_ds.errors import ConfigError


def load_tokenizer(
    folder: Path, chat: ChatTemplate | None = None, image_token: tuple[str, int] | None = None
) -> PreTrainedTokenizerBase:
    """The tokenizer with padding, what the chat template names, and the image's token of this id.

    Raises ConfigError naming what it lacks.
    """
    chat = chat or ChatTemplate()
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"data.tokenizer={folder}: not a tokenizer folder ({error}); "
            "make one with data_prep/train_tokenizer.py, or give the model's own"
        ) from error
    marks = {"pad_token", *(f"{name}_token" for name in ("bos", "eos") if chat.names(name))}
    missing = sorted(mark for mark in marks if getattr(tokenizer, mark) is None)
    vocabulary = tokenizer.get_vocab()
    missing += [token for token in chat.specials if token not in vocabulary]
    if missing:
        raise ConfigError(f"data.tokenizer={folder}: lacks {', '.join(missing)}")
    if image_token and vocabulary.get(image_token[0]) != image_token[1]:
        raise ConfigError(
            f"data.tokenizer={folder}: {image_token[0]} is {vocabulary.get(image_token[0])}, the "
            f"model's is {image_token[1]}; give the tokenizer that the model was trained with"
        )
    return tokenizer
