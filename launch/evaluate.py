"""Score a run, or the untouched backbone at several k, on held-out conversations.

    launch/evaluate.py RECIPE --k 8 5 2 --data TEST --out DIR      static top-k, as the backbone is
    launch/evaluate.py RUN/config.yaml --trained RUN --data TEST --out DIR     what a run trained
    ... --mean-k 3 4 5                                    and that with so many experts on average

Writes eval.json and tokens.npz for launch/analyze.py, with several k into DIR/k_8, DIR/k_5, ...,
with budgets into DIR/mean_k_4, ...
Runs alone or, faster, under `deepspeed` or `torchrun`: the samples are split over the ranks.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run from a checkout, uninstalled

from gemoe_ds.errors import ConfigError, exit_on_error

if TYPE_CHECKING:
    from gemoe_ds.analysis.record import EvalRecord, TokenSample
    from gemoe_ds.backbones.model import MoEModel
    from gemoe_ds.config import RunConfig
    from gemoe_ds.data.sample import SampleFolder
    from gemoe_ds.engine.distributed import World
    from gemoe_ds.evaluation.runner import Scores

Arguments = argparse.Namespace


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("recipe", help="a recipe, or the config.yaml of a run")
    parser.add_argument("overrides", nargs="*", metavar="key.path=value")
    parser.add_argument("--data", type=Path, required=True, help="converted samples to score on")
    parser.add_argument("--out", type=Path, required=True, help="folder of the records")
    parser.add_argument("--trained", type=Path, help="run folder whose trained parts are loaded")
    parser.add_argument("--k", type=int, nargs="+", help="static top-k instead of a trained router")
    parser.add_argument(
        "--mean-k",
        type=float,
        nargs="+",
        help="budgets: move the trained router's k until the model uses so many experts a token",
    )
    parser.add_argument(
        "--rescale", action="store_true", help="meet budgets by a factor on k, not by a shift"
    )
    parser.add_argument(
        "--calibrate",
        type=Path,
        help="samples on which budgets are met (default: data.validation, else data.train)",
    )
    parser.add_argument(
        "--calibration-samples", type=int, default=512, help="how many of them (default: 512)"
    )
    parser.add_argument("--name", help="method in the record (default: the router's name)")
    parser.add_argument(
        "--flips",
        action="store_true",
        help="also run in float32; write whose k differs: k_flips.json",
    )
    parser.add_argument("--batch", type=int, default=64, help="samples a rank and forward pass")
    parser.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_intermixed_args(argv)
    with exit_on_error():
        if (arguments.trained is None) == (arguments.k is None):
            raise ConfigError(
                "give --trained RUN (what it trained) or --k K ... (static), not both"
            )
        if arguments.flips and arguments.k:
            raise ConfigError("--flips compares the k of a trained router; a static k never flips")
        if arguments.mean_k and (arguments.k or arguments.flips):
            raise ConfigError("--mean-k goes with --trained RUN, without --k and --flips")
        if arguments.name and not re.fullmatch(r"[a-z0-9_]+", arguments.name):
            raise ConfigError(f"--name {arguments.name}: lower case letters, digits and _ only")
        _evaluate(arguments)


@dataclass(frozen=True)
class Setting:
    """One way to route that is scored, and the folder of its record in --out."""

    folder: str = ""
    k: int | None = None  # static
    mean_k: float | None = None  # a budget for the trained router


def _settings(arguments: Arguments) -> list[Setting]:
    if arguments.k:
        several = len(arguments.k) > 1
        return [Setting(f"k_{k}" if several else "", k=k) for k in arguments.k]
    if arguments.mean_k:
        return [Setting(f"mean_k_{k:g}", mean_k=k) for k in arguments.mean_k]
    return [Setting()]


def _evaluate(arguments: Arguments) -> None:
    from gemoe_ds.config import load_config
    from gemoe_ds.data.sample import open_samples
    from gemoe_ds.engine.distributed import distributed

    overrides = list(arguments.overrides)
    if arguments.k:
        overrides.append(f"model.router={{name: top_k, k: {arguments.k[0]}}}")
    if not any(override.startswith("parallel.ep_size=") for override in overrides):
        overrides.append("parallel.ep_size=1")  # every rank has all experts: nothing to exchange
    config = load_config(arguments.recipe, overrides)
    samples = open_samples(arguments.data)
    with distributed() as world:
        evaluation = Evaluation(arguments, config, world)
        for setting in _settings(arguments):
            scores = evaluation.run(setting, samples)
        if arguments.flips:
            evaluation.say("evaluating in float32, for the k that differ")
            in_float32 = load_config(arguments.recipe, [*overrides, "model.dtype=float32"])
            exact = Evaluation(arguments, in_float32, world).scored(samples)
            if world.is_first:
                _write_flips(arguments.out, config.model.dtype, scores, exact)


class Evaluation:
    """A loaded model and the ways in which it is scored. Its methods are collective."""

    def __init__(self, arguments: Arguments, config: RunConfig, world: World) -> None:
        from gemoe_ds.engine.checkpoint import put_trained
        from gemoe_ds.engine.groups import expert_shard
        from gemoe_ds.engine.manifest import newest
        from gemoe_ds.train.run import build_collator, build_model

        self.arguments, self.config, self.world = arguments, config, world
        self.checkpoint = newest(arguments.trained) if arguments.trained else None
        shard = expert_shard(config.parallel.ep_size, world)
        self.model = build_model(config, shard, show_progress=world.is_first).to(world.device)
        if self.checkpoint:
            put_trained(self.model, self.checkpoint)
            self.say(f"trained parts from {self.checkpoint}")
        self.routers = [layer.router for layer in self.model.moe_layers]
        self.collator = build_collator(config, self.model)

    def say(self, text: str) -> None:
        if self.world.is_first:
            print(text, flush=True)

    def scored(self, samples: SampleFolder, limit: int | None = None) -> Scores:
        from gemoe_ds.data.dataset import EvalStream
        from gemoe_ds.engine.distributed import gather_objects
        from gemoe_ds.evaluation.runner import evaluate

        stream = EvalStream(
            samples,
            self.collator,
            batch=self.arguments.batch,
            rank=self.world.rank,
            world=self.world.size,
            limit=limit,
        )
        show = self.world.is_first
        return evaluate(
            self.model, samples, stream, self.world.device, gather_objects, show_progress=show
        )

    def run(self, setting: Setting, samples: SampleFolder) -> Scores:
        """Score in one way, and write the record."""
        name = self.config.model.router.name
        if setting.k is not None:
            for router in self.routers:
                router.k = router.static_k = setting.k
        if setting.mean_k is not None:
            self.meet(setting.mean_k)
        k = self.routers[0].static_k
        self.say(f"evaluating {name}{'' if k is None else f' k={k}'}")
        began = time.perf_counter()
        scores = self.scored(samples)
        if self.world.is_first:
            self.write(setting, scores, k, time.perf_counter() - began)
        return scores

    def meet(self, mean_k: float) -> None:
        """Move the trained k until the model uses so many experts on the calibration samples."""
        from gemoe_ds.data.sample import open_samples
        from gemoe_ds.evaluation.budget import meet_budget

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

    def write(self, setting: Setting, scores: Scores, k: int | None, seconds: float) -> None:
        from gemoe_ds.analysis.record import write_record
        from gemoe_ds.train.monitor import seconds_in

        arguments, name = self.arguments, self.config.model.router.name
        tuned = arguments.trained and name == "top_k"
        record, tokens = _record(
            self.model,
            scores,
            method=arguments.name or (f"{name}_tuned" if tuned else name),
            k=k,
            budget_k=setting.mean_k,
            seed=self.config.seed,
            seconds=seconds,
            train_seconds=seconds_in(arguments.trained) if arguments.trained else None,
            checkpoint=str(self.checkpoint or self.config.model.checkpoint),
        )
        out = arguments.out / setting.folder
        write_record(out, record, tokens)
        self.say(
            f"{out}: accuracy {100 * record.accuracy:.2f} %, mean k {record.mean_k:.2f} "
            f"({record.seconds:.1f} s)"
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
        activated_parameters=model.activated_parameters(routing["mean_k_per_layer"]),
        total_parameters=model.num_parameters,
        **identity,
        **routing,
        **provenance(),
    )
    return record, TokenSample.draw(entropy_LN, k_LN, is_vision_N)


if __name__ == "__main__":
    main(sys.argv[1:])
