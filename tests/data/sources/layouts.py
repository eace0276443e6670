"""The same rows in all layouts that people have them in."""

from __future__ import annotations

import gzip
import io
import json
import logging
import tarfile
from pathlib import Path
from typing import Any

import datasets
from PIL import Image

datasets.disable_progress_bars()
logging.getLogger("datasets").setLevel(logging.ERROR)


def png(colour: str, size=(8, 6)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, colour).save(buffer, "PNG")
    return buffer.getvalue()


RED, BLUE = png("red"), png("blue", (12, 10))
NAMES = {RED: "a/red.png", BLUE: "blue.png"}
# id, pictures, messages
CHATS: list[tuple[str, list[bytes], list[tuple[str, str]]]] = [
    ("5", [RED], [("user", "<image>\nWhat?"), ("assistant", "Red.")]),
    ("b", [], [("user", "Hi"), ("assistant", "Hello"), ("user", "And?"), ("assistant", "Bye")]),
    ("c", [RED, BLUE], [("user", "One <image> two <image>?"), ("assistant", "No.")]),
    ("d", [BLUE], [("system", "Be brief."), ("user", "Hm"), ("assistant", "Yes?"),
                   ("user", "<image>\nThis?"), ("assistant", "Blue.")]),
]  # fmt: skip

_ROLES = {"system": "system", "user": "human", "assistant": "gpt"}


def write_pictures(folder: Path) -> None:
    for data, name in NAMES.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)


def messages(chat: list[tuple[str, str]]) -> list[dict[str, str]]:
    return [{"role": role, "content": text} for role, text in chat]


def llava(row_id: str, pictures: list[bytes], chat: list[tuple[str, str]]) -> dict[str, Any]:
    row: dict[str, Any] = {
        "id": int(row_id) if row_id.isdigit() else row_id,
        "conversations": [{"from": _ROLES[role], "value": text} for role, text in chat],
    }
    names = [NAMES[data] for data in pictures]
    return row | ({"image": names[0] if len(names) == 1 else names} if names else {})


def swift(row_id: str, pictures: list[bytes], chat: list[tuple[str, str]]) -> dict[str, Any]:
    images = [NAMES[data] for data in pictures]
    return {"id": row_id, "messages": messages(chat), "images": images}


def table(split: str = "train") -> datasets.Dataset:
    """As on the hub: pictures as bytes, of the library's own type."""
    rows = [
        {
            "id": row_id,
            "messages": messages(chat),
            "images": [{"bytes": data, "path": None} for data in pictures],
        }
        for row_id, pictures, chat in CHATS
    ]
    text = datasets.Value("string")
    features = datasets.Features(
        {
            "id": text,
            "messages": datasets.List({"role": text, "content": text}),
            "images": datasets.List(datasets.Image()),
        }
    )
    return datasets.Dataset.from_list(rows, features=features, split=split)


def write_tar(path: Path, files: dict[str, bytes] | None = None) -> None:
    """Of these files, or of the rows as webdataset's own writer does it: one name is a row."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in (_row_files() if files is None else files).items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))


def _row_files() -> dict[str, bytes]:
    files: dict[str, bytes] = {}
    for row_id, pictures, chat in CHATS:
        files[f"train/{row_id}.json"] = json.dumps({"messages": messages(chat)}).encode()
        files |= {f"train/{row_id}.{n}.png": data for n, data in enumerate(pictures)}
    return files


def write_texts(folder: Path, names: list[str]) -> None:
    """Files of one row, whose text is the name, of the kind that their endings say."""
    for name in names:
        (path := folder / name).parent.mkdir(parents=True, exist_ok=True)
        row = json.dumps({"text": name})
        match name.removesuffix(".gz").rpartition(".")[2]:
            case "tar":
                write_tar(path, {"0.json": row.encode()})
            case "csv" | "tsv":
                path.write_text(f"text\n{name}\n")
            case "json":
                path.write_text(f"[{row}]")
            case "jsonl":
                pack = gzip.compress if name.endswith(".gz") else bytes
                path.write_bytes(pack(row.encode()))
            case _:
                path.write_text(name)


def write(folder: Path, layout: str) -> Path:
    """The rows in a layout; what to give to the converter."""
    write_pictures(folder)
    match layout:
        case "llava":
            path = folder / "rows.json"
            path.write_text(json.dumps([llava(*chat) for chat in CHATS]))
        case "jsonl":
            path = folder / "rows.jsonl"
            path.write_text("".join(json.dumps(swift(*chat)) + "\n" for chat in CHATS))
        case "jsonl_folder":
            path = folder
            for number in (0, 1):
                lines = [json.dumps(llava(*chat)) for chat in CHATS[2 * number : 2 * number + 2]]
                (folder / f"part-{number}.jsonl").write_text("\n".join(lines))
        case "parquet":
            table().to_parquet(path := folder / "data.parquet")
        case "saved":
            datasets.DatasetDict(train=table(), test=table()).save_to_disk(path := folder / "saved")
        case "arrow":
            table().save_to_disk(folder / "saved")
            (path,) = (folder / "saved").glob("*.arrow")
        case "hub":
            path = folder / "set"
            (path / "data").mkdir(parents=True)
            for split in ("train", "test"):
                table(split).to_parquet(path / f"data/{split}-00000-of-00001.parquet")
            (path / "README.md").write_text("---\nlicense: mit\n---\n# A set\n")
        case "webdataset":
            write_tar(path := folder / "00000.tar")
        case _:
            raise AssertionError(layout)
    return path
