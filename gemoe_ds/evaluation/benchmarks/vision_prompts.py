"""From a request about pictures to what the model reads, in a style of prompts."""

from __future__ import annotations

from collections.abc import Iterable

from gemoe_ds.data.collate import Collator, Encoded
from gemoe_ds.data.prompts import PromptEncoder
from gemoe_ds.errors import ConfigError
from gemoe_ds.evaluation.benchmarks.prompt_styles.style import PromptStyle
from gemoe_ds.evaluation.benchmarks.requests import Request
from gemoe_ds.evaluation.benchmarks.tasks import Task


class VisionPrompts:
    """Encodes requests that have `images`, if only an empty list: as a chat."""

    def __init__(self, collator: Collator, style: PromptStyle) -> None:
        self.style = style
        self._encoder = PromptEncoder(collator)
        if style.question("", "", 1).system is not None and not self._encoder.knows_system:
            raise ConfigError(
                f"--prompt-style {style.name} has a system message, and this model's chat "
                "template has none; choose another style"
            )

    def __call__(self, request: Request, room: int) -> Encoded:
        """At most `room` tokens; SampleError, which names the document, if that cannot be."""
        assert request.images is not None
        pictures = self.style.pictures(request.task, request.images())
        return self._encoder.chat(
            self.style.question(request.task, request.context, len(pictures)),
            pictures,
            room=room,
            row=request.doc_id,
            name=f"{request.task}, document {request.doc_id}",
        )


def refuse_pictures(collator: Collator, tasks: Iterable[Task]) -> None:
    """ConfigError for tasks with pictures of a model that reads text, before anything is asked."""
    if collator.layout is not None:
        return
    seen = sorted(t.name for t in tasks if t.num_documents and t.requests_of(0)[0].images)
    if seen:
        raise ConfigError(
            f"--tasks {' '.join(seen)}: about pictures, and this backbone reads text only; leave "
            "them out, or choose another model.backbone"
        )
