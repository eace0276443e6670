"""Train a tokenizer on converted samples and save it as a transformers folder."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from gemoe_ds.console import Progress
from gemoe_ds.data.sample import open_samples
from gemoe_ds.data.turn import MARK, Message, leading_marks
from gemoe_ds.errors import DataError
from gemoe_ds.files import whole_folder

SPECIAL = ["<pad>", "<s>", "</s>", "<image>"]
ROLES = ["USER:", "ASSISTANT:"]  # in every turn: one token each, with the space before it


def texts(folders: list[Path]) -> Iterator[str]:
    """Every question and answer as they will stand in a sequence."""
    for folder in folders:
        samples = open_samples(folder)
        for index in Progress(range(len(samples)), desc=f"reading {folder}", unit="sample"):
            yield from _written(samples.outline(index).messages)


def _written(messages: Sequence[Message]) -> Iterator[str]:
    """A question and its answer at once, other messages alone; where pictures stand is no text."""
    question = ""
    for message in messages:
        if message.role == "user":
            question = leading_marks(message.content)[1].replace(MARK, "")
        elif message.role == "assistant":
            yield f" USER: {question} ASSISTANT: {message.content}"
        else:
            yield message.content


def train_tokenizer(folders: list[Path], vocab_size: int, out: Path) -> None:
    """Byte-level BPE: no text is out of its reach; the same data gives the same tokenizer."""
    smallest = len(SPECIAL) + len(alphabet := pre_tokenizers.ByteLevel.alphabet())
    if vocab_size < smallest:
        raise DataError(
            f"--vocab-size {vocab_size}: bytes and special tokens alone are {smallest}; raise it"
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=SPECIAL,
        initial_alphabet=sorted(alphabet),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts(folders), trainer)
    tokenizer.add_tokens([AddedToken(role, lstrip=True, normalized=False) for role in ROLES])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        extra_special_tokens=["<image>"],
    )
    with whole_folder(out) as folder:
        fast.save_pretrained(folder)
    print(f"{out}: {len(fast)} tokens")
