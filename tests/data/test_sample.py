"""Folders on disk: what is written is read, whole or not at all, by many threads, in few bytes."""

from __future__ import annotations

import json
import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pyarrow.parquet as pq
import pytest

from gemoe_ds.data.sample import (
    GROUP,
    Dropped,
    Sample,
    Turn,
    open_samples,
    write_samples,
)
from gemoe_ds.errors import DataError


def samples(count: int) -> list[Sample]:
    """Odd ones among them: no image, no kind, many turns, text in other scripts."""
    rng = random.Random(0)
    return [
        Sample(
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
    names = [f"shard-{i:05d}-of-{-(-count // 50):05d}.parquet" for i in range(-(-count // 50))]
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
    folder, read = open_samples(tmp_path / "out", cache_bytes=0), pq.ParquetFile.read_row_group
    rows = [GROUP * (i % 8) for i in range(32)]
    busy, most, lock = set(), 0, threading.Lock()

    def slow(reader: pq.ParquetFile, *arguments: Any, **options: Any) -> Any:
        nonlocal most
        with lock:
            assert reader not in busy, "a reader is for one thread at a time"
            busy.add(reader)
            most = max(most, len(busy))
        time.sleep(0.05)
        table = read(reader, *arguments, **options)
        busy.remove(reader)
        return table

    monkeypatch.setattr(pq.ParquetFile, "read_row_group", slow)
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
    other = [*written[:8], Sample("id 8", b"another", written[8].turns)]
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


@pytest.mark.parametrize(
    "change, words",
    [
        ({"schema": 2}, "schema 2, this version reads 1"),
        ({"shards": []}, "lists no shard"),
        ({"shards": None}, "is damaged"),
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
