"""launch/evaluate.py and launch/generate.py on data of which some cannot be used, or is cut."""

from __future__ import annotations

import json

from gemoe_ds.data.sample import Turn, open_samples, write_samples
from tests.data.turns import cut_image, turns_of, with_turns
from tests.helpers import run_ranks
from tests.train.resuming import make_config, write_setting


def commands(rank, commands):
    from launch import evaluate, generate

    for name, arguments in commands:
        {"evaluate": evaluate, "generate": generate}[name].main(arguments)


def test_they_say_what_was_left_out(tmp_path):
    """Rows 1 (broken image) and 4 (no room for an answer) of 20; of 6 the second answer is cut."""
    setting = write_setting(tmp_path)
    good = open_samples(setting["data"])
    samples = [good[row] for row in range(len(good))]
    samples[1] = cut_image(samples[1], 60)
    samples[4] = with_turns(samples[4], Turn("a " * 70, "b", "x"), Turn("c", "d", "y"))
    samples[6] = with_turns(samples[6], turns_of(samples[6])[0], Turn("c", "d " * 70, "y"))
    write_samples(iter(samples), tmp_path / "harmed", source="test")
    config = make_config(setting, tmp_path / "run", data__max_length=64, parallel__ep_size=1)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(config.dump_yaml())
    given = [str(recipe), "--k", "2", "--data", str(tmp_path / "harmed"), "--batch", "3", "--out"]
    evaluated, generated = tmp_path / "evaluated", tmp_path / "generated"
    wanted = [
        ("evaluate", [*given, str(evaluated)]),
        ("generate", [*given, str(generated), "--max-new-tokens", "2"]),
    ]
    run_ranks(commands, 1, wanted)
    record = json.loads((evaluated / "eval.json").read_text())
    assert record["num_questions_by_kind"] == {"x": 18, "y": 17}
    assert record["num_not_asked_by_kind"] == {"x": 2, "y": 3} and record["num_cut_answers"] == 1
    assert [(bad["row"], (bad["needs"] or 0) > 64) for bad in record["left_out"]] == [
        (1, False),
        (4, True),
    ]
    costs = json.loads((generated / "throughput.json").read_text())
    assert [bad["row"] for bad in costs["left_out"]] == [1, 4]
    said = (generated / "throughput.md").read_text()
    assert "18 of 20 samples were answered" in said
    answers = [json.loads(x) for p in generated.rglob("answers.jsonl") for x in p.open()]
    assert len(answers) == 18 and not {"s1", "s4"} & {answer["id"] for answer in answers}
