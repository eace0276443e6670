"""Which samples every step saw: one file a rank, and their union in the order of the run.

A run that was interrupted, and went on with another number of ranks, has the sample log of the
uninterrupted one.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from gemoe_ds.data.collate import Batch
from gemoe_ds.errors import writing_to
from gemoe_ds.files import step_lines, write_text
from gemoe_ds.train.hooks import Hook, Training

FOLDER = "sample_log"
_OLD_FOLDER = "ledger"  # of the version before, with the same lines


class SampleLog(Hook):
    """Writes `sample_log/rank-00000.jsonl`: step, number of the micro-batch, sample ids.

    Before a step computes: one that fails is in it.
    """

    def __init__(self, output: Path, rank: int) -> None:
        folder = output / FOLDER
        folder.mkdir(parents=True, exist_ok=True)
        self._file = open(folder / f"rank-{rank:05d}.jsonl", "a", buffering=1)  # noqa: SIM115

    def before_step(self, trainer: Training, step: int, batches: Sequence[Batch]) -> None:
        with writing_to(trainer.config.output_dir):
            for index, batch in enumerate(batches):
                self.write(step, trainer.block(step, index, len(batches)), batch.ids)

    def write(self, step: int, block: int, ids: Sequence[str]) -> None:
        line = {"step": step, "micro_batch": block, "ids": list(ids)}
        self._file.write(json.dumps(line) + "\n")

    def close(self) -> None:
        self._file.close()


def adopt_old_name(output: Path) -> None:
    """Go on in the log of the version before."""
    if (output / _OLD_FOLDER).is_dir() and not (output / FOLDER).exists():
        (output / _OLD_FOLDER).rename(output / FOLDER)


def forget_after(output: Path, step: int, share: tuple[int, int] = (0, 1)) -> None:
    """Drop what a lost stretch of the run has written after `step`, file by file: a crash leaves
    each as it was or as it will be.

    With `share` = (rank, ranks) only this rank's own file, and its part of those that no rank has.
    """
    for path in sorted((output / FOLDER).glob("rank-*.jsonl")):
        if int(path.stem.removeprefix("rank-")) % share[1] != share[0]:
            continue
        text = path.read_text(encoding="utf-8", errors="replace")
        kept = "".join(line for line, entry in step_lines(path) if entry["step"] <= step)
        if kept != text:
            write_text(path, kept)
