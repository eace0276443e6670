"""A sample as the model sees it, for people: every special token, images folded, targets apart."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any

from gemoe_ds.data.collate import IGNORE, Collator, Encoded
from gemoe_ds.data.mixture import SampleList
from gemoe_ds.data.sample import Sample
from gemoe_ds.errors import SampleError

_TRIED = 10  # samples, for one that can be shown
_WIDTH = 400  # characters of a stretch, of which more are left out in the middle


def first_sample(collator: Collator, samples: SampleList | Sequence[Sample]) -> Iterator[str]:
    """The lines that show the first sample that is not left out."""
    for row in range(min(len(samples), _TRIED)):
        try:
            encoded = collator.encode(row, samples[row])
        except SampleError as error:
            yield f"left out: {error}"
            continue
        targets = sum(label != IGNORE for label in encoded.labels)
        yield (
            f"sample {encoded.id}, the first one, as the model sees it: "
            f"{len(encoded.input_ids):,} tokens, {sum(encoded.is_vision):,} of them of an image; "
            f"{targets:,} are targets"
        )
        for is_target, text in stretches(encoded, collator):
            yield f"  {'target' if is_target else 'input '} | {_short(text)}"
        return


def stretches(encoded: Encoded, collator: Collator) -> Iterator[tuple[bool, str]]:
    """Text that is a target and text that is not, in turn; a line end is shown as \\n."""
    tokens = zip(encoded.input_ids, encoded.labels, encoded.is_vision, strict=True)
    for is_target, stretch in groupby(tokens, lambda token: token[1] != IGNORE):
        text = ""
        for is_vision, group in groupby(stretch, lambda token: token[2]):
            ids = [token[0] for token in group]
            text += _image(ids, collator) if is_vision else _spelled(ids, collator.tokenizer)
        yield is_target, text


def _image(ids: list[int], collator: Collator) -> str:
    """<im_start> x 2 <im_patch> x 288 ...: what an image consists of, as it first appears."""
    tokenizer: Any = collator.tokenizer
    if getattr(collator.layout, "token", None) is None:
        return f"<image> x {len(ids)}"
    return " ".join(
        tokenizer.convert_ids_to_tokens(token) + (f" x {times}" if times > 1 else "")
        for token, times in Counter(ids).items()
    )


def _spelled(ids: list[int], tokenizer: Any) -> str:
    text: str = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return text.replace("\\", "\\\\").replace("\n", "\\n").replace("\r", "\\r").replace("\t", "\\t")


def _short(text: str) -> str:
    left_out = len(text) - _WIDTH
    half = _WIDTH // 2
    if left_out < 50:
        return text
    return f"{text[:half]} [... {left_out:,} characters ...] {text[-half:]}"
