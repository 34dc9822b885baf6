"""Recipes: settings of a distillation as TOML, those of the package by name."""

from __future__ import annotations

from pathlib import Path

from matkv.errors import TrainingError

FOLDER = Path(__file__).parent


def recipe_names(command: str = "distill") -> list[str]:
    """The recipes of a command that come with the package; those of embed begin with its name."""
    names = sorted(path.stem for path in FOLDER.glob("*.toml"))
    return [name for name in names if name.startswith("embed-") == (command == "embed")]


def find_recipe(recipe: str | Path, command: str = "distill") -> Path:
    """The file of a recipe: a path of one's own, or the name of one of the package's.

    Raises:
        TrainingError: it is neither; the message lists the names.
    """
    known = recipe_names(command)
    if Path(recipe).is_file():
        return Path(recipe)
    if str(recipe) in known:
        return FOLDER / f"{recipe}.toml"
    raise TrainingError(
        f"no recipe {str(recipe)!r}: give a TOML file, or one of {', '.join(known)}"
    )
