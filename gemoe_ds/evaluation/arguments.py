"""What the options of `gemoe evaluate` and `gemoe generate` have in common."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from gemoe_ds.errors import ConfigError
from gemoe_ds.parser import Parser, at_least_one


@dataclass(frozen=True)
class RoutingMode:
    """One way to route, and the folder of what is found with it, in --out."""

    folder: str = ""
    k: int | None = None  # static
    mean_k: float | None = None  # a budget
    router: str | None = None  # one of --router; None: the recipe's

    def __str__(self) -> str:
        if self.k is not None:
            return f"k = {self.k}"
        budget = "" if self.mean_k is None else f"mean k {self.mean_k:g}"
        if self.router is not None:
            return f"{self.router}, {budget}" if budget else self.router
        return budget or "as trained"


def session_parser(description: str | None) -> Parser:
    """A recipe, what was trained, the ways to route, the data."""
    parser = Parser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", help="a recipe, or the config.yaml of a run")
    parser.add_argument("overrides", nargs="*", metavar="key.path=value")
    parser.add_argument(
        "--data", type=Path, required=True, help="samples: a folder that `gemoe data convert` wrote"
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    add_routing(parser)
    parser.add_argument(
        "--batch",
        type=at_least_one,
        default=64,
        help="samples a forward pass of a rank, at most (64)",
    )
    return parser


def add_routing(parser: Parser) -> None:
    """What was trained, and the ways to route."""
    parser.add_argument(
        "--trained", type=Path, help="run folder, or one checkpoint; its trained weights are loaded"
    )
    parser.add_argument(
        "--k", type=at_least_one, nargs="+", help="fixed k of the base model, one or several"
    )
    parser.add_argument(
        "--router",
        nargs="+",
        metavar="NAME",
        help="routers without weights of their own, by name or '{name: score, k_low: 2}', on the "
        "gates of the base model, or on those that --trained has tuned",
    )
    parser.add_argument(
        "--mean-k",
        type=float,
        nargs="+",
        help="mean experts per token, one or several; one number of the router is moved to meet it",
    )
    parser.add_argument(
        "--per-layer", action="store_true", help="every layer meets --mean-k, each by a number"
    )
    parser.add_argument(
        "--rescale", action="store_true", help="gemoe: meet --mean-k by a factor, not by a shift"
    )
    parser.add_argument(
        "--calibrate",
        type=Path,
        help="samples on which --mean-k is met (default: data.validation_path, what data.holdout "
        "keeps, or data.train_path)",
    )
    parser.add_argument(
        "--calibration-samples",
        type=at_least_one,
        default=512,
        help="number of --calibrate samples (default: 512)",
    )
    parser.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)


def evaluate_parser(description: str | None) -> Parser:
    """These, and those of `gemoe evaluate` alone."""
    parser = session_parser(description)
    parser.add_argument("--limit", type=at_least_one, help="use only the first samples, this many")
    parser.add_argument("--name", help="name of the method in eval.json (default: the router's)")
    parser.add_argument(
        "--flips",
        action="store_true",
        help="also run in float32; write the share of tokens whose k differs to k_flips.json",
    )
    parser.add_argument(
        "--skip-done", action="store_true", help="skip evaluations that --out already holds"
    )
    return parser


def check_routing(arguments: argparse.Namespace) -> None:
    """ConfigError for ways to route that contradict each other, or none at all."""
    if not (arguments.trained or arguments.k or arguments.router):
        raise ConfigError(
            "give --trained RUN (what it trained), --k K ... (static) or --router NAME (untrained)"
        )
    if arguments.mean_k and not (arguments.trained or arguments.router):
        raise ConfigError("--mean-k goes with --trained RUN or --router NAME")
    for option in ("per_layer", "rescale"):
        if getattr(arguments, option) and not arguments.mean_k:
            raise ConfigError(f"--{option.replace('_', '-')} says how --mean-k is met; give it too")


def check_evaluation(arguments: argparse.Namespace) -> None:
    """The same, for `gemoe evaluate` alone."""
    check_routing(arguments)
    if arguments.trained and arguments.k:
        raise ConfigError("give --trained RUN (what it trained) or --k K ... (static), not both")
    if arguments.flips and (arguments.k or arguments.router or arguments.mean_k):
        raise ConfigError(
            "--flips compares the k of a trained router as it is: leave --mean-k and --router out; "
            "a static k never flips"
        )
    if arguments.flips and arguments.skip_done:
        raise ConfigError("--flips compares what is evaluated now; leave --skip-done out")
    check_name(arguments.name)


def check_name(name: str | None) -> None:
    if name and not re.fullmatch(r"[a-z0-9_]+", name):
        raise ConfigError(f"--name {name}: lower case letters, digits and _ only")


def modes(arguments: argparse.Namespace, routers: Iterable[str] = ()) -> list[RoutingMode]:
    """The static ones; then what was trained, or --router, with every budget if there are some.

    `routers`: the names that --router gives.
    """
    if arguments.out.exists() and not arguments.out.is_dir():
        raise ConfigError(f"--out {arguments.out}: is a file; give a folder")
    static = [RoutingMode(f"k_{k}", k=k) for k in arguments.k or []]
    budgets = arguments.mean_k or [None]
    if arguments.router:
        return static + [
            RoutingMode(name if k is None else f"{name}_mean_k_{k:g}", mean_k=k, router=name)
            for name in routers
            for k in budgets
        ]
    if not arguments.trained:
        return static
    return static + [
        RoutingMode("trained" if k is None else f"mean_k_{k:g}", mean_k=k) for k in budgets
    ]
