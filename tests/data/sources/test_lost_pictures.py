"""A set of pictures never becomes one of texts: the line says how its pictures are read."""

from __future__ import annotations

import json

import pytest

from gemoe_ds.data.sources.picture_names import is_picture
from tests.data.sources.layouts import BLUE, RED, write_tar, write_texts

TALK = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]
SEE = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "Red."}]
ASK = ("--question", "Describe it.")


@pytest.mark.parametrize(
    "row, key",
    [
        ({"file_name": "a.png", "text": "A cat."}, "file_name"),
        ({"url": "https://x.org/a.jpg", "text": "A cat."}, "url"),
        ({"photo": "a.jpg", "conversations": TALK}, "photo"),
        ({"file_name": "a.PNG", "conversations": SEE}, "file_name"),
        ({"shots": ["a.png", "b.png"], "messages": TALK}, "shots"),
        ({"image_path": "a.png", "caption": "A cat."}, "image_path"),
        ({"photo": "a.jpg", "instruction": "Look", "output": "Yes"}, "photo"),
    ],
)
def test_the_way_out_names_the_key(tmp_path, convert, row, key):
    (tmp_path / "rows.jsonl").write_text(json.dumps({"id": 1} | row))
    for options in ((), ASK):
        line = convert(tmp_path / "rows.jsonl", *options)
        known = "is for" if "conversations" in row or "messages" in row or "output" in row else ""
        if not (options and known):  # --question is refused there
            assert f"its picture is under {key!r}" in line and f"--image-column {key} reads" in line


def test_a_picture_without_a_text_is_said(tmp_path, convert):
    write_tar(tmp_path / "0.tar", {"7.jpg": RED, "7.v1.txt": b"A cat."})
    line = convert(tmp_path / "0.tar", *ASK)
    assert "the keys __key__, v1.txt, images: a picture, and no text under txt, caption" in line
    assert len(convert(tmp_path / "0.tar", *ASK, "--text-column", "v1.txt")) == 1


def test_what_is_a_picture():
    for value in ("a.jpg", "dir/A b.JPEG", ["a.png"], RED, {"bytes": RED, "path": None}):
        assert is_picture(value), value
    for value in ("a.jp", "a.jpg is one", "x\na.jpg", "a.mp4", [], ["a.png", 3], b"a", 7, {}):
        assert not is_picture(value), value
    assert not is_picture({"bytes": b"RIFF....WAVE", "path": "a.wav"})


def test_texts_beside_pictures_of_their_names_are_captions(tmp_path, convert):
    write_texts(tmp_path / "set", ["a.txt", "b/0.txt", "b/1.txt"])
    for name in ("b/0.png", "c.png"):
        (tmp_path / "set" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "set" / name).write_bytes(RED)
    line = convert(tmp_path / "set")
    assert "1 texts have a picture of their name beside them, 0.txt and 0.png first; " in line
    assert f"tar --sort=name -C {tmp_path / 'set'} -cf pairs.tar . makes a WebDataset" in line
    assert len(convert(tmp_path / "set/b/0.txt")) == 1


def test_pictures_lie_beside_the_file_that_names_them(tmp_path, convert):
    """Behind --images and SOURCE; `datasets` has metadata.jsonl so in train/."""
    for name, data in {"set/train/a.png": RED, "set/b.png": BLUE, "else/c.png": RED}.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(data)
    (tmp_path / "set/train/b.png").write_bytes(RED)
    rows = [{"file_name": f"{name}.png", "text": name} for name in "ab"]
    (tmp_path / "set/train/metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    options = (*ASK, "--image-column", "file_name")
    samples = convert(tmp_path / "set", *options)
    assert [sample.images[0].data for sample in samples] == [RED, BLUE]
    (tmp_path / "out").rename(tmp_path / "first")
    samples = convert(tmp_path / "set", *options, "--images", tmp_path / "else")
    assert [sample.images[0].data for sample in samples] == [RED, RED]
