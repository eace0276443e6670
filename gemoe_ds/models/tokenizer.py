"""Load a tokenizer folder as published, and check that it has every token that sequences need.

Code that a folder brings is never run: tokenizer.json says everything.
"""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import Tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.tokenization_utils_base import VERY_LARGE_INTEGER

from gemoe_ds.console import without
from gemoe_ds.errors import ConfigError
from gemoe_ds.models.chat import ChatTemplate
from gemoe_ds.models.tiktoken import read_tiktoken, tiktoken_file


def load_tokenizer(
    folder: Path, chat: ChatTemplate | None = None, image_token: tuple[str, int] | None = None
) -> PreTrainedTokenizerBase:
    """The tokenizer with padding, what the chat template names, and the image's token of this id.

    What the model's own code adds when it loads a tokenizer is added. Raises ConfigError naming
    what it lacks.
    """
    chat = chat or ChatTemplate()
    tokenizer = _read(folder)
    tokenizer.model_max_length = VERY_LARGE_INTEGER  # data.max_length counts, and is checked
    stored = _stored(folder, tokenizer)
    if tokenizer.bos_token is None and chat.eos_as_bos:
        tokenizer.bos_token = tokenizer.eos_token
    if tokenizer.pad_token not in stored:  # any token will do: what is padded is masked
        wanted = (chat.pad, tokenizer.unk_token, tokenizer.eos_token, *chat.specials)
        tokenizer.pad_token = next((token for token in wanted if token in stored), None)
    marks = ["pad_token", *(f"{name}_token" for name in ("bos", "eos") if chat.names(name))]
    missing = sorted(mark for mark in marks if getattr(tokenizer, mark) not in stored)
    needed = dict.fromkeys(chat.specials) | (dict([image_token]) if image_token else {})
    lacking = [token for token in chat.added if token not in stored]
    if not missing and any(token in lacking for token in needed):
        _add(tokenizer, lacking)
        stored = stored | {*lacking}
    missing += [token for token in chat.specials if token not in stored]
    if missing:
        raise ConfigError(
            f"data.tokenizer={folder}: lacks {', '.join(missing)}; give the tokenizer that the "
            "model was trained with, or name tokens that it has in its tokenizer_config.json"
        )
    for token, in_model in needed.items():
        found, wanted_id = tokenizer.get_vocab().get(token), in_model or chat.added.get(token)
        if wanted_id not in (None, found):
            adding = "added as the model's own code does it, " if token in lacking else ""
            raise ConfigError(
                f"data.tokenizer={folder}: {adding}{token} is {found}, the model's is {wanted_id}; "
                "give the tokenizer that the model was trained with"
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
        # transformers reads config.json on the way, of whatever family it is
        with (
            without("transformers.configuration_utils", "to instantiate a model of type ``"),
            without(
                "transformers.tokenization_utils_tokenizers", "Could not extract SentencePiece"
            ),
        ):
            tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        if not tokenizer("a", add_special_tokens=False)["input_ids"]:
            raise ValueError("no vocabulary")  # which transformers takes for an empty one
        return tokenizer
    except Exception as error:  # of any kind, from files that may hold anything
        reason = " ".join(str(error).split())
        if not isinstance(error, ValueError | OSError):  # of the words that were looked for
            reason = f"reading it ends with {type(error).__name__}: {reason}"
        if folder.is_file():
            reason = "it is a file; give its folder"
        elif broken := _broken(folder):
            reason = broken
        elif not is_whole and ranks is None:
            reason = "it has no tokenizer.json"
            if any(folder.glob("*.py")):
                reason += ", and the code that it brings instead is never run"
        raise ConfigError(
            f"data.tokenizer={folder}: not a tokenizer folder ({reason}); make one with "
            "`gemoe data train-tokenizer`, or give the model's own, with its tokenizer.json"
        ) from error


def _broken(folder: Path) -> str:
    """Its first file that should be JSON and is not."""
    for path in sorted(folder.glob("*.json")):
        content = path.read_bytes()
        try:
            json.loads(content)
        except ValueError as error:
            if content.startswith(b"version https://git-lfs"):
                return f"{path.name} is Git LFS's pointer; git lfs pull fetches the file"
            return f"{path.name} is not valid JSON: {error}"
    return ""


def _stored(folder: Path, tokenizer: PreTrainedTokenizerBase) -> set[str]:
    """The tokens of tokenizer.json: one that tokenizer_config.json alone knows gets a new id, which
    the model has never seen."""
    if (folder / "tokenizer.json").is_file():
        return {*Tokenizer.from_file(str(folder / "tokenizer.json")).get_vocab()}
    return {*tokenizer.get_vocab()}


def _add(tokenizer: PreTrainedTokenizerBase, tokens: list[str]) -> None:
    """As the model's own code adds them, in its order."""
    for token in tokens:
        tokenizer.add_special_tokens(
            {"extra_special_tokens": [token]}, replace_extra_special_tokens=False
        )
