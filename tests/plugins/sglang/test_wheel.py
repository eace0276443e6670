"""What the plugin's wheel holds: models for SGLang, and routing code that is that of training."""

from __future__ import annotations

import ast
from importlib.metadata import PathDistribution

import pytest
from packaging.requirements import Requirement

from gemoe_ds import __version__
from tests.helpers import repository
from tests.imports import imported


def test_the_routing_code_is_that_of_training_and_of_the_other_plugin(sglang_installed):
    copy, root = sglang_installed / "gemoe_sglang/_gemoe", repository() / "gemoe_ds"
    found = [path.relative_to(copy) for path in copy.rglob("*.py") if path.parent != copy]
    assert len(found) > 30
    for path in found:
        text = (copy / path).read_text(encoding="utf-8")
        expected = (root / path).read_text(encoding="utf-8")
        assert text.replace("from gemoe_sglang._gemoe", "from gemoe_ds") == expected
    shared, source = sglang_installed / "gemoe_sglang/_served", repository() / "plugins/vllm"
    for name in ("counts", "described", "options", "routing"):
        text = (shared / f"{name}.py").read_text(encoding="utf-8")
        text = text.replace("gemoe_sglang._gemoe", "gemoe_vllm._gemoe")
        text = text.replace("gemoe_sglang._served", "gemoe_vllm")
        lines = zip(
            text.splitlines(),
            (source / f"gemoe_vllm/{name}.py").read_text(encoding="utf-8").splitlines(),
            strict=True,
        )
        other = [(ours, theirs) for ours, theirs in lines if ours != theirs]
        assert all("gemoe_options" in ours for ours, _ in other), other


def test_it_asks_for_neither_sglang_nor_the_project(sglang_wheel, sglang_installed):
    (info,) = sglang_installed.glob("*.dist-info")
    found = PathDistribution(info)
    names = {Requirement(line).name for line in found.requires or ()}
    assert names == {"torch", "numpy", "pydantic", "safetensors"}
    import gemoe_sglang

    assert found.version == gemoe_sglang.__version__ == __version__, "of the code that it carries"


def test_no_part_imports_the_project_and_few_import_sglang(sglang_installed):
    package = sglang_installed / "gemoe_sglang"
    tops = {
        str(path.relative_to(package)): {
            name.partition(".")[0] for _, name in imported(ast.parse(path.read_bytes()), "")
        }
        for path in package.rglob("*.py")
    }
    assert not [path for path, names in tops.items() if names & {"gemoe_ds", "deepspeed", "vllm"}]
    thin = {path for path, names in tops.items() if "sglang" in names}
    assert thin == {"models/olmoe.py", "models/qwen3_vl.py", "versions.py"}


def test_the_one_version_that_was_read_and_no_other():
    from gemoe_sglang.versions import check

    check("0.5.23")
    check("0.5.23+cpu")
    for version in ("0.5.22", "0.5.24", "0.6.0", "dev"):
        with pytest.raises(RuntimeError, match=f"SGLang 0.5.23, this is {version}; install"):
            check(version)
