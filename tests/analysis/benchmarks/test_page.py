"""The HTML page stands alone, and sorts its tables in a real browser."""

from __future__ import annotations

import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from gemoe_ds.analysis.benchmarks.collect import read_modes
from gemoe_ds.analysis.benchmarks.groups import models_of
from gemoe_ds.analysis.benchmarks.page import render_html
from gemoe_ds.analysis.benchmarks.tables import build_results
from gemoe_ds.analysis.results import FigureFile
from tests.analysis.benchmarks.folders import demo_run

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or ""
CLICKS = """
<script>
window.onerror = (message) => { document.title = "error: " + message; };
const heads = [...document.querySelectorAll("table")[0].querySelectorAll("th")];
const named = (name) => heads.find((head) => head.textContent === name);
const column = (name) => [...document.querySelectorAll("table")[0].tBodies[0].rows]
  .map((row) => row.cells[named(name).cellIndex].textContent);
const said = [];
for (const name of ["GQA", "GQA", "Method", "N"]) {
  named(name).click();
  said.push([name, named(name).getAttribute("aria-sort"), ...column(name)].join("|"));
}
const word = document.querySelector(".written span");
document.querySelector("details").open = true;
said.push(["seen", document.images[0].naturalWidth, word.getBoundingClientRect().width > 0,
           getComputedStyle(word).backgroundColor].join("|"));
document.title = said.join(";");
</script>
"""


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("page")
    runs = read_modes([demo_run(folder / "run", {"gqa": 20, "gsm8k": 10})])
    results = build_results(runs, command="gemoe <b> & 'c'")
    Image.fromarray(np.zeros((9, 9, 3), np.uint8)).save(folder / "dark.png")
    figure = FigureFile(file="dark.png", caption="k < 3, *first seed*")
    (model,) = models_of(runs)
    answers = [(group, group.first) for group in model.groups]
    return render_html(results.model_copy(update={"figures": (figure,)}), folder, answers)


def test_it_is_whole_and_reaches_for_nothing(page: str) -> None:
    class Reader(HTMLParser):
        def __init__(self) -> None:
            super().__init__()
            self.open: list[str] = []
            self.seen: list[str] = []

        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            self.seen.append(tag)
            if tag not in ("meta", "img"):
                self.open.append(tag)
            for name, value in attrs:
                if name in ("src", "href"):
                    assert (value or "").startswith(("data:image/png;base64,", "#"))

        def handle_endtag(self, tag: str) -> None:
            assert self.open.pop() == tag

    reader = Reader()
    reader.feed(page)
    assert not reader.open and "link" not in reader.seen and reader.seen.count("script") == 1
    assert "http:" not in page and "https:" not in page and "@import" not in page
    for anchor in re.findall('href="#([^"]+)"', page):
        assert f'id="{anchor}"' in page


def test_text_of_users_is_text(page: str) -> None:
    assert "<code>gemoe &lt;b&gt; &amp; 'c'</code>" in page.replace("&#x27;", "'")
    assert "&lt;What&gt; is 1 &amp; 1?" in page and "<What>" not in page
    assert "k &lt; 3, <em>first seed</em>" in page


def test_words_have_the_colour_of_their_k(page: str) -> None:
    words = re.findall(
        r'<span style="background: (#\w{6})" title="k ([\d.]+)">([^<]*)</span>', page
    )
    colours = {text: (colour, k) for colour, k, text in words}
    assert colours["It"][1] == "1.00" and colours[" &lt;is&gt;"][1] == "2.50"
    red = [int(colours[word][0][3:5], 16) for word in ("It", " &lt;is&gt;", " 0\n")]
    assert red == sorted(red, reverse=True) and len(set(red)) == 3, "more experts, darker"
    assert page.count("<details>") == 3 * 2, "three methods, two tasks"


@pytest.mark.skipif(not BROWSER, reason="no chromium: make cluster-tools")
def test_a_click_on_a_heading_sorts(page: str, tmp_path: Path) -> None:
    (tmp_path / "page.html").write_text(page.replace("</body>", CLICKS + "</body>"))
    options = "--headless --no-sandbox --disable-gpu --disable-dev-shm-usage --dump-dom".split()
    done = subprocess.run(
        [BROWSER, *options, f"--user-data-dir={tmp_path}/profile", f"file://{tmp_path}/page.html"],
        capture_output=True,
        text=True,
        timeout=60,
    )
    title = re.search("<title>(.*?)</title>", done.stdout, re.DOTALL)
    assert title, done.stderr
    *sorts, seen = [line.split("|") for line in title[1].split(";")]
    assert seen[:3] == ["seen", "9", "true"], "the figure and the words"
    assert seen[3].startswith("rgb(") and seen[3] != "rgb(0, 0, 0)"
    names, ways = [line[0] for line in sorts], [line[1] for line in sorts]
    assert names == ["GQA", "GQA", "Method", "N"]
    assert ways == ["descending", "ascending", "descending", "descending"]
    down, up, methods, sizes = (line[2:] for line in sorts)
    values = [float(text.split()[0]) for text in down]
    assert len(values) == 8 and values == sorted(values, reverse=True)
    assert up == down[::-1]
    assert methods[0].startswith("Top-P") and methods[-1].startswith("AdaMoE")
    assert sizes[0] == "2.05B" and sizes[-1].endswith("M"), "by the number, not by its text"
