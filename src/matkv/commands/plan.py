"""matkv plan: bytes and time of a cache before anything is made."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Group
from rich.table import Table
from rich.text import Text

from matkv.artifact.artifact import Artifact
from matkv.commands import console
from matkv.commands.from_fields import from_fields
from matkv.commands.options import JsonOpt, Loading, as_runs
from matkv.commands.tables import bytes_text
from matkv.hf.geometry import geometry_of
from matkv.models.dtype import as_device, choose, say_choice
from matkv.models.load import load_config
from matkv.plan import DEFAULT_BANDWIDTH, DEFAULT_DEVICE, Plan, PlanCase, plan, stored_dtype


@from_fields(without=("model",))
def plan_command(
    model_name: Annotated[str, typer.Argument(metavar="MODEL", help="hub id or directory")],
    case: PlanCase,
    loading: Loading,
    run: Annotated[
        Path | None,
        typer.Option(
            metavar="RUN",
            help="plan with this artifact's tables and exact tokens; equal ranks unless given",
            callback=as_runs,
        ),
    ] = None,
    as_json: JsonOpt = False,
) -> None:
    """What a model and its cache will take, from its config alone; no weights are loaded."""
    config = load_config(model_name, trust_remote_code=loading.trust_remote_code)
    stored, target = stored_dtype(config), as_device(loading.device)
    chosen = choose(loading.dtype, stored, target)
    if loading.dtype == "auto":
        say_choice(model_name, stored, chosen, target)
    case = replace(case, dtype=chosen)
    if run is None:
        result = plan(config, case)
    else:
        artifact = Artifact.load(run)
        artifact.check_geometry(geometry_of(config))
        table = artifact.table(case.budget)
        result = plan(config, case, table, sink=artifact.sink, recent=artifact.recent)
    if as_json:
        console.print_json(result.to_json())
    else:
        console.out.print(plan_table(result))


def plan_table(made: Plan) -> Group:
    """Full and compressed cache of a plan, side by side, in powers of a thousand bytes."""
    title = (
        f"{made.model_type}: {made.parameters:,} parameters in {made.dtype}, "
        f"{bytes_text(made.weight_bytes)}; {made.batch} × {made.context:,} tokens"
    )
    ways = made.full, made.compressed
    table = Table()
    table.add_column("")
    exact = f", {made.sink + made.recent} tokens exact" if made.sink + made.recent else ""
    for name in ("full", f"budget {made.budget:.1%}{exact}"):
        table.add_column(name, justify="right")
    table.add_row("cache", *(bytes_text(way.cache_bytes) for way in ways))
    table.add_row("each further token", *(bytes_text(way.token_bytes) for way in ways))
    table.add_row("bases", *(bytes_text(way.bases_bytes) for way in ways))
    table.add_row("weights, bases and cache", *(bytes_text(way.total_bytes) for way in ways))
    if made.memory is not None:
        fits = f"fits in {bytes_text(made.memory)}"
        table.add_row(fits, *("yes" if way.fits else "no" for way in ways))
        table.add_row("largest batch", *(f"{way.largest_batch:,}" for way in ways))
        table.add_row("largest context", *(f"{way.largest_context:,}" for way in ways))
    device = f", {DEFAULT_DEVICE}" if made.bandwidth == DEFAULT_BANDWIDTH else ""
    step = f"decoding step at {bytes_text(made.bandwidth)}/s{device}"
    table.add_row(step, *(f"{way.decode_ms:,.2f} ms" for way in ways))
    return Group(Text(title), table, Text(_shares(made)))


def _shares(made: Plan) -> str:
    """Of what the budget is a share, and what that leaves of all bytes."""
    stays = made.layers - made.compressed_layers
    share = made.compressed.cache_bytes / made.full.cache_bytes
    of = f"{share:.1%} of the whole cache's bytes"
    if not stays:
        return f"the budget is of all {made.layers} layers; held are {of}"
    return (
        f"{stays} of {made.layers} layers have a sliding window and stay as they are: "
        f"{made.budget:.1%} of the others is {of}"
    )
