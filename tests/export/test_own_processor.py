"""The processor of exported folders: which picture goes where, and what is refused in a line."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
import torch

from gemoe_ds.errors import CheckpointError
from gemoe_ds.export.own_model import OwnModel
from gemoe_ds.export.own_processor import OwnProcessor, as_picture
from tests.export.families import write_exported
from tests.models.small import noise


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """DeepSeek-VL2, whose modules the package's own files name."""
    return write_exported("deepseek_vl2", tmp_path_factory.mktemp("processor"))


@pytest.fixture(scope="module")
def processor(one):
    return OwnProcessor.from_pretrained(one.folder)


ASKED = "<|User|>: <image>\nWhat?\n\n<|Assistant|>:"
PICTURES = [noise(60, 90), noise(90, 30)]


def test_pictures_may_come_in_one_list_in_lists_or_without_marks(processor):
    wanted = processor(text=[ASKED, ASKED], images=[[PICTURES[0]], [PICTURES[1]]])
    flat = processor(text=[ASKED, ASKED], images=PICTURES)
    assert wanted.keys() == flat.keys() and all(torch.equal(wanted[k], flat[k]) for k in flat)
    bare = processor(text=f"{processor.tokenizer.bos_token}What?", images=PICTURES)
    first = bare["image_rows"][0].tolist()
    assert first[0] == -1 and first[1] >= 0 and bare["image_tiles"].numel() == 2
    right = processor(text=["a", "a b c"], padding_side="right", return_tensors="np")
    uncut = {"truncation": False, "max_length": None, "padding": "longest"}
    assert processor(text=["a", "a b c"], **uncut)["input_ids"].shape == right["input_ids"].shape
    assert right["attention_mask"][0, 0] == 1 and right["attention_mask"][0, -1] == 0


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"text": ASKED, "images": PICTURES}, "prompt 0 has 1 x <image> for 2 picture(s)"),
        ({"text": ASKED}, "prompt 0 has 1 x <image> for 0 picture(s)"),
        ({"text": [ASKED, ASKED], "images": PICTURES[:1]}, "1 pictures for prompts with 2 marks"),
        ({"text": ["a", "b"], "images": [PICTURES]}, "pictures for 1 prompts, and there are 2"),
        ({"images": PICTURES}, "text is missing"),
        ({"text": "a", "videos": [1]}, "reads text and pictures"),
        ({"text": ["a", "a b c"], "padding": False}, "leave padding=True"),
        (
            {"text": "a", "truncation": True, "max_length": 2048},
            "truncation=True, max_length=2048: a prompt is whole",
        ),
        ({"text": "a", "padding": "max_length"}, "padding='max_length': a prompt is whole"),
        ({"text": ASKED, "images": np.zeros((4, 4))}, "give uint8 [height, width, 3]"),
    ],
)
def test_what_does_not_fit_is_refused(processor, options, reason):
    with pytest.raises(ValueError, match=re.escape(reason)):
        processor(**options)


def test_a_picture_may_be_an_array_a_tensor_or_a_file(tmp_path):
    picture = noise(20, 30)
    picture.save(tmp_path / "a.png")
    for given in (np.asarray(picture), torch.from_numpy(np.array(picture)), tmp_path / "a.png"):
        assert np.array_equal(np.asarray(as_picture(given)), np.asarray(picture))


def test_what_the_model_refuses_and_its_loss(one, processor):
    model = OwnModel.from_pretrained(one.folder).eval()
    inputs = processor(text=ASKED, images=PICTURES[:1])
    inputs.pop("image_rows")
    with pytest.raises(ValueError, match="pixel_values came without image_rows"):
        model(**inputs)
    for saved in (model, processor):
        with pytest.raises(NotImplementedError, match="copy the exported folder"):
            saved.save_pretrained(one.folder)
    assert "OwnProcessor" in repr(processor)
    labels = processor(text="What is this?")["input_ids"]
    with torch.no_grad():
        out = model(input_ids=labels, labels=labels)
    logits = out.logits[0, :-1]
    torch.testing.assert_close(out.loss, torch.nn.functional.cross_entropy(logits, labels[0, 1:]))


def test_a_folder_that_lacks_a_weight_is_refused_by_its_key(one, tmp_path):
    for path in one.folder.iterdir():
        (tmp_path / path.name).symlink_to(path)
    index = tmp_path / "model.safetensors.index.json"
    listed = json.loads(index.read_text())
    gone = listed["weight_map"].pop("language.lm_head.weight")
    index.unlink()
    index.write_text(json.dumps(listed))
    assert gone
    with pytest.raises(CheckpointError, match="language.lm_head.weight"):
        OwnModel.from_pretrained(tmp_path)
