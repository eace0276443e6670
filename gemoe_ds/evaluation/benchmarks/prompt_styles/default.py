"""The prompts that lmms-eval has for models without their own: LLaVA's."""

from __future__ import annotations

from typing import ClassVar

from gemoe_ds.evaluation.benchmarks.prompt_styles.style import PromptStyle


class DefaultStyle(PromptStyle):
    name: ClassVar[str] = "default"
