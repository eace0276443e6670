"""The trained tokenizer: any text comes back, the same data gives the same files."""

from __future__ import annotations

import pytest

from gemoe_ds.cli.data.train_tokenizer import main
from gemoe_ds.data.sample import Turn, of_turns, write_samples
from gemoe_ds.data.train_tokenizer import ROLES, SPECIAL
from gemoe_ds.models.tokenizer import load_tokenizer


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "samples"
    colours = ("red", "green", "blue")
    rows = (
        of_turns(str(i), None, (Turn(f"What is left of the {c} square?", f"a {c} circle"),))
        for i in range(50)
        for c in colours
    )
    write_samples(rows, folder, source="test")
    return folder


def run(capsys, *arguments) -> tuple[int, str]:
    try:
        main([str(a) for a in arguments])
    except SystemExit as stop:
        return int(stop.code or 0), capsys.readouterr().err.strip().splitlines()[-1]
    return 0, ""


def test_any_text_comes_back(data, tmp_path, capsys):
    assert run(capsys, "--data", data, data, "--out", tmp_path / "t", "--vocab-size", 300)[0] == 0
    tokenizer = load_tokenizer(tmp_path / "t")
    assert tokenizer.convert_tokens_to_ids(SPECIAL) == [0, 1, 2, 3]
    assert len(tokenizer) == 300 + len(ROLES)
    for text in (
        " a red circle",
        "  two  spaces\n\ttab",
        "caf\u00e9 \u4f55 \U0001f600 \u0000",
        "<img>",
    ):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert tokenizer.decode(ids) == text and min(ids) > 3
    roles = tokenizer(" USER: ASSISTANT:", add_special_tokens=False)["input_ids"]
    assert roles == tokenizer.convert_tokens_to_ids(ROLES)


def test_the_same_data_gives_the_same_files(data, tmp_path, capsys):
    for name in ("a", "b"):
        assert run(capsys, "--data", data, "--out", tmp_path / name) == (0, "")
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()


@pytest.mark.parametrize(
    "options, words",
    [
        (["--vocab-size", "10"], "error: --vocab-size 10: bytes and special tokens alone are 260"),
        (["--data", "/nowhere"], "error: /nowhere: no manifest.json there"),
    ],
)
def test_refusals_are_one_line_and_leave_nothing(data, tmp_path, capsys, options, words):
    code, line = run(capsys, "--data", data, "--out", tmp_path / "t", *options)
    assert code == 2 and line.startswith(words)
    assert not list(tmp_path.iterdir())
