"""The seeded tiny run of every stage gives what it gave when it was recorded (see golden.py)."""

from __future__ import annotations

import pytest

import golden
from golden import Results

# Where bits may differ. Between the recorded instruction sets the numbers differ by 2e-4 at most.
TOLERANCE = 1e-3
STAGES = {"query and output", "pca", "local", "end to end", "both, adapters", "fisher", "greedy"}


@pytest.fixture(scope="module")
def now() -> Results:
    return golden.golden_results()


@pytest.fixture(scope="module")
def recorded() -> dict[str, Results]:
    return golden.recorded()


def far(one: Results, other: Results) -> list[str]:
    """Names whose numbers are apart by more than the tolerance."""
    return [
        name
        for name in one
        if one[name]["numbers"] != pytest.approx(other[name]["numbers"], rel=TOLERANCE)
    ]


def test_results_are_the_recorded_ones(now: Results, recorded: dict[str, Results]) -> None:
    same_bits = recorded.get(golden.environment())
    expected = same_bits or next(iter(recorded.values()))
    assert set(now) == set(expected)
    assert far(now, expected) == []
    if same_bits is not None:
        assert [name for name in now if now[name] != same_bits[name]] == []


def test_the_recording_holds_every_stage(recorded: dict[str, Results]) -> None:
    for results in recorded.values():
        evaluated = {name.removesuffix(", evaluated") for name in results if "evaluated" in name}
        assert set(results) > evaluated > STAGES
        assert all(entry["numbers"] and len(entry["digest"]) == 64 for entry in results.values())
        digests = [results[name]["digest"] for name in STAGES]
        assert len(set(digests)) == len(STAGES)


def test_environments_agree_within_the_tolerance_but_not_to_the_bit(
    recorded: dict[str, Results],
) -> None:
    first, *others = recorded.values()
    assert others
    for other in others:
        assert far(first, other) == []
        assert all(first[name]["digest"] != other[name]["digest"] for name in STAGES)


def test_another_seed_is_noticed(now: Results) -> None:
    other = golden.golden_results(seed=1)
    assert all(now[name]["digest"] != other[name]["digest"] for name in now)
    assert set(far(now, other)) == set(now)
