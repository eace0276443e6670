"""What a dry run says of files that only users have."""

from __future__ import annotations

import json

import pytest
from transformers import AutoTokenizer

from gemoe_ds.backbones.backbone import Backbone
from gemoe_ds.data.collate import Collator
from gemoe_ds.train.first_contact import first_contact
from tests.backbones.cases import CASES, write_case

USER = "{{'<|user|>\\n' + message['content'] + '\\n'}}"
ASSISTANT = "{{'<|assistant|>\\n' + message['content'] + '</s>\\n'}}"
OLMOE = (
    "{{'<s>'}}{% for message in messages %}{% if message['role'] == 'user' %}"
    f"{USER}{{% else %}}{ASSISTANT}{{% endif %}}{{% endfor %}}"
)


def lines(name, folder, change=lambda base, tokenizer: None):
    base, tokenizer = write_case(name, folder)
    change(base, tokenizer)
    backbone = Backbone.named(name)
    backbone = backbone(backbone.Config())
    hf = backbone.load(base, tokenizer)
    loaded = AutoTokenizer.from_pretrained(tokenizer)
    collator = Collator(loaded, backbone.image_layout(hf), backbone.chat, max_length=500)
    return list(first_contact(backbone, hf, base, collator))


@pytest.mark.parametrize("name", CASES)
def test_every_backbone_says_something(name, tmp_path):
    found = lines(name, tmp_path)
    if Backbone.named(name).published_parameters:
        shapes = "checkpoint: not of the published model's shapes; totals are not compared"
        assert found[0] == shapes
    assert found[-1].endswith("each has its row")


@pytest.mark.parametrize(
    "template, verdict",
    [
        (OLMOE, "gives the sequences that are trained on"),
        (OLMOE.replace("user|>", "human|>"), "its chat template differs: '<s>"),
        ("{{ raise_exception('no') }}", "cannot be rendered for comparison: no"),
    ],
)
def test_the_tokenizer_s_own_chat_template(template, verdict, tmp_path):
    def with_template(base, tokenizer):
        path = tokenizer / "tokenizer_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": template}))

    assert verdict in lines("olmoe", tmp_path, with_template)[-1]


@pytest.mark.parametrize("name", ["molmoe", "deepseek_vl2"])
def test_normalisation_of_images(name, tmp_path):
    def with_processor(base, tokenizer):
        values = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.1, 0.5, 0.5]}
        (base / "preprocessor_config.json").write_text(json.dumps(values))

    mean, std = [line for line in lines(name, tmp_path, with_processor) if "image_" in line]
    assert mean.endswith("as built in") == (name == "deepseek_vl2")
    assert "differs" in std and "is built in" in std


def test_totals_of_the_published_shape(tmp_path, monkeypatch):
    """A small model in the published one's place."""
    backbone = Backbone.named("olmoe")
    base, tokenizer = write_case("olmoe", tmp_path / "olmoe")
    hf = backbone(backbone.Config()).load(base, tokenizer)
    monkeypatch.setattr(backbone, "published", classmethod(lambda cls: hf))
    number = sum(p.numel() for p in hf.parameters())
    for published, verdict in ((number, "as published"), (number + 5, f"differs: {number + 5:,}")):
        monkeypatch.setattr(backbone, "published_parameters", published)
        (line, *_) = lines("olmoe", tmp_path / str(published))
        assert f"{number:,} parameters in" in line and verdict in line
