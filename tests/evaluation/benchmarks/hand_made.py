"""Tasks made by hand, of every kind, for a tiny model that knows the words a to t."""

from __future__ import annotations

import random
import re
from dataclasses import dataclass, field
from pathlib import Path

from gemoe_ds.evaluation.benchmarks.answer_arguments import answer_parser, find_run
from gemoe_ds.evaluation.benchmarks.answer_modes import answer_all
from gemoe_ds.evaluation.benchmarks.prompt_styles.style import PromptStyle
from gemoe_ds.evaluation.benchmarks.requests import Request, Writing
from tests.helpers import repository
from tests.tiny import WORDS

LETTERS = WORDS[6:]


def words(rng: random.Random, low: int, high: int) -> str:
    return " ".join(rng.choices(LETTERS, k=rng.randint(low, high)))


@dataclass
class HandMade:
    """`kind`: letters (options of one token), ends (longer ones), rolling, greedy or drawn."""

    kind: str
    num_documents: int
    seed: int = 0
    group: str | None = None
    harness: str = "by_hand"
    choices: dict[str, int] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return f"hand_{self.kind}"

    def requests_of(self, doc: int) -> list[Request]:
        rng = random.Random(f"{self.kind} {self.seed} {doc}")
        context, doc_id = words(rng, 1, 30), 1000 - 3 * doc

        def request(index: int, kind: str, *texts: str, **more: object) -> Request:
            return Request(self.name, doc_id, index, kind, *texts, **more)  # type: ignore[arg-type]

        if self.kind == "rolling":
            return [request(0, "rolling", words(rng, 0 if doc else 70, 90))]
        if self.kind == "letters":
            options = rng.sample(LETTERS, 4)
        elif self.kind == "ends":
            options = [words(rng, 1, 7) for _ in range(rng.randint(1, 4))]
        else:
            drawn = {"temperature": 1.0, "top_p": 0.9} if self.kind == "drawn" else {}
            how = Writing(rng.randint(1, 9), (rng.choice(LETTERS),), **drawn)
            repeats = 2 if self.kind == "drawn" else 1
            return [request(i, "generate", context, writing=how) for i in range(repeats)]
        return [
            request(index, "loglikelihood", context, f" {option}")
            for index, option in enumerate(options)
        ]


def all_kinds(number: int = 7) -> list[HandMade]:
    return [HandMade(kind, number) for kind in ("letters", "ends", "rolling", "greedy", "drawn")]


def write_recipe(setting: dict[str, Path], backbone: str = "tiny") -> Path:
    path = setting["root"] / "recipe.yaml"
    path.write_text(
        f"""output_dir: {setting["root"] / "unused"}
model:
  backbone: {{name: {backbone}}}
  checkpoint: {setting["hf"]}
  router: {{name: gemoe}}
  dtype: float32
data: {{train_path: {setting["data"]}, tokenizer: {setting["tokenizer"]}, max_length: 64}}
optim: {{lr: 0.01}}
train: {{steps: 1, micro_batch_size: 1}}
deepspeed: {repository() / "ds_configs/zero2.json"}
""",
        encoding="utf-8",
    )
    return path


def answer(recipe, tasks, *words, stop=None, known=(), style="default"):
    """`gemoe benchmark answer` with these tasks, in this process."""
    overrides = [str(word) for word in words if re.fullmatch(r"\w[\w.]*=.*", str(word))]
    options = [str(word) for word in words if str(word) not in overrides]
    if not any(override.startswith("data.max_length=") for override in overrides):
        overrides.append("data.max_length=64")
    given = [str(recipe), *overrides, "--tasks", "-", *options]
    arguments = answer_parser(None).parse_intermixed_args(given)
    find_run(arguments)
    answer_all(arguments, tasks, known, PromptStyle.named(style)(), stop)


def files(folder: Path) -> dict[str, bytes]:
    """All answers below a folder."""
    return {
        str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("answers.jsonl")
    }
