"""Plain text: .txt files, packed or not; a document is a file, or a line or paragraph of one."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

from gemoe_ds.data.sources.packed import unpacked_name
from gemoe_ds.data.sources.picture_names import ENDINGS
from gemoe_ds.data.sources.stores.base import Store
from gemoe_ds.data.sources.stores.files import has_rows, opened_text, stem_of, with_suffix
from gemoe_ds.data.sources.stores.splits import of_split, split_of
from gemoe_ds.errors import DataError

# What lies beside the data of a set, and is none.
_OF_A_SET = re.compile(r"(readme|licen[cs]e|copying|notice|citation|requirements)\b.*")
_BLANK = re.compile(r"\n[ \t]*\n")


class TextFiles(Store):
    """Rows of `text`; called by their file, and by their place in it if it has several."""

    name: ClassVar[str] = "text_files"
    title: ClassVar[str] = "text files (.txt)"
    rank: ClassVar[int] = -1
    options: ClassVar[frozenset[str]] = frozenset({"--split", "--documents"})

    @classmethod
    def sees(cls, path: Path) -> bool:
        found = with_suffix(path, ".txt")
        if path.is_file():
            return bool(found)
        is_more = not all(_OF_A_SET.fullmatch(unpacked_name(file)) for file in found)
        return is_more and not has_rows(path)

    def files(self) -> list[Path]:
        """Of documents one or the other may be called `test`: these are splits if all have one."""
        found = with_suffix(self.path, ".txt")
        if self.split is None and not all(split_of(f.relative_to(self.folder)) for f in found):
            return found
        return of_split(self.path, found, self.split)

    def placed_rows(self) -> Iterator[tuple[Path, Any]]:
        self._refuse_pictures()
        return super().placed_rows()

    def rows_of(self, file: Path) -> Iterator[Any]:
        name = file.name if self.path.is_file() else str(file.relative_to(self.path))
        for number, text in enumerate(self._documents(file)):
            if self.documents == "file" or text.strip():
                place = "" if self.documents == "file" else f":{number}"
                yield {"id": f"{name}{place}", "text": text}

    def _refuse_pictures(self) -> None:
        """DataError for a folder in which a text and a picture have the same name."""
        if self.path.is_file():
            return
        pictures = {stem_of(file): file for file in with_suffix(self.path, *ENDINGS)}
        pairs = [file for file in self.files() if stem_of(file) in pictures]
        if pairs:
            raise DataError(
                f"{self.path}: {len(pairs)} texts have a picture of their name beside them, "
                f"{pairs[0].name} and {pictures[stem_of(pairs[0])].name} first; of pairs of a "
                f"picture and a caption tar --sort=name -C {self.path} -cf pairs.tar . makes a "
                "WebDataset, which --question reads"
            )

    def _documents(self, file: Path) -> Iterator[str]:
        with opened_text(file) as lines:
            if self.documents == "line":
                yield from (line.rstrip("\n") for line in lines)
                return
            text = lines.read().rstrip("\n")  # the last line's end is the file's
        yield from _BLANK.split(text) if self.documents == "paragraph" else [text]
