"""Programs of a model: what passes, and what a program that means ill cannot do."""

from __future__ import annotations

import itertools
import sys
import tempfile
import time
from pathlib import Path

import psutil
import pytest

from gemoe_ds.evaluation.benchmarks.code import Limits, all_pass, pass_at_k, passes, refused

QUICK = Limits(seconds=1, wall_seconds=1.0, memory=200 << 20, file=1000)


def test_what_passes_and_what_does_not() -> None:
    check = "\ndef check(c):\n    assert c(1) == 3\ncheck(f)"
    programs = [
        "def f(x):\n    return x + 2" + check,
        "def f(x):\n    return x + 3" + check,
        "def f(x):\n    return y" + check,
        "def f(x:\n" + check,
        "raise SystemExit(0)",
        "import os; os._exit(0)",
        "import os; os._exit(96)",
        "import os; os.abort()",
        "import os; os.kill(os.getpid(), 15)",
        "",
        "import os; os.wait() if os.fork() else None",
    ]
    assert all_pass(programs, 2) == [True] + 8 * [False] + 2 * [True]


@pytest.mark.parametrize(
    "program",
    [
        "while True: pass",
        "import time; time.sleep(60)",
        "a = bytearray(1 << 29)",
        "with open('large', 'wb') as file: file.write(bytes(2000))",
        "import subprocess; subprocess.run(['sleep', '60'], check=True)",
    ],
)
def test_what_takes_too_much_fails_in_time(program: str) -> None:
    began = time.perf_counter()
    assert not passes(program, QUICK)
    assert time.perf_counter() - began < 20


def test_it_runs_in_an_empty_folder_that_goes_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    program = (
        "import os\nassert os.listdir() == []\nopen('mine', 'w').write('x')\n"
        "assert open('mine').read() == 'x' and 'PATH' not in os.environ"
    )
    assert passes(program)
    assert not [*tmp_path.iterdir()]


def test_it_writes_nowhere_else(tmp_path: Path) -> None:
    if refused() is not None:
        pytest.skip(str(refused()))
    place = tmp_path / "file"
    assert not passes(f"open({str(place)!r}, 'w')")
    assert passes("open('/dev/null', 'w').write('x')")
    assert not place.exists()


def test_nothing_of_it_goes_on_running() -> None:
    if refused() is not None:
        pytest.skip(str(refused()))
    word = f"gemoe_daemon_{time.time_ns()}"
    daemon = (
        "import os, time\nif os.fork() == 0:\n    os.setsid()\n    if os.fork() == 0:\n"
        f"        os.execv({sys.executable!r}, ['{word}', '-c', 'import time; time.sleep(30)'])\n"
        "    os._exit(0)"
    )
    assert passes(daemon)
    running = [" ".join(p.info["cmdline"] or ()) for p in psutil.process_iter(["cmdline"])]
    assert not [words for words in running if word in words]


def test_it_has_no_network() -> None:
    if refused() is not None:
        pytest.skip(str(refused()))
    program = (
        "import socket\n"
        "server = socket.socket()\nserver.bind(('127.0.0.1', 0))\nserver.listen()\n"
        "socket.create_connection(server.getsockname(), 2)"
    )
    assert not passes(program)  # not even the machine's own
    assert passes("import socket\nassert [n for _, n in socket.if_nameindex()] == ['lo']")


@pytest.mark.parametrize(("samples", "right", "k"), [(1, 1, 1), (1, 0, 1), (5, 2, 1), (6, 3, 4)])
def test_pass_at_k_is_its_definition(samples: int, right: int, k: int) -> None:
    results = [place < right for place in range(samples)]
    drawn = [any(chosen) for chosen in itertools.combinations(results, k)]
    assert pass_at_k(samples, right, k) == pytest.approx(sum(drawn) / len(drawn))
