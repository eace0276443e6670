"""One step of writing answers with fixed shapes and addresses: what a CUDA graph can hold.

A token through the model is about 100 launches a layer, and on a GPU their launching takes longer
than their work. A graph launches them all at once. No graph was captured yet: no GPU was at hand.

Shapes: B sequences, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gemoe_ds.errors import ConfigError, in_a_line
from gemoe_ds.models.inputs import ModelInputs
from gemoe_ds.models.kv_cache import DecodeState, FixedDecodeState
from gemoe_ds.models.moe_model import MoEModel
from gemoe_ds.models.quantised_linear import QuantisedLinear
from gemoe_ds.moe.dispatch import MOST_AT_ONCE
from gemoe_ds.moe.experts import grouped
from gemoe_ds.moe.experts.ffn import path_for
from gemoe_ds.moe.triton_launch import available


def why_no_graph(model: MoEModel, num_sequences: int, *, recorded: bool) -> str | None:
    """What stands against a graph of the steps, in a line; None: nothing is known.

    `recorded`: whether somebody looks at what was routed after every step.
    """
    device = next(model.parameters()).device
    if device.type != "cuda":
        return f"there are no CUDA graphs on {device}"
    if model.shard.num_ranks > 1:
        return "ranks share experts (parallel.ep_size > 1): every layer waits for their counts"
    if recorded:
        return "what is routed is counted after every step, on the host"
    if not available(device):
        return "Triton is not there, without which a layer waits for its counts"
    layers = model.moe_layers
    most = num_sequences * max(layer.router.max_k for layer in layers)
    if most > MOST_AT_ONCE:
        return (
            f"{num_sequences} sequences may have {most:,} assignments a step; above "
            f"{MOST_AT_ONCE:,} a layer waits for their number: use a smaller batch"
        )
    if any(isinstance(module, QuantisedLinear) for module in model.modules()):
        return "model.dense_dtype: weights in few bits are dequantised into memory that is reused"
    shapes = {layer.experts.down_EDF.shape[1:] for layer in layers}
    if any(path_for(device, model.dtype, *shape) is not grouped for shape in shapes):
        return f"experts in {model.dtype} are multiplied one by one, by numbers that the host knows"
    modules: list[Any] = [one for one in model.hf.modules() if hasattr(one, "layer_idx")]
    attention = {one.config._attn_implementation for one in modules if hasattr(one, "config")}
    if others := attention - {"sdpa"}:
        return f"attention is {', '.join(map(str, others))}: sdpa takes a mask of fixed shape"
    return None


class FixedStep:
    """Called with the last token of every sequence, it gives the logits of the next.

    Calls share all memory: what one returns is overwritten by the next.
    """

    def __init__(self, model: MoEModel, past: DecodeState, room: int) -> None:
        """Up to `room` tokens of every sequence are read. ConfigError for an unusual cache."""
        try:
            self.past = FixedDecodeState(past, room)
        except TypeError as error:
            raise ConfigError(
                f"no CUDA graph: the model keeps its past in a {error}, whose size changes; leave "
                "the graph out"
            ) from None
        self.model = model
        valid_BP = self.past.is_valid_BP
        self.token_B1 = self.past.next_position_B.new_zeros(len(valid_BP), 1)
        self.is_valid_B1 = valid_BP.new_zeros(len(valid_BP), 1)
        self.is_vision_B1 = valid_BP.new_zeros(len(valid_BP), 1)
        self.logits_BV: Tensor | None = None
        self._replay = self.run

    def __call__(self, token_B: Tensor, is_valid_B: Tensor) -> Tensor:
        """int64 [B], bool [B] -> float32 [B, V]"""
        self.token_B1.copy_(token_B[:, None], non_blocking=True)
        self.is_valid_B1.copy_(is_valid_B[:, None], non_blocking=True)
        self._replay()
        assert self.logits_BV is not None
        return self.logits_BV

    def run(self) -> None:
        """What a graph holds: from the inputs, which stay where they are, to the logits."""
        inputs = ModelInputs(self.token_B1, self.is_valid_B1, self.is_vision_B1, past=self.past)
        self.logits_BV = self.model.next_logits(inputs)

    def capture(self) -> None:
        """Replay a CUDA graph from now on. ConfigError if the step cannot be captured."""
        before = [one.clone() for one in self.past.positions()]
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
        try:
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):  # kernels are compiled and libraries set up
                self.run()
                self._back_to(before)
            torch.cuda.current_stream().wait_stream(stream)
            with torch.cuda.graph(graph):
                self.run()
        except RuntimeError as error:
            raise ConfigError(
                f"no CUDA graph of a step: {in_a_line(error)}; leave the graph out"
            ) from error
        self._replay = graph.replay

    def _back_to(self, before: list[Tensor]) -> None:
        for one, value in zip(self.past.positions(), before, strict=True):
            one.copy_(value)
