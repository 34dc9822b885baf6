"""Tables of long contexts: what they join, they average."""

from __future__ import annotations

from matkv.commands.tables import needle_table, positions_table


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
