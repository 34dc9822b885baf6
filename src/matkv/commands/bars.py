"""Progress on the terminal: bars over tokens, lines that follow a stage."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.progress import (
    BarColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from matkv import progress as training
from matkv.allocate.rounds import Progress as SearchProgress
from matkv.commands.console import err
from matkv.commands.tables import budget_name


class _Rate(ProgressColumn):
    """Tokens a second."""

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text("" if speed is None else f"{speed:,.0f} tokens/s", style="cyan")


@contextmanager
def token_progress(label: str, total: int) -> Iterator[Callable[[int], None]]:
    """A bar over `total` tokens with rate and time left; yields a setter of the tokens done."""
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        _Rate(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=err) as progress:
        task = progress.add_task(label, total=total)
        yield lambda done: progress.update(task, completed=done)
        progress.update(task, completed=total)


@contextmanager
def training_progress() -> Iterator[Callable[[training.Progress], None]]:
    """A line that follows a training: stage, step, loss, held-out losses, rate and time left."""
    with err.status("training: getting ready") as status:

        def update(at: training.Progress) -> None:
            steps = f"{at.step}" if at.steps is None else f"{at.step}/{at.steps}"
            parts = [f"{at.stage} {steps}", f"loss {at.loss:.3f}"]
            parts.append(f"{at.tokens_per_second:,.0f} tokens/s")
            if at.seconds_left is not None:
                parts.append(f"{_clock(at.seconds_left)} left")
            status.update(" · ".join(parts))
            if at.probes:
                probes = ", ".join(f"{loss:.3f} at {b:.1%}" for b, loss in at.probes.items())
                err.print(f"{at.stage} {steps}, held-out loss {probes}")

        yield update


@contextmanager
def search_progress() -> Iterator[Callable[[SearchProgress], None]]:
    """A line that follows a search: rounds, the budget and KL reached, and time left."""
    with err.status("searching: getting ready") as status:
        yield lambda at: status.update(
            f"round {at.rounds} · budget {at.budget:.1%} · KL {at.kl:.3f} · "
            f"{_clock(at.seconds_left)} left"
        )


@contextmanager
def task_progress() -> Iterator[Callable[[str, float | None, int, int], None]]:
    """A line that follows the scoring of tasks: task, budget, requests answered of how many."""
    with err.status("tasks: getting ready") as status:
        yield lambda task, budget, done, total: status.update(
            f"{task} · {budget_name(budget)} · {done}/{total} requests"
        )


def _clock(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"
