"""Options of commands from the fields of settings, so that a default and a help text exist once.

    @from_fields(budgets="budget")
    def allocate_command(run: RunArg, config: AllocateConfig) -> None: ...

In place of `config` the command gets an option for every field: `--max-kl` for `max_kl`, a field of
a table by its flat name. `Given[AllocateConfig]` hands on what was given, for a recipe to add to.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Generic, Literal, TypeVar, Union, get_args, get_origin
from typing import get_type_hints as hints_of

import typer
from pydantic import BeforeValidator
from pydantic.fields import FieldInfo

from matkv.settings import Values, declared, is_settings, merged, read_recipe, tables

T = TypeVar("T")
Command = Callable[..., None]


@dataclass(frozen=True)
class Given(Generic[T]):
    """What a command line says of settings."""

    kind: type[T]
    values: Values

    def over(self, recipe: Path | None) -> T:
        """The settings of a recipe, those of the command line over them."""
        return merged(self.kind, {} if recipe is None else read_recipe(recipe), self.values)


def from_fields(*, without: tuple[str, ...] = (), **names: str) -> Callable[[Command], Command]:
    """Replace a command's parameters of settings by options, after those it has itself.

    `names` are the options of fields that go by another name, `without` fields without an option.
    """
    return lambda command: _Expanded(command, without, names).command()


class _Expanded:
    """A command whose settings come from options; `owners` knows which option is whose field."""

    def __init__(self, command: Command, without: tuple[str, ...], names: dict[str, str]) -> None:
        self.inner = command
        self.groups: dict[str, tuple[Any, bool]] = {}
        self.owners: dict[str, tuple[str, str]] = {}
        self.own: list[inspect.Parameter] = []
        self.made: list[inspect.Parameter] = []
        hints = hints_of(command, include_extras=True)
        for name, parameter in inspect.signature(command).parameters.items():
            raw = get_origin(hints[name]) is Given
            kind = get_args(hints[name])[0] if raw else hints[name]
            if not is_settings(kind):
                self.own.append(_keyword(name, kind, parameter.default))
                continue
            self.groups[name] = kind, raw
            for field, info in _fields(kind, without):
                option = names.get(field, field)
                self.owners[option] = name, field
                self.made.append(_option(option, info))

    def command(self) -> Command:
        """The function that typer reads and runs."""

        def run(**arguments: Any) -> None:
            self.run(arguments)

        parameters = [*self.own, *self.made]
        run.__doc__, run.__name__ = self.inner.__doc__, self.inner.__name__
        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {one.name: one.annotation for one in parameters}
        return run

    def run(self, arguments: Values) -> None:
        given: dict[str, Values] = {group: {} for group in self.groups}
        for option, (group, field) in self.owners.items():
            value = arguments.pop(option)
            if value is not None and value != []:
                given[group][field] = tuple(value) if isinstance(value, list) else value
        for group, (kind, raw) in self.groups.items():
            arguments[group] = Given(kind, given[group]) if raw else kind(**given[group])
        self.inner(**arguments)


def _fields(
    kind: type[Any], without: tuple[str, ...], prefix: str = ""
) -> Iterator[tuple[str, FieldInfo]]:
    """The fields that are described, by their flat names; the others have no option."""
    inners = tables(kind)
    for name, field in declared(kind).items():
        if prefix + name not in without:
            if name in inners:
                yield from _fields(inners[name], without, f"{prefix}{name}_")
            elif field.description is not None:
                yield prefix + name, field


def _keyword(name: str, annotation: Any, default: Any) -> inspect.Parameter:
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, annotation=annotation, default=default
    )


def _option(name: str, field: FieldInfo) -> inspect.Parameter:
    """An option that is None unless given; its help says what holds then."""
    kind, flag = _plain(field.annotation, field.metadata), f"--{name.replace('_', '-')}"
    if kind is bool:
        flag += f"/--no-{flag[2:]}" if field.default is True else ""
    help_text = field.description or ""
    if field.is_required():
        return _keyword(name, Annotated[kind, typer.Option(flag, help=help_text)], inspect._empty)
    shown = field.default
    told = "unless given" in help_text
    if not told and shown is not None and shown is not False and shown != ():
        text = ", ".join(map(str, shown)) if isinstance(shown, tuple) else str(shown)
        help_text += f"  [default: {text}]"
    return _keyword(name, Annotated[kind | None, typer.Option(flag, help=help_text)], None)


def _plain(annotation: Any, metadata: list[Any] | tuple[Any, ...] = ()) -> Any:
    """The type that the command line reads: a text where the settings read one themselves."""
    if any(isinstance(one, BeforeValidator) for one in metadata):
        return str
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _plain(inner[0], inner[1:])
    if origin in (Union, UnionType):
        return _plain(next(one for one in inner if one is not type(None)))
    if origin is tuple:
        return list[_plain(inner[0])]  # type: ignore[misc]
    return str if origin is Literal else annotation
