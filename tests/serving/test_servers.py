"""Which servers are found, and what a process that fails leaves: its reason, and its log."""

from __future__ import annotations

import sys

import pytest

from gemoe_ds.errors import ConfigError
from gemoe_ds.serving import ask
from gemoe_ds.serving.exchange import (
    STATIC,
    TRAINED,
    Answer,
    Job,
    Prompt,
    Served,
    read_job,
    read_served,
    write_job,
)
from gemoe_ds.serving.servers import Server, _environment, find_servers, run

JOB = Job("folder", TRAINED, (Prompt("a", ("b.png",)), Prompt("c")), "float32", 4, 2, 1)


def script(folder, text):
    """An interpreter that does what `text` says with the words of its command."""
    path = folder / "python"
    path.write_text(f"#!{sys.executable}\nimport json, os, sys\n{text}\n")
    path.chmod(0o755)
    return path


def test_vllm_of_another_environment_is_found_with_its_plugins(tmp_path):
    path = script(tmp_path, 'print(json.dumps({"vllm": True, "plugins": ["gemoe", "x"]}))')
    here, there = find_servers(path)
    assert here == Server("transformers", sys.executable) and here.routes
    assert there == Server("vllm", str(path), ("gemoe", "x")) and there.routes
    assert not Server("vllm", str(path), ("x",)).routes


def test_this_interpreter_says_what_it_has():
    from importlib.util import find_spec

    names = [server.name for server in find_servers(None)]
    assert names == ["transformers", *(["vllm"] if find_spec("vllm") else [])]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('print(json.dumps({"vllm": False, "plugins": []}))', "cannot import vllm"),
        ("sys.exit('libtorch is broken')", "is no Python that runs: libtorch is broken"),
        ("sys.exit(3)", "is no Python that runs: exit code 3"),
    ],
)
def test_an_interpreter_without_vllm_is_one_line(text, words, tmp_path):
    with pytest.raises(ConfigError, match=words):
        find_servers(script(tmp_path, text))
    with pytest.raises(ConfigError, match="does not start"):
        find_servers(tmp_path / "nothing")


GOOD = Served("1.0", "cpu", [Answer([1], [2], [-0.5], [3], [-1.5], "x")], 4, [0.5, 2.0], 1.0)


def test_a_job_goes_there_and_what_was_served_comes_back(tmp_path):
    """Through the real files; the module that is named is this package's."""
    text = f"""
from importlib.util import find_spec
sys.path[:0] = os.environ["PYTHONPATH"].split(os.pathsep)[:1]
assert sys.argv[1:4] == ["-m", "gemoe_ds.serving.ask", "transformers"] and find_spec(sys.argv[2])
assert os.environ["HF_HUB_OFFLINE"] == "1"
out = {GOOD.__dict__ | {"answers": [GOOD.answers[0].__dict__]}!r}
open(sys.argv[5], "w").write(json.dumps(out))
"""
    assert run(Server("transformers", str(script(tmp_path, text))), JOB, tmp_path) == GOOD
    assert read_job(tmp_path / "transformers_trained.job.json") == JOB
    assert GOOD.tokens_per_second == 8.0


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("print('so', 'much'); sys.exit(7)", "trained k: it ended with exit code 7"),
        ("os.kill(os.getpid(), 9)", "trained k: it ended with exit code -9"),
        ("open(sys.argv[5], 'w').write(json.dumps({'error': 'E: x'}))", "trained k: E: x"),
    ],
)
def test_a_server_that_fails_says_why_and_where_its_log_is(text, words, tmp_path):
    with pytest.raises(ConfigError) as refusal:
        run(Server("transformers", str(script(tmp_path, text))), JOB, tmp_path)
    log = tmp_path / "transformers_trained.log"
    assert words in str(refusal.value) and f"its log: {log}" in str(refusal.value)
    assert log.exists()


def test_static_k_in_vllm_leaves_our_plugin_out_and_no_other(tmp_path):
    from dataclasses import replace

    server = Server("vllm", sys.executable, ("ascend", "gemoe"))
    static = _environment(server, replace(JOB, mode=STATIC), tmp_path)
    assert static["VLLM_PLUGINS"] == "ascend"
    assert "VLLM_PLUGINS" not in _environment(server, JOB, tmp_path)


def test_a_server_that_cannot_even_be_imported_says_why(tmp_path, capsys):
    write_job(JOB, tmp_path / "job.json")
    assert ask.main("nothing", str(tmp_path / "job.json"), str(tmp_path / "out.json")) == 1
    said = read_served(tmp_path / "out.json")
    assert said == "ModuleNotFoundError: No module named 'gemoe_ds.serving.ask_nothing'"
    assert "Traceback" in capsys.readouterr().err
