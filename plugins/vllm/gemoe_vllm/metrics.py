"""The mean k that was served, in vLLM's `/metrics`.

    gemoe_routed_tokens_total{layer="0"}   tokens that the layer routed
    gemoe_used_experts_total{layer="0"}    experts that they used
    gemoe_mean_k                           the second over the first, all layers, since the start

Of a time span: rate(gemoe_used_experts_total[5m]) / rate(gemoe_routed_tokens_total[5m]), summed.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from prometheus_client import REGISTRY
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from gemoe_vllm.counts import folder, read


def register() -> None:
    """Once in a process, however often it is called."""
    if not any(isinstance(one, MeanK) for one in list(REGISTRY._collector_to_names)):
        REGISTRY.register(MeanK(folder()))


class MeanK(Collector):
    """Reads the workers' files when it is asked."""

    def __init__(self, counts: Path) -> None:
        self.counts = counts

    def describe(self) -> Iterator[Metric]:
        yield GaugeMetricFamily("gemoe_mean_k", "")

    def collect(self) -> Iterator[Metric]:
        count_L2 = read(self.counts)
        if not count_L2.sum():
            return
        for column, name, text in (
            (0, "gemoe_routed_tokens", "Tokens that a MoE layer routed."),
            (1, "gemoe_used_experts", "Experts that these tokens used."),
        ):
            family = CounterMetricFamily(name, text, labels=["layer"])
            for layer, count in enumerate(count_L2[:, column]):
                family.add_metric([str(layer)], float(count))
            yield family
        tokens, experts = count_L2.sum(0)
        text = "Mean number of experts that a token used, over all MoE layers, since the start."
        yield GaugeMetricFamily("gemoe_mean_k", text, value=experts / max(tokens, 1))
