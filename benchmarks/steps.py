"""Whole training steps of a language model of two OLMoE layers at full width, routers only.

Ours in its DeepSpeed engine, top-8 and GeMoE; transformers' own model with torch's AdamW beside it.
Attention, head, backward pass, optimizer and monitoring are all in. Weights are random, so GeMoE's
mean k is what its fresh predictor gives.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from itertools import count
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import OlmoeConfig, OlmoeForCausalLM

from benchmarks import CHECKOUT
from benchmarks.shapes import Shape
from benchmarks.timing import Timing, measure, paired
from gemoe_ds.config.load import config_from_dict
from gemoe_ds.engine.build import initialize
from gemoe_ds.engine.world import World, sum_over_ranks
from gemoe_ds.models.moe_model import MoEModel
from gemoe_ds.models.random_checkpoint import write_word_tokenizer
from gemoe_ds.models.tiny.backbone import TinyBackbone
from gemoe_ds.moe.router import Router
from gemoe_ds.train.metric_writers import JsonLines, MetricWriter, TensorBoard
from gemoe_ds.train.monitor import StatSum

LAYERS, LENGTH, VOCABULARY = 2, 1024, 1000


def steps_suite(
    shape: Shape, num_tokens: int, dtype: torch.dtype, rounds: int, world: World
) -> list[dict[str, Any]]:
    """Rows of the same form as those of a single layer; FLOPs are those of the experts."""
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = write_tokenizer(Path(folder))
        static = step_model("top_k", shape, tokenizer, dtype)
        adaptive = step_model("gemoe", shape, tokenizer, dtype, experts_of=static)
        batch = step_batch(max(num_tokens // LENGTH, 1), world.device)
        runs: dict[str, Callable[[], Any]] = {}
        for name, model, router in (("static", static, "top_k"), ("adaptive", adaptive, "gemoe")):
            engine = initialize(model, step_config(router), world)
            model.train()
            runs[name] = training_step(engine, batch)
        writers: list[MetricWriter] = [JsonLines(Path(folder), 0), TensorBoard(Path(folder), 0)]
        runs["with statistics"] = _collecting(adaptive, runs["adaptive"], writers, world)
        for implementation in ("eager", "grouped_mm"):
            runs[f"hf_{implementation.removesuffix('_mm')}"] = _stock_step(
                shape, static, implementation, batch
            )
        timings = measure(runs, rounds)
        for writer in writers:
            writer.close()
    mean_k = _mean_k(adaptive, batch)
    every = step_config("gemoe").monitor.every
    own = timings["adaptive"]
    saved = 1 - mean_k / shape.top_k
    extra = {
        "realised_over_ideal": paired(
            lambda t8, t: (t8 - t) / (t8 * saved), timings["static"], own
        ),
        "monitoring_share": paired(
            lambda with_it, without: (with_it - without) / without / every,
            timings["with statistics"],
            own,
        ),
    }
    tokens = batch["input_ids_BS"].numel()
    rows = [
        _row(shape, "gemoe_ds", shape.top_k, tokens, timings["static"], {}),
        _row(shape, "gemoe_ds", mean_k, tokens, own, extra),
    ]
    return rows + [
        _row(shape, name, shape.top_k, tokens, timings[name], {})
        for name in ("hf_eager", "hf_grouped")
    ]


def _row(
    shape: Shape, name: str, mean_k: float, tokens: int, timing: Timing, extra: dict[str, float]
) -> dict[str, Any]:
    flops = 2 * LAYERS * shape.forward_flops(round(mean_k * tokens))
    return {
        "suite": "steps",
        "layer": name,
        "mean_k": round(mean_k, 3),
        "mode": "frozen",
        "shape": shape.name,
        "tokens": tokens,
        "ep": 1,
        **timing.row(),
        "tokens_per_s": round(tokens / timing.median),
        "gflops_per_s": round(flops / timing.median / 1e9, 1),
        **{figure: round(value, 5) for figure, value in extra.items()},
    }


def write_tokenizer(folder: Path) -> Path:
    words = ["<pad>", "<s>", "</s>", "<image>", *(f"w{i}" for i in range(VOCABULARY - 4))]
    write_word_tokenizer({word: i for i, word in enumerate(words)}, ["<image>"], folder)
    return folder


def step_model(
    router: str,
    shape: Shape,
    tokenizer: Path,
    dtype: torch.dtype,
    experts_of: MoEModel | None = None,
) -> MoEModel:
    """`experts_of`: share the experts of that model, there is memory for one set only."""
    backbone = TinyBackbone(
        TinyBackbone.Config(
            hidden_size=shape.d_model,
            num_layers=LAYERS,
            num_heads=max(shape.d_model // 128, 1),
            num_experts=shape.num_experts,
            top_k=shape.top_k,
            expert_width=shape.width,
        )
    )
    chosen = Router.named(router)
    torch.manual_seed(0)
    model = MoEModel.from_checkpoint(
        backbone, None, tokenizer, (chosen, chosen.Config()), dtype=dtype, pack_experts=True
    )
    if experts_of is not None:
        for own, other in zip(model.moe_layers, experts_of.moe_layers, strict=True):
            own.experts = other.experts
    return model


def step_config(router: str, compiles: str = "none") -> Any:
    return config_from_dict(
        {
            "output_dir": "unused",
            "model": {
                "backbone": {"name": "tiny"},
                "router": {"name": router},
                "dtype": "bfloat16",
                "checkpoint": "unused",
                "compile": compiles,
            },
            "data": {"train_path": "unused", "tokenizer": "unused"},
            "optim": {"lr": 1e-4},
            "train": {"steps": 100, "micro_batch_size": 1},
            "deepspeed": str(CHECKOUT / "ds_configs/zero0.json"),
        }
    )


def step_batch(sequences: int, device: torch.device) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    ids_BS = torch.randint(4, VOCABULARY, (sequences, LENGTH), generator=generator)
    batch = {
        "input_ids_BS": ids_BS,
        "labels_BS": ids_BS.clone(),
        "is_valid_BS": torch.ones_like(ids_BS, dtype=torch.bool),
        "is_vision_BS": torch.zeros_like(ids_BS, dtype=torch.bool),
    }
    dummy = {"pixels": torch.zeros(1, 3, 64, 64), "feature_BS": torch.full_like(ids_BS, -1)}
    return {
        "images": {name: tensor.to(device) for name, tensor in dummy.items()},
        **{name: tensor.to(device) for name, tensor in batch.items()},
    }


def training_step(engine: Any, batch: dict[str, Any]) -> Callable[[], None]:
    def run() -> None:
        engine.backward(engine(**batch)["loss"])
        engine.step()

    return run


def _collecting(
    model: MoEModel, step: Callable[[], Any], writers: Sequence[MetricWriter], world: World
) -> Callable[[], None]:
    """The same step, with the statistics that TensorBoard shows, and their way to its files."""
    sums, number = StatSum(), count()

    def run() -> None:
        model.ctx.collect = True
        step()
        model.ctx.collect = False
        sums.add_layers(model.ctx)
        values = dict(sums.reduced(sum_over_ranks, world.device))
        step_number = next(number)
        for writer in writers:
            writer.write(step_number, values)

    return run


def _stock_step(
    shape: Shape, ours: MoEModel, implementation: str, batch: dict[str, Tensor]
) -> Callable[[], None]:
    """transformers' model of the same size on our experts; its gates train, nothing else does."""
    layer = ours.moe_layers[0]
    config = OlmoeConfig(
        vocab_size=VOCABULARY,
        hidden_size=shape.d_model,
        intermediate_size=8,  # replaced below
        num_hidden_layers=LAYERS,
        num_attention_heads=max(shape.d_model // 128, 1),
        num_experts=shape.num_experts,
        num_experts_per_tok=shape.top_k,
        norm_topk_prob=False,
        experts_implementation=implementation,  # type: ignore[call-arg]
    )
    device, dtype = batch["input_ids_BS"].device, layer.experts.down_EDF.dtype
    model: Any = OlmoeForCausalLM(config)
    model = model.to(device, dtype)
    model.requires_grad_(False)
    for block, own in zip(model.model.layers, ours.moe_layers, strict=True):
        experts = block.mlp.experts
        experts.gate_up_proj = nn.Parameter(own.experts.gate_up_EGD, requires_grad=False)
        experts.down_proj = nn.Parameter(own.experts.down_EDF, requires_grad=False)
        block.mlp.gate.weight.requires_grad_(True)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    model.train()

    def run() -> None:
        model(batch["input_ids_BS"], labels=batch["labels_BS"], use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return run


@torch.no_grad()
def _mean_k(model: MoEModel, batch: dict[str, Tensor]) -> float:
    model.ctx.trace = True
    model(**batch)
    k = [record.k_T for record in model.ctx.layers if record.k_T is not None]
    return float(torch.stack(k).float().mean())
