"""Ids, targets and prompts of conversations are those that every model's own code printed."""

from __future__ import annotations

import pytest

from gemoe_ds.data.sample import Sample, Turn, of_turns
from gemoe_ds.data.turn import MARK
from tests.models.collators import LAYOUTS, make_collator, picture
from tests.models.published import GOLDEN


@pytest.fixture(scope="module", params=LAYOUTS)
def collator(request, tmp_path_factory):
    return request.param, make_collator(request.param, tmp_path_factory.mktemp(request.param))


def sample(case) -> Sample:
    image = picture(*case["size"]) if "size" in case else None
    return of_turns("x", image, tuple(Turn(*turn) for turn in case["turns"]))


def ids_of(packed, targets=()):
    """Ids, and which of them are targets; an image of MoE-LLaVA is 576 features."""
    ids, is_target = [], []
    place = 0
    for entry in packed:
        token, times = entry if isinstance(entry, list) else (entry, 1)
        for _ in range(times):
            some = 576 if token == -200 else 1
            ids += [0 if token == -200 else token] * some
            is_target += [any(a <= place < b for a, b in targets)] * some
            place += 1
    return ids, is_target


def test_as_the_models_own_code_has_them(collator):
    name, collator = collator
    for title, case in GOLDEN[name]["cases"].items():
        encoded = collator.encode(0, sample(case))
        ids, is_target = ids_of(case["ids"], case["targets"])
        assert encoded.input_ids == ids, title
        # MoE-LLaVA's code counts wrong after an empty question, says so, and drops the conversation
        if case["targets"]:
            assert [label != -100 for label in encoded.labels] == is_target, title
        prompt = collator.prompt(0, sample(case))
        assert prompt.input_ids == ids_of(case["prompt"])[0], title


def test_tokens_that_build_a_conversation_are_spelled_in_a_text(collator):
    """There is no way for a page about chats to end an answer. MARK alone is refused."""
    name, collator = collator
    chat, special = collator.conversations.chat, GOLDEN[name]["tokenizer"]["special"]
    said = "x".join(token for token in special if token not in (*chat.obeyed, MARK))
    plain, spelled = (
        collator.encode(0, of_turns("x", None, (Turn(text, text), Turn("b", "c")))).input_ids
        for text in ("a", f"a{said}z")
    )
    ids = set(special.values())
    assert [i for i in spelled if i in ids] == [i for i in plain if i in ids]
    assert collator.tokenizer.decode(spelled).count(f"a{said}z") == 2


def test_where_an_answer_ends(collator):
    """Qwen3-VL's own generation ends at two tokens."""
    name, collator = collator
    ends = {"deepseek_vl2": {1}, "qwen3_vl_moe": {151645, 151643}, "moe_llava_qwen": {151643}}
    ends |= {"olmoe": {50279}, "molmoe": {50279}, "moe_llava_stablelm": {100257}}
    assert collator.end_ids == ends[name]
