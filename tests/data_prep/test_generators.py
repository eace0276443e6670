"""The generated data: LLaVA's format, the same for a seed, true answers, splits apart."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

from data_prep import make_digits, make_scenes
from data_prep.scenes import COLOURS, PROPERTIES, SHAPES, TEXTURES, Knowledge, draw, random_scene
from gemoe_ds.cli.data.convert import main as convert
from gemoe_ds.data.sample import open_samples

SMALL = ["--train", "30", "--validation", "5", "--test", "10", "--seed", "3"]


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    out = tmp_path_factory.mktemp("scenes") / "a"
    make_scenes.main(["--out", str(out), *SMALL])
    return out


def rows(folder, split):
    return json.loads((folder / f"{split}.json").read_text())


def test_files_are_llava_rows_with_images(scenes):
    for split, size in (("train", 30), ("validation", 5), ("test", 10)):
        kinds = json.loads((scenes / f"{split}_kinds.json").read_text())
        assert len(rows(scenes, split)) == len(kinds) == size
        for row in rows(scenes, split):
            assert set(row) == {"id", "image", "conversations"}
            assert [m["from"] for m in row["conversations"]] == ["human", "gpt"] * len(
                kinds[row["id"]]
            )
            assert row["conversations"][0]["value"].startswith("<image>\n")
            assert Image.open(scenes / "images" / row["image"]).size == (32, 32)


def test_same_seed_same_files(scenes, tmp_path):
    make_scenes.main(["--out", str(tmp_path / "b"), *SMALL])
    first, second = (
        {p.relative_to(at): p.read_bytes() for p in at.rglob("*") if p.is_file()}
        for at in (scenes, tmp_path / "b")
    )
    assert len(first) > 45 and first == second  # the images, and what is asked of them


def test_splits_share_no_scene_and_no_question_is_asked_twice(scenes):
    ids = [row["id"] for split in ("train", "validation", "test") for row in rows(scenes, split)]
    assert len(set(ids)) == len(ids)
    for row in rows(scenes, "train"):
        questions = [m["value"] for m in row["conversations"][::2]]
        assert len({q.removeprefix("<image>\n") for q in questions}) == len(questions)


def test_every_kind_occurs_and_held_out_splits_have_no_caption(scenes):
    kinds = {
        split: {
            k
            for ks in json.loads((scenes / f"{split}_kinds.json").read_text()).values()
            for k in ks
        }
        for split in ("train", "test")
    }
    everything = {
        "name",
        "find",
        "visit",
        "attribute",
        "place",
        "existence",
        "count",
        "relation",
        "text",
    }
    assert kinds["train"] == everything | {"caption"}
    assert kinds["test"] <= everything


def test_captions_are_those_of_the_training_split(scenes):
    for alone, row in zip(rows(scenes, "captions"), rows(scenes, "train"), strict=True):
        assert (alone["id"], alone["image"]) == (row["id"], row["image"])
        question, answer = alone["conversations"]
        assert question["value"] == "<image>\nDescribe the picture."
        assert answer in row["conversations"]
    kinds = json.loads((scenes / "captions_kinds.json").read_text())
    assert set(map(tuple, kinds.values())) == {("caption",)}


def test_knowledge_is_one_name_for_every_kind_of_object():
    knowledge = Knowledge(0)
    assert len(knowledge) == len(PROPERTIES) * len(SHAPES) * len(COLOURS) * len(TEXTURES)
    assert Knowledge(0)._names == knowledge._names != Knowledge(1)._names


def test_answers_are_true():
    """Each answer, derived again from the scene by other means."""
    import random

    knowledge = Knowledge(0)
    for number in range(200):
        rng = random.Random(number)
        scene = random_scene(rng)
        table = {(t.row, t.column): t for t in scene.things}
        for q in make_scenes.conversation(scene, knowledge, rng, 2, 6, True):
            words = q.text.rstrip("?").split()
            if q.kind == "count" and words[2] != "things":
                value = words[2]
                assert int(q.answer) == sum(
                    value in (t.shape, t.colour, t.texture) for t in scene.things
                )
            elif q.kind == "existence":
                there = {(t.colour, t.shape) for t in scene.things}
                assert q.answer == ("yes" if (words[3], words[4]) in there else "no")
            elif q.kind == "place":
                cell = (words[2] == "bottom", words[3] == "right")
                assert q.answer == getattr(table[cell], words[0])
            elif q.kind == "visit":
                thing = table[words[2] == "bottom", words[3] == "right"]
                assert q.answer == knowledge.name(words[0], thing)
            elif q.kind == "name":
                colour, texture, shape = words[-3:]
                assert q.answer == knowledge._names[words[0], shape, colour, texture]
            elif q.kind == "relation":
                first = table[words[3] == "bottom", words[4] == "right"]
                second = table[words[6] == "bottom", words[7] == "right"]
                same = getattr(first, words[1]) == getattr(second, words[1])
                assert q.answer == ("yes" if same else "no")


def test_kinds_of_objects_look_different():
    """No two kinds of objects have the same picture."""
    import random

    from data_prep.scenes import Scene, Thing

    pictures = set()
    for shape in SHAPES:
        for colour in COLOURS:
            for texture in TEXTURES:
                scene = Scene((Thing(shape, colour, texture, 0, 0),), None)
                pictures.add(np.asarray(draw(scene, random.Random(0))).tobytes())
    assert len(pictures) == len(SHAPES) * len(COLOURS) * len(TEXTURES)


@pytest.mark.parametrize("options", [["--max-things", "4"], ["--test", "0"]])
def test_impossible_options_are_one_line(tmp_path, capsys, options):
    with pytest.raises(SystemExit) as stop:
        make_scenes.main(["--out", str(tmp_path / "x"), *options])
    assert stop.value.code == 2 and "error: --" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_digits_are_real_pixels_with_true_answers(tmp_path):
    make_digits.main(["--out", str(tmp_path / "d")])
    assert [len(rows(tmp_path / "d", s)) for s in ("train", "validation", "test")] == [
        1439,
        179,
        179,
    ]
    for row in rows(tmp_path / "d", "test"):
        said = {
            q["value"].removeprefix("<image>\n"): a["value"]
            for q, a in zip(row["conversations"][::2], row["conversations"][1::2], strict=True)
        }
        digit = int(said["What digit is this?"])
        assert said["Is it even or odd?"] == ("odd" if digit % 2 else "even")
        assert int(said["What digit comes next after it?"]) == (digit + 1) % 10
    source = tmp_path / "d"
    convert(
        [
            "--json",
            str(source / "test.json"),
            "--kinds",
            str(source / "test_kinds.json"),
            "--images",
            str(source / "images"),
            "--out",
            str(tmp_path / "out"),
        ]
    )
    samples = open_samples(tmp_path / "out")
    assert len(samples) == 179 and {answer.kind for answer in samples[0].answers} == {
        "digit",
        "parity",
        "compare",
        "arithmetic",
    }
