"""Tables and pictures of characters for the terminal."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

from matkv.artifact.artifact import Artifact
from matkv.artifact.setting import LENGTHS, Setting, budget_name, staying_text
from matkv.data.haystacks import TESTS
from matkv.evaluate.scores import AVERAGE
from matkv.ranks import SIDES, RankTable
from matkv.report.paper import PAPER_BUDGET, PAPER_SHARES

SHADES = " ░▒▓█"


def bytes_text(count: float) -> str:
    """Bytes in powers of a thousand, as memory is sold: 1.50 GB is 1.5 × 10⁹ of them."""
    if count < 1000:
        return f"{count:.0f} bytes"
    for unit in ("kB", "MB", "GB", "TB"):
        count /= 1000
        if count < 1000 or unit == "TB":
            break
    return f"{count:,.{2 if count < 10 else 1 if count < 100 else 0}f} {unit}"


TABLES = "rank tables, KL in nats a token on held-out text; held of the whole cache at " + (
    " / ".join(f"{tokens:,}" for tokens in LENGTHS) + " tokens"
)


def held_cell(artifact: Artifact, table: RankTable) -> str:
    """What of the whole cache a table holds, exact tokens and layers that stay counted."""
    exact = {"sink": artifact.sink, "recent": artifact.recent}
    return " / ".join(f"{table.held(tokens, **exact):.0%}" for tokens in LENGTHS)


def tables_table(artifact: Artifact, entries: Sequence[dict[str, Any]]) -> Table:
    """What a search found, by budget: shares and divergence, beside uniform ranks."""
    table = Table(title=TABLES, title_justify="left", caption=staying_text(artifact))
    names = ("keys", "values", "KL", "uniform", "perplexity", "uniform")
    for name in ("budget", "held", *names):
        table.add_column(name, justify="right")
    for entry in sorted(entries, key=lambda one: -one["budget"]):
        uniform_kl = entry.get("uniform_kl")
        uniform_increase = entry.get("uniform_perplexity_increase")
        table.add_row(
            f"{entry['budget']:.1%}",
            held_cell(artifact, artifact.tables[entry["budget"]]),
            f"{entry['key_share']:.1%}",
            f"{entry['value_share']:.1%}",
            f"{entry['kl']:.3f}",
            "" if uniform_kl is None else f"{uniform_kl:.3f}",
            f"{entry['perplexity_increase']:+.1%}",
            "" if uniform_increase is None else f"{uniform_increase:+.1%}",
        )
    return table


def benchmark_table(
    artifact: Artifact, settings: Iterable[Setting], rows: Sequence[dict[str, Any]]
) -> Table:
    """Decoding steps of full caches and budgets, situation by situation."""
    table = Table(title="one decoding step; speedup over DynamicCache", title_justify="left")
    table.caption = staying_text(artifact, settings)
    names = ("context", "batch", "cache", "step ms", "speedup", "quartiles", "limit", "first token")
    for name in (*names, "cache bytes", "held"):
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
            f"{row['held']:.1%}",
        )
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


def evaluation_table(title: str, rows: Sequence[dict[str, Any]]) -> Table:
    """Budgets with bytes a token and perplexity, against the full cache where it was measured.

    What is held is of the whole cache after a window of text.
    """
    table = Table(title=title, title_justify="left")
    for name in ("budget", "kept", "held", "bytes/token", "perplexity", "× full"):
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


def divergence_table(title: str, rows: Sequence[dict[str, Any]]) -> Table:
    """Divergence from the full cache, and equal next tokens; behind ± stands one standard error."""
    table = Table(title=title, title_justify="left")
    for name in ("budget", "KL, nats a token", "same next token, %"):
        table.add_column(name, justify="right")
    for row in rows:
        known = row["kl_stderr"] is not None and math.isfinite(row["kl_stderr"])
        errors = [f" ± {row['kl_stderr']:.4f}", f" ± {100 * row['same_stderr']:.1f}"]
        kl, same = errors if known else ("", "")
        table.add_row(
            budget_name(row["budget"]), f"{row['kl']:.4f}{kl}", f"{100 * row['same']:.1f}{same}"
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
    for layer in artifact.geometry.compressed:
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


# Dark to light, even in brightness: few columns kept to all of them.
RANK_SHADES = (
    "#440154",
    "#46327e",
    "#365c8d",
    "#277f8e",
    "#1fa187",
    "#4ac16d",
    "#a0da39",
    "#fde725",
)


def share_lines(table: RankTable) -> str:
    """Kept columns of keys and of values, and below them the paper's."""
    ours = ", ".join(f"{side}s {table.share(side):.1%}" for side in SIDES)
    paper = ", ".join(f"{side}s {share:.1%}" for side, share in PAPER_SHARES.items())
    return f"kept at {table.budget:.1%}: {ours}\npaper, LLaMA2-7B at {PAPER_BUDGET:.1%}: {paper}"


def heatmap(table: RankTable) -> Group:
    """A rank table for the terminal: one row a layer, one coloured rank a head; print with rich.

    With codes the numbers are bits a column of the head dim, gains counted.
    """
    grid = Table.grid(padding=(0, 2))
    grid.add_row(Text("layer", style="dim"), *(Text(f"{side}s", style="bold") for side in SIDES))
    for layer in table.geometry.compressed:
        dim = table.geometry.layers[layer].head_dim
        if table.coded:
            cells = [_bit_cells(table.bits(layer, side)) for side in SIDES]
        else:
            cells = [_rank_cells(table.side(side)[layer], dim) for side in SIDES]
        grid.add_row(Text(str(layer), style="dim", justify="right"), *cells)
    lines = share_lines(table)
    return Group(grid, Text(f"bits a column\n{lines}" if table.coded else lines))


def _rank_cells(ranks: Sequence[int], dim: int) -> Text:
    return _shaded([(f"{rank:>{len(str(dim)) + 1}}", rank / dim) for rank in ranks])


def _bit_cells(bits: Sequence[float]) -> Text:
    # Few heads spend more than half of 16 bits: shades show the differences below.
    return _shaded([(f"{one:>5.1f}", min(1.0, one / 8)) for one in bits])


def _shaded(cells: Sequence[tuple[str, float]]) -> Text:
    """Numbers, shaded by their shares in 0..1."""
    text = Text()
    for number, share in cells:
        shade = RANK_SHADES[min(len(RANK_SHADES) - 1, int(share * len(RANK_SHADES)))]
        text.append(f"{number} ", style=f"{'black' if share > 0.5 else 'white'} on {shade}")
    return text


Rows = list[dict[str, Any]]


def needle_table(title: str, rows: Rows) -> Table:
    """Accuracy in percent ± one standard error and the answer's loss, over all depths of a context.

    Every depth has as many samples, so that means of rows are means of samples.
    """
    table = Table(title=title, title_justify="left")
    for name in ("context", "budget"):
        table.add_column(name, justify="right")
    for test in TESTS:
        table.add_column(test, justify="right")
        table.add_column("loss", justify="right")
    for context, budget in sorted(
        dict.fromkeys((row["context"], row["budget"]) for row in rows), key=lambda one: one[0]
    ):
        cells: list[str] = []
        for test in TESTS:
            cells += _cells([row for row in rows if _name(row) == (context, budget, test)])
        table.add_row(f"{context:,}", budget_name(budget), *cells)
    return table


def _name(row: dict[str, Any]) -> tuple[int, float | None, str]:
    return row["context"], row["budget"], row["test"]


def _cells(rows: Rows) -> tuple[str, str]:
    accuracy = sum(row["accuracy"] for row in rows) / len(rows)
    stderr = math.sqrt(accuracy * (1 - accuracy) / sum(row["n"] for row in rows))
    loss = sum(row["answer_loss"] for row in rows) / len(rows)
    return f"{100 * accuracy:.0f} ± {100 * stderr:.0f}", f"{loss:.2f}"


def positions_table(title: str, rows: Rows) -> Table:
    """Perplexity, a line for each budget and a column for each range of positions."""
    table = Table(title=title, title_justify="left")
    ranges = list(dict.fromkeys((row["start"], row["end"]) for row in rows))
    names = ["budget", *(f"{start:,}-{end - 1:,}" for start, end in ranges), "all"]
    for name in names:
        table.add_column(name, justify="right")
    for budget in dict.fromkeys(row["budget"] for row in rows):
        mine = [row for row in rows if row["budget"] == budget]
        total = sum(row["tokens"] * math.log(row["perplexity"]) for row in mine)
        overall = math.exp(total / sum(row["tokens"] for row in mine))
        values = [*(row["perplexity"] for row in mine), overall]
        table.add_row(budget_name(budget), *(f"{value:.2f}" for value in values))
    return table
