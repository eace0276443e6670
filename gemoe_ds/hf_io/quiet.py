"""What transformers says beside loading and saving that a user can do nothing about."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from transformers.utils import logging

from gemoe_ds.console import without


@contextmanager
def without_bars() -> Iterator[None]:
    """In a file its bars are a line of blocks; at a terminal they stay."""
    if sys.stderr.isatty() or not logging.is_progress_bar_enabled():
        yield
        return
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.enable_progress_bar()


@contextmanager
def without_report() -> Iterator[None]:
    """Also without its list of keys, for a caller that refuses by name those that matter."""
    with without_bars(), without("transformers.modeling_utils", "LOAD REPORT"):
        yield
