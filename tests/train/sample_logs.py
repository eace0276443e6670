"""What the sample log of a run says, for tests to compare."""

from __future__ import annotations

import json
from pathlib import Path

from gemoe_ds.files import whole_lines
from gemoe_ds.train.sample_log import FOLDER


def read_sample_log(output: Path) -> dict[int, list[str]]:
    """Step -> ids of its samples, in the order of the run's one endless shuffled list."""
    blocks: dict[int, dict[int, list[str]]] = {}
    for path in sorted((output / FOLDER).glob("rank-*.jsonl")):
        for line in map(json.loads, whole_lines(path)):
            blocks.setdefault(line["step"], {})[line["micro_batch"]] = line["ids"]
    return {
        step: [i for _, ids in sorted(of_step.items()) for i in ids]
        for step, of_step in sorted(blocks.items())
    }
