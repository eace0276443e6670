"""The converter on everything that LLaVA-Pretrain and mix665k are known to hold."""

from __future__ import annotations

import io
import json

import pytest
from PIL import Image

from gemoe_ds.cli.data.convert import main
from gemoe_ds.data.sample import open_samples
from gemoe_ds.data.sources.pictures import PictureReader
from gemoe_ds.data.turn import Picture
from gemoe_ds.errors import DataError


def png(size=(8, 8), mode="RGB", form="PNG") -> bytes:
    buffer = io.BytesIO()
    Image.new(mode, size, 128).save(buffer, form)
    return buffer.getvalue()


def row(row_id="1", image="a/x.png", first="<image>\nWhat?", answer="This.", **more):
    talk = [{"from": "human", "value": first}, {"from": "gpt", "value": answer}]
    built = {"id": row_id, "conversations": talk} | more
    return built if image is None else {**built, "image": image}


@pytest.fixture
def convert(tmp_path, capsys):
    images = tmp_path / "images" / "a"
    images.mkdir(parents=True)
    (images / "x.png").write_bytes(png())
    (images / "grey.jpg").write_bytes(png(mode="L", form="JPEG"))
    (images / "cmyk.jpg").write_bytes(png(mode="CMYK", form="JPEG"))
    (images / "palette.gif").write_bytes(png(mode="P", form="GIF"))
    (images / "truncated.png").write_bytes(png((64, 64))[:80])
    (images / "text.jpg").write_text("<html>image gone</html>")
    (images / "dot.png").write_bytes(png((1, 1)))

    def run(rows, *options):
        (tmp_path / "rows.json").write_text(json.dumps(rows))
        arguments = ["--json", tmp_path / "rows.json", "--images", tmp_path / "images"]
        arguments += ["--out", tmp_path / "out", "--workers", "1", *options]
        try:
            main([str(a) for a in arguments])
        except SystemExit as stop:
            return stop.code, capsys.readouterr().err
        return open_samples(tmp_path / "out", verify=True)

    run.folder = tmp_path
    return run


def test_ordinary_rows(convert):
    many = [
        {"from": speaker, "value": value}
        for speaker, value in [
            ("human", "<image>\nA?"),
            ("gpt", "B"),
            ("human", "C?"),
            ("gpt", "D"),
        ]
    ]
    samples = convert(
        [
            row("004539375"),
            row(7, first="Describe it.\n<image>"),
            row("3", image="a/grey.jpg"),
            row("4", image="a/cmyk.jpg"),
            row("5", image="a/palette.gif"),
            row("6", image=None, first="Only text?", model=""),
            row("8") | {"conversations": many},
        ]
    )
    assert len(samples) == 7 and samples.manifest["num_dropped"] == 0
    assert [s.id for s in samples] == ["004539375", "7", "3", "4", "5", "6", "8"]
    assert samples[1].messages[0].content == "<image>\nDescribe it."
    assert not samples[5].images and samples[5].messages[0].content == "Only text?"
    assert [m.content for m in samples[6].messages] == ["<image>\nA?", "B", "C?", "D"]
    original = (convert.folder / "images/a/x.png").read_bytes()
    assert samples[0].images == (Picture(original, 8, 8),), "image bytes stay as they are"


@pytest.mark.parametrize(
    "bad, reason",
    [
        (row("b", image="a/missing.png"), "No such file"),
        (row("b", image="a/truncated.png"), "cannot be decoded"),
        (row("b", image="a/text.jpg"), "cannot be decoded"),
        (row("b", image="a/dot.png"), "1x1, smaller than 4"),
        (row("b", image=["a/x.png", "a/x.png"]), "2 pictures, and 1 times <image>: in messages 0"),
        (row("b", first="no marker"), "1 pictures, and 0 times <image>: nowhere"),
        (row("b", image=None), "0 pictures, and 1 times <image>"),
        (row("b", first="<image><image>"), "1 pictures, and 2 times <image>: in messages 0, 0"),
        (row("b", answer="  "), "answer is empty"),
        (row("b") | {"conversations": [{"from": "gpt", "value": "x"}]}, "pairs"),
        (row("b") | {"conversations": row()["conversations"][::-1]}, "before any question"),
        ({"id": "b"}, "conversations"),
        (row("b", image="a"), "Is a directory"),
        (row("b", image="a/\0.png"), "null byte"),
        (row("b", image=""), "0 pictures, and 1 times <image>"),
        (row("b", answer="half a pair \ud83d"), "not valid Unicode"),
        (
            row("b")
            | {"conversations": [*row()["conversations"], {"from": "human", "value": "?"}]},
            "pairs",
        ),
        (
            row("b") | {"conversations": [{"from": "human"}, {"from": "gpt", "value": "x"}]},
            "no text",
        ),
    ],
)
def test_unusable_rows_are_dropped_counted_and_explained(convert, bad, reason):
    samples = convert([row(str(i)) for i in range(9)] + [bad])
    assert (len(samples), samples.manifest["num_dropped"]) == (9, 1)
    assert samples.manifest["dropped"][0]["id"] == "b"
    assert reason in samples.manifest["dropped"][0]["reason"]


def test_kinds_name_the_questions(convert):
    kinds = convert.folder / "kinds.json"
    kinds.write_text(json.dumps({"1": ["count"], "2": ["count", "too many"], "3": "count"}))
    rows = [row(1), row("2"), *(row(str(i)) for i in range(3, 19))]
    samples = convert(rows, "--kinds", kinds)
    assert samples[0].messages[1].kind == "count" and samples[1].messages[1].kind is None
    assert [d["reason"] for d in samples.manifest["dropped"]] == [
        "2 kinds for 1 questions",
        "its kinds are not a list of names",
    ]


def test_rows_without_an_id_are_called_by_their_number(convert):
    nameless = row()
    del nameless["id"]
    samples = convert([row(str(i)) for i in range(9)] + [nameless, row(None), "not a row"])
    assert [s.id for s in samples][-2:] == ["row 9", "row 10"]
    assert samples.manifest["dropped"][0]["id"] == "row 11"


@pytest.mark.parametrize(
    "option, value",
    [("--shard-size", "0"), ("--workers", "-1"), ("--max-bad-fraction", "20"), ("--images", "no")],
)
def test_options_out_of_range_are_refused(convert, option, value):
    code, message = convert([row()], option, value)
    assert code == 2 and option in message.strip().splitlines()[-1]
    assert not (convert.folder / "out").exists()


@pytest.mark.parametrize(
    "rows, words",
    [
        ([row("1"), row("2", image="a/none.png")], "1 of 2 rows cannot be used, more than 20%"),
        ([row("1", image="a/none.png")], "none of 1 rows can be used; first: 1: image a/none.png"),
        ([], "none of 0 rows"),
        ({"not": "a list"}, "expected a JSON list"),
    ],
)
def test_refusals_are_one_line_and_leave_nothing(convert, rows, words):
    code, message = convert(rows)
    assert code == 2
    line = message.strip().splitlines()[-1]
    assert line.startswith("error: ") and words in line and "Traceback" not in message
    assert sorted(p.name for p in convert.folder.iterdir()) == ["images", "rows.json"]


def test_an_existing_folder_is_not_touched(convert):
    convert([row()])
    before = (convert.folder / "out/manifest.json").read_text()
    code, message = convert([row("other")])
    assert code == 2 and "exists already" in message
    assert (convert.folder / "out/manifest.json").read_text() == before


def test_workers_change_nothing(convert):
    rows = [row(str(i)) for i in range(150)]  # several chunks for each worker
    one = convert(rows, "--shard-size", "40").manifest["shards"]
    (convert.folder / "out").rename(convert.folder / "first")
    two = convert(rows, "--shard-size", "40", "--workers", "3").manifest["shards"]
    assert [s["sha256"] for s in one] == [s["sha256"] for s in two] and len(one) == 4


@pytest.mark.parametrize("harm", ["cut", "flip", "remove", "manifest"])
def test_damage_is_named(convert, harm):
    convert([row(str(i)) for i in range(5)])
    shard = next((convert.folder / "out").glob("shard*"))
    content = shard.read_bytes()
    if harm == "cut":
        shard.write_bytes(content[:-10])
    elif harm == "flip":
        shard.write_bytes(content[:50] + bytes([content[50] ^ 1]) + content[51:])
    elif harm == "remove":
        shard.unlink()
    else:
        (convert.folder / "out/manifest.json").write_text("{")
    with pytest.raises(DataError) as error:
        open_samples(convert.folder / "out", verify=True)
    assert ("manifest" if harm == "manifest" else shard.name) in str(error.value)


def test_the_summary_groups_what_was_dropped_and_says_what_was_not_read(convert, capsys):
    rows = [row(str(i), source="coco") for i in range(17)]
    rows += [row("a", image=None, first="Hi", video="a.mp4"), row("b", image="a/missing.png")]
    rows += [row("c", image="a/truncated.png"), row("d", image="a/missing.png")]
    samples = convert([*rows, row("0"), row("e", image="a/palette.gif")])
    assert samples.manifest["dropped_groups"][0] == {
        "group": "picture missing",
        "rows": 2,
        "first": "b: image a/missing.png: No such file or directory",
    }
    assert samples.manifest["notes"] == {
        "an earlier row has the same id": 1,
        "the key 'source' is ignored": 17,
    }
    told = capsys.readouterr().out.splitlines()
    assert told.pop(0).endswith("reads as: a JSON list of conversations (LLaVA, ShareGPT)")
    assert told[0].endswith("19 samples in 1 shards, 4 rows dropped")
    assert told[1].startswith("  dropped 2 (picture missing); first: b: image a/missing.png: No")
    assert [line.split(";")[0] for line in told[2:4]] == [
        "  dropped 1 (video)",
        "  dropped 1 (picture broken)",
    ]
    assert told[4:] == [
        "  1 rows: an earlier row has the same id",
        "  17 rows: the key 'source' is ignored",
    ]


def test_another_format_is_refused_before_a_picture_is_read(convert, monkeypatch):
    def read_picture(*_):
        raise AssertionError("a picture was read")

    monkeypatch.setattr(PictureReader, "__call__", read_picture)
    tool = {"from": "tool", "value": "{}"}
    rows = [row(str(i), conversations=[tool, *row()["conversations"]]) for i in range(3)]
    code, message = convert([*rows, row("3"), row("4", video="a.mp4")])
    assert code == 2 and message.strip().splitlines()[-1].endswith(
        "rows.json: 4 of 5 rows cannot be used, more than 20% (--max-bad-fraction) "
        "(3 tools, 1 video); first: 0: message 0 is from 'tool'; calls of tools are not supported"
    )


def test_kinds_must_name_single_rows(convert):
    kinds = convert.folder / "kinds.json"
    for ids, words in ((["1"], "'1' first, name two rows"), (["x"], "none of its 1 ids")):
        kinds.write_text(json.dumps({row_id: ["count"] for row_id in ids}))
        code, message = convert([row("1"), row(1), row("2")], "--kinds", kinds)
        assert code == 2 and f"--kinds {kinds}: " in message and words in message
