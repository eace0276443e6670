"""Which token is next, and where a text ends, against the slow and obvious versions."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from gemoe_ds.evaluation.benchmarks.requests import Writing
from gemoe_ds.evaluation.decoding import Sampler, StopStrings, likely
from gemoe_ds.evaluation.generate import generate
from tests.evaluation.test_generate import fake_prompts
from tests.tiny import make_model, write_base

PIECES = [
    "<pad>",
    "</s>",
    "Q",
    ":",
    "\n",
    "\n\n",
    "Question",
    ":\n",
    "a Q",
    "ab",
    " ",
    "ö",
    "\u00c3",
]


@pytest.fixture(scope="module")
def tokenizer():
    """Byte-level: `ö` is two bytes, of which one alone is a token too."""
    from tokenizers.pre_tokenizers import ByteLevel

    letters = sorted(ByteLevel.alphabet())
    encode = ByteLevel(add_prefix_space=False, use_regex=False)
    words = ["".join(w for w, _ in encode.pre_tokenize_str(piece)) for piece in PIECES]
    vocabulary = {w: i for i, w in enumerate(dict.fromkeys(["<pad>", "</s>", *words, *letters]))}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="</s>")


def test_a_text_ends_at_the_token_that_completes_a_stop_string(tokenizer):
    rng = np.random.default_rng(0)
    stops = [["Q:"], ["\n\n", "ö"], ["b\n", ""], [":\nQuestion:", "zzz"], []]
    texts = StopStrings(tokenizer, stops)
    ended = 0
    for trial in range(200):
        row = trial % len(stops)
        ids: list[int] = []
        for token in rng.integers(0, 14 if trial % 2 else len(tokenizer), 60).tolist():
            ids.append(token)
            whole = tokenizer.decode(ids, skip_special_tokens=True)
            expected = any(stop in whole for stop in stops[row] if stop)
            assert texts(row, ids) == expected
            if expected:
                ended += 1
                break
        first = min((whole.find(stop) for stop in stops[row] if stop and stop in whole), default=-1)
        assert texts.text(row, ids) == (whole if first < 0 else whole[:first])
    assert 50 < ended < 160


def test_what_may_be_drawn():
    logits_V = torch.tensor([0.5, 0.2, 0.2, 0.1]).log()
    drawn = Writing(temperature=1.0)
    ids_V, p_V = likely(logits_V, drawn)
    assert ids_V.tolist() == [0, 1, 2, 3]
    torch.testing.assert_close(p_V, torch.tensor([0.5, 0.2, 0.2, 0.1]).double())
    for how, number in (({"top_k": 2}, 2), ({"top_p": 0.69}, 2), ({"top_p": 0.0}, 1), ({}, 4)):
        ids_V, p_V = likely(logits_V, Writing(temperature=1.0, **how))
        assert len(ids_V) == number and p_V.sum().item() == pytest.approx(1)
    half = likely(logits_V, Writing(temperature=0.5))[1]
    torch.testing.assert_close(half, torch.tensor([25.0, 4, 4, 1]).double() / 34)


def test_draws_are_those_of_the_distribution_and_of_the_seed_alone():
    logits_V = torch.tensor([0.5, 0.2, 0.2, 0.1]).log()
    how = Writing(temperature=1.0, top_k=3)
    number = 3000
    found = Sampler([how] * number, range(number))(logits_V.expand(number, 4))
    shares = torch.bincount(found, minlength=4) / number
    expected = torch.tensor([5 / 9, 2 / 9, 2 / 9, 0])
    assert (shares - expected).abs().max() < 5 * 0.5 / number**0.5
    mixed = [Writing(), how, Writing(), how]
    sampler = Sampler(mixed, [0, 7, 0, 9])
    together = [sampler(logits_V.expand(4, 4)).tolist() for _ in range(20)]
    assert [row[0] for row in together] == [row[2] for row in together] == [0] * 20
    alone = Sampler([how], [9])
    assert [row[3] for row in together] == [alone(logits_V[None]).item() for _ in range(20)]


def test_each_sequence_has_limits_and_an_end_of_its_own(tmp_path):
    model = make_model(write_base(tmp_path), "top_k", {"k": 2})
    ids = torch.randint(6, 20, (3, 5), generator=torch.Generator().manual_seed(0))
    batch = fake_prompts(ids, [5, 3, 4])
    free = generate(model, batch, max_new_tokens=6, end_ids=set()).token_ids
    seen = []
    written = generate(
        model,
        batch,
        max_new_tokens=[2, 6, 4],
        end_ids=set(),
        has_ended=lambda row, token_ids: row == 1 and len(token_ids) == 3,
        after_forward=lambda: seen.append(int(model.ctx.is_valid_T.sum())),
    )
    assert written.token_ids == [free[0][:2], free[1][:3], free[2][:4]]
    assert seen == [12, 3, 2, 1]
    chosen = generate(
        model, batch, max_new_tokens=2, end_ids=set(), choose=lambda logits_BV: logits_BV.argmin(-1)
    )
    assert chosen.token_ids[0] != free[0][:2]
