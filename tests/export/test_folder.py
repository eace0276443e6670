"""Export from bases as users have them: what comes along, what is left, and what stops it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

import gemoe_ds.export.folder as module
from gemoe_ds.errors import OutputError
from gemoe_ds.export.folder import export
from gemoe_ds.models.olmoe.backbone import OlmoeBackbone
from gemoe_ds.models.tokenizer import load_tokenizer
from tests.hf_io.folders import as_links, below, tensors
from tests.models.cases import CASES, write_case
from tests.models.small import make_model

PROCESSORS = PREPROCESSOR, PROCESSOR = "preprocessor_config.json", "processor_config.json"
INDEX = "model.safetensors.index.json"
AUTO = {"olmoe": "AutoModelForCausalLM"}


def written(
    name: str, base: Path, tokenizer: Path, out: Path, router: str = "gemoe", **more: object
) -> Path:
    """A run whose gates are all doubled."""
    for path in tokenizer.iterdir():
        shutil.copyfile(path, base / path.name)
    model = make_model(name, base, router)
    trained = model.trainable()
    for key, parameter in trained.items():
        if key.endswith("gate.weight"):
            parameter.data *= 2
    options = {"base": base, "tokenizer": tokenizer, "provenance": {"base": str(base)}}
    export(model, dict(trained), router={"name": router}, out=out, **options, **more)
    return out


@pytest.mark.parametrize("name", CASES)
def test_every_backbone_has_an_index_its_own_code_and_the_router(name, tmp_path):
    base, tokenizer = write_case(name, tmp_path)
    (base / "modeling_own.py").write_text("raise SystemExit('this must not run')\n")
    config = json.loads((base / "config.json").read_text())
    config["auto_map"] = {"AutoModelForCausalLM": "modeling_own.Own"}
    (base / "config.json").write_text(json.dumps(config))
    for leftover in ("trainer_state.json", "optimizer.pt", "training_args.bin", "zero_to_fp32.py"):
        (base / leftover).write_text("{}")
    for needed in ("LICENSE", "preprocessor_config.json", "chat_template.jinja"):
        (base / needed).write_text("{}")
    before = tensors(base)
    out = written(name, base, tokenizer, tmp_path / "out")
    found = json.loads((out / "config.json").read_text())
    assert found["gemoe"]["router"] == {"name": "gemoe"} and found["gemoe"]["blocks"]
    ours = "modeling_gemoe.GemoeForConditionalGeneration"
    assert found["auto_map"][AUTO.get(name, "AutoModelForImageTextToText")] == ours
    assert "modeling_own.Own" not in found["auto_map"].values()
    assert all((out / f"{code.split('.')[0]}.py").exists() for code in found["auto_map"].values())
    names = {path.name for path in out.iterdir()}
    assert {"LICENSE", "preprocessor_config.json", "modeling_own.py", "tokenizer.json"} <= names
    assert not names & {"trainer_state.json", "optimizer.pt", "training_args.bin"}
    assert "zero_to_fp32.py" not in names
    listed = json.loads((out / INDEX).read_text())["weight_map"]
    stored = {k: f.name for f in out.glob("model*.safetensors") for k in load_file(f)}
    assert listed == stored and "routers.safetensors" not in listed.values()
    after = tensors(out)
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    assert before.keys() == after.keys() and len(changed) == len(found["gemoe"]["blocks"])
    assert all(torch.equal(after[key], 2 * before[key]) for key in changed)


def test_the_code_of_the_base_may_stay_in_its_place(tmp_path):
    """`--code base`: whoever trusts the folder's code gets that of the base."""
    base, tokenizer = write_case("deepseek_vl2", tmp_path)
    (base / "modeling_own.py").write_text("raise SystemExit('this must not run')\n")
    config = json.loads((base / "config.json").read_text())
    config["auto_map"] = {"AutoModelForCausalLM": "modeling_own.Own"}
    (base / "config.json").write_text(json.dumps(config))
    out = written("deepseek_vl2", base, tokenizer, tmp_path / "out", own_code=False)
    found = json.loads((out / "config.json").read_text())
    assert found["auto_map"] == config["auto_map"] and found["gemoe"]["blocks"]
    assert {path.name for path in out.glob("*.py")} == {"modeling_own.py"}
    assert not (out / "preprocessor_config.json").exists()


def test_chats_are_written_as_in_training_unless_the_tokenizer_has_a_template(tmp_path):
    base, tokenizer = write_case("olmoe", tmp_path)
    out = written("olmoe", base, tokenizer, tmp_path / "out")
    asked = [{"role": "user", "content": "a b"}]
    found = AutoTokenizer.from_pretrained(out)
    loaded = load_tokenizer(tokenizer, OlmoeBackbone.chat)
    expected = f"{loaded.bos_token}<|user|>\na b\n<|assistant|>\n"
    assert found.apply_chat_template(asked, tokenize=False, add_generation_prompt=True) == expected
    config = tokenizer / "tokenizer_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"chat_template": "its own"}))
    again = written("olmoe", base, tokenizer, tmp_path / "again")
    found = AutoTokenizer.from_pretrained(again)
    assert found.apply_chat_template(asked, tokenize=False) == "its own"
    assert not (again / "chat_template.jinja").exists()


# As published; as transformers 5 saves it; and what it saves beside what was published.
@pytest.mark.parametrize("files", [PROCESSORS[:1], PROCESSORS[1:], PROCESSORS])
def test_qwen3_vl_keeps_the_sizes_of_the_run_and_what_stood_for_an_image(tmp_path, files):
    base, tokenizer = write_case("qwen3_vl_moe", tmp_path)
    before = json.loads((base / PREPROCESSOR).read_text())
    (base / PROCESSOR).write_text(json.dumps({"image_processor": before}))
    for name in {*PROCESSORS} - {*files}:
        (base / name).unlink()
    model = make_model("qwen3_vl_moe", base, "gemoe", backbone={"max_pixels": 4096})
    options = {"base": base, "tokenizer": tokenizer, "provenance": {"base": str(base)}}
    export(model, {}, router={"name": "gemoe"}, out=tmp_path / "out", **options)
    found = Qwen2VLImageProcessorPil.from_pretrained(tmp_path / "out")
    assert dict(found.size) == before["size"] | {"longest_edge": 4096}
    for name in files:
        after = json.loads((tmp_path / "out" / name).read_text())
        assert after.get("image_processor", after)["size"]["longest_edge"] == 4096
        assert "auto_map" not in after, "the base's own processor"
    config = json.loads((tmp_path / "out/config.json").read_text())
    # the image's token, and those that begin and end it: so does training count
    assert config["gemoe"]["image_tokens"] == [32, 33, 34]
    assert config["auto_map"].keys() == {"AutoModelForImageTextToText", "AutoModel"}


def olmoe(tmp_path: Path) -> tuple[Path, Path]:
    return write_case("olmoe", tmp_path)


@pytest.mark.parametrize("layout", [as_links, below])
def test_a_base_may_be_laid_out_otherwise(layout, tmp_path):
    base, tokenizer = olmoe(tmp_path)
    for path in tokenizer.iterdir():
        shutil.copyfile(path, base / path.name)
        path.chmod(0o444)
    before = tensors(base)
    model_base = layout(base, tmp_path / "other")
    model = make_model("olmoe", model_base)
    out = tmp_path / "out"
    export(
        model,
        {},
        base=model_base,
        tokenizer=tokenizer,
        router={"name": "top_k"},
        provenance={"base": ""},
        out=out,
    )
    after = tensors(out)
    assert after.keys() == before.keys()
    assert all(torch.equal(after[key], before[key]) for key in before)
    files = [path for path in out.rglob("*") if path.is_file()]
    assert {path.parent for path in files} == {out}, "servers look into no folder below"
    assert all(path.stat().st_mode & 0o200 and not path.is_symlink() for path in files)


def test_a_disk_that_is_full_costs_one_line_and_leaves_nothing(tmp_path, monkeypatch):
    base, tokenizer = olmoe(tmp_path)

    def full(tensors, path, **options):
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(module, "save_file", full)
    with pytest.raises(OutputError, match="out cannot be written: .*No space left"):
        written("olmoe", base, tokenizer, tmp_path / "out")
    assert not list(tmp_path.glob("*out*"))
