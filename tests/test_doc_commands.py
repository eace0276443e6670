"""Every command of the documentation exists, with every option that the page gives it."""

from __future__ import annotations

import re
import shlex
import sys

import pytest

from gemoe_ds.cli.main import main
from tests.helpers import repository

PAGES = ("README.md", "docs/**/*.md")
# What stands before a command's own options: `gemoe evaluate`, `gemoe_ds.cli.evaluate`, ...
START = re.compile(
    r"(?:^|[\s`])(?:gemoe |-m gemoe_ds\.cli\.|--module gemoe_ds\.cli\.|launch/)"
    r"((?:data|benchmark) [a-z-]+|[a-z][a-z-]*)(?:\.py)?(?= |`|$)(.*)"
)

IMPORT_DEEPSPEED = ("train", "doctor")  # before they print their help: their options are read


def commands(text: str) -> list[tuple[str, list[str]]]:
    """Command and options of every line of a code block, and of `code` that begins with it."""
    lines = re.findall(r"^(?:    |\$ |\w+\$ )(.*)", text, re.MULTILINE)
    lines += re.findall(r"`(gemoe [^`\n]+)`", text)
    found = []
    for line in lines:
        if match := START.search(line):
            words = shlex.split(match[2], comments=True)
            found.append((match[1], [word for word in words if word.startswith("--")]))
    return found


def help_of(command: str, monkeypatch, capsys) -> str:
    if command in IMPORT_DEEPSPEED:
        return (repository() / "gemoe_ds/config/cli_help.py").read_text(encoding="utf-8")
    monkeypatch.setattr(sys, "argv", ["gemoe", *command.split(), "--help"])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code in (0, None), command
    return capsys.readouterr().out


def test_commands_and_their_options_exist(monkeypatch, capsys):
    pages = [path for pattern in PAGES for path in sorted(repository().glob(pattern))]
    asked: dict[str, set[str]] = {}
    for page in pages:
        for command, options in commands(page.read_text(encoding="utf-8")):
            asked.setdefault(command, set()).update(options)
    assert {"train", "evaluate", "export", "submit", "data convert"} <= set(asked)
    unknown = {}
    for command, options in asked.items():
        known = set(re.findall(r"--[a-z_-]+", help_of(command, monkeypatch, capsys)))
        if options - known:
            unknown[command] = options - known
    assert unknown == {}


def test_commands_are_read_from_a_page():
    page = (
        "    gemoe data convert --json a.json --out b   # --not-this\n"
        "    deepspeed --num_gpus 8 --module gemoe_ds.cli.train my.yaml --dry-run\n"
        "$ launch/submit.py a.yaml --nodes 2\n"
        "Say `gemoe evaluate RUN --k 8`, not gemoe export --nothing.\n"
    )
    assert commands(page) == [
        ("data convert", ["--json", "--out"]),
        ("train", ["--dry-run"]),
        ("submit", ["--nodes"]),
        ("evaluate", ["--k"]),
    ]
