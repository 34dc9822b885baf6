"""How progress is shown: a line of words, and lines in place of a bar off a terminal."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from matkv.commands import bars, console
from matkv.progress import Progress, Report


def at(**given: object) -> Progress:
    values = {"stage": "searching", "done": 5, "total": 20, "unit": "tokens", "seconds": 2.0}
    return Progress(**values | given)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("progress", "words"),
    [
        (at(), "5/20 tokens · 2 tokens/s · 0:06 left"),
        (at(note="50.0%", seconds_left=61.0), "5/20 tokens · 2 tokens/s · 1:01 left · 50.0%"),
        (at(total=None, unit="rounds"), "5 rounds"),
        (at(unit="steps", figures={"tokens": 3000}), "5/20 steps · 1,500 tokens/s · 0:06 left"),
        (at(done=0, seconds=0.0), "0/20 tokens"),
    ],
)
def test_a_line_of_words(progress: Progress, words: str) -> None:
    assert bars.told(progress, progress.total) == words


def shown(monkeypatch: pytest.MonkeyPatch, *, terminal: bool, every: float) -> str:
    file = io.StringIO()
    stream = Console(file=file, force_terminal=terminal, markup=False, width=200)
    monkeypatch.setattr(console, "err", stream)
    monkeypatch.setattr(bars, "EVERY", every)
    with bars.progress_bar("[/red]", 20) as update:
        update(at(total=None, note="loss 3.1"))
        update(at(done=20, total=None, probes={0.5: 2.0}))
    return file.getvalue()


def test_a_file_gets_a_line_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    assert shown(monkeypatch, terminal=False, every=0).splitlines() == [
        "[/red]: 5/20 tokens · 2 tokens/s · 0:06 left · loss 3.1",
        "[/red]: 20/20 tokens · 10 tokens/s · 0:00 left",
        "searching 20, held-out loss 2.000 at 50.0%",
    ]
    assert shown(monkeypatch, terminal=False, every=3600).splitlines() == [
        "searching 20, held-out loss 2.000 at 50.0%"
    ]


def test_a_terminal_gets_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    text = shown(monkeypatch, terminal=True, every=3600)
    assert "[/red]" in text and "20/20 tokens" in text and "held-out loss" in text


def test_parts_of_a_stage_add_up() -> None:
    seen: list[Progress] = []
    report = Report(seen.append, "evaluating", 30)
    inner = Report(report.part(10, "50.0%"), "perplexity", 10)
    inner(4)
    assert (seen[0].done, seen[0].total, seen[0].note) == (14, 30, "50.0%")
    Report(None, "silent", 1)(1)
