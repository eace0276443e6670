"""What lmms-eval's tasks ask here is what the stock tasks ask; pictures are opened late."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from gemoe_ds.errors import DataError
from gemoe_ds.evaluation.benchmarks.task_options import TaskOptions


@pytest.fixture(autouse=True)
def in_miniature(miniature: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(miniature)


def leaf(name: str) -> Any:
    from gemoe_ds.evaluation.benchmarks.lmms_eval_tasks import LmmsEvalNames

    (found,), _ = LmmsEvalNames().leaves(name)
    return found


NAMES = ["pope", "mmmu_val", "mmbench_en_dev_static", "mme", "textvqa_val"]


@pytest.mark.parametrize("name", NAMES)
def test_requests_are_stock(name: str) -> None:
    stock = leaf(name).load_stock(TaskOptions())
    stock.build_all_requests()
    task = leaf(name).load(None, TaskOptions(), 0)
    assert task.num_documents == len(stock.instances)
    for instance in reversed(stock.instances):
        (request,) = task.requests_of(instance.doc_id)
        context, options, to_visual, doc_id, task_name, split = instance.args
        assert (request.context, request.doc_id, request.task) == (context, doc_id, task_name)
        assert request.writing.max_new_tokens == options.get("max_new_tokens", 1024)
        assert request.images is not None
        expected = to_visual(stock.dataset[split][doc_id])
        assert [picture.tobytes() for picture in request.images()] == [
            picture.tobytes() for picture in expected
        ]


def test_several_pictures_and_limits() -> None:
    task = leaf("mmmu_val").load(None, TaskOptions(limit=3), 0)
    assert task.num_documents == 3 and task.choices["limit"] == 3
    images = task.requests_of(2)[0].images
    assert images is not None and len(images()) == 2


def test_what_the_harness_puts_between_examples_ends_no_answer() -> None:
    assert leaf("mmmu_val").load(None, TaskOptions(), 0).requests_of(0)[0].writing.until == ()
    (request,) = leaf("mmbench_en_dev_static").load(None, TaskOptions(), 0).requests_of(0)
    assert request.writing.until == ("ASSISTANT:",)


def test_what_is_no_picture_is_refused() -> None:
    task = leaf("pope").load(None, TaskOptions(), 0)
    task._stock.config.doc_to_visual = lambda doc: ["a.mp4"]
    with pytest.raises(DataError, match="pope: document 1 shows a str"):
        task.requests_of(1)[0].images()
