"""Files that are packed are read as what they hold, in whatever case their names are written."""

from __future__ import annotations

import bz2
import gzip
import lzma
import tarfile

import pyarrow as pa
import pytest

from gemoe_ds.data.sources.packed import open_unpacked
from gemoe_ds.data.sources.stores import open_store
from gemoe_ds.errors import DataError
from tests.data.sources.layouts import write, write_tar

LINES = b"".join(b'{"text": "%d"}\n' % n for n in range(20_000))


def zstd(content: bytes) -> bytes:
    """In two frames, as `pzstd` and `cat` leave them."""
    half = len(content) // 2
    parts = content[:half], content[half:]
    return b"".join(pa.compress(part, codec="zstd", asbytes=True) for part in parts)


PACK = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress, ".zst": zstd}
READ = {"json_lines": ("rows.jsonl", LINES), "json": ("rows.JSON", b'[{"text": "0"}]'),
        "text_files": ("rows.txt", b"0")}  # fmt: skip


@pytest.mark.parametrize("suffix", PACK)
@pytest.mark.parametrize("kind", READ)
def test_rows_are_those_of_the_file(tmp_path, kind, suffix):
    name, content = READ[kind]
    (tmp_path / f"{name}{suffix.upper()}").write_bytes(PACK[suffix](content))
    for path in (tmp_path, tmp_path / f"{name}{suffix.upper()}"):
        store = open_store(path)
        texts = [row["text"] for row in store.rows()]
        assert store.name == kind and texts == [str(n) for n in range(len(texts))]
        assert len(texts) == (20_000 if kind == "json_lines" else 1)


@pytest.mark.parametrize("suffix", [*PACK, ""])
def test_tars(tmp_path, suffix):
    write_tar(tmp_path / "0.tar")
    plain = list(open_store(tmp_path / "0.tar").rows())
    packed = tmp_path / ("0.tgz" if suffix == ".gz" else f"0.TAR{suffix}")
    packed.write_bytes(PACK.get(suffix, bytes)((tmp_path / "0.tar").read_bytes()))
    assert list(open_store(packed).rows()) == plain and len(plain) == 4


@pytest.mark.parametrize("suffix", PACK)
def test_what_is_cut_short_is_named(tmp_path, suffix):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(PACK[suffix](LINES)[:-9])
    with pytest.raises(
        DataError, match=f"{path}: it cannot be unpacked: .*was it downloaded whole"
    ):
        list(open_store(path).rows())


def test_a_file_that_is_not_packed_is_opened_as_it_is(tmp_path):
    (tmp_path / "a").write_bytes(b"BZ\x1f")
    with open_unpacked(tmp_path / "a") as file:
        assert file.read() == b"BZ\x1f"
    with pytest.raises(FileNotFoundError):
        open_unpacked(tmp_path / "b")


def test_what_other_programs_leave_is_no_data(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "a"}')
    for name in ("._a.jsonl", ".ipynb_checkpoints/a-checkpoint.jsonl", "__MACOSX/._a.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"\0\5\x16\7")
    assert list(open_store(tmp_path).rows()) == [{"text": "a"}]
    write(tmp_path / "b", "webdataset") if (tmp_path / "b").mkdir() is None else None
    with tarfile.open(tmp_path / "b/00000.tar", "a") as tar:
        tar.add(tmp_path / "._a.jsonl", "train/._d.json")
        tar.add(tmp_path / "__MACOSX/._a.jsonl", "__MACOSX/e.json")
    assert len(list(open_store(tmp_path / "b").rows())) == 4
