"""Tokens a second of an exported folder in vLLM: stock at its static k, and the plugin beside it.

    make serve-env
    python -m benchmarks.serving --out results/serving_cpu.json

One vLLM a contender runs in the environment of `make serve-env`, one thread each; they are asked in
turns, round after round, and what counts is the CPU seconds of each, as a ratio to stock's in the
same round. The model is random, of OLMoE-1B-7B's layer shape with fewer layers, in bfloat16; its
router's predictor spreads k, and the dial sets the mean.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import OlmoeConfig, OlmoeForCausalLM

import gemoe_ds.routers  # noqa: F401  (registers every router)
from gemoe_ds.analysis.provenance import provenance
from gemoe_ds.export.folder import export
from gemoe_ds.files import write_text
from gemoe_ds.models.backbone import Backbone
from gemoe_ds.models.moe_model import MoEModel
from gemoe_ds.models.random_checkpoint import write_word_tokenizer
from gemoe_ds.moe.router import Router
from gemoe_ds.parser import Parser

WORKER = Path(__file__).parents[1] / "plugins/vllm/env/speed_worker.py"
SHAPE: dict[str, Any] = {
    "vocab_size": 4096,
    "hidden_size": 2048,
    "intermediate_size": 1024,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "num_experts": 64,
    "num_experts_per_tok": 8,
}
MEAN_K = (8.0, 5.1, 3.0)  # as set on calibration tokens; what was served is in the results
SLOTS = ("fold", "ragged")
BATCHES = {1: 32, 8: 12, 32: 6}  # sequences: new tokens of each
SPREAD = 6.0  # the predictor's weights, times its random ones: k from 1 to 8
GOALS = {"static at most": 1.03, "5.1 at batch 8": 1.1, "3.0 at batch 8": 1.3}


def main(argv: list[str] | None = None) -> int:
    parser = Parser("python -m benchmarks.serving", description=__doc__)
    default = Path(".venv-serve/bin/python")
    parser.add_argument("--python", type=Path, default=default, help="has vLLM and the plugin")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_or_exit(argv)
    if not arguments.python.exists():
        parser.error(f"{arguments.python} is not there: make serve-env, or give --python")
    found: dict[str, Any] = {
        "made_by": provenance(),
        "vllm": version(arguments.python),
        "model": SHAPE | {"layers": arguments.layers, "dtype": "bfloat16"},
        "goals": GOALS,
    }
    with tempfile.TemporaryDirectory() as root:
        folder = write_folder(Path(root), arguments.layers)
        for rounds in measure(folder, arguments):  # what there is is kept, should it be stopped
            found["rows"] = summary(rounds)
            write_text(arguments.out, json.dumps(found, indent=1) + "\n")
    for row in summary(rounds):
        print(row)
    return 0


def write_folder(root: Path, layers: int) -> Path:
    """A random OLMoE of this many layers, and a gemoe router that spreads k, exported."""
    torch.manual_seed(0)
    config = OlmoeConfig(**SHAPE, num_hidden_layers=layers, pad_token_id=0)
    stock: Any = OlmoeForCausalLM(config)
    stock.to(torch.bfloat16).save_pretrained(root / "base")
    words = {f"w{i}": i for i in range(SHAPE["vocab_size"])}
    write_word_tokenizer(words, {}, root / "tokenizer")
    router, family = Router.named("gemoe"), Backbone.named("olmoe")
    model = MoEModel.from_checkpoint(
        family(family.Config()),
        root / "base",
        root / "tokenizer",
        (router, router.Config()),
    )
    for layer in model.moe_layers:
        predictor: Any = layer.router.get_submodule("eap")
        predictor.weight.data *= SPREAD
    export(
        model,
        {},
        base=root / "base",
        tokenizer=root / "tokenizer",
        router={"name": "gemoe"},
        provenance={"base": "random"},
        out=root / "exported",
    )
    return root / "exported"


def measure(folder: Path, arguments: argparse.Namespace) -> Iterator[list[dict[str, Any]]]:
    """After each round, the rows so far. A round asks every contender for every batch, in turns;
    the first one warms up and does not count."""
    found: list[dict[str, Any]] = []
    with ExitStack() as stack:
        workers = {
            slots: stack.enter_context(worker(arguments.python, folder, slots))
            for slots in ("stock", *SLOTS)
        }
        asked = [("stock", None), *((slots, k) for slots in SLOTS for k in MEAN_K)]
        for turn in range(arguments.rounds + 1):
            for batch, new in BATCHES.items():
                for slots, k in asked if turn % 2 else reversed(asked):
                    question = {"batch": batch, "prompt": 8, "new": new, "k": k}
                    answer = ask(workers[slots], question)
                    row = {"turn": turn, "slots": slots, "k": k, "batch": batch} | answer
                    if turn:
                        found.append(row | {"tokens": batch * new})
            print(f"round {turn} of {arguments.rounds}", flush=True)
            if turn:
                yield found


@contextmanager
def worker(python: Path, folder: Path, slots: str) -> Iterator[subprocess.Popen[str]]:
    environment = {"OMP_NUM_THREADS": "1", "VLLM_CPU_KVCACHE_SPACE": "1", "PYTHONPATH": ""}
    environment |= {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_NO_USAGE_STATS": "1"}
    process = subprocess.Popen(
        [str(python.absolute()), str(WORKER), str(folder), slots],
        env=os.environ | environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        if line != "ready\n":
            raise RuntimeError(f"the contender {slots} did not start: see what it said above")
        yield process
    finally:
        process.kill()
        process.wait()


def ask(process: subprocess.Popen[str], question: dict[str, Any]) -> dict[str, Any]:
    assert process.stdin is not None and process.stdout is not None
    process.stdin.write(json.dumps(question) + "\n")
    process.stdin.flush()
    answer: dict[str, Any] = json.loads(process.stdout.readline())
    return answer


def summary(rounds: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Medians over the rounds; `beside_stock`: tokens a second over stock's in the same round."""
    stock = {
        (row["turn"], row["batch"]): row["seconds"] for row in rounds if row["slots"] == "stock"
    }
    rows = []
    for slots, k, batch in sorted({(r["slots"], r["k"] or 0.0, r["batch"]) for r in rounds}):
        of_it = [
            row
            for row in rounds
            if (row["slots"], row["k"] or 0.0, row["batch"]) == (slots, k, batch)
        ]
        ratios = sorted(stock[row["turn"], batch] / row["seconds"] for row in of_it)
        rows.append(
            {
                "slots": slots,
                "set_k": k or None,
                "batch": batch,
                "mean_k": of_it[0]["mean_k"],
                "tokens_a_cpu_second": statistics.median(r["tokens"] / r["seconds"] for r in of_it),
                "beside_stock": statistics.median(ratios),
                "lowest": ratios[0],
                "highest": ratios[-1],
                "rounds": len(ratios),
            }
        )
    return rows


def version(python: Path) -> str:
    run = [str(python.absolute()), "-c", "import vllm; print(vllm.__version__)"]
    done = subprocess.run(run, capture_output=True, text=True, check=True)
    return done.stdout.split()[-1]


if __name__ == "__main__":
    raise SystemExit(main())
