"""Ask an exported folder in the servers that are installed, and compare them.

    gemoe serve-check EXPORTED                            transformers, and vLLM if it is here
    gemoe serve-check EXPORTED --python VENV/bin/python   vLLM of another environment
    gemoe serve-check EXPORTED --prompts FILE --out check.json

Each server runs in a process of its own, with the trained k and with the base model's static k, and
answers 20 prompts greedily. Printed are the mean k, tokens a second, and how far answers and
log-probabilities equal those of transformers at the same k. In float32 a server that does not agree
ends the command with exit code 2. In other dtypes rounding moves the k of some tokens, so nothing
is judged unless --tolerance is given. Code of the folder runs only if its checksums are those that
`gemoe export` wrote down, and if it is what this version writes.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

from gemoe_ds.errors import ConfigError, exit_on_error
from gemoe_ds.parser import Parser, at_least_one


def _parser() -> Parser:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, metavar="EXPORTED", help="folder of `gemoe export`")
    parser.add_argument(
        "--python", type=Path, help="interpreter of the environment with vLLM (default: this one)"
    )
    parser.add_argument(
        "--prompts", type=Path, help='JSON lines, {"text": "...", "images": ["file"]}'
    )
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), default="float32", help="(float32)"
    )
    parser.add_argument(
        "--max-new-tokens", type=at_least_one, default=32, help="tokens of every answer (32)"
    )
    parser.add_argument(
        "--batch", type=at_least_one, default=8, help="prompts at a time when timed (8)"
    )
    parser.add_argument("--rounds", type=at_least_one, default=3, help="timed rounds (3)")
    parser.add_argument(
        "--tolerance", type=float, help="log-probabilities may differ by so much (float32: 1e-4)"
    )
    parser.add_argument(
        "--vllm",
        type=_options,
        default={},
        metavar="JSON",
        help="arguments of vLLM's LLM, such as '{\"tensor_parallel_size\": 2}'",
    )
    parser.add_argument(
        "--trust-code",
        action="store_true",
        help="run code that the export of another version wrote, by its checksums",
    )
    parser.add_argument("--out", type=Path, help="also write everything to this JSON file")
    return parser


def _options(text: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise argparse.ArgumentTypeError(f"{text:.40} is no JSON object")
    return found


def main(argv: list[str] | None = None) -> None:
    flags = _parser().parse_or_exit(argv)
    with exit_on_error():
        if flags.tolerance is not None and not 0 < flags.tolerance < float("inf"):
            raise ConfigError(f"--tolerance {flags.tolerance:g}: is more than 0")
        if flags.out and flags.out.is_dir():
            raise ConfigError(f"--out {flags.out}: is a folder; give a file")
        _check(flags)


def _check(flags: argparse.Namespace) -> None:
    from gemoe_ds.errors import CheckpointError
    from gemoe_ds.serving.check import Options, disagreements, serve_check, write_result

    options = Options(**{f.name: getattr(flags, f.name) for f in fields(Options)})
    rows = serve_check(flags.folder, options, lambda text: print(text, flush=True))
    if flags.out:
        write_result(flags.out, flags.folder, rows, options)
    wrong = disagreements(rows, options)
    for text in wrong[1:]:
        print(f"also: {text}", file=sys.stderr)
    if wrong:
        raise CheckpointError(wrong[0])


if __name__ == "__main__":
    main()
