"""Options made of settings' fields: names, defaults, what a command gets."""

from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
import typer
from pydantic import BeforeValidator, Field

from matkv.commands.from_fields import Given, from_fields
from matkv.errors import TrainingError
from matkv.settings import Count, Many, settings


def as_size(given: object) -> object:
    return int(given[:-1]) * 1000 if isinstance(given, str) else given


@settings(TrainingError, "inner_")
class Inner:
    rank: Count = Field(default=3, description="an inner rank")


@settings(TrainingError)
class Config:
    kind: Literal["a", "b"] = Field(default="a", description="a or b")
    sizes: Many[Count] = Field(default=(1, 2), description="some sizes")
    size: Annotated[Count, BeforeValidator(as_size)] | None = Field(
        default=None, description="as 3k"
    )
    blend: bool = Field(default=True, description="whether to blend")
    again: bool = Field(default=False, description="once more")
    inner: Inner = Field(default_factory=Inner)
    hidden: int = 0


def run(command: Any, *words: str) -> Any:
    app = typer.Typer(add_completion=False, rich_markup_mode=None)
    app.command()(command)
    made: Any = typer.main.get_command(app)
    return made.main(list(words), standalone_mode=False)


def asked(*words: str) -> Config:
    seen: list[Config] = []

    @from_fields(sizes="one")
    def command(name: str, config: Config) -> None:
        assert name == "x"
        seen.append(config)

    run(command, "x", *words)
    return seen[0]


def test_what_is_not_given_is_the_default() -> None:
    assert asked() == Config()


def test_values_of_every_type() -> None:
    given = ["--kind", "b", "--one", "4", "--one", "5", "--size", "3k", "--no-blend", "--again"]
    assert asked(*given, "--inner-rank", "7") == Config(
        kind="b", sizes=(4, 5), size=3000, blend=False, again=True, inner=Inner(rank=7)
    )


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--kind", "c"], "kind 'c' must be one of a, b"),
        (["--one", "0"], "sizes 0 must be above 0"),
        (["--inner-rank", "0"], "inner_rank 0 must be above 0"),
    ],
)
def test_a_value_that_is_not_allowed_is_refused(words: list[str], message: str) -> None:
    with pytest.raises(TrainingError, match=message):
        asked(*words)


def test_a_field_without_an_option_has_none() -> None:
    with pytest.raises(Exception, match="--hidden"):
        asked("--hidden", "1")


def test_help_shows_descriptions_and_defaults(capsys: pytest.CaptureFixture[str]) -> None:
    @from_fields()
    def command(config: Config) -> None:
        """What it does."""

    run(command, "--help")
    help_text = " ".join(capsys.readouterr().out.split())
    assert "What it does." in help_text
    for words in ("some sizes [default: 1, 2]", "an inner rank [default: 3]", "--no-blend"):
        assert words in help_text
    assert "once more [default" not in help_text


def test_options_win_over_a_recipe(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.toml"
    recipe.write_text("kind = 'b'\nhidden = 2\n[inner]\nrank = 5\n")
    seen: list[Config] = []

    @from_fields()
    def command(given: Given[Config]) -> None:
        seen.append(given.over(recipe))

    run(command, "--kind", "a")
    assert seen == [Config(kind="a", hidden=2, inner=Inner(rank=5))]
