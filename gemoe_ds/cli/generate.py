"""Write answers, with a trained router or a fixed k, and measure their cost.

    gemoe generate RECIPE --k 8 --data TEST --out DIR                    the base model
    gemoe generate RUN/config.yaml --trained RUN --k 8 --data TEST --out DIR
                                            the base model at k = 8, then the trained router
    ... --mean-k 3 4 5                      the trained router, at 3, 4 and 5 experts on average
    gemoe generate RECIPE --router score --mean-k 4 --data TEST --out DIR            no training

The model writes the last answer of every sample, given the conversation before it: greedily, or
sampled at --temperature. DIR/<routing>/answers.jsonl holds the answers; DIR/throughput.json and .md
hold experts, operations, memory, tokens/s and seconds per sample. --rounds 3 times every routing
three times, in turn, after a first pass that counts. Runs alone or under `deepspeed` or `torchrun`;
samples are split over ranks.
"""

from __future__ import annotations

import math

from gemoe_ds.cluster.stopping import StopRequest
from gemoe_ds.errors import ConfigError, exit_on_error
from gemoe_ds.evaluation.arguments import check_routing, session_parser
from gemoe_ds.parser import at_least_one


def main(argv: list[str] | None = None, stop: StopRequest | None = None) -> None:
    if argv is None:  # signals are heeded before imports that take seconds
        stop = StopRequest().listen()
    parser = session_parser(__doc__)
    parser.add_argument(
        "--max-new-tokens", type=at_least_one, default=64, help="limit of an answer (default: 64)"
    )
    parser.add_argument(
        "--temperature", type=float, default=0.0, help="of sampling (default: 0, greedy)"
    )
    parser.add_argument("--limit", type=at_least_one, help="use only the first samples, this many")
    parser.add_argument(
        "--rounds",
        type=at_least_one,
        default=1,
        help="how often each routing is timed (default: 1)",
    )
    parser.add_argument(
        "--cuda-graph",
        action="store_true",
        help="timed rounds launch a step as one CUDA graph, where it can be captured",
    )
    arguments = parser.parse_or_exit(argv)
    with exit_on_error():
        check_routing(arguments)
        if not 0 <= arguments.temperature < math.inf:
            raise ConfigError("--temperature is 0 or more")
        from gemoe_ds.evaluation.answers import generate_all

        generate_all(arguments, stop)


if __name__ == "__main__":
    main()
