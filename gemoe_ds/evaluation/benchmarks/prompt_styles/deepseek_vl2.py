"""As VLMEvalKit's model `deepseek_vl2` asks: MMMU in words of its own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from PIL import Image

from gemoe_ds.data.prompts import Question
from gemoe_ds.evaluation.benchmarks.prompt_styles.style import PromptStyle


class DeepseekVl2Style(PromptStyle):
    name: ClassVar[str] = "deepseek_vl2"
    task_options = {
        "multiple_choice_prompt": "Answer with the option's letter from the given choices "
        "directly. Answer the question using a single word or phrase.\n"
    }

    def question(self, task: str, text: str, num_pictures: int) -> Question:
        if num_pictures and task.startswith("mmmu"):  # marks stay as the names of the pictures
            return Question(("",) * num_pictures + (f"\n{text}",))
        return Question(text)

    def pictures(self, task: str, pictures: Sequence[Image.Image]) -> Sequence[Image.Image]:
        """The first one of MMMU at twice its size, so that it is cut into more tiles."""
        if not pictures or not task.startswith("mmmu"):
            return pictures
        first, *others = pictures
        size = (2 * first.width, 2 * first.height)
        return [first.resize(size, Image.Resampling.BILINEAR), *others]
