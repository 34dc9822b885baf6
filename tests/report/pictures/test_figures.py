"""Lines in panels: colours, ticks and labels as matplotlib has drawn them."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from typing import Any

import pytest

from matkv.report.pictures import figures, theme
from matkv.report.pictures.figures import LABEL, LEVEL, Axis, Line, Panel, lines

Points = Sequence[tuple[float, float]]


def drawn(monkeypatch: pytest.MonkeyPatch, *panels: Panel) -> Any:
    """The figure of a wide picture."""
    kept: list[Any] = []
    original = theme._drawn

    def keep(draw: Any, size: Any, *, narrow: bool) -> Any:
        kept.append(original(draw, size, narrow=narrow))
        return kept[-1]

    monkeypatch.setattr(theme, "_drawn", keep)
    lines("picture", panels, text="")
    return kept[0]


def panel(*shown: Line, x: Axis | None = None, y: Axis | None = None, **more: Any) -> Panel:
    return Panel(x=x or Axis(label="x"), y=y or Axis(label="y"), lines=shown, **more)


def line(label: str, points: Points, style: int | None = 0, **more: Any) -> Line:
    return Line(label=label, points=points, style=style, **more)


def labels(axis: Any) -> list[str]:
    """The labels of the ticks within the axis."""
    low, high = sorted(axis.get_view_interval())
    ticks = zip(axis.get_majorticklocs(), axis.get_majorticklabels(), strict=True)
    return [text.get_text() for place, text in ticks if low <= place <= high]


def test_sixteen_lines_have_colours_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = [line(f"m{i}", [(0, i), (1, i)], i) for i in range(16)]
    (axes,) = drawn(monkeypatch, panel(*shown)).axes
    assert len({one.get_color() for one in axes.lines}) == 16
    looks = [(one.get_color(), one.get_markerfacecolor()) for one in axes.lines]
    more = [line(f"m{i}", [(0, i), (1, i)], i) for i in range(20)]
    (axes,) = drawn(monkeypatch, panel(*more)).axes
    again = [(one.get_color(), one.get_markerfacecolor()) for one in axes.lines]
    assert again[:16] == looks
    assert len(set(again)) == 20


@pytest.mark.parametrize("colors", [theme.LIGHT, theme.DARK], ids=["light", "dark"])
def test_colours_are_told_apart_on_their_paper(colors: dict[str, str]) -> None:
    def channels(name: str) -> list[float]:
        return [int(colors[name][i : i + 2], 16) / 255 for i in (1, 3, 5)]

    def light(name: str) -> float:
        linear = [
            c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels(name)
        ]
        return sum(w * c for w, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))

    for a, b in combinations(theme.SERIES, 2):
        assert sum(abs(x - y) for x, y in zip(channels(a), channels(b), strict=True)) > 0.2, (a, b)
    for name in theme.SERIES:
        low, high = sorted((light(name), light("paper")))
        assert (high + 0.05) / (low + 0.05) >= 3, name


@pytest.mark.parametrize(
    ("span", "wanted"),
    [
        ((15.0, 24.0), {"16", "20", "24"}),
        ((15.0, 400.0), {"20", "50", "100", "200"}),
        ((1.0, 1e6), {"1", "100", "10,000", "1,000,000"}),
        ((0.2, 0.9), {"0.2", "0.4", "0.6", "0.8"}),
    ],
)
def test_logarithmic_ticks_are_round_and_few(
    monkeypatch: pytest.MonkeyPatch, span: tuple[float, float], wanted: set[str]
) -> None:
    shown = line("a", [(0, span[0]), (1, span[1])])
    (axes,) = drawn(monkeypatch, panel(shown, y=Axis(label="y", log=10))).axes
    found = labels(axes.yaxis)
    assert 3 <= len(found) <= 8
    assert wanted <= set(found)


def test_powers_of_two_and_shares(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = line("a", [(512, 0.25), (8192, 1)])
    x, y = Axis(label="tokens", log=2), Axis(label="kept", percent=True)
    (axes,) = drawn(monkeypatch, panel(shown, x=x, y=y)).axes
    assert {"512", "2k", "8k"} <= set(labels(axes.xaxis))
    assert {"25%", "75%", "100%"} <= set(labels(axes.yaxis))


def test_labels_do_not_overlap_nor_cover_points(monkeypatch: pytest.MonkeyPatch) -> None:
    near = [(i / 40, 1 + i / 400) for i in range(20)]
    shown = [
        line(f"m{style}", near, style, labels=[f"{i} label" for i in range(20)]) for style in (0, 1)
    ]
    far = line("far", [(0, 2), (1, 3)], 2, labels=["first", "last"])
    figure = drawn(monkeypatch, panel(*shown, far, levels=[(1.04, "full cache 1.04")]))
    (axes,) = figure.axes
    kept = [text for text in axes.texts if text.get_visible()]
    assert {"first", "last"} <= {text.get_text() for text in kept}
    assert 2 < len(kept) < 40
    boxes = [text.get_window_extent() for text in kept if text.get_gid() in (LABEL, LEVEL)]
    assert not any(a.overlaps(b) for a, b in combinations(boxes, 2))
    for x, y in axes.transData.transform([*near, (0, 2), (1, 3)]):
        assert not any(box.contains(x, y) for box in boxes)


def test_unknown_errors_are_not_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    points = [(0, 1.0), (1, 2.0), (2, 3.0)]
    shown = line("a", points, bounds=[(0.5, 1.5), None, (2.5, 3.5)])
    (axes,) = drawn(monkeypatch, panel(shown)).axes
    (bars,) = axes.collections
    assert [bar.tolist() for bar in bars.get_segments()] == [
        [[0, 0.5], [0, 1.5]],
        [[2, 2.5], [2, 3.5]],
    ]


def test_what_lies_outside_a_span_is_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    y = Axis(label="y", log=10, span=(10, 100))
    (axes,) = drawn(monkeypatch, panel(line("a", [(0, 20), (1, 9000)]), y=y)).axes
    assert axes.get_ylim() == (10, 100)
    assert all(one.get_clip_on() for one in axes.lines)
    assert figures.powers(1536) == "1.5k"
