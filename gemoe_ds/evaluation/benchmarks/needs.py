"""What a task needs to be scored, beside answers: a judge, or leave to run a model's programs."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any

from gemoe_ds.errors import ConfigError
from gemoe_ds.evaluation.benchmarks.code import CONFIRM

# In names of metrics. A task that asks a judge says so there; mmbench_en_dev_static does not ask.
_JUDGED, _STATIC = ("gpt", "judge", "llm"), "static"


def needs_judge(leaf: Any) -> bool:
    metrics = [str(one.get("metric")) for one in leaf.config.get("metric_list") or []]
    judged = any(word in metric for metric in metrics for word in _JUDGED)
    return judged and not leaf.task_name.endswith(_STATIC)


def runs_code(leaf: Any) -> bool:
    return bool(leaf.config.get("unsafe_code"))


def unmet_needs(leaves: Iterable[Any], *, may_run_code: bool, judge: str | None) -> list[str]:
    """A sentence for each kind of task that could not be scored."""
    leaves = list(leaves)
    found = []
    coded = [leaf.task_name for leaf in leaves if runs_code(leaf)]
    if coded and not may_run_code:
        found.append(f"{_some(coded)} runs programs that the model has written: give {CONFIRM}")
    judged = [leaf.task_name for leaf in leaves if needs_judge(leaf)]
    if judged and judge is None:
        found.append(
            f"{_some(judged)} is scored by another model: give --judge MODEL, such as "
            "gpt-4o-2024-11-20, and OPENAI_API_KEY"
        )
    return found


def check_needs(leaves: Iterable[Any], *, may_run_code: bool, judge: str | None) -> None:
    """ConfigError before anything is scored, and none is scored 0 for the lack of it."""
    unmet = unmet_needs(leaves, may_run_code=may_run_code, judge=judge)
    if unmet:
        raise ConfigError(f"{'; '.join(unmet)}; or leave these tasks out with --tasks")
    if judge is not None and not os.environ.get("OPENAI_API_KEY"):
        raise ConfigError(
            f"--judge {judge}: OPENAI_API_KEY is not set (OPENAI_API_URL names a server of your "
            "own, with any key)"
        )


def configure_judge(judge: str) -> None:
    """Before tasks are loaded: those of lmms-eval read these then. ConfigError unless the judge
    answers once; the harness would ask for minutes, and give 0 for each document."""
    os.environ.update(API_TYPE="openai", MODEL_VERSION=judge)
    from lmms_eval.llm_judge import Request, ServerConfig, get_server

    config = ServerConfig(judge, max_tokens=16, num_retries=1, timeout=60)
    try:
        request = Request([{"role": "user", "content": "Say 1."}], config=config)
        answer = get_server("openai", config).evaluate(request)
        if not answer.content:
            raise ValueError("an empty answer")
    except Exception as error:  # of any kind: a network, a server, a key
        raise ConfigError(
            f"--judge {judge} at {os.environ.get('OPENAI_API_URL', 'OpenAI')} does not answer: "
            f"{' '.join(str(error).split())[:300]}"
        ) from error


def _some(names: list[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
