"""Write answers, as a run has learnt or at a static k, and what they cost.

    gemoe generate RECIPE --k 8 --data TEST --out DIR                    as the backbone is
    gemoe generate RUN/config.yaml --trained RUN --k 8 --data TEST --out DIR
                                            the backbone at k = 8, then what the run trained
    ... --mean-k 3 4 5                      and that with so many experts on average

Every sample's last answer is written, given the conversation before it: greedily, or sampled at
--temperature. Leaves DIR/<routing>/answers.jsonl, and DIR/throughput.json and .md: experts,
operations, memory, tokens/s and seconds a sample. --rounds 3 times them again, in turn, after
a first pass that counts. Runs alone or under `deepspeed` or `torchrun`, samples split over ranks.
"""

from __future__ import annotations

from gemoe_ds.cluster.stopping import StopRequest
from gemoe_ds.errors import ConfigError, exit_on_error
from gemoe_ds.evaluation.arguments import session_parser


def main(argv: list[str] | None = None, stop: StopRequest | None = None) -> None:
    if argv is None:  # signals are heeded before imports that take seconds
        stop = StopRequest().listen()
    parser = session_parser(__doc__)
    parser.add_argument("--max-new-tokens", type=int, default=64, help="of an answer (default: 64)")
    parser.add_argument("--temperature", type=float, default=0.0, help="0, the default: greedy")
    parser.add_argument("--limit", type=int, help="the first so many samples only")
    parser.add_argument("--rounds", type=int, default=1, help="times each way is timed")
    arguments = parser.parse_or_exit(argv)
    with exit_on_error():
        if not (arguments.k or arguments.trained):
            raise ConfigError("give --trained RUN, or --k K ... (static), or both")
        if min(arguments.max_new_tokens, arguments.rounds, arguments.batch) < 1:
            raise ConfigError("--max-new-tokens, --rounds and --batch are 1 at least")
        if arguments.limit is not None and arguments.limit < 1:
            raise ConfigError("--limit is 1 at least")
        if arguments.temperature < 0:
            raise ConfigError("--temperature is 0 or more")
        from gemoe_ds.evaluation.answers import generate_all

        generate_all(arguments, stop)


if __name__ == "__main__":
    main()
