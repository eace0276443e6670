"""`gemoe serve-check`: a folder in every server, at static and at the trained k, side by side."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from gemoe_ds.analysis.provenance import provenance
from gemoe_ds.errors import CheckpointError, ConfigError
from gemoe_ds.export.code_record import check_code
from gemoe_ds.files import write_text
from gemoe_ds.serving.compare import Agreement, compare
from gemoe_ds.serving.exchange import STATIC, TRAINED, Job, Prompt, Served
from gemoe_ds.serving.prompts import built_in, read_prompts
from gemoe_ds.serving.servers import Server, ServerError, find_servers, run

REFERENCE = "transformers"  # what the others are compared with
# Largest difference of log-probabilities that is rounding. In other dtypes rounding moves the k of
# some tokens, so there is no such number.
TOLERANCES = {"float32": 1e-4}


@dataclass(frozen=True)
class Options:
    prompts: Path | None = None
    python: Path | None = None
    dtype: str = "float32"
    max_new_tokens: int = 32
    batch: int = 8
    rounds: int = 3
    tolerance: float | None = None
    vllm: dict[str, Any] = field(default_factory=dict)
    trust_code: bool = False

    @property
    def allowed(self) -> float | None:
        return TOLERANCES.get(self.dtype) if self.tolerance is None else self.tolerance


@dataclass(frozen=True)
class Row:
    """One server with one way to route, and what it is compared with."""

    server: str
    mode: str
    served: Served
    against: str | None = None
    agreement: Agreement | None = None

    @property
    def mean_k(self) -> float | None:
        k = self.served.mean_k
        return sum(k) / len(k) if k else None


def serve_check(folder: Path, options: Options, say: Callable[[str], None]) -> list[Row]:
    """Every server's answers and speed.

    Raises GemoeError for a folder that is no export, whose code is not the export's, or that a
    server cannot load.
    """
    described = read_described(folder)
    check_code(folder, options.trust_code)
    sees = has_image_processor(folder)
    servers = find_servers(options.python)
    static = [float(block["routing"]["top_k"]) for block in described["blocks"]]
    with working_folder() as work:
        if options.prompts:
            prompts = read_prompts(options.prompts, sees)
        else:
            prompts = built_in(sees, work)
        say(
            f"{folder}: router {described['router']['name']}, {len(prompts)} prompts, "
            f"{options.max_new_tokens} new tokens each, {options.dtype}"
        )
        return _rows(folder, prompts, servers, options, static, work, say)


@contextmanager
def working_folder() -> Iterator[Path]:
    """A temporary one, which stays if a server fails: the error names the log in it."""
    work = Path(tempfile.mkdtemp(prefix="gemoe-serve-check-"))
    keep = False
    try:
        yield work
    except ServerError:
        keep = True
        raise
    finally:
        if not keep:
            shutil.rmtree(work, ignore_errors=True)


def read_described(folder: Path) -> dict[str, Any]:
    """`gemoe` of config.json."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{folder}/config.json cannot be read ({error}); give a folder of `gemoe export`"
        ) from error
    described = config.get("gemoe") if isinstance(config, dict) else None
    if not isinstance(described, dict) or not {"router", "blocks"} <= described.keys():
        raise CheckpointError(
            f"{folder}/config.json has no `gemoe`, which says how it routes; give a folder of "
            "`gemoe export`"
        )
    if not described.get("enabled", True):
        raise CheckpointError(
            f"{folder}/config.json has gemoe.enabled: false, so its own code serves the static k; "
            "set it to true, or leave it out"
        )
    if not any(key.startswith("AutoModelFor") for key in config.get("auto_map") or {}):
        raise CheckpointError(
            f"{folder}/config.json names no model code (auto_map), as of --code base or an older "
            "version; export again, with --code own"
        )
    return described


def has_image_processor(folder: Path) -> bool:
    return any((folder / f"{n}_config.json").exists() for n in ("preprocessor", "processor"))


def _rows(
    folder: Path,
    prompts: tuple[Prompt, ...],
    servers: list[Server],
    options: Options,
    static: list[float],
    work: Path,
    say: Callable[[str], None],
) -> list[Row]:
    job = Job(
        str(folder.resolve()),
        TRAINED,
        prompts,
        options.dtype,
        options.max_new_tokens,
        options.batch,
        options.rounds,
    )
    rows: list[Row] = []
    if len(servers) == 1:
        say("vllm: not in this environment; --python names the interpreter of one that has it")
    for server in servers:
        for mode in (TRAINED, STATIC):
            if mode == TRAINED and not server.routes:
                say(
                    f"{server.name}: plugin gemoe-vllm is not installed in {server.python}, so it "
                    "serves the static k alone, without a word"
                )
                continue
            extra = options.vllm if server.name == "vllm" else {}
            served = run(server, replace(job, mode=mode, options=extra), work)
            if mode == STATIC:
                served = replace(served, mean_k=static)
            rows.append(_row(server.name, mode, served, rows, options))
            say(line_of(rows[-1]))
            if job.ids is None and served.ids is not None:
                lengths = tuple(len(answer.prompt_ids) for answer in served.answers)
                job = replace(job, ids=tuple(map(tuple, served.ids)), lengths=lengths)
    return rows


def _row(server: str, mode: str, served: Served, rows: list[Row], options: Options) -> Row:
    """transformers' static k is compared with its trained k: the contrast; others with transformers
    at the same k."""
    wanted = TRAINED if server == REFERENCE else mode
    for row in rows:
        if row.server == REFERENCE and row.mode == wanted:
            allowed = options.allowed or 0.0
            found = compare(served.answers, row.served.answers, allowed)
            return Row(server, mode, served, f"{REFERENCE}, {wanted} k", found)
    return Row(server, mode, served)


def line_of(row: Row) -> str:
    """One line: how fast, with how many experts, how far it agrees."""
    k = "not told" if row.mean_k is None else f"{row.mean_k:.2f}"
    words = [
        f"{row.server} {row.served.version}, {row.mode} k: mean k {k}",
        _speed(row.served),
    ]
    if row.agreement:
        a = row.agreement
        ties = f" and {a.ties} but for ties" if a.ties else ""
        words.append(
            f"{a.equal} of {a.answers} answers{ties} equal to {row.against}, log-probabilities "
            f"within {a.largest:.1e}"
        )
        if a.other_prompts:
            words.append(f"{a.other_prompts} prompts read as other tokens")
    return "; ".join(words)


def _speed(served: Served) -> str:
    """Of the fastest round, and of the slowest, which says how much else the machine did."""
    slowest = served.tokens / max(served.seconds)
    low = f" (slowest round {slowest:.4g})" if len(served.seconds) > 1 else ""
    return f"{served.tokens_per_second:.4g} tokens/s{low}"


def disagreements(rows: list[Row], options: Options) -> list[str]:
    """What is wrong, a sentence each; nothing where every server agrees with transformers."""
    if options.allowed is None:
        return []
    found = []
    for row in rows:
        if row.server == REFERENCE or row.agreement is None or row.agreement.holds(options.allowed):
            continue
        found.append(
            f"{row.server}, {row.mode} k, does not answer as {row.against}: {row.agreement.equal} "
            f"of {row.agreement.answers} equal, log-probabilities {row.agreement.largest:.1e} "
            f"apart, {options.allowed:g} is allowed{_why(row, rows, options.allowed)}"
        )
    return found


def _why(row: Row, rows: list[Row], allowed: float) -> str:
    """The usual reason: the server's answers are those of the other k."""
    other = next(r for r in rows if r.server == REFERENCE and r.mode != row.mode)
    if compare(row.served.answers, other.served.answers, allowed).holds(allowed):
        return f"; its answers are those of the {other.mode} k"
    return ""


def write_result(path: Path, folder: Path, rows: list[Row], options: Options) -> None:
    content = {
        **provenance(),
        "folder": str(folder),
        "dtype": options.dtype,
        "tolerance": options.allowed,
        "batch": options.batch,
        "agree": None if options.allowed is None else not disagreements(rows, options),
        "servers": [
            asdict(row) | {"mean_k": row.mean_k, "tokens_per_second": row.served.tokens_per_second}
            for row in rows
        ],
    }
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps(content, indent=1) + "\n")
    except OSError as error:
        raise ConfigError(f"--out {path}: {error.strerror}: choose another file") from error
