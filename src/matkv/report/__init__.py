"""Report: what was measured, on one page."""

from matkv.report.build import report

__all__ = ["report"]
