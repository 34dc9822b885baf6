"""What the written pages say that can be tried: blocks of code, commands, links, messages."""

from __future__ import annotations

import ast
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer

from matkv import cli

ROOT = Path(__file__).parent.parent
README, GUIDE = ROOT / "README.md", ROOT / "docs" / "guide.md"
PAGES = (README, *sorted((ROOT / "docs").glob("*.md")))
RECIPES = tuple(sorted((ROOT / "src" / "matkv" / "recipes").glob("*.toml")))
PROGRAM: Any = typer.main.get_command(cli.app)


def blocks(page: Path, language: str) -> list[str]:
    """The contents of a page's fenced blocks of one language."""
    fence = re.compile(rf"^```{language}\n(.*?)^```$", re.DOTALL | re.MULTILINE)
    return fence.findall(page.read_text(encoding="utf-8"))


def commands(text: str) -> list[list[str]]:
    """The matkv commands of a script, as words after the program's name."""
    lines = text.replace("\\\n", " ").splitlines()
    words = [shlex.split(line, comments=True) for line in lines if "matkv " in line]
    return [line[line.index("matkv") + 1 :] for line in words if "matkv" in line[:4]]


def mentioned(page: Path) -> Iterator[list[str]]:
    """The matkv commands of a page's blocks, fenced or indented, or of a recipe's first comment."""
    text = page.read_text(encoding="utf-8")
    if page.suffix == ".toml":
        comment = "\n".join(line[1:] for line in text.splitlines() if line.startswith("#"))
        text = "\n".join(re.findall(r"(?m)^   .*$", comment))
    else:
        indented = re.findall(r"(?m)^    .*$", text)
        text = "\n".join([*indented, *blocks(page, "sh")])
    yield from commands(text)


def parse(words: list[str]) -> None:
    """Let the command line read a command, without running it.

    Raises:
        click's UsageError: it cannot be run as it stands.
    """
    command, rest = _command(words)
    command.make_context(words[0], rest)


def _command(words: list[str]) -> tuple[Any, list[str]]:
    """The command that words call, one in a group perhaps, and the words after its name."""
    command = PROGRAM
    for index, word in enumerate(words):
        if not hasattr(command, "commands"):
            return command, list(words[index:])
        command = command.get_command(None, word)
    return command, []


def unknown_options(words: list[str]) -> list[str]:
    """The options of a command that it does not have; values may be placeholders."""
    command, rest = _command(words)
    if "ignore_unknown_options" in command.context_settings:  # another program reads them
        return []
    known = {name for one in command.params for name in one.opts}
    return [word for word in rest if word.startswith("-") and word not in known | {"--help"}]


def links(page: Path) -> list[Path]:
    """The files that a page links to."""
    text = page.read_text(encoding="utf-8")
    targets = [target.partition("#")[0] for target in re.findall(r"\]\(([^)\s]+)\)", text)]
    return [page.parent / target for target in targets if target and "://" not in target]


def messages() -> str:
    """Every text in the package's code, with … for what is filled in, one a line."""
    found = []
    for path in sorted((ROOT / "src").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                found.append("".join(map(_literal, node.values)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return "\n".join(found)


def _literal(part: ast.expr) -> str:
    return str(part.value) if isinstance(part, ast.Constant) else "…"
