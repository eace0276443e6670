"""pytest collects all tests without the harnesses: those of some marks run without them."""

from __future__ import annotations

from pathlib import Path

from tests.helpers import repository
from tests.imports import at_once, files_of, owner, reachable

HARNESSES = {"lm_eval", "lmms_eval"}
FOLDERS = ("gemoe_ds", "benchmarks", "experiments", "tests")


def needing_harnesses(root: Path) -> list[str]:
    """Files of tests that cannot be imported without the harnesses."""
    files = files_of(root, *FOLDERS)
    imports, harness = {}, set()
    for module, path in files.items():
        names = at_once(module, path, checked=False)
        if any(name.partition(".")[0] in HARNESSES for name in names):
            harness.add(module)
        owners = {owner(name, files) for name in names}
        imports[module] = {m for name in owners for m in (name, *_above(name))} & files.keys()
    tests = [module for module in files if module.startswith("tests.")]
    return [m for m in tests if ({m} | reachable(m, imports)) & harness]


def _above(name: str) -> list[str]:
    """The packages that importing a module imports."""
    parts = name.split(".")
    return [".".join(parts[:n]) for n in range(1, len(parts))]


def test_no_file_of_tests_needs_the_harnesses_to_be_imported() -> None:
    assert needing_harnesses(repository()) == []


def test_one_that_does_is_found(tmp_path: Path) -> None:
    files = {
        "gemoe_ds/__init__": "",
        "gemoe_ds/a": "import lm_eval.tasks",
        "gemoe_ds/b/__init__": "from gemoe_ds import a",
        "gemoe_ds/b/c": "",
        "tests/late": "def test():\n    import lm_eval\n    from gemoe_ds import a",
        "tests/typed": "if TYPE_CHECKING:\n    from gemoe_ds.a import x",
        "tests/direct": "from lmms_eval.api import x",
        "tests/through": "from gemoe_ds.a import x",
        "tests/by_a_package": "import gemoe_ds.b.c",
    }
    for name, source in files.items():
        path = tmp_path / f"{name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source)
    found = ["tests.by_a_package", "tests.direct", "tests.through"]
    assert needing_harnesses(tmp_path) == found
