"""What a user sees while something runs: a bar at a terminal, a line a minute in a file."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tqdm import tqdm

EVERY = 60.0  # seconds between two lines
_TOO_SHORT = 1.0  # seconds, for a line at all
_LINE = "{desc}: {n_fmt} of {total_fmt}, {elapsed} so far, {remaining} left, {rate_fmt}{postfix}"


class Progress(tqdm):  # type: ignore[misc]  # tqdm has no types
    """tqdm; where there is no terminal, a line now and then and one at the end."""

    def __init__(self, *args: Any, **options: Any) -> None:
        self.is_terminal = sys.stderr.isatty()
        self.begun = self.said = time.monotonic()
        if not self.is_terminal:
            options |= {"bar_format": _LINE, "dynamic_ncols": False}
        super().__init__(*args, **({"dynamic_ncols": True} | options))

    def refresh(self, *args: Any, **options: Any) -> Any:
        if self.is_terminal:
            return super().refresh(*args, **options)
        if not self.disable and time.monotonic() - self.said >= EVERY:
            self._say()
        return None

    def clear(self, *args: Any, **options: Any) -> None:
        if self.is_terminal:
            super().clear(*args, **options)

    def close(self) -> None:
        if not self.is_terminal and not self.disable:
            if time.monotonic() - self.begun >= _TOO_SHORT:
                self._say()
            self.delay = float("inf")  # as if nothing had been shown that must be cleaned up
        super().close()

    def _say(self) -> None:
        self.said = time.monotonic()
        self.fp.write(f"{self}\n")
        self.fp.flush()


@contextmanager
def without(logger: str, words: str) -> Iterator[None]:
    """Leave out one logger's messages with these words, about which a user can do nothing."""

    def is_wanted(record: logging.LogRecord) -> bool:
        return words not in record.getMessage()

    logging.getLogger(logger).addFilter(is_wanted)
    try:
        yield
    finally:
        logging.getLogger(logger).removeFilter(is_wanted)
