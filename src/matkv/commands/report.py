"""The command that makes a report."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from matkv.artifact.results import Results
from matkv.artifact.setting import Setting
from matkv.commands import console
from matkv.commands.from_fields import from_fields
from matkv.commands.options import JsonOpt, Loading, as_runs
from matkv.evaluate.samples import BUDGETS, PROMPTS, SAMPLES, sample_texts
from matkv.report.build import report


@from_fields()
def report_command(
    runs: Annotated[
        list[Path],
        typer.Argument(
            metavar="RUN...", help="artifacts of one model, to compare", callback=as_runs
        ),
    ],
    loading: Loading,
    out: Annotated[Path, typer.Option("-o", "--out", help="directory of the report")] = Path(
        "report"
    ),
    samples: Annotated[
        bool, typer.Option("--samples", help="generate text with every RUN first")
    ] = False,
    prompt: Annotated[
        list[str] | None, typer.Option(help="with --samples, repeatable; four unless given")
    ] = None,
    budget: Annotated[
        list[float] | None,
        typer.Option(help="with --samples, repeatable; 1, 0.75, 0.5 and 0.25 unless given"),
    ] = None,
    max_new_tokens: Annotated[
        int, typer.Option(help="with --samples, tokens to generate at most", min=1)
    ] = 96,
    as_json: JsonOpt = False,
) -> None:
    """Make one page, and pictures, of all that was measured of artifacts; it measures nothing.

    The page needs no network and nothing beside it. Rows in RUN/results that were measured with
    other bases or ranks are left out, and counted.
    """
    settings = [Setting(budget=one) for one in (None, *(budget or BUDGETS))]
    if (prompt or budget) and not samples:
        raise typer.BadParameter("--prompt and --budget are for --samples")
    for run in runs if samples else ():
        artifact, model, tokenizer = loading.open(run)
        with console.status(f"generating with {run}"):
            sample_texts(
                model,
                tokenizer,
                artifact,
                settings,
                Results(run, SAMPLES),
                prompt or PROMPTS,
                max_new_tokens=max_new_tokens,
            )
    page = report(runs, out)
    if as_json:
        pictures = sorted(str(path) for path in out.glob("*.png"))
        console.print_json({"page": str(page), "pictures": pictures})
    else:
        console.out.print(f"report in {page}")
