"""Checkpoint folders: found, verified, committed whole or not at all, whatever happens when."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from gemoe_ds.checkpoint import manifest
from gemoe_ds.checkpoint.commit import Stages, check_part, commit_parts
from gemoe_ds.checkpoint.manifest import candidates, clean, find, set_aside, verify
from gemoe_ds.checkpoint.writer import write_part
from gemoe_ds.errors import CheckpointError

RANKS = (0, 1)


def tensors(step: int, rank: int, size: int = 50) -> dict[str, torch.Tensor]:
    return {f"{name}.{rank}": torch.full((size, 3), step + rank / 2) for name in "ab"}


def save(output: Path, step: int, keep: int = 2, size: int = 50, spoil: bool = False) -> None:
    final = output / f"checkpoints/step-{step:06d}"
    temporary = final.with_name(f"{manifest.WRITING}{final.name}-x")
    for rank in RANKS:
        write_part(
            temporary,
            rank,
            tensors(step, rank, size),
            {"m/" + k: v for k, v in tensors(0, rank).items()},
        )
    if spoil:
        spoil_file(temporary / "weights-00001.safetensors")
    header = {"schema": manifest.SCHEMA, "step": step, "updates": step, "identity": {"seed": 0}}
    stages, failures = Stages(), []

    def check(number: int) -> None:
        try:
            check_part(temporary, (number, len(RANKS)), stages)
        except CheckpointError as error:
            failures.append(error)
            stages.cancel.set()

    checks = [threading.Thread(target=check, args=(n,)) for n in range(len(RANKS))]
    for thread in checks:
        thread.start()
    commit_parts(temporary, final, RANKS, header, keep, stages=stages)
    for thread in checks:
        thread.join()
    if failures:
        raise failures[0]


def spoil_file(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


@pytest.fixture
def output(tmp_path):
    save(tmp_path, 3)
    save(tmp_path, 6)
    return tmp_path


def test_what_is_saved_is_found(output):
    found, skipped = find("auto", output, {"seed": 0})
    assert found is not None and (found.step, skipped) == (6, [])
    assert (output / "checkpoints/latest").read_text() == "step-000006"
    read = dict(found.tensors(manifest.WEIGHTS))
    expected = tensors(6, 0) | tensors(6, 1)
    assert read.keys() == expected.keys()
    assert all(torch.equal(read[key], expected[key]) for key in read)
    assert dict(found.tensors(manifest.ADAM, {"m/a.1"})).keys() == {"m/a.1"}
    entry = found.manifest["tensors"]["a.1"]
    assert (entry["shape"], entry["dtype"], len(entry["sha256"])) == ([50, 3], "float32", 64)
    assert sorted(p.name for p in found.folder.iterdir()) == [
        "adam-00000.safetensors",
        "adam-00001.safetensors",
        "manifest.json",
        "weights-00000.safetensors",
        "weights-00001.safetensors",
    ]


HARMS = ["cut", "flip", "header", "remove", "swap", "old schema", "half manifest", "no manifest"]


@pytest.mark.parametrize("harm", HARMS)
def test_damage_is_named_and_auto_falls_back(output, harm):
    newest = output / "checkpoints/step-000006"
    victim = newest / "adam-00001.safetensors"
    content = victim.read_bytes()
    if harm == "cut":
        victim.write_bytes(content[:-1])
    elif harm == "flip":
        spoil_file(victim)
    elif harm == "header":
        victim.write_bytes(content.replace(b"m/a", b"m/c"))
    elif harm == "remove":
        victim.unlink()
    elif harm == "swap":
        victim.write_bytes((newest / "weights-00001.safetensors").read_bytes())
    elif harm == "old schema":
        (newest / "manifest.json").write_text('{"schema": 1}')
    elif harm == "half manifest":
        text = (newest / "manifest.json").read_text()
        (newest / "manifest.json").write_text(text[: len(text) // 2])
    else:
        (newest / "manifest.json").unlink()
    of_manifest = {"old schema": "schema 1", "half manifest": "manifest", "no manifest": "manifest"}
    with pytest.raises(CheckpointError, match=of_manifest.get(harm, victim.name)):
        find(str(newest), output, {})
    found, skipped = find("auto", output, {})
    assert found is not None and found.step == 3 and len(skipped) == 1


def test_every_rank_reads_its_share_and_together_they_read_all(output):
    newest = output / "checkpoints/step-000006"
    spoil_file(newest / "weights-00001.safetensors")
    outcomes = []
    for rank in range(3):
        try:
            verify(newest, (rank, 3))
            outcomes.append(True)
        except CheckpointError:
            outcomes.append(False)
    assert sorted(outcomes) == [False, True, True]


def test_auto_without_any_checkpoint_starts_anew_and_all_damaged_stops(tmp_path):
    assert find("auto", tmp_path, {}) == (None, [])
    assert find("none", tmp_path, {}) == (None, [])
    (tmp_path / "checkpoints/step-000001").mkdir(parents=True)
    with pytest.raises(CheckpointError, match="none of 1 checkpoints is whole"):
        find("auto", tmp_path, {})


def test_old_ones_go_and_the_order_is_by_number(tmp_path):
    for step in (999_998, 999_999, 1_000_000):
        save(tmp_path, step)
    assert [manifest.step_of(p) for p in candidates(tmp_path)] == [1_000_000, 999_999]


def test_a_copy_that_a_user_has_put_there_stays(output):
    copy = output / "checkpoints/step-000006-good"
    shutil.copytree(output / "checkpoints/step-000006", copy)
    assert [p.name for p in candidates(output)] == ["step-000006", "step-000003"]
    save(output, 9, keep=1)
    assert [p.name for p in candidates(output)] == ["step-000009"]
    set_aside(output, 0)
    assert verify(copy).step == 6 and candidates(output) == []


def test_a_save_that_turns_out_damaged_deletes_nothing(output):
    with pytest.raises(CheckpointError, match="weights-00001"):
        save(output, 9, keep=1, spoil=True)
    assert [p.name for p in candidates(output)] == ["step-000006", "step-000003"]
    assert (output / "checkpoints/latest").read_text() == "step-000006"
    found, _ = find("auto", output, {})
    assert found is not None and found.step == 6


def test_checkpoints_of_an_abandoned_stretch_are_set_aside(output):
    save(output, 9, keep=9)
    moved = set_aside(output, 3)
    assert [p.name for p in moved] == ["aside-step-000009", "aside-step-000006"]
    assert [manifest.step_of(p) for p in candidates(output)] == [3]
    save(output, 6)
    assert [p.name for p in set_aside(output, 3)] == ["aside-step-000006"]


WRITES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "shutil.rmtree"}


def killed(action, at: int) -> bool:
    """Run `action` in a child that is killed before its write number `at`; False if none came."""
    child = os.fork()
    if child == 0:
        torch.set_num_threads(1)  # threads do not survive a fork
        count = 0

        def hook(event: str, arguments: tuple) -> None:
            nonlocal count
            writes = (
                event == "open" and isinstance(arguments[1], str) and set(arguments[1]) & set("wax")
            )
            if event in WRITES or writes:
                count += 1
                if count == at:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(hook)
        action()
        os._exit(0)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])


def check_after_a_crash(output: Path, before: int, after: int) -> int:
    """The newest one is the one before or the one after, whole; and the next save succeeds."""
    found, skipped = find("auto", output, {"seed": 0})
    assert found is not None and found.step in (before, after) and skipped == []
    found_step = found.step
    clean(output)
    assert not list((output / "checkpoints").glob(".writing*"))
    save(output, after + 1, keep=1)
    assert [p.name for p in candidates(output)] == [f"step-{after + 1:06d}"]
    leftovers = {p.name for p in (output / "checkpoints").iterdir()}
    assert leftovers <= {"latest", ".latest.tmp", f"step-{after + 1:06d}"}
    return found_step


def test_killed_at_any_write_one_valid_checkpoint_stays(tmp_path):
    steps = []
    for at in range(1, 100):
        output = tmp_path / str(at)
        save(output, 1)
        if not killed(lambda output=output: save(output, 2, keep=1), at):
            break
        steps.append(check_after_a_crash(output, 1, 2))
    assert len(steps) > 10 and steps == sorted(steps) and set(steps) == {1, 2}


def test_killed_at_any_moment_one_valid_checkpoint_stays(tmp_path):
    """Also in the middle of a file."""
    rng = random.Random(0)
    began = time.monotonic()
    save(tmp_path / "timed", 2, size=200_000)
    whole = time.monotonic() - began
    for index in range(8):
        output = tmp_path / str(index)
        save(output, 1)
        child = os.fork()
        if child == 0:
            torch.set_num_threads(1)
            save(output, 2, keep=1, size=200_000)
            os._exit(0)
        time.sleep(rng.uniform(0, whole))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        check_after_a_crash(output, 1, 2)


def test_manifest_is_plain_json_with_the_identity(output):
    text = json.loads((output / "checkpoints/step-000006/manifest.json").read_text())
    assert text["step"] == 6 and text["identity"] == {"seed": 0} and text["schema"] == 2


def test_an_older_checkpoint_holds_a_path_where_the_checksum_is_now(output):
    manifests = output.glob("checkpoints/*/manifest.json")
    for file in manifests:
        text = json.loads(file.read_text())
        text["identity"] = {"model.backbone": {"name": "tiny", "vision_tower": "runs/tower"}}
        file.write_text(json.dumps(text))
    backbone = {"name": "tiny", "vision_tower": None}
    now = {"model.backbone": backbone, "model.backbone.vision_tower": "0f3a"}
    found, _ = find("auto", output, now)
    assert found is not None and found.step == 6
    for other in (
        {"model.backbone": backbone},  # reads no tower
        now | {"model.backbone": backbone | {"name": "olmoe"}},
        now | {"model.backbone.vision_checkpoint": "0f3a"},
    ):
        with pytest.raises(CheckpointError, match="belongs to another run"):
            find("auto", output, other)


@pytest.mark.parametrize(
    ("now", "words"),
    [
        ({"seed": 1}, "its seed is 0, this run's is 1; set it as it was, or resume=none"),
        (
            {"model.router": {"name": "gemoe"}},
            "its model.router.k is 2, this run's is null; set",
        ),
        (
            {"model.router": {"name": "top_k"}},
            "model.router.name is gemoe, this run's is top_k",
        ),
        (
            {"data": "e0"},
            "another run: what is in its data.train_path is not what this run's holds",
        ),
        ({"base checkpoint": "none"}, "another run: what is in its model.checkpoint is not what"),
        ({"seed": 1, "data": "e0"}, "this run's is 1; what is in its data.train_path is not what"),
        ({"samples per step": 4}, "step is 8, this run's is 4; set train.global_batch_size=8, or"),
        ({"seed": None, "data": None}, None),  # not known yet
    ],
)
def test_what_differs_from_another_run_is_named_by_its_options(output, now, words):
    router = {"name": "gemoe", "k": 2}
    identity = {"seed": 0, "model.router": router, "base checkpoint": "0f3a", "data": "0f3b"}
    identity["samples per step"] = 8
    file = output / "checkpoints/step-000006/manifest.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"identity": identity}))
    if words is None:
        assert find("auto", output, identity | now)[0] is not None
        return
    with pytest.raises(CheckpointError, match="belongs to another run") as error:
        find("auto", output, identity | now)
    assert words in str(error.value) and "0f3" not in str(error.value)


def test_an_older_run_had_what_its_router_did_before_an_option_came(output):
    """Without the losses that DynMoE got later; they are on by default."""
    stored = {"model.router": {"name": "dynmoe"}}
    file = output / "checkpoints/step-000006/manifest.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"identity": stored}))
    options = {"name": "dynmoe", "balance_weight": 0.0, "efficiency_weight": 0.0}
    assert find("auto", output, {"model.router": options})[0] is not None
    with pytest.raises(
        CheckpointError, match=r"its model.router.balance_weight is 0.0, this run's"
    ):
        find("auto", output, {"model.router": options | {"balance_weight": 0.01}})


def test_a_base_of_dead_links_is_no_other_base(tmp_path):
    (tmp_path / "config.json").symlink_to("../../blobs/0")
    with pytest.raises(CheckpointError, match="config.json is a link to ../../blobs/0"):
        manifest.checksum_folder(tmp_path)
