"""Score a run, or the untouched backbone at several k, on held-out conversations.

    launch/evaluate.py RECIPE --k 8 5 2 --data TEST --out DIR      static top-k, as the backbone is
    launch/evaluate.py RUN/config.yaml --trained RUN --data TEST --out DIR     what a run trained

Writes eval.json and tokens.npz for launch/analyze.py, with several k into DIR/k_8, DIR/k_5, ...
Runs alone or, faster, under `deepspeed` or `torchrun`: the samples are split over the ranks.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run from a checkout, uninstalled

from gemoe_ds.errors import ConfigError, exit_on_error

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
    parser.add_argument("--batch", type=int, default=64, help="samples a rank and forward pass")
    parser.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_intermixed_args(argv)
    with exit_on_error():
        if (arguments.trained is None) == (arguments.k is None):
            raise ConfigError(
                "give --trained RUN (what it trained) or --k K ... (static), not both"
            )
        _evaluate(arguments)


def _evaluate(arguments: Arguments) -> None:
    from gemoe_ds.config import load_config
    from gemoe_ds.data.sample import open_samples
    from gemoe_ds.engine.checkpoint import newest, put_trained
    from gemoe_ds.engine.distributed import distributed
    from gemoe_ds.engine.groups import expert_shard
    from gemoe_ds.train.run import build_collator, build_model, say

    overrides = list(arguments.overrides)
    if arguments.k:
        overrides.append(f"model.router={{name: top_k, k: {arguments.k[0]}}}")
    if not any(override.startswith("parallel.ep_size=") for override in overrides):
        overrides.append("parallel.ep_size=1")  # every rank has all experts: nothing to exchange
    config = load_config(arguments.recipe, overrides)
    samples = open_samples(arguments.data)
    checkpoint = newest(arguments.trained) if arguments.trained else None
    with distributed() as world:
        model = build_model(config, expert_shard(config.parallel.ep_size, world))
        model.to(world.device)
        if checkpoint:
            put_trained(model, checkpoint)
            say(world, f"trained parts from {checkpoint}")
        collator = build_collator(config, model)
        for k in arguments.k or [None]:
            if k is not None:
                for layer in model.moe_layers:
                    layer.router.k = k
            out = (
                arguments.out / f"k_{k}" if arguments.k and len(arguments.k) > 1 else arguments.out
            )
            say(world, f"evaluating {config.model.router.name}{'' if k is None else f' k={k}'}")
            record_one(arguments, config, model, samples, collator, world, checkpoint, k, out)


def record_one(arguments, config, model, samples, collator, world, checkpoint, k, out) -> None:
    """Score one routing and write its record."""
    from gemoe_ds.analysis.provenance import provenance
    from gemoe_ds.analysis.record import EvalRecord, TokenSample, routing_summary, write_record
    from gemoe_ds.data.dataset import EvalStream
    from gemoe_ds.engine.distributed import gather_objects
    from gemoe_ds.evaluation.runner import evaluate
    from gemoe_ds.train.monitor import seconds_in

    began = time.perf_counter()
    stream = EvalStream(samples, collator, batch=arguments.batch, rank=world.rank, world=world.size)
    scores = evaluate(
        model, samples, stream, world.device, gather_objects, show_progress=world.is_first
    )
    if not world.is_first:
        return
    entropy_LN, k_LN, is_vision_N = scores.tokens()
    routing = routing_summary(entropy_LN, k_LN, is_vision_N, scores.load_LE)
    static_k = getattr(model.moe_layers[0].router, "k", None)
    name = config.model.router.name
    record = EvalRecord(
        method=f"{name}_tuned" if checkpoint and static_k is not None else name,
        k=static_k,
        seed=config.seed,
        backbone_k=model.routing[0].top_k,
        accuracy=scores.accuracy,
        accuracy_by_kind=scores.accuracy_by_kind,
        num_questions_by_kind=dict(sorted(scores.asked.items())),
        accuracy_micro=scores.accuracy_micro,
        activated_parameters=model.activated_parameters(routing["mean_k_per_layer"]),
        total_parameters=model.num_parameters,
        seconds=time.perf_counter() - began,
        train_seconds=seconds_in(arguments.trained) if arguments.trained else None,
        checkpoint=str(checkpoint) if checkpoint else config.model.checkpoint,
        **routing,
        **provenance(),
    )
    write_record(out, record, TokenSample.draw(entropy_LN, k_LN, is_vision_N))
    print(
        f"{out}: accuracy {100 * record.accuracy:.2f} %, mean k {record.mean_k:.2f} "
        f"({record.seconds:.1f} s)",
        flush=True,
    )


if __name__ == "__main__":
    main(sys.argv[1:])
