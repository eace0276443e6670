"""Self-distillation against two models and the textbook's formula."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import kl_div

from gemoe_ds.models.distill import Distill, divergence
from tests.tiny import make_model, model_inputs, num_targets, random_batch

TOKENS = ("answers", "text", "all")


def by_hand(tokens: str, batch: dict) -> list[tuple[int, int]]:
    """The positions, one by one."""
    found = []
    for b, s in torch.ones_like(batch["is_valid_BS"]).nonzero().tolist():
        if s + 1 == batch["is_valid_BS"].shape[1]:
            wanted = tokens == "all" and bool(batch["is_valid_BS"][b, s])
        else:
            valid = batch["is_valid_BS"][b, s] and batch["is_valid_BS"][b, s + 1]
            wanted = {
                "answers": batch["labels_BS"][b, s + 1] != -100,
                "text": valid and not batch["is_vision_BS"][b, s + 1],
                "all": batch["is_valid_BS"][b, s],
            }[tokens]
        if wanted:
            found.append((b, s))
    return found


def all_logits(model, batch: dict) -> torch.Tensor:
    """[B, S, V] of a plain forward."""
    everywhere_BS = torch.ones_like(batch["is_valid_BS"])
    logits, _ = model._logits(everywhere_BS, everywhere_BS, model_inputs(batch))
    return logits.view(*everywhere_BS.shape, -1)


def make_student(base, router: str, options: dict, **distill: object):
    model = make_model(base, router, options).train()
    model.distill = Distill(**distill)
    return model


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("router", ["gemoe", "remoe"])
@pytest.mark.parametrize("images", [True, False])
def test_loss_and_gradients_are_those_of_two_models(base, router, tokens, images):
    batch = random_batch(3, 3, 11, images=images)
    temperature, weight = 2.5, 0.3
    student = make_student(base, router, {}, tokens=tokens, weight=weight, temperature=temperature)
    teacher = make_model(base, "top_k").eval()
    with torch.no_grad():
        for parameter in student.trainable().values():
            parameter.add_(torch.randn_like(parameter))
    taught = student(**batch, teach=True)
    parts = student(**batch, **taught)
    parts["loss"].backward()
    have = {n: p.grad.clone() for n, p in student.trainable().items() if p.grad is not None}

    student.zero_grad()
    with torch.no_grad():
        wanted_BSV = all_logits(teacher, batch)
    logits_BSV = all_logits(student, batch)
    log_q, log_p = ((z / temperature).log_softmax(-1) for z in (logits_BSV, wanted_BSV))
    at = by_hand(tokens, batch)
    kl = sum((log_p[i].exp() * (log_p[i] - log_q[i])).sum() for i in at) / len(at)
    ce = torch.zeros(())
    for b, s in by_hand("answers", batch):
        ce = ce - logits_BSV[b, s].log_softmax(-1)[batch["labels_BS"][b, s + 1]]
    ce = ce / num_targets(batch)
    loss = (1 - weight) * ce + weight * temperature**2 * kl
    for term in student.ctx.mean_losses().values():
        loss = loss + term.weight * term.value
    loss.backward()
    for name, value in (("loss", loss), ("lm", ce), ("distill", kl)):
        torch.testing.assert_close(parts[name], value, msg=name)
    assert have and kl > 1e-4
    for name, parameter in student.trainable().items():
        torch.testing.assert_close(have[name], parameter.grad, msg=name, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_teacher_stays_what_it_was_to_the_bit(base, dtype):
    """The student has trained, is in training mode and recomputes; its records are another's."""
    student = make_model(base, "gemoe", {}, dtype=dtype, activation_checkpointing=True).train()
    student.distill = Distill(tokens="all")
    batch = random_batch(7)
    optimizer = torch.optim.AdamW(student.trainable().values(), lr=0.1)
    for _ in range(2):
        taught = student(**batch, teach=True)
        student(**batch, **taught)["loss"].backward()
        optimizer.step()
    assert all(module.training for module in student.modules())
    static = make_model(base, "top_k", {}, dtype=dtype).eval()
    with torch.no_grad(), static.autocast(torch.device("cpu")):
        hidden_BSD = static.hidden(model_inputs(batch))
    taught_PD = student(**batch, teach=True)["taught_PD"]
    assert torch.equal(taught_PD, hidden_BSD[batch["is_valid_BS"]])
    for layer in student.moe_layers:
        assert not torch.equal(layer.router.gate.weight, layer.base.gate.weight)


def test_a_student_that_is_its_teacher_learns_nothing(base):
    student = make_student(base, "top_k", {"balance_weight": 0.0}, weight=1.0, tokens="text")
    batch = random_batch(5)
    parts = student(**batch, **student(**batch, teach=True))
    parts["loss"].backward()
    assert abs(parts["distill"]) < 1e-6 and parts["lm"] > 0.1
    assert all(p.grad.abs().max() < 1e-6 for p in student.trainable().values())


def test_what_a_checkpoint_holds_is_the_same_with_a_teacher(base):
    student = make_model(base, "gemoe", {})
    names = {name for name, _ in student.named_parameters()} | set(student.state_dict())
    assert not [name for name in names | set(student.router_state()) if ".base." in name]


def shared_formula(logits_PV, teacher_PV, temperature):
    log_q, log_p = ((z.float() / temperature).log_softmax(-1) for z in (logits_PV, teacher_PV))
    return kl_div(log_q, log_p, reduction="sum", log_target=True)


@pytest.mark.parametrize("rows", [0, 1, 700])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_divergence_and_its_gradient_are_torch_s(rows, dtype):
    g = torch.Generator().manual_seed(rows)
    teacher, *students = (4 * torch.randn(3, rows, 31, generator=g)).to(dtype)
    students[1] = students[0].clone()
    found = []
    for logits, function in zip(students, (divergence, shared_formula), strict=True):
        logits.requires_grad_()
        value = function(logits, teacher, 0.7)
        (value * 0.3).backward()
        found.append((value, logits.grad))
    (have, have_grad), (want, want_grad) = found
    assert have.dtype == torch.float32 and have_grad.dtype == dtype
    torch.testing.assert_close(have, want, rtol=1e-5, atol=1e-6)
    exact = dtype == torch.float32
    torch.testing.assert_close(
        have_grad, want_grad, rtol=1e-5 if exact else 2**-7, atol=1e-6 if exact else 1e-3
    )
