"""Run exported folders where neither gemoe_ds nor what only training needs can be imported.

python -I alone.py ROOT: for every ROOT/NAME/exported, ROOT/NAME/asked.pt -> ROOT/NAME/answered.pt
"""

import sys
from pathlib import Path

ABSENT = ("gemoe_ds", "deepspeed", "einops", "pyarrow", "datasets", "grain", "accelerate", "tests")


class Without:
    """As if these were not installed."""

    def __init__(self, finder):
        self.finder = finder

    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] not in ABSENT:
            return self.finder.find_spec(name, path, target)

    def __getattr__(self, name):
        return getattr(self.finder, name)


sys.meta_path[:] = map(Without, sys.meta_path)

import torch  # noqa: E402
from transformers import (  # noqa: E402
    AutoConfig,
    AutoModel,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
)

TRUST = {"trust_remote_code": True}
LAST = {"logits_to_keep": 8}  # vocabularies are as large as published


def inputs_of(processor, asked):
    """A batch of conversations, by way of text; and of each alone, by apply_chat_template."""
    texts = [processor.apply_chat_template(messages) for messages, _ in asked]
    batch = processor(text=texts, images=[pictures for _, pictures in asked])
    alone = []
    for messages, pictures in asked:
        ahead = iter(pictures)
        filled = [
            message
            | {
                "content": [
                    part | {"image": next(ahead)} if part["type"] == "image" else part
                    for part in message["content"]
                ]
            }
            if not isinstance(message["content"], str)
            else message
            for message in messages
        ]
        alone.append(processor.apply_chat_template(filled, tokenize=True, return_dict=True))
    return batch, alone


def answers(folder, asked):
    processor = AutoProcessor.from_pretrained(folder, **TRUST)
    batch, alone = inputs_of(processor, asked)
    model = AutoModelForImageTextToText.from_pretrained(folder, **TRUST).eval()
    found = {"batch": dict(batch), "alone": [one["input_ids"] for one in alone]}
    with torch.no_grad():
        found["logits"] = model(**batch, **LAST).logits
        found["k"] = torch.stack(model.k_per_layer)
        found["row"] = model(**alone[0], **LAST).logits
        greedy = {"max_new_tokens": 4, "do_sample": False}
        found["written"] = model.generate(**batch, **greedy)
        found["without cache"] = model.generate(**batch, **greedy, use_cache=False)
        found["static cache"] = model.generate(**batch, **greedy, cache_implementation="static")
        found["beams"] = model.generate(**alone[0], **greedy, num_beams=2, num_return_sequences=2)
        found["names"] = [name for name, _ in model.named_parameters()]
        config = AutoConfig.from_pretrained(folder, **TRUST)
        config.gemoe["enabled"] = False
        static = AutoModelForImageTextToText.from_pretrained(folder, config=config, **TRUST).eval()
        found["static"] = static(**batch, **LAST).logits
        half = AutoModel.from_pretrained(folder, dtype=torch.bfloat16, **TRUST).eval()
        found["half"] = half(**batch, **LAST).logits
        found["dtypes"] = {(str(p.dtype), ".gemoe." in name) for name, p in half.named_parameters()}
    tokenizer = AutoTokenizer.from_pretrained(folder, **TRUST)
    found["tokenizer"] = [tokenizer.padding_side, tokenizer.chat_template]
    return found


for place in sorted(Path(sys.argv[1]).glob("*/asked.pt")):
    asked = torch.load(place, weights_only=False)
    torch.save(answers(place.parent / "exported", asked), place.with_name("answered.pt"))
