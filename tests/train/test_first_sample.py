"""What a dry run shows of the first sample."""

from __future__ import annotations

import pytest

from gemoe_ds.data.sample import Turn, of_turns
from gemoe_ds.train.first_sample import first_sample
from tests.models.collators import make_collator, picture

TURNS = (Turn("What is it?", "A dog.\n"), Turn("Where?", "At home."))
SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives "
    "helpful, detailed, and polite answers to the user's questions."
)


@pytest.mark.parametrize(
    "name, lines",
    [
        (
            "deepseek_vl2",
            [
                "1,051 tokens, 1,023 of them of an image; 9 are targets",
                "  input  | <｜begin▁of▁sentence｜><|User|>: <image> x 1023\\nWhat is it?\\n\\n"
                "<|Assistant|>:",
                "  target | A dog.<｜end▁of▁sentence｜>",
                "  input  | <|User|>: Where?\\n\\n<|Assistant|>:",
                "  target | At home.<｜end▁of▁sentence｜>",
            ],
        ),
        (
            "molmoe",
            [
                "<|endoftext|><im_start> x 2 <im_patch> x 704 <im_col> x 32 <im_end> x 2 User: "
                "What is it? Assistant:",
                "  target |  A dog.\\n<|endoftext|>",
            ],
        ),
        (
            "qwen3_vl_moe",
            [
                "<|im_start|>user\\n<|vision_start|> <|image_pad|> x 300 <|vision_end|>What is it?",
                "  target | A dog.\\n<|im_end|>\\n",
            ],
        ),
        (
            "moe_llava_qwen",
            [
                f"  input  | {SYSTEM} USER: <image> x 576\\nWhat is it? ASSISTANT:",
                "  target |  A dog.\\n<|endoftext|>",
                "  input  | USER: Where? ASSISTANT:",
            ],
        ),
    ],
)
def test_the_first_sample(name, lines, tmp_path):
    shown = "\n".join(
        first_sample(make_collator(name, tmp_path), [of_turns("s", picture(640, 480), TURNS)])
    )
    assert shown.startswith("sample s, the first one, as the model sees it: ")
    place = 0
    for line in lines:
        place = shown.index(line, place) + len(line)


def test_one_that_can_be_shown(tmp_path):
    """A broken one is named, the next is shown; of a long text the middle is left out."""
    long = Turn("a" * 3000, "b")
    samples = [
        of_turns("bad", b"...", TURNS),
        of_turns("t", None, (long,)),
        of_turns("u", None, TURNS),
    ]
    left_out, head, asked, answer = first_sample(make_collator("molmoe", tmp_path), samples)
    assert left_out.startswith("left out: sample bad: its image cannot be")
    assert head.startswith("sample t") and answer == "  target |  b<|endoftext|>"
    assert len(asked) < 500 and " characters ...] a" in asked and asked.endswith("a Assistant:")


def test_no_sample_that_can_be_shown(tmp_path):
    lines = list(
        first_sample(make_collator("molmoe", tmp_path), [of_turns("bad", b"...", TURNS)] * 200)
    )
    assert len(lines) == 10 and all(line.startswith("left out") for line in lines)
