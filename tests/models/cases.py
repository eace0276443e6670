"""Every backbone small: a folder in its public layout, and a tokenizer with what its chat needs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from transformers import AutoTokenizer

from gemoe_ds.data.sample import Turn, of_turns, write_samples
from gemoe_ds.models.backbone import Backbone
from tests.models.deepseek_vl2.small import write_deepseek_vl2
from tests.models.moe_llava.small import write_moe_llava
from tests.models.molmoe.small import write_molmoe
from tests.models.olmoe.small import write_olmoe
from tests.models.qwen3_vl.small import write_qwen3_vl
from tests.tiny import write_tokenizer


@dataclass(frozen=True)
class Case:
    """`write(folder, vocabulary)`, and the words and special tokens that its chat has."""

    write: Callable[..., Path]
    plain: tuple[str, ...] = ()
    specials: dict[str, int] = field(default_factory=dict)
    sees: bool = True


def numbered(first: int, *tokens: str) -> dict[str, int]:
    return dict(zip(tokens, range(first, first + len(tokens)), strict=True))


_QWEN = ["im_start", "im_end", "image_pad", "vision_start", "vision_end"]
CASES = {
    "olmoe": Case(write_olmoe, ("<|user|>", "<|assistant|>"), sees=False),
    "qwen3_vl_moe": Case(
        write_qwen3_vl,
        ("user", "assistant"),
        numbered(30, *(f"<|{name}|>" for name in _QWEN)),
    ),
    "molmoe": Case(
        write_molmoe,
        ("User:", "Assistant:"),
        numbered(50279, "<|endoftext|>", "<im_start>", "<im_end>", "<im_patch>", "<im_col>"),
    ),
    "deepseek_vl2": Case(
        write_deepseek_vl2,
        (":",),
        {"<image>": 128815} | numbered(128821, "<|User|>", "<|Assistant|>"),
    ),
    **{
        name: Case(
            partial(write_moe_llava, name),
            tuple(Backbone.named(name).chat.start.split()),
            numbered(60, "<|endoftext|>"),
        )
        for name in ("moe_llava_stablelm", "moe_llava_qwen")
    },
}


def write_case(name: str, folder: Path, **options) -> tuple[Path, Path]:
    """The model's folder and the tokenizer's. `options`: of the case's writer."""
    case = CASES[name]
    tokenizer = write_tokenizer(folder / "tokenizer", case.plain, case.specials)
    vocabulary = AutoTokenizer.from_pretrained(tokenizer).get_vocab()
    return case.write(folder / "base", vocabulary, **options), tokenizer


def write_text(folder):
    turns = [Turn("a b", "c d"), Turn("e", "f"), Turn("g h", "a")]
    samples = (of_turns(f"s{i}", None, (turns[i % 3],)) for i in range(20))
    write_samples(samples, folder, source="test")
    return folder
