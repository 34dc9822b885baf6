"""Pictures of rank tables."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from matkv.errors import MatkvError
from matkv.ranks import Geometry, LayerShape, RankTable
from matkv.report.pictures.maps import rank_maps
from matkv.report.pictures.theme import save

GEOMETRY = Geometry(
    query_heads=4,
    layers=(
        LayerShape(kv_heads=2, head_dim=16),
        LayerShape(kv_heads=2, head_dim=16, window=8),
        LayerShape(kv_heads=1, head_dim=128),
    ),
)
TABLE = RankTable(GEOMETRY, ((0, 3), (16, 16), (128,)), ((16, 9), (16, 16), (64,)))


def test_a_picture_is_written(tmp_path: Path) -> None:
    path = save(rank_maps("ranks", {0.5: TABLE}), tmp_path / "ranks.png")
    assert path.read_bytes().startswith(b"\x89PNG")


def test_every_side_has_a_map_of_what_it_keeps() -> None:
    drawn = rank_maps("ranks", {0.5: TABLE, 0.25: TABLE})
    for text in ("keys 82%", "values 56%", "50%", "25%", "columns kept of the head dim"):
        assert text in drawn.wide, text
        assert text in drawn.narrow, text


def test_a_picture_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    drawn = rank_maps("ranks", {0.5: TABLE})
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(MatkvError, match="cannot draw"):
        save(drawn, tmp_path / "file" / "ranks.png")
    with pytest.raises(MatkvError, match=r"cannot draw .*unknown.* end its name in \.png"):
        save(drawn, tmp_path / "ranks.unknown")


def test_without_matplotlib_the_remedy_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MatkvError, match=r"pip install matplotlib"):
        rank_maps("ranks", {0.5: TABLE})
