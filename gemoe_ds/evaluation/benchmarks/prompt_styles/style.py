"""PromptStyle: how its publishers ask a model; each style is a file beside this one."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from PIL import Image

from gemoe_ds.data.prompts import Question
from gemoe_ds.registry import Registered


class PromptStyle(Registered):
    """Changes what a vision task asks; text tasks are asked as their harness has them."""

    name: ClassVar[str]
    # For lmms-eval's TaskManager: whose lmms_eval_specific_kwargs a task takes, if it has some.
    model_name: ClassVar[str] = "default"
    # In the place of those, where a task has such an option (pre_prompt, post_prompt ...).
    task_options: ClassVar[Mapping[str, str]] = {}
    most_pictures: ClassVar[int | None] = None  # of a document; None: all

    def configure(self, task: Any) -> None:
        """Sets `task_options` of a task of lmms-eval, before it says what it asks."""
        options = task.lmms_eval_specific_kwargs
        for option in (options or {}).keys() & self.task_options.keys():
            options[option] = self.task_options[option]

    def question(self, task: str, text: str, num_pictures: int) -> Question:
        """What a task's text becomes."""
        return Question(text)

    def pictures(self, task: str, pictures: Sequence[Image.Image]) -> Sequence[Image.Image]:
        """Those that are shown, as they are shown."""
        return pictures[: self.most_pictures]

    def told(self) -> dict[str, str]:
        """For `choices` of scores.json and for mode.json."""
        return {"prompt_style": self.name}


def has_options(text: str) -> bool:
    """Whether a question names options, A and B at least, as lmms-eval's tasks write them."""
    return all(re.search(rf"(?:^|[\n,]|Options:) ?{letter}[.:)] ", text) for letter in "AB")
