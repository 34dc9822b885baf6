"""These tests need the extra `embeddings`; where it is not installed, pytest says so at its end."""

from __future__ import annotations

from importlib.util import find_spec

import pytest

collect_ignore_glob = [] if find_spec("sentence_transformers") else ["test_*.py"]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if collect_ignore_glob:
        terminalreporter.write_line("tests/embeddings not run: sentence-transformers is missing")
