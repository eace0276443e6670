"""Vocabularies in tiktoken's files, which StableLM-2's and Qwen-1's tokenizers are published as.

Their classes are code in the folder; what they do besides reading the file is here.
"""

from __future__ import annotations

import base64
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

_SPLIT = (  # of both
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_CODE = (
    *("gh_stars", "filename", "issue_start", "issue_comment", "issue_closed", "jupyter_start"),
    *("jupyter_text", "jupyter_code", "jupyter_output", "empty_output", "commit_before"),
    *("commit_msg", "commit_after", "reponame"),
)
_STABLELM = (
    *("<|endoftext|>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>", "<|fim_pad|>"),
    *(f"<{name}>" for name in _CODE),
    *("<|endofprompt|>", "<|im_start|>", "<|im_end|>", "<|pause|>"),
    *(f"<|reg{number}|>" for number in range(8)),
    "<|extra0|>",
)
_QWEN = (
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
    *(f"<|extra_{number}|>" for number in range(205)),
)
_FILES = {  # name: id of the first special token, all of them, and the one that MoE-LLaVA pads with
    "arcade100k.tiktoken": (100257, _STABLELM, "<|reg0|>"),
    "qwen.tiktoken": (151643, _QWEN, "<|extra_0|>"),
}


def tiktoken_file(folder: Path) -> Path | None:
    """The vocabulary of a folder, if it is one of those."""
    return next((folder / name for name in _FILES if (folder / name).is_file()), None)


def read_tiktoken(file: Path) -> PreTrainedTokenizerFast:
    """The tokenizer with its special tokens at their published ids."""
    first, specials, pad = _FILES[file.name]
    lines = (line.split() for line in file.read_bytes().splitlines() if line)
    ranks = {base64.b64decode(token): int(rank) for token, rank in lines}
    if len(ranks) > len({*ranks.values()}) or not all(bytes([n]) in ranks for n in range(256)):
        raise ValueError(f"{file.name} is not whole: it should have every byte, and a rank once")
    spelling = bytes_to_unicode()

    def spelled(token: bytes) -> str:
        return "".join(spelling[byte] for byte in token)

    merges = []
    for token, rank in ranks.items():
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in ranks and right in ranks:
                merges.append((rank, ranks[left], ranks[right], spelled(left), spelled(right)))
    vocabulary = {spelled(token): rank for token, rank in ranks.items()}
    vocabulary |= {token: first + place for place, token in enumerate(specials)}
    tokenizer = Tokenizer(
        models.BPE(vocabulary, [merge[3:] for merge in sorted(merges)], ignore_merges=True)
    )
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|endoftext|>",
        pad_token=pad,
        extra_special_tokens=[*specials],
        name_or_path=str(file.parent),
    )
