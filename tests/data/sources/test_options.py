"""An option that a source or its rows have no use for is refused, not ignored."""

from __future__ import annotations

import json

import pytest

from tests.data.sources.layouts import write_pictures

TALK = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]


@pytest.mark.parametrize(
    "words, row, line",
    [
        ("--split train", None, "--split train: it is for CSV or TSV or a table (parquet"),
        ("--config a", TALK, "--config a: it is for a table (parquet, arrow, save_to_disk, a copy"),
        ("--documents line", TALK, "--documents line: it is for text files (.txt), and this is"),
        ("--question Q", TALK, "--question Q: it is for pictures and captions, and this is conv"),
        ("--text-column t", TALK, "--text-column t: it is for pictures and captions or plain te"),
        ("--image-column t", TALK, "--image-column t: no row has this key"),
        ("--image-column t", "a", "--image-column t: it is for "),
        ("--images .", "a", "and this is plain text; remove --images"),
        ("--source a --source-column id", TALK, "--source a and --source-column id: give one"),
        ("--source-column src", TALK, "its 'src' is None, not the name of a source"),
    ],
)
def test_an_option_without_a_use(tmp_path, convert, words, row, line):
    path = tmp_path / ("rows.json" if row is None else "rows.jsonl")
    row = {"text": row} if isinstance(row, str) else {"id": 1, "conversations": row or TALK}
    path.write_text(json.dumps([row] if path.suffix == ".json" else row))
    assert line in convert(path, *words.split())


def test_a_wrong_column_is_found_before_a_picture_is_read(tmp_path, convert):
    """The picture is not there: to look for it would say so."""
    talk = [{"from": "human", "value": "<image>\nWhat?"}, TALK[1]]
    row = {"id": 1, "src": "coco", "image": "gone.png", "conversations": talk}
    (tmp_path / "rows.json").write_text(json.dumps([row]))
    assert "its 'scr' is None" in convert(tmp_path / "rows.json", "--source-column", "scr")


def test_a_column_that_is_named_is_the_one_that_is_read(tmp_path, convert):
    write_pictures(tmp_path)
    row = {"photo": "blue.png", "caption": "No", "alt": "Blue."}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row))
    options = ["--image-column", "photo", "--question", "What?", "--text-column", "alt"]
    (sample,) = convert(tmp_path / "rows.jsonl", *options)
    assert sample.messages[1].content == "Blue." and len(sample.images) == 1
