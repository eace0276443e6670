"""Generated data of the sizes that LLaVA's sets have, in the layouts that people have them in."""

from __future__ import annotations

import io
import json
import random
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

LAYOUTS = ("llava json", "parquet", "webdataset", "text")
_WORDS = [f"word{number}" for number in range(2000)]


def write_pictures(folder: Path, number: int) -> list[str]:
    """JPEGs of 480 x 360 pixels, 60 KB on average, a thousand a folder; their names."""
    rng = np.random.default_rng(0)
    names = []
    for index in range(number):
        name = f"{index // 1000:05d}/{index:09d}.jpg"
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(jpeg(rng, 480, 360))
        names.append(name)
    return names


def jpeg(rng: np.random.Generator, width: int, height: int) -> bytes:
    """Smooth colours under noise, which takes as many bytes as a photograph."""
    coarse = rng.integers(0, 256, (24, 32, 3), dtype=np.uint8)
    smooth = np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))
    pixels = (smooth + rng.normal(0, 18, (height, width, 1))).clip(0, 255).astype(np.uint8)
    stored = io.BytesIO()
    Image.fromarray(pixels).save(stored, "JPEG", quality=82)
    return stored.getvalue()


def write_layout(place: Path, layout: str, names: list[str]) -> Path:
    """A row for each picture; `text`: as many rows without. What to give to the converter."""
    rng = random.Random(0)
    chats = [_chat(rng) for _ in names]
    if layout in ("llava json", "text"):
        rows = [
            {"id": f"{number:09d}", "conversations": [{"from": r, "value": t} for r, t in chat]}
            | ({} if layout == "text" else {"image": name})
            for number, (name, chat) in enumerate(zip(names, chats, strict=True))
        ]
        if layout == "text":
            for row in rows:
                row["conversations"][0]["value"] = "What is this?"  # type: ignore[index]
        path = place / f"{layout.replace(' ', '_')}.json"
        path.write_text(json.dumps(rows))
        return path
    roles = {"human": "user", "gpt": "assistant"}
    messages = [[{"role": roles[role], "content": text} for role, text in chat] for chat in chats]
    data = [(place / "images" / name).read_bytes() for name in names]
    if layout == "parquet":
        table = pa.table(
            {"images": [[{"bytes": d, "path": None}] for d in data], "messages": messages}
        )
        pq.write_table(table, path := place / "rows.parquet", row_group_size=100)
        return path
    with tarfile.open(path := place / "rows.tar", "w") as tar:
        for number, (said, picture) in enumerate(zip(messages, data, strict=True)):
            for suffix, content in (
                ("json", json.dumps({"messages": said}).encode()),
                ("jpg", picture),
            ):
                member = tarfile.TarInfo(f"{number:09d}.{suffix}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    return path


def write_large_json(path: Path, number: int) -> None:
    """Rows of text alone, 1.4 KB each, as the JSON of mix665k has on average."""
    rng = random.Random(0)
    texts = [" ".join(rng.choices(_WORDS, k=rng.randint(4, 50))) for _ in range(5000)]
    with path.open("w", encoding="utf-8") as file:
        for index in range(number):
            talk = []
            for _ in range(rng.randint(1, 5)):
                talk += [{"from": "human", "value": rng.choice(texts)}]
                talk += [{"from": "gpt", "value": rng.choice(texts)}]
            row = json.dumps({"id": f"{index:09d}", "model": "", "conversations": talk})
            file.write(("[" if index == 0 else ",\n") + row)
        file.write("]\n")


def _chat(rng: random.Random) -> list[tuple[str, str]]:
    """A caption, as LLaVA-Pretrain has."""
    answer = " ".join(rng.choices(_WORDS, k=rng.randint(6, 20)))
    return [("human", "<image>\nDescribe the picture in a few words."), ("gpt", answer)]
