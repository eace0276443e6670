"""Every message that docs/troubleshooting.md explains is one that the code still has."""

from __future__ import annotations

import ast
import re

from tests.helpers import repository

FOLDERS = ("gemoe_ds", "data_prep")
HOLE = "\0"  # where an f-string puts a value
SHORTEST = 10  # literal characters of a message that are worth looking for


def messages_of(text: str) -> list[str]:
    """The first cell of every row."""
    return re.findall(r"^\| `([^`]+)` \|", text, re.MULTILINE)


def strings_of(source: str) -> list[str]:
    """Every text of Python code but docstrings; adjacent literals are one, values are holes."""
    tree, found = ast.parse(source), []
    docstrings = {node.value for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            if node not in docstrings:
                found.append(node.value)
        elif isinstance(node, ast.JoinedStr):
            parts = (p.value if isinstance(p, ast.Constant) else HOLE for p in node.values)
            found.append("".join(map(str, parts)))
    return found


def stale(messages: list[str], strings: list[str]) -> list[str]:
    """Those whose literal parts do not occur, in their order, in any one text."""
    found = []
    for message in messages:
        parts = [part.strip() for part in message.split("...")]
        assert sum(map(len, parts)) >= SHORTEST, f"says too little to be found: {message}"
        pattern = re.compile(".*".join(re.escape(part) for part in parts if part), re.DOTALL)
        if not any(pattern.search(text) for text in strings):
            found.append(message)
    return found


def test_every_explained_message_is_in_the_code() -> None:
    page = (repository() / "docs/troubleshooting.md").read_text(encoding="utf-8")
    paths = [path for folder in FOLDERS for path in (repository() / folder).rglob("*.py")]
    strings = [s for path in paths for s in strings_of(path.read_text(encoding="utf-8"))]
    messages = messages_of(page)
    assert len(messages) >= 25
    assert stale(messages, strings) == []


def test_a_message_that_is_gone_is_found() -> None:
    page = (
        "| message | what |\n|---|---|\n"
        "| `rank ... waited ... s for all others` | the code has it |\n"
        "| `rank ... waited ... s for nobody at all` | other words |\n"
        "| `s for all others ... waited` | another order |\n"
    )
    source = 'say(f"rank {rank} waited {seconds:.0f} s " f"for all others ({why})")'
    assert messages_of(page)[0] == "rank ... waited ... s for all others"
    assert stale(messages_of(page), strings_of(source)) == messages_of(page)[1:]


def test_every_row_of_the_page_is_read() -> None:
    page = (repository() / "docs/troubleshooting.md").read_text(encoding="utf-8")
    rows = [line for line in page.splitlines() if line.startswith("| ")]
    headings = [line for line in rows if line.startswith("| message |")]
    assert len(rows) - len(headings) == len(messages_of(page))
