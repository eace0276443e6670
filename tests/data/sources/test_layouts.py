"""The same rows in every layout convert to equal samples; what they are is said in one line."""

from __future__ import annotations

import io
import json
import tarfile

import datasets
import pytest

from gemoe_ds.data.turn import Message
from tests.data.sources.layouts import CHATS, RED, png, table, write, write_pictures, write_tar

READS_AS = {
    "llava": "a JSON list of conversations (LLaVA, ShareGPT)",
    "jsonl": "JSON lines of messages (OpenAI's roles and contents)",
    "jsonl_folder": "JSON lines of conversations (LLaVA, ShareGPT)",
    "parquet": "a table (parquet, arrow, save_to_disk, a copy from the hub) of messages",
    "saved": "a table (parquet, arrow, save_to_disk, a copy from the hub) of messages",
    "arrow": "a table (parquet, arrow, save_to_disk, a copy from the hub) of messages",
    "hub": "a table (parquet, arrow, save_to_disk, a copy from the hub) of messages",
    "webdataset": "WebDataset tars of messages",
}


@pytest.mark.parametrize("layout", READS_AS)
def test_all_layouts_give_the_same_samples(tmp_path, capsys, convert, layout):
    options = ["--split", "train"] if layout in ("saved", "hub") else []
    samples = convert(write(tmp_path, layout), *options)
    assert READS_AS[layout] in capsys.readouterr().out.splitlines()[0]
    assert samples.manifest["num_dropped"] == 0
    for sample, (row_id, pictures, chat) in zip(samples, CHATS, strict=True):
        name = f"train/{row_id}" if layout == "webdataset" else row_id
        assert (sample.id, sample.source) == (name, "")
        assert [image.data for image in sample.images] == pictures
        assert sample.messages == tuple(Message(*message) for message in chat)


def test_sets_of_several_splits_name_them(tmp_path, convert):
    path = write(tmp_path, "hub")
    assert convert(path).endswith(f"{path}: give --split; it has train, test")
    assert "--split dev: no such split; it has train, test" in convert(path, "--split", "dev")


def test_a_hub_set_of_several_configurations_names_them(tmp_path, convert, capsys):
    for config in ("chat", "code"):
        (tmp_path / "set" / config).mkdir(parents=True)
        for split in ("train", "test"):
            table(split).to_parquet(tmp_path / f"set/{config}/{split}-00000-of-00001.parquet")
    head = ["---", "configs:"]
    for config in ("chat", "code"):
        head += [f"- config_name: {config}", "  data_files:"]
        for split in ("train", "test"):
            head += [f"  - split: {split}", f"    path: {config}/{split}-*"]
    (tmp_path / "set/README.md").write_text("\n".join([*head, "---", "# A set"]))
    assert convert(tmp_path / "set").endswith("give --config; it has chat, code")
    assert "--config x: no such config" in convert(tmp_path / "set", "--config", "x")
    assert "give --split; it has" in convert(tmp_path / "set", "--config", "code")
    capsys.readouterr()
    samples = convert(tmp_path / "set", "--config", "code", "--split", "test")
    assert len(samples) == 4 and (
        "split test of code: 1 files; not read: 3 files, chat/test-00000-of-00001.parquet first"
        in capsys.readouterr().out.splitlines()[0]
    )


def test_a_table_that_was_cut_short_is_named_before_any_other_is_read(tmp_path, convert):
    (tmp_path / "set").mkdir()
    for number in range(3):
        table().to_parquet(tmp_path / f"set/{number}.parquet")
    (cut := tmp_path / "set/1.parquet").write_bytes(cut.read_bytes()[:-9])
    line = convert(tmp_path / "set")
    assert line.startswith(f"error: {cut}: ") and line.endswith("was it downloaded whole?")


def test_a_table_that_is_damaged_inside_is_one_line(tmp_path, convert):
    """It says how far it came; `datasets` itself would log more."""
    rows = [{"text": f"{number:09d}" * 99} for number in range(4000)]
    table = datasets.Dataset.from_list(rows)
    table.to_parquet(path := tmp_path / "a.parquet", batch_size=1000)
    content = bytearray(path.read_bytes())
    content[len(content) // 2 : len(content) // 2 + 5000] = b"\xff" * 5000
    path.write_bytes(content)
    line = convert(path)
    assert "`datasets` cannot read it: " in line and line.endswith(" rows)")


def test_files_that_a_split_does_not_have_are_said(tmp_path, convert, capsys):
    """`datasets` takes those whose names say a split, if one does."""
    for name in ("train-0", "more"):
        (tmp_path / "set").mkdir(exist_ok=True)
        table().to_parquet(tmp_path / f"set/{name}.parquet")
    assert len(convert(tmp_path / "set")) == 4
    words = "split train: 1 files; not read: 1 files, more.parquet first"
    assert words in capsys.readouterr().out.splitlines()[0]


def test_names_in_capitals(tmp_path, convert):
    (tmp_path / "set").mkdir()
    for number in range(2):
        table().to_parquet(tmp_path / f"set/{number}.PARQUET")
    assert len(convert(tmp_path / "set")) == 8


def test_alpaca_and_text_from_tables_and_files(tmp_path, convert, capsys):
    rows = [{"instruction": f"Add {n}", "input": "", "output": str(n)} for n in range(3)]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    samples = convert(tmp_path / "rows.json", "--source", "sums")
    assert [sample.source for sample in samples] == ["sums"] * 3
    assert samples[2].messages == (Message("user", "Add 2"), Message("assistant", "2"))
    (tmp_path / "out").rename(tmp_path / "first")
    (tmp_path / "books" / "a").mkdir(parents=True)
    for name in ("b.txt", "a/c.txt"):
        (tmp_path / "books" / name).write_text("One.\n\nTwo.\nThree.\n")
    capsys.readouterr()
    samples = convert(tmp_path / "books")
    assert "reads as: text files (.txt) of plain text" in capsys.readouterr().out
    assert [s.id for s in samples] == ["a/c.txt", "b.txt"]
    assert samples[0].messages == (Message("text", "One.\n\nTwo.\nThree."),)
    (tmp_path / "out").rename(tmp_path / "second")
    for what, number in (("paragraph", 2), ("line", 3)):
        samples = convert(tmp_path / "books" / "b.txt", "--documents", what)
        assert len(samples) == number and samples[1].messages[0].content.startswith("Two.")
        (tmp_path / "out").rename(tmp_path / what)


def test_sources_by_column_and_duplicates(tmp_path, convert):
    rows = [
        {"id": n, "src": "ab"[n % 2], "messages": [{"role": "user", "content": str(n // 2)},
         {"role": "assistant", "content": "x"}]} for n in range(6)
    ]  # fmt: skip
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    samples = convert(tmp_path / "rows.jsonl", "--source-column", "src", "--dedup", "exact")
    assert [(s.id, s.source) for s in samples] == [("0", "a"), ("2", "a"), ("4", "a")]
    assert samples.manifest["dropped_groups"] == [
        {
            "group": "duplicate",
            "rows": 3,
            "first": "1: an earlier row has the same messages and pictures",
        }
    ]


def test_pictures_of_all_rows_are_stored_once(tmp_path, convert):
    write_pictures(tmp_path)
    talk = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "Red."}]
    rows = [{"id": n, "image": "a/red.png", "conversations": talk} for n in range(50)]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    samples = convert(tmp_path / "rows.json", "--shard-size", "20")
    assert [s.images[0].data for s in samples] == [RED] * 50
    stored = b"".join(path.read_bytes() for path in sorted((tmp_path / "out").glob("*.arrow")))
    assert stored.count(RED) == 1


def add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


def test_tars_of_captions_and_what_they_hold_beside(tmp_path, convert):
    """img2dataset's layout, and rows of which something would be lost."""
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        for n in range(9):
            add(tar, f"{n:05d}.jpg", RED)
            add(tar, f"{n:05d}.txt", f"A cat {n}.\n".encode())
            add(tar, f"{n:05d}.json", json.dumps({"url": "http://x", "status": "ok"}).encode())
        add(tar, "clip.mp4", b"x")
        add(tar, "clip.txt", b"A film.")
        add(tar, "bad.json", b"{")
        add(tar, "README", b"x")
        add(tar, "._bad.json", b"x")
    assert "give the question that the caption answers" in convert(tmp_path / "0.tar")
    options = ["--question", "Describe it.", "--format", "captions", "--max-bad-fraction", "0.5"]
    samples = convert(tmp_path / "0.tar", *options)
    assert len(samples) == 9 and samples[8].messages[1].content == "A cat 8."
    assert samples.manifest["notes"]["the key 'url' is ignored"] == 9
    groups = {g["group"]: g["first"] for g in samples.manifest["dropped_groups"]}
    assert groups["not valid"].startswith("row 11: bad.json: not valid json: Expecting")
    assert groups["not a row"].startswith("row 10: README has no name before its first dot")
    assert groups["not a caption"].startswith("clip: it has 0 pictures")


def test_a_tar_whose_json_names_its_pictures(tmp_path, convert):
    """In the order of the JSON; a picture more or less than it names is a drop."""
    other, third = png("blue"), png("green")
    talk = [{"from": "human", "value": "<image><image>?"}, {"from": "gpt", "value": "Yes"}]
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        for name in ("x", "y", "z"):
            images = ["x.b.png", "x.a.png"] if name == "x" else ["1.png", "2.png"]
            row = {"image": images, "conversations": talk}
            add(tar, f"{name}.json", json.dumps(row).encode())
            add(tar, f"{name}.a.png", RED)
            add(tar, f"{name}.b.png", other)
        add(tar, "z.c.png", third)
    samples = convert(tmp_path, "--max-bad-fraction", "0.5")
    assert [image.data for image in samples[0].images] == [other, RED]
    assert [image.data for image in samples[1].images] == [RED, other], "by the files' names"
    assert samples.manifest["dropped_groups"][0]["first"].startswith(
        "z: it has other pictures under image and images"
    )


def test_json_lines_under_another_name_and_one_row(tmp_path, convert, capsys):
    path, row = tmp_path / "rows.json", json.dumps({"id": 1, "text": "x"}, indent=1)
    path.write_text(row)
    assert "expected a JSON list, got object: its keys are id, text" in convert(path)
    path.write_text(f"{row}\n{row}")
    assert (
        len(convert(path)) == 2 and "reads as: JSON lines of plain text" in capsys.readouterr().out
    )


@pytest.mark.parametrize(
    "name, content, words",
    [
        ("a.json", json.dumps([{"question": "a"}]), "no format fits: the first row has the keys q"),
        ("a.json", json.dumps({"data": [{"id": 1}]}), "jq '.[\"data\"]'"),
        ("a.jsonl", '{"messages": 1}\n{"mess', "line 2 column 2 (char 17)"),
        ("a.csv", "a,b\n1,2\n", "no format fits: the first row has the keys a, b; known are"),
        ("b.csv", 'a,b\n1,"2', "line 2: unexpected end of data"),
        ("c.csv", "a,a\n1,2\n", "its first line has the key 'a' twice"),
        ("a.parquet", "PAR1 but not really", "`datasets` cannot read it: "),
        ("a.tar", "no tar", "it is no whole tar file"),
        ("a.txt", b"\xff\xfe", "it is no text of UTF-8"),
        ("a.bin", "", "it is empty"),
    ],
)
def test_what_cannot_be_read_is_one_line(tmp_path, convert, name, content, words):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    line = convert(path)
    assert line.startswith(f"error: {path}: ") and words in line


@pytest.mark.parametrize(
    "files",
    [
        {"page_1.0.json": '{"text": "a"}', "page_1.1.json": '{"text": "b"}'},
        {"page_1.txt": "a", "page_1.json": '{"txt": "b"}'},
        {"page_1.json": '{"txt": "b"}', "page_1.txt": "a"},
    ],
)
def test_no_file_of_a_tar_overwrites_another(tmp_path, convert, files):
    write_tar(tmp_path / "0.tar", {name: said.encode() for name, said in files.items()})
    line = convert(tmp_path / "0.tar", "--format", "text")
    assert "two files of the row page_1 have a 'txt'" in line or "are files of one row" in line
    assert "the name ends at its first dot" in line
    equal = {"page_1.txt": b"a", "page_1.json": b'{"txt": "a", "__key__": "7"}'}
    write_tar(tmp_path / "0.tar", equal)
    assert len(convert(tmp_path / "0.tar", "--text-column", "txt")) == 1


def test_what_is_not_there_is_one_line(tmp_path, convert, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "hf download --repo-type dataset allenai/tulu --local-dir tulu" in convert(
        "allenai/tulu"
    )
    (tmp_path / "empty").mkdir()
    assert "it is a folder with none of these: CSV or TSV, a table (" in convert("empty")
    for name in "ab":
        (tmp_path / f"empty/{name}.json").write_text("[]")
    assert "it has 2 JSON files; give one, such as empty/a.json" in convert("empty")
    assert "give one SOURCE" in convert("empty", "--json", "x")
