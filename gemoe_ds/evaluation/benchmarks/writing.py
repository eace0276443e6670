"""A task's generation options, of either harness, as a `Writing`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gemoe_ds.errors import DataError
from gemoe_ds.evaluation.benchmarks.requests import Writing

_TOKENS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
# Of other models than ours, or the default of all: they change no answer here.
_IDLE = {"image_aspect_ratio", "use_cache", "skip_special_tokens", "num_return_sequences"}


def writing_of(task: str, options: Mapping[str, Any], default_tokens: int) -> Writing:
    """As lm-eval reads them: greedily unless do_sample, or a temperature without it, says else."""
    given = {key: value for key, value in options.items() if value is not None}
    until = given.pop("until", [])
    until = [until] if isinstance(until, str) else until
    tokens = [int(given.pop(name)) for name in _TOKENS if name in given]
    temperature = float(given.pop("temperature", 0.0))
    samples = given.pop("do_sample", temperature > 0)
    top_p, top_k = float(given.pop("top_p", 1.0)), int(given.pop("top_k", 0))
    beams = given.pop("num_beams", 1)
    unknown = [*(given.keys() - _IDLE), *(["num_beams"] if beams != 1 else [])]
    if unknown:
        raise DataError(
            f"{task}: its generation option {sorted(unknown)[0]} is none that `gemoe benchmark` "
            "follows; leave the task out"
        )
    if not samples or temperature == 0:
        temperature, top_p, top_k = 0.0, 1.0, 0
    return Writing(
        max_new_tokens=tokens[0] if tokens else default_tokens,
        until=tuple(text for text in until if text),
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
    )
