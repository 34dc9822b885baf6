"""Settings: classes whose fields say once what is allowed, from which tables and options come.

    @settings(TrainingError)
    class LoraSettings:
        rank: Number = Field(0, description="rank of adapters, 0 for none")

A setting is frozen, keyword-only, of exactly its type, and no name is unknown. A class within a
class is a table in TOML; its fields also go by flat names, `lora_rank` for `rank` of `lora`, in
Python, on the command line and in an artifact's history.
"""

from __future__ import annotations

import re
import reprlib
import tomllib
from collections.abc import Callable
from dataclasses import fields, is_dataclass, replace
from functools import wraps
from pathlib import Path
from typing import Annotated, Any, TypeVar, dataclass_transform

from pydantic import ConfigDict, Field, Strict, ValidationError
from pydantic.dataclasses import dataclass
from pydantic.fields import FieldInfo

from matkv.errors import MatkvError, TrainingError

T = TypeVar("T")
Values = dict[str, Any]

RECIPES = Path(__file__).with_name("recipes")
MAX = 2**31 - 1
Number = Annotated[int, Field(ge=0, le=MAX)]
Count = Annotated[int, Field(gt=0, le=MAX)]
# A batch, a number of rounds: more of them is a slip of the pen, and no memory holds it.
Few = Annotated[int, Field(gt=0, le=2**16)]
# Tokens of one sequence.
Length = Annotated[int, Field(gt=0, le=2**24)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]  # numpy takes no larger ones
Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]
# In TOML and JSON a tuple is a list.
Many = Annotated[tuple[T, ...], Strict(False)]

CONFIG = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False, arbitrary_types_allowed=True)
KINDS = {
    "int": "a whole number",
    "float": "a number",
    "finite": "a finite number",
    "bool": "true or false",
    "string": "text",
    "tuple": "a list",
    "dataclass": "a table",
}


@dataclass_transform(kw_only_default=True, frozen_default=True, field_specifiers=(Field,))
def settings(error: type[MatkvError], prefix: str = "") -> Callable[[type[T]], type[T]]:
    """Make a class of settings; what is not allowed raises `error`, in one line.

    `prefix` makes the flat names of a class that is a table within another.
    """

    def wrap(cls: type[T]) -> type[T]:
        made: Any = dataclass(cls, frozen=True, kw_only=True, config=CONFIG)
        checked = made.__init__

        @wraps(checked)
        def init(self: Any, **values: Any) -> None:
            try:
                checked(self, **_gathered(made, values))
            except ValidationError as problem:
                raise error(explained(made, problem, prefix)) from None

        made.__init__ = init
        return made  # type: ignore[no-any-return]

    return wrap


def is_settings(cls: Any) -> bool:
    """Whether a class was made by `settings`."""
    return isinstance(cls, type) and hasattr(cls, "__pydantic_fields__")


def declared(cls: type[Any]) -> dict[str, FieldInfo]:
    """The fields of a settings class, with type, default, description and what is allowed."""
    found: dict[str, FieldInfo] = cls.__pydantic_fields__
    return found


def tables(cls: type[Any]) -> dict[str, type[Any]]:
    """The fields of a settings class that hold settings themselves."""
    kinds: dict[str, Any] = {name: field.annotation for name, field in declared(cls).items()}
    return {name: kind for name, kind in kinds.items() if is_settings(kind)}


def merged(cls: type[T], *sources: Values) -> T:
    """Settings from tables of values, the later ones over the earlier.

    Raises:
        MatkvError: as the class itself.
    """
    values: Values = {}
    for source in sources:
        for name, value in source.items():
            if name in tables(cls) and isinstance(value, dict):
                values |= {f"{name}_{key}": one for key, one in value.items()}
            else:
                values[name] = value
    return cls(**values)


def _gathered(cls: type[Any], values: Values) -> Values:
    """`values` with those of a table, under their flat names, made into its settings."""
    values = dict(values)
    for table, inner in tables(cls).items():
        names = {f"{table}_{name}": name for name in declared(inner)}
        found = {names[name]: values.pop(name) for name in list(values) if name in names}
        if found:
            given = values.setdefault(table, inner())
            if isinstance(given, inner):
                values[table] = replace(given, **found)
    return values


def flat(config: Any) -> Values:
    """Settings by their flat names, as plain JSON data; the class takes them."""
    values: Values = {}
    for field in fields(config):
        value = getattr(config, field.name)
        if is_dataclass(value):
            values |= {f"{field.name}_{name}": one for name, one in flat(value).items()}
        else:
            values[field.name] = list(value) if isinstance(value, tuple) else value
    return values


def recipe_names(command: str = "distill") -> list[str]:
    """The recipes of a command that come with the package; those of embed begin with its name."""
    names = sorted(path.stem for path in RECIPES.glob("*.toml"))
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
        return RECIPES / f"{recipe}.toml"
    raise TrainingError(
        f"no recipe {str(recipe)!r}: give a TOML file, or one of {', '.join(known)}"
    )


def read_recipe(recipe: str | Path, command: str = "distill") -> Values:
    """The table of a recipe, a TOML file or the name of one of the package's.

    Raises:
        TrainingError: it cannot be read.
    """
    path = find_recipe(recipe, command)
    try:
        with path.open("rb") as file:
            return tomllib.load(file)
    except UnicodeDecodeError:
        raise TrainingError(f"cannot read the recipe {path}: it is not UTF-8 text") from None
    except RecursionError:
        raise TrainingError(f"cannot read the recipe {path}: nested too deeply") from None
    except (OSError, ValueError) as error:
        raise TrainingError(f"cannot read the recipe {path}: {error}") from error


def explained(cls: type[Any], problem: ValidationError, prefix: str) -> str:
    """What is wrong first, in one line: the setting, its value, and what is allowed."""
    found = problem.errors(include_url=False)[0]
    name = prefix + str(found["loc"][0])
    if found["type"] == "unexpected_keyword_argument":
        known = (prefix + one for one in _names(cls))
        return f"unknown setting {name!r}; known are {', '.join(known)}"
    if found["type"] in ("missing", "missing_argument", "missing_keyword_only_argument"):
        return f"{name} is missing: give one"
    return f"{name} {reprlib.repr(found['input'])} must be {_allowed(found)}"


def _names(cls: type[Any], prefix: str = "") -> list[str]:
    names: list[str] = []
    for name in declared(cls):
        inner = tables(cls).get(name)
        names += [prefix + name] if inner is None else _names(inner, f"{name}_")
    return names


def _allowed(found: Any) -> str:
    kind, limits = found["type"], found.get("ctx", {})
    if kind == "literal_error":
        return "one of " + ", ".join(re.findall(r"'([^']*)'", limits["expected"]))
    for limit, words in (
        ("gt", "above {}"),
        ("ge", "{} or more"),
        ("lt", "below {}"),
        ("le", "at most {}"),
    ):
        if limit in limits:
            return words.format(f"{limits[limit]:,}")
    return KINDS.get(kind.partition("_")[0], str(found["msg"]))
