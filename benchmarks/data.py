"""What the way from a user's files to a training step costs: `python -m benchmarks.data`.

    conversion   rows a second and core, of pictures in three layouts and of text; beside them the
                 decoding of the pictures alone, which no conversion that checks them can save
    memory       the peak of a process that converts a JSON list of 665,298 rows, as mix665k has
    cold         bytes that reading one sample at random takes from the disk
    feeding      see benchmarks/data_feed.py

Pictures and texts are generated, of the sizes of LLaVA's. Contenders take turns; seconds are those
that the process computed, so that other work of the machine does not count. The results go to
results/data_cpu.json.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import io
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks import CHECKOUT
from benchmarks.data_sets import LAYOUTS, write_large_json, write_layout, write_pictures
from benchmarks.timing import measure, paired
from gemoe_ds.analysis.provenance import provenance
from gemoe_ds.data.images import read_image
from gemoe_ds.data.sample import open_samples
from gemoe_ds.data.sources.convert import Settings, convert
from gemoe_ds.errors import ConfigError, exit_on_error
from gemoe_ds.files import write_text
from gemoe_ds.parser import Parser, at_least_one

PARTS = ("conversion", "memory", "cold", "feeding")
_PEAK = """
import sys
from gemoe_ds.cli.data.convert import main
main(sys.argv[1:])
lines = open("/proc/self/status").read().splitlines()
print(next(line.split()[1] for line in lines if line.startswith("VmHWM")))
"""


def main(argv: list[str]) -> None:
    parser = Parser("python -m benchmarks.data", description=__doc__)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), metavar="PART")
    parser.add_argument("--rows", type=at_least_one, default=2000, help="of pictures (2000)")
    parser.add_argument("--large", type=at_least_one, default=665_298, help="of the JSON (665298)")
    parser.add_argument("--rounds", type=at_least_one, default=3, help="timed rounds (3)")
    parser.add_argument("--out", type=Path, default=CHECKOUT / "results/data_cpu.json")
    flags = parser.parse_or_exit(argv)
    with exit_on_error():
        origin, started = provenance(), time.monotonic()  # before its own results make it dirty
        if not flags.out.parent.is_dir():
            raise ConfigError(f"--out {flags.out}: no folder {flags.out.parent}; make it")
        results = _kept(flags.out)
        for part in flags.parts:
            with tempfile.TemporaryDirectory() as place:
                found = _MEASURES[part](flags, Path(place))
            if found is None:
                continue
            results[part] = found
            print(f"{part}: {json.dumps(found, indent=1)}", flush=True)
            seconds = round(time.monotonic() - started)
            write_text(
                flags.out, json.dumps(origin | {"seconds": seconds} | results, indent=1) + "\n"
            )


def _kept(out: Path) -> dict[str, Any]:
    """The parts of an earlier run that are not measured now."""
    if not out.exists():
        return {}
    try:
        found = json.loads(out.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"--out {out} is no benchmark result ({error}); move it") from error
    return {part: found[part] for part in PARTS if part in found}


def conversion(flags: argparse.Namespace, place: Path) -> list[dict[str, Any]]:
    """Rows a second of one core, by layout; `of decoding`: how much of the time that takes."""
    names = write_pictures(place / "images", flags.rows)
    pictures = [(place / "images" / name).read_bytes() for name in names]
    contenders: dict[str, Callable[[], object]] = {"decoding alone": lambda: _decode(pictures)}
    for layout in LAYOUTS:
        source = write_layout(place, layout, names)
        contenders[layout] = lambda source=source: _converted(source, place)  # type: ignore[misc]
    timings = measure(contenders, flags.rounds, clock=time.process_time)
    alone = timings["decoding alone"]
    rows = []
    for name, timing in timings.items():
        row = {"what": name, "rows": flags.rows, **timing.row()}
        row["rows_a_second"] = round(flags.rows / timing.median)
        if name not in ("text", "decoding alone"):
            row["of_decoding"] = round(paired(lambda part, all: part / all, alone, timing), 3)
        rows.append(row)
    size = sum(map(len, pictures)) / len(pictures)
    return [{"bytes_a_picture": round(size)}, *rows]


def _decode(pictures: list[bytes]) -> None:
    for picture in pictures:
        read_image(picture)


def _converted(source: Path, images: Path) -> None:
    with tempfile.TemporaryDirectory() as out, contextlib.redirect_stdout(io.StringIO()):
        convert(Settings(source, Path(out) / "out", images=images / "images", workers=1))


def memory(flags: argparse.Namespace, place: Path) -> dict[str, Any]:
    """Of a process of its own, start to end."""
    path = place / "rows.json"
    write_large_json(path, flags.large)
    size = path.stat().st_size
    command = [sys.executable, "-c", _PEAK, str(path), "--out", str(place / "out")]
    before = os.times()
    done = subprocess.run(command, capture_output=True, text=True, cwd=CHECKOUT, check=False)
    if done.returncode:
        raise ConfigError(f"the conversion failed: {done.stderr[-300:]}")
    after = os.times()
    seconds = (after.children_user + after.children_system) - (
        before.children_user + before.children_system
    )
    return {
        "rows": flags.large,
        "json_mb": round(size / 1e6),
        "peak_mb": round(int(done.stdout.split()[-1]) * 1024 / 1e6),
        "rows_a_second": round(flags.large / seconds),
    }


def cold(flags: argparse.Namespace, place: Path) -> dict[str, Any]:
    """Bytes that the reads of one sample ask for, nothing kept; and those of its picture."""
    names = write_pictures(place / "images", flags.rows)
    source = write_layout(place, "llava json", names)
    with contextlib.redirect_stdout(io.StringIO()):
        convert(Settings(source, place / "out", images=place / "images", workers=1))
    samples = open_samples(place / "out", cache_bytes=0)
    rows = random.Random(0).sample(range(len(samples)), min(200, len(samples)))
    samples[rows[0]]  # opens the files
    before, wanted = _read_so_far(), 0
    for row in rows:
        wanted += sum(len(image.data) for image in samples[row].images)
    read = (_read_so_far() - before) / len(rows)
    return {"bytes_read": round(read), "bytes_of_the_picture": round(wanted / len(rows))}


def _read_so_far() -> int:
    """Bytes that this process has asked the system for."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith("rchar")))


def feeding(flags: argparse.Namespace, place: Path) -> Any:
    """From folders to steps, if that benchmark is there."""
    if importlib.util.find_spec("benchmarks.data_feed") is None:
        return None
    feed: Any = importlib.import_module("benchmarks.data_feed")
    return feed.measured(rows=flags.rows, rounds=flags.rounds, place=place)


_MEASURES: dict[str, Callable[[argparse.Namespace, Path], Any]] = {
    "conversion": conversion,
    "memory": memory,
    "cold": cold,
    "feeding": feeding,
}

if __name__ == "__main__":
    main(sys.argv[1:])
