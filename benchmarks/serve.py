"""vLLM with an artifact beside vLLM with the full cache: what fits, throughput, the time of a step.

    python benchmarks/serve.py demo        both servers over HTTP, one question each
    python benchmarks/serve.py fits        tokens in the cache, at every budget
    python benchmarks/serve.py trace       a fixed trace of requests in a small cache, taking turns
    python benchmarks/serve.py step        a decoding step at equal batches, taking turns
    python benchmarks/serve.py equal       greedy tokens of texts, against those in transformers

Run it where vLLM is: `make serve-demo` makes that environment. Every engine is a process of its
own.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

import engine
from matkv.artifact.artifact import Artifact
from matkv.data.texts import read_texts
from matkv.hf.attach import attach
from matkv.models.load import load_model, model_source
from matkv.ranks import RankTable

RUN, QUESTION = "smollm2-135m", "What is the capital of France?"
BUDGETS = (0.5, 0.25, 0.125)
MEMORY = 64 << 20
SECONDS = 300


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("demo", "fits", "trace", "step", "equal"))
    parser.add_argument("--run", default=RUN)
    parser.add_argument("--budget", type=float, default=0.25)
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--new", type=int, default=64)
    parser.add_argument("--turns", type=int, default=1)
    parser.add_argument("--exact", action="store_true", help="exact tokens as the artifact asks")
    given = parser.parse_args()
    whats = {"demo": demo, "fits": fits, "trace": trace, "step": step, "equal": equal}
    whats[given.what](given)


def ways(given: argparse.Namespace, budgets: tuple[float, ...]) -> dict[str, dict[str, Any]]:
    """vLLM's arguments by the name of the cache."""
    artifact = Artifact.load(given.run)
    exact = {} if given.exact else {"sink": 0, "recent": 0}
    common = {"model": model_source(artifact.base_model), "kv_cache_memory_bytes": MEMORY}
    own = {f"{one:.1%}": common | engine.matkv(given.run, one, **exact) for one in budgets}
    return {"full": common | {"block_size": 32}} | own


def fits(given: argparse.Namespace) -> None:
    """Tokens that the cache holds, as vLLM says, against the bytes of a token."""
    artifact = Artifact.load(given.run)
    tables = {f"{one:.1%}": artifact.table(one) for one in BUDGETS}
    tables["full"] = RankTable.full(artifact.geometry)
    for name, arguments in ways(given, BUDGETS).items():
        for dtype in ("float32", "bfloat16"):
            found = engine.run(arguments | {"max_model_len": 1024, "dtype": dtype}, [])["fits"]
            ideal = MEMORY // tables[name].bytes_per_token(getattr(torch, dtype))
            print(f"{name:6} {dtype:8} {found:8,} tokens, {found / ideal:6.1%} of {ideal:,}")


def trace(given: argparse.Namespace) -> None:
    """Requests of a fixed trace in a cache of six full ones."""
    rng = random.Random(0)
    prompts = [
        {
            "tokens": [rng.randrange(5, 40000) for _ in range(rng.randint(256, 1024))],
            "new": given.new,
        }
        for _ in range(given.requests)
    ]
    memory = (
        6
        * (1024 + given.new)
        * RankTable.full(Artifact.load(given.run).geometry).bytes_per_token(torch.float32)
    )
    arguments = {"max_model_len": 2048, "max_num_seqs": 64, "kv_cache_memory_bytes": memory}
    seconds: dict[str, list[float]] = {}
    for _ in range(given.turns):
        for name, own in ways(given, (given.budget,)).items():
            found = engine.run(own | arguments, [prompts])
            seconds.setdefault(name, []).append(found["rounds"][0]["seconds"])
            print(
                f"{name:6} {found['fits']:,} tokens fit, {given.requests / seconds[name][-1]:.3f} "
                f"requests/s, {found['preemptions']} preemptions",
                flush=True,
            )
    full, kept = (statistics.median(one) for one in seconds.values())
    print(f"throughput at {given.budget:.1%} over the full cache's: {full / kept:.2f}")


def step(given: argparse.Namespace) -> None:
    """The time of one more token of several sequences, prompts apart."""
    rng = random.Random(0)
    for batch, context in ((1, 1024), (8, 512), (16, 256)):
        prompts = [[rng.randrange(5, 40000) for _ in range(context)] for _ in range(batch)]
        rounds = [[{"tokens": one, "new": new} for one in prompts] for new in (1, 1, 1 + given.new)]
        arguments = {
            "max_model_len": 2048, "max_num_seqs": 32, "kv_cache_memory_bytes": 1 << 30,
        }  # fmt: skip
        times: dict[str, list[float]] = {}
        for _ in range(given.turns):
            for name, own in ways(given, (given.budget,)).items():
                found = engine.run(own | arguments, rounds)["rounds"]
                # The prompts are in the prefix cache from the first round on.
                lasted = found[2]["seconds"] - found[1]["seconds"]
                times.setdefault(name, []).append(lasted / given.new)
        full, kept = (min(one) for one in times.values())
        print(
            f"{batch:2} sequences of {context}: full {1e3 * full:.1f} ms, "
            f"{given.budget:.1%} {1e3 * kept:.1f} ms, {kept / full:.2f} times",
            flush=True,
        )


def equal(given: argparse.Namespace) -> None:
    """Greedy tokens of beginnings of texts, batched and in chunks, and the same by transformers."""
    artifact = Artifact.load(given.run)
    model, tokenizer = load_model(artifact.base_model, "float32")
    rng = random.Random(0)
    texts = read_texts("default", "validation")[: given.requests]
    prompts = [tokenizer(one)["input_ids"][: rng.randint(4, 300)] for one in texts]
    none = None if given.exact else 0
    attached: Any = attach(model, artifact, given.budget, sink=none, recent=none)
    how = {"max_new_tokens": given.new, "do_sample": False, "eos_token_id": None}
    wanted = [
        attached.generate(torch.tensor([one]), **how)[0, len(one) :].tolist() for one in prompts
    ]
    own = ways(given, (given.budget,))[f"{given.budget:.1%}"]
    arguments = {"max_model_len": 1024, "max_num_batched_tokens": 256, "max_num_seqs": 16}
    asked = [{"tokens": one, "new": given.new} for one in prompts]
    found = engine.run(own | arguments, [asked, asked])["rounds"]
    for name, one in (("first", found[0]), ("again", found[1])):
        same = [a == b for a, b in zip(one["tokens"], wanted, strict=True)]
        places = [
            next((i for i, (x, y) in enumerate(zip(a, b, strict=True)) if x != y), given.new)
            for a, b in zip(one["tokens"], wanted, strict=True)
        ]
        print(
            f"{name}: {sum(same)} of {len(same)} sequences equal, {sum(places)} of "
            f"{given.new * len(same)} tokens before any differs; {sum(one['cached'])} of "
            f"{sum(map(len, prompts))} prompt tokens from the prefix cache",
            flush=True,
        )


def demo(given: argparse.Namespace) -> None:
    """One question to the server with the full cache and to that with the artifact."""
    artifact = Artifact.load(given.run)
    model = model_source(artifact.base_model)
    common = ["--dtype", "float32", "--enforce-eager", "--max-model-len", "2048"]
    full = [
        "-m", "vllm.entrypoints.openai.api_server", "--model", model,
        "--served-model-name", artifact.base_model, "--kv-cache-memory-bytes", str(MEMORY),
    ]  # fmt: skip
    own = [
        "-m", "matkv", "serve", given.run, "--budget", str(given.budget),
        "--kv-cache-memory-bytes", str(MEMORY),
    ]  # fmt: skip
    print(QUESTION)
    for name, command, port in (("full", full, 8701), (f"{given.budget:.1%}", own, 8702)):
        with server([sys.executable, *command, *common, "--port", str(port)], port) as log:
            fit = next(line for line in log if "KV cache size" in line).partition("size: ")[2]
            answer = ask(port, artifact.base_model)
        print(f"{name:6} {fit.partition(' tokens')[0]} tokens in 64 MiB: {answer}", flush=True)


@contextmanager
def server(command: list[str], port: int) -> Iterator[list[str]]:
    """A server that has started, and what it said until then."""
    environment = os.environ | engine.SETTINGS | {"VLLM_LOGGING_LEVEL": "INFO"}
    environment.pop("VLLM_ENABLE_V1_MULTIPROCESSING")
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert process.stdout is not None
    said: list[str] = []
    try:
        for line in process.stdout:
            said.append(line)
            if "startup complete" in line:
                break
        else:
            raise SystemExit("".join(said[-20:]))
        yield said
    finally:
        process.terminate()
        process.communicate()


def ask(port: int, model: str) -> str:
    """The answer to the question."""
    body = {
        "model": model, "temperature": 0, "max_tokens": 32,
        "messages": [{"role": "user", "content": QUESTION}],
    }  # fmt: skip
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/v1/chat/completions",
        json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=SECONDS) as response:
        answer: str = json.load(response)["choices"][0]["message"]["content"]
    return answer


if __name__ == "__main__":
    start = time.perf_counter()
    main()
    print(f"{time.perf_counter() - start:.0f} s on {torch.get_num_threads()} threads")
