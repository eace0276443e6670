"""What only a user's own files can confirm: `--dry-run` looks and says what it found.

The adapters were written from descriptions of the public folders. What contradicts them in a way
that would corrupt training is refused elsewhere; the points here may have good reasons to differ.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import nn

from gemoe_ds.backbones.backbone import Backbone
from gemoe_ds.backbones.stored import open_stored
from gemoe_ds.data.collate import Collator
from gemoe_ds.data.sample import Sample, Turn

_TURNS = (Turn("What is it?", "A cat."), Turn("Where?", "At home."))


def first_contact(
    backbone: Backbone, hf: nn.Module, checkpoint: Path | None, collator: Collator
) -> Iterator[str]:
    """One line for every point: what agrees, what differs. `hf` may be a shell."""
    if checkpoint is not None:
        if backbone.published_parameters:
            yield _totals(backbone, hf, checkpoint)
        yield from _normalisation(backbone, hf, checkpoint)
    yield _embedding(backbone, hf, collator)
    yield from _chat(collator)


def _totals(backbone: Backbone, hf: nn.Module, checkpoint: Path) -> str:
    """Only a folder of the published shapes can have the published total."""
    shapes, published = (
        {name: tuple(p.shape) for name, p in model.named_parameters()}
        for model in (hf, backbone.published())
    )
    if shapes != published:
        return "checkpoint: not of the published model's shapes; totals are not compared"
    stored = open_stored(checkpoint).values()
    found, total = sum(math.prod(t.shape) for t in stored), backbone.published_parameters
    verdict = "as published" if found == total else f"differs: {total:,} were published"
    return f"checkpoint: {found:,} parameters in {len(stored):,} tensors: {verdict}"


def _normalisation(backbone: Backbone, hf: nn.Module, checkpoint: Path) -> Iterator[str]:
    """Of layouts that have it built in."""
    layout: Any = backbone.image_layout(hf)
    path = checkpoint / "preprocessor_config.json"
    if not hasattr(layout, "mean_std") or not path.is_file():
        return
    found = json.loads(path.read_text(encoding="utf-8"))
    for key, ours in zip(("image_mean", "image_std"), layout.mean_std, strict=True):
        if key in found:
            same = [round(x, 4) for x in found[key]] == [round(x, 4) for x in ours]
            verdict = "as built in" if same else f"differs: {list(ours)} is built in"
            yield f"preprocessor_config.json: {key}={found[key]}: {verdict}"


def _embedding(backbone: Backbone, hf: nn.Module, collator: Collator) -> str:
    """Every token must have a row; some of the model's rows may have no token."""
    largest = max(collator.tokenizer.get_vocab().values())  # type: ignore[attr-defined]
    rows = next(p.shape[0] for p in backbone.head(hf).parameters() if p.dim() == 2)
    verdict = "each has its row" if largest < rows else "differs: a text with those ends the run"
    return f"tokenizer: ids up to {largest:,}, the model has {rows:,} rows: {verdict}"


def _chat(collator: Collator) -> Iterator[str]:
    """Two turns without an image, against the template that the tokenizer may come with."""
    tokenizer: Any = collator.tokenizer
    if not getattr(tokenizer, "chat_template", None):
        return
    messages = []
    for turn in _TURNS:
        messages.append({"role": "user", "content": turn.human})
        messages.append({"role": "assistant", "content": turn.gpt})
    ours = collator.encode(0, Sample("first contact", None, _TURNS)).input_ids
    try:
        theirs = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False)
    except Exception as error:  # a template may want anything
        yield f"tokenizer: its chat template cannot be rendered for comparison: {error}"
        return
    if ours == theirs[: len(ours)] and not tokenizer.decode(theirs[len(ours) :]).strip():
        yield "tokenizer: its chat template gives the sequences that are trained on"
    else:
        yield (
            f"tokenizer: its chat template differs: {tokenizer.decode(theirs)!r}; trained on is "
            f"{tokenizer.decode(ours)!r}"
        )
