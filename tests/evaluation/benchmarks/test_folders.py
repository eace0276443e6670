"""Folders as published, of every backbone, answer what is asked about pictures and about text."""

from __future__ import annotations

import json
from argparse import Namespace
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from gemoe_ds.analysis.routing_sums import RoutingSums
from gemoe_ds.config.load import as_config
from gemoe_ds.data.collate import Collator
from gemoe_ds.errors import ConfigError
from gemoe_ds.evaluation.benchmarks.answer_modes import whole_context
from gemoe_ds.evaluation.benchmarks.prompt_styles.style import PromptStyle
from gemoe_ds.evaluation.benchmarks.requests import Answer, Request, Writing
from gemoe_ds.evaluation.benchmarks.vision_prompts import VisionPrompts
from gemoe_ds.models.backbone import Backbone
from gemoe_ds.models.moe_model import MoEModel
from gemoe_ds.models.tokenizer import load_tokenizer
from gemoe_ds.moe.router import Router
from tests.evaluation.benchmarks.hand_made import HandMade, answer, write_recipe
from tests.models.cases import CASES, write_case


@dataclass
class Pictures:
    """Documents as MMMU's: one to three pictures each, some marked in the text."""

    num_documents: int = 5
    name: str = "mmmu_by_hand"
    harness: str = "by_hand"
    group: str | None = None
    choices: dict[str, int] = field(default_factory=lambda: {"limit": 5})

    def requests_of(self, doc: int) -> list[Request]:
        count = 1 + doc % 3

        def images() -> list[Image.Image]:
            rng = np.random.default_rng(doc)
            sizes = rng.integers(5, 40, (count, 2))
            return [Image.fromarray(rng.integers(0, 255, (*s, 3), np.uint8)) for s in sizes]

        marks = " ".join(f"<image {n + 1}>" for n in range(count)) if doc % 2 == 0 else "a b"
        asked, how = f"c {marks} d e", Writing(max_new_tokens=3)
        return [Request(self.name, doc, 0, "generate", asked, writing=how, images=images)]


def read(folder: Path, task) -> list[Answer]:
    """In the order of the documents."""
    lines = (folder / task.name / "answers.jsonl").read_text("utf-8").splitlines()
    return sorted(map(Answer.from_json, lines), key=lambda one: (one.doc_id, one.index))


def by_hand(model, collator, prompt) -> list[int]:
    """Token by token: everything is read again for each, alone and without a cache."""
    ids: list[int] = []
    while len(ids) < 3 and not collator.end_ids & {*ids}:
        with torch.no_grad():
            inputs = collator.batch([prompt], left=True).model_inputs
            ids.append(int(model.next_logits(inputs).argmax()))
        prompt.add(ids[-1:])
    return ids


@pytest.mark.parametrize("name, length", [("molmoe", 4096), ("qwen3_vl_moe", 8192)])
def test_a_prompt_may_be_as_long_as_the_model_reads(tmp_path, name, length):
    base, tokenizer = write_case(name, tmp_path)
    setting = {"root": tmp_path, "hf": base, "tokenizer": tokenizer, "data": tmp_path}
    config = as_config(write_recipe(setting, name))
    assert config.data.max_length == 64
    assert whole_context(Namespace(overrides=[]), config).data.max_length == length
    assert whole_context(Namespace(overrides=["data.max_length=64"]), config) == config


@pytest.mark.parametrize("name", CASES)
def test_every_backbone(name, tmp_path):
    base, tokenizer_dir = write_case(name, tmp_path)
    setting = {"root": tmp_path, "hf": base, "tokenizer": tokenizer_dir, "data": tmp_path}
    recipe = write_recipe(setting, name)
    options = ("--k", "2", "data.max_length=500", "--batch", "300", "--out", tmp_path)
    pictures, letters = Pictures(), HandMade("letters", 5)
    if not CASES[name].sees:
        with pytest.raises(ConfigError, match="--tasks mmmu_by_hand: about pictures, and this"):
            answer(recipe, [letters, pictures], *options)
        answer(recipe, [letters], *options)
        assert len(read(tmp_path / "k_2", letters)) == 20
        return
    chat = Backbone.named(name).chat
    style = "molmo" if chat.one_image else "default"
    if chat.one_image:
        with pytest.raises(ConfigError, match="mmmu_by_hand: document 2 shows 3 pictures, and"):
            answer(recipe, [letters, pictures], *options)
    answer(recipe, [letters, pictures], *options, style=style)
    folder = options[-1] / "k_2"
    assert len(read(folder, letters)) == 20
    sums = RoutingSums.load(folder / pictures.name / "routing.npz")
    assert sums.tokens_M[0] > 5 * 4 and set(sums.k_LN.flatten()) == {2}
    asked = json.loads((folder / pictures.name / "asked.json").read_text())
    assert asked["choices"] == {"limit": 5, "max_length": 500, "prompt_style": style}

    top_k = Router.named("top_k")
    model = MoEModel.from_checkpoint(
        Backbone.named(name)(Backbone.named(name).Config()),
        base,
        tokenizer_dir,
        (top_k, top_k.Config(k=2)),
    ).eval()
    layout = model.image_layout
    tokenizer = load_tokenizer(tokenizer_dir, chat, layout.token)
    collator = Collator(tokenizer, layout, chat, max_length=500)
    vision = VisionPrompts(collator, PromptStyle.named(style)())
    for found, doc in zip(read(folder, pictures), range(5), strict=True):
        prompt = vision(*pictures.requests_of(doc), 497)
        assert found.prompt_tokens == len(prompt.input_ids)
        ids = by_hand(model, collator, prompt)
        assert found.written_tokens == len(ids)
        assert found.text == tokenizer.decode(
            [i for i in ids if i not in collator.end_ids], skip_special_tokens=True
        )


STYLES = {
    "olmoe": "default",
    "molmoe": "molmo",
    "deepseek_vl2": "deepseek_vl2",
    "qwen3_vl_moe": "qwen3_vl",
}


@pytest.mark.slow
@pytest.mark.parametrize(("name", "style"), STYLES.items())
def test_answered_and_scored_by_the_commands(name, style, miniature, tmp_path):
    """Tasks of both harnesses, with what each family is asked by whoever published it."""
    from gemoe_ds.cli.benchmark import answer as answer_command
    from gemoe_ds.cli.benchmark import score as score_command

    base, tokenizer = write_case(name, tmp_path)
    setting = {"root": tmp_path, "hf": base, "tokenizer": tokenizer, "data": tmp_path}
    keys = {"mmlu_anatomy": "acc,none", "gsm8k": "exact_match,strict-match"}
    if CASES[name].sees:
        keys |= {"mmmu_val": "mmmu_acc,none", "ai2d": "exact_match,flexible-extract"}
        keys["pope"] = "pope_accuracy,none"
    data = ["--data-root", str(miniature)]
    words = [str(write_recipe(setting, name)), "--tasks", *keys, "--k", "2", "--limit", "4"]
    words += ["--prompt-style", style, "--out", str(tmp_path / "out"), *data]
    answer_command.main(words)
    score_command.main([str(tmp_path / "out"), *data])
    for task, key in keys.items():
        found = json.loads((tmp_path / "out/k_2" / task / "scores.json").read_text())
        assert 0 <= found["metrics"][key] <= 1 and found["num_documents"] == 4
        asked = found["choices"]
        is_vision = task not in ("mmlu_anatomy", "gsm8k")
        assert asked.get("prompt_style") == (style if is_vision else None)
        assert asked["max_length"] >= 2048
