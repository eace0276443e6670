"""convert(): the blocks of stock models become ours, and nothing else of them changes."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch.utils.checkpoint import checkpoint
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    GraniteMoeConfig,
    GraniteMoeForCausalLM,
)

import gemoe_ds.routers  # noqa: F401  (registers every router)
from gemoe_ds.errors import ConfigError
from gemoe_ds.models.convert import convert
from gemoe_ds.moe.router import Router
from tests.models.stock import (
    FAMILIES,
    SIZES,
    batch,
    converted,
    deepseek_v2,
    mixtral,
    olmoe,
    stock,
)


def outputs(model, **given):
    out = model(**given)
    return out.logits if "logits" in out else out.last_hidden_state


def step(model, handle, given=None):
    out = model(**(given or batch()))
    loss = out.loss + handle.aux_loss()
    loss.backward()
    return {n: p.grad.clone() for n, p in handle.trainable_parameters().items()}


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_top_k_is_the_untouched_model(name):
    given, model = batch(labels=False), stock(name)
    want = outputs(model, **given)
    tensors = {n: (p.data_ptr(), p.clone()) for n, p in model.named_parameters()}
    handle = convert(model, router="top_k")
    valid = given["attention_mask"].bool()
    torch.testing.assert_close(outputs(model, **given)[valid], want[valid])
    (k, *_) = handle.k_per_layer
    assert torch.equal(k > 0, valid) and k.unique().tolist() == [0, handle.routers[0].static_k]
    # all weights are there, under the stock names, the large ones in the same memory
    state = model.state_dict()
    assert state.keys() >= tensors.keys()
    for n, (pointer, value) in tensors.items():
        assert torch.equal(state[n], value), n
        assert state[n].data_ptr() == pointer or n.endswith("gate.weight"), n


@pytest.mark.parametrize("name", ["qwen2", "qwen3_vl", "deepseek_v2", "llava"])
def test_a_saved_folder_is_the_stock_models_and_takes_the_routers_back(name, tmp_path):
    model, handle = converted(name=name)
    with torch.no_grad():
        for p in handle.trainable_parameters().values():
            p.mul_(1.5)
    model.save_pretrained(tmp_path)
    again, info = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["mismatched_keys"]
    assert {n.rpartition(".router.")[2] for n in info["unexpected_keys"]} == {"eap.weight"}
    other = convert(again)
    other.load_routers(tmp_path)
    given = batch(labels=False)
    with torch.no_grad():
        found, wanted = outputs(again.eval(), **given), outputs(model.eval(), **given)
    assert all(torch.equal(p, again.state_dict()[n]) for n, p in model.state_dict().items())
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)  # other places in memory


def test_load_state_dict_takes_frozen_experts_too():
    model, _ = converted()
    state = {n: t + 1 if t.is_floating_point() else t for n, t in model.state_dict().items()}
    other, _ = converted(seed=2)
    other.load_state_dict(state)
    assert all(torch.equal(t, state[n]) for n, t in other.state_dict().items())
    del state["model.layers.0.mlp.experts.down_proj"]
    with pytest.raises(RuntimeError, match="Missing.*layers.0.mlp.experts.down_proj"):
        other.load_state_dict(state)
    with pytest.raises(ConfigError, match="no router"):
        convert(stock()).load_routers(".")
    with pytest.raises(ConfigError, match="nowhere: no such folder"):
        convert(stock()).load_routers("nowhere")
    with pytest.raises(ConfigError, match="a model in memory is wanted"):
        convert("allenai/OLMoE-1B-7B-0924")  # type: ignore[arg-type]


def test_routers_alone_train_unless_more_is_asked_for():
    _, handle = converted()
    assert all(".router." in name for name in handle.trainable_parameters())
    assert len(handle.trainable_parameters()) == 4
    _, handle = converted(trainable="experts")
    kinds = {name.split(".mlp.")[-1].split(".")[0] for name in handle.trainable_parameters()}
    assert kinds == {"router", "experts"}
    model = stock("qwen2")
    model.model.embed_tokens.requires_grad_(False)
    model.model.layers[1].mlp.experts.requires_grad_(False)
    handle = convert(model, trainable="all")
    frozen = set(dict(model.named_parameters())) - handle.trainable_parameters().keys()
    experts = {f"model.layers.1.mlp.experts.{name}" for name in ("gate_up_EGD", "down_EDF")}
    assert frozen == {"model.embed_tokens.weight", *experts}
    step(model.train(), handle)


@pytest.mark.parametrize("name", Router.names())
def test_recomputation_changes_nothing_for_any_router(name):
    """Two forwards of equal shape before one backward pass, with padding in other places."""
    other = batch(1)
    other["attention_mask"] = other["attention_mask"].flip(0)
    found = []
    for recompute in (False, True):
        model, handle = converted(name, trainable="experts")
        if recompute:
            model.gradient_checkpointing_enable()
        losses = []
        for given in (batch(), other):
            losses.append(model(**given).loss + handle.aux_loss())
            with torch.no_grad():
                model(**batch(2))
        sum(losses).backward()
        found.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    plain, again = found
    assert plain.keys() == again.keys() and len(plain) > 2
    for n in plain:
        assert torch.equal(plain[n], again[n]), n


def test_a_model_may_be_recomputed_as_a_whole():
    """With what is made of its output, and with its auxiliary losses."""
    found = []
    for recompute in (False, True):
        model, handle = converted(trainable="experts")

        def loss(one, given, model=model, handle=handle):
            out = model(**given | {"labels": None})
            return out.logits.log_softmax(-1).square().mean() * one + handle.aux_loss()

        one = torch.ones((), requires_grad=True)
        total = torch.zeros(())
        for given in (batch(), batch(1)):
            if recompute:
                total = total + checkpoint(loss, one, given, use_reentrant=False)
            else:
                total = total + loss(one, given)
        total.backward()
        found.append([p.grad for p in handle.trainable_parameters().values()])
    assert all(map(torch.equal, *found))


def test_deepspeed_gives_the_gradients_of_plain_pytorch():
    import deepspeed

    from gemoe_ds.engine.world import distributed

    want = step(*converted())
    model, handle = converted()
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": 2,
        "zero_optimization": {"stage": 2},
    }
    with distributed():
        optimizer = torch.optim.AdamW(list(handle.trainable_parameters().values()), lr=0.0)
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
        for is_last in (False, True):
            out = engine(**batch())
            engine.backward(out.loss + handle.aux_loss())
            if is_last:
                found = {
                    n: deepspeed.utils.safe_get_full_grad(p)
                    for n, p in handle.trainable_parameters().items()
                }
            engine.step()
    assert found.keys() == want.keys()
    for n in want:
        torch.testing.assert_close(found[n], want[n], msg=n)


@pytest.mark.parametrize("stage", [0, 2])  # 3 would change torch's linear for this process
def test_deepspeed_in_bfloat16_is_refused(stage):
    import deepspeed

    from gemoe_ds.engine.world import distributed

    model, handle = converted()
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "bf16": {"enabled": True},
        "zero_optimization": {"stage": stage},
    }
    with distributed():
        optimizer = torch.optim.AdamW(list(handle.trainable_parameters().values()), lr=0.0)
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
        with pytest.raises(RuntimeError, match="leave bf16 and fp16 out of DeepSpeed's"):
            engine(**batch())


def test_trainer_gives_the_gradients_of_plain_pytorch(tmp_path):
    pytest.importorskip("accelerate")
    from transformers import Trainer, TrainingArguments

    class MoETrainer(Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            loss, out = super().compute_loss(model, inputs, True, num_items_in_batch)
            # with a count of items the loss is divided for accumulation already, without later
            steps = 1 if num_items_in_batch is None else self.current_gradient_accumulation_steps
            loss = loss + handle.aux_loss() / steps
            return (loss, out) if return_outputs else loss

    class Recorded(torch.optim.SGD):
        def step(self, *args, **kwargs):
            found.update({n: p.grad.clone() for n, p in handle.trainable_parameters().items()})
            return super().step(*args, **kwargs)

    found: dict[str, torch.Tensor] = {}
    want = step(*converted())
    model, handle = converted()
    given = batch()
    rows = [{n: t[i] for n, t in given.items()} for i in (0, 1)]
    arguments = TrainingArguments(
        tmp_path,
        max_steps=1,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        max_grad_norm=0,
        gradient_checkpointing=True,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        save_strategy="steps",
        save_steps=1,
    )
    optimizer = Recorded(handle.trainable_parameters().values(), lr=0.0)
    MoETrainer(model, arguments, train_dataset=rows * 2, optimizers=(optimizer, None)).train()
    for n in want:
        torch.testing.assert_close(found[n], want[n], msg=n)
    convert(stock()).load_routers(tmp_path / "checkpoint-1")


def test_generation_tells_cache_and_left_padding():
    model, handle = converted()
    model.eval()
    given = batch(labels=False)
    given = {n: t.flip(1) for n, t in given.items()}  # padding on the left
    with torch.no_grad():
        long = model.generate(**given, max_new_tokens=4, do_sample=False, eos_token_id=None)
        alone = model.generate(
            given["input_ids"][1:, 3:], max_new_tokens=4, do_sample=False, eos_token_id=None
        )
    assert torch.equal(long[1, 3:], alone[0])
    assert [k.shape for k in handle.k_per_layer] == [(1, 1), (1, 1)]


@pytest.mark.slow  # for what torch.compile is
def test_a_compiled_model_has_the_same_gradients():
    want = step(*converted())
    model, handle = converted()
    compiled = torch.compile(model, backend="eager")
    (compiled(**batch()).loss + handle.aux_loss()).backward()
    for name, p in handle.trainable_parameters().items():
        assert torch.equal(p.grad, want[name])


def test_a_forward_that_cannot_be_what_is_meant_is_refused():
    model, handle = converted()
    with pytest.raises(RuntimeError, match="has not run.*aux_loss.. once"):
        handle.aux_loss()
    with pytest.raises(RuntimeError, match="no forward has run"):
        handle.k_per_layer  # noqa: B018
    with pytest.raises(RuntimeError, match="not begun.*convert"):
        model.model(**batch(labels=False))
    step(model, handle)
    with pytest.raises(RuntimeError, match="has had its backward pass"):
        handle.aux_loss()
    with pytest.raises(RuntimeError, match="output_router_logits=True.*aux_loss"):
        model(**batch(), output_router_logits=True)
    with pytest.raises(IndexError):
        model(torch.tensor([[100]]))
    with pytest.raises(RuntimeError, match="has not run"):
        handle.aux_loss()
    model.gradient_checkpointing_enable({"use_reentrant": True})
    model.enable_input_require_grads()
    with pytest.raises(RuntimeError, match="use_reentrant=False"):
        model(**batch())


@pytest.mark.parametrize(
    "make, options, told",
    [
        (
            lambda: GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=8, n_head=1, vocab_size=9)),
            {},
            "it is a GPT2",
        ),
        (lambda: GraniteMoeForCausalLM(GraniteMoeConfig(**SIZES)), {}, "it has GraniteMoe"),
        (lambda: converted()[0], {}, "converted already"),
        (stock, {"router": "gemo"}, "did you mean gemoe"),
        (stock, {"k_hihg": 2}, "did you mean k_high"),
        (stock, {"k_low": 6}, "k_low <= k_high"),
        (stock, {"router": "evolve"}, "trainable=experts"),
        (stock, {"trainable": "router"}, "one of 'routers', 'experts', 'all'"),
        (lambda: olmoe(hidden_act="gelu"), {}, r"layers.0.mlp: experts with GELU"),
        (lambda: olmoe(output_router_logits=True), {}, "output_router_logits=True"),
        (lambda: mixtral(router_jitter_noise=0.1), {}, "router_jitter_noise=0.1"),
        (
            lambda: deepseek_v2(topk_method="group_limited_greedy", n_group=4, topk_group=2),
            {},
            "group_limited_greedy",
        ),
        (lambda: stock().to("meta"), {}, "no memory; load the model whole"),
    ],
)
def test_what_cannot_be_converted_is_refused_and_left_alone(make, options, told):
    model = make()
    before = {n: p.requires_grad for n, p in model.named_parameters()}
    with pytest.raises(ConfigError, match=told) as refused:
        convert(model, **options)
    assert "\n" not in str(refused.value)
    assert {n: p.requires_grad for n, p in model.named_parameters()} == before


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_copy_of_a_converted_model_is_independent(copied):
    model, handle = converted()
    step(model, handle)
    other = copied(model)
    with torch.no_grad():
        want = other(**batch()).loss
        for p in handle.trainable_parameters().values():
            p.zero_()
        assert torch.equal(other(**batch()).loss, want) and not torch.equal(
            model(**batch()).loss, want
        )


def test_controllers_see_all_layers_after_a_step():
    model, handle = converted("remoe", target_k=1.0)
    model.gradient_checkpointing_enable()
    step(model, handle)
    seen = []
    for router in handle.routers:
        router.after_step = seen.append
    k = torch.stack(handle.k_per_layer)
    handle.after_step(1, 2)
    assert [context.layer["active"] for context in seen] == k.sum((1, 2)).tolist()
    assert seen[0].model == {"active": k.sum(), "tokens": 2 * 11} and seen[1].progress == 0.5
