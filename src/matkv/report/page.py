"""What a report is made of: sections of text, tables, pictures and samples; and the page."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.resources import files

from matkv.errors import MatkvError
from matkv.report.pictures import theme
from matkv.report.pictures.theme import Picture


@dataclass(frozen=True)
class Cell:
    """A number with what stands small beside it, a standard error for example."""

    text: str
    small: str = ""
    best: bool = False


@dataclass(frozen=True, kw_only=True)
class Table:
    """Rows of cells under `header`; a row of one cell is a heading across the table.

    The first cell of a row names it, and the columns numbered in `words` hold words rather than
    numbers. `folded` tables are opened by the reader.
    """

    header: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    caption: str = ""
    notes: Sequence[str] = ()
    folded: bool = False
    words: Sequence[int] = ()


@dataclass(frozen=True)
class Sample:
    """Answers to one prompt: (what made it, the text)."""

    prompt: str
    answers: Sequence[tuple[str, str]]


@dataclass(frozen=True)
class Text:
    """A paragraph."""

    text: str


@dataclass(frozen=True)
class Missing:
    """What is not there yet, and the command that makes it."""

    text: str
    command: str


@dataclass(frozen=True)
class Facts:
    """Names and values; `code` sets the values as code."""

    title: str
    items: Sequence[tuple[str, str]]
    code: bool = False


Block = Picture | Table | Sample | Text | Missing | Facts


@dataclass(frozen=True)
class Section:
    """A part of the report; `name` is its anchor."""

    name: str
    title: str
    blocks: Sequence[Block] = ()


@dataclass(frozen=True)
class Tile:
    """One number of the headline: what it is, before, after, and what to read from it."""

    label: str
    value: str
    note: str


@dataclass(frozen=True, kw_only=True)
class Headline:
    """What the reader should know first."""

    title: str
    sentence: str
    tiles: Sequence[Tile] = ()
    notes: Sequence[str] = field(default_factory=tuple)


def render(headline: Headline, sections: Sequence[Section], footer: str) -> str:
    """The whole page, self-contained: no scripts, no fonts, nothing from a network.

    Raises:
        MatkvError: jinja2 is not installed.
    """
    try:
        from jinja2 import Environment, StrictUndefined
        from markupsafe import Markup
    except ImportError as error:
        raise MatkvError("a report needs jinja2: pip install jinja2 matplotlib") from error
    folder = files("matkv.report")
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["svg"] = Markup
    environment.tests["block"] = lambda block, kind: type(block).__name__ == kind
    css = theme.css() + "\n" + folder.joinpath("page.css").read_text(encoding="utf-8")
    template = environment.from_string(folder.joinpath("page.html").read_text(encoding="utf-8"))
    return template.render(headline=headline, sections=sections, css=Markup(css), footer=footer)
