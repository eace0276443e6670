"""vLLM's HTTP server in the environment of `make serve-env`, started, asked and ended."""

from __future__ import annotations

import base64
import io
import json
import os
import signal
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from tests.helpers import free_port, repository
from tests.plugins.vllm.exported import NEW, Answer

PYTHON = "GEMOE_SERVE_PYTHON"  # environment variable; default: .venv-serve of this checkout
START = 600  # seconds until a server must answer, on a machine with much to do
ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
}


def python() -> Path:
    """The interpreter that has vLLM and the plugin."""
    found = Path(os.environ.get(PYTHON, repository() / ".venv-serve/bin/python")).absolute()
    assert found.exists(), f"{found} is not there: make serve-env"
    return found


@dataclass(frozen=True)
class Server:
    url: str
    model: str
    log: Path

    def post(self, path: str, **body: Any) -> Any:
        data = json.dumps({"model": self.model} | body).encode()
        request = urllib.request.Request(
            self.url + path, data, {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=300) as answer:
            return json.load(answer)

    def complete(self, prompt: list[int]) -> Answer:
        choice = self.post(
            "/v1/completions",
            prompt=prompt,
            max_tokens=NEW,
            temperature=0,
            logprobs=1,
            ignore_eos=True,
            return_tokens_as_token_ids=True,
        )["choices"][0]
        found = choice["logprobs"]
        tokens = [int(token.removeprefix("token_id:")) for token in found["tokens"]]
        return Answer(prompt, tokens, found["token_logprobs"])

    def complete_all(self, prompts: list[list[int]]) -> list[Answer]:
        """At the same time, so that a batch has tokens of many k."""
        with ThreadPoolExecutor(len(prompts)) as pool:
            return list(pool.map(self.complete, prompts))

    def look(self, picture: Image.Image, text: str) -> Answer:
        """An answer about a picture; its prompt has a token for each place of the picture."""
        buffer = io.BytesIO()
        picture.save(buffer, "PNG")
        data = base64.b64encode(buffer.getvalue()).decode()
        content = [
            {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}},
            {"type": "text", "text": text},
        ]
        done = self.post(
            "/v1/chat/completions",
            messages=[{"role": "user", "content": content}],
            max_tokens=NEW,
            temperature=0,
            logprobs=True,
            ignore_eos=True,
            return_token_ids=True,
        )
        choice = done["choices"][0]
        log_p = [entry["logprob"] for entry in choice["logprobs"]["content"]]
        return Answer(done["prompt_token_ids"], choice["token_ids"], log_p)

    def metrics(self) -> dict[str, float]:
        """Those of the plugin, by name and labels."""
        with urllib.request.urlopen(self.url + "/metrics", timeout=60) as answer:
            lines = answer.read().decode().splitlines()
        found = (line.rsplit(" ", 1) for line in lines if line.startswith("gemoe_"))
        return {name: float(value) for name, value in found}


def command(folder: Path, port: int, *options: str) -> list[str]:
    return [
        *(str(python()), "-m", "vllm.entrypoints.openai.api_server"),
        *("--model", str(folder), "--host", "127.0.0.1", "--port", str(port)),
        *("--dtype", "float32", "--max-model-len", "512", "--max-num-seqs", "32"),
        *("--no-enable-prefix-caching", *options),
    ]


@contextmanager
def serving(folder: Path, log: Path, *options: str, **environment: str) -> Iterator[Server]:
    """AssertionError, with what it said, if it ends before it answers."""
    port = free_port()
    with log.open("w") as out:
        process = subprocess.Popen(
            command(folder, port, *options),
            env=os.environ | ENVIRONMENT | environment | {"PYTHONPATH": ""},
            stdout=out,
            stderr=subprocess.STDOUT,
            cwd=log.parent,  # nothing of the checkout is imported
            start_new_session=True,
        )
    server = Server(f"http://127.0.0.1:{port}", str(folder), log)
    try:
        _wait(server, process)
        yield server
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _wait(server: Server, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + START
    while True:
        said = server.log.read_text()[-4000:]
        assert process.poll() is None, f"the server ended with {process.returncode}:\n{said}"
        assert time.monotonic() < deadline, f"no answer after {START} s:\n{said}"
        try:
            urllib.request.urlopen(server.url + "/health", timeout=10).close()
            return
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            time.sleep(1)


def refused(folder: Path, log: Path, *options: str, **environment: str) -> str:
    """What a server that does not start says."""
    try:
        with serving(folder, log, *options, **environment):
            pass
    except AssertionError:
        return log.read_text()
    raise AssertionError(f"{folder} is served with {options}")


def worst(served: list[Answer], expected: list[Answer]) -> tuple[int, float]:
    """How many answers are equal, and by how much log-probabilities of equal tokens differ."""
    equal, most = 0, 0.0
    for one, other in zip(served, expected, strict=True):
        equal += one.tokens == other.tokens
        for a, b, p, q in zip(one.tokens, other.tokens, one.log_p, other.log_p, strict=True):
            if a != b:
                break
            most = max(most, abs(p - q))
    return equal, most
