"""What the command line prints: tables, bars and pictures. The library itself only logs."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console
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
from rich.table import Table
from rich.text import Text

from matkv import progress as training
from matkv.artifact import Artifact
from matkv.ranks import SIDES
from matkv.rounds import Progress as SearchProgress
from matkv.task_scores import AVERAGE

# Results go to standard output, progress and notes to standard error: --json can be piped.
out = Console(highlight=False)
err = Console(stderr=True, highlight=False)

SHADES = " ░▒▓█"


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


def tables_table(entries: Sequence[dict[str, Any]]) -> Table:
    """What a search found, by budget: shares and divergence, beside uniform ranks."""
    table = Table(title="rank tables, KL in nats a token on held-out text", title_justify="left")
    for name in ("budget", "keys", "values", "KL", "uniform", "perplexity", "uniform"):
        table.add_column(name, justify="right")
    for entry in sorted(entries, key=lambda one: -one["budget"]):
        uniform_kl = entry.get("uniform_kl")
        uniform_increase = entry.get("uniform_perplexity_increase")
        table.add_row(
            f"{entry['budget']:.1%}",
            f"{entry['key_share']:.1%}",
            f"{entry['value_share']:.1%}",
            f"{entry['kl']:.3f}",
            "" if uniform_kl is None else f"{uniform_kl:.3f}",
            f"{entry['perplexity_increase']:+.1%}",
            "" if uniform_increase is None else f"{uniform_increase:+.1%}",
        )
    return table


def benchmark_table(rows: Sequence[dict[str, Any]]) -> Table:
    """Decoding steps of full caches and budgets, situation by situation."""
    table = Table(title="one decoding step; speedup over DynamicCache", title_justify="left")
    names = ("context", "batch", "cache", "step ms", "speedup", "quartiles", "limit", "first token")
    for name in (*names, "cache bytes"):
        table.add_column(name, justify="right")
    for row in rows:
        first = row["first_token_ms"]
        table.add_row(
            f"{row['context']:,}",
            str(row["batch"]),
            row["name"],
            f"{row['step_ms']:.1f}",
            f"{row['speedup']:.2f}",
            f"{row['speedup_low']:.2f}-{row['speedup_high']:.2f}",
            f"{row['limit']:.2f}",
            "" if first is None else f"{first:.0f} ms",
            f"{row['cache_bytes']:,}",
        )
    return table


def plan_table(plan: dict[str, Any]) -> Table:
    """Full and compressed cache of a plan, side by side."""
    title = (
        f"{plan['model_type']}, {plan['parameters']:,} parameters, "
        f"{plan['weight_bytes']:,} bytes of {plan['dtype']} weights; "
        f"{plan['batch']} × {plan['context']:,} tokens"
    )
    table = Table(title=title, title_justify="left")
    for name in ("", "full", f"{plan['budget']:.1%}"):
        table.add_column(name, justify="right")
    for name, value in plan["full"].items():
        pair = (value, plan["compressed"][name])
        table.add_row(name.replace("_", " "), *("" if x is None else _number(x) for x in pair))
    return table


def facts(title: str, values: dict[str, Any]) -> Table:
    """Names and values, a line each."""
    table = Table(title=title, title_justify="left", show_header=False)
    for name, value in values.items():
        table.add_row(name, _number(value))
    return table


def _number(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:,.2f}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def print_json(data: Any) -> None:
    """Machine-readable output: NaN, which JSON lacks, becomes null."""
    print(json.dumps(_without_nan(data), indent=1))


def _without_nan(data: Any) -> Any:
    if isinstance(data, float) and data != data:
        return None
    if isinstance(data, dict):
        return {key: _without_nan(value) for key, value in data.items()}
    if isinstance(data, (list, tuple)):
        return [_without_nan(value) for value in data]
    return data


def evaluation_table(title: str, rows: Sequence[dict[str, Any]]) -> Table:
    """Budgets with bytes a token and perplexity, against the full cache where it was measured."""
    table = Table(title=title, title_justify="left")
    for name in ("budget", "kept", "with exact", "bytes/token", "perplexity", "× full"):
        table.add_column(name, justify="right")
    full = next((row["perplexity"] for row in rows if row["budget"] is None), None)
    for row in rows:
        table.add_row(
            budget_name(row["budget"]),
            f"{row['kept']:.1%}",
            f"{row.get('held', row['kept']):.1%}",
            f"{row['bytes_per_token']:,}",
            f"{row['perplexity']:.2f}",
            "" if full is None else f"{row['perplexity'] / full:.3f}",
        )
    return table


def tasks_table(title: str, rows: Sequence[dict[str, Any]]) -> Table:
    """Accuracy in percent, a line for each budget and a column for each task, as papers have it.

    `rows` are those of `task_scores.summarize`; behind ± stands one standard error.
    """
    names = list(dict.fromkeys(row["task"] for row in rows))
    budgets = list(dict.fromkeys(row["budget"] for row in rows))
    found = {(row["budget"], row["task"]): row for row in rows}
    table = Table(title=title, title_justify="left")
    for name in ("budget", *names, "− full", "retention", "above chance"):
        table.add_column(name, justify="right")
    for budget in budgets:
        average = found[budget, AVERAGE]
        table.add_row(
            budget_name(budget),
            *(_percent(found[budget, name], "acc", "stderr") for name in names),
            _percent(average, "difference", "difference_stderr", sign="+"),
            _share(average["retention"]),
            _share(average["retention_above_chance"]),
        )
    return table


def budget_name(budget: float | None) -> str:
    """A budget as tables show it."""
    return "full cache" if budget is None else f"{budget:.1%}"


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.1%}"


def _percent(row: dict[str, Any], value: str, error: str, sign: str = "") -> str:
    if row[value] is None:
        return ""
    spread = "" if row[error] is None else f" ± {100 * row[error]:.1f}"
    return f"{100 * row[value]:{sign}.1f}{spread}"


def energy_picture(artifact: Artifact, blocks: int = 16) -> Table:
    """Where each layer's energy lies among its ordered columns, darker for more.

    Every character is a sixteenth of the columns, the most important first, averaged over KV heads;
    behind it the columns that hold 90% of the energy.
    """
    table = Table(title="energy of the bases, most important columns first", title_justify="left")
    table.add_column("layer", justify="right")
    for side in SIDES:
        table.add_column(f"{side}s", no_wrap=True)
        table.add_column("90% in", justify="right")
    for layer in artifact.geometry.growing:
        cells = []
        for side in SIDES:
            energy_D = artifact.bases[layer][side].energy_GD.mean(0)
            parts = [float(part.sum()) for part in energy_D.tensor_split(blocks)]
            cells += ["".join(map(_shade, parts)), f"{columns_holding(energy_D.tolist(), 0.9)}"]
        table.add_row(str(layer), *cells)
    return table


def columns_holding(energy: Sequence[float], share: float) -> int:
    """How many leading columns hold `share` of the energy."""
    held = 0.0
    for count, part in enumerate(energy, start=1):
        held += part
        if held >= share:
            return count
    return len(energy)


def _shade(part: float) -> str:
    """A shade for a part of the energy; each step is a factor of four."""
    steps = (0.004, 0.016, 0.064, 0.25)
    return SHADES[sum(part >= step for step in steps)]
