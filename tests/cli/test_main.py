"""`gemoe` itself: what it lists, what it says to a wrong word, and the files that start it."""

from __future__ import annotations

import importlib
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

import gemoe_ds.cli
from gemoe_ds.cli.main import main
from tests.helpers import repository

CLI = Path(gemoe_ds.cli.__file__).parent
COMMANDS = sorted(path.stem for path in CLI.glob("[!_]*") if path.stem != "main")
HEAVY = "torch", "deepspeed", "transformers", "pydantic", "numpy", "yaml"


def gemoe(line: str, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(sys, "argv", ["/somewhere/gemoe", *line.split()])
    try:
        main()
    except SystemExit as left:
        return int(left.code or 0)
    return 0


def test_help_is_instant() -> None:
    """No library that takes time is imported before a command is known."""
    program = f"""
import sys
sys.argv = ["gemoe", "--help"]
from gemoe_ds.cli.main import main
main()
assert not [name for name in {HEAVY} if name in sys.modules]
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len(COMMANDS) == 11
    for name in COMMANDS:
        (line,) = [
            row
            for row in done.stdout.splitlines()
            if row.startswith(f"  {name.replace('_', '-')} ")
        ]
        said = (importlib.import_module(f"gemoe_ds.cli.{name}").__doc__ or "").partition("\n")[0]
        assert said.endswith(".") and line.endswith(said)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("trian recipe.yaml", "'trian': no such command (did you mean train?); gemoe has ablate,"),
        ("main", "'main': no such command"),
        ("TRAIN", "'TRAIN': no such command"),
        ("help", "(did you mean --help?)"),
        ("--verison", "'--verison': no such option (did you mean --version?)"),
        ("-n 4 train", "'-n': no such option; gemoe has --help, --version"),
        ("data convrt", "'convrt': no such command (did you mean convert?); gemoe data has"),
        ("data train_tokenizer", "(did you mean train-tokenizer?)"),
        ("data --version", "'--version': no such option"),
        ("data convert --json x --images y", "the following arguments are required: --out"),
        ("evaluate r --data d --out o --traned x", "--traned x (did you mean --trained?)"),
        ("generate", "the following arguments are required: --data, --out"),
        ("export --out x", "the following arguments are required: recipe"),
        ("export r --out x", "--trained is missing: the run to export"),
        ("analyze --out x", "give evaluation folders, or --results FILE"),
        ("submit", "the following arguments are required: recipe; --help lists"),
    ],
)
def test_a_wrong_word_is_one_line(
    line: str, words: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert gemoe(line, monkeypatch) == 2
    printed = capsys.readouterr()
    (error,) = printed.err.splitlines()
    assert error.startswith("error: ") and words in error and not printed.out


def test_a_command_has_its_own_name_in_its_help(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for line in ("export", "data convert", "benchmark tables"):
        assert gemoe(f"{line} --help", monkeypatch) == 0
        assert capsys.readouterr().out.startswith(f"usage: gemoe {line} [-h]")
    for line in ("", "-h", "--help"):
        assert gemoe(line, monkeypatch) == 0
        assert capsys.readouterr().out.startswith("usage: gemoe COMMAND ...")


FILES = [(f"launch/{name}.py", f"gemoe_ds.cli.{name}") for name in COMMANDS if name != "data"] + [
    ("data_prep/convert_llava.py", "gemoe_ds.cli.data.convert"),
    ("data_prep/train_tokenizer.py", "gemoe_ds.cli.data.train_tokenizer"),
]


@pytest.mark.parametrize(("file", "module"), FILES)
def test_files_that_launchers_start_are_the_commands(file: str, module: str) -> None:
    path = repository() / file
    assert runpy.run_path(str(path))["main"] is importlib.import_module(module).main
    assert path.stat().st_mode & 0o111 and path.read_text().startswith("#!/usr/bin/env python3\n")
