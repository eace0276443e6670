"""A published folder in our model beside its publishers' code: log-probabilities and greedy tokens.

Text only. One model is on the device at a time. What the folder's own code needs must be installed;
where it does not load, its reason is what is written.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from gemoe_ds.config import RunConfig
from gemoe_ds.config.load import load_config
from gemoe_ds.data.collate import Encoded
from gemoe_ds.engine.gpu import check_dtype
from gemoe_ds.errors import exit_on_error, in_a_line
from gemoe_ds.evaluation.generate import generate
from gemoe_ds.files import write_text
from gemoe_ds.models.inputs import ModelInputs
from gemoe_ds.models.shard import ExpertShard
from gemoe_ds.parser import Parser
from gemoe_ds.train.assemble import build_collator, build_model

TEXT = (
    "Mixture-of-experts layers route every token to a few of many experts. A token that the gate "
    "is sure of needs fewer of them than one that it is not. "
) * 6
NEW_TOKENS = 32


def main(argv: list[str] | None = None) -> int:
    parser = Parser("python -m benchmarks.beside_stock", description=__doc__)
    parser.add_argument("recipe", type=Path, help="its model.* and data.tokenizer are read")
    parser.add_argument("overrides", nargs="*", metavar="key.path=value")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_or_exit(argv)
    with exit_on_error():
        write_text(arguments.out, json.dumps(compare(arguments), indent=1) + "\n")
    return 0


def compare(arguments: argparse.Namespace) -> dict[str, Any]:
    config = load_config(arguments.recipe, [*arguments.overrides, "model.router={name: top_k}"])
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    check_dtype(config.model.dtype, device)
    ids_S, log_p_SV, written = ours(config, device)
    found: dict[str, Any] = {"device": str(device), "dtype": config.model.dtype}
    try:
        stock_log_p_SV, stock_written = stock(config, ids_S, device)
    except Exception as error:  # of other people's code
        return found | {"not_compared": in_a_line(error)}
    best_S, stock_best_S = log_p_SV.argmax(-1), stock_log_p_SV.argmax(-1)
    pairs = enumerate(zip(written, stock_written, strict=True))
    same = next((place for place, (one, other) in pairs if one != other), len(written))
    return found | {
        "tokens": len(ids_S),
        "largest_difference": float((log_p_SV - stock_log_p_SV).abs().max()),
        "mean_difference": float((log_p_SV - stock_log_p_SV).abs().mean()),
        "same_best_token": float((best_S == stock_best_S).double().mean()),
        "greedy_tokens_equal": [same, NEW_TOKENS],
    }


@torch.no_grad()
def ours(config: RunConfig, device: torch.device) -> tuple[list[int], Tensor, list[int]]:
    """The prompt, log-probabilities after each of its tokens, and what is written after it."""
    model = build_model(config, ExpertShard()).to(device).eval()
    collator = build_collator(config, model)
    tokenizer: Any = collator.tokenizer
    ids_S: list[int] = tokenizer(TEXT, add_special_tokens=True)["input_ids"]
    ids_BS = torch.tensor([ids_S], device=device)
    valid_BS = torch.ones_like(ids_BS, dtype=torch.bool)
    with model.autocast(device):
        hidden_BSD = model.hidden(ModelInputs(ids_BS, valid_BS, ~valid_BS))
        logits_SV = model.backbone.head(model.hf)(hidden_BSD[0])
    log_p_SV = logits_SV.float().log_softmax(-1).cpu()
    prompt = Encoded(0, "prompt")
    prompt.add(ids_S)
    batch = collator.batch([prompt], left=True).to(device)
    written = generate(model, batch, max_new_tokens=NEW_TOKENS, end_ids=set())
    del model
    _free()
    return ids_S, log_p_SV, written.token_ids[0]


@torch.no_grad()
def stock(config: RunConfig, ids_S: list[int], device: torch.device) -> tuple[Tensor, list[int]]:
    """The same of the code that the folder's config.json names."""
    folder = str(config.model.checkpoint)
    options: Any = {"dtype": getattr(torch, config.model.dtype), "trust_remote_code": True}
    kind = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=True)
    sees = type(kind) in transformers.AutoModelForImageTextToText._model_mapping
    auto: Any = transformers.AutoModelForCausalLM
    auto = transformers.AutoModelForImageTextToText if sees else auto
    model = auto.from_pretrained(folder, **options).to(device).eval()
    ids_BS = torch.tensor([ids_S], device=device)
    log_p_SV = model(input_ids=ids_BS).logits[0].float().log_softmax(-1).cpu()
    written = model.generate(
        ids_BS,
        attention_mask=torch.ones_like(ids_BS),
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        eos_token_id=None,
    )
    del model
    _free()
    return log_p_SV, written[0, len(ids_S) :].tolist()


def _free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


if __name__ == "__main__":
    sys.exit(main())
