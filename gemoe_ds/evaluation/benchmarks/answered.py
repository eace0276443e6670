"""What `gemoe benchmark answer` has left of a task: asked.json and answers.jsonl."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from gemoe_ds.errors import DataError
from gemoe_ds.evaluation.benchmarks.requests import Answer, Request

ANSWERS, ASKED = "answers.jsonl", "asked.json"


@dataclass(frozen=True)
class AnsweredTask:
    folder: Path
    harness: str
    group: str | None
    num_documents: int
    num_requests: int
    choices: dict[str, Any]

    @classmethod
    def read(cls, folder: Path) -> AnsweredTask:
        path = folder / ASKED
        try:
            told = json.loads(path.read_bytes())
            names = ("harness", "group", "num_documents", "num_requests", "choices")
            found = cls(folder, **{name: told[name] for name in names})
            found.choices["num_fewshot"], found.choices["limit"]
            return found
        except (OSError, ValueError, KeyError, TypeError) as error:
            reason = f"{type(error).__name__}: {error}"
            raise DataError(
                f"{path} cannot be read ({reason}): run `gemoe benchmark answer` again"
            ) from None

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def has_template(self) -> bool:
        """Prompts were made with a tokenizer, which nobody has here: they cannot be compared."""
        return self.choices.get("chat_template", "none") != "none"

    @cached_property
    def answers(self) -> dict[tuple[int, int], Answer]:
        """By document and place among its requests; DataError if any is missing."""
        path = self.folder / ANSWERS
        try:
            with path.open(encoding="utf-8") as lines:
                read = [Answer.from_json(line) for line in lines]
        except (OSError, ValueError, TypeError) as error:
            raise DataError(
                f"{path} cannot be read ({error}): run `gemoe benchmark answer` again"
            ) from None
        found = {(answer.doc_id, answer.index): answer for answer in read}
        if len(found) != self.num_requests:
            raise DataError(
                f"{path} has {len(found):,} of {self.num_requests:,} answers: run the same `gemoe "
                "benchmark answer` command again, which goes on where it ended"
            )
        return found

    def answer(self, request: Request) -> Answer:
        """DataError if another thing was asked: the data has changed since, or the harness."""
        found = self.answers.get((request.doc_id, request.index))
        if found is not None and found.text is None and found.log_likelihood is None:
            raise DataError(
                f"{self.folder / ANSWERS}: document {request.doc_id} has neither text nor "
                "log_likelihood: run `gemoe benchmark answer` again"
            )
        if found is None or not (self.has_template or found.key == request.key):
            raise DataError(
                f"{self.folder}: document {request.doc_id} was not asked what it asks now (other "
                "data, or another version of it?): give the --data-root that was answered, or run "
                "`gemoe benchmark answer` again"
            )
        return found
