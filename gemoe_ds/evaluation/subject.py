"""What is evaluated: a loaded model with what a run trained, and the ways to set its k.

The command lines of launch/evaluate.py and launch/generate.py say it alike.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

from gemoe_ds.cluster.stopping import StopRequest
from gemoe_ds.cluster.together import until_stopped
from gemoe_ds.config import RunConfig, load_config, validate_evaluation
from gemoe_ds.console import Progress
from gemoe_ds.data.bad_samples import BadSampleLog
from gemoe_ds.data.collate import Batch
from gemoe_ds.data.dataset import EvalStream
from gemoe_ds.data.lengths import known_lengths
from gemoe_ds.data.sample import SampleFolder, open_samples
from gemoe_ds.engine.checkpoint import put_trained
from gemoe_ds.engine.distributed import World, gather_objects
from gemoe_ds.engine.groups import expert_shard
from gemoe_ds.engine.host_memory import host_memory
from gemoe_ds.engine.manifest import newest
from gemoe_ds.errors import ConfigError
from gemoe_ds.evaluation.arguments import Setting
from gemoe_ds.evaluation.budget import Budget, meet_budget
from gemoe_ds.evaluation.runner import Scores, evaluate
from gemoe_ds.moe.router import Router
from gemoe_ds.position import EVALUATE
from gemoe_ds.train.assemble import build_collator, build_model
from gemoe_ds.train.look_at_samples import leave_out_known

BETWEEN = "between two batches; what --out holds is whole"


class Subject:
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
        shard = expert_shard(config.parallel.ep_size, world)
        memory = host_memory(world)
        self.model = build_model(config, shard, memory, show_progress=world.is_first)
        self.model.to(world.device)
        self.routers = [layer.router for layer in self.model.moe_layers]
        self.static = self._static_routers() if arguments.k else []
        if self.checkpoint:
            put_trained(self.model, self.checkpoint)
            self.say(f"trained parts from {self.checkpoint}")
        self.collator = build_collator(config, self.model)
        self._logs: dict[Path, BadSampleLog] = {}

    def say(self, text: str) -> None:
        if self.world.is_first:
            print(text, flush=True)

    def stream(
        self, samples: SampleFolder, *, limit: int | None = None, prompts: bool = False
    ) -> EvalStream:
        number, batch = min(len(samples), limit or len(samples)), self.arguments.batch
        if number <= batch * (self.world.size - 1):
            raise ConfigError(
                f"{samples.path}: {number:,} samples in batches of {batch} are too few for "
                f"{self.world.size} ranks: use fewer ranks or a smaller --batch"
            )
        return EvalStream(
            samples,
            self.collator,
            batch=batch,
            rank=self.world.rank,
            world=self.world.size,
            limit=limit,
            prompts=prompts,
        )

    def scored(self, samples: SampleFolder, limit: int | None = None) -> Scores:
        log = self._left_out(samples)
        stream = self.stream(samples, limit=limit)
        scores = evaluate(
            self.model, samples, self.shown(stream, EVALUATE), self.world.device, gather_objects
        )
        log.record(scores.bad.values())
        log.check()
        return scores

    def bad_sample_log(self, samples: SampleFolder) -> BadSampleLog:
        return BadSampleLog(self.config.data.max_bad_samples, len(samples), gather_objects)

    def _left_out(self, samples: SampleFolder) -> BadSampleLog:
        """What is known, before the first batch, to be too long; the same every time."""
        if samples.path not in self._logs:
            world = self.world
            lengths, _ = known_lengths(
                samples, self.collator, rank=world.rank, world=world.size, gather=gather_objects
            )
            log = self.bad_sample_log(samples)
            leave_out_known(lengths, samples, self.collator, log)
            self._logs[samples.path] = log
        return self._logs[samples.path]

    def shown(
        self, stream: EvalStream, phase: str, title: str | None = None
    ) -> Iterator[Batch | None]:
        """Batches with a progress bar, until any rank is asked to stop: then Stopped on all."""
        bar = Progress(stream, desc=title or phase, unit="batch", disable=not self.world.is_first)
        return until_stopped(bar, phase, self.stop, self.world, BETWEEN)

    def _static_routers(self) -> list[Router]:
        """Of the gates as they were before training."""
        top_k = Router.named("top_k")
        static = []
        for router, routing in zip(self.routers, self.model.routing, strict=True):
            static.append(top_k(top_k.Config(), routing))
            static[-1].adopt_gate(router.gate.weight.detach().clone())
        return static

    def put(self, setting: Setting) -> Budget | None:
        """Route in this way from now on."""
        routers = self.routers if setting.k is None else self.static
        for layer, router in zip(self.model.moe_layers, routers, strict=True):
            layer.router = router
            if setting.k is not None:
                if setting.k > router.spec.num_experts:
                    raise ConfigError(
                        f"--k {setting.k} exceeds the backbone's {router.spec.num_experts} experts"
                    )
                router.k = router.static_k = setting.k  # type: ignore[assignment]
        self.model.to(self.world.device)
        return None if setting.mean_k is None else self.meet(setting.mean_k)

    def routes(self, settings: list[Setting]) -> Callable[[Setting], None]:
        """`put` for turns among several settings: each budget is met once, here."""
        budgets = {setting: self.put(setting) for setting in settings}

        def again(setting: Setting) -> None:
            self.put(replace(setting, mean_k=None))
            if budget := budgets[setting]:
                for router in self.routers:
                    router.k_scale, router.k_shift = budget.k_scale, budget.k_shift  # type: ignore[assignment]

        return again

    def meet(self, mean_k: float) -> Budget:
        """Move the trained k until the model uses so many experts on the calibration samples."""
        arguments, data = self.arguments, self.config.data
        place = arguments.calibrate or data.validation or data.train
        known = open_samples(place)

        def measured() -> float:
            return float(self.scored(known, arguments.calibration_samples).tokens()[1].mean())

        how = "scale" if arguments.rescale else "shift"
        budget = meet_budget(self.routers, mean_k, measured, how)
        self.say(
            f"mean k {budget.mean_k:.3f} on {place} after {budget.passes} passes: "
            f"model.router.k_scale={budget.k_scale:.6g} model.router.k_shift={budget.k_shift:.6g}"
        )
        return budget


def subject_config(arguments: argparse.Namespace, *more: str) -> RunConfig:
    """The recipe, with a static router where nothing trained is loaded.

    Every rank has all experts unless it says otherwise: then there is nothing to exchange.
    """
    overrides = list(arguments.overrides)
    if arguments.k and not arguments.trained:
        overrides.append(f"model.router={{name: top_k, k: {arguments.k[0]}}}")
    if not any(override.startswith("parallel.ep_size=") for override in overrides):
        overrides.append("parallel.ep_size=1")
    config = load_config(arguments.recipe, [*overrides, *more])
    validate_evaluation(config)
    return config
