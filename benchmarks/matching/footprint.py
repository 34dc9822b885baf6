"""What a method takes: resident memory a token, memory and time of a prompt, time of a step.

Memory is what the operating system says the process holds. So that it says what the allocator was
asked for, pieces of 64 KiB and more are mapped one by one meanwhile and given back when they are
freed: untouched spare room does not count, freed tensors do not, and what else the process does is
in both numbers of a difference. All of it runs once before it counts.

Time is taken in turns with the full cache, because a machine may be shared: ratios are what counts.

Shapes: B batch, T token.
"""

from __future__ import annotations

import ctypes
import gc
import statistics
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from peers.protocol import Method, cache_argument

from .columns import Reader, Value
from .material import Footprint

CHUNK = 256  # tokens read at once where bytes a token are measured
MMAP_THRESHOLD, TRIM_THRESHOLD = -3, -1  # of mallopt
SMALL, LARGE = 1 << 16, 1 << 25
ROUNDS = 2


@torch.inference_mode()
def memory(model: Any, method: Method, material: Footprint) -> Value:
    """Bytes that a token adds to the process, and the peak of reading a prompt in one pass.

    The method is applied to the model. Nothing where the system is not Linux.
    """
    if not Path("/proc/self/clear_refs").exists():
        return {}
    few, tokens = material.few, material.tokens
    with mapped_allocations():
        for _ in range(2):  # the second time counts
            start, cache = resident(), method.new_cache(model)
            read_on(model, cache, tokens[:few], 0)
            first = resident()
            read_on(model, cache, tokens[few:], few)
            second = resident()
            del cache
        after = resident()
        peak = transient(lambda: method.read(model, batch(model, tokens[: material.prompt])))
    return {
        "bytes_per_token": (second - first) / (len(tokens) - few),
        "first_bytes": first - start,
        "left_bytes": after - start,
        "prompt_peak_bytes": peak,
    }


def read_on(model: Any, cache: Any, ids: list[int], start: int) -> None:
    """Feed tokens at the positions from `start` on, in chunks."""
    for at in range(0, len(ids), CHUNK):
        part = batch(model, ids[at : at + CHUNK])
        end = start + at + part.shape[1]
        positions_BT = torch.arange(start + at, end, device=model.device)[None]
        given = cache_argument(model, cache)
        model.get_decoder()(part, **given, position_ids=positions_BT, use_cache=True)


def batch(model: Any, ids: list[int]) -> torch.Tensor:
    return torch.tensor([ids], device=model.device)


def resident() -> int:
    """Bytes the process holds, what was freed given back."""
    gc.collect()
    if sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)
    return _status("VmRSS")


def transient(work: Any) -> int:
    """Bytes that a call takes at its peak, on top of what was held before."""
    before = resident()
    Path("/proc/self/clear_refs").write_text("5")  # forget the high-water mark
    work()
    return max(0, _status("VmHWM") - before)


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


@contextmanager
def mapped_allocations() -> Iterator[None]:
    """Let the C library map what is not small meanwhile, so that freed memory leaves at once."""
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "mallopt"):  # another C library than GNU's: what it does, it does
        yield
        return
    libc.mallopt(MMAP_THRESHOLD, SMALL)
    try:
        yield
    finally:
        libc.mallopt(MMAP_THRESHOLD, LARGE)
        libc.mallopt(TRIM_THRESHOLD, LARGE)


def speed(model: Any, method: Method, material: Footprint) -> Value:
    """Time to the first token of a prompt, and of a step behind it, in turns with the full cache.

    The method is not applied to the model. Times are medians, ratios taken turn by turn.
    """
    turns: dict[str, list[tuple[float, float]]] = {"full": [], "own": []}
    for index in range(ROUNDS):
        order = [("full", Method()), ("own", method)]
        for name, one in order if index % 2 == 0 else order[::-1]:
            with one.applied(model) as used:
                turns[name].append(_turn(used, one, material))
    found: Value = {}
    for at, what in enumerate(("first_token", "step")):
        own, full = ([turn[at] for turn in turns[name]] for name in ("own", "full"))
        ratios = [one / other for one, other in zip(own, full, strict=True)]
        found |= {f"{what}_ms": 1e3 * statistics.median(own)}
        found |= {f"{what}_over_full": statistics.median(ratios)}
    return found


@torch.inference_mode()
def _turn(model: Any, method: Method, material: Footprint) -> tuple[float, float]:
    """Seconds to the first token, and of one step."""
    ids = material.tokens[: material.prompt]
    Reader.of(model, method, ids[:64]).feed(ids[:1])  # what is built at first
    started = time.perf_counter()
    reader = Reader.of(model, method, ids[:-1])
    token = int(reader.feed(ids[-1:])[-1].argmax())
    first = time.perf_counter() - started
    steps = []
    for _ in range(material.steps):
        started = time.perf_counter()
        token = int(reader.feed([token])[-1].argmax())
        steps.append(time.perf_counter() - started)
    return first, statistics.median(steps)
