"""Folders of many files: which are read, and that the others are said."""

from __future__ import annotations

import json
import os

import pytest

from gemoe_ds.data.sources.stores import open_store
from gemoe_ds.errors import DataError
from tests.data.sources.layouts import RED, table, write_tar, write_texts

ASK = ("--question", "Describe it.")


def text(name: str) -> str:
    return json.dumps({"text": name})


def texts(folder, **options) -> list[str]:
    return [row["text"] for row in open_store(folder, **options).rows()]


def test_img2dataset_writes_a_table_and_counts_beside_every_tar(tmp_path, convert, capsys):
    shards = tmp_path / "cc3m"
    for shard in ("00000", "00001"):
        write_tar(shards / f"{shard}.tar", {"7.jpg": RED, "7.txt": b"A cat.", "7.json": b"{}"})
        table().to_parquet(shards / f"{shard}.parquet")
        (shards / f"{shard}_stats.json").write_text('{"count": 1}')
    assert len(convert(shards, *ASK)) == 2
    told = capsys.readouterr().out.splitlines()[0]
    assert "reads as: WebDataset tars of pictures and captions" in told
    assert told.endswith("; not read: 4 files, 00000.parquet first")
    table().to_parquet(shards / "more.parquet")
    (tmp_path / "out").rename(tmp_path / "first")
    convert(shards)
    assert "not read: 4 files, 00000.tar first" in capsys.readouterr().out.splitlines()[0]


@pytest.mark.parametrize(
    "files, name, left",
    [
        ("a.jsonl b.json c.txt", "json_lines", "2 files, b.json"),
        ("a.jsonl dataset_info.json", "json_lines", ""),
        ("a.json LICENSE.txt", "json", "1 files, LICENSE.txt"),
        ("0.tar train.jsonl", "webdataset", "1 files, train.jsonl"),
        ("a.txt b.zip", "text_files", "1 files, b.zip"),
        ("train.csv LICENSE.txt", "csv", "1 files, LICENSE.txt"),
        ("a/train.tsv b.csv", "csv", ""),
    ],
)
def test_what_is_not_read_is_said(tmp_path, files, name, left):
    write_texts(tmp_path, files.split())
    store = open_store(tmp_path)
    assert store.name == name
    assert store.remark() == (f"not read: {left} first" if left else "")


def test_what_is_not_read_is_said_where_no_format_fits(tmp_path, convert):
    write_tar(tmp_path / "set/images.tar", {"a.jpg": RED})
    (tmp_path / "set/train.jsonl").write_text(text("a"))
    assert "WebDataset tars; not read: 1 files, train.jsonl first: no format fits" in convert(
        tmp_path / "set"
    )


def test_a_licence_is_no_data(tmp_path, convert):
    write_texts(tmp_path / "set", ["LICENSE.txt", "README.txt", "a/licence.txt"])
    assert "it is a folder with none of these: " in convert(tmp_path / "set")
    assert len(convert(tmp_path / "set/LICENSE.txt")) == 1  # a file that is named is meant


def test_links_to_folders_are_followed_once(tmp_path):
    top, far = tmp_path / "top", tmp_path / "far"
    for folder, name in ((top, "a"), (top / "sub", "b"), (far, "c"), (far / "in", "d")):
        folder.mkdir(exist_ok=True)
        (folder / f"{name}.jsonl").write_text(text(name))
    os.symlink(far, top / "0")
    os.symlink(far / "in", top / "sub/again")
    os.symlink(top / "sub", top / "1")  # a folder of the set itself
    os.symlink(top, far / "loop")
    os.symlink(tmp_path, top / "sub/up")
    os.symlink(tmp_path / "none", top / "gone")
    assert texts(top) == ["c", "d", "a", "b"]


@pytest.mark.parametrize("names", ["{}.jsonl", "{}-0.tar", "{}/0.jsonl.gz", "my_{}_0.csv"])
def test_splits_are_asked_for_by_the_names_of_files(tmp_path, convert, capsys, names):
    files = [names.format(split) for split in ("train", "val", "test")]
    write_texts(tmp_path / "set", [*files, "more.tar" if names.endswith("tar") else "more.csv"])
    line = f"{tmp_path / 'set'}: {{}}; it has test, train, val"
    assert convert(tmp_path / "set").endswith(line.format("give --split"))
    wrong = convert(tmp_path / "set", "--split", "validation")
    assert wrong.endswith(line.format("--split validation: no such split"))
    (sample,) = convert(tmp_path / "set", "--split", "val")
    assert "val" in sample.messages[0].content
    told = capsys.readouterr().out.splitlines()[0]
    assert "; split val: 1 files; not read: 3 files, more." in told


def test_the_only_split_need_not_be_given(tmp_path):
    write_texts(tmp_path, ["train.jsonl", "retrained.jsonl", "latest.jsonl", "contest2.jsonl"])
    assert len(texts(tmp_path)) == 4
    assert texts(tmp_path, split="train") == ["train.jsonl"]
    assert texts(tmp_path / "train.jsonl", split="train") == ["train.jsonl"]
    with pytest.raises(DataError, match="--split test: no such split; it has train"):
        texts(tmp_path / "train.jsonl", split="test")
    with pytest.raises(DataError, match="--split train: no such split; it has none: no name says"):
        texts(tmp_path / "latest.jsonl", split="train")


def test_texts_are_splits_if_all_are_named_so(tmp_path):
    write_texts(tmp_path, ["wiki.train.txt", "wiki.test.txt"])
    with pytest.raises(DataError, match="give --split; it has test, train"):
        texts(tmp_path)
    assert texts(tmp_path, split="test") == ["wiki.test.txt"]
    write_texts(tmp_path, ["other.txt"])
    assert len(texts(tmp_path)) == 3


def test_the_folder_in_which_one_stands(tmp_path, convert, monkeypatch):
    (tmp_path / "set").mkdir()
    table().to_parquet(tmp_path / "set/0.parquet")
    monkeypatch.chdir(tmp_path / "set")
    assert len(convert(".")) == 4


def test_tables_know_their_split(tmp_path, convert):
    table("test").to_parquet(tmp_path / "test-0.parquet")
    assert "--split train: no such split; it has test" in convert(
        tmp_path / "test-0.parquet", "--split", "train"
    )
    table("test").save_to_disk(tmp_path / "saved")
    for option, line in (("--split", "no such split; it has test"), ("--config", "it has no con")):
        assert line in convert(tmp_path / "saved", option, "train")
    assert len(convert(tmp_path / "saved", "--split", "test")) == 4
