"""The data card: what it counts, by a recipe, by a tokenizer and without; text, JSON, PNG, HTML."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import yaml

from gemoe_ds.cli.data.card import main
from gemoe_ds.config.load import load_config
from gemoe_ds.data.collate import Collator
from gemoe_ds.data.dropped import Dropped
from gemoe_ds.data.sample import Message, Picture, Sample, open_samples, write_samples
from gemoe_ds.train.assemble import meta_collator
from tests.data.sources.layouts import BLUE, RED
from tests.tiny import SHAPE, write_tokenizer

PICTURES = Picture(RED, 8, 6), Picture(BLUE, 12, 10)


def talk(*texts: str, loss: bool = True) -> tuple[Message, ...]:
    pairs = zip(texts[::2], texts[1::2], strict=True)
    return tuple(m for q, a in pairs for m in (Message("user", q), Message("assistant", a, loss)))


SAMPLES = [
    Sample("0", talk("<image>a b", "c d e"), PICTURES[:1], "eyes"),
    Sample("1", talk("<image>a b", "c d e"), PICTURES[1:], "eyes"),
    Sample("2", talk("<image>a b", "c d e"), PICTURES[:1], "eyes"),  # 0 again
    Sample("3", talk("a", "b c d e f g h i j k", "l", "m"), source="talk"),
    Sample("4", (Message("system", "a"), *talk("b", "c", loss=False), *talk("d", "e")), (), "talk"),
]


@pytest.fixture
def folder(tmp_path):
    rows = [*SAMPLES, Dropped("x", "gone", "picture missing")]
    write_samples(rows, tmp_path / "data", source="rows.json")
    return tmp_path


def card(folder, *options):
    main([str(word) for word in (folder / "data", *options)])
    return json.loads((folder / "data/card/card.json").read_text())


def test_counts_without_a_tokenizer(folder, capsys):
    found = card(folder)
    assert (found["samples"], found["rows_dropped"], found["tokens"]) == (5, 1, None)
    assert found["messages"] == {"user": 7, "assistant": 7, "system": 1}
    assert found["answers_not_learned"] == 1
    assert found["answers_a_sample"] == {"number": [1, 2], "samples": [4, 1]}
    assert found["pictures_a_sample"] == {"number": [0, 1], "samples": [2, 3]}
    pictures = found["pictures"]
    assert (pictures["shown"], pictures["stored"], pictures["size_unknown"]) == (3, 2, 0)
    assert (pictures["width"]["min"], pictures["height"]["max"]) == (8, 10)
    assert found["duplicates"] == {"samples": 1, "first": ["2"]}
    assert [row["source"] for row in found["sources"]] == ["eyes", "talk"]
    assert [row["samples"] for row in found["sources"]] == [3, 2]
    said = capsys.readouterr().out
    assert "pictures: 3 shown, 2 stored; 8 x 6 (medians), from 8 x 6 to 12 x 10" in said
    assert "duplicates: 1 samples (first: 2); --dedup exact drops them" in said
    names = {path.name for path in (folder / "data/card").iterdir()}
    assert names == {"card.json", "card.html", "pictures.png", "turns.png", "sources.png"}
    assert open_samples(folder / "data", verify=True)[0] == SAMPLES[0]


def test_tokens_are_those_of_a_run(folder, capsys):
    """Lengths, cuts and what is left out as the recipe's own collator makes them."""
    recipe = {
        "output_dir": "unused",
        "model": {
            "backbone": {"name": "tiny", **SHAPE},
            "router": {"name": "top_k"},
            "trainable": "all",
        },
        "data": {
            "train_path": "unused",
            "tokenizer": str(write_tokenizer(folder / "tokenizer")),
            "max_length": 12,
        },
        "optim": {"lr": 1e-3},
        "train": {"steps": 1, "micro_batch_size": 1},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    asked = [*SAMPLES[:4], replace(SAMPLES[4], messages=SAMPLES[4].messages[1:])]  # no system
    (folder / "data").rename(folder / "other")
    write_samples(asked, folder / "data", source="rows.json")
    found = card(folder, "--recipe", folder / "recipe.yaml", "data.max_length=13")["tokens"]
    collator: Collator = meta_collator(load_config(folder / "recipe.yaml", ["data.max_length=99"]))
    encoded = [collator.encode(row, sample) for row, sample in enumerate(asked)]
    lengths = [len(e.input_ids) for e in encoded]
    assert found["total"] == sum(lengths) and found["a_sample"]["max"] == max(lengths)
    assert found["of_images"] == sum(sum(e.is_vision) for e in encoded) > 0
    assert found["max_length"] == 13 and sum(found["histogram"]["counts"]) == 5
    collator = meta_collator(load_config(folder / "recipe.yaml", ["data.max_length=13"]))
    short = [collator.encode(row, sample) for row, sample in enumerate(asked)]
    assert found["cut_answers"] == sum(e.cut_answers for e in short) > 0
    assert found["targets"] == sum(label >= 0 for e in short for label in e.labels)
    said = capsys.readouterr().out
    assert "tokens (recipe recipe): " in said and "data.max_length=13: cuts " in said
    assert (folder / "data/card/lengths.png").stat().st_size > 5000


def test_texts_by_a_tokenizer_and_one_page_of_it(folder):
    found = card(folder, "--tokenizer", write_tokenizer(folder / "tokenizer"))["tokens"]
    assert (found["total"], found["targets"], found["max_length"]) == (33, 21, None)
    page = (folder / "data/card/card.html").read_text()
    assert page.count("<img") == page.count("data:image/png;base64,") == 4
    for words in (
        "picture missing",
        "eyes",
        "tokenizer tokenizer",
        "<title>Data card: data</title>",
    ):
        assert words in page
    assert "http" not in page.replace("http-equiv", "")


@pytest.mark.parametrize(
    "words, said",
    [
        (["none"], "no manifest.json there"),
        (["data", "--recipe", "a", "--tokenizer", "b"], "--recipe or --tokenizer, not both"),
        (["data", "data.max_length=3"], "data.max_length=3: an option of a recipe"),
        (["data", "--out", "file/card"], "Not a directory: choose another --out"),
    ],
)
def test_mistakes_are_one_line(folder, monkeypatch, capsys, words, said):
    monkeypatch.chdir(folder)
    (folder / "file").write_text("")
    with pytest.raises(SystemExit) as stop:
        main(words)
    assert stop.value.code == 2 and said in capsys.readouterr().err
