"""As lmms-eval's model `qwen3_vl` asks: pictures first, then the text, after a system message.

It also shrinks pictures to `max_pixels` 1,605,632 and enlarges them to `min_pixels` 200,704, which
are options of our backbone.
"""

from __future__ import annotations

from typing import ClassVar

from gemoe_ds.data.prompts import Question
from gemoe_ds.evaluation.benchmarks.prompt_styles.style import PromptStyle


class Qwen3VLStyle(PromptStyle):
    name: ClassVar[str] = "qwen3_vl"
    model_name: ClassVar[str] = "qwen3_vl"

    def question(self, task: str, text: str, num_pictures: int) -> Question:
        return Question(
            text.replace("<image>", ""), system="You are a helpful assistant.", in_place=False
        )
