"""Tokenizers as published: what their own code adds to them, and that none of it is run."""

from __future__ import annotations

import ast
import json
import os
import pty
import sys
from pathlib import Path

import pytest

from gemoe_ds.errors import ConfigError
from gemoe_ds.models.tokenizer import load_tokenizer
from tests.helpers import repository
from tests.models.published import load, write_published


def test_olmoe_begins_with_its_end(tmp_path):
    """The base model's tokenizer has no bos."""
    tokenizer = load("olmoe", write_published("olmoe", tmp_path, bos_token=None))
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (50279, 50279)
    assert tokenizer.pad_token_id == 1


ADDED = ("<image>", "<|ref|>", "<|/ref|>", "<|det|>", "<|/det|>", "<|grounding|>")
CHAT = ("<|User|>", "<|Assistant|>")


@pytest.mark.parametrize("without", [CHAT, ADDED + CHAT, ("<|grounding|>", *CHAT)])
def test_deepseek_vl2_gets_what_its_processor_adds(without, tmp_path):
    folder = write_published("deepseek_vl2", tmp_path, without, pad_token=None)
    refused = "added as the model's own code does it, <.*> is 4.., the model's is 1288"
    if "<image>" in without:  # where 128,815 tokens are there, the next one is the image's
        with pytest.raises(ConfigError, match=refused.replace("|", r"\|")):
            load("deepseek_vl2", folder, ("<image>", 128815))
        content = json.loads((folder / "tokenizer.json").read_text())
        last = content["added_tokens"][-1] | {"id": 128814, "content": "<last>"}
        content["added_tokens"].append(last)
        content["model"]["vocab"]["<last>"] = 128814
        (folder / "tokenizer.json").write_text(json.dumps(content))
    tokenizer = load("deepseek_vl2", folder, ("<image>", 128815))
    wanted = list(range(128815, 128823))
    assert tokenizer.convert_tokens_to_ids([*ADDED, *CHAT]) == wanted
    assert tokenizer("".join([*ADDED, *CHAT]), add_special_tokens=False)["input_ids"] == wanted
    assert (tokenizer.pad_token, tokenizer.pad_token_id) == ("<｜▁pad▁｜>", 2)


def test_molmoe_on_the_tokenizer_of_olmoe(tmp_path):
    """Its own code makes its tokenizer of that one."""
    tokenizer = load("molmoe", write_published("olmoe", tmp_path), ("<im_patch>", 50282))
    names = ["<im_start>", "<im_end>", "<im_patch>", "<im_col>", "<|image|>"]
    assert tokenizer.convert_tokens_to_ids(names) == list(range(50280, 50285))


def test_a_token_that_only_a_setting_names_is_none(tmp_path):
    """transformers would give it a new id, which the model has never seen."""
    folder = write_published("olmoe", tmp_path, eos_token="</s>", pad_token="<|pad|>")
    with pytest.raises(ConfigError, match="lacks bos_token, eos_token"):
        load("olmoe", folder)
    folder = write_published("moe_llava_qwen", tmp_path, ("<|endoftext|>",))
    with pytest.raises(ConfigError, match=r"lacks <\|endoftext\|>"):
        load("moe_llava_qwen", folder)
    folder = write_published("olmoe", tmp_path, pad_token="<|pad|>")
    assert load("olmoe", folder).pad_token_id == 50279


def test_roles_with_ids_of_another_model(tmp_path):
    folder = write_published("deepseek_vl2", tmp_path)
    content = (folder / "tokenizer.json").read_text()
    (folder / "tokenizer.json").write_text(content.replace("128821", "128921"))
    with pytest.raises(ConfigError, match=r"<\|User\|> is 128921, the model's is 128821"):
        load("deepseek_vl2", folder)


@pytest.mark.parametrize("name", ["molmoe", "moe_llava_qwen"])
@pytest.mark.parametrize("has_end", [True, False])
def test_any_token_can_pad(name, has_end, tmp_path):
    without = {"pad_token": None} | ({} if has_end else {"eos_token": None})
    tokenizer = load(name, write_published(name, tmp_path, **without))
    assert tokenizer.pad_token == "<|endoftext|>"


def with_code(folder: Path) -> Path:
    """Its own code would leave a trace of itself."""
    for name in ("config.json", "tokenizer_config.json"):
        path = folder / name
        found = json.loads(path.read_text()) if path.exists() else {"model_type": "molmo"}
        classes = {
            "AutoConfig": "own.C",
            "AutoTokenizer": [None, "own.T"],
            "AutoProcessor": "own.P",
        }
        path.write_text(json.dumps(found | {"auto_map": classes}))
    (folder / "own.py").write_text(f"open({str(folder / 'ran')!r}, 'w')\n")
    return folder


def at_a_terminal(function) -> str:
    """What it says there, whatever it asks being answered with yes."""
    child, terminal = pty.fork()
    if child == 0:
        sys.stdin, sys.stdout, sys.stderr = open(0), open(1, "w"), open(2, "w")  # not pytest's
        try:
            print(function())
        except BaseException as error:
            print(f"{type(error).__name__}: {error}")
        finally:
            sys.stdout.flush()
            os._exit(0)
    os.write(terminal, b"y\n" * 3)
    said = b""
    while True:
        try:
            said += (more := os.read(terminal, 4096))
        except OSError:  # Linux's word for the other end having gone
            more = b""
        if not more:
            os.waitpid(child, 0)
            return " ".join(said.decode().split())


def test_code_of_a_folder_is_never_run_or_offered(tmp_path):
    folder = with_code(write_published("molmoe", tmp_path))
    said = at_a_terminal(lambda: len(load("molmoe", folder, ("<im_patch>", 50282))))
    assert "423" in said.split(), said
    (folder / "tokenizer.json").unlink()
    said += at_a_terminal(lambda: load("molmoe", folder, ("<im_patch>", 50282)))
    assert "ConfigError: data.tokenizer=" in said
    assert "has no tokenizer.json, and the code that it brings instead is never run" in said
    assert "[y/N]" not in said and not (folder / "ran").exists()


@pytest.mark.parametrize("config", [{}, {"tokenizer_class": "GPTNeoXTokenizer"}])
def test_a_folder_without_a_vocabulary_is_no_empty_tokenizer(config, tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "molmo"}')
    special = {"eos_token": "<|endoftext|>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(special | config))
    with pytest.raises(ConfigError, match=r"not a tokenizer folder \(it has no tokenizer.json\)"):
        load("olmoe", tmp_path)


def test_nothing_is_loaded_without_saying_so():
    """Every from_pretrained of ours. What export writes into a folder is run by its owner, and by
    serve-check, which looks at its checksums first."""
    run_by_others = {"modeling.py", "own_model.py", "own_processor.py", "ask_transformers.py"}
    found = 0
    for room in ("gemoe_ds", "launch"):
        for path in (repository() / room).rglob("*.py"):
            if path.name in run_by_others and path.parent.name in ("export", "serving"):
                continue
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                called = getattr(node.func, "attr", "") if isinstance(node, ast.Call) else ""
                if called == "from_pretrained":
                    given = {k.arg: ast.unparse(k.value) for k in node.keywords}
                    assert given.get("trust_remote_code") == "False", f"{path}:{node.lineno}"
                    found += 1
    assert found > 3


@pytest.mark.parametrize("content", ["", "[", "{}", '{"model": {"type": "BPE"}}', "null"])
def test_a_damaged_tokenizer_is_named(content, tmp_path):
    folder = write_published("olmoe", tmp_path)
    (folder / "tokenizer.json").write_text(content)
    with pytest.raises(ConfigError, match="data.tokenizer=.*: not a tokenizer folder"):
        load("olmoe", folder)


@pytest.mark.parametrize(
    "file, content, words",
    [
        ("tokenizer.json", b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
        ("tokenizer_config.json", b'{"eos_token":', "tokenizer_config.json is not valid JSON"),
        ("tokenizer.json", b"{}", "reading it ends with KeyError: 'added_tokens'"),
        ("qwen.tiktoken", b"IQ== 0\nIQ== 1\n", "qwen.tiktoken is not whole"),
    ],
)
def test_the_file_that_is_broken_is_named(tmp_path, file, content, words):
    if file.endswith("json"):
        write_published("olmoe", tmp_path)
    (tmp_path / file).write_bytes(content)
    with pytest.raises(ConfigError, match="not a tokenizer folder") as error:
        load_tokenizer(tmp_path)
    assert words in str(error.value) and "\n" not in str(error.value)


def test_a_file_is_no_tokenizer_folder(tmp_path):
    write_published("olmoe", tmp_path)
    with pytest.raises(ConfigError, match="it is a file; give its folder"):
        load_tokenizer(tmp_path / "tokenizer.json")
