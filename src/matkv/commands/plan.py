"""matkv plan: bytes and time of a cache before anything is made."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated

import typer

from matkv.commands import console
from matkv.commands.from_fields import from_fields
from matkv.commands.options import JsonOpt, Loading
from matkv.commands.tables import plan_table
from matkv.models.dtype import as_device, choose, say_choice
from matkv.models.load import load_config
from matkv.plan import PlanCase, plan, stored_dtype


@from_fields(without=("model",))
def plan_command(
    model_name: Annotated[str, typer.Argument(metavar="MODEL", help="hub id or directory")],
    case: PlanCase,
    loading: Loading,
    as_json: JsonOpt = False,
) -> None:
    """What a model and its cache will take, from its config alone; no weights are loaded."""
    config = load_config(model_name, trust_remote_code=loading.trust_remote_code)
    stored, target = stored_dtype(config), as_device(loading.device)
    chosen = choose(loading.dtype, stored, target)
    if loading.dtype == "auto":
        say_choice(model_name, stored, chosen, target)
    result = plan(config, replace(case, dtype=chosen)).to_json()
    if as_json:
        console.print_json(result)
    else:
        console.out.print(plan_table(result))
