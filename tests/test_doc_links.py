"""Every link of the documentation leads somewhere, and its index lists every page."""

from __future__ import annotations

import os
import re
from pathlib import Path

from tests.helpers import repository

FENCE = re.compile(r"^```.*?^```", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"\]\(([^)\s]+)\)")
# What GitHub drops of a heading that it makes an anchor of; spaces become hyphens.
NOT_IN_ANCHORS = re.compile(r"[^\w\- ]")


def prose(page: Path) -> str:
    return FENCE.sub("", page.read_text(encoding="utf-8"))


def links(page: Path) -> list[str]:
    """Relative ones."""
    found = LINK.findall(prose(page))
    return [link for link in found if not re.match(r"https?:|mailto:", link)]


def anchors(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.*)", prose(page), re.MULTILINE)
    return {NOT_IN_ANCHORS.sub("", text.lower()).replace(" ", "-") for text in headings}


def broken(page: Path) -> list[str]:
    found = []
    for link in links(page):
        path, _, anchor = link.partition("#")
        target = Path(os.path.normpath(page.parent / path)) if path else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            found.append(link)
    return found


def test_relative_links_resolve() -> None:
    root = repository()
    pages = [*root.glob("*.md"), *root.glob("docs/**/*.md"), root / "data_prep/README.md"]
    assert {str(page.relative_to(root)): found for page in pages if (found := broken(page))} == {}


def test_the_index_lists_every_page() -> None:
    docs = repository() / "docs"
    listed = {os.path.normpath(docs / link.partition("#")[0]) for link in links(docs / "README.md")}
    missing = {str(page) for page in docs.glob("**/*.md")} - listed - {str(docs / "README.md")}
    assert missing == set()


def test_broken_links_are_found(tmp_path: Path) -> None:
    (tmp_path / "there.md").write_text("# A heading, with `code`\n```\n# no heading\n```\n")
    page = tmp_path / "page.md"
    page.write_text(
        "# Here\n[a](there.md) [b](there.md#a-heading-with-code) [c](https://x.y) [d](#here)\n"
        "[e](gone.md) [f](there.md#no-heading) [g](#gone)\n```\n[h](gone.md)\n```\n"
    )
    assert broken(page) == ["gone.md", "there.md#no-heading", "#gone"]
