"""Only what the export wrote is run: a changed, lost or foreign file of code is told by name."""

from __future__ import annotations

import json
import shutil

import pytest

from gemoe_ds.errors import CheckpointError
from gemoe_ds.export.code_record import KEY, MADE_FROM, PROVENANCE, check_code
from gemoe_ds.files import sha256_of
from tests.export.test_folder import written
from tests.models.cases import write_case


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    root = tmp_path_factory.mktemp("code")
    base, tokenizer = write_case("olmoe", root)
    (base / "modeling_own.py").write_text("from .helper_own import x\n")
    return written("olmoe", base, tokenizer, root / "out")


@pytest.fixture
def folder(exported, tmp_path):
    return shutil.copytree(exported, tmp_path / "copy")


def with_auto_map(folder, file, value):
    path = folder / file
    content = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(content | {"auto_map": value}))


def test_what_the_export_wrote_is_listed_and_accepted(folder):
    listed = json.loads((folder / PROVENANCE).read_text())[KEY]
    assert "modeling_gemoe.py" in listed and "gemoe_routers_gemoe.py" in listed
    assert "modeling_own.py" not in listed, "of the base, and not run"
    assert listed.keys() == {p.name for p in folder.glob("*.py")} - {"modeling_own.py"}
    check_code(folder)
    (folder / "modeling_own.py").write_text("raise SystemExit\n")
    check_code(folder)


def change(folder):
    path = folder / "gemoe_moe_plan.py"
    path.write_text(path.read_text() + "\n")


def put_right(folder, **changes):
    """The list says what is in the folder: as who wrote both would have it."""
    made = json.loads((folder / PROVENANCE).read_text())
    made[KEY] = {name: sha256_of(folder / name) for name in made[KEY]}
    (folder / PROVENANCE).write_text(json.dumps(made | changes))


def reach_further(folder):
    path = folder / "modeling_gemoe.py"
    path.write_text(path.read_text() + "from .helper_own import x\n")
    put_right(folder)


FAULTS = {
    "changed": (change, "gemoe_moe_plan.py is not as the export wrote it"),
    "gone": (lambda f: (f / "gemoe_moe_plan.py").unlink(), "gemoe_moe_plan.py is gone"),
    "no list": (lambda f: (f / PROVENANCE).write_text("{}"), "provenance.json lists no code"),
    "no file": (lambda f: (f / PROVENANCE).unlink(), "provenance.json lists no code"),
    "model of others": (
        lambda f: with_auto_map(f, "config.json", {"AutoModelForCausalLM": "modeling_own.Own"}),
        "config.json names modeling_own.py, which the export did not write",
    ),
    "tokenizer of others": (
        lambda f: with_auto_map(
            f, "tokenizer_config.json", {"AutoTokenizer": ["modeling_own.Own", None]}
        ),
        "tokenizer_config.json names modeling_own.py",
    ),
    "old form": (
        lambda f: with_auto_map(f, "tokenizer_config.json", ["modeling_own.Own", None]),
        "tokenizer_config.json names modeling_own.py",
    ),
    "processor of the hub": (
        lambda f: with_auto_map(
            f, "processor_config.json", {"AutoProcessor": "owner/name--modeling_gemoe.Own"}
        ),
        "processor_config.json names owner/name--modeling_gemoe.py",
    ),
    "import": (reach_further, "modeling_gemoe.py names helper_own.py"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_other_code_is_refused_by_name(fault, folder):
    plant, words = FAULTS[fault]
    plant(folder)
    with pytest.raises(CheckpointError) as refusal:
        check_code(folder)
    assert words in str(refusal.value) and "\n" not in str(refusal.value)


def by_somebody(folder):
    change(folder)
    put_right(folder)


def by_replacing(folder):
    """Lines that no export puts in place of others, said to be of one."""
    made = json.loads((folder / PROVENANCE).read_text())[MADE_FROM]
    line = "from torch import Tensor, nn"
    path = folder / "modeling_gemoe.py"
    path.write_text(path.read_text().replace(line, f"{line}; evil = 1"))
    made["replaced"]["gemoe_ds.export.modeling"][line] = f"{line}; evil = 1"
    put_right(folder, **{MADE_FROM: made})


def of_no_module(folder):
    made = json.loads((folder / PROVENANCE).read_text())[MADE_FROM]
    change(folder)
    put_right(folder, **{MADE_FROM: made | {"router": "gemoe_ds.no.such"}})


@pytest.mark.parametrize("plant", [by_somebody, by_replacing, of_no_module])
def test_code_that_this_package_does_not_write_needs_a_word(plant, folder):
    plant(folder)
    with pytest.raises(CheckpointError, match="is not what gemoe_ds .* writes; .* --trust-code"):
        check_code(folder)
    check_code(folder, trusted=True)


def test_trust_is_no_excuse_for_a_changed_file(folder):
    change(folder)
    with pytest.raises(CheckpointError, match="gemoe_moe_plan.py is not as the export wrote it"):
        check_code(folder, trusted=True)
