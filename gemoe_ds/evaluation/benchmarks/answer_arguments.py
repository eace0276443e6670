"""The options of `gemoe benchmark answer`."""

from __future__ import annotations

import argparse
from pathlib import Path

from gemoe_ds.config.load import read_recipe
from gemoe_ds.errors import ConfigError
from gemoe_ds.evaluation.arguments import add_routing, check_name, check_routing
from gemoe_ds.parser import Parser, at_least_one

_CONFIG = "config.yaml"


def answer_parser(description: str | None) -> Parser:
    parser = Parser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", metavar="RUN|RECIPE", help="folder of a run, or a recipe")
    parser.add_argument("overrides", nargs="*", metavar="key.path=value")
    parser.add_argument(
        "--tasks",
        nargs="+",
        required=True,
        help="paper-vision, paper-more, paper-language, or tasks of lm-eval and lmms-eval by name",
    )
    parser.add_argument(
        "--data-root", type=Path, help="folder with the data sets, as OWNER/NAME of the hub"
    )
    parser.add_argument(
        "--download", action="store_true", help="fetch the data sets that are not on this machine"
    )
    parser.add_argument(
        "--limit", type=at_least_one, help="only the first so many documents of every leaf task"
    )
    parser.add_argument(
        "--num-fewshot",
        type=int,
        help="examples before a question of a language task (default: as the task has it)",
    )
    parser.add_argument(
        "--apply-chat-template",
        action="store_true",
        help="language tasks in the chat template of the tokenizer's folder",
    )
    parser.add_argument("--out", type=Path, help="folder of the answers (default: RUN/benchmarks)")
    add_routing(parser)
    parser.add_argument(
        "--calibrate-tasks",
        nargs="+",
        default=[],
        metavar="TASK",
        help="tasks on whose prompts --mean-k is met, in the place of samples",
    )
    parser.add_argument(
        "--prompt-style", default="default", help="of vision tasks (default: as lmms-eval has them)"
    )
    parser.add_argument(
        "--batch",
        dest="batch_tokens",
        type=_tokens,
        default="auto",
        metavar="TOKENS",
        help="tokens of a batch on a rank, padding included (default: auto, as memory allows)",
    )
    parser.add_argument("--name", help="of the method in tables (default: the router's)")
    parser.set_defaults(batch=64)  # samples that --calibrate reads at a time
    return parser


def _tokens(text: str) -> int | str:
    if text == "auto" or (text.isascii() and text.isdecimal() and 0 < int(text[:12]) < 10**9):
        return text if text == "auto" else int(text)
    raise argparse.ArgumentTypeError(f"{text:.20} is neither auto nor a number of tokens")


def find_run(arguments: argparse.Namespace) -> None:
    """A run's folder stands for its recipe, what it trained, and where answers go."""
    run = Path(arguments.recipe)
    if run.is_dir():
        if not (run / _CONFIG).is_file():
            raise ConfigError(
                f"{run} is no run: it has no {_CONFIG}; give a run's folder, or a recipe"
            )
        arguments.recipe = str(run / _CONFIG)
        if not arguments.router:
            arguments.trained = arguments.trained or run
        arguments.out = arguments.out or run / "benchmarks"
    else:
        read_recipe(run)  # ConfigError if there is none
    if arguments.out is None:
        raise ConfigError(
            "--out is where the answers go; only a run's folder has a place of its own"
        )
    check_routing(arguments)
    check_name(arguments.name)
