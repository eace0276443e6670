#!/usr/bin/env python3
"""Write answers with a trained run, or the untouched backbone at several k, and what they cost.

    launch/generate.py RECIPE --k 8 --data TEST --out DIR                    as the backbone is
    launch/generate.py RUN/config.yaml --trained RUN --k 8 --data TEST --out DIR
                                            the backbone at k = 8, then what the run trained
    ... --mean-k 3 4 5                      and that with so many experts on average

Every sample's last answer is written, given the conversation before it: greedily, or sampled at
--temperature. Leaves DIR/<routing>/answers.jsonl, and DIR/throughput.json and .md: experts,
operations, memory, tokens/s and seconds a sample. --rounds 3 times them again, in turn, after
a first pass that counts. Runs alone or under `deepspeed` or `torchrun`, samples split over ranks.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run from a checkout, uninstalled

from gemoe_ds.cluster.stopping import StopRequest
from gemoe_ds.errors import ConfigError, DataError, exit_on_error
from gemoe_ds.evaluation.arguments import RoutingMode, modes, session_parser

if TYPE_CHECKING:
    import argparse

    from gemoe_ds.data.bad_samples import BadSample
    from gemoe_ds.data.sample import SampleFolder
    from gemoe_ds.evaluation.generate import GenerationStats, Written
    from gemoe_ds.evaluation.session import EvalSession


def main(argv: list[str], stop: StopRequest | None = None) -> None:
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
        generate_all(arguments, stop)


@dataclass
class Generated:
    """Of one way to route: answers and counts of this rank, seconds of every round."""

    answers: list[dict[str, Any]] = field(default_factory=list)
    bad: dict[int, BadSample] = field(default_factory=dict)  # samples that are left out, by row
    prompts: GenerationStats | None = None
    steps: GenerationStats | None = None
    rounds: list[tuple[float, float]] = field(default_factory=list)
    memory: int = 0


def generate_all(arguments: argparse.Namespace, stop: StopRequest | None) -> None:
    from gemoe_ds.cluster.watchdog import watched
    from gemoe_ds.data.sample import open_samples
    from gemoe_ds.engine.world import distributed
    from gemoe_ds.evaluation.session import EvalSession, session_config

    config = session_config(arguments)
    samples, asked = open_samples(arguments.data), modes(arguments)
    with distributed() as world, watched(world, config.monitor.stall_seconds):
        session = EvalSession(arguments, config, world, stop)
        found = {mode: Generated() for mode in asked}
        routes = session.routes(asked)
        for number in range(arguments.rounds + 1):
            for mode in asked:
                routes(mode)
                one_round(session, samples, mode, found[mode], counted=number == 0)
        report(session, found, arguments.out)


def one_round(
    session: EvalSession,
    samples: SampleFolder,
    mode: RoutingMode,
    found: Generated,
    *,
    counted: bool,
) -> None:
    """All samples once: counted and kept, or timed."""
    import torch

    from gemoe_ds.evaluation.generate import GenerationStats
    from gemoe_ds.progress import GENERATE
    from gemoe_ds.train.profiling import peak_memory

    world = session.world
    stream = session.stream(samples, limit=session.arguments.limit, prompts=True)
    prompts, steps, last = GenerationStats(), GenerationStats(), None
    if world.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(world.device)
    label = f"{mode}, {'counting' if counted else 'timing'}"
    for batch in session.iterate(stream, GENERATE, label):
        last = batch or (last and last.silenced())
        if last is None:
            raise ConfigError("a rank has no sample at all: use fewer ranks than samples")
        written = write(session, last, counted=counted)
        prompts, steps = prompts + written.prompts, steps + written.steps
        if counted and batch is not None:
            found.bad |= {bad.row: bad for bad in batch.bad}
            found.answers += answered(session, samples, batch, written)
    if counted:
        found.bad = left_out(session, samples, found)
        found.prompts, found.steps = prompts, steps
    else:
        found.rounds.append((prompts.seconds, steps.seconds))
    found.memory = max(found.memory, peak_memory(world.device))


def left_out(session: EvalSession, samples: SampleFolder, found: Generated) -> dict[int, BadSample]:
    """What all ranks have left out; DataError if it is too much. Collective."""
    from gemoe_ds.data.bad_samples import listed
    from gemoe_ds.engine.world import gather_objects

    log = session.bad_sample_log(samples)
    for line in listed(log.record(found.bad.values())):
        session.say(line)
    log.check()
    if not sum(gather_objects(len(found.answers))):
        raise DataError(f"{samples.path}: none of the samples that were asked for can be used")
    return {bad.row: bad for bad in log.samples}


def write(session: EvalSession, batch: Any, *, counted: bool) -> Written:
    from gemoe_ds.engine.world import any_over_ranks
    from gemoe_ds.evaluation.generate import alone, generate

    arguments, world = session.arguments, session.world
    shares_experts = session.config.parallel.ep_size > 1
    return generate(
        session.model,
        batch.to(world.device),
        max_new_tokens=arguments.max_new_tokens,
        end_ids=session.collator.end_ids,
        temperature=arguments.temperature,
        seed=session.config.seed,
        any_rank=(lambda here: any_over_ranks(here, world.device)) if shares_experts else alone,
        count=counted,
    )


def answered(
    session: EvalSession, samples: SampleFolder, batch: Any, written: Written
) -> list[dict[str, Any]]:
    """Question, what was written, and what the data says, of every sample that is not left out."""
    tokenizer: Any = session.collator.tokenizer
    found = []
    left_out = {bad.row for bad in batch.bad}
    for row, ids in zip(batch.rows, written.token_ids, strict=True):
        if row in left_out:
            continue
        sample = samples[row]
        ended = ids and ids[-1] in session.collator.end_ids
        text = tokenizer.decode(ids[:-1] if ended else ids).strip()  # <|ref|> is text as well
        turn = sample.turns[-1]
        found.append(
            {"id": sample.id, "question": turn.human, "answer": text, "expected": turn.gpt}
            | {"tokens": len(ids)}
        )
    return found


def report(session: EvalSession, found: dict[RoutingMode, Generated], out: Path) -> None:
    """Everything of all ranks, written by the first one. Collective."""
    from gemoe_ds.analysis.provenance import provenance
    from gemoe_ds.engine.world import gather_objects
    from gemoe_ds.evaluation.generate import GenerationStats
    from gemoe_ds.evaluation.throughput import Cost, as_json, as_markdown

    costs = []
    for mode, mine in found.items():
        ranks: list[Generated] = gather_objects(mine)
        if not session.world.is_first:
            continue
        answers = sorted((a for rank in ranks for a in rank.answers), key=lambda a: str(a["id"]))
        folder = out / mode.folder
        folder.mkdir(parents=True, exist_ok=True)
        lines = (json.dumps(answer, ensure_ascii=False) for answer in answers)
        (folder / "answers.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
        by_round = zip(*(rank.rounds for rank in ranks), strict=True)
        rounds = [tuple(map(max, zip(*together, strict=True))) for together in by_round]
        counts = [
            sum((getattr(r, n) for r in ranks), GenerationStats()) for n in ("prompts", "steps")
        ]
        memory = max(rank.memory for rank in ranks)
        costs.append(
            Cost.of(str(mode), session.model, *counts, len(answers), rounds, memory)  # type: ignore[arg-type]
        )
    if session.world.is_first:
        shape = {"ranks": session.world.size, "batch": session.arguments.batch}
        bad = [asdict(sample) for sample in next(iter(found.values())).bad.values()]
        content = {"costs": as_json(costs), "left_out": bad} | shape | provenance()
        (out / "throughput.json").write_text(json.dumps(content, indent=1) + "\n")
        table = as_markdown(costs)
        if bad:
            answered = f"{costs[0].samples:,} of {costs[0].samples + len(bad):,}"
            table += f"\n{answered} samples were answered; throughput.json lists those left out\n"
        (out / "throughput.md").write_text(table, encoding="utf-8")
        print(table, end="")


if __name__ == "__main__":
    main(sys.argv[1:], StopRequest().listen())  # before imports that take seconds
