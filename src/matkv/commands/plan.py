"""matkv plan: bytes and time of a cache before anything is made."""

from __future__ import annotations

from typing import Annotated

import typer

from matkv.commands import console
from matkv.commands.options import BudgetOpt, DeviceOpt, DtypeOpt, JsonOpt, TrustOpt
from matkv.commands.tables import plan_table
from matkv.models.dtype import as_device, choose, say_choice
from matkv.models.load import load_config
from matkv.plan import DEFAULT_BANDWIDTH, DEFAULT_DEVICE, PlanCase, parse_bytes, plan, stored_dtype


def plan_command(
    model_name: Annotated[str, typer.Argument(metavar="MODEL", help="hub id or directory")],
    context: Annotated[int, typer.Option(help="tokens of a sequence", min=1)],
    batch: Annotated[int, typer.Option(help="sequences", min=1)] = 1,
    budget: BudgetOpt = 0.5,
    memory: Annotated[str | None, typer.Option(help="as 80GB or 24GiB")] = None,
    bandwidth: Annotated[
        str | None,
        typer.Option(help=f"bytes a second, as 936G; {DEFAULT_DEVICE}'s 3.35T unless given"),
    ] = None,
    dtype: DtypeOpt = "auto",
    device: DeviceOpt = None,
    trust_remote_code: TrustOpt = False,
    as_json: JsonOpt = False,
) -> None:
    """What a model and its cache will take, from its config alone; no weights are loaded."""
    config = load_config(model_name, trust_remote_code=trust_remote_code)
    stored, target = stored_dtype(config), as_device(device)
    chosen = choose(dtype, stored, target)
    if dtype == "auto":
        say_choice(model_name, stored, chosen, target)
    case = PlanCase(
        context=context,
        batch=batch,
        budget=budget,
        memory=None if memory is None else parse_bytes(memory),
        bandwidth=DEFAULT_BANDWIDTH if bandwidth is None else parse_bytes(bandwidth),
        dtype=chosen,
    )
    result = plan(config, case).to_json()
    if as_json:
        console.print_json(result)
    else:
        console.out.print(plan_table(result))
