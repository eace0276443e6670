"""What the exported model is told of its tokens, and where it takes its routers from."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from gemoe_ds.export import settings
from gemoe_ds.export.settings import local_folder
from tests.export.families import write_exported
from tests.export.loaded import batches, load, logits


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_exported("upcycled", tmp_path_factory.mktemp("modeling")).folder


@pytest.fixture(scope="module")
def model(folder):
    return AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True).eval()


def test_padding_is_told_by_masks_of_every_kind_however_they_are_given(model):
    ids = torch.randint(5, 12, (2, 7), generator=torch.Generator().manual_seed(0))
    valid = torch.arange(7) >= torch.tensor([[0], [3]])
    wide = torch.ones(7, 7, dtype=torch.bool).tril() & valid[:, None, None]
    with torch.no_grad():
        model(input_ids=ids, attention_mask=valid.long())
        wanted = model.k_per_layer
        assert all(torch.equal(k > 0, valid) for k in wanted)
        for mask in (valid.long(), wide):
            for args, named in (((ids,), {"attention_mask": mask}), ((ids, None, mask), {})):
                model(*args, **named)
                assert all(map(torch.equal, model.k_per_layer, wanted))
        with pytest.raises(RuntimeError, match="does not say .* padding: give one with a number"):
            model(ids, attention_mask=wide[:, :, :1])


def test_a_model_made_from_its_config_does_not_route_as_stock(model):
    made = AutoModelForImageTextToText.from_config(model.config, trust_remote_code=True).eval()
    with pytest.raises(RuntimeError, match="without the trained routers: load it by from_pre"):
        made(input_ids=torch.tensor([[5, 6]]))
    own = model.state_dict()
    routers = {
        f"{slot}.{name}": value
        for slot, entry in enumerate(model.config.gemoe["blocks"])
        for name, value in model.get_submodule(entry["path"]).gemoe.router.state_dict().items()
    }
    made.attach_routers(routers)
    made.load_state_dict(own)
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        assert torch.equal(made(input_ids=ids).logits, model(input_ids=ids).logits)


def test_embeddings_alone_do_not_say_what_is_of_an_image(model):
    embedded = model.get_input_embeddings()(torch.tensor([[5, 6]]))
    with pytest.raises(RuntimeError, match="inputs_embeds alone: give input_ids"):
        model(inputs_embeds=embedded)


CONVERTED = {
    "to": lambda model: model.to(torch.bfloat16),
    "bfloat16": lambda model: model.bfloat16(),
    "half": lambda model: model.half(),
    "of a part": lambda model: model.model.bfloat16() and model,
}


@pytest.mark.parametrize("name", CONVERTED)
def test_routing_stays_float32_when_the_model_is_converted(olmoe_folder, name):
    model = CONVERTED[name](load(olmoe_folder))
    dtype = model.model.embed_tokens.weight.dtype
    assert dtype != torch.float32
    wanted = load(olmoe_folder, dtype=dtype)
    routers = [{n: p for n, p in m.named_parameters() if ".gemoe." in n} for m in (model, wanted)]
    assert routers[0] and {p.dtype for p in routers[0].values()} == {torch.float32}
    torch.testing.assert_close(*routers, rtol=0, atol=0)
    logits(model.to(dtype), batches()[0]), logits(wanted, batches()[0])
    assert all(map(torch.equal, model.k_per_layer, wanted.k_per_layer))


def test_routers_move_with_the_model(olmoe_folder):
    model = load(olmoe_folder).to("meta", torch.bfloat16)
    found = {(p.device.type, p.dtype) for n, p in model.named_parameters() if ".gemoe." in n}
    assert found == {("meta", torch.float32)}


def test_in_float64_all_is_float64_but_the_routers(olmoe_folder):
    model, batch = load(olmoe_folder), batches()[0]
    wanted = logits(model, batch)
    found = logits(model.double(), batch)
    assert found.dtype == torch.float64
    torch.testing.assert_close(found.float(), wanted, rtol=1e-4, atol=1e-4)


def test_routers_are_in_the_mode_of_the_model_from_the_start(olmoe_folder):
    """Some draw numbers while they train; from_pretrained gives a model that does not."""
    model = AutoModelForCausalLM.from_pretrained(olmoe_folder, trust_remote_code=True)
    assert {module.training for module in model.modules()} == {False}


def test_enabled_is_true_or_false(olmoe_folder):
    config = load(olmoe_folder).config
    config.gemoe["enabled"] = "false"
    with pytest.raises(ValueError, match="gemoe.enabled='false'; it is true or false"):
        load(olmoe_folder, config=config)


def test_logits_of_routers_that_do_not_run_are_refused(olmoe_folder, model):
    said = "output_router_logits=True, as an argument or in config.json: .* make it False"
    text = load(olmoe_folder)
    for asked in (text, model):
        with pytest.raises(RuntimeError, match=said):
            asked(**batches()[0], output_router_logits=True)
    text.config.output_router_logits = True
    with pytest.raises(RuntimeError, match=said):
        text(**batches()[0])
    assert text(**batches()[0], output_router_logits=False).logits.isfinite().all()
    model.config.text_config.output_router_logits = True
    try:
        with pytest.raises(RuntimeError, match=said):
            model(**batches()[0])
    finally:
        del model.config.text_config.output_router_logits


WHERE = {"revision": "abc", "local_files_only": True, "force_download": False}


def test_the_routers_come_from_where_the_weights_do(folder, model, monkeypatch):
    asked = []

    def cached_file(name, file, **where):
        asked.append((name, where))
        return folder / file

    monkeypatch.setattr(sys.modules[type(model).__module__], "cached_file", cached_file)
    type(model).from_pretrained(folder.parent, subfolder=folder.name, **WHERE)
    assert asked == [(folder.parent, {"subfolder": folder.name} | WHERE)]


def test_so_do_the_files_of_a_model_that_is_ours(folder, monkeypatch):
    options = {"subfolder": "inner", "dtype": "auto"} | WHERE
    assert local_folder(folder, options, ("*.json",)) == folder / "inner"
    asked = []

    def snapshot_download(name, **where):
        asked.append((name, where))
        return "there"

    monkeypatch.setattr(settings, "snapshot_download", snapshot_download)
    assert local_folder("org/name", options, ("*.json",)) == Path("there/inner")
    assert local_folder("org/name", {}, ("*.json",)) == Path("there")
    assert asked == [
        ("org/name", {"allow_patterns": ["inner/*.json"]} | WHERE),
        ("org/name", {"allow_patterns": ["*.json"]}),
    ]
