"""The process of one server: `python -m gemoe_ds.serving.ask NAME JOB OUT`."""

from __future__ import annotations

import json
import sys
import traceback
from dataclasses import asdict
from importlib import import_module
from pathlib import Path

from gemoe_ds.serving.exchange import read_job


def main(name: str, job: str, out: str) -> int:
    """Exit code 0, and what was served in `out`; or 1, and the error there in a line."""
    try:
        # The server is imported here, as an installation that is broken is an error like others.
        serve = import_module(f"gemoe_ds.serving.ask_{name}").serve
        content = asdict(serve(read_job(Path(job))))
    except BaseException as error:
        traceback.print_exc()
        said = " ".join(str(error).split())[:600]  # the reason stands first; the rest is in the log
        content = {"error": f"{type(error).__name__}: {said}"}
    Path(out).write_text(json.dumps(content), encoding="utf-8")
    return int("error" in content)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
