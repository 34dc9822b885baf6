"""Pictures of a rank table: layer × head, keys and values side by side.

The paper's Figure 1 (arXiv 2410.14731) shows such maps of LLaMA2-7B.
"""

from __future__ import annotations

import math
from pathlib import Path

from matkv.errors import MatkvError
from matkv.files import replacing
from matkv.ranks import SIDES, RankTable, Side
from matkv.report.pictures.curves import new_figure


def save_heatmap(table: RankTable, path: str | Path, *, title: str | None = None) -> Path:
    """Draw a rank table as a picture; the suffix of `path` chooses the format, PNG for example.

    Raises:
        MatkvError: matplotlib is not installed, or `path` cannot be written.
    """
    layers = table.geometry.growing
    heads = max(table.geometry.layers[layer].kv_heads for layer in layers)
    figure = new_figure(3.4 + 0.26 * max(heads, 6) * 2, 1.6 + 0.2 * len(layers))
    axes = figure.subplots(1, 2, sharey=True)
    for axis, side in zip(axes, SIDES, strict=True):
        image = axis.imshow(
            _fractions(table, side, heads), vmin=0, vmax=1, cmap="viridis", aspect="auto"
        )
        axis.set_title(f"{side}s: {table.share(side):.1%} kept")
        axis.set_xlabel("KV head")
        axis.set_xticks(range(0, heads, max(1, heads // 8)))
        rows = range(0, len(layers), max(1, len(layers) // 16))
        axis.set_yticks(rows, [str(layers[row]) for row in rows])
    axes[0].set_ylabel("layer")
    figure.colorbar(image, ax=axes, label="columns kept / head dim")
    figure.suptitle(title or f"ranks at a budget of {table.budget:.1%}")
    try:
        with replacing(Path(path)) as new:
            figure.savefig(new)
    except (OSError, ValueError) as error:
        raise MatkvError(f"cannot draw {path}: {error}") from error
    return Path(path)


def _fractions(table: RankTable, side: Side, heads: int) -> list[list[float]]:
    """Kept share of every growing layer and head; NaN where a layer has fewer heads."""
    rows = []
    for layer in table.geometry.growing:
        ranks, dim = table.side(side)[layer], table.geometry.layers[layer].head_dim
        rows.append([rank / dim for rank in ranks] + [math.nan] * (heads - len(ranks)))
    return rows
