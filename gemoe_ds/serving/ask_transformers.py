"""A folder under transformers.

With its own k the folder's code runs; its checksums have been looked at before
(gemoe_ds.export.code_record).
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from PIL import Image
from torch import Tensor
from transformers import AutoProcessor, AutoTokenizer, GenerationConfig

from gemoe_ds.serving.exchange import TRAINED, Answer, Job, Prompt, Served


def serve(job: Job) -> Served:
    begun = time.monotonic()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = load_model(job).to(device).eval()
    asked = Asked(Path(job.folder), any(prompt.images for prompt in job.prompts))
    loaded = time.monotonic() - begun
    # What the folder says of sampling is no part of the comparison; nor is an end token.
    model.generation_config = GenerationConfig(
        do_sample=False, max_new_tokens=job.max_new_tokens, pad_token_id=asked.pad
    )
    k = MeanK(model) if job.mode == TRAINED else None
    answers = [answer(model, asked, prompt) for prompt in job.prompts]
    mean_k = k.end() if k else None
    seconds, tokens = timed(model, asked, job)
    return Served(
        version=transformers.__version__,
        device=torch.cuda.get_device_name() if device == "cuda" else "cpu",
        answers=answers,
        tokens=tokens,
        seconds=seconds,
        load_seconds=loaded,
        mean_k=mean_k,
        ids=[asked.ids(prompt) for prompt in job.prompts],
    )


def load_model(job: Job) -> Any:
    """Trained k: the folder's own code. Static k: what transformers has for its model type."""
    config = json.loads((Path(job.folder) / "config.json").read_text(encoding="utf-8"))
    name = next(key for key in config["auto_map"] if key.startswith("AutoModelFor"))
    options: dict[str, Any] = {"trust_remote_code": job.mode == TRAINED}
    if "AutoConfig" in config["auto_map"]:  # transformers has no class: the folder's, both times
        options = {"trust_remote_code": True}
        found = transformers.AutoConfig.from_pretrained(job.folder, **options)
        found.gemoe["enabled"] = job.mode == TRAINED
        options["config"] = found
    return getattr(transformers, name).from_pretrained(
        job.folder, dtype=getattr(torch, job.dtype), use_safetensors=True, **options
    )


class MeanK:
    """The mean of `k_per_layer` over the tokens of all forwards until `end`."""

    def __init__(self, model: Any) -> None:
        self.sum_L: Tensor | float = 0.0
        self.tokens = 0
        self._hook = model.register_forward_hook(self._add)

    def _add(self, model: Any, args: Any, output: Any) -> None:
        k_LBS = torch.stack(list(model.k_per_layer)).double()
        self.sum_L = self.sum_L + k_LBS.flatten(1).sum(1)
        self.tokens += k_LBS[0].numel()

    def end(self) -> list[float]:
        self._hook.remove()
        mean: list[float] = (torch.as_tensor(self.sum_L) / self.tokens).tolist()
        return mean


class Asked:
    """Prompts as the folder's own tokenizer, processor and chat template write them."""

    def __init__(self, folder: Path, sees: bool) -> None:
        trust = {"trust_remote_code": True}  # its checksums are those of the export
        self.processor: Any = AutoProcessor.from_pretrained(folder, **trust) if sees else None
        self.tokenizer: Any = (
            AutoTokenizer.from_pretrained(folder, **trust)
            if self.processor is None
            else self.processor.tokenizer
        )
        self.template = getattr(self.processor or self.tokenizer, "chat_template", None)
        if sees and not self.template:
            raise ValueError(f"{folder} has no chat template, so pictures have no place in a text")
        self.pad = self.tokenizer.pad_token_id
        if self.pad is None:
            self.pad = self.tokenizer.eos_token_id

    def text(self, prompt: Prompt) -> str:
        """The prompt as a chat of one question, where the folder has a template."""
        if not self.template:
            return prompt.text
        content: Any = prompt.text
        if self.processor is not None:
            images = [{"type": "image"} for _ in prompt.images]
            content = [*images, {"type": "text", "text": prompt.text}]
        chat = [{"role": "user", "content": content}]
        written: str = (self.processor or self.tokenizer).apply_chat_template(
            chat, tokenize=False, add_generation_prompt=True
        )
        return written

    def ids(self, prompt: Prompt) -> list[int]:
        """Of the text; of an image no more than the template writes for it."""
        ids: list[int] = self.tokenizer(
            self.text(prompt), add_special_tokens=not self.template
        ).input_ids
        if not ids:
            raise ValueError(f"the tokenizer finds no token in the prompt {prompt.text!r}")
        return ids

    def inputs(self, prompts: Sequence[Prompt], model: Any) -> dict[str, Any]:
        """Of a batch, padded on the left."""
        texts = [self.text(prompt) for prompt in prompts]
        options: dict[str, Any] = {
            "return_tensors": "pt",
            "padding": True,
            "padding_side": "left",
            "add_special_tokens": not self.template,
        }
        if self.tokenizer.pad_token_id is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        if self.processor is None:
            both = self.tokenizer(texts, **options)
            made = {name: both[name] for name in ("input_ids", "attention_mask")}
        else:
            paths = [path for prompt in prompts for path in prompt.images]
            if paths:  # one list: the marks in the texts say whose they are
                options["images"] = [Image.open(path).convert("RGB") for path in paths]
            made = self.processor(text=texts, **options)
        return {
            name: value.to(model.device, model.dtype if value.is_floating_point() else None)
            for name, value in made.items()
            if isinstance(value, Tensor)
        }


@torch.no_grad()
def answer(model: Any, asked: Asked, prompt: Prompt) -> Answer:
    asked.ids(prompt)
    inputs = asked.inputs([prompt], model)
    done = model.generate(**inputs, return_dict_in_generate=True, output_logits=True)
    logprobs_NV = torch.cat(done.logits).float().log_softmax(-1)
    prompt_ids = inputs["input_ids"][0]
    ids = done.sequences[0, len(prompt_ids) :]
    best_N2 = logprobs_NV.topk(2)
    chosen_N = logprobs_NV.gather(1, ids[:, None])[:, 0]
    return Answer(
        prompt_ids=prompt_ids.tolist(),
        ids=ids.tolist(),
        logprobs=chosen_N.tolist(),
        second_ids=best_N2.indices[:, 1].tolist(),
        second_logprobs=best_N2.values[:, 1].tolist(),
        text=asked.tokenizer.decode(ids, skip_special_tokens=True),
    )


@torch.no_grad()
def timed(model: Any, asked: Asked, job: Job) -> tuple[list[float], int]:
    """Seconds of every round over all prompts in batches, and the tokens that a round writes."""
    batches = [
        asked.inputs(job.prompts[start : start + job.batch], model)
        for start in range(0, len(job.prompts), job.batch)
    ]
    model.generate(**batches[0])
    seconds = []
    for _ in range(job.rounds):
        begun = time.monotonic()
        for inputs in batches:
            model.generate(**inputs)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds.append(time.monotonic() - begun)
    return seconds, len(job.prompts) * job.max_new_tokens
