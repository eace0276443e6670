"""How tasks are asked, where the user has a choice."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from gemoe_ds.evaluation.benchmarks.local_data import DataPlaces
from gemoe_ds.evaluation.benchmarks.prompt_styles.default import DefaultStyle
from gemoe_ds.evaluation.benchmarks.prompt_styles.style import PromptStyle

FEWSHOT_SEED = 1234  # as lm-eval's


@dataclass(frozen=True)
class TaskOptions:
    num_fewshot: int | None = None  # of language tasks; None: the task's own, MMLU's five
    limit: int | None = None  # the first so many documents of every leaf task
    # Renders messages, as data/chat_template.py does; None: plain text, as lm-eval's default.
    chat_template: Callable[..., str] | None = None
    data: DataPlaces = DataPlaces()
    style: PromptStyle = field(default_factory=DefaultStyle)  # of vision tasks

    @property
    def template(self) -> str:
        """For `choices`."""
        if self.chat_template is None:
            return "none"
        told = "examples as turns"
        drops = getattr(self.chat_template, "drops_system", False)
        return f"{told}, system messages left out" if drops else told
