"""The commands of docs/prepare_data.md, on small files in the layouts that the page names."""

from __future__ import annotations

import io
import json
import re
import shlex
import tarfile
from pathlib import Path

import datasets
import pytest

from gemoe_ds.cli.data import card, convert
from gemoe_ds.data.sample import open_samples
from tests.data.sources.layouts import BLUE, RED, messages
from tests.helpers import repository

PAGE = (repository() / "docs/prepare_data.md").read_text(encoding="utf-8")
SEE = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "Red."}]
TALK = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]
CHAT = messages([("user", "Hi"), ("assistant", "Hello")])


def commands(program: str) -> list[list[str]]:
    """Their arguments."""
    lines = re.findall(rf"^    {program} (.*)$", PAGE, re.MULTILINE)
    return [shlex.split(line) for line in lines]


def write(path: Path, content: bytes | str | object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if not isinstance(content, bytes):
        content = (content if isinstance(content, str) else json.dumps(content)).encode()
    path.write_bytes(content)


def write_tar(path: Path, files: dict[str, bytes]) -> None:
    path.parent.mkdir(parents=True)
    with tarfile.open(path, "w") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    """All sets of the page, as they are downloaded, and converted by its commands."""
    root = tmp_path_factory.mktemp("sets")
    raw = root / "raw"
    rows = [{"id": f"{n:09d}", "image": f"00000/{n:09d}.jpg", "conversations": SEE} for n in (0, 1)]
    write(raw / "LLaVA-Pretrain/blip_laion_cc_sbu_558k.json", rows)
    for row in rows:
        write(raw / "LLaVA-Pretrain/images" / row["image"], RED)
    places = ["coco/train2017", "gqa/images", "ocr_vqa/images", "textvqa/train_images"]
    places += ["vg/VG_100K", "vg/VG_100K_2"]
    rows = [
        {"id": str(n), "image": f"{p}/1.jpg", "conversations": SEE} for n, p in enumerate(places)
    ]
    for row in rows:
        write(raw / "mix665k" / row["image"], RED)
    rows += [{"id": "t", "model": "", "conversations": TALK}] * 2
    write(raw / "mix665k/llava_v1_5_mix665k.json", rows)
    tulu = [{"id": f"{n}", "messages": CHAT, "source": f"set_{n % 2}"} for n in range(3)]
    tulu.append({"id": "3", "messages": [*CHAT, *CHAT], "source": "set_0"})
    (raw / "tulu/data").mkdir(parents=True)
    for n in range(2):
        part = datasets.Dataset.from_list(tulu[2 * n : 2 * n + 2])
        part.to_parquet(raw / f"tulu/data/train-0000{n}-of-00002.parquet")
    write(raw / "tulu/README.md", "---\nlicense: odc-by\n---\n# A mixture\n")
    (line,) = re.findall(r"```json\n(.*)\n```", PAGE)
    write(raw / "pairs/pairs.jsonl", f"{line}\n{line.replace('7', '8')}\n")
    write(raw / "pairs/images/a.jpg", RED)
    write(raw / "pairs/images/b.jpg", BLUE)
    two = messages([("user", "<image><image>?"), ("assistant", "Yes")])
    one = messages([("user", "<image>?"), ("assistant", "Yes")])
    shard = {"000012.json": json.dumps({"messages": one}).encode(), "000012.jpg": RED}
    shard |= {"000013.json": json.dumps({"messages": two}).encode()}
    write_tar(raw / "shards/0.tar", shard | {"000013.0.jpg": RED, "000013.1.jpg": BLUE})
    write_tar(raw / "cc3m/00000.tar", {"000012.jpg": RED, "000012.txt": b"A red one."})
    write(raw / "books/one.txt", "Once upon a time.\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        for arguments in commands("gemoe data convert"):
            convert.main(arguments)
    return root


def test_every_set_becomes_the_samples_that_it_holds(converted):
    found = {path.name: open_samples(path) for path in (converted / "data").iterdir()}
    shapes = {
        name: [(len(s.images), len(s.messages), s.source) for s in samples]
        for name, samples in found.items()
    }
    assert shapes == {
        "llava_558k": [(1, 2, "pretrain")] * 2,
        "mix665k": [(1, 2, "mix665k")] * 6 + [(0, 2, "mix665k")] * 2,
        "tulu": [(0, 2, "set_0"), (0, 4, "set_0")],  # of four, two are there twice
        "pairs": [(2, 2, "")] * 2,
        "shards": [(1, 2, ""), (2, 2, "")],
        "cc3m": [(1, 2, "")],
        "books": [(0, 1, "")],
    }
    assert found["tulu"].manifest["dropped_groups"][0]["group"] == "duplicate"
    assert found["cc3m"][0].messages[0].content == "<image>\nDescribe the picture."
    assert len(commands("gemoe data convert")) == len(shapes)


def test_the_card_of_the_page_is_drawn(converted, monkeypatch, capsys):
    monkeypatch.chdir(converted)
    ((folder, *recipe),) = commands("gemoe data card")
    assert recipe[0] == "--recipe"  # whose checkpoint is not here
    card.main([folder])
    assert "pictures: 6 shown, 1 stored" in capsys.readouterr().out
    assert (converted / "data/mix665k/card/card.html").exists()
