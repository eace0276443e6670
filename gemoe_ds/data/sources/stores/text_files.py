"""Plain text: .txt files, packed or not; a document is a file, or a line or paragraph of one."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

from gemoe_ds.data.sources.packed import open_unpacked
from gemoe_ds.data.sources.stores.base import Store, with_suffix
from gemoe_ds.errors import DataError

_BLANK = re.compile(r"\n[ \t]*\n")


class TextFiles(Store):
    """Rows of `text`; called by their file, and by their place in it if it has several."""

    name: ClassVar[str] = "text_files"
    title: ClassVar[str] = "text files (.txt)"
    rank: ClassVar[int] = 0

    @classmethod
    def sees(cls, path: Path) -> bool:
        return bool(with_suffix(path, ".txt")) and not (
            path.is_dir() and with_suffix(path, ".tar", ".parquet", ".arrow", ".json", ".jsonl")
        )

    def files(self) -> list[Path]:
        return with_suffix(self.path, ".txt")

    def rows(self) -> Iterator[Any]:
        for file in self.files():
            name = file.name if self.path.is_file() else str(file.relative_to(self.path))
            for number, text in enumerate(self._documents(file)):
                if self.documents == "file" or text.strip():
                    place = "" if self.documents == "file" else f":{number}"
                    yield {"id": f"{name}{place}", "text": text}

    def _documents(self, file: Path) -> Iterator[str]:
        try:
            with io.TextIOWrapper(open_unpacked(file), encoding="utf-8-sig") as lines:
                if self.documents == "line":
                    yield from (line.rstrip("\n") for line in lines)
                    return
                text = lines.read()
        except OSError as error:
            raise DataError(f"{file}: cannot read it: {error.strerror}") from None
        except UnicodeDecodeError as error:
            raise DataError(f"{file}: it is no text of UTF-8: {error}") from None
        yield from _BLANK.split(text) if self.documents == "paragraph" else [text]
