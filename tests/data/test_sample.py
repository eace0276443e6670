"""Folders on disk: what is written is read, whole or not at all, by many threads, in few bytes."""

from __future__ import annotations

import io
import json
import random
import re
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest
from PIL import Image

from gemoe_ds.data.images import shown_size
from gemoe_ds.data.sample import (
    GROUP,
    Dropped,
    Message,
    Picture,
    Sample,
    Turn,
    of_turns,
    open_samples,
    write_samples,
)
from gemoe_ds.data.shards import ArrowShard
from gemoe_ds.errors import DataError
from tests.data.first_schema import write_first_schema
from tests.data.turns import turns_of


def samples(count: int) -> list[Sample]:
    """Odd ones among them: no image, no kind, many turns, text in other scripts."""
    rng = random.Random(0)
    return [
        of_turns(
            f"id {i}",
            None if i % 5 == 3 else rng.randbytes(200 + i),
            tuple(
                Turn(f"q{i}.{t} \u4f55 \U0001f600", f"a\n{t}", None if t % 2 else "count")
                for t in range(1 + i % 4)
            ),
        )
        for i in range(count)
    ]


@pytest.mark.parametrize("count", [1, GROUP, GROUP + 1, 2 * 50, 133])
def test_what_is_written_is_read(tmp_path, count):
    """Shards of 50 are cut into groups of 32 and 18: every border is passed."""
    written = samples(count)
    manifest = write_samples(iter(written), tmp_path / "out", source="test", shard_size=50)
    folder = open_samples(tmp_path / "out", verify=True)
    assert [folder[i] for i in range(len(folder))] == written == list(folder)
    assert manifest == folder.manifest == json.loads((tmp_path / "out/manifest.json").read_text())
    assert sum(s["num_samples"] for s in manifest["shards"]) == manifest["num_samples"] == count
    names = [f"shard-{i:05d}-of-{-(-count // 50):05d}.arrow" for i in range(-(-count // 50))]
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["manifest.json", *names]
    for outside in (-1, count):
        with pytest.raises(IndexError):
            folder[outside]


def test_memory_is_bounded_and_threads_agree(tmp_path):
    written = samples(400)
    write_samples(written, tmp_path / "out", source="test", shard_size=100)
    folder = open_samples(tmp_path / "out", cache_bytes=30_000)  # 2 or 3 of its 16 groups
    rows = random.Random(1).choices(range(400), k=1500)
    with ThreadPoolExecutor(4) as pool:
        read = list(pool.map(folder.__getitem__, rows))
    assert read == [written[row] for row in rows]
    kept = [table.nbytes for table in folder._kept.values()]
    assert folder._kept_bytes == sum(kept) <= 30_000 and 1 <= len(kept) < 16
    tiny = open_samples(tmp_path / "out", cache_bytes=0)
    assert [tiny[row] for row in rows[:50]] == read[:50] and len(tiny._kept) == 1


def test_threads_read_side_by_side(tmp_path, monkeypatch):
    """Where a read takes 50 ms, as from a busy network disk."""
    write_samples(samples(256), tmp_path / "out", source="test", shard_size=128)
    folder, read = open_samples(tmp_path / "out", cache_bytes=0), ArrowShard._read
    rows = [GROUP * (i % 8) for i in range(32)]
    busy, most, lock = set(), 0, threading.Lock()

    def slow(shard: ArrowShard, reader: Any, number: int) -> Any:
        nonlocal most
        with lock:
            assert reader not in busy, "a reader is for one thread at a time"
            busy.add(reader)
            most = max(most, len(busy))
        time.sleep(0.05)
        table = read(shard, reader, number)
        busy.remove(reader)
        return table

    monkeypatch.setattr(ArrowShard, "_read", slow)
    seconds = []
    for workers in (1, 8):
        began = time.perf_counter()
        with ThreadPoolExecutor(workers) as pool:
            found = list(pool.map(lambda row: folder[row].id, rows))
        seconds.append(time.perf_counter() - began)
        assert found == [f"id {row}" for row in rows]
    assert most == 8 and seconds[0] / seconds[1] > 3, "6 on a machine with nothing else to do"


def test_the_fingerprint_tells_contents_apart(tmp_path):
    written = samples(9)
    other = [*written[:8], of_turns("id 8", b"another", [Turn("q", "a")])]
    prints = [
        write_samples(rows, tmp_path / name, source=name)["fingerprint"]
        for name, rows in (("a", written), ("b", written), ("c", other), ("d", written[::-1]))
    ]
    assert prints[0] == prints[1] and len(set(prints)) == 3


def test_drops_are_counted_all_and_listed_up_to_a_thousand(tmp_path):
    rows = [*samples(5000), *(Dropped(str(i), "broken") for i in range(1001))]
    manifest = write_samples(rows, tmp_path / "out", source="test")
    assert (manifest["num_samples"], manifest["num_dropped"]) == (5000, 1001)
    assert len(manifest["dropped"]) == 1000


def test_an_error_while_writing_leaves_nothing(tmp_path):
    def broken():
        yield from samples(60)
        raise RuntimeError("a bug of the source")

    with pytest.raises(RuntimeError, match="a bug"):
        write_samples(broken(), tmp_path / "out", source="test", shard_size=20)
    assert not list(tmp_path.iterdir())


ENTRY = {"file": "x", "num_samples": 3, "bytes": 1, "sha256": ""}


@pytest.mark.parametrize(
    "change, words",
    [
        ({"schema": 3}, "schema 3, this version reads 1 and 2"),
        ({"shards": []}, "lists no shard"),
        ({"shards": None}, "is damaged"),
        ({"shards": [ENTRY | {"groups": [2]}]}, "do not add up"),
        ({"shards": [ENTRY]}, "is damaged .KeyError"),
    ],
)
def test_a_manifest_that_does_not_fit_is_refused(tmp_path, change, words):
    manifest = write_samples(samples(3), tmp_path / "out", source="test")
    (tmp_path / "out/manifest.json").write_text(json.dumps(manifest | change))
    with pytest.raises(DataError, match=words):
        open_samples(tmp_path / "out")


def test_a_folder_that_is_none_is_refused(tmp_path):
    with pytest.raises(DataError, match="no manifest.json there"):
        open_samples(tmp_path / "nowhere")


def test_damage_that_only_reading_finds_names_the_shard(tmp_path):
    """Size and footer are whole, the pages are not: found at once with verify, else when read."""
    write_samples(samples(40), tmp_path / "out", source="test")
    shard = next((tmp_path / "out").glob("shard*"))
    content = bytearray(shard.read_bytes())
    content[4 : len(content) // 2] = bytes(len(content) // 2 - 4)
    shard.write_bytes(content)
    folder = open_samples(tmp_path / "out")
    with pytest.raises(DataError, match=f"{shard.name} is damaged"):
        folder[0]
    with pytest.raises(DataError, match=f"{shard.name} is damaged"):
        open_samples(tmp_path / "out", verify=True)


def png(width: int, height: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (width, height)).save(buffer, "PNG")
    return buffer.getvalue()


def test_schema_1_is_read(tmp_path):
    """Its picture stands before the first question; its size is in its header alone."""
    rng = random.Random(2)
    rows = []
    for i in range(100):
        turns = tuple(Turn(f" q{i}.{t}\n", "a", None if t else "x") for t in range(i % 3 + 1))
        rows.append((f"id {i}", png(i + 1, 3) if rng.random() < 0.7 else None, turns))
    folder = open_samples(write_first_schema(rows, tmp_path / "old"), verify=True)
    assert list(folder) == [of_turns(*row) for row in rows] and len(folder) == 100
    assert [turns_of(folder[i]) for i in range(100)] == [[*row[2]] for row in rows]
    assert [folder.outline(i) for i in range(100)] == list(folder)
    seen = folder[next(i for i, row in enumerate(rows) if row[1])]
    assert seen.images[0].data == rows[int(seen.id[3:])][1] and seen.images[0].width == 0
    assert shown_size(seen, 0) == (int(seen.id[3:]) + 1, 3)


def mixed(number: int, seed: int = 0, bytes_each: int = 3000) -> list[Sample]:
    """0 to 3 pictures in any question, many of them seen before, and texts among the talks."""
    rng = random.Random(seed)
    pictures = [Picture(rng.randbytes(bytes_each), n + 1, 2) for n in range(number // 2)]

    def sample(i: int) -> Sample:
        source = rng.choice(["", "coco", "ocr"])
        if i % 7 == 6:
            return Sample(f"id {i}", (Message("text", f"text {i}"),), source=source)
        messages = [Message("system", "Be brief.")] if i % 3 == 0 else []
        images = []
        for turn in range(rng.randint(1, 3)):
            shown = rng.choices(pictures, k=rng.randint(0, 2))
            images += shown
            messages.append(Message("user", "See " + "<image> and " * len(shown) + "say"))
            messages.append(Message("assistant", "Yes", loss=turn == 0, kind="see"))
        return Sample(f"id {i}", tuple(messages), tuple(images), source)

    return [sample(i) for i in range(number)]


def test_pictures_anywhere_are_read_and_stored_once(tmp_path):
    written = mixed(120)
    write_samples(written, tmp_path / "out", source="test", shard_size=50)
    folder = open_samples(tmp_path / "out")
    rows = random.Random(3).sample(range(120), k=120)
    assert [folder[row] for row in rows] == [written[row] for row in rows]
    shown = [picture.data for sample in written for picture in sample.images]
    size = sum(path.stat().st_size for path in (tmp_path / "out").glob("shard*"))
    assert len(shown) > 1.5 * len({*shown}) and size < sum(map(len, {*shown})) + 120 * 1500
    stored = [p for s in folder._shards for g in range(len(s.group_sizes)) for p in bytes_in(s, g)]
    assert len(stored) == len({*stored}) and {*stored} == {*shown}


def bytes_in(shard, group) -> list[bytes]:
    pictures = shard.group(group)["images"].flatten().field("bytes").to_pylist()
    return [data for data in pictures if data is not None]


def test_an_outline_is_all_but_bytes(tmp_path, monkeypatch):
    written = mixed(60)
    written[5] = of_turns("unknown size", b"...", [Turn("a", "b")])
    write_samples(written, tmp_path / "out", source="test")
    folder, read = open_samples(tmp_path / "out"), []
    monkeypatch.setattr(folder, "_group", lambda n, group=folder._group: read.append(n) or group(n))
    for row, sample in enumerate(written):
        bare = tuple(replace(picture, data=b"") for picture in sample.images)
        assert folder.outline(row) == (sample if row == 5 else replace(sample, images=bare))
        if row == 4:
            assert not read


def test_a_group_ends_by_its_bytes_or_rows(tmp_path):
    """Of 60 KB pictures five; of texts 32, and of a long one alone."""
    data = [random.Random(i).randbytes(60_000) for i in range(12)]
    seen = [of_turns(f"i{i}", picture, [Turn("", "a")]) for i, picture in enumerate(data)]
    texts = [Sample(f"t{i}", (Message("text", "a" * 900),)) for i in range(40)]
    long = [Sample("long", (Message("text", "b" * 300_000),))]
    manifest = write_samples([*seen, *texts, *long, *texts[:3]], tmp_path / "out", source="test")
    (shard,) = manifest["shards"]
    assert shard["groups"] == [5, 5, 32, 11, 3], "two pictures and 30 texts; ten and the long one"


@pytest.mark.parametrize(
    "messages, images, why",
    [
        ([], 0, "from nobody"),
        ([Message("user", "a")], 0, "are from user"),
        ([Message("assistant", "a")], 0, "are from assistant"),
        ([Message("system", "a"), Message("text", "b")], 0, "from system, text"),
        ([Message("text", "a"), Message("text", "b")], 0, "from text, text"),
        ([Message("user", "a"), Message("assistant", "<image>")], 1, r"message 1 \(assistant\) ho"),
        ([Message("text", "<image>")], 1, "a plain text holds <image>"),
        ([Message("user", "<image>a"), Message("assistant", "b")], 2, "2 pictures, and 1 <image>"),
        ([Message("user", "a"), Message("assistant", "b")], 1, "1 pictures, and 0 <image>"),
        ([Message("user", "a", True), Message("assistant", "b")], 0, r"0 \(user\) is to be lear"),
        ([Message("user", "a"), Message("assistant", "b", False)], 0, "message of it is learned"),
    ],
)  # fmt: skip
def test_what_is_no_sample_is_dropped_by_name(tmp_path, messages, images, why):
    odd = Sample("odd", tuple(messages), (Picture(b"x", 1, 1),) * images)
    manifest = write_samples([*samples(9), odd], tmp_path / "out", source="test")
    (dropped,) = manifest["dropped"]
    assert manifest["num_samples"] == 9 and dropped["id"] == "odd"
    assert re.search(why, dropped["reason"])
