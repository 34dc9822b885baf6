"""vLLM with an artifact beside vLLM with the full cache: tokens, what fits, throughput, steps.

    python benchmarks/serve.py equal       greedy tokens of texts, against those in transformers
    python benchmarks/serve.py fits        tokens in the cache, at every budget
    python benchmarks/serve.py trace       a fixed trace of requests in a small cache, taking turns
    python benchmarks/serve.py step        a decoding step at equal batches, taking turns
    python benchmarks/serve.py demo        both servers over HTTP, one question each
    python benchmarks/serve.py faults      a server that is told nonsense, and killed under load
    python benchmarks/serve.py load        many small requests, and the memory of the server

Run it where vLLM is: `make serve-demo` makes that environment. Every engine is a process of its
own.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import torch

import engine
import serve_http
from engine import Engine, Round
from matkv.artifact.artifact import Artifact
from matkv.cache.cache import LatentCache
from matkv.data.texts import read_texts
from matkv.hf.attach import attach, detach
from matkv.models.load import load_model, model_source
from matkv.ranks import RankTable

RUN = "smollm2-135m"
BUDGETS = (0.5, 0.25, 0.125)
MEMORY = 64 << 20


def main() -> None:
    whats: dict[str, Callable[[argparse.Namespace], None]] = {
        "equal": equal, "fits": fits, "trace": trace, "step": step,
        "demo": serve_http.demo, "faults": serve_http.faults, "load": serve_http.load,
    }  # fmt: skip
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=whats)
    parser.add_argument("--run", default=RUN)
    parser.add_argument("--budget", type=float, default=0.25)
    parser.add_argument("--requests", type=int, help="64, to compare 32, to load 2,000")
    parser.add_argument("--new", type=int, help="tokens of an answer: 64, to compare 24")
    parser.add_argument("--turns", type=int, default=2)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--no-exact", action="store_true", help="no exact tokens")
    parser.add_argument("--only", choices=KINDS, help="compare no others")
    whats[(given := parser.parse_args()).what](given)


def own(given: argparse.Namespace, budget: float, **options: Any) -> dict[str, Any]:
    """vLLM's arguments for the artifact."""
    exact = {"sink": 0, "recent": 0} if given.no_exact else {}
    return base(given) | engine.matkv(given.run, budget, **exact | options)


def base(given: argparse.Namespace) -> dict[str, Any]:
    """vLLM's arguments for the full cache."""
    model = model_source(Artifact.load(given.run).base_model)
    return {"model": model, "kv_cache_memory_bytes": MEMORY, "dtype": given.dtype}


# Pages that vLLM's own attention for CPUs reads well.
FULL = {"block_size": 32}


def fits(given: argparse.Namespace) -> None:
    """Tokens that the cache holds, as vLLM says, against the bytes of a token."""
    artifact = Artifact.load(given.run)
    for budget in (None, *BUDGETS):
        table = RankTable.full(artifact.geometry) if budget is None else artifact.table(budget)
        arguments = base(given) | FULL if budget is None else own(given, budget)
        found = engine.run(arguments | {"max_model_len": 1024}, [])["fits"]
        ideal = MEMORY // table.bytes_per_token(getattr(torch, given.dtype))
        name = "full" if budget is None else f"{budget:.1%}"
        print(f"{name:6} {found:8,} tokens, {found / ideal:6.1%} of {ideal:,}", flush=True)


def trace(given: argparse.Namespace) -> None:
    """Requests of a fixed trace, given at once, in a cache of six full ones."""
    rng, new = random.Random(0), given.new or 64
    sizes = [rng.randint(256, 1024) for _ in range(given.requests or 64)]
    prompts = [{"tokens": some_tokens(rng, size), "new": new} for size in sizes]
    full = RankTable.full(Artifact.load(given.run).geometry)
    memory = 6 * (1024 + new) * full.bytes_per_token(getattr(torch, given.dtype))
    arguments = {"max_model_len": 2048, "max_num_seqs": 64, "kv_cache_memory_bytes": memory}
    seconds: list[list[float]] = []
    with ExitStack() as stack:
        engines = both(given, arguments, stack)
        for _ in range(given.turns):
            seconds.append([])
            for name, one in engines.items():
                found = one.round(prompts, forget=True)
                seconds[-1].append(found["seconds"])
                print(
                    f"{name:6} {one.fits:,} tokens fit, {len(sizes) / found['seconds']:.3f} "
                    f"requests/s, {found['preemptions']} preemptions",
                    flush=True,
                )
    ratio = statistics.median(full / kept for full, kept in seconds)
    print(f"throughput at {given.budget:.1%} over the full cache's: {ratio:.2f}")


def step(given: argparse.Namespace) -> None:
    """The CPU's time for one more token of several sequences, on one thread, prompts apart.

    Of every turn the fastest step: what others do on the machine makes the rest slower.
    """
    rng, new = random.Random(0), given.new or 16
    arguments = {"max_model_len": 2048, "max_num_seqs": 32, "kv_cache_memory_bytes": 1 << 30}
    with ExitStack() as stack:
        engines = both(given, arguments, stack)
        for batch, context in ((1, 1024), (8, 512), (16, 256), (16, 768)):
            prompts = [some_tokens(rng, context) for _ in range(batch)]
            asked = [{"tokens": one, "new": new} for one in prompts]
            for one in engines.values():  # the prompts are in the prefix cache from now on
                one.round(asked)
            turns = [
                [min(one.round(asked)["steps"][2:]) for one in engines.values()]
                for _ in range(given.turns)
            ]
            full, kept = (min(one) for one in zip(*turns, strict=True))
            ratio = statistics.median(kept / full for full, kept in turns)
            print(
                f"{batch:2} sequences of {context}: full {1e3 * full:.1f} ms, "
                f"{given.budget:.1%} {1e3 * kept:.1f} ms, {ratio:.2f} times",
                flush=True,
            )


def both(
    given: argparse.Namespace, arguments: dict[str, Any], stack: ExitStack
) -> dict[str, Engine]:
    """An engine with the full cache and one with the artifact, by name."""
    ways = {"full": base(given) | FULL, f"{given.budget:.1%}": own(given, given.budget)}
    return {
        name: stack.enter_context(engine.started(one | arguments)) for name, one in ways.items()
    }


def some_tokens(rng: random.Random, count: int) -> list[int]:
    return [rng.randrange(5, 40000) for _ in range(count)]


# How a cache is set, and how requests come: what `equal` compares in every combination.
KINDS: dict[str, dict[str, Any]] = {"codes": {}, "ranks": {"uniform": True}}
EXACT: dict[str, dict[str, Any]] = {"exact tokens": {}, "no exact ones": {"sink": 0, "recent": 0}}
COMMON = {"max_model_len": 1024, "max_num_seqs": 32}


def equal(given: argparse.Namespace) -> None:
    """Greedy tokens of beginnings of texts, and the same by transformers."""
    artifact, new, count = Artifact.load(given.run), given.new or 24, given.requests or 32
    model, tokenizer = load_model(artifact.base_model, given.dtype)
    rng, texts = random.Random(0), read_texts("default", "validation")
    sizes = [rng.choice((4, 15, 16, 17, 40, 90, 200, 300)) for _ in range(count)]
    prompts = []
    for index, size in enumerate(sizes):
        ids = tokenizer(texts[index % len(texts)])["input_ids"]
        first = rng.randrange(max(1, len(ids) - size))
        prompts.append(ids[first : first + size])
    for kind, table in KINDS.items() if given.only is None else [(given.only, KINDS[given.only])]:
        for name, exact in list(EXACT.items())[given.no_exact :]:
            ranks = artifact.table(given.budget, **table)
            attached: Any = attach(model, artifact, ranks=ranks, **exact)
            wanted = [greedy(attached, one, new) for one in prompts]
            asked = [{"tokens": one, "new": new} for one in prompts]
            arguments = own(given, given.budget, **table, **exact) | COMMON
            for way, found in ways_of(arguments, asked, artifact, given):
                told, differ = compare(found["tokens"], wanted)
                print(
                    f"{kind}, {name}, {way}: {told}; {sum(found['cached'])} of "
                    f"{sum(map(len, prompts))} prompt tokens from the prefix cache, "
                    f"{found['preemptions']} preemptions",
                    flush=True,
                )
                for index, place in differ:
                    before = prompts[index] + wanted[index][:place]
                    pair = wanted[index][place], found["tokens"][index][place]
                    far = gap(attached, before, *pair)
                    print(f"  prompt {index}, token {place}: logits {far:.1e} apart", flush=True)
            detach(model)


def greedy(model: Any, prompt: list[int], new: int) -> list[int]:
    how = {"max_new_tokens": new, "do_sample": False, "eos_token_id": None}
    tokens: list[int] = model.generate(torch.tensor([prompt]), **how)[0, len(prompt) :].tolist()
    return tokens


def ways_of(
    arguments: dict[str, Any], asked: Round, artifact: Artifact, given: argparse.Namespace
) -> Iterator[tuple[str, Any]]:
    """Every way in which requests may come, and what came of them."""
    with engine.started(arguments | {"kv_cache_memory_bytes": 8 * MEMORY}) as one:
        yield "batched", one.round(asked)
        yield "again", one.round(asked)
        alone = [one.round([request], forget=True) for request in asked]
        found: dict[str, Any] = {"preemptions": alone[-1]["preemptions"]}
        yield (
            "alone",
            found | {key: [each[key][0] for each in alone] for key in ("tokens", "cached")},
        )
    with engine.started(arguments | {"max_num_batched_tokens": 64}) as one:
        yield "in chunks of 64", one.round(asked)
    with engine.started(arguments | little(arguments, artifact, given)) as one:
        yield "under preemption", one.round(asked)
    heads = artifact.geometry.query_heads
    size = next(size for size in range(2, heads + 1) if heads % size == 0)
    shared = {"tensor_parallel_size": size, "distributed_executor_backend": "mp"}
    with engine.started(arguments | shared) as one:
        yield f"on {size} processes", one.round(asked)


def little(
    arguments: dict[str, Any], artifact: Artifact, given: argparse.Namespace
) -> dict[str, Any]:
    """A memory of some of the requests, the exact tokens of which take most."""
    options = arguments["additional_config"]["matkv"]
    full = RankTable.full(artifact.geometry).bytes_per_token(getattr(torch, given.dtype))
    table = artifact.table(given.budget, uniform=options.get("uniform", False))
    latents = 1600 * table.bytes_per_token(getattr(torch, given.dtype))
    exact = 0 if options.get("recent") == 0 else 500 * full
    return {"kv_cache_memory_bytes": latents + exact, "max_model_len": 352}


def compare(found: list[list[int]], wanted: list[list[int]]) -> tuple[str, list[tuple[int, int]]]:
    """How many sequences are equal and tokens before any differs; and where those are not."""
    places = [
        next((i for i, (x, y) in enumerate(zip(a, b, strict=True)) if x != y), len(b))
        for a, b in zip(found, wanted, strict=True)
    ]
    differ = [(index, place) for index, place in enumerate(places) if place < len(wanted[index])]
    same, total = len(found) - len(differ), sum(map(len, wanted))
    return (
        f"{same} of {len(found)} sequences equal, {sum(places)} of {total} tokens before any "
        "differs",
        differ,
    )


@torch.no_grad()
def gap(model: Any, tokens: list[int], wanted: int, found: int) -> float:
    """How much higher transformers' logit of the wanted token is than that of the found one."""
    cache = LatentCache(model)
    model(torch.tensor([tokens[:-1]]), past_key_values=cache)
    logits = model(torch.tensor([tokens[-1:]]), past_key_values=cache).logits[0, -1]
    return float(logits[wanted] - logits[found])


if __name__ == "__main__":
    start = time.perf_counter()
    main()
    print(f"{time.perf_counter() - start:.0f} s")
