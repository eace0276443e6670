"""What is evaluated: a loaded model with what a run trained, and the ways to set its k.

`gemoe evaluate` and `gemoe generate` say it alike.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from gemoe_ds.analysis.routing_sums import MAX_TOKENS
from gemoe_ds.checkpoint.manifest import newest, read
from gemoe_ds.checkpoint.state import load_trained_weights
from gemoe_ds.cluster.signals import until_stopped
from gemoe_ds.cluster.stopping import StopRequest
from gemoe_ds.config import RunConfig, validate_evaluation
from gemoe_ds.config.load import as_config
from gemoe_ds.console import Progress
from gemoe_ds.data.all_lengths import lengths_of
from gemoe_ds.data.bad_samples import BadSampleLog
from gemoe_ds.data.collate import Batch
from gemoe_ds.data.holdout import open_held_out
from gemoe_ds.data.mixture import SampleList
from gemoe_ds.data.sample import open_samples
from gemoe_ds.data.stream import EvalStream
from gemoe_ds.engine.adopt_launcher import adopt_launcher
from gemoe_ds.engine.gpu import check_dtype
from gemoe_ds.engine.groups import expert_shard
from gemoe_ds.engine.read_once import weight_memory
from gemoe_ds.engine.world import ALL_RANKS, World, gather_objects
from gemoe_ds.errors import ConfigError
from gemoe_ds.evaluation.arguments import RoutingMode
from gemoe_ds.evaluation.budget import Budget, check_dial, fit_budget_to, range_of_k
from gemoe_ds.evaluation.score import Scores, evaluate
from gemoe_ds.evaluation.sensitivity import measure_losses, spend
from gemoe_ds.evaluation.untrained import Chosen, choose, on_gates
from gemoe_ds.moe.router import Router
from gemoe_ds.progress import EVALUATE
from gemoe_ds.train.assemble import build_collator, build_model
from gemoe_ds.train.checks.samples import leave_out_known
from gemoe_ds.train.recipe_changes import model_changes


@dataclass(frozen=True)
class Calibration:
    """What --mean-k is met on."""

    place: str
    mean_k_L: Callable[[], list[float]]
    loss: Callable[[], float]


BETWEEN = "between two batches; what --out holds is whole"


class EvalSession:
    """A model on this rank. Its methods are collective."""

    def __init__(
        self,
        arguments: argparse.Namespace,
        config: RunConfig,
        world: World,
        stop: StopRequest | None = None,
    ) -> None:
        self.arguments, self.config, self.world = arguments, config, world
        self.stop = stop or StopRequest()
        self.checkpoint = newest(arguments.trained) if arguments.trained else None
        check_dtype(config.model.dtype, world.device)
        shard = expert_shard(config.ep_size, world)
        memory = weight_memory(config, world)
        self.model = build_model(config, shard, memory, show_progress=world.is_first)
        self.model.to(world.device)
        self.routers = [layer.router for layer in self.model.moe_layers]
        top_k = Router.named("top_k")
        self.static = self._on_gates((top_k, top_k.Config())) if arguments.k else []
        if self.checkpoint:
            load_trained_weights(self.model, self.checkpoint, world)
            self.say(f"trained parts from {self.checkpoint}")
            if changes := model_changes(read(self.checkpoint), config):
                self.say(changes)
        self.others = {name: self._on_gates(one) for name, one in chosen_routers(arguments).items()}
        self.collator = build_collator(config, self.model)
        self._logs: dict[Path | str, BadSampleLog] = {}
        self.calibration: Calibration | None = None  # in the place of samples
        self._losses: dict[str, np.ndarray] = {}  # of `measure_losses`, by router

    def say(self, text: str) -> None:
        if self.world.is_first:
            print(text, flush=True)

    def stream(
        self, samples: SampleList, *, limit: int | None = None, prompts: bool = False
    ) -> EvalStream:
        """Every rank has one at least: batches are smaller than --batch where samples are few."""
        number = min(len(samples), limit or len(samples))
        if number < self.world.size:
            raise ConfigError(
                f"{samples.path}: {number:,} samples are too few for {self.world.size} ranks: use "
                "fewer ranks, or more samples (--limit, --calibration-samples)"
            )
        return EvalStream(
            samples,
            self.collator,
            batch=min(self.arguments.batch, number // self.world.size),
            rank=self.world.rank,
            world=self.world.size,
            limit=limit,
            prompts=prompts,
        )

    def scored(
        self, samples: SampleList, limit: int | None = None, max_tokens: int = MAX_TOKENS
    ) -> Scores:
        log = self._left_out(samples)
        stream = self.stream(samples, limit=limit)
        scores = evaluate(
            self.model,
            samples,
            self.iterate(stream, EVALUATE),
            self.world.device,
            ALL_RANKS,
            special_ids=self.collator.special_ids,
            max_tokens=max_tokens,
        )
        log.record(scores.bad.values())
        log.check()
        return scores

    def bad_sample_log(self, samples: SampleList) -> BadSampleLog:
        return BadSampleLog(self.config.data.max_bad_samples, len(samples), gather_objects)

    def _left_out(self, samples: SampleList) -> BadSampleLog:
        """What is known, before the first batch, to be too long; the same every time."""
        if samples.path not in self._logs:
            world = self.world
            lengths, _ = lengths_of(
                samples, self.collator, rank=world.rank, world=world.size, gather=gather_objects
            )
            log = self.bad_sample_log(samples)
            leave_out_known(lengths, samples, self.collator, log)
            self._logs[samples.path] = log
        return self._logs[samples.path]

    def iterate(
        self, stream: EvalStream, phase: str, title: str | None = None
    ) -> Iterator[Batch | None]:
        """Batches with a progress bar, until any rank is asked to stop: then Stopped on all."""
        bar = Progress(stream, desc=title or phase, unit="batch", disable=not self.world.is_first)
        return until_stopped(bar, phase, self.stop, self.world, BETWEEN)

    def _on_gates(self, chosen: Chosen) -> list[Router]:
        """Other routers on the gates as they are now."""
        return on_gates(chosen, [r.gate.weight for r in self.routers], self.model.routing)

    def routers_of(self, mode: RoutingMode) -> list[Router]:
        if mode.k is not None:
            return self.static
        return self.routers if mode.router is None else self.others[mode.router]

    def set_routing(self, mode: RoutingMode) -> Budget | None:
        """Route in this way from now on."""
        routers = self.routers_of(mode)
        for layer, router in zip(self.model.moe_layers, routers, strict=True):
            layer.router = router
            if mode.k is not None:
                if mode.k > router.spec.num_experts:
                    raise ConfigError(
                        f"--k {mode.k} exceeds the backbone's {router.spec.num_experts} experts"
                    )
                router.k = router.static_k = mode.k  # type: ignore[assignment]
        self.model.to(self.world.device)
        return None if mode.mean_k is None else self.fit_budget(routers, mode.mean_k, mode.router)

    def check_budgets(self, modes: Iterable[RoutingMode]) -> None:
        """ConfigError for a mean k that its router cannot have, before any of them is measured."""
        for mode in modes:
            if mode.mean_k is not None:
                range_of_k(self.routers_of(mode)[0], mode.mean_k)

    def routes(self, modes: list[RoutingMode]) -> Callable[[RoutingMode], None]:
        """`set_routing` for turns among several modes: each budget is met once, here."""
        budgets = {mode: self.set_routing(mode) for mode in modes}

        def again(mode: RoutingMode) -> None:
            self.set_routing(replace(mode, mean_k=None))
            if budget := budgets[mode]:
                budget.apply(self.routers_of(mode))

        return again

    def fit_budget(self, routers: list[Router], mean_k: float, chosen: str | None = None) -> Budget:
        """Move the dial until the model uses so many experts on what it is calibrated on.

        `chosen`: which of --router it is, if it is one.
        """
        arguments, first = self.arguments, routers[0]
        known = self.calibration or self._calibration_samples()
        if first.budgets_by_sensitivity and not arguments.per_layer:
            range_of_k(first, mean_k)
            if first.name not in self._losses:
                self._losses[first.name] = measure_losses(routers, known.loss)
            budget = spend(routers, mean_k, self._losses[first.name], known.mean_k_L)
        else:
            target = [mean_k] * len(routers) if arguments.per_layer else mean_k
            budget = fit_budget_to(routers, target, known.mean_k_L, rescale=arguments.rescale)
        found = budget.options_of_router(*chosen_routers(arguments)[chosen]) if chosen else budget
        self.say(
            f"mean k {budget.mean_k:.3f} on {known.place} after {budget.passes} passes: {found}"
        )
        return budget

    def _calibration_samples(self) -> Calibration:
        data = self.config.data
        samples: SampleList
        if place := self.arguments.calibrate:
            samples = open_samples(place)
        else:
            samples = open_held_out(data.validation_path, data.holdout, data.train_path)

        def scored() -> Scores:
            return self.scored(samples, self.arguments.calibration_samples)

        return Calibration(
            str(samples.path),
            lambda: scored().routing.mean_k_L.tolist(),
            lambda: scored().loss,
        )


def chosen_routers(arguments: argparse.Namespace) -> dict[str, Chosen]:
    """Those of --router, by name."""
    return choose(arguments.router or [])


def routing_of(
    arguments: argparse.Namespace, config: RunConfig, mode: RoutingMode
) -> dict[str, Any]:
    """The router's name and options, and how its budget is met."""
    if mode.k is not None:
        return {"name": "top_k"}
    router, options = config.model.router.router_class, config.model.router.config
    if mode.router is not None:
        router, options = chosen_routers(arguments)[mode.router]
    met = {"per_layer": arguments.per_layer, "rescale": arguments.rescale}
    told = {"name": router.name, **options.model_dump()} | (met if mode.mean_k else {})
    plain: dict[str, Any] = json.loads(json.dumps(told))  # as it is read back
    return plain


def session_config(arguments: argparse.Namespace, *more: str) -> RunConfig:
    """The recipe, with a static router where nothing trained is loaded.

    Every rank has all experts unless it says otherwise: then there is nothing to exchange. What
    the launcher says of this rank is taken over first: some things one rank alone says.
    """
    adopt_launcher()
    chosen = chosen_routers(arguments)
    overrides = list(arguments.overrides)
    if not arguments.trained:
        if unused := [one for one in overrides if one.startswith("model.router")]:
            raise ConfigError(
                f"{unused[0]} would not be used: without --trained the model routes as --k and "
                "--router say; give --k K, or --router '{name: NAME, OPTION: VALUE}'"
            )
        k = arguments.k[0] if arguments.k else None
        overrides.append("model.router={name: top_k" + ("" if k is None else f", k: {k}") + "}")
    if not any(override.startswith("parallel.ep_size=") for override in overrides):
        overrides.append("parallel.ep_size=1")
    config = as_config(arguments.recipe, [*overrides, *more])
    if config.parallel.ep_size == "auto":
        raise ConfigError("parallel.ep_size=auto is for training; give a number, or leave it out")
    if arguments.mean_k:
        own = [config.model.router.router_class] * (not chosen)
        for router in [*own, *(router for router, _ in chosen.values())]:
            check_dial(router, rescale=arguments.rescale)
    validate_evaluation(config)
    return config
