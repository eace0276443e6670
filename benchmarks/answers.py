"""Time the answers to benchmarks, ours against lm-eval's `hf` on the same folder.

    python -m benchmarks.answers                 writes results/answers_cpu.json, or _cuda

The model is OLMoE's in small, with random weights; the texts have the lengths of MMLU with 5 shots,
HellaSwag and GSM8K with 5 shots, and no sense. Ours counts the routing and writes its files as
`gemoe benchmark answer` does. Answers are compared first; then contenders take turns. On a CPU the
seconds are those that the process computed, so that other work of the machine does not count.
"""

from __future__ import annotations

import argparse
import io
import json
import random
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import OlmoeConfig, OlmoeForCausalLM

from benchmarks import CHECKOUT
from benchmarks.timing import keep_kernels, measure, paired
from gemoe_ds.analysis.provenance import provenance
from gemoe_ds.engine.world import World, distributed, gather_objects
from gemoe_ds.errors import ConfigError, exit_on_error
from gemoe_ds.evaluation.arguments import RoutingMode
from gemoe_ds.evaluation.benchmarks.answer_arguments import answer_parser, find_run
from gemoe_ds.evaluation.benchmarks.answer_modes import Asked, answer_mode
from gemoe_ds.evaluation.benchmarks.plan import plan_tasks
from gemoe_ds.evaluation.benchmarks.prompt_styles.default import DefaultStyle
from gemoe_ds.evaluation.benchmarks.reading import Reader
from gemoe_ds.evaluation.benchmarks.requests import Answer, Request, Writing
from gemoe_ds.evaluation.benchmarks.vision_prompts import VisionPrompts
from gemoe_ds.evaluation.origin import origin_of
from gemoe_ds.evaluation.session import EvalSession, session_config
from gemoe_ds.files import write_text
from gemoe_ds.models.random_checkpoint import write_word_tokenizer
from gemoe_ds.parser import Parser, at_least_one
from gemoe_ds.train.assemble import meta_collator

_CLOCK = "wall" if torch.cuda.is_available() else "process"
SHAPE: dict[str, Any] = {
    "hidden_size": 512,
    "intermediate_size": 256,
    "num_hidden_layers": 4,
    "num_experts": 64,
}
TOP_K, FEWER = 8, 4


@dataclass
class Texts:
    """A task of made-up text: words of a context that all documents share, of its own, of options;
    no options: an answer is written."""

    name: str
    num_documents: int
    shared: int
    own: tuple[int, int]
    options: int = 0
    option: tuple[int, int] = (1, 1)
    new_tokens: int = 0
    group: str | None = None
    harness: str = ""
    choices: Mapping[str, Any] = field(default_factory=dict)

    def requests_of(self, doc: int) -> list[Request]:
        rng = random.Random(f"{self.name} {doc}")
        before = words(random.Random(self.name), self.shared)
        context = f"{before} {words(rng, rng.randint(*self.own))}".strip()
        if not self.options:
            how = Writing(self.new_tokens, ("\n\n",))
            return [Request(self.name, doc, 0, "generate", context, writing=how)]
        return [
            Request(
                self.name,
                doc,
                index,
                "loglikelihood",
                context,
                f" {words(rng, rng.randint(*self.option))}",
            )
            for index in range(self.options)
        ]


def words(rng: random.Random, number: int) -> str:
    return " ".join(rng.choices(WORDS, k=number))


WORDS = [a + b + c for a in "bdfgklmnprst" for b in "aeiou" for c in ("", *"lmnrst")]
TASKS = (
    Texts("mmlu, 5 shots", 24, 500, (40, 140), options=4),
    Texts("hellaswag", 60, 0, (30, 100), options=4, option=(10, 35)),
    Texts("gsm8k, 5 shots", 8, 700, (40, 100), new_tokens=32),
)


def write_model(folder: Path, dtype: str, **options: Any) -> None:
    """A random checkpoint, with a tokenizer whose tokens are the words; `options` of its config."""
    torch.manual_seed(0)
    specials = ["<pad>", "<s>", "</s>"]
    config = OlmoeConfig(
        **SHAPE | {"vocab_size": 16384} | options,
        num_experts_per_tok=TOP_K,
        num_attention_heads=8,
        num_key_value_heads=8,
        eos_token_id=2,
        pad_token_id=0,
    )
    OlmoeForCausalLM(config).to(getattr(torch, dtype)).save_pretrained(folder)
    write_word_tokenizer({word: n for n, word in enumerate([*specials, *WORDS])}, specials, folder)


def write_recipe(folder: Path, dtype: str) -> Path:
    """Of evaluation alone: what it says of training is not read."""
    recipe = {
        "output_dir": str(folder / "unused"),
        "model": {
            "backbone": {"name": "olmoe"},
            "checkpoint": str(folder),
            "router": {"name": "top_k"},
            "dtype": dtype,
        },
        "data": {"train_path": str(folder), "tokenizer": str(folder), "max_length": 2048},
        "optim": {"lr": 0.1},
        "train": {"steps": 1, "micro_batch_size": 1},
        "deepspeed": "zero2",
    }
    path = folder / "recipe.yaml"
    path.write_text(json.dumps(recipe))
    return path


class Ours:
    """All that `gemoe benchmark answer` does for a task, but loading."""

    def __init__(self, recipe: Path, out: Path, world: World) -> None:
        options = ["--tasks", "-", "--out", str(out), "--k", str(TOP_K), str(FEWER)]
        self.arguments = answer_parser(None).parse_intermixed_args([str(recipe), *options])
        find_run(self.arguments)
        config = session_config(self.arguments)
        self.session = EvalSession(self.arguments, config, world)
        collator = meta_collator(config)
        self.reader = Reader(collator, VisionPrompts(collator, DefaultStyle()), 1)
        self.origin = origin_of(config.model.checkpoint, None, world)

    def answers(self, task: Texts, k: int) -> list[tuple[float | str, bool]]:
        """In the order of the requests."""
        with tempfile.TemporaryDirectory() as folder, redirect_stdout(io.StringIO()):
            self.arguments.out = Path(folder)
            plans = plan_tasks([task], self.reader, gather_objects, 0, 1)
            mode = RoutingMode(f"k_{k}", k=k)
            asked = Asked([task], plans, self.reader, choices={}, style={})
            answer_mode(self.session, mode, asked, self.origin)
            lines = (Path(folder) / mode.folder / task.name / "answers.jsonl").read_text()
        found = [Answer.from_json(line) for line in lines.splitlines()]
        found.sort(key=lambda answer: (answer.doc_id, answer.index))
        return [
            (str(a.text), True)
            if a.log_likelihood is None
            else (a.log_likelihood, bool(a.is_greedy))
            for a in found
        ]


class Stock:
    """lm-eval's `hf`, on the same folder, with rows of a batch."""

    def __init__(self, folder: Path, dtype: str, batch: int) -> None:
        from lm_eval.models.huggingface import HFLM

        device = "cuda" if torch.cuda.is_available() else "cpu"
        self.model = HFLM(pretrained=str(folder), dtype=dtype, batch_size=batch, device=device)

    def answers(self, task: Texts) -> list[tuple[float | str, bool]]:
        from lm_eval.api.instance import Instance

        requests = [
            request for doc in range(task.num_documents) for request in task.requests_of(doc)
        ]
        with redirect_stderr(io.StringIO()):
            if task.options:
                pairs = [(request.context, request.continuation) for request in requests]
                asked = [Instance("loglikelihood", {}, pair, 0) for pair in pairs]
                return list(self.model.loglikelihood(asked, disable_tqdm=True))
            how = {"until": ["\n\n"], "max_gen_toks": task.new_tokens, "do_sample": False}
            asked = [Instance("generate_until", {}, (r.context, how), 0) for r in requests]
            return [(text, True) for text in self.model.generate_until(asked, disable_tqdm=True)]


def check(task: Texts, ours: list[Any], stock: list[Any], bound: float) -> float:
    """The largest difference of a log-likelihood; ConfigError if answers are not the same."""
    if not task.options:
        different = sum(a != b for a, b in zip(ours, stock, strict=True))
        if different and bound < 1e-3:
            raise ConfigError(f"{task.name}: {different} of {len(ours)} texts differ")
        return different / len(ours)
    largest = max(abs(a[0] - b[0]) for a, b in zip(ours, stock, strict=True))
    if largest > bound:
        raise ConfigError(f"{task.name}: log-likelihoods differ by {largest:.2g}")
    return largest


def main(argv: list[str]) -> None:
    parser = Parser("python -m benchmarks.answers", description=__doc__)
    parser.add_argument("--rounds", type=at_least_one, default=5, help="timed rounds (5)")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--batches", type=at_least_one, nargs="+", default=[16], help="of stock")
    parser.add_argument("--tasks", nargs="+", default=[], help="those that begin with these words")
    parser.add_argument("--out", type=Path, help="default: results/answers_DEVICE.json")
    parser.add_argument("--keep", action="store_true", help="keep the file's rows of other tasks")
    flags = parser.parse_or_exit(argv)
    with exit_on_error():
        origin = provenance()  # before its own results make it dirty
        device = "cuda" if torch.cuda.is_available() else "cpu"
        out = flags.out or CHECKOUT / f"results/answers_{device}.json"
        rows = run(flags)
        timed = {row["task"] for row in rows}
        earlier = json.loads(out.read_bytes())["rows"] if flags.keep else []
        rows = [row for row in earlier if row["task"] not in timed] + rows
        data = origin | {"device": device, "threads": torch.get_num_threads(), "dtype": flags.dtype}
        data |= {"shape": SHAPE | {"top_k": TOP_K}, "clock": _CLOCK, "rows": rows}
        write_text(out, json.dumps(data, indent=1) + "\n")


def run(flags: argparse.Namespace) -> list[dict[str, Any]]:
    bound = 1e-4 if flags.dtype == "float32" else 0.5
    rows = []
    keep_kernels()
    with tempfile.TemporaryDirectory() as place, distributed() as world:
        folder = Path(place) / "model"
        write_model(folder, flags.dtype)
        ours = Ours(write_recipe(folder, flags.dtype), Path(place) / "out", world)
        stock = {n: Stock(folder, flags.dtype, n) for n in flags.batches}
        for task in TASKS:
            if flags.tasks and not task.name.startswith(tuple(flags.tasks)):
                continue
            first = next(iter(stock.values()))
            off = check(task, ours.answers(task, TOP_K), first.answers(task), bound)
            contenders: dict[str, Callable[[], Any]] = {
                f"gemoe_ds, k {k}": partial(ours.answers, task, k) for k in (TOP_K, FEWER)
            }
            contenders |= {f"hf, batch {n}": partial(m.answers, task) for n, m in stock.items()}
            clock = time.perf_counter if _CLOCK == "wall" else time.process_time
            timings = measure(contenders, flags.rounds, clock=clock)
            stocks = [timing for name, timing in timings.items() if name.startswith("hf")]
            best = min(stocks, key=lambda timing: timing.median)
            for name, timing in timings.items():
                ratio = paired(lambda other, own: other / own, best, timing)
                row = {"task": task.name, "contender": name, "documents": task.num_documents}
                rows.append(row | timing.row() | {"speed_up": round(ratio, 3), "off": off})
                print(f"{task.name}, {name}: {timing.median:.2f} s, {ratio:.2f} x", flush=True)
    return rows


if __name__ == "__main__":
    main(sys.argv[1:])
