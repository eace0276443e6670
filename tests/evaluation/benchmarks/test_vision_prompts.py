"""What each style asks, by the words of those who published it; what is refused and when."""

from __future__ import annotations

import json
from dataclasses import dataclass
from types import SimpleNamespace

import pytest

from gemoe_ds.errors import ConfigError, SampleError
from gemoe_ds.evaluation.benchmarks.prompt_styles.style import PromptStyle, has_options
from gemoe_ds.evaluation.benchmarks.requests import Request
from gemoe_ds.evaluation.benchmarks.vision_prompts import VisionPrompts, refuse_pictures
from tests.helpers import repository
from tests.models.collators import make_collator, shown

GOLDEN = json.loads((repository() / "tests/models/golden/prompts.json").read_text("utf-8"))


@pytest.fixture(scope="module")
def collators(tmp_path_factory):
    names = ("olmoe", "molmoe", "deepseek_vl2", "qwen3_vl_moe")
    return {name: make_collator(name, tmp_path_factory.mktemp(name)) for name in names}


def style(name: str) -> PromptStyle:
    return PromptStyle.named(name)()


def asks(task: str, text: str, *sizes: tuple[int, int]) -> Request:
    return Request(task, 5, 0, "generate", text, images=lambda: [shown(*size) for size in sizes])


CHOICES = "Which?\nA. a cat\nB. a dog"


@pytest.mark.parametrize(
    ("task", "text", "asked"),
    [
        ("vqav2_val", "What is it?", "vqa2: What is it?"),
        ("textvqa_val", "What is it?", "text_vqa: What is it?"),
        ("infovqa_val_lite", "What is it?", "info_qa: What is it?"),
        ("pope", "Is there a dog?", "vqa2: Is there a dog?"),
        ("gqa", "What? A. no list", "vqa2: What? A. no list"),
        ("mmvet", "\n\nWhat is 1 + 1?", "vqa2: What is 1 + 1?"),
        ("ai2d", CHOICES, "ai2_diagram: Which?\nA: a cat\nB: a dog\n"),
        ("scienceqa_img", f"Context: C\n{CHOICES}", "science_qa: C\nWhich?\nA: a cat\nB: a dog\n"),
        ("mmmu_val", f"{CHOICES}\n\n", "a_okvqa_mc: Which?\nA: a cat\nB: a dog\n"),
        ("mmmu_val", "How many in <image 1>?\n\n", "vqa2: How many in <image 1>?"),
        (
            "mmbench_en_dev_static",
            "A hint. Which? There are several options:\nA. a cat\nB. a dog\n",
            "a_okvqa_mc: A hint. Which?\nA: a cat\nB: a dog\n",
        ),
        (
            "mmstar",
            "Which?\nOptions: A: cat, B: dog, C: no",
            "a_okvqa_mc: Which?\nOptions: A: cat, B: dog, C: no\n",
        ),
        ("realworldqa", f"{CHOICES}\nOnly the letter.", f"a_okvqa_mc: {CHOICES}\nOnly the letter."),
        ("realworldqa", "How far?\nAnswer with a number.", "vqa2: How far?"),
    ],
)  # fmt: skip
def test_molmo_names_the_data_set_that_it_learned_to_answer_like(task, text, asked):
    question = style("molmo").question(task, text, 1)
    assert question.lead + question.text == asked


def test_molmo_is_shown_the_first_picture(collators):
    ask = asks("mmmu_val", "Is <image 1> or <image 2> larger?", (50, 40), (30, 90))
    one = VisionPrompts(collators["molmoe"], style("molmo"))(ask, 9999)
    assert len(one.images) == 1
    assert (
        collators["molmoe"].tokenizer.decode(
            [i for i, seen in zip(one.input_ids, one.is_vision, strict=True) if not seen]
        )
        == "<|endoftext|> User: vqa2: Is <image 1> or <image 2> larger? Assistant:"
    )
    with pytest.raises(SampleError, match=r"mmmu_val, document 5: it shows 2 pictures"):
        VisionPrompts(collators["molmoe"], style("default"))(ask, 9999)


def test_deepseek_names_the_pictures_of_mmmu_behind_them(collators):
    """As VLMEvalKit's deepseek_vl2 writes it, whose first picture is twice as large."""
    case = GOLDEN["deepseek_vl2"]["cases"]["mmmu"]
    (width, height), second = case["sizes"]
    ask = asks("mmmu_val", case["text"].partition("\n")[2], (width // 2, height // 2), second)
    encoded = VisionPrompts(collators["deepseek_vl2"], style("deepseek_vl2"))(ask, 9999)
    pairs = [run if isinstance(run, list) else (run, 1) for run in case["ids"]]
    assert encoded.input_ids == [token for token, times in pairs for _ in range(times)]
    other = VisionPrompts(collators["deepseek_vl2"], style("deepseek_vl2"))
    assert other(asks("pope", "<image> a?", (9, 9)), 999).input_ids[:5].count(128815) > 0


def test_qwen3_vl_puts_pictures_first_behind_its_system_message(collators):
    own = VisionPrompts(collators["qwen3_vl_moe"], style("qwen3_vl"))
    encoded = own(asks("mmmu_val", "Is <image 1> <image>larger?", (40, 40)), 9999)
    assert collators["qwen3_vl_moe"].tokenizer.decode(encoded.input_ids).replace(
        "<|image_pad|>", ""
    ) == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
        "<|vision_start|><|vision_end|>Is <image 1> larger?<|im_end|>\n<|im_start|>assistant\n"
    )
    with pytest.raises(ConfigError, match="--prompt-style qwen3_vl has a system message"):
        VisionPrompts(collators["molmoe"], style("qwen3_vl"))


@pytest.mark.parametrize("name", PromptStyle.names())
def test_every_style_takes_any_question_and_says_its_name(name, collators):
    own = style(name)
    assert own.told()["prompt_style"] == name
    vision = VisionPrompts(collators["qwen3_vl_moe"], own) if name != "molmo" else None
    for text in ("", " ", CHOICES, "<image>", "<image 1> <image 2>", "A. \nB. ", "{text}{image}"):
        for count in (0, 1, 2):
            for task in ("mmmu_val", "pope", "own_task"):
                question = own.question(task, text, count)
                assert isinstance(question.lead, str)
                if vision:
                    encoded = vision(asks(task, text, *[(30, 20)] * count), 9999)
                    assert len(encoded.images) == count


def test_an_unknown_style_is_named():
    with pytest.raises(
        ConfigError, match="^prompt style 'qwen' is not known; known: .* mean qwen3"
    ):
        style("qwen")


def test_task_options_take_the_place_of_a_tasks_own():
    task = SimpleNamespace(lmms_eval_specific_kwargs={"post_prompt": "\nShort.", "format": "x"})
    style("molmo").configure(task)
    assert task.lmms_eval_specific_kwargs == {"post_prompt": "", "format": "x"}
    bare = SimpleNamespace(lmms_eval_specific_kwargs=None)
    style("molmo").configure(bare)
    assert bare.lmms_eval_specific_kwargs is None


def test_options_are_seen_where_tasks_write_them():
    assert (
        has_options(CHOICES)
        and has_options("Options: A: cat, B: dog")
        and has_options("(A) x\nA) 1\nB) 2")
    )
    assert (
        not has_options("Plan A. is it?") and not has_options("A. one only") and not has_options("")
    )


@dataclass
class Documents:
    name: str
    requests: list[Request]

    @property
    def num_documents(self) -> int:
        return len(self.requests)

    def requests_of(self, doc: int) -> list[Request]:
        return [self.requests[doc]]


def test_a_model_that_reads_text_refuses_pictures_before_it_starts(collators):
    text = Request("gsm8k", 0, 0, "generate", "1 + 1?")
    tasks = [Documents("gsm8k", [text]), Documents("pope", [asks("pope", "a", (4, 4))])]
    tasks.append(Documents("empty", []))
    with pytest.raises(ConfigError, match=r"--tasks pope: about pictures, and this backbone reads"):
        refuse_pictures(collators["olmoe"], tasks, style("default"))
    refuse_pictures(collators["olmoe"], [tasks[0], tasks[2]], style("default"))
    refuse_pictures(collators["qwen3_vl_moe"], tasks, style("default"))


def test_a_model_that_reads_one_picture_refuses_several_before_it_starts(collators):
    texts = ("<image 1> a", "b <image 1> or <image 1>?", "<image 1> or <image 3>?")
    tasks = [Documents("pope", [asks("pope", "a", (4, 4))])]
    tasks.append(Documents("mmmu_val", [asks("mmmu_val", text) for text in texts]))
    with pytest.raises(ConfigError, match="--tasks mmmu_val: document 5 shows 2 pictures, and"):
        refuse_pictures(collators["molmoe"], tasks, style("default"))
    refuse_pictures(collators["molmoe"], tasks, style("molmo"))
    refuse_pictures(collators["deepseek_vl2"], tasks, style("default"))
    tasks[1].requests.pop()
    refuse_pictures(collators["molmoe"], tasks, style("default"))
