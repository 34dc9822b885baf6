"""matkv inspect: what an artifact holds."""

from __future__ import annotations

from matkv.artifact.artifact import Artifact
from matkv.commands import console
from matkv.commands.options import JsonOpt, RunArg
from matkv.commands.tables import energy_picture


def inspect_command(run: RunArg, as_json: JsonOpt = False) -> None:
    """Show what an artifact holds: its base model, its tables, and each layer's energy."""
    artifact = Artifact.load(run)
    if not as_json:
        console.out.print(f"base model {artifact.base_model}")
        for entry in artifact.history:
            console.out.print(" · ".join(f"{name} {value}" for name, value in entry.items()))
        for budget, table in sorted(artifact.tables.items(), reverse=True):
            keys, values = table.share("key"), table.share("value")
            console.out.print(f"table {budget:.1%}: keys {keys:.1%}, values {values:.1%}")
        console.out.print(energy_picture(artifact))
        return
    energy = {
        str(layer): {side: bases.energy_GD.tolist() for side, bases in sides.items()}
        for layer, sides in artifact.bases.items()
    }
    console.print_json(
        {
            "base_model": artifact.base_model,
            "history": artifact.history,
            "budgets": sorted(artifact.tables),
            "energy": energy,
        }
    )
