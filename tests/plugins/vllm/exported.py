"""Exported folders for a server to serve, and what their own code answers."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import pad
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from gemoe_ds.cli import export as export_command
from gemoe_ds.config.load import config_from_dict
from gemoe_ds.data.sample import Sample, Turn, of_turns, write_samples
from gemoe_ds.export.folder import export
from gemoe_ds.models.deepseek_vl2.backbone import DeepseekVl2Backbone
from gemoe_ds.models.deepseek_vl2.images import DeepseekVl2Images
from gemoe_ds.models.deepseek_vl2.model import DeepseekVl2Config
from gemoe_ds.moe.router import Router
from tests.helpers import repository, run_ranks
from tests.models.deepseek_vl2.small import write_described
from tests.models.olmoe.small import write_olmoe
from tests.models.qwen3_vl.small import write_qwen3_vl
from tests.models.small import make_model
from tests.tiny import WORDS, write_tokenizer
from tests.train.resuming import train_all

VOCABULARY = 300
NEW = 32  # tokens of an answer
PLAIN = tuple(f"w{i}" for i in range(VOCABULARY - len(WORDS)))


@dataclass(frozen=True)
class Answer:
    """Of one prompt: tokens, their log-probabilities, and how many experts all of it used."""

    prompt: list[int]
    tokens: list[int]
    log_p: list[float]
    used: int = 0  # over all layers; the last token is not routed


def routed(answers: list[Answer]) -> tuple[int, int]:
    """Tokens that were routed, and the experts that they used in all layers."""
    tokens = sum(len(one.prompt) + len(one.tokens) - 1 for one in answers)
    return tokens, sum(one.used for one in answers)


def prompts(number: int = 20) -> list[list[int]]:
    g = torch.Generator().manual_seed(7)
    return [torch.randint(6, VOCABULARY, (5 + n,), generator=g).tolist() for n in range(number)]


def train_olmoe(root: Path, router: dict, steps: int = 30) -> Path:
    """OLMoE in its public layout, trained for some steps and exported by the project's commands."""
    tokenizer = write_tokenizer(root / "tokenizer", PLAIN)
    words = {f"{i}": i for i in range(VOCABULARY)}
    sizes = {"hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 2}
    base = write_olmoe(root / "base", words, 0.15, num_experts=16, num_experts_per_tok=8, **sizes)
    for path in tokenizer.iterdir():
        shutil.copyfile(path, base / path.name)
    rng = np.random.default_rng(0)

    def sample(index: int) -> Sample:
        said = [" ".join(rng.choice(list("abcdefgh"), rng.integers(2, 9))) for _ in range(2)]
        return of_turns(f"s{index}", None, (Turn(*said, "x"),))

    write_samples(map(sample, range(40)), root / "data", source="test")
    tree = {
        "output_dir": str(root / "run"),
        "model": {
            "backbone": {"name": "olmoe"},
            "checkpoint": str(base),
            "router": router,
            "dtype": "float32",
        },
        "data": {"train_path": str(root / "data"), "tokenizer": str(tokenizer)},
        "optim": {"lr": 1e-2, "warmup_steps": 2, "predictor_lr": 0.1},
        "parallel": {"ep_size": 1},
        "train": {"steps": steps, "micro_batch_size": 2},
        "checkpoint": {"every": steps, "keep": 1},
        "monitor": {"every": 10, "tensorboard": False},
        "deepspeed": str(repository() / "ds_configs/zero2.json"),
    }
    assert run_ranks(train_all, 1, [config_from_dict(tree)], timeout=500) == [None]
    run = str(root / "run")
    export_command.main([f"{run}/config.yaml", "--trained", run, "--out", str(root / "exported")])
    return root / "exported"


def export_qwen3_vl(root: Path) -> Path:
    """Qwen3-VL-MoE with a router as it is before training, and a processor for images."""
    names = ("im_start", "im_end", "image_pad", "vision_start", "vision_end", "video_pad")
    specials = {f"<|{name}|>": VOCABULARY + place for place, name in enumerate(names)}
    tokenizer = write_tokenizer(root / "tokenizer", PLAIN, specials)
    vocabulary = {f"{i}": i for i in range(VOCABULARY)} | specials
    rope = {"mrope_interleaved": True, "mrope_section": [8, 4, 4], "rope_type": "default"}
    sizes = {"head_dim": 32, "moe_intermediate_size": 64, "rope_scaling": rope}
    base = write_qwen3_vl(root / "base", vocabulary, **sizes)
    config = json.loads((base / "config.json").read_text())
    config |= {"architectures": ["Qwen3VLMoeForConditionalGeneration"]}
    config["video_token_id"] = specials["<|video_pad|>"]
    (base / "config.json").write_text(json.dumps(config))
    processor = json.loads((base / "preprocessor_config.json").read_text())
    processor |= {"processor_class": "Qwen3VLProcessor"}
    (base / "preprocessor_config.json").write_text(json.dumps(processor))
    video = processor | {"video_processor_type": "Qwen3VLVideoProcessor"}
    (base / "video_preprocessor_config.json").write_text(json.dumps(video))
    return export_untrained("qwen3_vl_moe", base, tokenizer, root / "exported", {"name": "gemoe"})


def export_deepseek_vl2(root: Path) -> Path:
    """DeepSeek-VL2 with a small language model under a tower of the published size: vLLM builds no
    other. The router is as before training."""
    base, tokenizer = root / "base", root / "tokenizer"
    chat = DeepseekVl2Backbone.chat
    write_tokenizer(tokenizer, PLAIN, dict(chat.added) | {chat.pad: VOCABULARY})
    sizes = DeepseekVl2Config(
        d_model=64,
        num_layers=3,
        num_heads=2,
        dense_width=64,
        num_experts=8,
        top_k=3,
        expert_width=32,
    )
    write_described(sizes.to_json(), base, DeepseekVl2Backbone.published_unused, std=0.1)
    processor = DeepseekVl2Images().settings | {
        "processor_class": "DeepseekVLV2Processor",
        "pad_token": chat.pad,
    }
    (base / "processor_config.json").write_text(json.dumps(processor))
    return export_untrained("deepseek_vl2", base, tokenizer, root / "exported", {"name": "gemoe"})


def export_untrained(name: str, base: Path, tokenizer: Path, out: Path, router: dict) -> Path:
    model = make_model(name, base, router["name"])
    options = {"base": base, "tokenizer": tokenizer, "provenance": {"base": str(base)}}
    chosen = Router.named(router["name"])
    for layer in model.moe_layers:
        assert isinstance(layer.router, chosen)
    export(model, {}, router=router, out=out, **options)
    return out


@torch.no_grad()
def own_answers(folder: Path, asked: list[list[int]], *, own_code: bool = True) -> list[Answer]:
    """Greedy answers by the folder's own code, or by stock transformers."""
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=own_code).eval()
    answers = []
    for prompt in asked:
        ids = torch.tensor([prompt])
        options = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None}
        done = model.generate(ids, attention_mask=ids > -1, pad_token_id=0, **options)
        log_p = model(done).logits.float().log_softmax(-1)[0, len(prompt) - 1 : -1]
        tokens = done[0, len(prompt) :]
        used = sum(int(k_BS[0, :-1].sum()) for k_BS in model.k_per_layer) if own_code else 0
        found = log_p.gather(1, tokens[:, None])[:, 0]
        answers.append(Answer(prompt, tokens.tolist(), found.tolist(), used))
    return answers


@torch.no_grad()
def own_log_p_of_processor(
    folder: Path, picture: Image.Image, text: str, answer: Answer
) -> tuple[list[float], list[int]]:
    """As `own_log_p`, by the folder's own processor. AssertionError if it makes another prompt."""
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    content = [{"type": "image"}, {"type": "text", "text": text}]
    prompt = processor.apply_chat_template([{"role": "user", "content": content}])
    inputs = processor(text=prompt, images=[picture])
    assert inputs["input_ids"].tolist() == [answer.prompt]
    more, number = torch.tensor([answer.tokens]), len(answer.tokens)
    inputs["input_ids"] = torch.cat([inputs["input_ids"], more], 1)
    inputs["attention_mask"] = pad(inputs["attention_mask"], (0, number), value=1)
    inputs["image_rows"] = pad(inputs["image_rows"], (0, number), value=-1)
    model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True).eval()
    return of_answer(model(**inputs).logits, answer)


def of_answer(logits_BSV: Tensor, answer: Answer) -> tuple[list[float], list[int]]:
    """Log-probabilities of the answer's tokens, and the best one in each place."""
    log_p = logits_BSV.float().log_softmax(-1)[0, len(answer.prompt) - 1 : -1]
    tokens = torch.tensor(answer.tokens)
    return log_p.gather(1, tokens[:, None])[:, 0].tolist(), log_p.argmax(-1).tolist()


@torch.no_grad()
def own_log_p(folder: Path, picture: Image.Image, answer: Answer) -> tuple[list[float], list[int]]:
    """Of a served answer about a picture: what the folder's own code says of its tokens, and the
    tokens that it would have chosen after the same ones."""
    model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True).eval()
    prepare = Qwen2VLImageProcessorPil.from_pretrained(folder)
    seen = prepare(images=[picture], return_tensors="pt")
    ids = torch.tensor([answer.prompt + answer.tokens])
    kinds = (ids == model.config.image_token_id).long()
    logits = model(ids, mm_token_type_ids=kinds, attention_mask=ids > -1, **seen).logits
    return of_answer(logits, answer)
