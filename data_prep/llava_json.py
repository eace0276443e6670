"""Write generated conversations exactly as LLaVA-1.5's files are: JSON beside an image folder.

OUT/train.json  validation.json  test.json   [{id, image, conversations: [{from, value}]}]
OUT/<kind>s.json                             the same images as train.json, questions of one kind
OUT/<split>_kinds.json                       {id: [kind of each question]}
OUT/images/00012/00012345.png                named as in LLaVA-Pretrain
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from gemoe_ds.files import whole_folder

Item = tuple[str, Image.Image, "list[Question]"]


@dataclass(frozen=True)
class Question:
    """One turn and the kind that evaluation groups it under."""

    kind: str
    text: str
    answer: str


def write_splits(
    items: Iterator[Item], sizes: Mapping[str, int], out: Path, alone: str | None = None
) -> None:
    """Fill the splits one after the other from `items` (each its own scene); all or nothing.

    `alone`: a kind of question; its turns in `train` are written once more, to KINDs.json.
    """
    with whole_folder(out) as folder:
        number = 0
        for split, size in sizes.items():
            asked: dict[str, tuple[str, list[Question]]] = {}  # by id: name of the image, questions
            for _ in range(size):
                item_id, image, questions = next(items)
                name = f"{number // 1000:05d}/{item_id}.png"
                path = folder / "images" / name
                path.parent.mkdir(parents=True, exist_ok=True)
                image.save(path, compress_level=1)
                asked[item_id] = name, questions
                number += 1
            write_split(folder, split, asked)
            if split == "train" and alone:
                kept = {
                    item_id: (name, [q for q in questions if q.kind == alone])
                    for item_id, (name, questions) in asked.items()
                }
                write_split(folder, f"{alone}s", kept)
    print(f"{out}: " + ", ".join(f"{size} {split}" for split, size in sizes.items()))


def write_split(folder: Path, split: str, asked: dict[str, tuple[str, list[Question]]]) -> None:
    """SPLIT.json and SPLIT_kinds.json."""
    rows = [conversation(item_id, name, some) for item_id, (name, some) in asked.items()]
    kinds = {item_id: [q.kind for q in some] for item_id, (_, some) in asked.items()}
    (folder / f"{split}.json").write_text(json.dumps(rows))
    (folder / f"{split}_kinds.json").write_text(json.dumps(kinds))


def conversation(item_id: str, image: str, questions: list[Question]) -> dict:
    """One row; the image marker stands in front of the first question."""
    messages = []
    for index, question in enumerate(questions):
        marker = "<image>\n" if index == 0 else ""
        messages.append({"from": "human", "value": marker + question.text})
        messages.append({"from": "gpt", "value": question.answer})
    return {"id": item_id, "image": image, "conversations": messages}
