#!/usr/bin/env python3
"""Score a run, or the untouched backbone at several k, on held-out conversations.

    launch/evaluate.py RECIPE --k 8 5 2 --data TEST --out DIR      static top-k, as the backbone is
    launch/evaluate.py RUN/config.yaml --trained RUN --data TEST --out DIR     what a run trained
    ... --mean-k 3 4 5                                    and that with so many experts on average

Writes eval.json and tokens.npz for launch/analyze.py, with several k into DIR/k_8, DIR/k_5, ...,
with budgets into DIR/mean_k_4, ... A signal ends it between two batches, with code 75.
Runs alone or, faster, under `deepspeed` or `torchrun`: the samples are split over the ranks.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run from a checkout, uninstalled

from gemoe_ds.cluster.stopping import StopRequest
from gemoe_ds.errors import ConfigError, exit_on_error
from gemoe_ds.evaluation.arguments import RoutingMode, modes, session_parser

if TYPE_CHECKING:
    from gemoe_ds.analysis.record import EvalRecord, TokenSample
    from gemoe_ds.evaluation.score import Scores
    from gemoe_ds.evaluation.session import EvalSession
    from gemoe_ds.models.moe_model import MoEModel

Arguments = argparse.Namespace


def main(argv: list[str], stop: StopRequest | None = None) -> None:
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
        _evaluate(arguments, stop)


def _evaluate(arguments: Arguments, stop: StopRequest | None) -> None:
    from gemoe_ds.analysis.record import RECORD
    from gemoe_ds.cluster.watchdog import watched
    from gemoe_ds.data.sample import open_samples
    from gemoe_ds.engine.world import distributed, gather_objects
    from gemoe_ds.evaluation.session import EvalSession, session_config

    config = session_config(arguments)
    samples = open_samples(arguments.data)
    asked = modes(arguments)
    with distributed() as world, watched(world, config.monitor.stall_seconds):
        session = EvalSession(arguments, config, world, stop)
        for mode in asked:
            out = arguments.out / (mode.folder if len(asked) > 1 or mode.mean_k else "")
            if arguments.skip_done and gather_objects((out / RECORD).exists())[0]:
                session.say(f"done before: {out}")
                continue
            session.set_routing(mode)
            name = config.model.router.name
            k = session.model.moe_layers[0].router.static_k
            session.say(f"evaluating {name}{'' if k is None else f' k={k}'}")
            began = time.perf_counter()
            scores = session.scored(samples)
            if world.is_first:
                seconds = time.perf_counter() - began
                _write(session, mode, out, scores, k, seconds)
        if arguments.flips:
            session.say("evaluating in float32, for the k that differ")
            in_float32 = session_config(arguments, "model.dtype=float32")
            exact = EvalSession(arguments, in_float32, world, stop).scored(samples)
            if world.is_first:
                _write_flips(arguments.out, config.model.dtype, scores, exact)


def _write(
    session: EvalSession,
    mode: RoutingMode,
    out: Path,
    scores: Scores,
    k: int | None,
    seconds: float,
) -> None:
    from gemoe_ds.analysis.record import write_record
    from gemoe_ds.train.monitor import seconds_in

    arguments, name = session.arguments, session.config.model.router.name
    tuned = arguments.trained and name == "top_k"
    record, tokens = _record(
        session.model,
        scores,
        method=arguments.name or (f"{name}_tuned" if tuned else name),
        k=k,
        budget_k=mode.mean_k,
        seed=session.config.seed,
        seconds=seconds,
        train_seconds=seconds_in(arguments.trained) if arguments.trained else None,
        checkpoint=str(session.checkpoint or session.config.model.checkpoint),
    )
    write_record(out, record, tokens)
    session.say(
        f"{out}: accuracy {100 * record.accuracy:.2f} %, mean k {record.mean_k:.2f} "
        f"({record.seconds:.1f} s)"
    )
    if record.num_not_asked:
        session.say(
            f"{out}: {scores.asked.total():,} questions were asked; {record.num_not_asked:,} were "
            f"not: data.max_length={session.config.data.max_length} cuts the answers of "
            f"{record.num_cut_answers:,}, and {len(scores.bad):,} samples are left out"
        )


def _write_flips(out: Path, dtype: str, scores: Scores, exact: Scores) -> None:
    """The share of tokens, layer by layer, that get another number of experts than in float32."""
    from gemoe_ds.analysis.provenance import provenance

    _, k_LN, _ = scores.tokens()
    _, exact_LN, _ = exact.tokens()
    flipped_L = (k_LN != exact_LN).mean(1).tolist()
    report = {"dtype": dtype, "tokens": k_LN.shape[1], "flipped_per_layer": flipped_L}
    (out / "k_flips.json").write_text(json.dumps(report | provenance(), indent=1) + "\n")
    shares = " ".join(f"{100 * share:.3f}" for share in flipped_L)
    print(f"{out}/k_flips.json: k differs from float32 in {shares} % of the tokens, by layer")


def _record(model: MoEModel, scores: Scores, **identity: Any) -> tuple[EvalRecord, TokenSample]:
    """What one evaluation leaves behind; `identity` says what was evaluated."""
    from gemoe_ds.analysis.provenance import provenance
    from gemoe_ds.analysis.record import EvalRecord, TokenSample, routing_summary

    entropy_LN, k_LN, is_vision_N = scores.tokens()
    routing = routing_summary(entropy_LN, k_LN, is_vision_N, scores.load_LE)
    record = EvalRecord(
        backbone_k=model.routing[0].top_k,
        accuracy=scores.accuracy,
        accuracy_by_kind=scores.accuracy_by_kind,
        num_questions_by_kind=dict(sorted(scores.asked.items())),
        accuracy_micro=scores.accuracy_micro,
        num_not_asked_by_kind=dict(sorted(scores.not_asked.items())),
        num_cut_answers=scores.cut_answers,
        left_out=[asdict(scores.bad[row]) for row in sorted(scores.bad)],
        activated_parameters=model.activated_parameters(routing["mean_k_per_layer"]),
        total_parameters=model.num_parameters,
        **identity,
        **routing,
        **provenance(),
    )
    return record, TokenSample.draw(entropy_LN, k_LN, is_vision_N)


if __name__ == "__main__":
    main(sys.argv[1:], StopRequest().listen())  # before imports that take seconds
