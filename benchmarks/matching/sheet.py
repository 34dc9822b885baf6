"""What was measured as figures: means, differences to the full cache, and their errors.

Errors are standard errors, item by item.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

from .records import Json, Records

OVER = 1.02  # bytes this far beyond a budget are over it: pages and spare room are counted too
FOOTPRINT = "footprint"
Apart = tuple[float, float]  # a mean and its standard error


class Sheet:
    """The last run's rows and columns with their values, as many items as all rows have.

    Differences of a row are over the items that it shares with the full cache.
    """

    def __init__(self, records: Records) -> None:
        self.records, self.rows = records, records.rows
        self.full = next((row for row in self.rows if row["level"] is None), None)
        self.columns = {one["column"]: one for one in records.columns}
        self.texts, self.retrievals, self.tasks = (
            [name for name, one in self.columns.items() if one["kind"] == kind]
            for kind in ("text", "retrieval", "task")
        )

    def values(self, row: Json, column: str) -> list[Json]:
        if column not in self.columns:
            return []
        one = self.columns[column]
        return self.records.values(row, column, one["data"])[: one["count"]]

    def items(self, row: Json, columns: Sequence[str], name: str) -> list[float]:
        """What every item of some columns gave, one column after the other."""
        return [float(one[name]) for column in columns for one in self.values(row, column)]

    def mean(self, row: Json, column: str, name: str) -> float | None:
        values = [one[name] for one in self.values(row, column) if one.get(name) is not None]
        return statistics.fmean(values) if values else None

    def spread(self, row: Json, column: str, name: str) -> Apart | None:
        """A mean over items, and its standard error."""
        return apart(self.items(row, [column], name))

    def difference(self, row: Json, column: str, name: str) -> Apart | None:
        """Mean difference to the full cache over the items of both, and its standard error."""
        base = [] if self.full is None else self.items(self.full, [column], name)
        own = self.items(row, [column], name)
        return apart([one - other for one, other in zip(own, base, strict=False)])

    def average(self, row: Json, columns: Sequence[str], name: str) -> tuple[float, Apart] | None:
        """Columns counted alike: their mean, and its difference to the full cache."""
        means = [self.mean(row, column, name) for column in columns]
        known = [one for one in means if one is not None]
        found = [one for column in columns if (one := self.difference(row, column, name))]
        if not columns or len(known) < len(columns) or len(found) < len(columns):
            return None
        error = math.sqrt(math.fsum(one[1] ** 2 for one in found)) / len(found)
        return statistics.fmean(known), (statistics.fmean(one[0] for one in found), error)

    def growth(self, row: Json) -> float | None:
        """What a further token costs, over the full cache's bytes.

        Of resident memory; of a simulated method what its format says.
        """
        if row["simulated"]:
            return self.mean(row, self.texts[0], "grown")
        measured = self.mean(row, FOOTPRINT, "bytes_per_token")
        return None if measured is None else measured / row["full_bytes_per_token"]

    def is_over(self, row: Json) -> bool:
        """Whether a row costs more than its budget by what its format says."""
        grown = self.mean(row, self.texts[0], "grown")
        fits = row["family"] == "eviction" or row["method"] == "QuantizedCache"
        level = row["level"]
        return level is not None and not fits and grown is not None and grown > level * OVER


def apart(values: Sequence[float]) -> Apart | None:
    """The mean of numbers, and its standard error, not a number where there is but one."""
    if not values:
        return None
    spread = statistics.stdev(values) if len(values) > 1 else math.nan
    return statistics.fmean(values), spread / math.sqrt(len(values))


def even(values: Sequence[float], others: Sequence[float]) -> bool:
    """Whether two rows lie within two paired standard errors of each other."""
    found = apart([one - other for one, other in zip(values, others, strict=False)])
    return found is not None and abs(found[0]) <= 2 * found[1]
