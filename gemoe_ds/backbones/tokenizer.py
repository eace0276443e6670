"""Load a tokenizer folder and check its special tokens, from which sequences are built."""

from __future__ import annotations

from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from gemoe_ds.errors import ConfigError

IMAGE_TOKEN = "<image>"


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer with <image>, padding, begin and end tokens; ConfigError if one is missing."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"data.tokenizer={folder}: not a tokenizer folder ({error}); "
            "make one with data_prep/train_tokenizer.py"
        ) from error
    missing = [n for n in ("pad_token", "bos_token", "eos_token") if getattr(tokenizer, n) is None]
    if tokenizer.convert_tokens_to_ids(IMAGE_TOKEN) in (None, tokenizer.unk_token_id):
        missing.append(IMAGE_TOKEN)
    if missing:
        raise ConfigError(f"data.tokenizer={folder}: lacks {', '.join(missing)}")
    return tokenizer
