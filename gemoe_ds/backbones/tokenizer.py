"""Load a tokenizer folder as published, and check that it has every token that sequences need.

Code that a folder brings is never run: tokenizer.json says everything.
"""

from __future__ import annotations

from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from gemoe_ds.backbones.chat import ChatTemplate
from gemoe_ds.backbones.tiktoken import read_tiktoken, tiktoken_file
from gemoe_ds.errors import ConfigError


def load_tokenizer(
    folder: Path, chat: ChatTemplate | None = None, image_token: tuple[str, int] | None = None
) -> PreTrainedTokenizerBase:
    """The tokenizer with padding, what the chat template names, and the image's token of this id.

    What the model's own code adds when it loads a tokenizer is added. Raises ConfigError naming
    what it lacks.
    """
    chat = chat or ChatTemplate()
    tokenizer = _read(folder)
    if tokenizer.bos_token is None and chat.eos_as_bos:
        tokenizer.bos_token = tokenizer.eos_token
    if tokenizer.pad_token is None:  # any token will do: what is padded is masked
        known = tokenizer.get_vocab()
        wanted = (chat.pad, tokenizer.unk_token, tokenizer.eos_token, *chat.specials)
        tokenizer.pad_token = next((token for token in wanted if token in known), None)
    marks = {"pad_token", *(f"{name}_token" for name in ("bos", "eos") if chat.names(name))}
    missing = sorted(mark for mark in marks if getattr(tokenizer, mark) is None)
    needed = {*chat.specials, *([image_token[0]] if image_token else [])}
    if not missing and not needed <= tokenizer.get_vocab().keys():
        _add(tokenizer, folder, chat, needed)
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


def _read(folder: Path) -> PreTrainedTokenizerBase:
    ranks, is_whole = tiktoken_file(folder), (folder / "tokenizer.json").is_file()
    try:
        # Not by the class that tokenizer_config.json names: transformers' own Llama class puts a
        # pre-tokenizer of its own in the place of DeepSeek's, and every id changes.
        if is_whole:
            return PreTrainedTokenizerFast.from_pretrained(folder, trust_remote_code=False)
        if ranks is not None:
            return read_tiktoken(ranks)
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        if not tokenizer("a", add_special_tokens=False)["input_ids"]:
            raise ValueError("no vocabulary")  # which transformers takes for an empty one
        return tokenizer
    except Exception as error:  # of any kind, from files that may hold anything
        reason = " ".join(str(error).split())
        if not is_whole and ranks is None:
            reason = "it has no tokenizer.json"
            if any(folder.glob("*.py")):
                reason += ", and the code that it brings instead is never run"
        raise ConfigError(
            f"data.tokenizer={folder}: not a tokenizer folder ({reason}); make one with "
            "data_prep/train_tokenizer.py, or give the model's own, with its tokenizer.json"
        ) from error


def _add(
    tokenizer: PreTrainedTokenizerBase, folder: Path, chat: ChatTemplate, needed: set[str]
) -> None:
    """Add what the model's own code adds, in its order; it must get the ids that it has there."""
    known = tokenizer.get_vocab()
    lacking = [token for token in chat.added if token not in known]
    for token in lacking:
        tokenizer.add_special_tokens(
            {"extra_special_tokens": [token]}, replace_extra_special_tokens=False
        )
    vocabulary = tokenizer.get_vocab()
    for token in lacking:
        if token in needed and vocabulary[token] != chat.added[token]:
            raise ConfigError(
                f"data.tokenizer={folder}: lacks {', '.join(lacking)}; added as the model's own "
                f"code adds them, {token} would be {vocabulary[token]}, the model's is "
                f"{chat.added[token]}; give the tokenizer that the model was trained with"
            )
