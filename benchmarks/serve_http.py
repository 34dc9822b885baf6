"""`matkv serve` over HTTP: a question, nonsense, kill -9 under load, and thousands of requests.

Parts of benchmarks/serve.py.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import engine
from matkv.artifact.artifact import Artifact
from matkv.models.load import model_source

QUESTION = "What is the capital of France?"
MEMORY = "64MiB"
COMMON = ("--dtype", "float32", "--enforce-eager", "--max-model-len", "1024")
SECONDS = 300
PORT = 8701


def demo(given: argparse.Namespace) -> None:
    """One question to the server with the full cache and to that with the artifact."""
    artifact = Artifact.load(given.run)
    full = [
        "-m", "vllm.entrypoints.openai.api_server", "--model", model_source(artifact.base_model),
        "--served-model-name", artifact.base_model, "--kv-cache-memory-bytes", MEMORY,
    ]  # fmt: skip
    print(QUESTION)
    for name, command in (("full", full), (f"{given.budget:.1%}", serve(given))):
        with server(command) as (_, log):
            line = next(line for line in log.read_text().splitlines() if "KV cache size" in line)
            fit = line.partition("size: ")[2].partition(" tokens")[0]
            print(f"{name:6} {fit} tokens in {MEMORY}: {ask(artifact.base_model)}", flush=True)


def faults(given: argparse.Namespace) -> None:
    """What a server refuses at its start, requests that are none, and what kill -9 leaves."""
    with tempfile.TemporaryDirectory() as folder:
        for command, told in refused(given, Path(folder)):
            ended = subprocess.run(
                [sys.executable, *command], env=environment(), text=True,
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            )  # fmt: skip
            lines = [line for line in ended.stdout.splitlines() if told in line]
            print(f"{command[1:]}: exit code {ended.returncode}, {lines[:1]}", flush=True)
            assert ended.returncode and lines, ended.stdout[-2000:]
    name = Artifact.load(given.run).base_model
    with server(serve(given)) as (process, _):
        wanted = ask(name)
        for body, status in nonsense(name):
            got, said = post("/v1/completions", body)
            print(f"{body[:70]!r}: {got} {said[:90]}", flush=True)
            assert got == status, f"wanted {status}"
        assert ask(name) == wanted
        with ThreadPoolExecutor(16) as pool:
            asked = [pool.submit(small, name, index, 200) for index in range(16)]
            time.sleep(3)
            family = [process.pid, *below(process.pid)]
            os.kill(process.pid, signal.SIGKILL)
            failed = sum(one.exception() is not None for one in asked)
        print(f"killed under load: {failed} of {len(asked)} requests failed", flush=True)
        for _ in range(60):
            left = [pid for pid in family if alive(pid)]
            if not left:
                break
            time.sleep(1)
        print(f"processes that outlive it: {len(left)}", flush=True)
    with server(serve(given)):
        print(f"restarted, the same answer: {ask(name) == wanted}", flush=True)


def load(given: argparse.Namespace) -> None:
    """Many small requests, eight at a time, and the memory of all of the server's processes."""
    count, name = given.requests or 2000, Artifact.load(given.run).base_model
    with server(serve(given)) as (process, _), ThreadPoolExecutor(8) as pool:
        for first in range(0, count, count // 10):
            list(pool.map(lambda index: small(name, index, 4), range(first, first + count // 10)))
            kept = sum(resident(pid) for pid in (process.pid, *below(process.pid)))
            print(
                f"{first + count // 10:6,} requests: {kept / 2**20:,.0f} MiB resident", flush=True
            )


def serve(given: argparse.Namespace) -> list[str]:
    return [
        "-m", "matkv", "serve", given.run, "--budget", str(given.budget),
        "--kv-cache-memory-bytes", MEMORY,
    ]  # fmt: skip


def refused(given: argparse.Namespace, folder: Path) -> Iterator[tuple[list[str], str]]:
    """Commands that must end at once, and what they must say."""
    own, none = serve(given), str(folder / "none")
    yield [*own, "--budget", "2"], "budget 2.0 must be in (0, 1]"
    yield ["-m", "matkv", "serve", none], "no artifact at"
    yield [*own, "--model", none], "no config of a model in"
    yield [*own, "--kv-cache-dtype", "fp8", *COMMON], "--kv-cache-dtype fp8 is another format"
    model = model_source(Artifact.load(given.run).base_model)
    plain = ["-m", "vllm.entrypoints.openai.api_server", "--model", model, *COMMON]
    plain += ["--attention-backend", "CUSTOM", "--additional-config"]
    for options, told in (
        ({"artifact": given.run, "budget": 2}, "budget 2.0 must be in (0, 1]"),
        ({"artifact": none}, "no artifact at"),
        ({}, "artifact is missing"),
    ):
        yield [*plain, json.dumps({"matkv": options})], told


def nonsense(name: str) -> Iterator[tuple[str, int]]:
    """Bodies of requests, and the status that each deserves."""
    yield "{", 400
    yield "[]", 400
    for changes, status in (
        ({"model": "another"}, 404),
        ({"prompt": None}, 400),
        ({"max_tokens": -1}, 400),
        ({"max_tokens": "many"}, 400),
        ({"max_tokens": 10**9}, 400),
        ({"temperature": -1}, 400),
        ({"top_p": 7}, 400),
        ({"prompt": [10**9]}, 400),
        ({"prompt": [-5]}, 400),
        ({"prompt": "word " * 5000}, 400),
        ({"n": 0}, 400),
    ):
        yield json.dumps({"model": name, "prompt": "once", "max_tokens": 4} | changes), status


@contextmanager
def server(command: list[str]) -> Iterator[tuple[subprocess.Popen[bytes], Path]]:
    """A server that answers, and where its log is."""
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        with log.open("wb") as file:
            process = subprocess.Popen(
                [sys.executable, *command, *COMMON, "--port", str(PORT)],
                env=environment(), stdout=file, stderr=subprocess.STDOUT,
            )  # fmt: skip
        try:
            while not is_up():
                if process.poll() is not None:
                    raise SystemExit(log.read_text()[-4000:])
                time.sleep(1)
            yield process, log
        finally:
            process.terminate()
            process.wait()


def environment() -> dict[str, str]:
    settings = dict(engine.SETTINGS) | {"VLLM_LOGGING_LEVEL": "INFO"}
    del settings["VLLM_ENABLE_V1_MULTIPROCESSING"]
    return os.environ | settings


def is_up() -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{PORT}/health", timeout=5):
            return True
    except OSError:
        return False


def ask(model: str) -> str:
    """The answer to the question."""
    messages = [{"role": "user", "content": QUESTION}]
    body = {"model": model, "temperature": 0, "max_tokens": 32, "messages": messages}
    status, said = post("/v1/chat/completions", json.dumps(body))
    assert status == 200, said
    answer: str = json.loads(said)["choices"][0]["message"]["content"]
    return answer


def small(model: str, index: int, new: int) -> None:
    """One of many requests, each another prompt."""
    body = {"model": model, "prompt": f"Number {index} is", "max_tokens": new, "ignore_eos": True}
    status, said = post("/v1/completions", json.dumps(body))
    assert status == 200, said


def post(path: str, body: str) -> tuple[int, str]:
    """Status and text of the answer."""
    request = urllib.request.Request(
        f"http://127.0.0.1:{PORT}{path}", body.encode(), {"Content-Type": "application/json"}
    )
    try:
        with urllib.request.urlopen(request, timeout=SECONDS) as response:
            return response.status, response.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def below(pid: int) -> list[int]:
    """The processes that a process has started, and those that they have, on Linux."""
    children = [
        int(child)
        for path in Path(f"/proc/{pid}/task").glob("*/children")
        for child in path.read_text().split()
    ]
    return [one for child in children for one in (child, *below(child))]


def alive(pid: int) -> bool:
    """Whether a process runs; one that has ended and waits for its parent does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0] != "Z"
    except OSError:
        return False


def resident(pid: int) -> int:
    """Bytes of a process that are in memory."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
