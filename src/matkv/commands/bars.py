"""Progress of a stage: a bar on a terminal, a line now and then in a file."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, ProgressColumn, SpinnerColumn, Task, TextColumn
from rich.progress import Progress as Bars
from rich.text import Text

from matkv.commands import console
from matkv.progress import OnProgress, Progress

EVERY = 30  # seconds from one line of a file to the next


class _Told(ProgressColumn):
    """What the stage says of itself."""

    def render(self, task: Task) -> Text:
        return Text(task.fields["told"], style="cyan")


@contextmanager
def progress_bar(label: str, total: int | None = None) -> Iterator[OnProgress]:
    """Follow a stage called `label`; `total` units where the stage itself does not know.

    Off a terminal a line is printed every half minute. Losses on held-out text stay as lines.
    """
    err = console.err
    follow = _drawn(err, label, total) if err.is_terminal else _written(err, label, total)
    with follow as update:

        def listen(at: Progress) -> None:
            update(at)
            if at.probes:
                probes = ", ".join(f"{loss:.3f} at {b:.1%}" for b, loss in at.probes.items())
                err.print(f"{at.stage} {_count(at, at.total)}, held-out loss {probes}")

        yield listen


@contextmanager
def _drawn(err: Console, label: str, total: int | None) -> Iterator[OnProgress]:
    columns = (SpinnerColumn(), TextColumn("{task.description}", markup=False), BarColumn())
    with Bars(*columns, _Told(), console=err) as bars:
        task = bars.add_task(label, total=total, told="getting ready")

        def update(at: Progress) -> None:
            most = at.total or total
            bars.update(task, completed=at.done, total=most, told=told(at, most))

        yield update


@contextmanager
def _written(err: Console, label: str, total: int | None) -> Iterator[OnProgress]:
    last = time.monotonic()

    def update(at: Progress) -> None:
        nonlocal last
        if time.monotonic() - last >= EVERY:
            last = time.monotonic()
            err.print(f"{label}: {told(at, at.total or total)}", soft_wrap=True)

    yield update


def told(at: Progress, total: int | None) -> str:
    """Where a stage stands in a line: what is done, its rate, the time left, its note."""
    tokens = at.done if at.unit == "tokens" else at.figures.get("tokens")
    left = at.seconds_left
    if left is None and total and at.done:
        left = at.seconds / at.done * (total - at.done)
    parts = [
        f"{_count(at, total)} {at.unit}",
        f"{tokens / at.seconds:,.0f} tokens/s" if tokens and at.seconds > 0 else "",
        f"{int(left) // 60}:{int(left) % 60:02d} left" if left is not None else "",
        at.note,
    ]
    return " · ".join(part for part in parts if part)


def _count(at: Progress, total: int | None) -> str:
    return f"{at.done:,}" if total is None else f"{at.done:,}/{total:,}"
