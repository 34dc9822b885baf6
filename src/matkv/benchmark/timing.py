"""Measuring on a busy machine: candidates take turns, and ratios are taken turn by turn."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch


@dataclass(frozen=True)
class Spread:
    """The median of some measurements and their quartiles."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        if len(values) < 2:
            return cls(*(values[0],) * 3)
        low, median, high = statistics.quantiles(values, n=4, method="inclusive")
        return cls(median, low, high)

    @classmethod
    def of_ratios(cls, over: Sequence[float], under: Sequence[float]) -> Spread:
        """The spread of over / under, measurement by measurement."""
        return cls.of([a / b for a, b in zip(over, under, strict=True)])


def take_turns(
    candidates: Mapping[str, Callable[[], object]],
    rounds: int,
    *,
    warm_up: int = 2,
    device: torch.device | str = "cpu",
) -> dict[str, list[float]]:
    """Milliseconds of every candidate in every round, after `warm_up` rounds that do not count.

    All candidates run once a round, in an order that is turned by one from round to round.
    """
    names = list(candidates)
    times: dict[str, list[float]] = {name: [] for name in names}
    for index in range(warm_up + rounds):
        turn = index % len(names)
        for name in names[turn:] + names[:turn]:
            took = milliseconds(candidates[name], device)
            if index >= warm_up:
                times[name].append(took)
    return times


def milliseconds(work: Callable[[], object], device: torch.device | str = "cpu") -> float:
    """Wall time of one call, with the device's queue empty before and after it."""
    wait = torch.cuda.synchronize if torch.device(device).type == "cuda" else _nothing
    wait()
    started = time.perf_counter()
    work()
    wait()
    return 1e3 * (time.perf_counter() - started)


def transient_bytes(work: Callable[[], object], device: torch.device | str = "cpu") -> int | None:
    """Bytes that one call takes on top of what is held before it, at its peak; None if unknown.

    On the CPU it is the growth of the process's resident memory, which Linux can tell.
    """
    if torch.device(device).type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        return torch.cuda.max_memory_allocated(device) - before
    try:
        Path("/proc/self/clear_refs").write_text("5")  # forget the high-water mark
        resident = _kilobytes("VmRSS")
        work()
        return 1024 * max(0, _kilobytes("VmHWM") - resident)
    except OSError:
        return None


def _kilobytes(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


@contextmanager
def thread_count(threads: int | None) -> Iterator[None]:
    """Let torch use so many CPU threads meanwhile; None leaves it alone."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _nothing() -> None:
    pass
