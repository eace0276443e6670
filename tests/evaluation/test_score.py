"""Scores by kind, independent of batch size and of the split over ranks."""

from __future__ import annotations

from collections import Counter
from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from gemoe_ds.analysis.record import spearman
from gemoe_ds.analysis.routing_sums import IMAGE
from gemoe_ds.data.collate import Collator
from gemoe_ds.data.sample import Message, Sample, Turn, of_turns, open_samples, write_samples
from gemoe_ds.data.stream import EvalStream
from gemoe_ds.engine.world import ALONE
from gemoe_ds.errors import ConfigError, DataError
from gemoe_ds.evaluation.score import Scores, evaluate
from gemoe_ds.evaluation.session import EvalSession
from gemoe_ds.models.inputs import ModelInputs
from gemoe_ds.models.tokenizer import load_tokenizer
from tests.data.turns import cut_image, turns_of, with_turns
from tests.tiny import WORDS, make_model, write_base
from tests.train.resuming import write_data


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    root = tmp_path_factory.mktemp("evaluation")
    base = write_base(root)
    model = make_model(base, "gemoe")
    collator = Collator(
        load_tokenizer(base[1]),
        model.image_layout,
        model.backbone.chat,
        max_length=64,
    )
    return model, open_samples(write_data(root / "data", 11)), collator


def scored(setting, batch, world=1):
    model, samples, collator = setting
    parts = [
        evaluate(
            model,
            samples,
            EvalStream(samples, collator, batch=batch, rank=rank, world=world),
            torch.device("cpu"),
            ALONE,
        )
        for rank in range(world)
    ]
    return Scores.merged(parts)


def asked_of(scores: Scores) -> list[tuple[int, int, str, bool]]:
    found = scores.questions
    kinds = found.kinds_C[found.kind_Q].tolist()
    columns = (found.row_Q.tolist(), found.turn_Q.tolist(), kinds, found.right_Q.tolist())
    return list(zip(*columns, strict=True))


@pytest.mark.parametrize("batch, world", [(1, 1), (4, 1), (11, 1), (4, 2), (5, 3)])
def test_batching_and_ranks_change_no_score(setting, batch, world):
    reference, other = scored(setting, 2), scored(setting, batch, world)
    assert other.right == reference.right and other.asked == reference.asked
    for a, b in zip(
        vars(other.questions).values(), vars(reference.questions).values(), strict=True
    ):
        assert a.dtype == b.dtype and np.array_equal(a, b)
    for name in ("kind_k_LC", "kind_tokens_C", "answer_k_LP", "answer_tokens_P"):
        assert np.array_equal(getattr(other, name), getattr(reference, name)), name
    other.routing.check()
    for name, array in vars(reference.routing).items():
        if name != "joint_LBK":  # an entropy at the edge of a bin is in either, by rounding
            assert np.allclose(getattr(other.routing, name), array, rtol=1e-5, atol=1e-5), name
    for name, array in vars(reference.by_sample).items():
        assert np.allclose(getattr(other.by_sample, name), array, rtol=1e-4), name
    assert other.by_sample.row_D.tolist() == list(range(11))
    samples = other.samples
    samples.check()
    assert np.allclose(samples.entropy_S, reference.samples.entropy_S, rtol=1e-4)
    assert other.loss == pytest.approx(reference.loss, rel=1e-5)
    assert other.by_sample.ce_D.sum() == pytest.approx(other.ce_sum, rel=1e-9)
    assert other.by_sample.targets_D.sum() == other.num_targets
    assert other.mean_k == pytest.approx(reference.routing.k_LN.mean(), rel=1e-9)


def test_a_model_that_trains_is_left_as_it_was(setting):
    """Its modes, flags, weights and buffers, and the random numbers that follow."""
    model, *_ = setting
    model.train().hf.lm_head.eval()
    model.ctx.collect = True
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    random = torch.get_rng_state()

    def draws(*_) -> None:
        torch.rand(3)

    hook = model.hf.lm_head.register_forward_hook(draws)
    try:
        scored(setting, 4)
        assert torch.equal(torch.get_rng_state(), random)
        assert all(torch.equal(tensor, state[n]) for n, tensor in model.state_dict().items())
        assert [n for n, m in model.named_modules() if not m.training] == ["hf.lm_head"]
        assert model.ctx.collect and not model.ctx.trace
    finally:
        hook.remove()
        model.eval().ctx.collect = False


def test_right_answers_equal_greedy_generation(setting, tmp_path):
    """What greedy decoding writes, token by token, is right; with its last token changed it is
    not, and what follows is asked after the text that the data has."""
    model, samples, collator = setting
    head = model.backbone.head(model.hf)
    letters = biased(head.weight, torch.arange(len(head.weight)).ge(6) * 1e4 - 1e4)
    with having(model, letters):
        written = [by_greed(model, collator, samples[row], spoil=row % 2) for row in range(6)]
        own = open_samples(write_samples_to(tmp_path / "own", written))
        scores = scored((model, own, collator), 4)
    assert scores.asked == {"x": 6, "y": 6}
    assert scores.right == {"x": 3, "y": 6}


def by_greed(model, collator, sample: Sample, spoil: int) -> Sample:
    """Two words of the model's as the answer of each turn; the first answer's last is changed."""
    turns = turns_of(sample)
    for index, turn in enumerate(turns):
        words: list[str] = []
        for _ in range(2):
            turns[index] = turn._replace(gpt=" ".join([*words, "a"]))
            encoded = collator.encode(0, with_turns(sample, *turns))
            place = encoded.turn.index(index) + len(words)
            images = collator.batch([encoded]).images
            words.append(WORDS[_next_token(model, encoded.input_ids[:place], images)])
        if spoil and index == 0:
            words[-1] = "a" if words[-1] != "a" else "b"
        turns[index] = turn._replace(gpt=" ".join(words))
    return with_turns(sample, *turns)


def biased(weight_VD: torch.Tensor, bias_V: torch.Tensor) -> nn.Linear:
    head = nn.Linear(weight_VD.shape[1], weight_VD.shape[0])
    head.weight.data, head.bias.data = weight_VD.data, bias_V.float()
    return head


@contextmanager
def having(model, head: nn.Linear):
    before, model.hf.lm_head = model.hf.lm_head, head
    try:
        yield
    finally:
        model.hf.lm_head = before


def write_samples_to(folder, samples):
    write_samples(iter(samples), folder, source="test")
    return folder


def test_an_answer_is_right_if_all_its_tokens_are(setting, tmp_path):
    """By hand, of a model that writes nothing but "a"."""
    model, _, collator = setting
    only_a = torch.arange(len(WORDS)) == WORDS.index("a")
    samples = [
        of_turns("0", None, (Turn("c", "a a", "x"), Turn("d", "a b", "y"))),
        of_turns("1", None, (Turn("c", "b", "x"), Turn("d", "a a a", "y"))),
        of_turns("2", None, (Turn("e", "b a", "x"), Turn("f", "a"))),
    ]
    own = open_samples(write_samples_to(tmp_path / "own", samples))
    head = biased(torch.zeros_like(model.hf.lm_head.weight), only_a)
    with having(model, head):
        for batch in (1, 2, 3):
            scores = scored((model, own, collator), batch)
            assert scores.asked == {"x": 3, "y": 2, "question": 1}
            assert scores.right == {"x": 1, "y": 1, "question": 1}
            assert scores.accuracy == pytest.approx((1 / 3 + 1 / 2 + 1) / 3)
            assert scores.accuracy_micro == 3 / 6
            asked = [("x", True), ("y", False), ("x", False), ("y", True), ("x", False)]
            assert asked_of(scores) == [
                *((i // 2, i % 2, kind, right) for i, (kind, right) in enumerate(asked)),
                (2, 1, "question", True),
            ]


@pytest.mark.parametrize(
    "number, batch, world, steps", [(11, 2, 2, 3), (5, 5, 3, 1), (4, 2, 2, 1), (7, 1, 3, 3)]
)
def test_every_sample_is_seen_once(setting, number, batch, world, steps, tmp_path):
    """All ranks take as many batches, though the last ones may be nobody's."""
    _, _, collator = setting
    samples = open_samples(write_data(tmp_path / "data", number))
    streams = [
        EvalStream(samples, collator, batch=batch, rank=r, world=world) for r in range(world)
    ]
    batches = [list(stream) for stream in streams]
    assert [len(some) for some in batches] == [len(stream) for stream in streams] == [steps] * world
    rows = [row for some in batches for one in some if one is not None for row in one.rows]
    assert sorted(rows) == list(range(number))


@pytest.mark.parametrize("world", [1, 3, 8])
def test_few_samples_are_for_all_ranks(setting, tmp_path, world):
    """As many as 512 of --calibration-samples are on 32 GPUs: in smaller batches."""
    _, _, collator = setting
    samples = open_samples(write_data(tmp_path / "data", 10))
    for rank in range(world):
        session = SimpleNamespace(
            arguments=SimpleNamespace(batch=64),
            world=SimpleNamespace(rank=rank, size=world),
            collator=collator,
        )
        first, *_ = EvalSession.stream(session, samples)  # type: ignore[arg-type]
        assert first is not None and len(first.rows) == 10 // world
    session.world.size = 11
    with pytest.raises(ConfigError, match="10 samples are too few for 11 ranks"):
        EvalSession.stream(session, samples)  # type: ignore[arg-type]


def _next_token(model, text: list[int], images: dict) -> int:
    ids = torch.tensor([text])
    is_vision = ids == model.image_layout.token_id
    images = images | {"feature_BS": (is_vision.cumsum(1) - 1).where(is_vision, -1)}
    with torch.no_grad():
        hidden = model.hidden(ModelInputs(ids, torch.ones_like(is_vision), is_vision, images))
        return model.backbone.head(model.hf)(hidden[:, -1]).argmax(-1).item()


def test_accuracy_is_the_mean_over_kinds():
    scores = Scores(Counter(a=1, b=3), Counter(a=1, b=6))
    assert scores.accuracy_by_kind == {"a": 1.0, "b": 0.5}
    assert (scores.accuracy, scores.accuracy_micro) == (0.75, 4 / 7)


def test_routing_is_that_of_each_valid_token(setting):
    """Of the samples one by one, without padding: k, entropy and modality, layer by layer."""
    model, samples, collator = setting
    scores, k_LN, entropy_LN, is_vision_N = scored(setting, 4), [], [], []
    model.ctx.trace = True
    for row in range(len(samples)):
        batch = collator.batch([collator.encode(row, samples[row])])
        with torch.no_grad():
            model.hidden(batch.model_inputs)
        k_LN.append(np.stack([record.k_T for record in model.ctx.layers]))
        entropy_LN.append(np.stack([record.entropy_T for record in model.ctx.layers]))
        is_vision_N += (np.array(collator.encode(row, samples[row]).input_ids) == 3).tolist()
    model.ctx.trace = False
    k_LN, entropy_LN = np.concatenate(k_LN, axis=1), np.concatenate(entropy_LN, axis=1)
    assert (k_LN[0] != k_LN[1]).any() and 0 < sum(is_vision_N) < len(is_vision_N)
    sums = scores.routing
    order, expected = (
        np.lexsort((*k, *entropy.round(4), kind))  # the same tokens, in an order of their own
        for entropy, k, kind in (
            (sums.entropy_LN, sums.k_LN, sums.kind_N == IMAGE),
            (entropy_LN, k_LN, is_vision_N),
        )
    )
    assert np.array_equal(sums.k_LN[:, order], k_LN[:, expected])
    assert np.allclose(sums.entropy_LN[:, order], entropy_LN[:, expected], atol=1e-4)
    assert sums.tokens_M[IMAGE] == sum(is_vision_N)
    assert np.array_equal(scores.load_LE.sum(1), k_LN.sum(1))
    assert sums.mean_k_L == pytest.approx(k_LN.mean(1), rel=1e-12)
    for layer, rho in enumerate(sums.spearman_L):
        assert rho == pytest.approx(spearman(entropy_LN[layer], k_LN[layer]), abs=0.002)


@pytest.fixture
def harmed(setting, tmp_path):
    """Rows 1 (broken image) and 4 (no room for an answer) of 11; of 6 an answer is cut."""
    model, good, collator = setting
    samples = [good[row] for row in range(len(good))]
    samples[1] = cut_image(samples[1], 60)
    samples[4] = with_turns(samples[4], Turn("a " * 90, "b", "x"), Turn("c", "d", "y"))
    samples[6] = with_turns(samples[6], turns_of(samples[6])[0], Turn("c", "d " * 90, "y"))
    write_samples(iter(samples), tmp_path / "data", source="test")
    return model, open_samples(tmp_path / "data"), collator


@pytest.mark.parametrize("batch, world", [(1, 1), (4, 1), (3, 2)])
def test_what_is_not_asked_is_counted_apart(setting, harmed, batch, world):
    scores, whole = scored(harmed, batch, world), scored(setting, 2)
    assert whole.asked == {"x": 11, "y": 11} and not whole.not_asked and not whole.bad
    assert scores.asked == {"x": 9, "y": 8} and scores.not_asked == {"x": 2, "y": 3}
    assert {turn[:2] for turn in asked_of(scores)} == {
        turn[:2] for turn in asked_of(whole) if turn[0] not in (1, 4) and turn[:2] != (6, 1)
    }
    assert sorted(scores.bad) == [1, 4] and scores.bad[4].needs > 90
    assert scores.bad[1].reason.startswith("sample s1: its image cannot be decoded")


def test_where_nothing_can_be_asked_a_line_says_so(harmed):
    model, samples, collator = harmed
    collator.max_length, kept = 4, collator.max_length
    try:
        with pytest.raises(DataError, match="none of 22 questions can be asked, raise data.max_le"):
            scored((model, samples, collator), 4)
    finally:
        collator.max_length = kept


def test_experts_by_token_kind_and_samples_are_those_of_a_walk_over_the_tokens(setting):
    """One sample at a time: its tokens' k, entropies and scores, added up token by token."""
    model, samples, collator = setting
    scores = evaluate(
        model,
        samples,
        EvalStream(samples, collator, batch=3, rank=0, world=1),
        torch.device("cpu"),
        ALONE,
        special_ids=collator.special_ids,
    )
    kind_k, kind_tokens, answer_k, answer_tokens = Counter(), Counter(), Counter(), Counter()
    for row in range(len(samples)):
        encoded = collator.encode(row, samples[row])
        batch = collator.batch([encoded])
        model.ctx.trace = True
        with torch.no_grad():
            model.hidden(batch.model_inputs)
        model.ctx.trace = False
        k_LS = torch.stack([record.k_T for record in model.ctx.layers]).numpy()
        p_LSE = torch.stack([record.logits_TE for record in model.ctx.layers]).softmax(-1)
        entropy = -(p_LSE * p_LSE.log2()).sum(-1).mean()
        mass = p_LSE.sort(-1, descending=True).values[..., :4].sum(-1).mean()
        of_samples = scores.samples
        found = float(of_samples.entropy_S[row]), float(of_samples.mass_S[row])
        assert found == pytest.approx((float(entropy), float(mass)), rel=1e-4)
        seen = Counter()
        for s, (token, turn) in enumerate(zip(encoded.input_ids, encoded.turn, strict=True)):
            is_special = token in collator.tokenizer.all_special_ids
            kind = 0 if encoded.is_vision[s] else 1 if is_special else 3 if turn >= 0 else 2
            kind_tokens[kind] += 1
            kind_k[kind] += k_LS[:, s]
            if turn >= 0:
                answer_tokens[seen[turn]] += 1
                answer_k[seen[turn]] += k_LS[:, s]
                seen[turn] += 1
    assert min(kind_tokens[kind] for kind in range(4)) > 0 and len(answer_tokens) > 2
    for kind in range(4):
        assert scores.kind_tokens_C[kind] == kind_tokens[kind]
        assert scores.kind_k_LC[:, kind].tolist() == kind_k[kind].tolist()
    for place, number in answer_tokens.items():
        assert scores.answer_tokens_P[place] == number
        assert scores.answer_k_LP[:, place].tolist() == answer_k[place].tolist()


def test_plain_texts_ask_nothing_and_have_a_loss(setting, tmp_path):
    model, _, collator = setting
    texts = [Sample(f"t{i}", (Message("text", "a b c"[: 2 * i + 1]),)) for i in range(3)]
    samples = open_samples(write_samples_to(tmp_path / "texts", texts))
    with pytest.raises(DataError, match="no sample asks anything: these are plain texts"):
        scored((model, samples, collator), 2)
    stream = EvalStream(samples, collator, batch=2, rank=0, world=1)
    device = torch.device("cpu")
    scores = evaluate(model, samples, stream, device, ALONE, in_detail=False)
    batch = collator.batch([collator.encode(i, text) for i, text in enumerate(texts)])
    with torch.no_grad():
        expected = model(**batch.inputs)["lm"].item()
    assert scores.num_targets == 2 + 3 + 4 and not scores.asked and not scores.not_asked
    assert scores.loss == pytest.approx(expected, rel=1e-5)


def test_answers_that_are_not_learned_are_no_questions(setting, tmp_path):
    """Their places do not count: the first question is that of the first learned answer."""
    model, _, collator = setting
    talk = [Message("user", "c"), Message("assistant", "a", loss=False, kind="no")]
    talk += [Message("user", "d"), Message("assistant", "a b", kind="yes")]
    samples = open_samples(write_samples_to(tmp_path / "some", [Sample("s", tuple(talk))]))
    scores = scored((model, samples, collator), 1)
    assert scores.asked == {"yes": 1} and not scores.not_asked
    assert [turn[:3] for turn in asked_of(scores)] == [(0, 0, "yes")]
