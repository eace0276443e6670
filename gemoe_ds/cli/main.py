"""`gemoe COMMAND ...`: a file beside this one is a command, and its first line says what it does.

Nothing of torch is imported before a command is known: `gemoe --help` is instant.
"""

from __future__ import annotations

import ast
import difflib
import importlib
import pkgutil
import sys
from pathlib import Path

from gemoe_ds import __version__
from gemoe_ds.errors import ConfigError, exit_on_error

ABOUT = """\
Train, evaluate and export mixture-of-experts vision-language models in which every token picks how
many experts it needs."""


def main() -> None:
    dispatch("gemoe", Path(__file__).parent, "gemoe_ds.cli", ABOUT, {"--version": __version__})


def dispatch(
    program: str, folder: Path, package: str, about: str, prints: dict[str, str] | None = None
) -> None:
    """Run the command of `folder` that the first word names; `prints`: options that only print."""
    words, prints = sys.argv[1:] or ["--help"], prints or {}
    modules = {found.name.replace("_", "-"): found.name for found in pkgutil.iter_modules([folder])}
    modules.pop("main", None)
    name = words[0]
    if name in ("-h", "--help"):
        sys.stdout.write(_help(program, folder, modules, about, list(prints)))
    elif name in prints:
        print(f"{program} {prints[name]}")
    elif name in modules:
        sys.argv = [f"{program} {name}", *words[1:]]  # what `--help` and records of a run say
        importlib.import_module(f"{package}.{modules[name]}").main()
    else:
        with exit_on_error():
            raise ConfigError(_unknown(program, name, ["--help", *prints], list(modules)))


def _help(
    program: str, folder: Path, modules: dict[str, str], about: str, options: list[str]
) -> str:
    width = max(map(len, modules))
    lines = [f"  {name:<{width}}  {_first_line(folder, modules[name])}" for name in modules]
    words = [f"usage: {program} COMMAND ...", "", about, "", "commands:", *lines, ""]
    also = "".join(f"  {program} {option}" for option in options)
    return "\n".join([*words, f"{program} COMMAND --help says more about one.{also}\n"])


def _first_line(folder: Path, module: str) -> str:
    """Of the module's docstring, read without importing it."""
    inside = folder / module / "__init__.py"
    path = inside if inside.exists() else folder / f"{module}.py"
    return (ast.get_docstring(ast.parse(path.read_bytes())) or "").partition("\n")[0]


def _unknown(program: str, word: str, options: list[str], commands: list[str]) -> str:
    kind, known = ("option", options) if word.startswith("-") else ("command", commands)
    near = difflib.get_close_matches(word, [*commands, *options], n=1)
    hint = f" (did you mean {near[0]}?)" if near else ""
    return f"{word!r}: no such {kind}{hint}; {program} has {', '.join(known)}"
