"""serve-check on small folders: what transformers serves equals the model of training, and what the
command says of servers that do and do not agree."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import gemoe_ds.serving.check as check
from gemoe_ds.cli.serve_check import main
from gemoe_ds.serving.check import Options, Row, disagreements, line_of, serve_check
from gemoe_ds.serving.exchange import STATIC, TRAINED, Answer, Served
from gemoe_ds.serving.servers import Server
from tests.export.test_folder import written
from tests.helpers import run_python
from tests.models.cases import write_case

PROMPTS = ["a b c", "d e f g h i j", "t s"]
NEW = 6


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    root = tmp_path_factory.mktemp("served")
    base, tokenizer = write_case("olmoe", root)
    return written("olmoe", base, tokenizer, root / "out")


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text("\n".join(json.dumps({"text": text}) for text in PROMPTS))
    return path


def by_hand(folder, trust):
    """Greedy, token by token, without a cache: log-probabilities and k of all tokens."""
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=trust).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    found, k = [], []
    for text in PROMPTS:
        chat = [{"role": "user", "content": text}]
        asked = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt")
        ids = prompt = asked["input_ids"]
        logprobs = []
        for _ in range(NEW):
            with torch.no_grad():
                best = model(ids).logits[0, -1].log_softmax(-1).max(0)
            logprobs.append(best.values.item())
            if trust:
                k_LS = torch.stack(model.k_per_layer)[:, 0]
            ids = torch.cat([ids, best.indices.view(1, 1)], 1)
        found.append((prompt[0].tolist(), ids[0, prompt.shape[1] :].tolist(), logprobs))
        if trust:
            k.append(k_LS.double())
    return found, torch.cat(k, 1).mean(1).tolist() if trust else None


def test_answers_and_k_are_those_of_a_forward_without_a_cache(
    exported, prompts, in_this_process, capsys
):
    options = Options(prompts, max_new_tokens=NEW, batch=2, rounds=1)
    trained, static = serve_check(exported, options, print)
    said = capsys.readouterr().out
    for row, trust in ((trained, True), (static, False)):
        expected, k = by_hand(exported, trust)
        for answer, (prompt, ids, logprobs) in zip(row.served.answers, expected, strict=True):
            assert (answer.prompt_ids, answer.ids) == (prompt, ids)
            assert answer.logprobs == pytest.approx(logprobs, abs=1e-5)
            assert all(a >= b for a, b in zip(answer.logprobs, answer.second_logprobs, strict=True))
        assert row.served.mean_k == pytest.approx(k if trust else [3.0, 3.0])
        assert row.served.tokens == NEW * len(PROMPTS) and len(row.served.seconds) == 1
    assert 1 < trained.mean_k < 3, "k varies, else nothing is shown"
    assert static.agreement.equal < len(PROMPTS), "the two ways to route differ"
    assert f"trained k: mean k {trained.mean_k:.2f}" in said and "static k: mean k 3.00" in said
    assert disagreements([trained, static], options) == [], "the contrast is no fault"


def rows_with_vllm(change, rows=3):
    """A server whose answers at the trained k are `change` of those that it should give."""
    answers = [Answer([1], [n, 2], [-0.5, -0.5], [9, 9], [-2.0, -2.0]) for n in range(rows)]
    other = [replace(a, ids=[a.ids[0], 3]) for a in answers]
    made = {
        ("transformers", TRAINED): answers,
        ("transformers", STATIC): other,
        ("vllm", TRAINED): change(answers, other),
        ("vllm", STATIC): other,
    }
    found: list[Row] = []
    for (server, mode), given in made.items():
        served = Served("1.0", "cpu", given, 8, [2.0, 4.0], 1.0)
        found.append(check._row(server, mode, served, found, Options()))
    return found


def test_a_server_that_agrees_is_fine_and_its_speed_is_told():
    rows = rows_with_vllm(lambda answers, other: answers)
    assert disagreements(rows, Options()) == []
    said = line_of(rows[2])
    assert "mean k not told; 4 tokens/s (slowest round 2); 3 of 3 answers equal to" in said


def test_a_server_that_keeps_the_static_k_is_found_out():
    rows = rows_with_vllm(lambda answers, other: other)
    (wrong,) = disagreements(rows, Options())
    assert wrong.startswith("vllm, trained k, does not answer as transformers, trained k: 0 of 3")
    assert wrong.endswith("; its answers are those of the static k")
    assert disagreements(rows, Options(dtype="bfloat16")) == [], "nothing is judged"
    assert disagreements(rows, Options(dtype="bfloat16", tolerance=1.0)) != []


def test_log_probabilities_that_are_off_are_told():
    def off(answers, other):
        return [replace(a, logprobs=[-0.5, -0.49]) for a in answers]

    (wrong,) = disagreements(rows_with_vllm(off), Options())
    assert "3 of 3 equal, log-probabilities 1.0e-02 apart, 0.0001 is allowed" in wrong
    assert "static" not in wrong


def test_vllm_without_the_plugin_serves_the_static_k_alone(
    exported, prompts, in_this_process, monkeypatch, capsys
):
    servers = [Server("transformers", "python"), Server("vllm", "there/python")]
    monkeypatch.setattr(check, "find_servers", lambda python: servers)
    rows = serve_check(exported, Options(prompts, max_new_tokens=2, rounds=1), print)
    assert [(r.server, r.mode) for r in rows][2:] == [("vllm", STATIC)]
    assert "vllm: plugin gemoe-vllm is not installed in there/python" in capsys.readouterr().out
    assert rows[2].agreement.holds(0.0), "the same code answered"


def test_the_command_writes_what_it_found(exported, prompts, in_this_process, tmp_path, capsys):
    words = [exported, "--prompts", prompts, "--max-new-tokens", 3, "--rounds", 2]
    main([*map(str, words), "--out", str(tmp_path / "deep/check.json")])
    found = json.loads((tmp_path / "deep/check.json").read_text())
    assert found["agree"] is True and found["tolerance"] == 1e-4 and found["dtype"] == "float32"
    trained, static = found["servers"]
    assert trained["mode"] == "trained" and static["mean_k"] == 3.0
    assert len(trained["served"]["answers"]) == 3 and len(trained["served"]["seconds"]) == 2
    assert capsys.readouterr().out.count(" tokens/s (slowest round ") == 2


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--tolerance 0", "--tolerance 0: is more than 0"),
        ("--tolerance nan", "--tolerance nan: is more than 0"),
        ("--dtype int8", "argument --dtype: invalid choice: 'int8'"),
        ("--vllm 3", "argument --vllm: 3 is no JSON object"),
        ("--rounds 0", "0 is not a number from 1 to"),
        ("--prompts gone.jsonl", "--prompts gone.jsonl: "),
        ("--python gone", "--python gone does not start"),
    ],
)
def test_a_wrong_option_is_one_line(words, said, exported, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as end:
        main([str(exported), *words.split()])
    assert end.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and said.replace("gone does", f"{tmp_path}/gone does") in line


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (None, "config.json cannot be read"),
        ("[", "config.json cannot be read"),
        ("{}", "config.json has no `gemoe`"),
        ("[]", "config.json has no `gemoe`"),
        (
            '{"gemoe": {"router": {}, "blocks": [], "enabled": false}}',
            "config.json has gemoe.enabled: false",
        ),
        ('{"gemoe": {"router": {}, "blocks": []}}', "config.json names no model code (auto_map)"),
    ],
)
def test_a_folder_that_is_no_export_is_one_line(config, said, tmp_path, capsys):
    if config is not None:
        (tmp_path / "config.json").write_text(config)
    with pytest.raises(SystemExit) as end:
        main([str(tmp_path)])
    assert end.value.code == 2 and said in capsys.readouterr().err


@pytest.mark.slow
def test_the_command_as_it_is_in_processes_of_their_own(exported, prompts, tmp_path):
    """And a tampered folder is refused before anything of it is run."""
    options = ["--prompts", prompts, "--max-new-tokens", 2, "--out", tmp_path / "check.json"]
    done = run_python("launch/serve_check.py", exported, *options)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads((tmp_path / "check.json").read_text())
    assert [row["mode"] for row in found["servers"]] == ["trained", "static"]
    changed = shutil.copytree(exported, tmp_path / "changed")
    mark = tmp_path / "it_ran"
    with (changed / "modeling_gemoe.py").open("a") as file:
        file.write(f"\nopen({str(mark)!r}, 'w')\n")
    done = run_python("launch/serve_check.py", changed)
    assert done.returncode == 2 and not mark.exists()
    (line,) = done.stderr.splitlines()
    assert "modeling_gemoe.py is not as the export wrote it" in line
