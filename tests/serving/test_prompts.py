"""The questions: twenty, pictures that differ, and files whose mistakes are told by their line."""

from __future__ import annotations

import json

import pytest
from PIL import Image

from gemoe_ds.errors import DataError
from gemoe_ds.serving.exchange import Prompt
from gemoe_ds.serving.prompts import SIZES, built_in, draw, read_prompts


def test_twenty_different_questions_with_pictures_for_a_model_that_sees(tmp_path):
    text, seen = built_in(False, tmp_path), built_in(True, tmp_path)
    assert len(set(text)) == len(set(seen)) == 20
    assert not any(prompt.images for prompt in text)
    assert sum(bool(prompt.images) for prompt in seen) == 12
    paths = {path for prompt in seen for path in prompt.images}
    pictures = [Image.open(path) for path in paths]
    assert {picture.size for picture in pictures} == set(SIZES)
    assert all(len(picture.getcolors(1 << 20)) >= 3 for picture in pictures)
    assert draw(tmp_path / "again.png", 2).read_bytes() == (tmp_path / "picture_2.png").read_bytes()


def test_a_file_of_prompts(tmp_path):
    draw(tmp_path / "a.png", 0)
    rows = [{"text": "Why?"}, {"text": "What?", "images": ["a.png"]}]
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    found = read_prompts(tmp_path / "p.jsonl", True)
    assert found == (Prompt("Why?"), Prompt("What?", (str(tmp_path / "a.png"),)))


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("", "has no line"),
        ("Why?", "line 1: is not"),
        ('["Why?"]', "line 1: is not"),
        ('{"text": "Why?", "image": "a.png"}', "line 1: is not"),
        ('{"text": " "}', "text=' ' is no text"),
        ('{"text": "a"}\n{"images": []}', "line 2: text=None is no text"),
        ('{"text": "a", "images": "a.png"}', "images='a.png' is no list"),
        ('{"text": "a", "images": ["none.png"]}', "none.png: no picture that Pillow reads"),
        ('{"text": "a", "images": ["p.jsonl"]}', "p.jsonl: no picture that Pillow reads"),
    ],
)
def test_a_mistake_in_a_file_is_one_line(line, words, tmp_path):
    (tmp_path / "p.jsonl").write_text(line)
    with pytest.raises(DataError) as refusal:
        read_prompts(tmp_path / "p.jsonl", True)
    assert words in str(refusal.value) and "\n" not in str(refusal.value)


def test_pictures_for_a_model_without_eyes_and_a_file_that_is_not_there(tmp_path):
    (tmp_path / "p.jsonl").write_text('{"text": "a", "images": ["a.png"]}')
    with pytest.raises(DataError, match="has images, and this folder has no image processor"):
        read_prompts(tmp_path / "p.jsonl", False)
    with pytest.raises(DataError, match="give a file of JSON lines"):
        read_prompts(tmp_path / "gone.jsonl", False)
