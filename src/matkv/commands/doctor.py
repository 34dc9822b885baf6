"""matkv doctor: what is on this machine, and whether an artifact fits its model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from matkv.commands import console
from matkv.commands.from_fields import from_fields
from matkv.commands.machine import examine, fit
from matkv.commands.options import JsonOpt, Loading, as_runs
from matkv.commands.tables import facts
from matkv.errors import ArtifactError


@from_fields(without=("dtype",))
def doctor_command(
    loading: Loading,
    run: Annotated[
        Path | None,
        typer.Argument(
            metavar="[RUN]", help="artifact to check against its model", callback=as_runs
        ),
    ] = None,
    as_json: JsonOpt = False,
) -> None:
    """Say what this machine has: versions, device, dtype and why, threads and speed."""
    found = examine(loading.device)
    if not as_json:
        console.out.print(facts("this machine", _lines(found)))
    if run is not None:
        artifact, model, _ = loading.open(run)
        found["artifact"] = {"run": str(run), "base_model": artifact.base_model} | fit(
            artifact, model
        )
    if as_json:
        console.print_json(found)
    if run is not None:
        _tell_fit(found["artifact"], quiet=as_json)


def _tell_fit(checked: dict[str, Any], *, quiet: bool) -> None:
    if not checked["fits"]:
        raise ArtifactError(checked["why"])
    if not quiet:
        console.out.print(f"{checked['run']} fits {checked['base_model']}")


def _lines(found: dict[str, Any]) -> dict[str, str]:
    speeds = ", ".join(f"{name} {speed:g}" for name, speed in found["gflops"].items())
    lines = {
        **found["versions"],
        "hardware": found["hardware"],
        "devices": ", ".join(found["devices"]),
        "threads": str(found["threads"]),
        "instructions": found["instructions"],
        "dtype of bfloat16 weights": f"{found['dtype']}: {found['reason']}",
        "GFLOP/s of products": speeds,
        "decoding on the CPU": found["kernel"],
    }
    return lines | {f"{part} needs": install for part, install in found["missing"].items()}
