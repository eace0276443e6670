"""serve-check with vLLM in the environment of `make serve-env`: what agrees, and the trap."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from transformers import OlmoeConfig, OlmoeForCausalLM

from gemoe_ds.export.folder import export
from tests.helpers import repository, run_python
from tests.models.small import make_model
from tests.tiny import WORDS, write_tokenizer

VOCABULARY, TOP_K = 300, 8
PLAIN = tuple(f"w{i}" for i in range(VOCABULARY - len(WORDS)))
pytestmark = [pytest.mark.serve, pytest.mark.timeout(3000)]


def python() -> Path:
    """The interpreter that has vLLM and the plugin."""
    found = os.environ.get("GEMOE_SERVE_PYTHON", repository() / ".venv-serve/bin/python")
    assert Path(found).exists(), f"{found} is not there: make serve-env"
    return Path(found)


@pytest.fixture(scope="module")
def exported(tmp_path_factory) -> Path:
    """OLMoE with heads of a size that vLLM has kernels for, and routers whose k varies."""
    root = tmp_path_factory.mktemp("vllm")
    tokenizer = write_tokenizer(root / "tokenizer", PLAIN)
    config = OlmoeConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_experts=16,
        num_experts_per_tok=TOP_K,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    torch.manual_seed(0)
    base = OlmoeForCausalLM(config)
    with torch.no_grad():
        for name, parameter in base.named_parameters():
            if "norm" not in name:
                parameter.normal_(0, 0.15)
    base.save_pretrained(root / "base")
    for path in tokenizer.iterdir():
        (root / "base" / path.name).write_bytes(path.read_bytes())
    model = make_model("olmoe", root / "base", "gemoe")
    with torch.no_grad():
        for layer in model.moe_layers:
            layer.router.eap.weight.normal_(0, 0.3)
    export(
        model,
        dict(model.trainable()),
        base=root / "base",
        tokenizer=tokenizer,
        router={"name": "gemoe"},
        provenance={"base": "random"},
        out=root / "out",
    )
    return root / "out"


def check(folder: Path, root: Path, prompts: int, new: int):
    g = torch.Generator().manual_seed(3)
    lines = [
        json.dumps({"text": " ".join(PLAIN[i] for i in torch.randint(270, (4 + n,), generator=g))})
        for n in range(prompts)
    ]
    (root / "prompts.jsonl").write_text("\n".join(lines))
    words = ["--prompts", root / "prompts.jsonl", "--rounds", 1, "--max-new-tokens", new]
    words += ["--python", python(), "--vllm", '{"enforce_eager": true}', "--tolerance", 1e-5]
    done = run_python(
        "launch/serve_check.py", folder, *words, "--out", root / "check.json", timeout=2500
    )
    return done, json.loads((root / "check.json").read_text())["servers"]


def test_vllm_answers_as_transformers_with_either_k(exported, tmp_path):
    done, rows = check(exported, tmp_path, 20, 32)
    assert done.returncode == 0, done.stderr[-3000:]
    trained, static, ours, stock = rows
    assert (ours["server"], ours["mode"]) == ("vllm", "trained") and stock["mode"] == "static"
    assert ours["agreement"]["equal"] == stock["agreement"]["equal"] == 20
    assert ours["served"]["mean_k"] == pytest.approx(trained["served"]["mean_k"])
    assert 1 < ours["mean_k"] < TOP_K == static["mean_k"]


def test_a_server_that_ignores_the_plugin_is_found_out(exported, tmp_path, monkeypatch):
    """The trap: the plugin is installed, and vLLM is told to load another one alone."""
    monkeypatch.setenv("VLLM_PLUGINS", "another")
    done, rows = check(exported, tmp_path, 4, 8)
    assert done.returncode == 2 and len(rows) == 4
    assert "vllm, trained k, does not answer as transformers, trained k" in done.stderr
    assert done.stderr.rstrip().endswith("its answers are those of the static k")
    assert rows[2]["mean_k"] is None, "no metric either"
