"""Values that no option of a kind takes, and what a refusal looks like."""

from __future__ import annotations

from program import Ended

HUGE = str(2**70)
DIGITS = "9" * 5000  # more than Python makes a number of
LONG = "x" * 5000  # longer than a file's name may be
NOT_WHOLE = ("", "x", "1.5", "nan", "1e30", "[/red]", DIGITS)
NOT_SOME = (*NOT_WHOLE, "0", "-1")
NOT_COUNTS = (*NOT_SOME, HUGE)
NOT_NUMBERS = ("", "x", "nan", "inf", "-1", "1e999", "[bold]")
NOT_BUDGETS = ("", "x", "0", "-0.5", "1.5", "nan", "inf")
NOT_SEEDS = ("-1", HUGE, "x")
NOT_RUNS = ("", "/", ".", "{tmp}/none", "{model}", "{text}", "[/red]", LONG)
NOT_DEVICES = ("", "tpu", "cuda:99", "meta", "[/red]")


def assert_refused(ended: Ended) -> None:
    """One line that begins with "error: ", and exit code 2."""
    assert ended.code == 2, ended
    lines = [line for line in ended.err.splitlines() if line.strip()]
    assert lines == [ended.err.strip()], ended.err
    assert ended.err.startswith("error: ")
