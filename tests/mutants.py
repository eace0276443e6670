"""Faults planted one at a time in a copy of the project: do the tests nearest to them notice?

`python -m tests.mutants` (`make mutants`); `--only NAME ..` for some. Exit code 1 if one survives.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from tests.helpers import repository


@dataclass(frozen=True)
class Mutant:
    """`old`, which the file has once, becomes `new`; `tests` are those that should fail."""

    name: str
    file: str
    old: str
    new: str
    tests: str


EVALUATION, ROUTERS = "tests/evaluation/test_runner.py", "tests/routers/test_"
RUNNER, COLLATE = "gemoe_ds/evaluation/runner.py", "gemoe_ds/data/collate.py"
STREAM, MODEL = "gemoe_ds/data/dataset.py", "gemoe_ds/backbones/model.py"
LOSSES, CONTEXT = "gemoe_ds/moe/losses.py", "gemoe_ds/moe/context.py"
TABLE = [
    Mutant("answers_any", RUNNER, "right_S[answer_S].all()", "right_S[answer_S].any()", EVALUATION),
    Mutant("never_right", RUNNER, "+= bool(right_S", "+= 0 * bool(right_S", EVALUATION),
    Mutant("always_right", RUNNER, "+= bool(right_S", "+= 1 or bool(right_S", EVALUATION),
    Mutant("turns_mixed", RUNNER, "(turns_S == index)", "(turns_S >= 0)", EVALUATION),
    Mutant("load_once", RUNNER, "scores.load_LE + load", "load", EVALUATION),
    Mutant(
        "padding_routed",
        RUNNER,
        "torch.stack([e[valid_T] for e in k])",
        "torch.stack(k)",
        EVALUATION,
    ),
    Mutant(
        "parts_lost",
        RUNNER,
        "total.asked.update(part.asked)",
        "total.asked = part.asked",
        EVALUATION,
    ),
    Mutant(
        "accuracy_micro",
        RUNNER,
        "sum(by_kind.values()) / max(len(by_kind), 1)",
        "self.accuracy_micro",
        EVALUATION,
    ),
    Mutant(
        "eval_steps_floor",
        STREAM,
        "-(-len(blocks) // world)",
        "max(1, len(blocks) // world)",
        EVALUATION,
    ),
    Mutant("eval_first_rank", STREAM, "blocks[rank::world]", "blocks[0::world]", EVALUATION),
    Mutant(
        "eval_last_lost",
        STREAM,
        "range(0, number, batch)]",
        "range(0, number - 1, batch)]",
        EVALUATION,
    ),
    Mutant(
        "greedy_off_by_one",
        MODEL,
        "correct_BS[:, 1:][labels_BS[:, 1:]",
        "correct_BS[:, :-1][labels_BS[:, 1:]",
        EVALUATION,
    ),
    Mutant(
        "not_begun", CONTEXT, "if not self.in_forward:", "if False:", "tests/moe/test_context.py"
    ),
    Mutant(
        "slot_twice", CONTEXT, "if slot in self._ran:", "if False:", "tests/moe/test_context.py"
    ),
    Mutant(
        "stale_pass",
        CONTEXT,
        "self.__dict__.update(self._with_gradient)",
        "pass",
        "tests/moe/test_context.py",
    ),
    Mutant(
        "record_kept",
        CONTEXT,
        "            self.layers[slot] = first\n",
        "",
        "tests/backbones/test_tiny.py",
    ),
    Mutant(
        "ada_k_discount",
        "gemoe_ds/routers/ada_k.py",
        "(len(ctx.layers) - 1 - self.spec.slot)",
        "self.spec.slot",
        f"{ROUTERS}ada_k.py",
    ),
    Mutant(
        "adamoe_anneal",
        "gemoe_ds/routers/adamoe.py",
        "upkeep.progress >= 0.5",
        "upkeep.progress >= 0.9",
        f"{ROUTERS}adamoe.py",
    ),
    Mutant(
        "remoe_control",
        "gemoe_ds/routers/remoe.py",
        "if mean_k > self.target_k else",
        "if mean_k < self.target_k else",
        f"{ROUTERS}remoe.py",
    ),
    Mutant(
        "moepp_eta",
        "gemoe_ds/routers/moepp.py",
        "eta_N[self.spec.num_experts :]",
        "eta_N[self.spec.num_experts + 1 :]",
        f"{ROUTERS}moepp.py",
    ),
    Mutant(
        "ltdr_padding",
        "gemoe_ds/routers/ltdr.py",
        "ctx.is_vision_T & ctx.is_valid_T",
        "ctx.is_vision_T",
        f"{ROUTERS}ltdr.py",
    ),
    Mutant(
        "budget_last_layer",
        "gemoe_ds/routers/gemoe.py",
        "for record in ctx.layers])",
        "for record in ctx.layers[-1:]])",
        f"tests/evaluation/test_budget.py {ROUTERS}gemoe.py",
    ),
    Mutant(
        "balance_scale",
        LOSSES,
        "scores_TE.shape[1] * (share_E",
        "(share_E",
        "tests/moe/test_losses.py",
    ),
    Mutant(
        "traffic_one_way",
        "gemoe_ds/moe/dispatch.py",
        "row_bytes += 2 * remote_rows",
        "row_bytes += remote_rows",
        "tests/moe/test_dispatch.py",
    ),
    Mutant(
        "attention_flops",
        "gemoe_ds/backbones/flops.py",
        '"attention": 4 *',
        '"attention": 2 *',
        "tests/backbones/test_flops.py",
    ),
    Mutant(
        "collate_fit",
        COLLATE,
        "rest[0] + rest[1] <= room",
        "rest[0] + rest[1] < room",
        "tests/data/test_collate.py",
    ),
    Mutant(
        "mean_count",
        "gemoe_ds/train/monitor.py",
        "values[name] = total / count",
        "values[name] = total / (count + 1)",
        "tests/train/test_monitor.py",
    ),
    Mutant(
        "histogram_limits",
        "gemoe_ds/train/monitor.py",
        "(values + 0.5).tolist()",
        "(values + 1.5).tolist()",
        "tests/train/test_monitor.py",
    ),
]


def survives(mutant: Mutant, root: Path) -> bool:
    path = root / mutant.file
    text = path.read_text()
    assert text.count(mutant.old) == 1, f"{mutant.name}: {mutant.file} has not once {mutant.old!r}"
    path.write_text(text.replace(mutant.old, mutant.new))
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider"]
    command += ["-m", "not slow and not gpu and not cluster", *mutant.tests.split()]
    environment = os.environ | {"PYTHONPATH": str(root), "PYTHONDONTWRITEBYTECODE": "1"}
    try:
        done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
    finally:
        path.write_text(text)
    assert done.returncode in (0, 1), f"{mutant.name}: {done.stdout[-2000:]}{done.stderr[-2000:]}"
    return done.returncode == 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="+", choices=[m.name for m in TABLE], metavar="NAME")
    only = parser.parse_args().only
    chosen = [mutant for mutant in TABLE if not only or mutant.name in only]
    survivors = 0
    with tempfile.TemporaryDirectory() as folder:
        ignored = shutil.ignore_patterns(".*", "runs", "__pycache__", "*.egg-info")
        root = Path(shutil.copytree(repository(), Path(folder) / "copy", ignore=ignored))
        for mutant in chosen:
            began = time.monotonic()
            verdict = "SURVIVED" if survives(mutant, root) else "killed"
            survivors += verdict == "SURVIVED"
            print(f"{verdict:8} {mutant.name} ({time.monotonic() - began:.0f} s)", flush=True)
    print(f"{len(chosen) - survivors} of {len(chosen)} killed")
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main())
