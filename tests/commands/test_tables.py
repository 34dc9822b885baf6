"""Tables of the terminal: what they join they average, and rank tables as heat maps."""

from __future__ import annotations

from rich.console import Console

from matkv.commands.tables import heatmap, needle_table, positions_table, share_lines
from matkv.ranks import Geometry, LayerShape, RankTable

GEOMETRY = Geometry(
    query_heads=4,
    layers=(
        LayerShape(kv_heads=2, head_dim=16),
        LayerShape(kv_heads=2, head_dim=16, window=8),
        LayerShape(kv_heads=1, head_dim=128),
    ),
)
RANKS = RankTable(GEOMETRY, ((0, 3), (16, 16), (128,)), ((16, 9), (16, 16), (64,)))


def test_tables_average_what_they_join() -> None:
    common = {"budget": 0.5, "context": 1024, "n": 2, "answer_loss": 1.0}
    rows = [
        {**common, "test": test, "depth": depth, "accuracy": accuracy}
        for test, depth, accuracy in (
            ("needle", 0.1, 1.0),
            ("needle", 0.9, 0.5),
            ("multikey", 0.1, 0.0),
            ("multikey", 0.9, 0.0),
        )
    ]
    cells = [list(column.cells) for column in needle_table("t", rows).columns]
    assert cells == [["1,024"], ["50.0%"], ["75 ± 22"], ["1.00"], ["0 ± 0"], ["1.00"]]
    part = {"budget": None, "perplexity": 8.0, "tokens": 10, "start": 0, "end": 64}
    other = {**part, "perplexity": 2.0, "start": 64, "end": 128}
    cells = [list(column.cells) for column in positions_table("t", [part, other]).columns]
    assert cells == [["full cache"], ["8.00"], ["2.00"], ["4.00"]]


def test_every_rank_of_a_growing_layer_is_shown() -> None:
    console = Console(width=80, color_system=None)
    with console.capture() as capture:
        console.print(heatmap(RANKS))
    lines = [line.split() for line in capture.get().splitlines()]
    assert lines[:3] == [
        ["layer", "keys", "values"],
        ["0", "0", "3", "16", "9"],
        ["2", "128", "64"],
    ]


def test_the_papers_shares_stand_beside_ours() -> None:
    assert share_lines(RANKS) == (
        "kept at 68.8%: keys 81.9%, values 55.6%\n"
        "paper, LLaMA2-7B at 37.5%: keys 32.3%, values 42.7%"
    )
