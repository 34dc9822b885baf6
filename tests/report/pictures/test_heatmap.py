"""Pictures of rank tables."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from rich.console import Console

from matkv.commands.tables import heatmap, share_lines
from matkv.errors import MatkvError
from matkv.ranks import Geometry, LayerShape, RankTable
from matkv.report.pictures.heatmap import save_heatmap

GEOMETRY = Geometry(
    query_heads=4,
    layers=(
        LayerShape(kv_heads=2, head_dim=16),
        LayerShape(kv_heads=2, head_dim=16, window=8),
        LayerShape(kv_heads=1, head_dim=128),
    ),
)
TABLE = RankTable(GEOMETRY, ((0, 3), (16, 16), (128,)), ((16, 9), (16, 16), (64,)))


def test_every_rank_of_a_growing_layer_is_shown() -> None:
    console = Console(width=80, color_system=None)
    with console.capture() as capture:
        console.print(heatmap(TABLE))
    lines = [line.split() for line in capture.get().splitlines()]
    assert lines[:3] == [
        ["layer", "keys", "values"],
        ["0", "0", "3", "16", "9"],
        ["2", "128", "64"],
    ]


def test_the_papers_shares_stand_beside_ours() -> None:
    assert share_lines(TABLE) == (
        "kept at 68.8%: keys 81.9%, values 55.6%\n"
        "paper, LLaMA2-7B at 37.5%: keys 32.3%, values 42.7%"
    )


def test_a_picture_is_written(tmp_path: Path) -> None:
    path = save_heatmap(TABLE, tmp_path / "ranks.png", title="ranks")
    assert path.read_bytes().startswith(b"\x89PNG")


def test_a_picture_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(MatkvError, match="cannot draw"):
        save_heatmap(TABLE, tmp_path / "file" / "ranks.png")
    with pytest.raises(MatkvError, match="cannot draw"):
        save_heatmap(TABLE, tmp_path / "ranks.unknown")


def test_without_matplotlib_the_remedy_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.backends.backend_agg", None)
    with pytest.raises(MatkvError, match=r"pip install matplotlib"):
        save_heatmap(TABLE, "ranks.png")
