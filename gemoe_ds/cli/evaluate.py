"""Score a run, or the untouched backbone at several k, on held-out conversations.

    gemoe evaluate RECIPE --k 8 5 2 --data TEST --out DIR      static top-k, as the backbone is
    gemoe evaluate RUN/config.yaml --trained RUN --data TEST --out DIR     what a run trained
    ... --mean-k 3 4 5                                    and that with so many experts on average

Writes eval.json and tokens.npz for `gemoe analyze`, with several k into DIR/k_8, DIR/k_5, ...,
with budgets into DIR/mean_k_4, ... A signal ends it between two batches, with code 75.
Runs alone or, faster, under `deepspeed` or `torchrun`: the samples are split over the ranks.
"""

from __future__ import annotations

import re

from gemoe_ds.cluster.stopping import StopRequest
from gemoe_ds.errors import ConfigError, exit_on_error
from gemoe_ds.evaluation.arguments import session_parser


def main(argv: list[str] | None = None, stop: StopRequest | None = None) -> None:
    if argv is None:  # signals are heeded before imports that take seconds
        stop = StopRequest().listen()
    parser = session_parser(__doc__)
    parser.add_argument("--name", help="method in the record (default: the router's name)")
    parser.add_argument(
        "--flips",
        action="store_true",
        help="also run in float32; write whose k differs: k_flips.json",
    )
    parser.add_argument(
        "--skip-done", action="store_true", help="leave out what --out holds already"
    )
    arguments = parser.parse_or_exit(argv)
    with exit_on_error():
        if (arguments.trained is None) == (arguments.k is None):
            raise ConfigError(
                "give --trained RUN (what it trained) or --k K ... (static), not both"
            )
        if arguments.flips and arguments.k:
            raise ConfigError("--flips compares the k of a trained router; a static k never flips")
        if arguments.mean_k and (arguments.k or arguments.flips):
            raise ConfigError("--mean-k goes with --trained RUN, without --k and --flips")
        if arguments.flips and arguments.skip_done:
            raise ConfigError("--flips compares what is evaluated now; leave --skip-done out")
        if arguments.name and not re.fullmatch(r"[a-z0-9_]+", arguments.name):
            raise ConfigError(f"--name {arguments.name}: lower case letters, digits and _ only")
        from gemoe_ds.evaluation.records import evaluate_all

        evaluate_all(arguments, stop)


if __name__ == "__main__":
    main()
