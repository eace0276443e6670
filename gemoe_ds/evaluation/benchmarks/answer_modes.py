"""Answer tasks with every routing that is asked for; each has its folder in --out."""

from __future__ import annotations

import json
from argparse import Namespace
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from gemoe_ds.analysis.benchmarks.files import MODE, Mode, read_mode
from gemoe_ds.analysis.provenance import named_from_here, provenance
from gemoe_ds.analysis.routing_sums import RoutingSums
from gemoe_ds.checkpoint.manifest import newest
from gemoe_ds.cluster.stopping import StopRequest
from gemoe_ds.cluster.watchdog import watched
from gemoe_ds.config import RunConfig
from gemoe_ds.data.chat_template import FolderTemplate
from gemoe_ds.data.mixture import paths_of
from gemoe_ds.data.sample import open_samples
from gemoe_ds.engine.world import World, broadcast_from_first, distributed, gather_objects
from gemoe_ds.errors import ConfigError
from gemoe_ds.evaluation.arguments import RoutingMode, modes
from gemoe_ds.evaluation.benchmarks.answering import Answerer, answer_blocks
from gemoe_ds.evaluation.benchmarks.batch_size import AUTO, tokens_that_fit
from gemoe_ds.evaluation.benchmarks.calibration import calibration_on
from gemoe_ds.evaluation.benchmarks.harnesses import LM_EVAL
from gemoe_ds.evaluation.benchmarks.local_data import DataPlaces
from gemoe_ds.evaluation.benchmarks.parts import (
    ANSWERS,
    PartWriter,
    batch_of,
    found_parts,
    merge_task,
    new_start,
    remove_parts,
    writing_answers,
)
from gemoe_ds.evaluation.benchmarks.plan import TaskPlan, blocks_of, plan_tasks
from gemoe_ds.evaluation.benchmarks.prompt_styles.style import PromptStyle
from gemoe_ds.evaluation.benchmarks.reading import Reader
from gemoe_ds.evaluation.benchmarks.shown import write_shown
from gemoe_ds.evaluation.benchmarks.task_options import TaskOptions
from gemoe_ds.evaluation.benchmarks.tasks import Task
from gemoe_ds.evaluation.benchmarks.vision_prompts import VisionPrompts, refuse_pictures
from gemoe_ds.evaluation.budget import Budget
from gemoe_ds.evaluation.origin import Origin, origin_of
from gemoe_ds.evaluation.records import method_name
from gemoe_ds.evaluation.routing import RoutingCounter
from gemoe_ds.evaluation.session import EvalSession, chosen_routers, routing_of, session_config
from gemoe_ds.files import write_text
from gemoe_ds.train.assemble import meta_collator, named_backbone

ASKED, BUDGET = "asked.json", "budget.json"
_LONGEST = 8_192  # tokens; no prompt of the paper's benchmarks has as many
# What must be the same for answers of two starts to be of one model.
_SAME = ("k", "budget_k", "seed", "backbone", "base", "checkpoint", "dtype", "router")
_PLACES = {"base": "base_digest", "checkpoint": "trained_digest"}


@dataclass(frozen=True)
class Asked:
    """What is answered, and how it is read: the same for all ways to route."""

    tasks: Sequence[Task]
    plans: list[TaskPlan]
    reader: Reader
    choices: dict[str, Any]
    style: dict[str, str]  # of vision tasks

    def of(self, number: int) -> dict[str, Any]:
        """asked.json of a task."""
        task, plan = self.tasks[number], self.plans[number]
        style = self.style if task.harness != LM_EVAL else {}
        told = {
            "harness": task.harness,
            "group": task.group,
            "num_documents": plan.doc_D.size,
            "num_requests": plan.num_requests,
            "choices": {**task.choices, **self.choices, **style},
            "fingerprint": plan.fingerprint,
        }
        plain: dict[str, Any] = json.loads(json.dumps(told))  # as it is read back
        return plain


def task_options(arguments: Namespace) -> TaskOptions:
    """As the command line has them."""
    template = None
    if arguments.apply_chat_template:
        template = FolderTemplate(Path(session_config(arguments).data.tokenizer))
    return TaskOptions(
        num_fewshot=arguments.num_fewshot,
        limit=arguments.limit,
        chat_template=template,
        data=DataPlaces(arguments.data_root, arguments.download),
        style=PromptStyle.named(arguments.prompt_style)(),
    )


def answer_all(
    arguments: Namespace,
    tasks: Sequence[Task],
    calibrate_tasks: Sequence[Task],
    style: PromptStyle,
    stop: StopRequest | None,
) -> None:
    """All tasks with every routing. What is there already stays. Collective."""
    config = session_config(arguments)
    asked_modes = modes(arguments, chosen_routers(arguments))
    check_static(arguments, config)
    check_calibration(arguments, config, calibrate_tasks)
    with distributed() as world, watched(world, config.monitor.stall_seconds):
        asked = read_tasks(whole_context(arguments, config), tasks, style, world)
        run = arguments.trained
        checkpoint = broadcast_from_first(lambda: newest(run), world) if run else None
        origin = origin_of(config.model.checkpoint, checkpoint, world)
        for mode in asked_modes:
            check_folder(arguments, config, mode, asked, origin)
        if all(
            _is_done(arguments.out / m.folder, asked, n) for m in asked_modes for n in _all(asked)
        ):
            if world.is_first:
                print(f"{arguments.out}: all answers are there", flush=True)
            return
        session = EvalSession(arguments, config, world, stop)
        session.check_budgets(asked_modes)
        if calibrate_tasks:
            session.calibration = calibration_on(session, calibrate_tasks, asked.reader)
        for mode in asked_modes:
            answer_mode(session, mode, asked, origin)
        session.say(f"next: gemoe benchmark score {arguments.out}")


def check_static(arguments: Namespace, config: RunConfig) -> None:
    """ConfigError where --k would not be the untouched model, whose gates alone are kept."""
    if arguments.trained and arguments.k and config.model.trainable != "routers":
        raise ConfigError(
            f"--k with a run answers the untouched model, and model.trainable="
            f"{config.model.trainable} has changed more than its routers: leave --k out here, and "
            "give the recipe in the place of the run for it"
        )


def check_calibration(
    arguments: Namespace, config: RunConfig, calibrate_tasks: Sequence[Task]
) -> None:
    """ConfigError, before a model is read, where there is nothing that --mean-k can be met on."""
    if not arguments.mean_k:
        if calibrate_tasks:
            raise ConfigError("--calibrate-tasks says how --mean-k is met; give it too")
        return
    chosen = [router for router, _ in chosen_routers(arguments).values()]
    routers = chosen or [config.model.router.router_class]
    if calibrate_tasks:
        if arguments.calibrate:
            raise ConfigError("give --calibrate SAMPLES or --calibrate-tasks TASK ..., not both")
        measured = [r.name for r in routers if r.budgets_by_sensitivity and not arguments.per_layer]
        if measured:
            raise ConfigError(
                f"router {measured[0]!r} shares a budget out by the loss of samples: give "
                "--calibrate SAMPLES in the place of --calibrate-tasks, or --per-layer"
            )
        return
    place = arguments.calibrate or config.data.validation_path
    for path in [place] if place else paths_of(config.data.train_path):
        if not path or not Path(path).exists():
            raise ConfigError(
                f"--mean-k is met on samples, and {path or 'data.train_path'} is not there: give "
                "--calibrate SAMPLES, or --calibrate-tasks TASK ... for prompts of benchmarks"
            )
        open_samples(path)


def read_tasks(config: RunConfig, tasks: Sequence[Task], style: PromptStyle, world: World) -> Asked:
    """Every document once, before the model is read; ConfigError or DataError for what cannot be
    asked. Collective."""
    collator = meta_collator(config)
    refuse_pictures(collator, tasks, style)
    reader = Reader(collator, VisionPrompts(collator, style), config.data.num_workers)
    plans = plan_tasks(tasks, reader, gather_objects, world.rank, world.size)
    return Asked(tasks, plans, reader, {"max_length": collator.max_length}, style.told())


def whole_context(arguments: Namespace, config: RunConfig) -> RunConfig:
    """Prompts are as long as the model can read, as in the stock harnesses, whatever it was trained
    on; unless `data.max_length` is given with the command."""
    if any(override.startswith("data.max_length=") for override in arguments.overrides):
        return config
    backbone, base = named_backbone(config), config.model.checkpoint
    hf = backbone.load(Path(base) if base else None, Path(config.data.tokenizer))
    context = min(backbone.context_length(hf) or config.data.max_length, _LONGEST)
    data = config.data.model_copy(update={"max_length": context})
    return config.model_copy(update={"data": data})


def identity(
    arguments: Namespace, config: RunConfig, mode: RoutingMode, origin: Origin
) -> dict[str, Any]:
    """What mode.json says that is known before a model is read."""
    base = config.model.checkpoint
    own = origin if mode.k is None else origin.untouched
    return {
        "k": mode.k,
        "budget_k": mode.mean_k,
        "seed": config.seed,
        "backbone": config.model.backbone.name,
        "base": named_from_here(base) if base else None,
        "checkpoint": named_from_here(own.checkpoint) if own.checkpoint else None,
        "dtype": config.model.dtype,
        "router": routing_of(arguments, config, mode),
        **own.told(),
    }


def _agree(name: str, found: Mode, new: Mapping[str, Any]) -> bool:
    """A place may be written from another working directory, and another may have its name: what
    is there counts, by its digest, if the version of then has noted it."""
    here, there = getattr(found, name), new[name]
    if name in _PLACES:
        digests = getattr(found, _PLACES[name]), new[_PLACES[name]]
        if all(digests):
            return digests[0] == digests[1]
        return here == there or bool(here and there and Path(here).name == Path(there).name)
    return bool(here == there)


def check_folder(
    arguments: Namespace, config: RunConfig, mode: RoutingMode, asked: Asked, origin: Origin
) -> None:
    """ConfigError if a mode's folder holds answers of another model or to other questions."""
    folder = arguments.out / mode.folder
    if (folder / MODE).exists():
        found, new = read_mode(folder), identity(arguments, config, mode, origin)
        for name in _SAME:
            if not _agree(name, found, new):
                told = [str(getattr(found, name)), str(new[name])]
                if told[0] == told[1]:  # its weights have changed
                    told = [f"{told[0]} {of}" for of in ("as it was", "as it is now")]
                raise ConfigError(
                    f"{folder} holds answers of another model: its {name} is {told[0]}, not "
                    f"{told[1]}; give another --out, or remove it"
                )
        if arguments.name and mode.k is None and arguments.name != found.method:
            raise ConfigError(
                f"{folder} holds answers under the name {found.method}, not --name "
                f"{arguments.name}; give another --out, or remove it"
            )
    for number, task in enumerate(asked.tasks):
        path = folder / task.name / ASKED
        if path.exists() and json.loads(path.read_bytes()) != asked.of(number):
            raise ConfigError(
                f"{path.parent} holds answers to other questions (other data, shots or options of "
                "the task, data.max_length or --prompt-style); give another --out, or remove it"
            )


def _is_done(folder: Path, asked: Asked, number: int) -> bool:
    return (folder / asked.tasks[number].name / ANSWERS).exists()


def _all(asked: Asked) -> range:
    return range(len(asked.tasks))


def answer_mode(session: EvalSession, mode: RoutingMode, asked: Asked, origin: Origin) -> None:
    """What is not answered yet. Collective."""
    world, folder = session.world, session.arguments.out / mode.folder
    todo = [number for number in _all(asked) if not _is_done(folder, asked, number)]
    if not todo:
        session.say(f"{folder}: done before")
        return
    set_routing(session, mode, folder)
    session.say(f"answering: {mode}")
    budget = _batch(session, asked.reader, folder)
    together = session.config.ep_size > 1

    def begin() -> tuple[Path, dict]:
        with writing_answers(folder):
            write_mode(session, mode, folder, asked.choices | asked.style, origin)
            for number in todo:
                (folder / asked.tasks[number].name).mkdir(exist_ok=True)
                path = folder / asked.tasks[number].name / ASKED
                write_text(path, json.dumps(asked.of(number), indent=1) + "\n")
            earlier = found_parts(folder)
            return new_start(folder, world.size, budget, together=together), earlier

    start, earlier = broadcast_from_first(begin, world)
    done = [np.ones(plan.doc_D.size, bool) for plan in asked.plans]
    for number in todo:
        done[number][:] = False
        for part in earlier.get(asked.tasks[number].name, []):
            for first, last in part.part.done:
                done[number][first:last] = True
    answerer = Answerer(
        session.model, asked.reader, world, together, session.config.seed, budget, session.say
    )
    writer = PartWriter(start, world.rank, lambda: RoutingCounter.of(session.model))
    blocks = blocks_of(asked.plans, budget, done)
    try:
        answer_blocks(answerer, asked.tasks, asked.plans, blocks, done, writer, session.stop)
    finally:
        writer.close()
    gather_objects(None)  # all have written
    merge(session, folder, asked, todo)


def merge(session: EvalSession, folder: Path, asked: Asked, todo: Sequence[int]) -> None:
    """What all ranks and starts have left behind becomes the files of the tasks. Collective."""
    world, model = session.world, session.model
    found = found_parts(folder)
    empty = RoutingSums.empty(len(model.routing), model.routing[0].num_experts)
    counts = {}
    for number in todo[world.rank :: world.size]:
        name = asked.tasks[number].name
        with writing_answers(folder / name):
            answers, cut = merge_task(folder / name, name, found.get(name, []), empty)
            write_shown(folder / name, asked.tasks[number], folder / name / ANSWERS)
        assert answers == asked.plans[number].num_requests, f"{name}: {answers} answers"
        counts[number] = (answers, cut)
    everywhere = {n: both for of_rank in gather_objects(counts) for n, both in of_rank.items()}
    if world.is_first:
        remove_parts(folder)
        for number in todo:
            answers, cut = everywhere[number]
            documents = asked.plans[number].doc_D.size
            lost = f"; {cut:,} prompts were cut on the left" if cut else ""
            name = asked.tasks[number].name
            print(f"{folder / name}: {answers:,} answers to {documents:,} documents{lost}")


def set_routing(session: EvalSession, mode: RoutingMode, folder: Path) -> None:
    """A budget is met once: a later start takes the numbers that were found."""
    path = folder / BUDGET
    if mode.mean_k is not None and gather_objects(path.exists())[0]:
        known = json.loads(path.read_bytes())
        session.set_routing(replace(mode, mean_k=None))
        options = {option: tuple(values) for option, values in known["options"].items()}
        Budget(known["mean_k"], options, known["passes"]).apply(session.routers_of(mode))
        return
    budget = session.set_routing(mode)

    def keep() -> None:
        if budget:
            with writing_answers(folder):
                folder.mkdir(parents=True, exist_ok=True)
                write_text(path, json.dumps(asdict(budget), indent=1) + "\n")

    broadcast_from_first(keep, session.world)


def _batch(session: EvalSession, reader: Reader, folder: Path) -> int:
    """Tokens: as --batch says, as the first start had it, or as memory allows. Collective."""
    given = session.arguments.batch_tokens
    if given != AUTO:
        return int(given)
    earlier = gather_objects(batch_of(folder))[0]
    batch = earlier or tokens_that_fit(session.model, reader.collator.max_length, session.world)
    session.say(f"--batch auto: {batch:,} tokens")
    return batch


def write_mode(
    session: EvalSession, mode: RoutingMode, folder: Path, choices: dict[str, Any], origin: Origin
) -> None:
    model = session.model
    content = Mode(
        method="top_k" if mode.k is not None else method_name(session, mode),
        choices=choices,
        backbone_k=model.routing[0].top_k,
        num_experts=model.routing[0].num_experts,
        total_parameters=model.num_parameters,
        parameters_per_expert=tuple(model.params_per_expert),
        **identity(session.arguments, session.config, mode, origin),
        **provenance(),
    )
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / MODE, json.dumps(content.model_dump(), indent=1) + "\n")
