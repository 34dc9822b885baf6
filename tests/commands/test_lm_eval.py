"""`matkv lm-eval`: slips in what is passed on end as every error of ours does."""

from __future__ import annotations

import pytest

from bad_values import assert_refused
from matkv.errors import ModelError
from program import Program


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (
            ValueError("Tasks not found: none\nTry `lm-eval ls tasks`"),
            "ValueError: Tasks not found",
        ),
        (KeyError("acc"), "KeyError: 'acc'"),
        (ModelError("no model"), "error: no model"),
    ],
)
def test_a_slip_is_one_line_and_exit_code_2(
    matkv: Program, monkeypatch: pytest.MonkeyPatch, error: Exception, told: str
) -> None:
    program = pytest.importorskip("lm_eval.__main__")

    def evaluate() -> None:
        raise error

    monkeypatch.setattr(program, "cli_evaluate", evaluate)
    ended = matkv("lm-eval", "run", "--tasks", "none")
    assert_refused(ended)
    assert told in ended.err
