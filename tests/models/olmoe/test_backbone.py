"""OLMoE from a folder in its public layout: the formulas, the stock model, shards, training."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from safetensors.torch import load_file
from transformers import OlmoeForCausalLM

from gemoe_ds.data.collate import Collator
from gemoe_ds.data.sample import Turn, of_turns
from gemoe_ds.errors import CheckpointError, ConfigError, DataError
from gemoe_ds.models.olmoe.backbone import OlmoeBackbone
from gemoe_ds.models.shard import ExpertShard
from tests.models import reference
from tests.models.olmoe.small import EPS, HEADS, LAYERS, TOP_K, logits_of, write_olmoe
from tests.models.small import check_shards, make_model
from tests.tiny import WORDS, write_tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_olmoe(tmp_path_factory.mktemp("olmoe"))


make = partial(make_model, "olmoe")


def stored(folder):
    tensors = {}
    for file in folder.glob("*.safetensors"):
        tensors |= load_file(file)
    return tensors


def reference_logits(folder, ids_S, norm_topk_prob=False):
    weights = reference.read(folder)
    x = weights["model.embed_tokens.weight"][ids_S]
    for layer in range(LAYERS):
        w = reference.under(weights, f"model.layers.{layer}.")
        h = reference.rms_norm(x, w["input_layernorm.weight"], EPS)
        q, k = (
            reference.rms_norm(
                h @ w[f"self_attn.{n}_proj.weight"].t(), w[f"self_attn.{n}_norm.weight"], EPS
            )
            for n in "qk"
        )
        v = h @ w["self_attn.v_proj.weight"].t()
        q, k, v = (t.view(len(x), HEADS, -1) for t in (q, k, v))
        a = reference.causal_attention(reference.rotated(q, 1e4), reference.rotated(k, 1e4), v)
        x = x + a @ w["self_attn.o_proj.weight"].t()
        h = reference.rms_norm(x, w["post_attention_layernorm.weight"], EPS)
        x = x + reference.moe(h, reference.under(w, "mlp."), TOP_K, norm_topk_prob)
    return reference.rms_norm(x, weights["model.norm.weight"], EPS) @ weights["lm_head.weight"].t()


@pytest.mark.parametrize("norm_topk_prob", [False, True])
def test_logits_are_those_of_the_formulas_and_of_the_stock_model(tmp_path, norm_topk_prob):
    folder = write_olmoe(tmp_path, norm_topk_prob=norm_topk_prob)
    ids = torch.randint(3, len(WORDS), (1, 11), generator=torch.Generator().manual_seed(1))
    ours = logits_of(make(folder), ids)
    expected = reference_logits(folder, ids[0], norm_topk_prob)
    reference.assert_same(ours[0], expected)
    stock = OlmoeForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        reference.assert_same(ours, stock(ids).logits)


def test_batched_equals_single(folder):
    g = torch.Generator().manual_seed(2)
    model = make(folder)
    rows = [torch.randint(3, len(WORDS), (n,), generator=g) for n in (9, 4, 1)]
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    valid = torch.arange(9) < torch.tensor([len(r) for r in rows])[:, None]
    together = logits_of(model, ids, valid)
    for row, found in zip(rows, together, strict=True):
        alone = logits_of(model, row[None])[0]
        reference.assert_same(found[: len(row)], alone)


def test_each_rank_holds_its_own_experts_only(folder):
    check_shards(partial(make, folder), 4)


def test_only_routers_train_and_no_memory_is_left_out(folder):
    model = make(folder, "gemoe", dtype=torch.bfloat16)
    assert {n.rpartition("mlp.")[2] for n in model.trainable()} == {
        "router.gate.weight",
        "router.eap.weight",
    }
    assert not any(t.is_meta for t in [*model.parameters(), *model.buffers()])
    ids = torch.randint(3, len(WORDS), (2, 7))
    valid = torch.ones_like(ids, dtype=torch.bool)
    parts = model(ids, ids, valid, ~valid, {})
    parts["loss"].backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.trainable().values())


def test_full_shape_has_the_published_number_of_parameters():
    """6,919,161,856, of which a token uses 1,282,017,280 at top-8; nothing is allocated."""
    model = OlmoeBackbone.published()
    assert sum(p.numel() for p in model.parameters()) == 6_919_161_856
    blocks = OlmoeBackbone(OlmoeBackbone.Config()).moe_blocks(model)
    assert len(blocks) == 16
    idle = sum((64 - 8) * block.params_per_expert for block in blocks)
    assert 6_919_161_856 - idle == 1_282_017_280
    routing = blocks[0].routing
    assert (routing.d_model, routing.num_experts, routing.top_k, routing.norm_topk_prob) == (
        2048,
        64,
        8,
        False,
    )


def test_a_conversation_in_its_words(tmp_path):
    tokenizer = _tokenizer(tmp_path)
    collator = Collator(tokenizer, None, OlmoeBackbone.chat, max_length=99)
    encoded = collator.encode(0, of_turns("x", None, (Turn("a b", "c"), Turn("d", "e"))))
    text = "<s> <|user|> a b <|assistant|> c </s> <|user|> d <|assistant|> e </s>"
    assert [tokenizer.decode([i]) for i in encoded.input_ids] == text.split()
    targets = [tokenizer.decode([i]) for i in encoded.labels if i != -100]
    assert targets == ["c", "</s>", "e", "</s>"]
    assert collator.batch([encoded]).images == {}


def test_images_are_refused(tmp_path):
    collator = Collator(_tokenizer(tmp_path), None, OlmoeBackbone.chat, max_length=99)
    with pytest.raises(DataError, match="sample x has an image, and this backbone reads text only"):
        collator.encode(0, of_turns("x", b"...", (Turn("a", "b"),)))


def _tokenizer(folder):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(write_tokenizer(folder))
    tokenizer.add_tokens(["<|user|>", "<|assistant|>"])
    return tokenizer


def test_wrong_folders_are_refused(tmp_path, folder):
    with pytest.raises(ConfigError, match="backbone 'olmoe' starts from one"):
        make(None)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(CheckpointError, match="model_type 'llama', backbone 'olmoe' has 'olmoe'"):
        make(tmp_path)
    with pytest.raises(ConfigError, match="ep_size=3 does not divide"):
        make(folder, shard=ExpertShard(0, 3))
