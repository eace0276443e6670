"""The kinds of questions, by the id of their row; ids that several rows have."""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from gemoe_ds.data.sample_writer import WrittenShard
from gemoe_ds.data.sources.json_file import read_json
from gemoe_ds.data.sources.rows import id_of
from gemoe_ds.data.sources.stores import Store
from gemoe_ds.errors import DataError


def read_kinds(path: Path, store: Store) -> dict[str, Any]:
    """A JSON object, id -> [kind of each question]; DataError unless an id is one row's alone."""
    kinds: dict[str, Any] = read_json(path, dict)
    ids = (id_of(number, row) for number, row in enumerate(store.rows()))
    rows = Counter(row_id for row_id in ids if row_id in kinds)
    if several := [row_id for row_id in kinds if rows[row_id] > 1]:
        raise DataError(f"--kinds {path}: {len(several)} ids, {several[0]!r} first, name two rows")
    if kinds and not rows:
        raise DataError(f"--kinds {path}: none of its {len(kinds)} ids is the id of a row")
    return kinds


def repeated_ids(shards: Sequence[WrittenShard]) -> int:
    """How many samples have the id of an earlier one."""
    hashes = array("q", (hash(name) for shard in shards for name in _ids(shard)))
    return len(hashes) - len(np.unique(np.frombuffer(hashes, np.int64)))


def _ids(shard: WrittenShard) -> list[str]:
    with pa.memory_map(str(shard.path)) as file:  # of which the ids alone are read
        reader = pa.ipc.open_file(file)
        groups = (reader.get_batch(group) for group in range(reader.num_record_batches))
        return [name for group in groups for name in group["id"].to_pylist()]
