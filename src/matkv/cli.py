"""Compress the KV cache of language models: make an artifact, measure it, use it."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from typing import Annotated

import typer
from rich.markup import escape
from transformers.utils import logging as transformers_logging

from matkv import __version__
from matkv.commands import console
from matkv.commands.allocate import allocate_command
from matkv.commands.benchmark import benchmark_command
from matkv.commands.calibrate import calibrate_command
from matkv.commands.chat import chat_command
from matkv.commands.demo import demo_command
from matkv.commands.distill import distill_command
from matkv.commands.doctor import doctor_command
from matkv.commands.embed import embed_app
from matkv.commands.evaluate import evaluate_command
from matkv.commands.generate import generate_command
from matkv.commands.inspect import inspect_command
from matkv.commands.lm_eval import PASSED_ON, lm_eval_command
from matkv.commands.plan import plan_command
from matkv.commands.report import report_command
from matkv.errors import MatkvError

INTERRUPTED = 130
app = typer.Typer(
    help=__doc__,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
COMMANDS: dict[str, Callable[..., None]] = {
    "demo": demo_command,
    "calibrate": calibrate_command,
    "distill": distill_command,
    "allocate": allocate_command,
    "evaluate": evaluate_command,
    "benchmark": benchmark_command,
    "plan": plan_command,
    "report": report_command,
    "generate": generate_command,
    "chat": chat_command,
    "inspect": inspect_command,
    "doctor": doctor_command,
}


def _show_version(asked: bool) -> None:
    if asked:
        print(f"matkv {__version__}")
        raise typer.Exit


@app.callback(help=__doc__)
def _program(
    version: Annotated[
        bool,
        typer.Option("--version", help="print the version", is_eager=True, callback=_show_version),
    ] = False,
) -> None:
    """What comes before the command."""


for name, command in COMMANDS.items():
    app.command(name)(command)
app.add_typer(embed_app, name="embed")
app.command("lm-eval", context_settings=PASSED_ON)(lm_eval_command)


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
