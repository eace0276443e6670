"""Faults planted one at a time in a copy of the project: do the tests nearest to them notice?

`python -m tests.mutants` (`make mutants`); `--only NAME ..` for some. Exit code 1 if one survives.
The faults stand in tests/mutants.yaml. Each is tried in a process of its own, forked from this one,
which has imported the big packages and nothing of the project.
"""

from __future__ import annotations

import argparse
import compileall
import importlib
import os
import shutil
import sys
import tempfile
import time
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import yaml

REPOSITORY = Path(__file__).resolve().parent.parent
_BIG = ("numpy", "PIL.Image", "pydantic", "pytest", "torch", "torch.utils.tensorboard", "deepspeed")
_BIG += ("transformers.models.olmoe.modeling_olmoe", "deepspeed.runtime.zero.stage3", "grain")
_BIG += ("hypothesis", "xdist.plugin")
_MARKS = "not slow and not gpu and not cluster"


@dataclass(frozen=True)
class Mutant:
    """`old`, which the file has once, becomes `new`; `tests` are those that should fail, or
    `equivalent` says why none can."""

    file: str
    name: str
    old: str
    new: str
    tests: str
    equivalent: str = ""


def table() -> list[Mutant]:
    by_file = yaml.safe_load((REPOSITORY / "tests/mutants.yaml").read_text(encoding="utf-8"))
    return [
        Mutant(file, name, **({"tests": entry["tests"]} | fault))
        for file, entry in by_file.items()
        for name, fault in entry["faults"].items()
    ]


def survives(mutant: Mutant, root: Path) -> bool:
    with planted(mutant, root / mutant.file), tempfile.TemporaryFile("w+") as output:
        child = os.fork()
        if child == 0:
            _test(mutant, root, output.fileno())
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        output.seek(0)
        assert code in (0, 1), f"{mutant.name}: exit code {code}: {output.read()[-4000:]}"
    return code == 0


@contextmanager
def planted(mutant: Mutant, path: Path):
    text, before = path.read_text(encoding="utf-8"), path.stat()
    assert text.count(mutant.old) == 1, f"{mutant.name}: {path} has not once {mutant.old!r}"
    path.write_text(text.replace(mutant.old, mutant.new), encoding="utf-8")
    try:
        yield
    finally:
        path.write_text(text, encoding="utf-8")
        os.utime(
            path, ns=(before.st_atime_ns, before.st_mtime_ns)
        )  # its compiled file counts again


def _test(mutant: Mutant, root: Path, output: int) -> None:
    """In the forked process, which ends here: the project is that of the copy."""
    code = 70
    try:
        os.dup2(output, 1)
        os.dup2(output, 2)
        os.chdir(root)
        os.environ |= {"PYTHONPATH": str(root), "PYTHONDONTWRITEBYTECODE": "1"}
        sys.dont_write_bytecode = True
        sys.path[:] = [str(root), *(p for p in sys.path if Path(p or ".").resolve() != REPOSITORY)]
        for name in [n for n in sys.modules if n == "tests" or n.startswith("tests.")]:
            del sys.modules[name]
        importlib.invalidate_caches()
        import pytest

        words = ["-q", "-x", "-p", "no:cacheprovider", "-m", _MARKS, *mutant.tests.split()]
        code = int(pytest.main(words))
        sys.stdout.flush()
    finally:
        os._exit(code)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    mutants = [mutant for mutant in table() if not mutant.equivalent]
    parser.add_argument("--only", nargs="+", choices=[m.name for m in mutants], metavar="NAME")
    only = parser.parse_args().only
    chosen = [mutant for mutant in mutants if not only or mutant.name in only]
    began, survivors = time.monotonic(), 0
    for name in _BIG:
        importlib.import_module(name)
    assert not any(name.startswith("gemoe_ds") for name in sys.modules)
    with tempfile.TemporaryDirectory() as folder:
        ignored = shutil.ignore_patterns(".*", "runs", "__pycache__", "*.egg-info")
        root = Path(shutil.copytree(REPOSITORY, Path(folder).resolve() / "copy", ignore=ignored))
        compileall.compile_dir(root / "gemoe_ds", quiet=1)
        for mutant in chosen:
            start = time.monotonic()
            outcome = "SURVIVED" if survives(mutant, root) else "killed"
            survivors += outcome == "SURVIVED"
            print(f"{outcome:8} {mutant.name} ({time.monotonic() - start:.0f} s)", flush=True)
    seconds = time.monotonic() - began
    print(f"{len(chosen) - survivors} of {len(chosen)} killed in {seconds:.0f} s")
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main())
