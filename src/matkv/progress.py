"""How a long stage tells where it stands, is told to stop, and draws numbers of its own."""

from __future__ import annotations

import random
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from types import FrameType, TracebackType
from typing import Any

import numpy
import torch
import torch.distributed as dist


@dataclass(frozen=True, kw_only=True)
class Progress:
    """Where a stage stands: `done` of `total` units, None where only the clock ends it.

    Seconds count from the start of the stage; `seconds_left` is its own guess, where it has one.
    `note` says what is under way; `figures` are numbers by name, such as the loss; `probes` the
    loss on held-out text by budget, measured now and then.
    """

    stage: str
    done: int
    total: int | None
    unit: str
    seconds: float
    seconds_left: float | None = None
    note: str = ""
    figures: dict[str, float] = field(default_factory=dict)
    probes: dict[float, float] = field(default_factory=dict)


OnProgress = Callable[[Progress], None]


class Report:
    """Tells a listener where a stage stands; silent where nobody listens."""

    def __init__(
        self, listener: OnProgress | None, stage: str, total: int | None, unit: str = "tokens"
    ) -> None:
        self.listener, self.stage, self.total, self.unit = listener, stage, total, unit
        self.started = time.perf_counter()

    def __call__(self, done: int, note: str = "", **more: Any) -> None:
        if self.listener is not None:
            more.setdefault("seconds", time.perf_counter() - self.started)
            where: dict[str, Any] = {"stage": self.stage, "total": self.total, "unit": self.unit}
            self.listener(Progress(**where, done=done, note=note, **more))

    def part(self, done: int, note: str = "") -> OnProgress:
        """A listener for a part that begins when `done` units are over."""
        return lambda at: self(done + at.done, note)


@dataclass(frozen=True, kw_only=True)
class CurvePoint:
    """The loss of a step, and the loss on held-out text by budget after it."""

    step: int
    tokens: int
    seconds: float
    loss: float
    probes: dict[str, float]

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> CurvePoint:
        return cls(**{one.name: data[one.name] for one in fields(cls)})


@dataclass(frozen=True)
class Spent:
    """What a finished stage has used, the earlier parts of a resumed one counted in."""

    steps: int
    tokens: int
    seconds: float
    curve: tuple[CurvePoint, ...] = ()

    def to_json(self) -> dict[str, Any]:
        minutes = round(self.seconds / 60, 2)
        spent = {"steps": self.steps, "tokens": self.tokens, "minutes": minutes}
        return spent | {"curve": [asdict(point) for point in self.curve]} if self.curve else spent

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Spent:
        curve = tuple(CurvePoint.from_json(point) for point in data.get("curve", ()))
        return cls(data["steps"], data["tokens"], 60 * data["minutes"], curve)


class Interrupt:
    """Turns a first Ctrl-C into a request to stop after the step under way; a second one raises."""

    def __init__(self) -> None:
        self.requested = False
        self._before: Any = None

    def __enter__(self) -> Interrupt:
        # Python allows signal handlers in the main thread only; elsewhere Ctrl-C stays as it is.
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGINT, self._request)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._before is not None:
            signal.signal(signal.SIGINT, self._before)
            self._before = None

    def agreed(self, device: torch.device) -> bool:
        """Whether any process was asked to stop; all processes must call this together."""
        if not (dist.is_available() and dist.is_initialized()):
            return self.requested
        flag = torch.tensor(float(self.requested), device=device)
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        return bool(flag)

    def _request(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True


@contextmanager
def own_randomness(seed: int) -> Iterator[None]:
    """Seed torch's global generators meanwhile; give all global ones back as they were."""
    python, arrays = random.getstate(), numpy.random.get_state()
    try:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            yield
    finally:
        random.setstate(python)
        numpy.random.set_state(arrays)
