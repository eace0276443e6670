"""The three errors that a user can cause; one line each: the value, the rule, the way out."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager


class GemoeError(Exception):
    """Base of the errors below; anything else that escapes is a bug in gemoe_ds."""


class ConfigError(GemoeError, ValueError):
    """A recipe, an override, a DeepSpeed file or a combination of them is not valid."""


class CheckpointError(GemoeError, RuntimeError):
    """A checkpoint is missing, damaged, or belongs to another run or model."""


class DataError(GemoeError, RuntimeError):
    """A data folder, a sample or an image cannot be used."""


@contextmanager
def exit_on_error() -> Iterator[None]:
    """Turn a `GemoeError` into one `error: ...` line on stderr and exit code 2."""
    try:
        yield
    except GemoeError as error:
        message = " ".join(str(error).split())
        print(f"error: {message}", file=sys.stderr, flush=True)
        sys.exit(2)
