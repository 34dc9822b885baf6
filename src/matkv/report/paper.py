"""Figures of the paper (arXiv 2410.14731) to compare with."""

from __future__ import annotations

from matkv.ranks import Side

# What the paper found for LLaMA2-7B at a budget of 37.5%.
PAPER_BUDGET = 0.375
PAPER_SHARES: dict[Side, float] = {"key": 0.323, "value": 0.427}
PAPER_FULL = {"LLaMA2-7B": 61.16, "Mistral-7B": 66.17}
PAPER_BUDGETS = (1.0, 0.875, 0.75, 0.625, 0.5, 0.375, 0.25)
PAPER = {
    ("LLaMA2-7B", "PCA"): (61.17, 61.25, 60.67, 58.31, 43.07, 33.14, 32.92),
    ("LLaMA2-7B", "MatryoshkaKV"): (61.24, 61.74, 61.55, 60.49, 59.11, 56.94, 48.73),
    ("Mistral-7B", "PCA"): (66.05, 65.92, 63.23, 58.73, 34.98, 33.24, 32.85),
    ("Mistral-7B", "MatryoshkaKV"): (66.08, 66.27, 65.90, 64.96, 63.75, 61.29, 51.10),
}
