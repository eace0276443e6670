"""Samples whose image cannot be decoded: left out of training, listed, and only so many of them."""

from __future__ import annotations

import json
import threading
from pathlib import Path

from tqdm import tqdm

from gemoe_ds.errors import DataError


class Quarantine:
    """Of one rank. Reader threads share it; each sample counts once, however often it comes."""

    def __init__(self, limit: int, file: Path | None = None) -> None:
        self.limit, self.file = limit, file
        self.ids: set[str] = set()
        self._lock = threading.Lock()

    def admit(self, sample_id: str, error: DataError) -> None:
        """Note it; raises the error itself, and how many there were, once there is no room left."""
        with self._lock:
            if sample_id in self.ids:
                return
            if len(self.ids) >= self.limit:
                left_out = f" (data.max_broken={self.limit} are left out)" if self.limit else ""
                raise DataError(f"{error}{left_out}") from error
            self.ids.add(sample_id)
            if self.file is not None:
                self.file.parent.mkdir(parents=True, exist_ok=True)
                with self.file.open("a", encoding="utf-8") as out:
                    out.write(json.dumps({"id": sample_id, "reason": str(error)}) + "\n")
        tqdm.write(f"left out: {error}")
