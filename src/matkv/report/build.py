"""Report: one page that shows what was measured of artifacts, to keep and to send around.

It reads artifacts, or embedding models, and their `results/*.json` only; no model is loaded and
nothing is measured.

    rows      results, typed; what is missing is None
    runs      artifacts with the rows that are theirs
    pictures  theme: colours, and pictures that follow the reader's theme; figures: lines in panels;
              maps: by layer and head, and fans of curves; decoding: steps and what fits
    page      what a report is made of; page.html and page.css
    embedders, sizes    the same for embedding models of many sizes
    headline quality peers accuracy context bases speed made      the sections
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from matkv.errors import MatkvError
from matkv.files import replacing
from matkv.report.embedders import is_embedder, read_embedders
from matkv.report.page import Headline, Section, render
from matkv.report.pictures.theme import Picture
from matkv.report.runs import Run, read_runs
from matkv.report.sections.accuracy import accuracy_section
from matkv.report.sections.bases import ranks_section, spectra_section, training_section
from matkv.report.sections.context import context_section
from matkv.report.sections.headline import headline
from matkv.report.sections.made import last_date, made_section, samples_section
from matkv.report.sections.peers import peer_blocks
from matkv.report.sections.quality import quality_blocks
from matkv.report.sections.sizes import sizes_headline, sizes_sections
from matkv.report.sections.speed import speed_section

__all__ = ["PAGE", "report"]
PAGE = "index.html"


def quality_section(runs: Sequence[Run]) -> Section:
    """Every budget, then every other method, at their bytes."""
    return Section("quality", "Quality against bytes", [*quality_blocks(runs), *peer_blocks(runs)])


SECTIONS = (
    quality_section,
    accuracy_section,
    context_section,
    ranks_section,
    spectra_section,
    speed_section,
    training_section,
    samples_section,
    made_section,
)


def report(runs: Sequence[str | Path], out: str | Path) -> Path:
    """Write `out/index.html` and its pictures as PNG; returns the page's path.

    Several runs, of one model, are compared; embedding models have a page of their own. The page
    needs nothing beside it: the PNGs are for use elsewhere. Equal artifacts and rows make an equal
    page.

    Raises:
        ArtifactError: a run is no artifact, or its results are damaged.
        MatkvError: the runs are of several models or kinds, `out` cannot be written, or matplotlib
            or jinja2 is not installed.
    """
    headline_of, sections, day = _composed(runs)
    pictures = [one for part in sections for one in part.blocks if isinstance(one, Picture)]
    page = render(headline_of, sections, _footer(day))
    target = Path(out)
    try:
        target.mkdir(parents=True, exist_ok=True)
        outdated = _pictures_of(target / PAGE) - {f"{one.name}.png" for one in pictures}
        for one in pictures:
            with replacing(target / f"{one.name}.png") as new:
                new.write_bytes(one.png)
        with replacing(target / PAGE) as new:
            new.write_text(page, encoding="utf-8")
        for name in outdated:
            (target / name).unlink(missing_ok=True)
    except OSError as error:
        raise MatkvError(f"cannot write the report to {target}: {error}") from error
    return target / PAGE


def _composed(runs: Sequence[str | Path]) -> tuple[Headline, list[Section], str | None]:
    """What a page of these runs says, and the day of the newest measurement."""
    embedders = [str(run) for run in runs if is_embedder(Path(run))]
    if not embedders:
        read = read_runs(runs)
        return headline(read), [section(read) for section in SECTIONS], last_date(read)
    if len(embedders) < len(runs):
        raise MatkvError(
            f"{embedders[0]} is an embedding model and other runs are not: make a report of each"
        )
    models = read_embedders(runs)
    days = [model.last_date for model in models if model.last_date]
    return sizes_headline(models), sizes_sections(models), max(days, default=None)


def _footer(day: str | None) -> str:
    try:
        program = f"matkv {version('matkv')}"
    except PackageNotFoundError:
        program = "matkv"
    return f"Made by {program} report" + (f"; last measured on {day}." if day else ".")


def _pictures_of(page: Path) -> set[str]:
    """The pictures that an earlier report left beside its page; another program's page has none."""
    if not page.is_file():
        return set()
    text = page.read_text(encoding="utf-8", errors="replace")
    if 'content="matkv report"' not in text:
        raise MatkvError(f"{page} is not a report of matkv: choose another directory")
    return set(re.findall(r'class="png" href="([\w-]+\.png)"', text))
