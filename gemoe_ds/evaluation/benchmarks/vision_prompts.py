"""From a request about pictures to what the model reads, in a style of prompts."""

from __future__ import annotations

from collections.abc import Iterable

from gemoe_ds.data.collate import Collator, Encoded
from gemoe_ds.data.prompts import PromptEncoder, pictures_marked
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


def refuse_pictures(collator: Collator, tasks: Iterable[Task], style: PromptStyle) -> None:
    """ConfigError, before anything is asked, for tasks with more pictures than the model reads."""
    seen = [t for t in tasks if t.num_documents and t.requests_of(0)[0].images]
    if collator.layout is None and seen:
        raise ConfigError(
            f"--tasks {' '.join(sorted(t.name for t in seen))}: about pictures, and this backbone "
            "reads text only; leave them out, or choose another model.backbone"
        )
    if collator.conversations.chat.one_image and style.most_pictures != 1:
        for task in seen:
            _refuse_several(task)


def _refuse_several(task: Task) -> None:
    """Told by the marks in a text, where a task marks its pictures: none is opened."""
    if not pictures_marked(task.requests_of(0)[0].context):
        return
    for doc in range(task.num_documents):
        request = task.requests_of(doc)[0]
        if (number := pictures_marked(request.context)) > 1:
            raise ConfigError(
                f"--tasks {task.name}: document {request.doc_id} shows {number} pictures, and this "
                "model reads one at a time; --prompt-style molmo shows the first, as Molmo's own "
                "evaluation does, or leave the task out"
            )
