"""Report: one page that shows what was measured of artifacts, to keep and to send around.

It reads artifacts and their `results/*.json` only; no model is loaded and nothing is measured.

    runs      artifacts with the rows that are theirs
    theme     colours, and pictures that follow the reader's theme
    figures   lines in panels
    maps      maps by layer and head, fans of curves
    page      what a report is made of; page.html and page.css
    headline quality peers accuracy context bases speed made      the sections
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from matkv.errors import MatkvError
from matkv.files import replacing
from matkv.report.page import Section, render
from matkv.report.pictures.theme import Picture
from matkv.report.runs import Run, read_runs
from matkv.report.sections.accuracy import accuracy_section
from matkv.report.sections.bases import ranks_section, spectra_section, training_section
from matkv.report.sections.context import context_section
from matkv.report.sections.headline import headline
from matkv.report.sections.made import last_date, made_section, samples_section
from matkv.report.sections.peers import peer_blocks
from matkv.report.sections.quality import quality_blocks
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

    Several runs, of one model, are compared. The page needs nothing beside it: the PNGs are for use
    elsewhere. Equal artifacts and rows make an equal page.

    Raises:
        ArtifactError: a run is no artifact, or its results are damaged.
        MatkvError: the runs are of several models, `out` cannot be written, or matplotlib or jinja2
            is not installed.
    """
    read = read_runs(runs)
    sections = [section(read) for section in SECTIONS]
    pictures = [one for part in sections for one in part.blocks if isinstance(one, Picture)]
    page = render(headline(read), sections, _footer(read))
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


def _footer(runs: Sequence[Run]) -> str:
    try:
        program = f"matkv {version('matkv')}"
    except PackageNotFoundError:
        program = "matkv"
    day = last_date(runs)
    return f"Made by {program} report" + (f"; last measured on {day}." if day else ".")


def _pictures_of(page: Path) -> set[str]:
    """The pictures that an earlier report left beside its page; another program's page has none."""
    if not page.is_file():
        return set()
    text = page.read_text(encoding="utf-8", errors="replace")
    if 'content="matkv report"' not in text:
        raise MatkvError(f"{page} is not a report of matkv: choose another directory")
    return set(re.findall(r'class="png" href="([\w-]+\.png)"', text))
