"""Cells -> a table as Markdown or as plain text; the source of both is aligned."""

from __future__ import annotations


def markdown(table: list[list[str]]) -> str:
    """A Markdown table whose source is aligned too: text to the left, numbers to the right."""
    table = [[cell.replace("|", "\\|") for cell in line] for line in table]
    texts = [_is_text(column) for column in zip(*table[1:], strict=True)]
    widths = [max(3, *map(len, column)) for column in zip(*table, strict=True)]
    rule = [
        "-" * width if is_text else "-" * (width - 1) + ":"
        for width, is_text in zip(widths, texts, strict=True)
    ]
    lines = [table[0], rule, *table[1:]]
    return "\n".join(f"| {' | '.join(_pad(line, widths, texts))} |" for line in lines)


def aligned(table: list[list[str]]) -> list[str]:
    texts = [_is_text(column) for column in zip(*table[1:], strict=True)]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return ["  ".join(_pad(line, widths, texts)).rstrip() for line in table]


def _pad(line: list[str], widths: list[int], texts: list[bool]) -> list[str]:
    return [
        cell.ljust(width) if is_text else cell.rjust(width)
        for cell, width, is_text in zip(line, widths, texts, strict=True)
    ]


def _is_text(column: tuple[str, ...]) -> bool:
    return any(cell[:1].isalpha() or cell.startswith(("`", "*")) for cell in column)
