"""A pair is left out exactly, and foretold to first order: against one pair, one sample at a time.

The oracle takes the expert's share from the layer's output by the expert's own weights; it knows
neither masks nor plans.
"""

from __future__ import annotations

import json
from dataclasses import fields

import numpy as np
import pytest
import torch

from gemoe_ds.analysis.ablation import PAIRS, SUMMARY, Pairs
from gemoe_ds.cli.ablate import main
from gemoe_ds.data.collate import Collator
from gemoe_ds.data.sample import open_samples
from gemoe_ds.evaluation.ablate import _draw, ablate, losses
from gemoe_ds.models.tokenizer import load_tokenizer
from tests.tiny import make_model, write_base
from tests.train.resuming import write_data

CASES = {
    "raw scores": ("top_k", {"k": 3}),
    "divided by their sum": ("top_k", {"k": 3, "norm_topk_prob": "sum"}),
    "one expert of weight 1": ("top_k", {"k": 1, "norm_topk_prob": "sum"}),
    "another k for every token": ("gemoe", {"k_low": 0, "k_high": 4}),
    "free experts": ("moepp", {}),
}


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    root = tmp_path_factory.mktemp("ablate")
    base = write_base(root)
    return base, open_samples(write_data(root / "data", 5))


def made(setting, case):
    (hf, tokenizer), samples = setting
    router, options = CASES[case]
    model = make_model((hf, tokenizer), router, options).eval()
    for layer in model.moe_layers:  # a random tiny model hardly notices its experts
        layer.experts.down_EDF.mul_(20)
        layer.experts.pack = False
    chat = model.backbone.chat
    collator = Collator(load_tokenizer(tokenizer), model.image_layout, chat, max_length=64)
    encoded = [collator.encode(row, samples[row]) for row in range(len(samples))]
    return model, collator, encoded


def loss_without(model, collator, encoded, pair, share=1.0):
    """Loss of the sample with this share of the pair gone; no pair: with everything."""
    batch = collator.batch([encoded])
    hooks = []

    def output(layer, args, y):
        router = layer.router
        x_TD = args[0].reshape(-1, args[0].shape[-1])
        decision, _ = router.decide(x_TD, model.ctx)
        token, expert = int(pair["position_P"]), int(pair["expert_P"])
        gate, up = (layer.experts.gate_up_EGD[expert] @ x_TD[token]).chunk(2)
        part_D = layer.experts.down_EDF[expert] @ (torch.nn.functional.silu(gate) * up)
        weight = pair["weight"] = decision.weights_TE[token, expert].item()
        y_TD = y.reshape(x_TD.shape).clone()
        if getattr(router.config, "norm_topk_prob", "") == "sum":  # nothing else is in y
            rest = (y_TD[token] - share * weight * part_D) / (1 - share * weight)
            y_TD[token] = rest if weight < 1 else 0
        else:
            y_TD[token] -= share * weight * part_D
        return y_TD.view(y.shape)

    if pair is not None:
        hooks = [model.moe_layers[int(pair["layer_P"])].register_forward_hook(output)]
    with torch.no_grad():
        loss = losses(model, batch).item()
    for hook in hooks:
        hook.remove()
    return loss


@pytest.mark.parametrize("case", CASES)
def test_costs_are_those_of_one_pair_at_a_time(setting, case):
    model, collator, encoded = made(setting, case)
    pairs, loss_B = ablate(model, collator.batch(encoded), 2, seed=0)
    assert len(pairs.cost_P) == 10 and np.abs(pairs.cost_P).max() > 1e-3
    for p in range(len(pairs.cost_P)):
        pair = {f.name: getattr(pairs, f.name)[p] for f in fields(pairs)}
        one = encoded[pair["sample_P"]]
        whole = loss_without(model, collator, one, None)
        assert loss_B[pair["sample_P"]] == pytest.approx(whole, abs=1e-5)
        cost = loss_without(model, collator, one, pair) - whole
        assert pair["cost_P"] == pytest.approx(cost, abs=2e-5)
        if p % 2 or "one expert" in case:  # all or nothing: no small share of it to measure
            continue
        step = 0.02
        slope = loss_without(model, collator, one, pair, step)
        slope = (slope - loss_without(model, collator, one, pair, -step)) / (2 * step)
        if case == "divided by their sum":  # its first order is that of the mixture's change
            slope /= 1 - pair["weight"]
        assert pair["first_order_P"] == pytest.approx(slope, rel=0.02, abs=2e-4)


def test_pairs_are_the_same_in_any_batch_and_stand_before_the_last_target(setting):
    model, collator, encoded = made(setting, "raw scores")
    whole, _ = ablate(model, collator.batch(encoded), 4, seed=1)
    parts = [
        ablate(model, collator.batch(some), 4, seed=1)[0] for some in (encoded[3:], encoded[:3])
    ]
    joined = Pairs.joined(parts)
    for field in fields(Pairs):
        a, b = getattr(whole, field.name), getattr(joined, field.name)
        assert a.dtype == b.dtype and np.allclose(a, b, atol=1e-5), field.name
    distinct = np.stack([whole.sample_P, whole.position_P, whole.layer_P, whole.expert_P])
    assert len(np.unique(distinct, axis=1).T) == 20
    last = [max(i for i, label in enumerate(e.labels) if label != -100) for e in encoded]
    assert (whole.position_P < np.array(last)[whole.sample_P]).all()
    many, _ = ablate(model, collator.batch(encoded), 12, seed=1)
    in_last = many.layer_P == 1  # where a token acts on the one that it predicts alone
    assert in_last.any() and all(
        encoded[sample].labels[position + 1] != -100
        for sample, position in zip(many.sample_P[in_last], many.position_P[in_last], strict=True)
    )


def test_a_draw_takes_chosen_experts_once_and_all_there_are():
    mask_LTE = torch.rand(3, 8, 5, generator=torch.Generator().manual_seed(0)) < 0.3
    mask_LTE[:, 4:6] = False
    drawn = _draw(mask_LTE, (10, 11, 12, 13), 10**6, seed=1)
    rows = torch.stack([drawn.layer_P, drawn.token_P, drawn.expert_P], 1)
    assert sorted(rows.tolist()) == mask_LTE.nonzero().tolist()
    assert torch.equal(drawn.sequence_P, drawn.token_P // 2)
    some, others = (_draw(mask_LTE, (10, 11, 12, 13), 2, seed=seed) for seed in (1, 2))
    assert some.turn_P.tolist() == [0, 1] * 3 and some.sequence_P.tolist() == [0, 0, 1, 1, 3, 3]
    assert not torch.equal(some.token_P, others.token_P)


def test_a_token_without_experts_has_no_pair(setting):
    """And a batch of such tokens, or of samples that are left out, gives none."""
    model, collator, encoded = made(setting, "another k for every token")
    for layer in model.moe_layers:
        layer.router.k_shift = -99.0
    pairs, loss_B = ablate(model, collator.batch(encoded), 3, seed=0)
    assert len(pairs.cost_P) == 0 and loss_B.min() > 0


def test_the_command_writes_pairs_and_what_follows(setting, tmp_path, capsys):
    (hf, tokenizer), samples = setting
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"output_dir: {tmp_path}/run\n"
        f"model: {{backbone: {{name: tiny}}, checkpoint: {hf}, dtype: float32}}\n"
        f"data: {{train_path: {samples.path}, tokenizer: {tokenizer}}}\n"
        "optim: {lr: 1e-3}\ntrain: {steps: 1, micro_batch_size: 1}\n"
    )
    command = [str(recipe), "--data", str(samples.path), "--pairs", "4", "--batch", "2"]
    main([*command, "--k", "3", "2", "--limit", "3", "--out", str(tmp_path / "out")])
    printed = capsys.readouterr().out
    assert "12 pairs of a token and one of its experts, of 3 samples" in printed
    found = json.loads((tmp_path / "out/k_2" / SUMMARY).read_text())
    assert (found["method"], found["k"], found["num_pairs"]) == ("top_k", 2, 12)
    with np.load(tmp_path / "out/k_2" / PAIRS) as arrays:
        assert arrays["cost_P"].shape == (12,) and arrays["rank_P"].max() <= 2
    for options, says in (
        (["--k", "2", "--trained", "x"], "not both"),
        (["parallel.ep_size=2", "--k", "2"], "leave parallel.ep_size out"),
        (["--k", "2", "--pairs", "0"], "not a number from 1"),
    ):
        with pytest.raises(SystemExit) as caught:
            main([*command, *options, "--out", str(tmp_path / "bad")])
        assert caught.value.code == 2 and says in capsys.readouterr().err
    assert not (tmp_path / "bad").exists()
