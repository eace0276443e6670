"""Plain text: .txt files; a file is one document, or each of its lines or paragraphs is."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

from gemoe_ds.data.sources.stores.base import Store, with_suffix
from gemoe_ds.errors import DataError

DOCUMENTS = ("file", "paragraph", "line")
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
            if self.documents == "line":
                with file.open(encoding="utf-8-sig") as lines:
                    yield from (line.rstrip("\n") for line in lines)
                return
            text = file.read_text(encoding="utf-8-sig")
        except OSError as error:
            raise DataError(f"{file}: cannot read it: {error.strerror}") from None
        except UnicodeDecodeError as error:
            raise DataError(f"{file}: it is no text of UTF-8: {error}") from None
        yield from _BLANK.split(text) if self.documents == "paragraph" else [text]
