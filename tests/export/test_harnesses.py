"""lm-eval's `hf` and lmms-eval's `huggingface` run exported folders and answer as training does."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModel

from gemoe_ds.evaluation.benchmarks.requests import Request
from gemoe_ds.evaluation.benchmarks.text_tokens import TextTokens
from gemoe_ds.evaluation.generate import generate
from gemoe_ds.models.inputs import ModelInputs
from tests.export.families import write_exported
from tests.models.small import noise

PAIRS = [("What is this?", " It is one."), ("See", " two three"), ("", "Well?"), ("a b c", " d")]


def log_likelihood(one, context: str, continuation: str) -> float:
    """By the project's own tokens and model, at its own k."""
    chat = one.model.backbone.chat
    tokens = TextTokens(one.collator.tokenizer, 2048, begins=chat.bos_before_text)
    (pair,) = tokens.pairs(Request("t", 0, 0, "loglikelihood", context, continuation))
    ids = torch.tensor([[*pair.context, *pair.continuation]])
    valid = torch.ones_like(ids, dtype=torch.bool)
    with torch.no_grad():
        hidden_BSD = one.model.hidden(ModelInputs(ids, valid, ~valid))
        behind = hidden_BSD[0, len(pair.context) - 1 : -1]
        log_p = one.model.backbone.head(one.model.hf)(behind).log_softmax(-1)
    return log_p.gather(1, torch.tensor(pair.continuation)[:, None]).sum().item()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["deepseek_vl2", "molmoe"])
def test_lm_eval_scores_as_the_project_does(name, tmp_path):
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    one = write_exported(name, tmp_path)
    options = {"trust_remote_code": True, "dtype": "float32", "batch_size": 2, "device": "cpu"}
    harness = HFLM(pretrained=str(one.folder), **options)
    assert type(harness.model).__name__ == "GemoeForConditionalGeneration"
    asked = [Instance("loglikelihood", {}, pair, 0) for pair in PAIRS]
    found = harness.loglikelihood(asked, disable_tqdm=True)
    for pair, (value, _) in zip(PAIRS, found, strict=True):
        assert value == pytest.approx(log_likelihood(one, *pair), abs=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["deepseek_vl2", "molmoe", "moe_llava_qwen"])
def test_lmms_eval_writes_what_gemoe_generate_writes(name, tmp_path):
    from lmms_eval.api.instance import Instance
    from lmms_eval.models.chat.huggingface import Huggingface

    one = write_exported(name, tmp_path)
    asked = one.conversations()[:2]
    docs = {"test": [(m, [noise(*s) for s in sizes]) for m, sizes in asked]}
    harness = Huggingface(
        pretrained=str(one.folder),
        device="cpu",
        device_map="cpu",
        batch_size=2,
        trust_remote_code=True,
    )
    assert type(harness.model).__name__ == "GemoeForConditionalGeneration"
    # it loads bfloat16; what is compared is float32
    harness._model = AutoModel.from_pretrained(one.folder, trust_remote_code=True).eval()
    harness.task_dict = {"task": docs}
    written = {"max_new_tokens": 5}
    requests = [
        Instance(
            "generate_until",
            ("", messages_of, written, n, "task", "test"),
            n,
            {"task": "task", "doc_id": n, "repeats": 1},
        )
        for n in range(len(asked))
    ]
    # ids as text: most ids of the small tokenizer have none
    harness.processor.batch_decode = lambda rows, **options: [
        " ".join(map(str, row.tolist())) for row in rows
    ]
    answers = [result.text.split() for result in harness.generate_until(requests)]
    batch, end_ids = one.first(2), one.collator.end_ids
    expected = generate(one.model, batch, max_new_tokens=5, end_ids=end_ids).token_ids
    assert [answer[: len(row)] for answer, row in zip(answers, expected, strict=True)] == [
        [*map(str, row)] for row in expected
    ]
    assert answers[0] != answers[1]


def messages_of(doc):
    """In lmms-eval's own protocol."""
    messages, pictures = doc
    ahead = iter(pictures)
    return [
        {
            "role": message["role"],
            "content": [
                {"type": "image", "url": next(ahead)} if part["type"] == "image" else part
                for part in message["content"]
            ],
        }
        for message in messages
    ]
