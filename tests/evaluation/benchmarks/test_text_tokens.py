"""The rule of lm-eval, word by word, against its own sentences in the obvious form."""

from __future__ import annotations

import random

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from gemoe_ds.errors import DataError
from gemoe_ds.evaluation.benchmarks.requests import Request
from gemoe_ds.evaluation.benchmarks.text_tokens import Pair, TextTokens
from gemoe_ds.models.backbone import Backbone


def make_tokenizer(begins: bool) -> PreTrainedTokenizerFast:
    """Letters, some pairs of them, and spaces; `begins`: puts a BOS before every text."""
    letters = ["<s>", "</s>", "<unk>", *"abcdef ", "ab", " a", "  ", "f ", "ba", " ab"]
    merges = [("a", "b"), (" ", "a"), (" ", " "), ("f", " "), ("b", "a"), (" ", "ab")]
    backend = Tokenizer(
        models.BPE({w: i for i, w in enumerate(letters)}, merges, unk_token="<unk>")
    )
    backend.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_next")
    if begins:
        backend.post_processor = processors.TemplateProcessing(
            "<s> $A", special_tokens=[("<s>", 0)]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>" if begins else None, eos_token="</s>"
    )


def ask(context, continuation="", kind="loglikelihood"):
    return Request("task", 0, 0, kind, context, continuation)


def as_lm_eval(tokenizer, context, continuation, max_length):
    """TemplateLM.loglikelihood, _encode_pair, tok_encode and the cut of _loglikelihood_tokens."""
    first = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id

    def encode(text):
        options = {}
        if text.startswith(tokenizer.decode(first)):
            options = {"add_special_tokens": False}
        return tokenizer.encode(text, **options)

    if context == "":
        ids = tokenizer.encode(continuation, add_special_tokens=False)
        before, after = ([first], ids) if first != ids[0] else (ids[:1], ids[1:])
    else:
        spaces = len(context) - len(context.rstrip())
        if spaces > 0:
            continuation = context[-spaces:] + continuation
            context = context[:-spaces]
        whole, before = encode(context + continuation), encode(context)
        after = whole[len(before) :]
    inputs = (before + after)[-(max_length + 1) :][:-1]
    return inputs, after


@pytest.mark.parametrize("begins", [True, False])
def test_pairs_are_those_of_lm_eval(begins):
    tokenizer, rng = make_tokenizer(begins), random.Random(0)
    tokens = TextTokens(tokenizer, 9)
    num_cut = 0
    for _ in range(500):
        context = "".join(rng.choices("abcdef  ", k=rng.randint(0, 12))).lstrip()
        context = rng.choice(["", "", "<s>", "</s>"]) + context if rng.random() < 0.2 else context
        continuation = "".join(rng.choices("abcdef  ", k=rng.randint(0, 6))) + "c"
        inputs, after = as_lm_eval(tokenizer, context, continuation, 9)
        if len(after) > 9:  # which lm-eval asserts not to happen
            continue
        (pair,) = tokens.pairs(ask(context, continuation))
        assert list(pair.context + pair.continuation[:-1]) == inputs
        assert list(pair.continuation) == after
        num_cut += pair.cut > 0
    assert num_cut > 30


def test_texts_of_a_model_whose_tokenizer_class_began_them():
    """As if the tokenizer itself put the first token before a text, once."""
    beginning, plain = TextTokens(make_tokenizer(True), 9), make_tokenizer(True)
    plain.backend_tokenizer.post_processor = processors.TemplateProcessing("$A")
    begun = TextTokens(plain, 9, begins=True)
    for text in ("", "ab", "<s>ab", " <s>", "</s>"):
        assert begun.encode(text) == beginning.encode(text)
        assert begun.pairs(ask(text, "cd")) == beginning.pairs(ask(text, "cd"))
    for name in Backbone.names():
        assert Backbone.named(name).chat.bos_before_text == (name == "deepseek_vl2")


def test_a_continuation_that_no_forward_holds_is_refused():
    tokens = TextTokens(make_tokenizer(True), 5)
    assert tokens.pairs(ask("c", "ccccc"))[0] == Pair((3 + 2,), (5,) * 5, cut=1)
    for wrong in ("cccccc", ""):
        with pytest.raises(DataError, match="document 0: its continuation has"):
            tokens.pairs(ask("c", wrong))


def test_stretches_of_a_long_text():
    tokens = TextTokens(make_tokenizer(True), 4)
    ids = list(range(3, 13))

    def windows(number):
        return [(p.context, p.continuation) for p in tokens._windows(ids[:number])]

    assert windows(0) == []
    assert windows(3) == [((0,), (3, 4, 5))]
    assert windows(4) == [((0,), (3, 4, 5, 6))]
    # 4 inputs at most: the last stretch has what there is room for before it
    assert windows(10) == [((0,), (3, 4, 5, 6)), ((6,), (7, 8, 9, 10)), ((8, 9, 10), (11, 12))]
    assert sum(len(p.continuation) for p in tokens.pairs(ask("c d e f ab", kind="rolling"))) > 8


def test_a_prompt_is_cut_on_the_left():
    tokens = TextTokens(make_tokenizer(True), 6)
    assert tokens.prompt("cdef", room=1) == ([0, 5, 6, 7, 8], 0)
    assert tokens.prompt("cdef", room=3) == ([6, 7, 8], 2)
    assert tokens.prompt("<s>c", room=1) == ([0, 5], 0)
    assert TextTokens(make_tokenizer(False), 6).prompt("", room=1) == ([1], 0)
