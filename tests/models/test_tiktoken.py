"""Vocabularies that only a Python file beside them could read: ours is the same tokenizer."""

from __future__ import annotations

import base64
import json

import pytest
from transformers.convert_slow_tokenizer import bytes_to_unicode

from tests.models.published import load, write_published


@pytest.mark.parametrize(
    "name, file, ids",
    [
        ("moe_llava_stablelm", "arcade100k.tiktoken", (100257, 100280, 100288)),
        ("moe_llava_qwen", "qwen.tiktoken", (151643, 151646, 151850)),
    ],
)
def test_vocabularies_that_only_code_could_read(name, file, ids, tmp_path):
    """As the tokenizers of MoE-LLaVA's folders are: no tokenizer.json, a class in a Python file."""
    same = load(name, write_published(name, tmp_path / "json"))
    folder = tmp_path / "published"
    folder.mkdir()
    bytes_of = {char: byte for byte, char in bytes_to_unicode().items()}
    ranks = [
        (rank, bytes(bytes_of[char] for char in token))
        for token, rank in same.get_vocab().items()
        if not token.startswith("<|") or token == "<|"
    ]
    lines = (base64.b64encode(token) + b" %d" % rank for rank, token in sorted(ranks))
    (folder / file).write_bytes(b"\n".join(lines))
    auto = {"auto_map": {"AutoTokenizer": ["tokenization_x.X", None]}, "tokenizer_class": "X"}
    (folder / "tokenizer_config.json").write_text(json.dumps(auto))
    tokenizer = load(name, folder)
    texts = ["What is it?\n\n 狗 A dog.  ", "e\u0301<|endoftext|> 123\r\n", " USER: ASSISTANT: A"]
    for plain in (True, False):
        options = {"add_special_tokens": False, "split_special_tokens": plain}
        assert tokenizer(texts, **options)["input_ids"] == same(texts, **options)["input_ids"]
    pad = {"arcade100k.tiktoken": "<|reg0|>", "qwen.tiktoken": "<|extra_0|>"}[file]
    assert tokenizer.convert_tokens_to_ids(["<|endoftext|>", pad]) == list(ids[:2])
    assert max(tokenizer.get_vocab().values()) == ids[2]
    assert tokenizer.decode(tokenizer(texts[0])["input_ids"]) == texts[0]
    assert tokenizer.name_or_path == str(folder)
