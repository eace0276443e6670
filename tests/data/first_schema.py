"""A folder as versions before schema 2 wrote it: parquet, one picture or none, turns."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from gemoe_ds.data.turn import Turn

_TURN = pa.struct([("human", pa.string()), ("gpt", pa.string()), ("kind", pa.string())])
_COLUMNS = pa.schema([("id", pa.string()), ("image", pa.binary()), ("turns", pa.list_(_TURN))])

Row = tuple[str, bytes | None, Sequence[Turn]]


def write_first_schema(rows: Sequence[Row], folder: Path, shard_size: int = 40) -> Path:
    folder.mkdir(parents=True)
    shards = [rows[i : i + shard_size] for i in range(0, len(rows), shard_size)]
    listed = []
    for index, some in enumerate(shards):
        path = folder / f"shard-{index:05d}-of-{len(shards):05d}.parquet"
        with pq.ParquetWriter(path, _COLUMNS, use_dictionary=False) as writer:
            for i in range(0, len(some), 32):
                stored = [
                    {"id": name, "image": image, "turns": [turn._asdict() for turn in turns]}
                    for name, image, turns in some[i : i + 32]
                ]
                writer.write_table(pa.Table.from_pylist(stored, _COLUMNS))
        checksum = hashlib.sha256(path.read_bytes()).hexdigest()
        size = path.stat().st_size
        listed.append(
            {"file": path.name, "num_samples": len(some), "bytes": size, "sha256": checksum}
        )
    manifest = {"schema": 1, "num_samples": len(rows), "shards": listed, "fingerprint": "1"}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder
