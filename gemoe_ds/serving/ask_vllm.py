"""A folder under vLLM.

Trained k needs the plugin gemoe-vllm; for static k `VLLM_PLUGINS` leaves it out
(gemoe_ds.serving.servers).
"""

from __future__ import annotations

import time
from typing import Any

import torch
import vllm
from PIL import Image
from prometheus_client import REGISTRY
from vllm import LLM, SamplingParams

from gemoe_ds.serving.exchange import TRAINED, Answer, Job, Prompt, Served

ROUTED, USED = "gemoe_routed_tokens_total", "gemoe_used_experts_total"  # of the plugin, by layer


def serve(job: Job) -> Served:
    assert job.ids is not None
    begun = time.monotonic()
    pictures = max(len(prompt.images) for prompt in job.prompts)
    options: dict[str, Any] = {
        "dtype": job.dtype,
        "max_model_len": max(job.lengths) + job.max_new_tokens,
        "max_num_seqs": job.batch,
        "seed": 0,
        "enable_prefix_caching": False,  # a timed round would find the one before it
        **({"limit_mm_per_prompt": {"image": pictures}} if pictures else {}),
    }
    llm = LLM(job.folder, **options | job.options)
    loaded = time.monotonic() - begun
    # each prompt alone, as transformers was asked
    asked = [_asked(prompt, ids) for prompt, ids in zip(job.prompts, job.ids, strict=True)]
    answers = [_answer(llm, one, job.max_new_tokens) for one in asked]
    mean_k = _mean_k() if job.mode == TRAINED else None
    seconds, tokens = _timed(llm, asked, job)
    return Served(
        version=vllm.__version__,
        device=torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        answers=answers,
        tokens=tokens,
        seconds=seconds,
        load_seconds=loaded,
        mean_k=mean_k,
    )


def _asked(prompt: Prompt, ids: tuple[int, ...]) -> dict[str, Any]:
    """The tokens that transformers was given; an image is still one placeholder."""
    asked: dict[str, Any] = {"prompt_token_ids": list(ids)}
    if prompt.images:
        images = [Image.open(path).convert("RGB") for path in prompt.images]
        asked["multi_modal_data"] = {"image": images}
    return asked


def _answer(llm: Any, asked: dict[str, Any], new: int) -> Answer:
    greedy = SamplingParams(temperature=0, max_tokens=new, logprobs=2, ignore_eos=True)
    (done,) = llm.generate([asked], greedy, use_tqdm=False)
    (written,) = done.outputs
    ids = list(written.token_ids)
    others = [_second(ranked, token) for ranked, token in zip(written.logprobs, ids, strict=True)]
    return Answer(
        prompt_ids=list(done.prompt_token_ids),
        ids=ids,
        logprobs=[r[token].logprob for r, token in zip(written.logprobs, ids, strict=True)],
        second_ids=[token for token, _ in others],
        second_logprobs=[logprob for _, logprob in others],
        text=written.text,
    )


def _second(ranked: dict[int, Any], chosen: int) -> tuple[int, float]:
    """The best token that was not taken."""
    rest = {token: found.logprob for token, found in ranked.items() if token != chosen}
    best = max(rest, key=lambda token: rest[token])
    return best, rest[best]


def _mean_k() -> list[float] | None:
    """Of every layer, from what the plugin shows in `/metrics`; None if there is nothing.

    On a GPU the counts are up to a second old.
    """
    found: dict[int, dict[str, float]] = {}
    for family in REGISTRY.collect():
        for sample in family.samples:
            if sample.name in (ROUTED, USED):
                found.setdefault(int(sample.labels["layer"]), {})[sample.name] = sample.value
    return [found[layer][USED] / found[layer][ROUTED] for layer in sorted(found)] or None


def _timed(llm: Any, asked: list[dict[str, Any]], job: Job) -> tuple[list[float], int]:
    """Seconds of every round over all prompts, `max_num_seqs` at a time, and a round's tokens."""
    greedy = SamplingParams(temperature=0, max_tokens=job.max_new_tokens, ignore_eos=True)
    llm.generate(asked[: job.batch], greedy, use_tqdm=False)
    seconds = []
    for _ in range(job.rounds):
        begun = time.monotonic()
        llm.generate(asked, greedy, use_tqdm=False)
        seconds.append(time.monotonic() - begun)
    return seconds, len(asked) * job.max_new_tokens
