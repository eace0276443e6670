"""serve-check on exports that see: pictures by the folder's own processor, the trained k by its own
code, the static k with the routing switched off."""

from __future__ import annotations

import json

import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from gemoe_ds.export.code_record import check_code
from gemoe_ds.serving.check import Options, serve_check
from gemoe_ds.serving.prompts import draw
from tests.export.families import FAMILIES, write_exported

QUESTIONS = [("What is this?", True), ("Say nothing.", False)]
NEW = 3
IN_CI = "deepseek_vl2"


def by_hand(folder, picture):
    """A prompt at a time; the k of its tokens, counted over a forward without a cache."""
    model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True).eval()
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    answers, sums, tokens = [], 0, 0
    for question, sees in QUESTIONS:
        content = [{"type": "image"}] * sees + [{"type": "text", "text": question}]
        text = processor.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True
        )
        inputs = processor(text=text, images=[Image.open(picture)] if sees else None)
        with torch.no_grad():
            ids = model.generate(**inputs, max_new_tokens=NEW, do_sample=False, eos_token_id=None)
            answers.append(ids[0, inputs["input_ids"].shape[1] :].tolist())
            model(**inputs)
        k = torch.stack([k_BS.double() for k_BS in model.k_per_layer])
        sums, tokens = sums + k.sum().item(), tokens + k.numel()
    return answers, sums / tokens


@pytest.mark.parametrize(
    "name", [n if n == IN_CI else pytest.param(n, marks=pytest.mark.slow) for n in FAMILIES]
)
def test_every_family_is_asked_about_pictures(name, in_this_process, tmp_path):
    folder = write_exported(name, tmp_path).folder
    check_code(folder)
    picture = draw(tmp_path / "picture.png", 1)
    rows = [{"text": text, "images": ["picture.png"] if sees else []} for text, sees in QUESTIONS]
    (tmp_path / "prompts.jsonl").write_text("\n".join(map(json.dumps, rows)))
    options = Options(tmp_path / "prompts.jsonl", max_new_tokens=NEW, batch=2, rounds=1)
    trained, static = serve_check(folder, options, print)
    answers, k_of_prompts = by_hand(folder, picture)
    assert [answer.ids for answer in trained.served.answers] == answers
    blocks = json.loads((folder / "config.json").read_text())["gemoe"]["blocks"]
    top_k = blocks[0]["routing"]["top_k"]
    assert trained.mean_k < top_k == static.mean_k
    assert trained.mean_k == pytest.approx(k_of_prompts, rel=0.1), "answers are short"
    assert static.agreement.largest > 1e-4, "the two ways to route differ"
    prompts = [answer.prompt_ids for answer in static.served.answers]
    assert prompts == [answer.prompt_ids for answer in trained.served.answers]
    ids = trained.served.ids
    for (_, sees), asked, read in zip(QUESTIONS, ids, prompts, strict=True):
        assert len(read) > len(asked) if sees else read == asked
