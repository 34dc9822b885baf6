"""Write docs/cli.md, the `--help` of every command: `make docs`, or `python docs/cli.py`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import typer

from matkv.cli import app

PAGE = Path(__file__).with_name("cli.md")
WIDTH = 100
HEADER = """\
# Command line

Written from `--help` by `make docs`: change the help texts in `src/matkv/`, not this page.
[The guide](guide.md) shows the commands in use. Every error is one line on standard error with exit
code 2, and Ctrl-C ends with exit code 130. Results go to standard output and progress to standard
error, so that `--json` can be piped.
"""


def render() -> str:
    """The page: the help of the program, then of each command in the program's order."""
    program: Any = typer.main.get_command(app)
    return "\n".join([HEADER, _block(program, "matkv"), *_sections(program, "matkv")])


def _sections(group: Any, name: str) -> list[str]:
    """The help of every command of a group; one that is a group itself goes on with its own."""
    parts = []
    for word in group.list_commands(None):
        command = group.get_command(None, word)
        called = f"{name} {word}"
        parts += [f"## {called}\n", _block(command, called)]
        if hasattr(command, "commands"):
            parts += _sections(command, called)
    return parts


def _block(command: Any, name: str) -> str:
    """A command's help at a fixed width, whatever the terminal."""
    context = command.context_class(command, info_name=name, terminal_width=WIDTH)
    lines = command.get_help(context).splitlines()
    return "\n".join(["```text", *(line.rstrip() for line in lines), "```", ""])


if __name__ == "__main__":
    PAGE.write_text(render(), encoding="utf-8")
    print(f"wrote {PAGE}")
