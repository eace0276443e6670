"""What the plugin's wheel holds: its entry point, and the routing code as it stands here."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import PathDistribution

import pytest
from packaging.requirements import Requirement

from gemoe_ds import __version__
from gemoe_ds.export.sources import closure
from tests.helpers import repository


def test_the_routing_code_is_that_of_training(installed):
    copy, root = installed / "gemoe_vllm/_gemoe", repository() / "gemoe_ds"
    found = {path.relative_to(copy) for path in copy.rglob("*.py")}
    for path in found - {(copy / "__init__.py").relative_to(copy)}:
        text = (copy / path).read_text(encoding="utf-8")
        assert text.replace("from gemoe_vllm._gemoe", "from gemoe_ds") == (root / path).read_text()
    routers = [f"gemoe_ds.routers.{path.stem}" for path in (root / "routers").glob("*.py")]
    needed = {module.removeprefix("gemoe_ds.").replace(".", "/") for module in closure(routers)}
    assert {f"{name}.py" for name in needed} <= set(map(str, found))


def test_it_asks_for_neither_vllm_nor_the_project(wheel, installed):
    (info,) = installed.glob("*.dist-info")
    found = PathDistribution(info)
    assert found.version == __version__, "of the routing code that it carries"
    (entry,) = found.entry_points
    assert (entry.group, entry.value) == ("vllm.general_plugins", "gemoe_vllm:register")
    names = {Requirement(line).name for line in found.requires or ()}
    assert names == {"torch", "numpy", "pydantic", "prometheus-client"}


def test_it_runs_where_the_project_is_not(installed):
    code = """
import sys
import gemoe_vllm
from importlib.metadata import version
assert gemoe_vllm.__version__ == version("gemoe-vllm")
assert "torch" not in sys.modules
from gemoe_vllm import counts, described, options, padding, routing, versions
assert not {"gemoe_ds", "deepspeed", "transformers", "vllm"} & sys.modules.keys()
from gemoe_vllm._gemoe.moe.router import Router
print(*Router.names())
"""
    run = [sys.executable, "-c", code]
    done = subprocess.run(
        run, cwd=installed, capture_output=True, text=True, timeout=60, env={"PATH": ""}
    )
    assert done.returncode == 0, done.stderr
    assert {"gemoe", "threshold", "zeda"} <= set(done.stdout.split())


@pytest.mark.parametrize("version", ["0.29.0", "0.32.1", "0.33.0", "0.31.0rc1+cpu", "0.30"])
def test_versions_that_are_supported(version):
    from gemoe_vllm.versions import check

    check(version)


@pytest.mark.parametrize("version", ["0.28.1", "0.34.0", "1.30.0", "0.3.0", "dev", "0.290.0"])
def test_other_versions_are_refused_by_name(version):
    from gemoe_vllm.versions import check

    with pytest.raises(RuntimeError, match="0.29 to 0.33, this is .*VLLM_PLUGINS=") as refused:
        check(version)
    assert version in str(refused.value) and "\n" not in str(refused.value)
