"""Over HTTP a server with the plugin answers as the exported folder's own code does.

`make serve-env` and `make serve-test`; minutes a test, most of which vLLM takes to start.
"""

from __future__ import annotations

import json
import shutil

import pytest

from tests.models.small import noise
from tests.plugins.vllm.exported import (
    export_deepseek_vl2,
    export_qwen3_vl,
    own_answers,
    own_log_p,
    own_log_p_of_processor,
    prompts,
    routed,
    train_olmoe,
)
from tests.plugins.vllm.servers import refused, serving, worst

pytestmark = [pytest.mark.serve, pytest.mark.timeout(1800)]

EAGER = "--enforce-eager"  # without it vLLM compiles the model
BOUND = 1e-5  # of a log-probability, in float32
ROUTERS = {
    "gemoe": {"name": "gemoe", "k_low": 1, "k_high": 8},
    "threshold": {"name": "threshold"},
    "none": {"name": "gemoe", "k_low": 0, "k_high": 3},  # some tokens get no expert
}


def told(**options: object) -> tuple[str, str]:
    return "--additional-config", json.dumps({"gemoe": options})


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """By router: an exported folder, and the answers of its own code."""
    made = {}

    def of(name: str):
        if name not in made:
            folder = train_olmoe(tmp_path_factory.mktemp(name), ROUTERS[name])
            made[name] = folder, own_answers(folder, prompts())
        return made[name]

    return of


@pytest.mark.parametrize(
    "router, options",
    [
        ("gemoe", ()),
        ("gemoe", (EAGER, *told(slots="ragged"))),
        ("gemoe", (EAGER, *told(slots="zero"))),
        ("threshold", (EAGER,)),
        ("threshold", (EAGER, *told(slots="ragged"))),
        ("none", (EAGER,)),
        ("none", (EAGER, *told(slots="ragged"))),
        ("gemoe", ("--tensor-parallel-size", "2", EAGER)),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value),
)
def test_answers_are_those_of_the_folders_own_code(trained, router, options, tmp_path):
    folder, expected = trained(router)
    with serving(folder, tmp_path / "log", *options) as server:
        assert server.metrics() == {}, "what vLLM starts with is no request"
        served = server.complete_all(prompts())
        counted = server.metrics()
    equal, most = worst(served, expected)
    assert equal == len(expected) and most < BOUND
    tokens, used = routed(expected)
    for layer in range(2):
        assert counted[f'gemoe_routed_tokens_total{{layer="{layer}"}}'] == tokens
    assert counted["gemoe_mean_k"] == pytest.approx(used / tokens / 2, rel=1e-3)


def test_the_dial_of_a_server_moves_the_mean_k(trained, tmp_path):
    folder, expected = trained("gemoe")
    tokens, used = routed(expected)
    usual = used / tokens / 2
    with serving(folder, tmp_path / "log", EAGER, *told(k_shift=-2)) as server:
        served = server.complete_all(prompts())
        mean_k = server.metrics()["gemoe_mean_k"]
    assert 1 <= mean_k < usual - 0.5
    changed = shutil.copytree(folder, tmp_path / "changed")
    config = json.loads((changed / "config.json").read_text())
    config["gemoe"]["router"]["k_shift"] = -2
    (changed / "config.json").write_text(json.dumps(config))
    equal, most = worst(served, own_answers(changed, prompts()))
    assert equal == len(served) and most < BOUND


def test_pictures(tmp_path):
    """Of two sizes that are not scaled: vLLM's processor does that a little differently."""
    folder = export_qwen3_vl(tmp_path)
    template = tmp_path / "template.jinja"
    picture = "<|vision_start|><|image_pad|><|vision_end|>"
    template.write_text(
        "{% for message in messages %}{% for part in message['content'] %}"
        "{% if part['type'] == 'text' %}{{ part['text'] }}{% else %}" + picture + "{% endif %}"
        "{% endfor %}{% endfor %}"
    )
    with serving(folder, tmp_path / "log", EAGER, "--chat-template", str(template)) as server:
        for picture in (noise(16, 16), noise(12, 20)):
            answer = server.look(picture, " w3 w4 w5")
            log_p, best = own_log_p(folder, picture, answer)
            assert best == answer.tokens
            assert max(abs(a - b) for a, b in zip(log_p, answer.log_p, strict=True)) < BOUND
        assert 1 < server.metrics()["gemoe_mean_k"] < 3


def test_deepseek_vl2_answers_text_and_a_picture(tmp_path):
    """With the chat template of the folder, and vLLM's own processor for pictures."""
    folder, picture = export_deepseek_vl2(tmp_path), noise(384, 384)
    expected = own_answers(folder, prompts())
    options = ("--max-model-len", "2048", "--limit-mm-per-prompt", '{"image": 1}')
    with serving(folder, tmp_path / "log", EAGER, "--skip-mm-profiling", *options) as server:
        served = server.complete_all(prompts())
        counted = server.metrics()
        answer = server.look(picture, "w3 w4 w5")
    equal, most = worst(served, expected)
    assert equal == len(expected) and most < BOUND
    tokens, used = routed(expected)
    assert counted["gemoe_mean_k"] == pytest.approx(used / tokens / 2, rel=1e-3)
    log_p, best = own_log_p_of_processor(folder, picture, "w3 w4 w5", answer)
    assert best == answer.tokens
    assert max(abs(a - b) for a, b in zip(log_p, answer.log_p, strict=True)) < BOUND


def test_a_folder_without_gemoe_is_served_as_before(trained, tmp_path):
    base = trained("gemoe")[0].parent / "base"
    answers = []
    for environment in ({}, {"VLLM_PLUGINS": ""}):
        with serving(base, tmp_path / "log", EAGER, **environment) as server:
            answers.append([server.complete(prompt) for prompt in prompts()])
            assert server.metrics() == {}
    assert answers[0] == answers[1], "bit for bit"
    equal, most = worst(answers[0], own_answers(base, prompts(), own_code=False))
    assert equal == 20 and most < BOUND


@pytest.mark.parametrize(
    "change, options, message",
    [
        ({}, told(k_low=2), "gemoe.k_low cannot be set for router gemoe; it has slots, k_shift"),
        ({}, told(slots="padding_not_run_on_a_gpu"), "slots=padding_not_run_on_a_gpu is for CUDA"),
        ({"router": {"name": "alloc_moe"}}, (), "router alloc_moe cannot be served"),
        ({}, ("--enable-expert-parallel",), "leave --enable-expert-parallel out"),
        ({"quantised": True}, (), "a quantised base (compressed-tensors) is not served"),
    ],
)
def test_what_is_refused_is_said_in_a_line(trained, change, options, message, tmp_path):
    folder = shutil.copytree(trained("gemoe")[0], tmp_path / "changed")
    config = json.loads((folder / "config.json").read_text())
    if change.pop("quantised", False):
        config["quantization_config"] = int8()
    config["gemoe"] |= change
    (folder / "config.json").write_text(json.dumps(config))
    said = refused(folder, tmp_path / "log", EAGER, *options)
    assert any(message in line for line in said.splitlines())


def int8() -> dict:
    """As compressed-tensors writes it, of weights and activations in int8."""
    weights = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"}
    group = {
        "targets": ["Linear"],
        "weights": weights,
        "input_activations": weights | {"strategy": "token", "dynamic": True},
    }
    return {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
    }
