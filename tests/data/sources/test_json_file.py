"""A file that is not one JSON list is named for what it is, with the way out."""

from __future__ import annotations

import gzip
import json

import pytest

from gemoe_ds.data.sources.json_file import read_json
from gemoe_ds.errors import DataError

ROW = {"id": "1", "conversations": []}
LIST = json.dumps([ROW])


@pytest.mark.parametrize("before", ["", "\ufeff", " \n"])
@pytest.mark.parametrize("behind", ["", "\n", " \r\n\t"])
def test_one_list_is_read(tmp_path, before, behind):
    (tmp_path / "rows.json").write_text(before + LIST + behind, encoding="utf-8")
    assert read_json(tmp_path / "rows.json", list) == [ROW]


@pytest.mark.parametrize(
    "content, words",
    [
        ("", "it is empty"),
        (" \n\n", "it is empty"),
        (json.dumps(ROW) + "\n" + json.dumps(ROW) + "\n", "it is JSON lines"),
        (json.dumps(ROW, indent=1) * 2, "jq -s . "),
        (json.dumps(ROW), "expected a JSON list, got object: it is one row; put it in [ ]"),
        (LIST + "\n" + LIST, "it is several JSON lists, one behind the other; jq -s add "),
        (LIST + "\n</html>", "behind its end, in line 2, stands '</html>'"),
        (LIST[:-1], "the file ends too early"),
        (LIST[:8], "the file ends too early"),
        ("[1,]", "not valid JSON: Expecting value: line 1 column 4 (char 3), where ']' stands"),
        ("<html>", "where '<html>' stands"),
        ('[{"image": "a", "image": "b"}]', "the key 'image' stands twice in {'image': 'b'}"),
        ("version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
        ("[" * 100_000, "not valid JSON: maximum recursion"),
        ("[1" + "0" * 5000 + "]", "not valid JSON: Exceeds the limit"),
        (json.dumps({"data": [ROW], "v": 1}), "the list is under \"data\"; jq '.[\"data\"]' "),
        (json.dumps({"a": ROW, "b": ROW}), "the rows are its values"),
        (json.dumps({"a": 1, "b": 2}), "expected a JSON list, got object: its keys are a, b"),
        ("null", "expected a JSON list, got null"),
        (gzip.compress(gzip.compress(b"[]", mtime=0), mtime=0), "it is gzip once more"),
        (b"PAR1\x15\x04", "it is parquet"),
        (LIST.encode("utf-16"), "it is UTF-16; iconv"),
        (LIST.encode("utf-32"), "it is UTF-32; iconv -f UTF-32"),
        ('["ä"]'.encode("latin-1"), "it is not UTF-8"),
    ],
)  # fmt: skip
def test_what_it_is_instead(tmp_path, content, words):
    path = tmp_path / "rows.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError) as error:
        read_json(path, list)
    assert str(error.value).startswith(f"{path}: ") and words in str(error.value)
    assert "\n" not in str(error.value)


def test_a_packed_file_is_read(tmp_path):
    (tmp_path / "rows.json").write_bytes(gzip.compress(LIST.encode()))
    assert read_json(tmp_path / "rows.json", list) == [ROW]


def test_a_folder_and_a_missing_file(tmp_path):
    with pytest.raises(DataError, match="Is a directory"):
        read_json(tmp_path, list)
    with pytest.raises(DataError, match="No such file"):
        read_json(tmp_path / "none.json", list)
