"""What a benchmark asks of a model, whatever harness it is from, and what the model answered."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from PIL.Image import Image

Kind = Literal["loglikelihood", "rolling", "generate"]


@dataclass(frozen=True)
class Writing:
    """How an answer is written. Temperature 0: greedily."""

    max_new_tokens: int | None = None  # None: what the model has room for
    until: tuple[str, ...] = ()  # the answer ends before the first of these
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0  # 0: all tokens


@dataclass(frozen=True)
class Request:
    """One thing that is asked about one document. `images` are opened only when they are needed."""

    task: str  # a leaf task
    doc_id: int  # in the task's split
    index: int  # among the document's requests
    kind: Kind
    context: str  # of `rolling`: the whole text
    continuation: str = ""  # of `loglikelihood`
    writing: Writing = Writing()  # of `generate`
    images: Callable[[], list[Image]] | None = field(default=None, compare=False)

    @property
    def key(self) -> str:
        """Names the request in answers.jsonl: equal for equal requests, of whatever process."""
        asked = [self.task, self.doc_id, self.index, self.kind, self.context, self.continuation]
        text = json.dumps([*asked, asdict(self.writing)], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:32]


@dataclass(frozen=True)
class Answer:
    """What the model answered to the request of this key."""

    key: str
    doc_id: int
    index: int
    text: str | None = None  # of `generate`
    log_likelihood: float | None = None  # natural logarithm, of the others
    is_greedy: bool | None = None  # of `loglikelihood`
    prompt_tokens: int = 0
    written_tokens: int = 0
    cut_tokens: int = 0  # on the left of the prompt, which was too long
    tokens: list[list[Any]] | None = None  # of a few of `generate`: text and k, for shown.jsonl

    def as_json(self) -> str:
        """A line of answers.jsonl."""
        said = {name: value for name, value in asdict(self).items() if value is not None}
        return json.dumps(said, ensure_ascii=False)

    @classmethod
    def from_json(cls, line: str) -> Answer:
        found: dict[str, Any] = json.loads(line)
        return cls(**found)
