"""Compress the KV cache of language models: make an artifact, measure it, use it."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape
from transformers.utils import logging as transformers_logging

from matkv import (
    commands_evaluate,
    commands_make,
    commands_measure,
    commands_report,
    commands_use,
    console,
)
from matkv.demo import demo, show
from matkv.errors import MatkvError
from matkv.options import JsonOpt

INTERRUPTED = 130

app = typer.Typer(
    help=__doc__,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


@app.command("demo")
def demo_command(
    out: Annotated[Path, typer.Option("-o", "--out", help="where runs go")] = Path("runs/demo"),
    as_json: JsonOpt = False,
) -> None:
    """Run the main job on the default model: calibrate, compress, generate, measure."""
    result = demo(out)
    if as_json:
        console.print_json(result)
    else:
        show(result)


COMMANDS: dict[str, Callable[..., None]] = {
    "calibrate": commands_make.calibrate_command,
    "distill": commands_make.distill_command,
    "allocate": commands_make.allocate_command,
    "evaluate": commands_evaluate.evaluate_command,
    "benchmark": commands_measure.benchmark_command,
    "plan": commands_measure.plan_command,
    "report": commands_report.report_command,
    "generate": commands_use.generate_command,
    "chat": commands_use.chat_command,
    "inspect": commands_use.inspect_command,
}
for name, command in COMMANDS.items():
    app.command(name)(command)


def main() -> None:
    """Entry point: every expected error is one line on standard error and exit code 2."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        app()
    except MatkvError as error:
        console.err.print(f"[red]error:[/red] {escape(str(error))}", soft_wrap=True)
        sys.exit(2)
    except SystemExit as ended:
        if ended.code == INTERRUPTED:  # how typer reports Ctrl-C
            console.err.print("interrupted; nothing half-written was left")
        raise
