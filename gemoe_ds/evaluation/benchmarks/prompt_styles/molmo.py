"""As Molmo's own evaluation asks: a prefix names the data set that it learned to answer like.

From olmo/data of allenai/molmo and VLMEvalKit's `molmo`: no instructions around the question,
options as `A: ...`, one picture. Data sets that it did not train on are asked like VQA v2, or like
A-OKVQA if they have options.
"""

from __future__ import annotations

import re
from typing import ClassVar

from gemoe_ds.data.prompts import Question
from gemoe_ds.evaluation.benchmarks.prompt_styles.style import PromptStyle, has_options

_TRAINED = {
    "ai2d": "ai2_diagram",
    "chartqa": "chart_qa",
    "coco": "coco_captioning",
    "docvqa": "doc_qa",
    "infovqa": "info_qa",
    "ocrvqa": "ocr_vqa",
    "ok_vqa": "okvqa",
    "scienceqa": "science_qa",
    "textvqa": "text_vqa",
    "vqav2": "vqa2",
}
_INSTRUCTIONS = ("pre_prompt", "post_prompt", "multiple_choice_prompt", "open_ended_prompt")


class MolmoStyle(PromptStyle):
    name: ClassVar[str] = "molmo"
    task_options = dict.fromkeys(_INSTRUCTIONS, "")
    most_pictures = 1  # the first: all that it was trained on, and asked about

    def question(self, task: str, text: str, num_pictures: int) -> Question:
        chooses = has_options(text)
        style = "a_okvqa_mc" if chooses else "vqa2"
        style = next((s for begin, s in _TRAINED.items() if task.startswith(begin)), style)
        if task.startswith("realworldqa"):
            text = text if chooses else text.partition("\n")[0]
        elif chooses:
            text = text.replace(" There are several options:", "").removeprefix("Context: ")
            text = re.sub(r"^([A-Z])\. ", r"\1: ", text.strip(), flags=re.MULTILINE) + "\n"
        return Question(text.rstrip(" ") if chooses else text.strip(), lead=f"{style}: ")
