"""Evaluate a run, or the base model at several k, on held-out conversations.

    gemoe evaluate RECIPE --k 8 5 2 --data TEST --out DIR      the base model at fixed k
    gemoe evaluate RUN/config.yaml --trained RUN --data TEST --out DIR     the trained router
    ... --mean-k 3 4 5                      the trained router, at 3, 4 and 5 experts on average

Writes eval.json and routing.npz for `gemoe analyze`, and questions.npz (right or wrong, question by
question): several k into DIR/k_8, DIR/k_5, ..., several --mean-k into DIR/mean_k_4, ... A signal
ends it between two batches, with exit code 75.
Runs alone or, faster, under `deepspeed` or `torchrun`: the samples are split over the ranks.
"""

from __future__ import annotations

from gemoe_ds.cluster.stopping import StopRequest
from gemoe_ds.errors import exit_on_error
from gemoe_ds.evaluation.arguments import check_evaluation, evaluate_parser


def main(argv: list[str] | None = None, stop: StopRequest | None = None) -> None:
    if argv is None:  # signals are heeded before imports that take seconds
        stop = StopRequest().listen()
    parser = evaluate_parser(__doc__)
    arguments = parser.parse_or_exit(argv)
    with exit_on_error():
        check_evaluation(arguments)
        from gemoe_ds.evaluation.records import evaluate_all

        evaluate_all(arguments, stop)


if __name__ == "__main__":
    main()
