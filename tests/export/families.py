"""Exports of every family that gets a processor, small, with tokenizers of the published kind."""

from __future__ import annotations

import io
import shutil
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import AutoTokenizer

from gemoe_ds.data.collate import Batch, Collator
from gemoe_ds.data.prompts import PromptEncoder, Question
from gemoe_ds.data.sample import Sample, Turn, of_turns
from gemoe_ds.export.folder import export
from gemoe_ds.models.backbone import Backbone
from gemoe_ds.models.moe_model import MoEModel
from gemoe_ds.models.tokenizer import load_tokenizer
from gemoe_ds.moe.router import Router
from tests.models.cases import CASES, write_case
from tests.models.published import write_published
from tests.models.small import make_model, noise
from tests.models.upcycled.small import load as load_upcycled
from tests.models.upcycled.small import write_dense
from tests.tiny import write_tokenizer

STOCK = ("olmoe", "qwen3_vl_moe")  # transformers' own model and processor
FAMILIES = ("deepseek_vl2", "molmoe", "moe_llava_stablelm", "moe_llava_qwen", "upcycled")


@dataclass
class Exported:
    """A model whose tokens differ in k, and its folder."""

    name: str
    folder: Path
    base: Path
    tokenizer: Path
    model: MoEModel

    @cached_property
    def collator(self) -> Collator:
        chat, layout = self.model.backbone.chat, self.model.image_layout
        loaded: Any = load_tokenizer(self.tokenizer, chat, layout and layout.token)
        return Collator(loaded, layout, chat, max_length=4000)

    @property
    def special(self) -> str:
        """A special token that no template names: in a text it is text."""
        tokenizer, chat = self.collator.tokenizer, self.model.backbone.chat
        marks = {tokenizer.bos_token, tokenizer.eos_token, *chat.named, *chat.obeyed, "<image>"}
        return next((t for t in tokenizer.all_special_tokens if t not in marks), "nothing")

    def conversations(self) -> list[tuple[list[dict], list[tuple[int, int]]]]:
        """Messages, and the sizes of their pictures, in order."""
        picture = {"type": "image"}
        found = [
            ([user(picture, "What is this?")], [(60, 90)]),
            ([user(f" Say {self.special} and nothing else, at some length. ")], []),
            ([user("one"), assistant(" Two"), user("three")], []),
            ([user(picture, "one "), assistant("Two."), user(" three?")], [(90, 60)]),
        ]
        if not self.model.backbone.chat.one_image:
            found.append(([user(picture, picture, "Which? ")], [(40, 90), (60, 60)]))
            inside = user("See ", picture, " and ", picture, picture, "!")
            found.append(([inside], [(30, 30), (60, 90), (70, 20)]))
        if self.model.backbone.chat.system is not None:
            system = {"role": "system", "content": "Be brief."}
            found.append(([system, user(picture, "Well?")], [(20, 20)]))
        return found

    def expected(self) -> Batch:
        """What the project's own data path makes of these."""
        return self.first(None)

    def first(self, number: int | None) -> Batch:
        """Of so many of them."""
        encoder, encoded = PromptEncoder(self.collator), []
        for messages, sizes in self.conversations()[:number]:
            pictures = [noise(*size) for size in sizes]
            *system, first = messages[:2] if messages[0]["role"] == "system" else messages[:1]
            if len(messages) > 2:
                encoded.append(self.collator.prompt(0, _sample(messages, pictures)))
                continue
            question = Question(_text(first), system=system[0]["content"] if system else None)
            encoded.append(encoder.chat(question, pictures, room=4000))
        return self.collator.batch(encoded, left=True)


def user(*content: Any) -> dict[str, Any]:
    parts = [{"type": "text", "text": c} if isinstance(c, str) else c for c in content]
    return {"role": "user", "content": parts}


def assistant(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": text}


def _text(message: dict[str, Any]) -> Any:
    """As the project has it: a text, or the texts between pictures that stand inside."""
    parts = [""]
    for part in message["content"]:
        if part["type"] == "image":
            parts.append("")
        else:
            parts[-1] += part["text"]
    return parts[-1] if not any(parts[:-1]) else tuple(parts)


def _sample(messages: list[dict[str, Any]], pictures: list[Image.Image]) -> Sample:
    said = [m["content"] if isinstance(m["content"], str) else _text(m) for m in messages]
    turns = [Turn(a, b) for a, b in zip(said[::2], [*said[1::2], ""], strict=True)]
    buffer = io.BytesIO()
    if pictures:
        pictures[0].save(buffer, "PNG")
    return of_turns("s", buffer.getvalue() if pictures else None, tuple(turns))


def write_exported(name: str, root: Path, router: str = "gemoe", **options: Any) -> Exported:
    """The export of a model with random weights, whose routers choose k at random too."""
    tokenizer = root / "tokenizer"
    if name == "upcycled":
        write_tokenizer(tokenizer)
        base = write_dense(root / "base")
        model = load_upcycled({"tokenizer": tokenizer}, base, router)
    elif name in STOCK:
        base, tokenizer = write_case(name, root)
        model = make_model(name, base, router)
    else:
        write_published(name, tokenizer)
        vocabulary = AutoTokenizer.from_pretrained(tokenizer).get_vocab()
        chat = Backbone.named(name).chat
        base = CASES[name].write(root / "base", vocabulary | dict(chat.added))
        model = make_model(name, base, router)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for layer in model.moe_layers:
            for parameter in layer.router.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=generator))
    for path in tokenizer.iterdir():
        shutil.copyfile(path, base / path.name)
    config = Router.named(router).Config()
    folder = root / "exported"
    export(
        model,
        {n: p.detach() for n, p in model.trainable().items()},
        base=base,
        tokenizer=tokenizer,
        router={"name": router} | config.model_dump(),
        provenance={"base": str(base)},
        out=folder,
        **options,
    )
    return Exported(name, folder, base, tokenizer, model.eval())
