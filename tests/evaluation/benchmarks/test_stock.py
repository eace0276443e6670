"""What is answered is what lm-eval's own `hf` answers on the exported folder, at variable k."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from transformers import LlavaForConditionalGeneration, OlmoeForCausalLM

from gemoe_ds.analysis.routing_sums import RoutingSums
from gemoe_ds.cli import export
from gemoe_ds.data.sample import Turn, of_turns, write_samples
from gemoe_ds.evaluation.benchmarks.load_tasks import load_tasks
from gemoe_ds.evaluation.benchmarks.local_data import DataPlaces
from gemoe_ds.evaluation.benchmarks.requests import Answer
from gemoe_ds.evaluation.benchmarks.task_options import TaskOptions
from tests.evaluation.benchmarks.hand_made import answer
from tests.helpers import repository, run_ranks
from tests.train.resuming import make_config, train_all

TASKS = ["mmlu_anatomy", "gsm8k", "hellaswag"]


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """The language model of the demo's backbone, whose predictors have trained for some steps."""
    root, backbones = tmp_path_factory.mktemp("stock"), repository() / "experiments/backbones"
    whole = LlavaForConditionalGeneration.from_pretrained(backbones / "annealed")
    text = OlmoeForCausalLM(whole.config.text_config)
    text.model.load_state_dict(whole.model.language_model.state_dict())
    text.lm_head.load_state_dict(whole.lm_head.state_dict())
    text.save_pretrained(root / "hf")
    samples = (of_turns(f"s{n}", None, (Turn(f"How many {n}", f"{n} of them"),)) for n in range(20))
    write_samples(samples, root / "data", source="test")
    setting = {"hf": root / "hf", "tokenizer": backbones / "tokenizer", "data": root / "data"}
    config = make_config(
        setting,
        root / "run",
        model__backbone={"name": "olmoe"},
        parallel__ep_size=1,
        optim__predictor_lr=0.2,
    )
    assert run_ranks(train_all, 1, [config]) == [None]
    words = [str(root / "run/config.yaml"), "--trained", str(root / "run")]
    export.main([*words, "--out", str(root / "exported")])
    return root


@pytest.mark.slow
def test_answers_are_those_of_lm_eval(run, miniature, tmp_path):
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    tasks = load_tasks(TASKS, TaskOptions(data=DataPlaces(miniature)))
    answer(run / "run", tasks, "data.max_length=2048", "--out", tmp_path, "--batch", "3000")
    stock = HFLM(
        pretrained=str(run / "exported"),
        trust_remote_code=True,
        dtype="float32",
        batch_size=4,
        device="cpu",
    )
    assert type(stock.model).__name__.startswith("Gemoe")
    for task in tasks:
        folder = tmp_path / "trained" / task.name
        lines = (folder / "answers.jsonl").read_text("utf-8").splitlines()
        ours = {one.key: one for one in map(Answer.from_json, lines)}
        requests = [r for doc in range(task.num_documents) for r in task.requests_of(doc)]
        assert len(requests) == len(ours)
        if task.name == "gsm8k":
            asked = [
                Instance(
                    "generate_until",
                    {},
                    (
                        r.context,
                        {"until": [*r.writing.until], "max_gen_toks": r.writing.max_new_tokens},
                    ),
                    0,
                )
                for r in requests
            ]
            texts = stock.generate_until(asked, disable_tqdm=True)
            assert [ours[r.key].text for r in requests] == texts
            assert max(map(len, texts)) > 3
            continue
        pairs = [Instance("loglikelihood", {}, (r.context, r.continuation), 0) for r in requests]
        found = stock.loglikelihood(pairs, disable_tqdm=True)
        for request, (value, is_greedy) in zip(requests, found, strict=True):
            one = ours[request.key]
            assert one.log_likelihood == pytest.approx(value, abs=1e-4)
            assert one.is_greedy == is_greedy
        k_LN = RoutingSums.load(folder / "routing.npz").k_LN
        assert len(np.unique(k_LN)) > 2, "k does not vary"
