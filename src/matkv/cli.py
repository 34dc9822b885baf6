"""Compress the KV cache of language models: make an artifact, measure it, use it."""

from __future__ import annotations

import errno
import logging
import sys
from importlib import import_module
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from matkv import MatkvError, __version__
from matkv.commands import console

INTERRUPTED = 130
# A command is imported when it is called: most of them need seconds for that.
COMMANDS = {
    "demo": "Run the main job on the default model: calibrate, compress, generate, measure.",
    "calibrate": "Make an artifact from one pass over text: bases for every layer and KV head.",
    "distill": "Train the bases of an artifact, for quality that falls slowly with the budget.",
    "allocate": "Find the rank of every layer, head and side, for a curve of budgets at once.",
    "evaluate": "Perplexity, accuracy on tasks and retrieval, of the full cache and each budget.",
    "benchmark": "Time decoding with full caches and with every budget, taking turns in one run.",
    "benchmark-attention": "Time one layer's attention at decode, full width against latents.",
    "plan": "What a model and its cache will take, from its config alone; no weights are loaded.",
    "report": "Make one page, and pictures, of all that was measured of artifacts.",
    "generate": "Answer a prompt with a compressed cache.",
    "chat": "Talk with the model; the compressed cache is kept from turn to turn.",
    "serve": "Serve an artifact over HTTP by vLLM, all other options passed on.",
    "inspect": "Show what an artifact holds: its base model, how it was made, and its rank tables.",
    "embed": "Embedding models whose first layers and dimensions are good smaller models.",
    "doctor": "Say what this machine has: versions, device, dtype and why, threads and speed.",
    "lm-eval": "Run lm-eval, all its options passed on; it then knows --model matkv.",
}
# How typer and what it is made of say that a command line is wrong.
UsageError: Any = typer.BadParameter.mro()[2]
OUT_OF_MEMORY = ("memory", "overflow")
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class Commands(TyperGroup):
    """The commands, each imported when it is asked for."""

    def __init__(self, **attributes: Any) -> None:
        super().__init__(**attributes)
        self.commands: dict[str, Any] = dict.fromkeys(COMMANDS)  # names to suggest for a slip

    def list_commands(self, context: Any) -> list[str]:
        return list(COMMANDS)

    def get_command(self, context: Any, name: str) -> Any:
        if name not in COMMANDS:
            return None
        stem = name.replace("-", "_")
        module = import_module(f"matkv.commands.{stem}")
        several = getattr(module, f"{stem}_app", None)
        if several is None:
            several = typer.Typer(**HOW)
            passed_on = getattr(module, "PASSED_ON", None)
            several.command(name, context_settings=passed_on)(getattr(module, f"{stem}_command"))
        return typer.main.get_command(several)

    def resolve_command(self, context: Any, words: list[str]) -> Any:
        if words[0] == "benchmark" and "--attention" in words:  # how it was called once
            words = ["benchmark-attention", *(one for one in words[1:] if one != "--attention")]
        return super().resolve_command(context, words)

    def format_commands(self, context: Any, formatter: Any) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


HOW: Any = {
    "add_completion": False,
    "pretty_exceptions_enable": False,
    "rich_markup_mode": None,
}
app = typer.Typer(cls=Commands, **HOW)


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
    """What comes before the command: transformers prints no warnings and bars of its own."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()


def main() -> None:
    """Entry point: every expected error is one line on standard error and exit code 2."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    try:
        code = app(sys.argv[1:] or ["--help"], standalone_mode=False)
    except MatkvError as error:
        console.refuse(str(error))
    except UsageError as error:
        where = error.ctx.command_path if getattr(error, "ctx", None) else "matkv"
        console.refuse(f"{error.format_message().rstrip('.')}: see {where} --help")
    except UnicodeEncodeError as error:
        console.refuse(f"{error.object!r} is not UTF-8: name or write it in UTF-8")
    except OSError as error:
        if error.filename is None and error.errno not in DISK_FULL:
            raise
        where = f"{error.filename}: " if error.filename is not None else ""
        console.refuse(f"{where}{error.strerror or error}: choose another place, or make room")
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and not any(
            word in str(error) for word in OUT_OF_MEMORY
        ):
            raise
        console.refuse(f"not enough memory ({error}): ask for fewer tokens or a smaller batch")
    if code == INTERRUPTED:  # how typer reports Ctrl-C
        console.err.print("interrupted; nothing half-written was left")
    sys.exit(code or 0)
