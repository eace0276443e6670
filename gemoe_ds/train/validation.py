"""Loss, accuracy and mean k on held-out samples while training goes on."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from gemoe_ds.cluster.signals import until_stopped
from gemoe_ds.cluster.stopping import StopRequest
from gemoe_ds.config import RunConfig
from gemoe_ds.console import Progress
from gemoe_ds.data.all_lengths import lengths_of
from gemoe_ds.data.bad_samples import BadSampleLog, listed
from gemoe_ds.data.collate import Batch, Collator
from gemoe_ds.data.lengths import Lengths
from gemoe_ds.data.mixture import SampleList
from gemoe_ds.data.sample import open_samples
from gemoe_ds.data.stream import EvalStream
from gemoe_ds.engine.world import ALL_RANKS, World, broadcast_from_first, gather_objects
from gemoe_ds.errors import ConfigError, Stopped
from gemoe_ds.evaluation.score import Scores, evaluate
from gemoe_ds.moe.router import Router
from gemoe_ds.progress import EVALUATE
from gemoe_ds.train.assemble import build_collator
from gemoe_ds.train.checks.samples import leave_out_known
from gemoe_ds.train.hooks import Hook, StepResult, Training
from gemoe_ds.train.untouched import Outcome, Untouched, described, warning


class Validation(Hook):
    """Evaluates every `train.eval_every` steps and after the last one, as `gemoe evaluate` does.

    Training goes on as if nothing had been. An evaluation that a signal cuts off comes after the
    next step, in the continuation of the run.
    """

    name = "validation"
    metrics = {"validation/loss": "min", "validation/accuracy": "max", "validation/mean_k": "min"}

    def __init__(
        self,
        config: RunConfig,
        collator: Collator,
        world: World,
        stop: StopRequest,
        *,
        held_out: tuple[SampleList, Lengths | None] | None = None,
    ) -> None:
        """Look for samples that cannot be used; DataError if they are too many. Collective.

        `held_out`: what is evaluated where there is no `data.validation_path`, and its lengths on
        the first rank.
        """
        self.config, self.world, self.stop = config, world, stop
        self.samples: SampleList
        if held_out:
            self.samples, lengths = held_out
        else:
            assert config.data.validation_path is not None, "checked with the recipe"
            self.samples = open_samples(config.data.validation_path)
            lengths, _ = lengths_of(
                self.samples,
                collator,
                rank=world.rank,
                world=world.size,
                gather=gather_objects,
                output=Path(config.output_dir),
                stops=lambda: bool(stop.by),
            )
        self.bad = BadSampleLog(config.data.max_bad_samples, len(self.samples), gather_objects)
        leave_out_known(lengths, self.samples, collator, self.bad)
        if config.checkpoint.keep_best == "validation/accuracy":
            broadcast_from_first(lambda: self._refuse_no_question(lengths), world)
        self.evaluated: int | None = None  # the step of the last evaluation
        self.untouched: Untouched | None = None

    def _refuse_no_question(self, lengths: Lengths | None) -> None:
        limit = self.config.data.max_length
        if lengths and len(lengths.turns_T4) == lengths.cut(limit).cut_answers_N.sum():
            raise ConfigError(
                f"checkpoint.keep_best=validation/accuracy: data.max_length={limit} cuts all "
                f"answers of {self.samples.path}; raise it, or take validation/loss"
            )

    def before_run(self, trainer: Training) -> None:
        collator = build_collator(self.config, trainer.model)
        self.collator = collator
        first = collator.encode_or_leave_out(0, self.samples[0])
        self.spare = collator.batch([first])  # of a rank that has no samples
        if self.evaluated is None:
            self.evaluated = trainer.step
        if not self.config.train.compare_untouched:
            return
        if trainer.model.moe_layers[0].base is None:
            self._say(
                f"train.compare_untouched: model.trainable={self.config.model.trainable} changes "
                "the backbone, which is not compared"
            )
            return

        def score(routers: Sequence[Router], limit: int | None, title: str | None) -> Scores:
            return self._scores(trainer, routers, limit, title)

        self.untouched = Untouched(trainer.model, len(self.samples), score)

    def after_step(self, trainer: Training, result: StepResult) -> None:
        step, every = result.step, self.config.train.eval_every
        assert self.evaluated is not None
        if step // every == self.evaluated // every and step < trainer.config.num_steps:
            return
        began = time.perf_counter()
        try:
            scores = self._scores(trainer)
        except Stopped:
            return  # the trainer saves, and stops before its next step
        trained = Outcome.of(scores, len(self.samples))
        untouched: dict[str, Outcome] | None = None
        with suppress(Stopped):  # what the trained routers do is known, and told
            untouched = self.untouched.at(trained.mean_k) if self.untouched else None
        self.evaluated = step
        self._leave_out(trainer, scores)
        seconds = time.perf_counter() - began
        result.metrics |= {
            "validation/loss": scores.loss,
            "validation/mean_k": scores.mean_k,
            "validation/seconds": seconds,
        }
        if scores.asked:
            result.metrics["validation/accuracy"] = scores.accuracy
        for name, outcome in (untouched or {}).items():
            for of, value in outcome.metrics.items():
                result.metrics[f"validation/untouched_{name}_{of}"] = value
        said = f"step {step}: validation loss {scores.loss:.4f}, mean k {scores.mean_k:.3f}"
        if scores.asked:
            said += f", accuracy {100 * scores.accuracy:.2f} %"
        self._say(f"{said} ({seconds:.1f} s)")
        if untouched is not None:
            self._say(f"step {step}: {described(trained.mean_k, untouched)}")
            if warned := warning(trained, untouched):
                self._say(f"step {step}: {warned}")
        elif self.untouched:
            self._say(f"step {step}: not compared with the untouched backbone, as a signal came")

    def _say(self, line: str) -> None:
        if self.world.is_first:
            Progress.write(line)

    def _scores(
        self,
        trainer: Training,
        routers: Sequence[Router] | None = None,
        limit: int | None = None,
        title: str | None = "validation",
    ) -> Scores:
        """Of the first samples, as `limit` says, by other routers than those that train."""
        ctx = trainer.model.ctx
        ctx.routers = routers
        try:
            return evaluate(
                trainer.model,
                self.samples,
                self._batches(limit, title),
                self.world.device,
                ALL_RANKS,
                run=trainer.engine,
                spare=self.spare,
                in_detail=False,
                max_tokens=0,
            )
        finally:
            ctx.routers = None

    def _batches(self, limit: int | None, title: str | None) -> Iterator[Batch | None]:
        stream = EvalStream(
            self.samples,
            self.collator,
            batch=self.config.train.micro_batch_size,
            rank=self.world.rank,
            world=self.world.size,
            limit=limit,
        )
        bar = Progress(
            stream,
            desc=title,
            unit="batch",
            leave=False,
            disable=title is None or not self.world.is_first,
        )
        return until_stopped(bar, EVALUATE, self.stop, self.world, "while validating")

    def _leave_out(self, trainer: Training, scores: Scores) -> None:
        """Tell of samples that turned out to be bad; end the run if they are too many."""
        for line in listed(self.bad.record(scores.bad.values())):
            self._say(f"{self.samples.path}: {line}")
        trainer.check_bad_samples(self.bad)

    def state_dict(self) -> dict[str, Any]:
        return {"evaluated": self.evaluated}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.evaluated = state["evaluated"]
