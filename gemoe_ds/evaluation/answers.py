"""Write the answers of every way to route, and what they cost, in turns.

Each way leaves its answers.jsonl and routing.npz; throughput.json and .md hold the costs side by
side.
"""

from __future__ import annotations

import json
from argparse import Namespace
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from gemoe_ds.analysis.provenance import provenance
from gemoe_ds.analysis.record import ROUTING
from gemoe_ds.analysis.routing_sums import RoutingSums
from gemoe_ds.cluster.stopping import StopRequest
from gemoe_ds.cluster.watchdog import watched
from gemoe_ds.data.bad_samples import BadSample, listed
from gemoe_ds.data.collate import Batch
from gemoe_ds.data.sample import SampleFolder, open_samples
from gemoe_ds.engine.world import ALL_RANKS, any_over_ranks, distributed, gather_objects
from gemoe_ds.errors import ConfigError, DataError
from gemoe_ds.evaluation.arguments import RoutingMode, modes
from gemoe_ds.evaluation.generate import (
    GenerationStats,
    Written,
    alone,
    generate,
    may_use_graph,
)
from gemoe_ds.evaluation.routing import RoutingCounter, over_ranks
from gemoe_ds.evaluation.session import EvalSession, chosen_routers, session_config
from gemoe_ds.evaluation.throughput import Cost, as_json, as_markdown
from gemoe_ds.progress import GENERATE
from gemoe_ds.train.profiling import peak_memory


@dataclass
class ModeResult:
    """Of one way to route: answers and counts of this rank, seconds of every round."""

    answers: list[dict[str, Any]] = field(default_factory=list)
    bad: dict[int, BadSample] = field(default_factory=dict)  # samples that are left out, by row
    prompts: GenerationStats = field(default_factory=GenerationStats)
    steps: GenerationStats = field(default_factory=GenerationStats)
    rounds: list[tuple[float, float]] = field(default_factory=list)
    memory: int = 0
    routing: RoutingSums | None = None  # a document is a row of the data


def generate_all(arguments: Namespace, stop: StopRequest | None) -> None:
    """All samples with every routing, counted once and then timed in turns. Collective."""
    config = session_config(arguments)
    samples, asked = open_samples(arguments.data), modes(arguments, chosen_routers(arguments))
    with distributed() as world, watched(world, config.monitor.stall_seconds):
        session = EvalSession(arguments, config, world, stop)
        session.check_budgets(asked)
        if arguments.cuda_graph:
            arguments.cuda_graph = may_use_graph(
                session.model, arguments.batch, recorded=False, say=session.say
            )
        found = {mode: ModeResult() for mode in asked}
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
    result: ModeResult,
    *,
    counted: bool,
) -> None:
    """All samples once: counted and kept, or timed."""
    world = session.world
    stream = session.stream(samples, limit=session.arguments.limit, prompts=True)
    prompts, steps, last = GenerationStats(), GenerationStats(), None
    counter = RoutingCounter.of(session.model) if counted else None
    if world.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(world.device)
    label = f"{mode}, {'counting' if counted else 'timing'}"
    for batch in session.iterate(stream, GENERATE, label):
        last = batch or (last and last.silenced())
        if last is None:
            raise ConfigError("a rank has no sample at all: use fewer ranks than samples")
        written = write(session, last, counter)
        prompts, steps = prompts + written.prompts, steps + written.steps
        if counted and batch is not None:
            result.bad |= {bad.row: bad for bad in batch.bad}
            result.answers += answered(session, samples, batch, written)
    if counter:
        result.routing = over_ranks(counter.sums, ALL_RANKS, world.device)
        result.bad = left_out(session, samples, result)
        result.prompts, result.steps = prompts, steps
    else:
        result.rounds.append((prompts.seconds, steps.seconds))
    result.memory = max(result.memory, peak_memory(world.device))


def left_out(
    session: EvalSession, samples: SampleFolder, result: ModeResult
) -> dict[int, BadSample]:
    """What all ranks have left out; DataError if it is too much. Collective."""
    log = session.bad_sample_log(samples)
    for line in listed(log.record(result.bad.values())):
        session.say(line)
    log.check()
    if not sum(gather_objects(len(result.answers))):
        raise DataError(f"{samples.path}: none of the samples that were asked for can be used")
    return {bad.row: bad for bad in log.samples}


def write(session: EvalSession, batch: Batch, counter: RoutingCounter | None) -> Written:
    arguments, world = session.arguments, session.world
    batch, ctx, rows = batch.to(world.device), session.model.ctx, np.array(batch.rows)
    shares_experts = session.config.ep_size > 1
    return generate(
        session.model,
        batch,
        max_new_tokens=arguments.max_new_tokens,
        end_ids=session.collator.end_ids,
        temperature=arguments.temperature,
        seed=session.config.seed,
        any_rank=(lambda here: any_over_ranks(here, world.device)) if shares_experts else alone,
        count=counter is not None,
        after_forward=counter.while_writing(ctx, batch.is_vision_BS, rows) if counter else None,
        cuda_graph=arguments.cuda_graph and counter is None,
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
        sample = samples.outline(row)
        ended = ids and ids[-1] in session.collator.end_ids
        text = tokenizer.decode(ids[:-1] if ended else ids).strip()  # <|ref|> is text as well
        question, expected = sample.questions[-1], sample.answers[-1].content.strip()
        found.append(
            {"id": sample.id, "question": question, "answer": text, "expected": expected}
            | {"tokens": len(ids)}
        )
    return found


def report(session: EvalSession, found: dict[RoutingMode, ModeResult], out: Path) -> None:
    """Everything of all ranks, written by the first one. Collective."""
    costs = []
    for mode, mine in found.items():
        routing, mine.routing = mine.routing, None  # it is that of all ranks already
        ranks: list[ModeResult] = gather_objects(mine)
        if not session.world.is_first:
            continue
        answers = sorted((a for rank in ranks for a in rank.answers), key=lambda a: str(a["id"]))
        folder = out / mode.folder
        folder.mkdir(parents=True, exist_ok=True)
        lines = (json.dumps(answer, ensure_ascii=False) for answer in answers)
        (folder / "answers.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
        assert routing is not None
        routing.save(folder / ROUTING)
        by_round = zip(*(rank.rounds for rank in ranks), strict=True)
        rounds = [(max(p for p, _ in spent), max(s for _, s in spent)) for spent in by_round]
        prompts = sum((rank.prompts for rank in ranks), GenerationStats())
        steps = sum((rank.steps for rank in ranks), GenerationStats())
        memory = max(rank.memory for rank in ranks)
        costs.append(
            Cost.of(str(mode), session.model, prompts, steps, len(answers), rounds, memory)
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
