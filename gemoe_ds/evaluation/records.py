"""Evaluate with every routing that is asked for; each leaves a record (analysis/record.py)."""

from __future__ import annotations

import json
import os
import time
from argparse import Namespace
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from gemoe_ds.analysis.provenance import named_from_here, provenance
from gemoe_ds.analysis.record import (
    RECORD,
    EvalRecord,
    load_json,
    read_record,
    routing_summary,
    write_record,
)
from gemoe_ds.analysis.routing_sums import MAX_TOKENS
from gemoe_ds.cluster.stopping import StopRequest
from gemoe_ds.cluster.watchdog import watched
from gemoe_ds.config import RunConfig
from gemoe_ds.data.sample import SampleFolder, open_samples
from gemoe_ds.data.token_kinds import TOKEN_KINDS
from gemoe_ds.engine.world import broadcast_from_first, distributed, gather_objects
from gemoe_ds.errors import ConfigError, DataError, as_written
from gemoe_ds.evaluation.arguments import (
    RoutingMode,
    check_evaluation,
    evaluate_parser,
    modes,
)
from gemoe_ds.evaluation.origin import Origin, origin_of
from gemoe_ds.evaluation.score import Scores
from gemoe_ds.evaluation.session import EvalSession, chosen_routers, routing_of, session_config
from gemoe_ds.evaluation.untrained import is_rule
from gemoe_ds.models.moe_model import MoEModel
from gemoe_ds.train.monitor import seconds_in

MAX_FLIPS = 1_000_000  # tokens that --flips compares; of more, a sample of so many


def evaluate(
    config: RunConfig | Mapping[str, Any] | str | Path,
    *overrides: str,
    data: str | Path,
    out: str | Path,
    trained: str | Path | None = None,
    k: int | Sequence[int] = (),
    mean_k: float | Sequence[float] = (),
    router: str | Mapping[str, Any] | Sequence[str | Mapping[str, Any]] = (),
    per_layer: bool = False,
    batch: int | None = None,
    stop: StopRequest | None = None,
) -> dict[str, EvalRecord]:
    """Score a run, or the untouched model at several k, as `gemoe evaluate` does.

    Args:
        config: a `RunConfig`, the same as a dict, or the path or name of a recipe (a run's own is
            RUN/config.yaml).
        overrides: `key.path=value`.
        data: folder of converted samples.
        out: folder of the results.
        trained: the run whose trained parts are loaded; or else
        k: experts a token, static, one evaluation each.
        mean_k: budgets for what was trained or for `router`, mean experts a token, one evaluation
            each.
        router: routers without weights of their own, by name or as {"name": "score", "k_low": 2},
            on the gates of the base model, or on those that `trained` has tuned.
        per_layer: every layer meets `mean_k` by itself.
        batch: samples per rank in one forward pass; None: 64.
        stop: ask it to stop, and the evaluation ends between two batches.

    Returns:
        By folder in `out` ("." for `out` itself): the record that eval.json holds there, with
        `accuracy` (0 to 1), `mean_k`, `mean_k_per_layer`, ... The same on every rank.

    Raises:
        ConfigError, DataError, CheckpointError: what is given cannot be used, in one line.
        Stopped: `stop` was asked.

    Source: accuracy is greedy exact match, the mean over kinds of questions.
    """
    arguments = evaluate_parser(None).parse_args(["-", "--data", str(data), "--out", str(out)])
    arguments.recipe, arguments.overrides = config, list(overrides)
    arguments.trained = None if trained is None else Path(trained)
    arguments.k, arguments.mean_k = _listed("k", k), _listed("mean_k", mean_k)
    one = isinstance(router, str | Mapping)
    arguments.router = [router] if one else list(router)
    arguments.per_layer = per_layer
    if batch is not None:
        if batch < 1:
            raise ConfigError(f"batch={batch}: must be at least 1")
        arguments.batch = batch
    check_evaluation(arguments)
    return {
        os.path.relpath(folder, out): read_record(folder)[0]
        for folder in evaluate_all(arguments, stop)
    }


def _listed(name: str, given: Any) -> list[Any] | None:
    """One number or several; None for none."""
    numbers = [given] if isinstance(given, int | float) else list(given)
    for number in numbers:
        if isinstance(number, bool) or not isinstance(number, int | float) or number <= 0:
            raise ConfigError(f"{name}={given!r}: numbers above 0 are wanted")
    return numbers or None


def evaluate_all(arguments: Namespace, stop: StopRequest | None) -> list[Path]:
    """All samples once with every routing; a line and a folder each. Collective."""
    config = session_config(arguments)
    samples = open_samples(arguments.data)
    asked = modes(arguments, chosen_routers(arguments))
    folders = []
    with distributed() as world, watched(world, config.monitor.stall_seconds):
        session = EvalSession(arguments, config, world, stop)
        session.check_budgets(asked)
        origin = origin_of(config.model.checkpoint, session.checkpoint, world)
        for mode in asked:
            out = arguments.out / (mode.folder if len(asked) > 1 or mode.mean_k else "")
            folders.append(out)
            told = told_of(arguments, config, mode, origin, samples)
            if broadcast_from_first(partial(is_done, arguments, out, told), world):
                session.say(f"done before: {out}")
                continue
            session.set_routing(mode)
            router = session.model.moe_layers[0].router
            k = router.static_k
            session.say(f"evaluating {router.name}{'' if k is None else f' k={k}'}")
            began = time.perf_counter()
            max_tokens = MAX_FLIPS if arguments.flips else MAX_TOKENS
            scores = session.scored(samples, arguments.limit, max_tokens)
            if world.is_first:
                seconds = time.perf_counter() - began
                write_scores(session, mode, out, scores, k, seconds, told)
        if arguments.flips:
            session.say("evaluating in float32, for the k that differ")
            in_float32 = session_config(arguments, "model.dtype=float32")
            exact_session = EvalSession(arguments, in_float32, world, stop)
            exact = exact_session.scored(samples, arguments.limit, MAX_FLIPS)
            if world.is_first:
                write_flips(arguments.out, config.model.dtype, scores, exact)
        gather_objects(None)  # the first rank has written
    return folders


def told_of(
    arguments: Namespace,
    config: RunConfig,
    mode: RoutingMode,
    origin: Origin,
    samples: SampleFolder,
) -> dict[str, Any]:
    """What eval.json says, and is known before, of what is evaluated on what."""
    static = {} if mode.k is None else {"k": mode.k}
    return {
        "router": routing_of(arguments, config, mode) | static,
        "dtype": config.model.dtype,
        **origin.told(),
        "data": named_from_here(samples.path),
        "data_fingerprint": samples.fingerprint,
        "limit": arguments.limit,
    }


def is_done(arguments: Namespace, out: Path, told: Mapping[str, Any]) -> bool:
    """Whether the evaluation is there and --skip-done keeps it; says what is written over.

    ConfigError where --skip-done meets the evaluation of something else.
    """
    if not (out / RECORD).exists():
        return False
    try:
        found = load_json(out / RECORD, EvalRecord, "run the evaluation again")
    except DataError:
        if arguments.skip_done:
            raise
        return False
    if found.data_fingerprint is None:  # an earlier version did not say
        return bool(arguments.skip_done)
    other = [name for name in told if name != "data" and getattr(found, name) != told[name]]
    if not other:
        return bool(arguments.skip_done)
    what = f"{other[0]} {as_written(getattr(found, other[0]))}, not {as_written(told[other[0]])}"
    if arguments.skip_done:
        raise ConfigError(
            f"{out} holds another evaluation ({what}): give another --out, or remove it"
        )
    print(f"{out}: another evaluation was there ({what}) and is written over", flush=True)
    return False


def write_scores(
    session: EvalSession,
    mode: RoutingMode,
    out: Path,
    scores: Scores,
    k: int | None,
    seconds: float,
    told: dict[str, Any],
) -> None:
    """`told`: by `told_of`."""
    arguments = session.arguments
    record = record_of(
        session.model,
        scores,
        method=method_name(session, mode),
        k=k,
        budget_k=mode.mean_k,
        seed=session.config.seed,
        seconds=seconds,
        train_seconds=seconds_in(arguments.trained) if arguments.trained else None,
        checkpoint=named_from_here(session.checkpoint or session.config.model.checkpoint),
        **told,
    )
    write_record(out, record, scores.routing, scores.questions, scores.samples)
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


def method_name(session: EvalSession, mode: RoutingMode) -> str:
    """As --name says, or the router's."""
    arguments, router = session.arguments, session.model.moe_layers[0].router
    # Of these the run has tuned the gates alone, of which the router's name says nothing.
    rule = mode.router is not None or router.name == "top_k" or is_rule(router)
    tuned = arguments.trained and mode.k is None and rule  # --k is the untouched model
    return arguments.name or (f"{router.name}_tuned" if tuned else router.name)


def write_flips(out: Path, dtype: str, scores: Scores, exact: Scores) -> None:
    """The share of tokens, layer by layer, that get another number of experts than in float32."""
    k_LN, exact_LN = scores.routing.k_LN, exact.routing.k_LN  # the same tokens, in the same order
    assert np.array_equal(scores.routing.hash_N, exact.routing.hash_N)
    flipped_L = (k_LN != exact_LN).mean(1).tolist()
    report = {"dtype": dtype, "tokens": k_LN.shape[1], "flipped_per_layer": flipped_L}
    (out / "k_flips.json").write_text(json.dumps(report | provenance(), indent=1) + "\n")
    shares = " ".join(f"{100 * share:.3f}" for share in flipped_L)
    print(f"{out}/k_flips.json: k differs from float32 in {shares} % of the tokens, by layer")


def record_of(model: MoEModel, scores: Scores, **identity: Any) -> EvalRecord:
    """What one evaluation leaves behind; `identity` says what was evaluated."""
    routing = routing_summary(scores.routing)
    return EvalRecord(
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
        **_by_kind(scores),
        **identity,
        **routing,
        **provenance(),
    )


def _by_kind(scores: Scores) -> dict[str, Any]:
    """Where the experts went, by kind of token and place in the answer."""
    tokens_C, tokens_P = scores.kind_tokens_C, scores.answer_tokens_P
    there = [(c, name) for c, name in enumerate(TOKEN_KINDS) if tokens_C[c]]
    num_places = int(np.flatnonzero(tokens_P).max(initial=-1)) + 1
    return {
        "num_tokens_by_kind": {name: int(tokens_C[c]) for c, name in there},
        "mean_k_by_token_kind": {
            name: (scores.kind_k_LC[:, c] / tokens_C[c]).tolist() for c, name in there
        },
        "num_answer_tokens": tokens_P[:num_places].tolist(),
        "mean_k_in_answer": (scores.answer_k_LP.mean(0) / tokens_P.clip(1))[:num_places].tolist(),
    }
