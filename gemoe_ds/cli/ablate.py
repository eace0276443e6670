"""Measure what a token loses without one of its experts, and which number foretells it.

    gemoe ablate RECIPE --k 8 --data VALIDATION --out DIR                the base model at fixed k
    gemoe ablate RUN/config.yaml --trained RUN --data VALIDATION --out DIR    the trained router

Of every sample --pairs pairs of a token and one of its experts are drawn. Each is left out alone,
and the loss of its sample is compared with that of all experts. DIR/ablation.json and the table say
how well the score, score x norm, the rank and the entropy rank the pairs; DIR/ablation.npz holds
the pairs. With the --out of `gemoe evaluate`, `gemoe analyze` shows them in its report. Costs are
small: use model.dtype=float32. Runs alone or under `deepspeed` or `torchrun`.
"""

from __future__ import annotations

from gemoe_ds.cluster.stopping import StopRequest
from gemoe_ds.errors import exit_on_error
from gemoe_ds.evaluation.arguments import check_evaluation, session_parser
from gemoe_ds.parser import at_least_one


def main(argv: list[str] | None = None, stop: StopRequest | None = None) -> None:
    if argv is None:  # signals are heeded before imports that take seconds
        stop = StopRequest().listen()
    parser = session_parser(__doc__)
    parser.add_argument("--name", help="name of the method (default: the router's)")
    parser.add_argument(
        "--pairs", type=at_least_one, default=16, help="pairs of every sample (default: 16)"
    )
    parser.add_argument(
        "--limit",
        type=at_least_one,
        default=512,
        help="use only the first samples, this many (default: 512)",
    )
    parser.set_defaults(flips=False, skip_done=False)
    arguments = parser.parse_or_exit(argv)
    with exit_on_error():
        check_evaluation(arguments)
        from gemoe_ds.evaluation.ablate import ablate_all

        ablate_all(arguments, stop)


if __name__ == "__main__":
    main()
