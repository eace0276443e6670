"""Answers token by token: their k is that of whole forwards, and their texts make up the answer."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from gemoe_ds.analysis.benchmarks.files import MAX_SHOWN, read_shown
from gemoe_ds.evaluation.benchmarks.requests import Answer
from gemoe_ds.evaluation.benchmarks.shown import MAX_SHOWN_TOKENS, WritingK, shown_tokens
from gemoe_ds.evaluation.generate import generate
from gemoe_ds.evaluation.routing import RoutingCounter
from gemoe_ds.models.inputs import ModelInputs
from tests.evaluation.benchmarks.hand_made import HandMade, answer, write_recipe
from tests.evaluation.test_generate import fake_prompts
from tests.tiny import make_model, write_base
from tests.train.resuming import write_setting


def test_k_is_that_of_the_place_before_in_one_whole_forward(tmp_path: Path) -> None:
    """Prompts of two lengths, padded on the left, and a row of padding; the first ends early."""
    model = make_model(write_base(tmp_path), "gemoe").eval()
    ids_BS = torch.randint(6, 20, (3, 7), generator=torch.Generator().manual_seed(1))
    counter, found = RoutingCounter.of(model), WritingK(3)
    counted = counter.while_writing(model.ctx, torch.zeros(3, 7).bool(), np.arange(3))
    written = generate(
        model,
        fake_prompts(ids_BS, [7, 4, 0]),
        max_new_tokens=[2, 6, 6],
        end_ids=set(),
        count=False,
        after_forward=lambda: found.add(counted(), model.ctx.is_valid_T.numel() // 3),
    )
    assert list(map(len, found.k_B)) == [2, 6, 0] == list(map(len, written.token_ids))
    assert len(set(found.k_B[1])) > 1
    model.ctx.trace = True
    for row, start in ((0, 0), (1, 3)):
        ids = torch.tensor([[*ids_BS[row, start:].tolist(), *written.token_ids[row]]])
        with torch.no_grad():
            model.hidden(
                ModelInputs(ids, torch.ones_like(ids).bool(), torch.zeros_like(ids).bool())
            )
        k_LS = torch.stack([record.k_T for record in model.ctx.layers]).double()
        assert found.k_B[row] == pytest.approx(k_LS.mean(0)[6 - start : -1].tolist(), abs=1e-4)


class Bytes:
    """A tokenizer whose tokens are bytes; 0 is special."""

    def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
        return bytes(i for i in ids if i or not skip_special_tokens).decode(errors="replace")


@pytest.mark.parametrize("text", ["plain", "", "a\u00e9\U0001f600b\n\u2028", "\ufffd", "x" * 500])
def test_pieces_make_up_the_text(text: str) -> None:
    ids = list(text.encode())
    pieces = shown_tokens(Bytes(), ids, [float(i) for i in range(len(ids) + 1)])
    assert len(pieces) == min(len(ids), MAX_SHOWN_TOKENS)
    assert "".join(piece for piece, _ in pieces) == text.rstrip("\ufffd")[:MAX_SHOWN_TOKENS]
    assert [k for _, k in pieces] == list(range(len(pieces)))
    assert shown_tokens(Bytes(), [97, 0, 98], [1, 2, 3]) == [["a", 1], ["", 2], ["b", 3]]


def test_the_first_documents_are_shown_whatever_their_ids(tmp_path: Path) -> None:
    """Of tasks that write, the first answer of each; the file says what answers.jsonl says."""
    recipe = write_recipe(write_setting(tmp_path / "setting"))
    tasks = [HandMade("drawn", MAX_SHOWN + 4), HandMade("letters", 3)]
    answer(recipe, tasks, "--k", "4", "--out", tmp_path / "out")
    folder = tmp_path / "out/k_4/hand_drawn"
    assert not (tmp_path / "out/k_4/hand_letters/shown.jsonl").exists()
    shown = {one.doc_id: one for one in read_shown(folder)}
    first = [tasks[0].requests_of(doc)[0] for doc in range(MAX_SHOWN)]
    assert {doc: one.question for doc, one in shown.items()} == {r.doc_id: r.context for r in first}
    lines = (folder / "answers.jsonl").read_text().splitlines()
    answers = {one.key: one for one in map(Answer.from_json, lines)}
    assert sum("tokens" in json.loads(line) for line in lines) == MAX_SHOWN
    for request in first:
        one, tokens = answers[request.key], shown[request.doc_id].tokens
        assert "".join(text for text, _ in tokens).startswith(one.text or "")
        assert {k for _, k in tokens} <= {4.0} and len(tokens) <= one.written_tokens
