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
from gemoe_ds.evaluation.arguments import Setting, settings, subject_parser

if TYPE_CHECKING:
    import argparse

    from gemoe_ds.data.bad_samples import BadSample
    from gemoe_ds.data.sample import SampleFolder
    from gemoe_ds.evaluation.generate import Work, Written
    from gemoe_ds.evaluation.subject import Subject


def main(argv: list[str], stop: StopRequest | None = None) -> None:
    parser = subject_parser(__doc__)
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
class Found:
    """Of one way to route: answers and counts of this rank, seconds of every round."""

    answers: list[dict[str, Any]] = field(default_factory=list)
    bad: dict[int, BadSample] = field(default_factory=dict)  # samples that are left out, by row
    prompts: Work | None = None
    steps: Work | None = None
    rounds: list[tuple[float, float]] = field(default_factory=list)
    memory: int = 0


def generate_all(arguments: argparse.Namespace, stop: StopRequest | None) -> None:
    from gemoe_ds.cluster.watch import watched
    from gemoe_ds.data.sample import open_samples
    from gemoe_ds.engine.distributed import distributed
    from gemoe_ds.evaluation.subject import Subject, subject_config

    config = subject_config(arguments)
    samples, asked = open_samples(arguments.data), settings(arguments)
    with distributed() as world, watched(world, config.monitor.stall_seconds):
        subject = Subject(arguments, config, world, stop)
        found = {setting: Found() for setting in asked}
        routes = subject.routes(asked)
        for number in range(arguments.rounds + 1):
            for setting in asked:
                routes(setting)
                one_round(subject, samples, setting, found[setting], counted=number == 0)
        report(subject, found, arguments.out)


def one_round(
    subject: Subject, samples: SampleFolder, setting: Setting, found: Found, *, counted: bool
) -> None:
    """All samples once: counted and kept, or timed."""
    import torch

    from gemoe_ds.evaluation.generate import Work
    from gemoe_ds.position import GENERATE
    from gemoe_ds.train.phases import peak_memory

    world = subject.world
    stream = subject.stream(samples, limit=subject.arguments.limit, prompts=True)
    prompts, steps, last = Work(), Work(), None
    if world.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(world.device)
    label = f"{setting}, {'counting' if counted else 'timing'}"
    for batch in subject.shown(stream, GENERATE, label):
        last = batch or (last and last.silenced())
        if last is None:
            raise ConfigError("a rank has no sample at all: use fewer ranks than samples")
        written = write(subject, last, counted=counted)
        prompts, steps = prompts + written.prompts, steps + written.steps
        if counted and batch is not None:
            found.bad |= {bad.row: bad for bad in batch.bad}
            found.answers += answered(subject, samples, batch, written)
    if counted:
        found.bad = left_out(subject, samples, found)
        found.prompts, found.steps = prompts, steps
    else:
        found.rounds.append((prompts.seconds, steps.seconds))
    found.memory = max(found.memory, peak_memory(world.device))


def left_out(subject: Subject, samples: SampleFolder, found: Found) -> dict[int, BadSample]:
    """What all ranks have left out; DataError if it is too much. Collective."""
    from gemoe_ds.data.bad_samples import listed
    from gemoe_ds.engine.distributed import gather_objects

    log = subject.bad_sample_log(samples)
    for line in listed(log.record(found.bad.values())):
        subject.say(line)
    log.check()
    if not sum(gather_objects(len(found.answers))):
        raise DataError(f"{samples.path}: none of the samples that were asked for can be used")
    return {bad.row: bad for bad in log.samples}


def write(subject: Subject, batch: Any, *, counted: bool) -> Written:
    from gemoe_ds.engine.distributed import any_over_ranks
    from gemoe_ds.evaluation.generate import alone, generate

    arguments, world = subject.arguments, subject.world
    shares_experts = subject.config.parallel.ep_size > 1
    return generate(
        subject.model,
        batch.to(world.device),
        max_new_tokens=arguments.max_new_tokens,
        end_ids=subject.collator.end_ids,
        temperature=arguments.temperature,
        seed=subject.config.seed,
        any_rank=(lambda here: any_over_ranks(here, world.device)) if shares_experts else alone,
        count=counted,
    )


def answered(
    subject: Subject, samples: SampleFolder, batch: Any, written: Written
) -> list[dict[str, Any]]:
    """Question, what was written, and what the data says, of every sample that is not left out."""
    tokenizer: Any = subject.collator.tokenizer
    found = []
    left_out = {bad.row for bad in batch.bad}
    for row, ids in zip(batch.rows, written.token_ids, strict=True):
        if row in left_out:
            continue
        sample = samples[row]
        ended = ids and ids[-1] in subject.collator.end_ids
        text = tokenizer.decode(ids[:-1] if ended else ids).strip()  # <|ref|> is text as well
        turn = sample.turns[-1]
        found.append(
            {"id": sample.id, "question": turn.human, "answer": text, "expected": turn.gpt}
            | {"tokens": len(ids)}
        )
    return found


def report(subject: Subject, found: dict[Setting, Found], out: Path) -> None:
    """Everything of all ranks, written by the first one. Collective."""
    from gemoe_ds.analysis.provenance import provenance
    from gemoe_ds.engine.distributed import gather_objects
    from gemoe_ds.evaluation.generate import Work
    from gemoe_ds.evaluation.throughput import Cost, as_json, as_markdown

    costs = []
    for setting, mine in found.items():
        ranks: list[Found] = gather_objects(mine)
        if not subject.world.is_first:
            continue
        answers = sorted((a for rank in ranks for a in rank.answers), key=lambda a: str(a["id"]))
        folder = out / setting.folder
        folder.mkdir(parents=True, exist_ok=True)
        lines = (json.dumps(answer, ensure_ascii=False) for answer in answers)
        (folder / "answers.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
        by_round = zip(*(rank.rounds for rank in ranks), strict=True)
        rounds = [tuple(map(max, zip(*together, strict=True))) for together in by_round]
        counts = [sum((getattr(r, n) for r in ranks), Work()) for n in ("prompts", "steps")]
        memory = max(rank.memory for rank in ranks)
        costs.append(
            Cost.of(str(setting), subject.model, *counts, len(answers), rounds, memory)  # type: ignore[arg-type]
        )
    if subject.world.is_first:
        shape = {"ranks": subject.world.size, "batch": subject.arguments.batch}
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
