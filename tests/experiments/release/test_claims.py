"""README and docs say what results/ says, and claim no figure that stands nowhere."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path

import pytest

from experiments.release.claim import ByHand, Claim, figures_without_claim, squeeze, state
from experiments.release.claims import all_claims, not_measured
from experiments.release.page import shown
from experiments.release.results import Results
from gemoe_ds.errors import DataError
from tests.helpers import repository

ROOT = repository()
PAGES = ["README.md", *sorted(str(page.relative_to(ROOT)) for page in ROOT.glob("docs/**/*.md"))]


@pytest.fixture(scope="module")
def words() -> dict[str, list[str]]:
    """What is claimed on each page, with the figures of today's results."""
    found = defaultdict(list)
    for claim in all_claims():
        found[claim.page].append(state(claim, ROOT / "results").words)
    return found


def text_of(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


@pytest.mark.parametrize("page", PAGES)
def test_a_page_says_what_the_results_say(page: str, words: dict[str, list[str]]) -> None:
    said = squeeze(text_of(page))
    assert [claim for claim in words[page] if claim not in said] == []


@pytest.mark.parametrize("page", PAGES)
def test_every_figure_of_a_page_is_claimed_or_is_no_measurement(
    page: str, words: dict[str, list[str]]
) -> None:
    covered = [*words[page], *not_measured().get(page, [])]
    assert figures_without_claim(text_of(page), covered) == []


def test_what_is_no_measurement_still_stands_on_its_page() -> None:
    for page, phrases in not_measured().items():
        said = squeeze(text_of(page))
        assert [phrase for phrase in phrases if squeeze(phrase) not in said] == [], page


def test_claims_are_of_pages_and_of_results_or_by_hand(words: dict[str, list[str]]) -> None:
    assert set(words) <= set(PAGES)
    for claim in all_claims():
        files = state(claim, ROOT / "results").files
        assert bool(files) != bool(claim.by_hand), claim


def test_the_table_has_every_claim() -> None:
    """`python -m experiments.release --page` writes it."""
    table = (ROOT / "results/README.md").read_text(encoding="utf-8")
    stated = [state(claim, ROOT / "results") for claim in all_claims()]
    assert [one.words for one in stated if shown(one.words) not in table] == []


def folder_of(tmp_path: Path, **files: object) -> Path:
    for name, data in files.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(data))
    return tmp_path


def test_a_claim_takes_its_figures_from_the_results(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, speed={"rows": [{"k": 8, "ms": 2.0}, {"k": 4, "ms": 1.26}]})
    claim = Claim("page.md", lambda r: f"k 4 takes {r.row('speed.json', k=4)['ms']:.1f}\n  ms")
    found = state(claim, folder)
    assert (found.words, found.files) == ("k 4 takes 1.3 ms", ("speed.json",))
    by_hand = state(Claim("page.md", "5 ms", ByHand("make it")), folder)
    assert (by_hand.words, by_hand.files) == ("5 ms", ())


def test_rows_that_are_lost_or_doubled_are_named(tmp_path: Path) -> None:
    results = Results(folder_of(tmp_path, speed={"rows": [{"k": 8}, {"k": 8}]}))
    with pytest.raises(DataError, match=r"2 rows of rows with {'k': 8}, not 1"):
        results.row("speed.json", k=8)
    with pytest.raises(DataError, match="0 rows"):
        results.row("speed.json", k=4)
    with pytest.raises(DataError, match=r"gone.json cannot be read"):
        results.json("gone.json")


@pytest.mark.parametrize(
    "measured",
    ["takes 1.25 of it", "93 % of it", "in 5 ms", ".42 to", "12 of 13 rows", "19 GiB", "-0.4 x",
     "3 minutes", "10,000 tokens/s", "+0.12 [x]", "1,234.5"],
)  # fmt: skip
def test_what_looks_measured_is_found(measured: str) -> None:
    assert figures_without_claim(f"It {measured} here.", [])
    assert not figures_without_claim(f"It {measured} here.", [f"It {measured}"])


@pytest.mark.parametrize(
    "page",
    ["`k=0.5`", "[a](results/5.1_ms.md)", "    in a block 1.25\n", "```\n1.25\n```", "k 8 of them",
     "version 0.4.13", "lm-eval 0.7.3 by name", "at 64 experts", "<!-- 1.25 -->"],
)  # fmt: skip
def test_code_links_versions_and_counts_do_not_look_measured(page: str) -> None:
    assert figures_without_claim(page, []) == []


def test_a_figure_beside_a_claim_is_found() -> None:
    page = "The layer takes 1.25 of it\nand 1.30 with the backward pass."
    (found,) = figures_without_claim(page, ["takes 1.25 of it"])
    assert found.startswith("1.30 in: ")
