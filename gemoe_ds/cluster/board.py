"""What the ranks of a host tell each other, in memory that they share: no sockets, no waiting.

Each rank has two slots: where it is, once a beat, and what ended it. All read all. A slot is
written by one rank and read while it is written: what does not fit its checksum is read as before.
"""

from __future__ import annotations

import json
import time
import zlib
from pathlib import Path
from typing import Any

import torch

from gemoe_ds.engine.host_memory import HostMemory

_SLOT = 16 * 1024  # bytes
_LONGEST = 8000  # characters of a diagnosis
_HEAD = 8  # bytes: checksum and length


class Board:
    """Of the ranks that have this memory in common. Collective."""

    def __init__(self, memory: HostMemory) -> None:
        self.ranks, self._mine = memory.ranks, memory.rank
        (pages,) = memory.allocate([(2 * len(self.ranks) * _SLOT,)], torch.uint8)
        if len(self.ranks) == 1:
            pages.zero_()  # common memory begins so
        self._bytes = pages.numpy().data
        self._read: dict[int, Any] = {}  # what was read last, by slot
        self._is_lost = False

    def say(self, position: dict[str, Any]) -> None:
        """Where this rank is, now."""
        self._write(2 * self._mine, [time.time(), position, self._is_lost])

    def say_lost(self) -> None:
        """That this rank has lost contact to another one, from its next word on."""
        self._is_lost = True

    def tell(self, diagnosis: dict[str, Any]) -> None:
        """What ends this rank, if nothing has ended it before."""
        if self.diagnosis() is None:
            words = str(diagnosis["words"])[:_LONGEST]
            self._write(2 * self._mine + 1, diagnosis | {"words": words})

    def said(self) -> dict[int, Any]:
        """By rank: its clock and its position when it last said them."""
        entries = {rank: self._entry(2 * place) for place, rank in enumerate(self.ranks)}
        return {rank: entry[:2] for rank, entry in entries.items() if entry}

    def is_lost(self) -> bool:
        """Whether any rank has lost contact to another one."""
        entries = [self._entry(2 * place) for place in range(len(self.ranks))]
        return any(entry and entry[2] for entry in entries)

    def diagnosis(self) -> dict[str, Any] | None:
        """The first that any rank has told."""
        found = (self._entry(2 * place + 1) for place in range(len(self.ranks)))
        return next(filter(None, found), None)

    def _write(self, slot: int, value: Any) -> None:
        text = json.dumps(value).encode()
        assert len(text) <= _SLOT - _HEAD, len(text)
        head = zlib.crc32(text).to_bytes(4, "little") + len(text).to_bytes(4, "little")
        start = slot * _SLOT
        self._bytes[start : start + _HEAD + len(text)] = head + text

    def _entry(self, slot: int) -> Any:
        start = slot * _SLOT
        stored = bytes(self._bytes[start : start + _SLOT])
        checksum, length = (int.from_bytes(stored[i : i + 4], "little") for i in (0, 4))
        text = stored[_HEAD : _HEAD + length]
        if length and zlib.crc32(text) == checksum:
            self._read[slot] = json.loads(text)
        return self._read.get(slot)


def is_alive(pid: int) -> bool:
    """Whether a process of this host goes on; one that has ended may still be in the table."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state not in "ZX"
