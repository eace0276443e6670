"""What inference costs with each way of routing: the columns of GeMoE's Table 3, and k beside them.

Memory is the peak of the fullest rank; operations are those of the language model, for a token of
the prompts and for one that is written.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

from gemoe_ds.evaluation.generate import GenerationStats
from gemoe_ds.models.cost.flops import flops_per_token
from gemoe_ds.models.moe_model import MoEModel


@dataclass(frozen=True)
class Cost:
    """One way to route. Rates are medians over the timed rounds, all ranks together."""

    mode: str
    samples: int
    prompt_tokens: int
    written_tokens: int
    mean_k_prompts: float
    mean_k_written: float
    parameters: int
    activated_parameters: int
    memory_bytes: int
    gflops_per_prompt_token: float
    gflops_per_written_token: float
    prompt_tokens_per_s: float
    written_tokens_per_s: float
    seconds_per_sample: float
    seconds_per_sample_by_round: list[float]

    @classmethod
    def of(
        cls,
        mode: str,
        model: MoEModel,
        prompts: GenerationStats,
        steps: GenerationStats,
        samples: int,
        rounds: list[tuple[float, float]],
        memory_bytes: int,
    ) -> Cost:
        """`prompts` and `steps` over all ranks; of each round seconds for both, slowest rank."""
        all_k_L = (prompts + steps).mean_k_L
        gflops = [
            sum(flops_per_token(model, work.mean_k_L, work.context).values()) / 1e9
            if work.tokens
            else 0.0
            for work in (prompts, steps)
        ]
        written = steps.tokens + samples  # the first one of each is written by its prompt
        by_round = [(before + after) / samples for before, after in rounds]
        decoding = median(after for _, after in rounds)
        return cls(
            mode,
            samples,
            prompts.tokens,
            written,
            _mean(prompts.mean_k_L),
            _mean(steps.mean_k_L),
            model.num_parameters + model.num_added_parameters,
            model.activated_parameters(all_k_L),
            memory_bytes,
            gflops[0],
            gflops[1],
            prompts.tokens / median(before for before, _ in rounds),
            steps.tokens / decoding if decoding else 0.0,
            median(by_round),
            by_round,
        )


def _mean(values: list[float]) -> float:
    return sum(values) / max(len(values), 1)


def as_json(costs: list[Cost]) -> list[dict[str, Any]]:
    return [asdict(cost) for cost in costs]


def as_markdown(costs: list[Cost]) -> str:
    """A table whose last column compares with the first row."""
    lines = [
        "| routing | mean k: prompts, written | parameters | activated | memory, GB "
        "| GFLOPs a token: prompts, written | tokens/s: prompts, written | s a sample | of row 1 |",
        "|" + "---|" * 9,
    ]
    for cost in costs:
        cells = [
            cost.mode,
            f"{cost.mean_k_prompts:.2f}, {cost.mean_k_written:.2f}",
            f"{cost.parameters / 1e9:.4g} B",
            f"{cost.activated_parameters / 1e9:.4g} B",
            f"{cost.memory_bytes / 1e9:.2f}",
            f"{cost.gflops_per_prompt_token:.4g}, {cost.gflops_per_written_token:.4g}",
            f"{cost.prompt_tokens_per_s:,.0f}, {cost.written_tokens_per_s:,.1f}",
            f"{cost.seconds_per_sample:.4g}",
            f"{cost.seconds_per_sample / costs[0].seconds_per_sample:.3f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"
