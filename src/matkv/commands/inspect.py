"""matkv inspect: what an artifact holds, on one screen."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from matkv.artifact.artifact import Artifact
from matkv.artifact.history import Allocated, entries
from matkv.artifact.setting import budget_name, held_shares, staying_text
from matkv.commands import console
from matkv.commands.options import JsonOpt, RunArg
from matkv.commands.tables import TABLES, energy_picture, held_cell
from matkv.ranks import SIDES, Geometry, RankTable

EnergyOpt = Annotated[bool, typer.Option("--energy", help="draw each layer's energy as well")]


def inspect_command(run: RunArg, energy: EnergyOpt = False, as_json: JsonOpt = False) -> None:
    """Show what an artifact holds: its base model, how it was made, and its rank tables."""
    artifact = Artifact.load(run)
    if as_json:
        console.print_json(_as_json(artifact))
        return
    console.out.print(_facts(artifact))
    if artifact.tables:
        console.out.print(_tables(artifact))
    else:
        console.out.print("no rank tables: every budget keeps equal ranks everywhere")
    if energy:
        console.out.print(energy_picture(artifact))


def _facts(artifact: Artifact) -> Table:
    """A line for each thing to know, more where it is too long for one."""
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="bold", no_wrap=True)  # values wrap instead
    grid.add_column()
    for name, text in _lines(artifact):
        grid.add_row(name, Text(text))
    return grid


def _lines(artifact: Artifact) -> Iterator[tuple[str, str]]:
    geometry = artifact.geometry
    yield "base model", artifact.base_model or "without a name"
    yield "bases", artifact.digest
    yield "compressed", _layers(geometry, geometry.compressed)
    windows = sorted({layer.window for layer in geometry.layers if layer.window is not None})
    for window in windows:
        sliding = [i for i, layer in enumerate(geometry.layers) if layer.window == window]
        kind = "of these" if geometry.layers[sliding[0]].ring else "as it is"
        yield kind, f"{_layers(geometry, sliding)}, sliding windows of {window:,} tokens"
    yield "exact", _exact(artifact)
    if artifact.lora is not None:
        maps = len(list(artifact.lora.updates()))
        yield "adapters", f"rank {artifact.lora.config['r']} on {maps} linear maps"
    if artifact.smallest_trained_rank:
        yield "trained", f"at ranks of {artifact.smallest_trained_rank} and more"
    for entry in artifact.history:
        yield str(entry.get("stage", "stage")), _stage(entry)


def _exact(artifact: Artifact) -> str:
    if not artifact.sink and not artifact.recent:
        return "no token, unless asked for"
    return f"the first {artifact.sink} and the last {artifact.recent} tokens"


def _layers(geometry: Geometry, layers: Sequence[int]) -> str:
    """How many layers, which, and their heads."""
    shapes = {(geometry.layers[i].kv_heads, geometry.layers[i].head_dim) for i in layers}
    heads = ", ".join(f"{heads} KV heads of dim {dim}" for heads, dim in sorted(shapes))
    total = len(geometry.layers)
    which = "all" if len(layers) == total else f"{len(layers)} of"
    named = "" if len(layers) == total else f" ({_ranges(layers)})"
    return f"{which} {total} layers{named}, {heads}"


def _ranges(numbers: Sequence[int]) -> str:
    """0-4, 6, 8-9."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)


def _stage(entry: dict[str, Any]) -> str:
    """What a stage says of itself in single values, and how long its own parts took."""
    parts = [_said(name, value) for name, value in entry.items() if name != "stage"]
    stages = entry.get("stages")
    for name, spent in stages.items() if isinstance(stages, dict) else ():
        steps = spent.get("steps") if isinstance(spent, dict) else None
        parts.append(f"{name} of {steps:,} steps" if isinstance(steps, int) else str(name))
    return " · ".join(part for part in parts if part)


def _said(name: str, value: Any) -> str:
    """One value in words; none for lists, tables and what was not used."""
    if value in (None, False, "") or isinstance(value, (dict, list, tuple)):
        return ""
    if value is True:
        return name
    shown = f"{value:,}" if isinstance(value, int) else f"{value}"
    return f"{name.replace('_', ' ')} {shown}"


def _tables(artifact: Artifact) -> Table:
    table = Table(title=TABLES, title_justify="left", caption=staying_text(artifact))
    names = (*(f"{side}s" for side in SIDES), "ranks", "bits", "KL", "uniform KL")
    for name in ("budget", "held", *names):
        table.add_column(name, justify="right")
    searches = entries(artifact.history, Allocated)
    checks = {one.budget: one for one in (searches[-1].checks if searches else ())}
    for budget, ranks in sorted(artifact.tables.items(), reverse=True):
        kept = [rank for *_, rank in ranks.compressed_ranks()]
        shares = (f"{ranks.share(side):.1%}" for side in SIDES)
        check = checks.get(budget)
        measured = (None, None) if check is None else (check.kl, check.uniform_kl)
        table.add_row(
            budget_name(budget),
            held_cell(artifact, ranks),
            *shares,
            f"{min(kept)}-{max(kept)}",
            _bits(ranks),
            *("" if value is None else f"{value:.3f}" for value in measured),
        )
    return table


def _bits(table: RankTable) -> str:
    """The fewest and the most bits that a head spends on a column; nothing without codes."""
    if not table.coded:
        return ""
    spent = [
        bits
        for layer in table.geometry.compressed
        for side in SIDES
        for bits in table.bits(layer, side)
    ]
    return f"{min(spent):.1f}-{max(spent):.1f}"


def _as_json(artifact: Artifact) -> dict[str, Any]:
    """All that is on the screen, the ranks themselves, and the energy of every column."""
    energy = {
        str(layer): {side: bases.energy_GD.tolist() for side, bases in sides.items()}
        for layer, sides in artifact.bases.items()
    }
    return {
        "base_model": artifact.base_model,
        "digest": artifact.digest,
        "geometry": artifact.geometry.to_json(),
        "fingerprint": artifact.fingerprint,
        "sink": artifact.sink,
        "recent": artifact.recent,
        "smallest_trained_rank": artifact.smallest_trained_rank,
        "adapters": None if artifact.lora is None else artifact.lora.config,
        "history": artifact.history,
        "budgets": sorted(artifact.tables),
        "tables": {str(b): table.to_json() for b, table in sorted(artifact.tables.items())},
        "held": held_shares(artifact),
        "energy": energy,
    }
