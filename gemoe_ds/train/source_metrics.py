"""Loss, mean k and tokens of each source of the training data, in a step that is reported.

    train/loss/NAME      cross-entropy of a target
    train/mean_k/NAME    experts of a token, mean over the layers
    train/tokens/NAME    valid tokens of the step

Sums and counts, which travel with those of the other metrics: there is no collective of their own.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gemoe_ds.data.collate import IGNORE, Batch
from gemoe_ds.data.row_names import Sources
from gemoe_ds.moe.context import Stat, TokenContext
from gemoe_ds.train.monitor import StatSum


class SourceMetrics:
    """Of this rank's micro-batches. Does nothing where there are no sources to tell apart."""

    def __init__(self, sources: Sources | None, num_layers: int) -> None:
        self.sources, self.num_layers = sources, num_layers

    def begin(self, ctx: TokenContext, batch: Batch, device: torch.device, collect: bool) -> None:
        """Before the forward of a micro-batch that trains: tell the model whose samples these are,
        if it is to be reported."""
        ctx.source_B = None
        if self.sources and collect:
            ctx.source_B = self._source_B(batch).to(device, non_blocking=True)
            ctx.num_sources = len(self.sources.names)

    def add(self, stats: StatSum, batch: Batch, found_S2: Tensor, *, is_first: bool) -> None:
        """What that forward has found: see `models.by_source`. Tokens count in the first update
        of a step only."""
        assert self.sources is not None
        names, source_B = self.sources.names, self._source_B(batch)

        def of_source(is_one_BS: Tensor) -> Tensor:
            count_B = batch.per_sample(is_one_BS)
            return count_B.new_zeros(len(names)).index_add_(0, source_B, count_B)

        tokens_S = of_source(batch.is_valid_BS)
        is_target_BS = batch.labels_BS != IGNORE
        is_target_BS[:, 0] = False  # nothing predicts it
        targets_S = of_source(is_target_BS)
        for place, (ce, k) in enumerate(found_S2.cpu()):
            name, tokens = names[place], tokens_S[place]
            stats.add(f"train/loss/{name}", Stat(ce, count=targets_S[place]))
            stats.add(f"train/mean_k/{name}", Stat(k, count=tokens * self.num_layers))
            if is_first:
                stats.add(f"train/tokens/{name}", Stat(tokens, "sum"))

    def _source_B(self, batch: Batch) -> Tensor:
        assert self.sources is not None
        return torch.from_numpy(self.sources.source_N[list(batch.rows)]).long()
