"""How a long stage tells where it stands, is told to stop, and draws numbers of its own."""

from __future__ import annotations

import random
import signal
import threading
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
    """Where training stands.

    `loss` is the mean over the steps since the last report; `probes` the loss on held-out text by
    budget, measured now and then. Seconds count from the start of the stage.
    """

    stage: str
    step: int
    steps: int | None
    loss: float
    tokens: int
    seconds: float
    seconds_left: float | None
    probes: dict[float, float] = field(default_factory=dict)

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / max(self.seconds, 1e-9)


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


OnProgress = Callable[[Progress], None]


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
