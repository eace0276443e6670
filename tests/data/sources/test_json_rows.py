"""A file that is read in pieces gives what the whole one gives: values, and errors word by word."""

from __future__ import annotations

import json
import os
import random
import tracemalloc

import pytest

from gemoe_ds.data.sources import json_rows
from gemoe_ds.data.sources.json_file import read_json
from gemoe_ds.errors import DataError

ROWS = [
    {"id": 5, "t": 'a "b" \\ \u00e4\u4f55\U0001f600', "n": [1, -2.5e3, None, True], "o": {}},
    {"id": "5", "c": [{"from": "human", "value": "x\ny"}]},
    12,
    "",
    [],
]


def outcome(read, path):
    try:
        return list(read(path))
    except DataError as error:
        return str(error)


@pytest.fixture(params=[1, 5, 64])
def pieces(request, monkeypatch):
    """Of so many bytes: characters, numbers and words are cut."""
    monkeypatch.setattr(json_rows, "_AT_ONCE", request.param)


@pytest.mark.parametrize("before", ["", "\ufeff", " \n"])
@pytest.mark.parametrize("behind", ["", " \r\n\t"])
@pytest.mark.parametrize("indent", [None, 1])
@pytest.mark.parametrize("ascii", [True, False])
def test_lists_and_lines_are_read(tmp_path, pieces, before, behind, indent, ascii):
    path = tmp_path / "rows.json"
    text = json.dumps(ROWS, indent=indent, ensure_ascii=ascii)
    path.write_text(before + text + behind, encoding="utf-8")
    assert list(json_rows.list_items(path)) == ROWS
    lines = [json.dumps(row, indent=indent, ensure_ascii=ascii) for row in ROWS]
    path.write_text(before + "\n".join(lines) + behind, encoding="utf-8")
    assert list(json_rows.lines(path)) == ROWS
    path.write_text("[ ]")
    assert list(json_rows.list_items(path)) == []


@pytest.mark.parametrize("gap", range(5))
def test_a_number_may_be_cut_anywhere(tmp_path, pieces, gap):
    numbers = [12, 345, -6.25e-7, 8e-20, 1]
    (path := tmp_path / "rows.json").write_text(" " * gap + json.dumps(numbers))
    assert list(json_rows.list_items(path)) == numbers
    path.write_text(" " * gap + "\n".join(map(json.dumps, numbers)))
    assert list(json_rows.lines(path)) == numbers


def test_a_harmed_list_has_the_words_of_one_that_is_read_whole(tmp_path, pieces):
    """Cut, or with a character less, another or one more, at any place; the oracle reads it all."""
    rng, text = random.Random(0), json.dumps(ROWS[:3], indent=1, ensure_ascii=False)
    path = tmp_path / "rows.json"
    harmed = [text[:place] for place in range(1, len(text), 3)]
    for place in range(1, len(text), 5):
        other = rng.choice('[]{}",:1a\\\n\t\x01')
        harmed += [text[:place] + text[place + 1 :], text[:place] + other + text[place:]]
        harmed.append(text[:place] + other + text[place + 1 :])
    harmed += [text + "]", text + text, text + "</html>" * 9, "[1,]", '[{"a": 1, "a": 2}]']
    errors = 0
    for content in harmed:
        path.write_text(content, encoding="utf-8")
        whole = outcome(lambda path: read_json(path, list), path)
        assert outcome(json_rows.list_items, path) == whole, content
        errors += isinstance(whole, str)
    assert errors > 100


@pytest.mark.parametrize("cut", [4, 17])
@pytest.mark.parametrize("at", [0, 5, 8])
def test_a_line_that_is_cut_is_named_by_its_own_number(tmp_path, pieces, at, cut):
    """The lines behind it are read as its own, until one cannot be."""
    path = tmp_path / "rows.jsonl"
    whole = ['{"id": 1, "c": [{"a": 1}]}'] * 10
    path.write_text("\n".join([*whole[:at], whole[at][:cut], *whole[at + 1 :]]))
    said = str(outcome(json_rows.lines, path))
    assert f"line {at + 1} " in said and "downloaded" not in said
    own = f"the value that begins in line {at + 1} is not whole: "
    assert own in said or f": line {at + 1} column" in said


@pytest.mark.parametrize(
    "last, is_cut", [('{"id": [', True), ('{"id": "x', True), ("[\n1,", False)]
)
def test_a_last_line_that_is_cut_may_be_of_a_download(tmp_path, pieces, last, is_cut):
    (path := tmp_path / "rows.jsonl").write_text(f'{{"id": 1}}\n{last}\n')
    path.write_text(path.read_text().rstrip())
    said = str(outcome(json_rows.lines, path))
    assert said.endswith("was it downloaded whole?") == is_cut and "line 2 " in said


@pytest.mark.parametrize("content", [b'["a", "\xe4"]', '["a"]'.encode("utf-16"), b"PAR1"])
def test_what_is_no_text(tmp_path, pieces, content):
    path = tmp_path / "rows.json"
    path.write_bytes(content)
    found, whole = outcome(json_rows.list_items, path), outcome(lambda p: read_json(p, list), path)
    assert isinstance(found, str) and found[:60] == str(whole)[:60]
    with pytest.raises(DataError, match="No such file"):
        json_rows.first_character(tmp_path / "none")


def test_a_value_that_never_ends_is_not_read_again_and_again(tmp_path, monkeypatch):
    """An error in the first row is found in the first piece; a long text is scanned few times."""
    monkeypatch.setattr(json_rows, "_AT_ONCE", 1000)
    reads: list[int] = []
    more = json_rows._Text._more
    monkeypatch.setattr(json_rows._Text, "_more", lambda self: (reads.append(1), more(self))[1])
    path = tmp_path / "rows.json"
    path.write_text('[{"a" 1}, "' + "x" * 100_000 + '"]')
    with pytest.raises(DataError, match="Expecting ':' delimiter: line 1 column 7"):
        list(json_rows.list_items(path))
    assert len(reads) == 1
    path.write_text('["' + "x" * 100_000 + '"]')
    assert list(json_rows.list_items(path)) == ["x" * 100_000] and len(reads) < 12


def test_memory_does_not_grow_with_the_file(tmp_path, monkeypatch):
    monkeypatch.setattr(json_rows, "_AT_ONCE", 2**14)
    path = tmp_path / "rows.json"
    path.write_text(json.dumps([{"id": number, "text": "x" * 500} for number in range(3000)]))
    tracemalloc.start()
    assert sum(1 for _ in json_rows.list_items(path)) == 3000
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < os.path.getsize(path) / 4
