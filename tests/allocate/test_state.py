"""A search's file of rounds: what it keeps, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from matkv.allocate.state import Round, SearchState
from matkv.errors import MatkvError


def test_rounds_come_back(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "state.jsonl"
    state = SearchState(path, "digest")
    assert state.rounds == [] and state.drops == []
    state.add([3, 1], 0.5, 2.0)
    state.add([0], 0.25, 1.5)
    again = SearchState(path, "digest")
    assert again.rounds == [Round((3, 1), 0.5, 2.0), Round((0,), 0.25, 1.5)]
    assert again.drops == [3, 1, 0]


def test_without_a_file_rounds_stay_in_memory(tmp_path: Path) -> None:
    state = SearchState(None, "digest")
    state.add([1], 0.5, 2.0)
    assert state.drops == [1]
    assert not list(tmp_path.iterdir())


def test_a_line_cut_off_by_a_kill_is_removed(tmp_path: Path) -> None:
    path = tmp_path / "state.jsonl"
    SearchState(path, "digest").add([2], 0.5, 2.0)
    whole = path.read_text()
    path.write_text(whole + '{"drops": [1')
    state = SearchState(path, "digest")
    assert state.drops == [2] and path.read_text() == whole
    state.add([0], 0.25, 1.0)
    assert SearchState(path, "digest").drops == [2, 0]


@pytest.mark.parametrize(
    "line",
    ["no json", "[1]", '{"drops": [1]}', '{"drops": 3, "kl": 0.5, "seconds": 1}',
     '{"drops": ["x"], "kl": 0.5, "seconds": 1}', '{"drops": [1], "kl": "x", "seconds": 1}'],
)  # fmt: skip
def test_a_damaged_line_is_named(tmp_path: Path, line: str) -> None:
    path = tmp_path / "state.jsonl"
    path.write_text(json.dumps({"search": "digest"}) + "\n" + line + "\n")
    with pytest.raises(MatkvError, match=r"cannot resume from .*state.jsonl: .*; delete it"):
        SearchState(path, "digest")


def test_the_file_of_another_search_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "state.jsonl"
    SearchState(path, "digest")
    with pytest.raises(MatkvError, match="other settings, text or bases"):
        SearchState(path, "another")
    (tmp_path / "bytes").write_bytes(b"\xff\n")
    with pytest.raises(MatkvError, match="cannot resume"):
        SearchState(tmp_path / "bytes", "digest")
    (tmp_path / "folder").mkdir()
    with pytest.raises(MatkvError, match="cannot resume"):
        SearchState(tmp_path / "folder", "digest")


def test_a_file_cut_off_in_its_first_line_starts_anew(tmp_path: Path) -> None:
    path = tmp_path / "state.jsonl"
    SearchState(path, "digest")
    whole = path.read_text()
    for text in ("", whole[:9]):
        path.write_text(text)
        assert SearchState(path, "digest").rounds == []
        assert path.read_text() == whole


def test_a_flipped_digit_is_not_gone_on_from(tmp_path: Path) -> None:
    path = tmp_path / "state.jsonl"
    SearchState(path, "digest").add([2], 0.5, 2.0)
    path.write_text(path.read_text().replace("[2]", "[3]"))
    with pytest.raises(MatkvError, match="checksum of a round"):
        SearchState(path, "digest")
