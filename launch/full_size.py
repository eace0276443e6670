"""OLMoE-1B-7B at its true size on this machine: results/full_size.json.

Writes a checkpoint of 13.8 GB in the public layout with random weights, loads it on two ranks with
expert parallelism, trains GeMoE for two steps on short texts, saves, resumes and takes two more.
Random weights say nothing of quality: what is measured is memory and time.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run from a checkout, uninstalled

from gemoe_ds.errors import ConfigError, exit_on_error

SHARDS = 3  # as published
RECIPE = "launch/recipes/full_size_olmoe.yaml"
RANKS = 2
STEPS = 2


def write_data(folder: Path) -> None:
    """A few hundred short conversations about numbers."""
    from gemoe_ds.data.sample import Sample, Turn, write_samples

    turns = ((f"What comes after {n}?", f"After {n} comes {n + 1}.") for n in range(400))
    samples = (Sample(f"n{i}", None, (Turn(*turn),)) for i, turn in enumerate(turns))
    write_samples(samples, folder, source="launch/full_size.py")


def evict(folder: Path) -> None:
    """Forget what the system has cached of a folder's files."""
    for path in folder.iterdir():
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def dd_rate(folder: Path) -> float:
    """Bytes a second of `dd` over the checkpoint's files, not cached."""
    evict(folder)
    files = sorted(folder.glob("*.safetensors"))
    began = time.perf_counter()
    for file in files:
        command = ["dd", f"if={file}", "of=/dev/null", "bs=16M", "status=none"]
        subprocess.run(command, check=True)
    return sum(file.stat().st_size for file in files) / (time.perf_counter() - began)


def kept_bytes(folder: Path) -> int:
    """What a rank keeps of the checkpoint: its share of the experts, everything else whole."""
    from gemoe_ds.backbones.stored import open_stored

    sizes = {key: tensor.num_bytes for key, tensor in open_stored(folder).items()}
    experts = sum(size for key, size in sizes.items() if ".experts." in key)
    return sum(sizes.values()) - experts + experts // RANKS


def run(root: Path, steps: int, *more: str) -> list[dict]:
    """Train to `steps`; the phases."""
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
        *(f"--nproc_per_node={RANKS}", "launch/train.py", RECIPE, f"train.steps={steps}", *more),
    ]
    print(f"-- {shlex.join(command)}", flush=True)
    subprocess.run(command, check=True)
    phases: list[dict] = json.loads((root / "run/phases.json").read_text())
    return phases


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--out", type=Path, default=Path("results/full_size.json"))
    parser.add_argument("--keep", action="store_true", help="leave the checkpoint on the disk")
    arguments = parser.parse_args()
    os.chdir(Path(__file__).resolve().parent.parent)
    from gemoe_ds.analysis.provenance import provenance
    from gemoe_ds.backbones.olmoe import OlmoeBackbone
    from gemoe_ds.backbones.random_checkpoint import write_random_checkpoint

    root = Path("runs/full_size")
    base = root / "olmoe"
    with exit_on_error():
        if (root / "run").exists():
            raise ConfigError(f"{root}/run exists; remove it to measure again")
        if not (base / "config.json").is_file():
            write_random_checkpoint(OlmoeBackbone, base, shards=SHARDS)
        if not (root / "data").exists():
            write_data(root / "data")
        if not (root / "tokenizer").exists():
            tokenizer = ["--data", str(root / "data"), "--out", str(root / "tokenizer")]
            subprocess.run(
                [sys.executable, "data_prep/train_tokenizer.py", *tokenizer],
                check=True,
            )
        disk = dd_rate(base)
        evict(base)
        first = run(root, STEPS)
        again = run(root, 2 * STEPS, "resume=auto")
        kept = kept_bytes(base)
        total = sum(file.stat().st_size for file in base.glob("*.safetensors"))
        loading = next(phase for phase in first if phase["name"] == "loading")
        peak = [max(p["host_bytes"][rank] for p in first) for rank in range(RANKS)]
        report = {
            "ranks": RANKS,
            "checkpoint_bytes": total,
            "kept_bytes_per_rank": kept,
            "loading_peak_over_kept": round(max(loading["host_bytes"]) / kept, 3),
            "loading_node_over_checkpoint": round(sum(loading["host_bytes"]) / total, 3),
            "peak_bytes_per_rank": peak,
            "dd_bytes_per_s": round(disk),
            "read_bytes_per_s": round(RANKS * kept / loading["seconds"]),
            "phases": first,
            "phases_resumed": again,
        }
        arguments.out.write_text(json.dumps(report | provenance(), indent=1) + "\n")
        if not arguments.keep:
            for path in base.iterdir():
                path.unlink()
            base.rmdir()
    print(f"   report      {arguments.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
