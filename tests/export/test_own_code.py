"""Exports run with their own code alone; prompts, k, logits and answers are those of training."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from gemoe_ds.evaluation.generate import generate
from gemoe_ds.export.own_tokenizer import OwnTokenizer
from gemoe_ds.export.settings import settings_of
from gemoe_ds.models.jinja import chat_jinja
from gemoe_ds.routers.top_k import TopKRouter
from tests.export.families import FAMILIES, Exported, write_exported
from tests.models.small import noise


@pytest.fixture(scope="module")
def all_answers(request, tmp_path_factory) -> dict[str, tuple[Exported, dict[str, Any]]]:
    """The folder of every family that is asked for, in ONE process that has no gemoe_ds."""
    root = tmp_path_factory.mktemp("own_code")
    made = {}
    items = [item for item in request.session.items if item.module is request.module]
    specs = [getattr(item, "callspec", None) for item in items]
    asked_for = {spec.params.get("case") for spec in specs if spec is not None}
    for name in asked_for & {*FAMILIES}:
        # of a router whose k hangs on the other tokens, too
        router = "ltdr" if name == "upcycled" else "gemoe"
        made[name] = one = write_exported(name, root / name, router)
        asked = [(m, [noise(*size) for size in sizes]) for m, sizes in one.conversations()]
        torch.save(asked, root / name / "asked.pt")
    done = subprocess.run(
        [sys.executable, "-I", Path(__file__).with_name("alone.py"), root],
        capture_output=True,
        text=True,
        cwd=root,
        env={"HF_HOME": str(root / "hf_home"), "HF_HUB_OFFLINE": "1", "PATH": ""},
        timeout=400,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return {
        n: (one, torch.load(root / n / "answered.pt", weights_only=False))
        for n, one in made.items()
    }


SLOW = {"molmoe", "moe_llava_qwen", "moe_llava_stablelm"}  # for the time of CI alone


@pytest.fixture(
    params=[pytest.param(n, marks=pytest.mark.slow) if n in SLOW else n for n in FAMILIES]
)
def case(request, all_answers):
    return all_answers[request.param]


def test_prompts_and_pictures_are_those_of_training(case):
    one, found = case
    expected, batch = one.expected(), found["batch"]
    assert torch.equal(batch["input_ids"], expected.input_ids_BS)
    assert torch.equal(batch["attention_mask"].bool(), expected.is_valid_BS)
    images = dict(expected.images)
    assert torch.equal(batch["pixel_values"], images.pop("pixels"))
    feature_BS = images.pop("feature_BS")
    for name, tensor in images.items():
        assert torch.equal(batch[f"image_{name}"], tensor)
    if one.name != "upcycled":
        assert torch.equal(batch["image_rows"].clamp(min=-1), feature_BS)
        assert torch.equal(batch["image_rows"] != -1, expected.is_vision_BS)
    for ids, row, mask in zip(
        found["alone"], expected.input_ids_BS, expected.is_valid_BS, strict=True
    ):
        assert torch.equal(ids[0], row[mask])


def logits_of(one: Exported) -> tuple[torch.Tensor, torch.Tensor]:
    """The project's own of the last tokens, at its own k, and that k [L, B, S]."""
    batch, model = one.expected(), one.model
    model.ctx.trace = True
    with torch.no_grad():
        hidden_BSD = model.hidden(batch.model_inputs)
        logits = model.backbone.head(model.hf)(hidden_BSD[:, -8:])
    k_LT = torch.stack([record.k_T for record in model.ctx.layers])
    return logits, k_LT.view(len(k_LT), *batch.input_ids_BS.shape)


def test_logits_and_k_are_those_of_training(case):
    one, found = case
    valid_BS = one.expected().is_valid_BS
    logits, k_LBS = logits_of(one)
    assert torch.equal(found["k"], k_LBS)
    assert k_LBS[:, valid_BS].unique().numel() > 1, "tokens differ, else nothing is shown"
    close = {"rtol": 1e-5, "atol": 4e-6 * logits.abs().max().item()}
    torch.testing.assert_close(found["logits"], logits, **close)
    torch.testing.assert_close(found["row"][0], logits[0], **close)


def test_answers_are_those_of_gemoe_generate(case):
    one, found = case
    batch, end_ids = one.expected(), one.collator.end_ids
    written = generate(one.model, batch, max_new_tokens=4, end_ids=end_ids)
    length = batch.input_ids_BS.shape[1]
    for kind in ("written", "without cache", "static cache"):
        for ours, theirs in zip(written.token_ids, found[kind], strict=True):
            assert theirs[length : length + len(ours)].tolist() == ours, kind
    assert len({tuple(ids) for ids in written.token_ids}) > 1
    assert len(found["beams"]) == 2


def test_without_its_routers_it_is_the_static_model(case):
    one, found = case
    model = one.model
    routers = []
    for layer in model.moe_layers:
        routers.append(TopKRouter(TopKRouter.Config(), layer.router.spec))
        routers[-1].gate.weight.data.copy_(layer.router.gate.weight)
    model.ctx.routers = routers
    logits, k_LBS = logits_of(one)
    model.ctx.routers = None
    assert k_LBS.unique().numel() == 2, "0 for padding, and one k"
    close = {"rtol": 1e-5, "atol": 4e-6 * logits.abs().max().item()}
    torch.testing.assert_close(found["static"], logits, **close)


def test_in_bfloat16_routing_stays_float32(case):
    _, found = case
    assert found["half"].dtype == torch.bfloat16 and found["half"].isfinite().all()
    routed = {dtype for dtype, is_router in found["dtypes"] if is_router}
    others = {dtype for dtype, is_router in found["dtypes"] if not is_router}
    assert routed == {"torch.float32"} and others == {"torch.bfloat16"}


def test_the_tokenizer_carries_the_template(case):
    one, found = case
    settings = settings_of(one.folder)
    assert found["tokenizer"] == ["left", chat_jinja(settings.chat, settings.image_mark)]


def test_the_folder_has_the_template_for_whoever_runs_no_code_of_it(case):
    """As servers do: the tokenizer's file, read by a class that knows nothing of the model."""
    one, _ = case
    text = (one.folder / "chat_template.jinja").read_text(encoding="utf-8")
    ours = OwnTokenizer.from_pretrained(one.folder)
    theirs = PreTrainedTokenizerFast(tokenizer_file=str(one.folder / "tokenizer.json"))
    for messages, _ in one.conversations():
        prompt = theirs.apply_chat_template(messages, chat_template=text, tokenize=False)
        assert prompt == ours.apply_chat_template(messages, tokenize=False)
