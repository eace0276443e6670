"""Several folders as one list, and what is held out of them: by hash, whatever their order."""

from __future__ import annotations

import hashlib
from dataclasses import replace

import numpy as np
import pytest

from gemoe_ds.data.holdout import hash_of, held_out, held_out_rows, open_held_out
from gemoe_ds.data.mixture import Mixture, MixturePart, Subset, open_training
from gemoe_ds.data.row_names import MOST, OTHER, row_names, sources_of
from gemoe_ds.data.sample import Turn, of_turns, open_samples, write_samples
from gemoe_ds.errors import DataError
from tests.data.first_schema import write_first_schema

SIZES = {"a": 7, "b": 40, "c": 3}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The last one as version 0.1 wrote it."""
    root = tmp_path_factory.mktemp("mixture")
    for name, size in SIZES.items():
        if name == "c":
            rows = [(f"c{i}", None, (Turn("q", f"c {i}"),)) for i in range(size)]
            write_first_schema(rows, root / name, shard_size=2)
            continue
        samples = (of_turns(f"{name}{i}", None, (Turn("q", f"{name} {i}"),)) for i in range(size))
        write_samples(samples, root / name, source="test", shard_size=5)
    return root


def part(folders, folder: str, **options) -> MixturePart:
    return MixturePart(path=str(folders / folder), **options)


def ids(samples) -> list[str]:
    return [samples[row].id for row in range(len(samples))]


def test_rows_follow_each_other_and_a_folder_is_opened_once(folders, monkeypatch):
    opened = []

    def counted(path):
        opened.append(path)
        return open_samples(path)

    monkeypatch.setattr("gemoe_ds.data.mixture.open_samples", counted)
    parts = [part(folders, "a"), part(folders, "b", name="x"), part(folders, "a", name="again")]
    mixture = open_training(parts)
    assert len(opened) == 2 and mixture.names == ("a", "x", "again")
    expected = [f"{n}{i}" for n in "aba" for i in range(SIZES[n])]
    assert ids(mixture) == expected and len(mixture) == 54
    assert [name for names, _ in row_names(mixture) for name in names] == expected
    assert mixture.part_of(np.array([0, 6, 7, 46, 47, 53])).tolist() == [0, 0, 1, 1, 2, 2]
    with pytest.raises(IndexError):
        mixture[54]
    some = Subset(mixture, np.array([8, 0, 47]), "some")
    assert ids(some) == ["b1", "a0", "a0"] == [some.outline(row).id for row in range(3)]


def test_the_fingerprint_is_that_of_all_in_their_order(folders):
    prints = {
        open_training([part(folders, name) for name in names]).fingerprint
        for names in ("a", "ab", "ba", "abc")
    }
    assert len(prints) == 4
    one, other = (open_training([part(folders, "a", repeat=r)]) for r in (1, 2))
    assert one.fingerprint == other.fingerprint


def test_sources_are_the_parts_of_a_mixture(folders):
    found = sources_of(open_training([part(folders, "c"), part(folders, "a", name="x")]))
    assert found.names == ("c", "x") and found.source_N.tolist() == [0] * 3 + [1] * 7
    assert sources_of(open_samples(folders / "a")) is None


@pytest.fixture(scope="module")
def sourced(tmp_path_factory):
    """Nine sources, of which the first four come five times."""
    folder = tmp_path_factory.mktemp("sourced") / "data"
    turns = (Turn("q", "a"),)
    samples = (replace(of_turns(f"b{i}", None, turns), source=f"s{i % 9}") for i in range(40))
    write_samples(samples, folder, source="test", shard_size=7)
    return open_samples(folder)


def test_what_the_samples_of_a_folder_carry(sourced, monkeypatch):
    found = sources_of(sourced)
    assert found.names == tuple(f"s{i}" for i in range(9)) and MOST > 9
    assert found.source_N.tolist() == [i % 9 for i in range(40)]
    monkeypatch.setattr("gemoe_ds.data.row_names.MOST", 5)
    found = sources_of(sourced)
    assert found.names == ("s0", "s1", "s2", "s3", OTHER)
    assert found.source_N.tolist() == [min(i % 9, 4) for i in range(40)]


def plain_hash(sample_id: str, source: str = "") -> int:
    said = f"{len(source)} {source} {sample_id}".encode()
    return int.from_bytes(hashlib.blake2b(said, digest_size=8).digest(), "big")


def test_the_source_is_hashed_too(sourced):
    rows = range(len(sourced))
    expected = {row for row in rows if plain_hash(f"b{row}", f"s{row % 9}") < 0.3 * 2**64}
    assert set(held_out_rows(sourced, 0.3)) == expected
    assert expected != {row for row in rows if plain_hash(f"b{row}") < 0.3 * 2**64}


def test_a_share_is_held_out_by_hash_in_whatever_order(folders):
    kept = [f"{n}{i}" for n in "abc" for i in range(SIZES[n])]
    expected = sorted((i for i in kept if plain_hash(i) < 0.3 * 2**64), key=plain_hash)
    assert 5 < len(expected) < 25
    for names in ("abc", "cba"):
        mixture = open_training([part(folders, name) for name in names])
        rows = held_out_rows(mixture, 0.3)
        assert ids(held_out(mixture, rows, 0.3)) == expected
    assert hash_of("a0", "") == plain_hash("a0") != hash_of("a0", "x")
    assert hash_of("b", "a") != hash_of("ab", "")
    alone = held_out_rows(open_samples(folders / "b"), 0.3)
    assert {f"b{row}" for row in alone} == {i for i in expected if i[0] == "b"}


def test_a_number_takes_the_smallest_hashes(folders):
    mixture = open_training([part(folders, "a"), part(folders, "b")])
    order = sorted(ids(mixture), key=plain_hash)
    for number in (1, 12):
        assert ids(held_out(mixture, held_out_rows(mixture, number), number)) == order[:number]
    twice = open_training([part(folders, "a"), part(folders, "a", name="x")])
    assert len(held_out_rows(twice, 1)) == 2, "the same sample is on one side"


@pytest.mark.parametrize(("holdout", "words"), [(1e-9, "none of 7"), (7, "all of 7"), (9, "all")])
def test_a_split_without_one_side_is_refused(folders, holdout, words):
    with pytest.raises(DataError, match=f"a: data.holdout={holdout:g} holds out {words}.*choose"):
        held_out_rows(open_samples(folders / "a"), holdout)


def test_what_a_run_validates_on(folders):
    parts = [part(folders, "a"), part(folders, "b")]
    assert ids(open_held_out(str(folders / "c"), 0, parts)) == ["c0", "c1", "c2"]
    assert len(open_held_out(None, 12, parts)) == 12
    shuffled = ids(open_held_out(None, 0, parts))
    assert sorted(shuffled) == sorted(ids(open_training(parts)))
    assert {i[0] for i in shuffled[:15]} == {"a", "b"}
    assert isinstance(open_training(parts), Mixture)
    assert ids(open_held_out(None, 0, str(folders / "a"))) == [f"a{i}" for i in range(7)]
