"""What only a user's own files can confirm: `--dry-run` looks and says what it found.

The adapters were written from descriptions of the public folders. What contradicts them in a way
that would corrupt training is refused elsewhere; the points here may have good reasons to differ.
What only the loaded model can say is in base_loss_check.py.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from torch import nn

from gemoe_ds.data.collate import Collator
from gemoe_ds.data.sample import Turn, of_turns
from gemoe_ds.errors import CheckpointError
from gemoe_ds.hf_io.safetensors_reader import StoredTensor, open_stored, read_json
from gemoe_ds.models.backbone import Backbone

_TURNS = (Turn("What is it?", "A cat."), Turn("Where?", "At home."))
_PROCESSORS = ("preprocessor_config.json", "processor_config.json")
_TEMPLATES = ("chat_template.jinja", "chat_template.json")


def checkpoint_report(
    backbone: Backbone, hf: nn.Module, checkpoint: Path | None, collator: Collator
) -> Iterator[str]:
    """One line for every point: what agrees, what differs. `hf` may be a meta model."""
    layout: Any = backbone.image_layout(hf)
    if checkpoint is not None:
        stored: dict[str, StoredTensor] = {}
        with suppress(CheckpointError):  # a dense model's, which transformers reads in its own ways
            stored = open_stored(checkpoint)
        if stored and backbone.published_parameters:
            yield _totals(backbone, hf, stored)
        if stored:
            yield f"checkpoint: stored as {_dtypes(stored)}"
        if backbone.may_lack:
            yield _left_out(backbone, hf)
        yield from _processor(getattr(layout, "settings", {}), checkpoint, collator)
    yield from _frame(getattr(layout, "frame", {}), collator)
    yield _embedding(backbone, hf, collator)
    yield from _chat(collator, checkpoint)


def _totals(backbone: Backbone, hf: nn.Module, stored: dict[str, StoredTensor]) -> str:
    """Only a folder of the published shapes can have the published total."""
    part, published = backbone.published_part, backbone.published()
    ours, theirs = (
        {n: tuple(p.shape) for n, p in model.named_parameters() if n.startswith(part)}
        for model in (hf, published)
    )
    if ours != theirs:
        return "checkpoint: not of the published model's shapes; totals are not compared"
    if part:
        keys = backbone.keys.fitting({k: t.shape for k, t in stored.items()}, ours)
        own = {piece.key for name, shape in ours.items() for piece in keys.of(name, shape)}
        stored = {key: tensor for key, tensor in stored.items() if key in own}
    found = (sum(math.prod(t.shape) for t in stored.values()), len(stored))
    total = (backbone.published_parameters, backbone.published_tensors or found[1])
    result = "as published"
    if found != total:
        result = f"differs: {total[0]:,} were published"
        if backbone.published_tensors:
            result += f", in {total[1]:,} tensors"
    whole = f" ({part.rstrip('.').replace('_', ' ')} alone)" if part else ""
    return f"checkpoint: {found[0]:,} parameters in {found[1]:,} tensors{whole}: {result}"


def _dtypes(stored: dict[str, StoredTensor]) -> str:
    """Each with how many numbers it has, if there are several."""
    numbers: Counter[str] = Counter()
    for tensor in stored.values():
        numbers[str(tensor.dtype).removeprefix("torch.")] += math.prod(tensor.shape)
    if len(numbers) == 1:
        return next(iter(numbers))
    return ", ".join(f"{dtype} ({number:,} numbers)" for dtype, number in numbers.most_common())


def _left_out(backbone: Backbone, hf: nn.Module) -> str:
    """Whether the folder has what it may lack: then there is memory, filled from elsewhere."""
    some = [
        (n, p)
        for n, p in hf.named_parameters()
        if any(fnmatchcase(n, pattern) for pattern in backbone.may_lack)
    ]
    name = some[0][0].partition(".")[0].replace("_", " ")
    inside = all(p.is_meta for _, p in some)
    return f"checkpoint: its {name} is {'inside' if inside else 'not inside, and read elsewhere'}"


def _processor(wanted: dict[str, Any], folder: Path, collator: Collator) -> Iterator[str]:
    """The files that say how images are prepared, against what is built in."""
    wanted = wanted | {"pad_token": getattr(collator.tokenizer, "pad_token", None)}
    for name in _PROCESSORS:
        if not (folder / name).is_file():
            continue
        try:
            found = read_json(folder / name)
        except (OSError, ValueError) as error:
            yield f"{name}: cannot be read ({error}); not compared"
            continue
        inner = found.get("image_processor")
        found |= inner if isinstance(inner, dict) else {}
        for key, ours in wanted.items():
            if key in found:
                same = _rounded(found[key]) == _rounded(ours)
                result = "as used here" if same else f"differs: {ours} is used here"
                yield f"{name}: {key}={found[key]}: {result}"


def _rounded(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return [_rounded(item) for item in value]
    return round(value, 4) if isinstance(value, float | int) else value


def _frame(tokens: dict[str, int], collator: Collator) -> Iterator[str]:
    """Tokens that stand around an image, by id; that of the features is checked on loading."""
    vocabulary: dict[str, int] = collator.tokenizer.get_vocab()
    for token, wanted in tokens.items():
        found = vocabulary.get(token)
        result = "as the model's" if found == wanted else f"differs: the model's is {wanted}"
        yield f"tokenizer: {token} is {found}: {result}"


def _embedding(backbone: Backbone, hf: nn.Module, collator: Collator) -> str:
    """Every token must have a row; some of the model's rows may have no token."""
    largest = max(collator.tokenizer.get_vocab().values())
    rows = next(p.shape[0] for p in backbone.head(hf).parameters() if p.dim() == 2)
    result = "each has its row" if largest < rows else "differs: a text with those ends the run"
    return f"tokenizer: ids up to {largest:,}, the model has {rows:,} rows: {result}"


def _chat(collator: Collator, checkpoint: Path | None) -> Iterator[str]:
    """Two turns without an image, against the templates that the model may come with."""
    tokenizer: Any = collator.tokenizer
    messages = []
    for turn in _TURNS:
        messages.append({"role": "user", "content": turn.human})
        messages.append({"role": "assistant", "content": turn.gpt})
    ours = collator.encode(0, of_turns("first contact", None, _TURNS)).input_ids
    for place, template in _templates(tokenizer, checkpoint):
        if template is None:
            yield f"{place} holds no template that can be read"
            continue
        try:
            theirs = tokenizer.apply_chat_template(
                messages, chat_template=template, tokenize=True, return_dict=False
            )
        except Exception as error:  # a template may want anything
            yield f"{place} cannot be rendered for comparison: {error}"
            continue
        if ours == theirs[: len(ours)] and not tokenizer.decode(theirs[len(ours) :]).strip():
            yield f"{place} gives the sequences that are trained on"
        else:
            yield (
                f"{place} differs: {tokenizer.decode(theirs)!r}; trained on is "
                f"{tokenizer.decode(ours)!r}"
            )


def _templates(tokenizer: Any, checkpoint: Path | None) -> Iterator[tuple[str, Any]]:
    """The tokenizer's own, and those in files that are a processor's (None: unreadable), once."""
    seen: list[Any] = []
    if template := getattr(tokenizer, "chat_template", None):
        seen.append(template)
        yield "tokenizer: its chat template", template
    folders = [Path(str(tokenizer.name_or_path)), *([checkpoint] if checkpoint else [])]
    for path in (folder / name for folder in folders for name in _TEMPLATES):
        if not path.is_file():
            continue
        try:
            is_json = path.suffix == ".json"
            template = read_json(path)["chat_template"] if is_json else path.read_text("utf-8")
        except (OSError, ValueError, KeyError):
            template = None
        if template not in seen:
            seen.append(template)
            yield f"{path.name}: it", template
