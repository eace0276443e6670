"""What goes to a process that serves a folder, and what comes back: two JSON files.

Standard library only: the process may be another interpreter's, with its own torch.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

TRAINED, STATIC = "trained", "static"  # k: of each token, as trained; the base model's own


@dataclass(frozen=True)
class Prompt:
    text: str
    images: tuple[str, ...] = ()  # files


@dataclass(frozen=True)
class Job:
    """Ask the prompts one by one, then time them in batches."""

    folder: str
    mode: str  # TRAINED or STATIC
    prompts: tuple[Prompt, ...]
    dtype: str
    max_new_tokens: int  # of every answer: an end token does not end it
    batch: int
    rounds: int
    ids: tuple[tuple[int, ...], ...] | None = None  # of the prompts, a placeholder an image
    lengths: tuple[int, ...] = ()  # tokens of the prompts, images included
    options: dict[str, Any] = field(default_factory=dict)  # of the server


@dataclass(frozen=True)
class Answer:
    prompt_ids: list[int]  # as the model sees them, images included
    ids: list[int]  # greedy
    logprobs: list[float]  # natural logarithms, one a token of `ids`
    second_ids: list[int]  # the second best token at each step
    second_logprobs: list[float]
    text: str = ""


@dataclass(frozen=True)
class Served:
    """What one server did with one way to route."""

    version: str
    device: str
    answers: list[Answer]
    tokens: int  # written in a timed round
    seconds: list[float]  # a timed round each
    load_seconds: float
    mean_k: list[float] | None = None  # of every MoE layer, over all tokens; None: not known
    ids: list[list[int]] | None = None  # of the prompts, for other servers: see `Job.ids`

    @property
    def tokens_per_second(self) -> float:
        """Of the fastest round: whatever else the machine does only adds time."""
        return self.tokens / min(self.seconds)


def write_job(job: Job, path: Path) -> None:
    path.write_text(json.dumps(asdict(job)), encoding="utf-8")


def read_job(path: Path) -> Job:
    content = json.loads(path.read_text(encoding="utf-8"))
    prompts = tuple(Prompt(p["text"], tuple(p["images"])) for p in content.pop("prompts"))
    ids = content.pop("ids")
    return Job(
        prompts=prompts,
        ids=None if ids is None else tuple(map(tuple, ids)),
        lengths=tuple(content.pop("lengths")),
        **content,
    )


def read_served(path: Path) -> Served | str:
    """Or the error in one line."""
    content = json.loads(path.read_text(encoding="utf-8"))
    if "error" in content:
        return str(content["error"])
    answers = [Answer(**answer) for answer in content.pop("answers")]
    return Served(answers=answers, **content)
