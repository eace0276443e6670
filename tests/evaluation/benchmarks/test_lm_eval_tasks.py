"""What lm-eval's tasks ask here is what the stock tasks ask, in whatever order it is asked for."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from gemoe_ds.errors import ConfigError, DataError
from gemoe_ds.evaluation.benchmarks.task_options import TaskOptions
from gemoe_ds.evaluation.benchmarks.writing import writing_of
from tests.evaluation.benchmarks.miniature import write_miniature


@pytest.fixture(autouse=True)
def in_miniature(miniature: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(miniature)


def ours() -> Any:
    """The module that is tested. It needs the harness, which not all who collect tests have."""
    from gemoe_ds.evaluation.benchmarks import lm_eval_tasks

    return lm_eval_tasks


def leaf(name: str) -> Any:
    (found,), _ = ours().LmEvalNames().leaves(name)
    return found


def stock_requests(name: str, options: TaskOptions, shots: int | None) -> list[Any]:
    """All of them, by the harness's own code, as `simple_evaluate` calls it."""
    stock = leaf(name).load_stock()
    if stock.config.num_fewshot != 0 and shots is not None:
        stock.set_config("num_fewshot", shots)
    stock.set_fewshot_seed(1234)
    stock.build_all_requests(
        limit=options.limit,
        apply_chat_template=options.chat_template is not None,
        fewshot_as_multiturn=True,
        chat_template=options.chat_template,
    )
    return stock.instances


def template(messages: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
    turns = "".join(f"<{m['role']}>{m['content']}</{m['role']}>" for m in messages)
    return turns + "<assistant>" * add_generation_prompt


CASES = [
    ("gsm8k", None, TaskOptions()),
    ("gsm8k", 2, TaskOptions(num_fewshot=2, limit=3, chat_template=template)),
    ("mmlu_anatomy", 5, TaskOptions(num_fewshot=5)),
    ("mmlu_virology", 1, TaskOptions(num_fewshot=1, chat_template=template)),
    ("bbh_cot_fewshot_navigate", None, TaskOptions(limit=2, chat_template=template)),
    ("hellaswag", 4, TaskOptions(num_fewshot=4)),
    ("hellaswag", 0, TaskOptions()),
]


@pytest.mark.parametrize(("name", "shots", "options"), CASES)
def test_requests_are_stock(name: str, shots: int | None, options: TaskOptions) -> None:
    expected: dict[int, list[Any]] = {}
    for instance in stock_requests(name, options, shots):
        expected.setdefault(instance.doc_id, []).append(instance)
    task = leaf(name).load(None, options, 0)
    assert task.num_documents == len(expected)
    for doc in random.Random(0).sample(range(task.num_documents), task.num_documents):
        asked = task.requests_of(doc)
        assert [r.doc_id for r in asked] == [doc] * len(asked)
        for request, instance in zip(asked, expected[doc], strict=True):
            if instance.request_type == "loglikelihood":
                assert (request.context, request.continuation) == instance.args
            else:
                assert request.context == instance.args[0]
                assert list(request.writing.until) == instance.args[1]["until"]
            assert request.kind == instance.request_type.removesuffix("_until")


def test_a_document_is_never_an_example_of_itself(tmp_path: Path, monkeypatch: Any) -> None:
    """A pool that is the split that is asked, with rows that are there twice: the sampler draws
    again, so that every later document's draw depends on it."""
    write_miniature(tmp_path, 12, only=["gsm8k"])
    monkeypatch.chdir(tmp_path)

    def stock() -> Any:
        made = leaf("gsm8k").load_stock(lean=True)
        table = made.dataset["test"]
        made.dataset["test"] = made.task_docs = table.select([0, 1, 2, 3, 4, 0, 1, 2, 5, 6])
        made.fewshot_cfg.split = "test"
        made.config.fewshot_split = "test"
        return made

    task = ours().LmEvalTask(stock(), None, TaskOptions(num_fewshot=4), 0)
    whole = stock()
    whole.set_config("num_fewshot", 4)
    sampler = ours().get_sampler("default")(list(whole.fewshot_docs()), rnd=None)
    whole.sampler = sampler
    whole.set_fewshot_seed(1234)
    whole.build_all_requests()
    contexts = [instance.args[0] for instance in whole.instances]
    assert [task.requests_of(doc)[0].context for doc in (9, 0, 5, 3)] == [
        contexts[doc] for doc in (9, 0, 5, 3)
    ]


def test_too_many_examples_are_refused() -> None:
    with pytest.raises(ConfigError, match="--num-fewshot 9: mmlu_anatomy has 5 documents"):
        leaf("mmlu_anatomy").load(None, TaskOptions(num_fewshot=9), 0)
    with pytest.raises(ConfigError, match="--num-fewshot 99: gsm8k has 8 documents"):
        leaf("gsm8k").load(None, TaskOptions(num_fewshot=99), 0)


def test_a_group_has_the_harness_s_leaves() -> None:
    names = ours().LmEvalNames()
    leaves, is_group = names.leaves("mmlu")
    assert is_group and len(leaves) == 57
    assert {one.data[0] for one in leaves} == {"cais/mmlu"}
    assert len(names.leaves("bbh_cot_fewshot")[0]) == 27


def test_repeats_are_requests_of_their_own() -> None:
    stock = leaf("gsm8k").load_stock(lean=True)
    stock.set_config("repeats", 3)
    task = ours().LmEvalTask(stock, None, TaskOptions(num_fewshot=0), 0)
    asked = task.requests_of(1)
    assert [request.index for request in asked] == [0, 1, 2]
    assert len({request.key for request in asked}) == 3
    assert len({request.context for request in asked}) == 1


def test_a_rolling_request_is_the_whole_text() -> None:
    from lm_eval.api.instance import Instance

    instance = Instance("loglikelihood_rolling", {}, ("a whole text",), 0, ("wikitext", 3, 1))
    (request,) = ours().as_requests("wikitext", 3, [instance])
    assert (request.kind, request.context, request.doc_id) == ("rolling", "a whole text", 3)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"until": "x", "max_gen_toks": 7, "max_new_tokens": 9},
        {"until": ["a", "b"], "do_sample": False, "temperature": 0.7},
        {"do_sample": True, "temperature": 0.7, "top_p": 0.95, "top_k": 5},
        {"temperature": 0.2, "max_new_tokens": 3},
        {"temperature": 0.0, "do_sample": True, "max_completion_tokens": 5},
    ],
)
def test_generation_options_are_read_as_the_harness_does(options: dict[str, Any]) -> None:
    from lm_eval.models.utils import normalize_gen_kwargs

    expected = normalize_gen_kwargs(options, 256)
    writing = writing_of("a", options, 256)
    assert writing.max_new_tokens == expected["max_gen_toks"]
    assert list(writing.until) == expected["until"]
    assert writing.temperature == expected.get("temperature", 0.0)


def test_unknown_generation_options_are_refused() -> None:
    with pytest.raises(DataError, match="a: its generation option num_beams"):
        writing_of("a", {"num_beams": 10}, 256)
