"""What a dry run says of files that only users have."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from gemoe_ds.data.collate import Collator
from gemoe_ds.models.backbone import Backbone
from gemoe_ds.train.checks.checkpoint_report import checkpoint_report
from tests.models.cases import CASES, write_case

USER = "{{'<|user|>\\n' + message['content'] + '\\n'}}"
ASSISTANT = "{{'<|assistant|>\\n' + message['content'] + '</s>\\n'}}"
OLMOE = (
    "{{'<s>'}}{% for message in messages %}{% if message['role'] == 'user' %}"
    f"{USER}{{% else %}}{ASSISTANT}{{% endif %}}{{% endfor %}}"
)


def lines(name, folder, change=lambda base, tokenizer: None):
    folder.mkdir(exist_ok=True)
    base, tokenizer = write_case(name, folder)
    change(base, tokenizer)
    backbone = Backbone.named(name)
    backbone = backbone(backbone.Config())
    hf = backbone.load(base, tokenizer)
    loaded = AutoTokenizer.from_pretrained(tokenizer)
    collator = Collator(loaded, backbone.image_layout(hf), backbone.chat, max_length=500)
    return list(checkpoint_report(backbone, hf, base, collator))


@pytest.mark.parametrize("name", CASES)
def test_every_backbone_says_something(name, tmp_path):
    found = lines(name, tmp_path)
    assert found[0] == "checkpoint: not of the published model's shapes; totals are not compared"
    assert found[1] == "checkpoint: stored as float32"
    assert found[-1].endswith("each has its row")
    if name.startswith("moe_llava"):
        assert found[2] == "checkpoint: its vision tower is inside"
    if name == "molmoe":
        tokens = {"<im_start>": 50280, "<im_end>": 50281, "<im_col>": 50283}
        wanted = [f"tokenizer: {token} is {n}: as the model's" for token, n in tokens.items()]
        assert [line for line in found if "<im_" in line] == wanted


@pytest.mark.parametrize(
    "template, said",
    [
        (OLMOE, "gives the sequences that are trained on"),
        (OLMOE.replace("user|>", "human|>"), "its chat template differs: '<s>"),
        ("{{ raise_exception('no') }}", "cannot be rendered for comparison: no"),
    ],
)
def test_the_tokenizer_s_own_chat_template(template, said, tmp_path):
    def with_template(base, tokenizer):
        path = tokenizer / "tokenizer_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": template}))

    assert said in lines("olmoe", tmp_path, with_template)[-1]


@pytest.mark.parametrize("name", ["molmoe", "deepseek_vl2", "moe_llava_qwen"])
@pytest.mark.parametrize("file", ["preprocessor_config.json", "processor_config.json"])
def test_normalisation_of_images(name, file, tmp_path):
    def with_processor(base, tokenizer):
        values = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.1, 0.5, 0.5]}
        (base / file).write_text(json.dumps(values))

    mean, std = [line for line in lines(name, tmp_path, with_processor) if "image_" in line]
    assert mean.startswith(f"{file}: image_mean=")
    assert mean.endswith("as used here") == (name == "deepseek_vl2")
    assert "differs" in std and "is used here" in std


def test_what_else_processors_say(tmp_path):
    """DeepSeek-VL2's file is flat; others nest the image's part."""

    def flat(base, tokenizer):
        values = {"patch_size": 14, "downsample_ratio": 4, "pad_token": "<x>"}
        values["candidate_resolutions"] = [[70, 70]]
        (base / "processor_config.json").write_text(json.dumps(values))

    found = [line for line in lines("deepseek_vl2", tmp_path / "flat", flat) if "_config" in line]
    assert "processor_config.json: patch_size=14: as used here" in found
    assert "processor_config.json: downsample_ratio=4: differs: 2 is used here" in found
    assert "processor_config.json: pad_token=<x>: differs: <pad> is used here" in found
    assert any("candidate_resolutions=[[70, 70]]: differs" in line for line in found)

    def nested(base, tokenizer):
        values = {"image_processor": {"max_crops": 11, "overlap_margins": [4, 4]}}
        (base / "processor_config.json").write_text(json.dumps(values))

    found = [line for line in lines("molmoe", tmp_path / "nested", nested) if "_config" in line]
    assert found == [
        "processor_config.json: max_crops=11: differs: 12 is used here",
        "processor_config.json: overlap_margins=[4, 4]: as used here",
    ]

    def broken(base, tokenizer):
        (base / "processor_config.json").write_text("[")

    (line,) = [x for x in lines("molmoe", tmp_path / "broken", broken) if "_config" in x]
    assert line.startswith("processor_config.json: cannot be read (it is no JSON")


def test_tokens_around_images_and_stored_dtypes(tmp_path):
    def moved(base, tokenizer):
        path = tokenizer / "tokenizer.json"
        path.write_text(path.read_text().replace("<im_col>", "<im_COL>"))
        tensors = load_file(base / "model.safetensors")
        tensors["lm_head.weight"] = tensors["lm_head.weight"].bfloat16()
        save_file(tensors, base / "model.safetensors")

    base, tokenizer = write_case("molmoe", tmp_path)
    moved(base, tokenizer)
    backbone = Backbone.named("molmoe")
    backbone = backbone(backbone.Config())
    hf = backbone.load(base, tokenizer)
    loaded = AutoTokenizer.from_pretrained(tokenizer)
    chat = replace(backbone.chat, specials=())
    collator = Collator(loaded, backbone.image_layout(hf), chat, max_length=500)
    found = list(checkpoint_report(backbone, hf, base, collator))
    (column,) = [line for line in found if "<im_col>" in line]
    assert column.endswith(": differs: the model's is 50283")
    (stored,) = [line for line in found if "stored as" in line]
    head = hf.language_model.lm_head.weight.numel()
    assert stored.endswith(f"bfloat16 ({head:,} numbers)") and "as float32 (" in stored


@pytest.mark.parametrize("place", ["base", "tokenizer"])
@pytest.mark.parametrize("file", ["chat_template.json", "chat_template.jinja"])
def test_the_processor_s_chat_template(place, file, tmp_path):
    """Which the tokenizer does not read, or not from there."""

    def with_template(base, tokenizer):
        template = OLMOE.replace("user|>", "human|>")
        text = json.dumps({"chat_template": template}) if file.endswith("json") else template
        ({"base": base, "tokenizer": tokenizer}[place] / file).write_text(text)

    (line,) = [line for line in lines("olmoe", tmp_path, with_template) if "template" in line]
    from_tokenizer = (place, file) == ("tokenizer", "chat_template.jinja")
    place = "tokenizer: its chat template" if from_tokenizer else f"{file}: it"
    assert line.startswith(f"{place} differs: '<s> ")


def test_an_unreadable_template(tmp_path):
    def broken(base, tokenizer):
        (base / "chat_template.json").write_text("{}")

    assert "chat_template.json: it holds no template that can be read" in lines(
        "olmoe", tmp_path, broken
    )


def test_deepseek_vl2_has_as_many_tensors_as_published(tmp_path, monkeypatch):
    base, tokenizer = write_case("deepseek_vl2", tmp_path)
    backbone = Backbone.named("deepseek_vl2")
    hf = backbone(backbone.Config()).load(base, tokenizer)
    tensors = load_file(base / "model.safetensors")
    numbers = sum(tensor.numel() for tensor in tensors.values())
    assert backbone.published_tensors == 2582
    monkeypatch.setattr(backbone, "published", classmethod(lambda cls: hf))
    monkeypatch.setattr(backbone, "published_parameters", numbers)
    for wanted, said in ((len(tensors), "as published"), (7, "were published, in 7 tensors")):
        monkeypatch.setattr(backbone, "published_tensors", wanted)
        assert lines("deepseek_vl2", tmp_path / str(wanted))[0].endswith(said)


@pytest.mark.parametrize("name", ["moe_llava_stablelm", "moe_llava_qwen"])
def test_totals_of_a_language_model_alone(name, tmp_path, monkeypatch):
    base, tokenizer = write_case(name, tmp_path / "base")
    backbone = Backbone.named(name)
    hf = backbone(backbone.Config()).load(base, tokenizer)
    number = sum(p.numel() for n, p in hf.named_parameters() if n.startswith("language_model."))
    monkeypatch.setattr(backbone, "published", classmethod(lambda cls: hf))
    monkeypatch.setattr(backbone, "published_parameters", number)
    (line, *_) = lines(name, tmp_path / "again")
    assert f"{number:,} parameters in" in line
    assert line.endswith("tensors (language model alone): as published")


def test_totals_of_the_published_shape(tmp_path, monkeypatch):
    """A small model in the published one's place."""
    backbone = Backbone.named("olmoe")
    base, tokenizer = write_case("olmoe", tmp_path / "olmoe")
    hf = backbone(backbone.Config()).load(base, tokenizer)
    monkeypatch.setattr(backbone, "published", classmethod(lambda cls: hf))
    number = sum(p.numel() for p in hf.parameters())
    for published, said in ((number, "as published"), (number + 5, f"differs: {number + 5:,}")):
        monkeypatch.setattr(backbone, "published_parameters", published)
        (line, *_) = lines("olmoe", tmp_path / str(published))
        assert f"{number:,} parameters in" in line and said in line
