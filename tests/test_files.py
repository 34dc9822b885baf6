"""Reading with errors that name the line, and outputs that are never half written."""

import os
import time
from pathlib import Path

import pytest

import matkv.files
from matkv.errors import DataError
from matkv.files import (
    cache_home,
    hub_answers,
    is_path,
    only_fetched,
    read_json,
    read_json_lines,
    read_text,
    recover_directory,
    replacing,
    replacing_directory,
)


def test_cache_home_prefers_own_variable_then_xdg_then_home(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("HOME", "/home/somebody")
    monkeypatch.setenv("MATKV_CACHE", "~/own")
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert cache_home() == Path("/home/somebody/own")
    monkeypatch.delenv("MATKV_CACHE")
    assert cache_home() == Path("/xdg/matkv")
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    assert cache_home() == Path("/home/somebody/.cache/matkv")


def test_json_lines_say_where_they_stand(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"a": "one\u2028two"}\n\n[3]\n', encoding="utf-8")
    assert list(read_json_lines(path)) == [
        (f"{path}, line 1", {"a": "one\u2028two"}),
        (f"{path}, line 3", [3]),
    ]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"a": 1}\n{', "line 2: not JSON"),
        (b"[" * 100_000, "line 1: not JSON .*nested too deeply"),
        (b"1" * 5000, "line 1: not JSON"),
        (b'["\\ud800"]', "line 1: half of a surrogate pair"),
        (b"\xff", "not UTF-8 at byte 0"),
        (None, "cannot read"),
    ],
)
def test_what_cannot_be_read_is_named(tmp_path: Path, content: bytes | None, message: str) -> None:
    path = tmp_path / "a.jsonl"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError, match=message):
        list(read_json_lines(path))
    if content is None:
        with pytest.raises(DataError, match=message):
            read_text(path)


def test_a_file_is_replaced_at_the_end_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "new" / "a.png"
    with replacing(path) as new:
        assert (new.parent, new.suffix) == (path.parent, ".png")
        new.write_text("first")
        assert not path.exists()
    with pytest.raises(KeyboardInterrupt), replacing(path) as new:
        new.write_text("half")
        raise KeyboardInterrupt
    assert path.read_text() == "first"
    assert os.listdir(path.parent) == ["a.png"]


def test_a_folder_that_cannot_be_made_is_the_error_one_sees(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OSError, match="file"), replacing(tmp_path / "file" / "a"):
        pass


def test_a_directory_keeps_the_others_and_is_replaced_at_the_end(tmp_path: Path) -> None:
    target = tmp_path / "run"
    for name, content in (("ours", "old"), ("gone", "old"), ("others", "kept")):
        with replacing(target / name) as new:
            new.write_text(content)
    with replacing_directory(target, written=("ours", "gone")) as made:
        (made / "ours").write_text("new")
        assert (target / "ours").read_text() == "old"
    found = {path.name: path.read_text() for path in target.iterdir()}
    assert found == {"ours": "new", "others": "kept"}
    with pytest.raises(OSError, match="full"), replacing_directory(target, written=()) as made:
        raise OSError("disk full")
    assert os.listdir(tmp_path) == ["run"]
    assert (target / "ours").read_text() == "new"


def test_what_kills_left_is_put_back_or_swept(tmp_path: Path) -> None:
    target = tmp_path / "run"
    (tmp_path / ".run.old").mkdir()
    recover_directory(target)
    assert os.listdir(tmp_path) == ["run"]
    stale, young = tmp_path / ".run.new-1", tmp_path / ".run.new-2"
    for left in (stale, young):
        left.mkdir()
    os.utime(stale, (time.time() - 90_000,) * 2)
    with replacing_directory(target, written=()):
        pass
    assert sorted(os.listdir(tmp_path)) == [".run.new-2", "run"]


def test_whoever_stands_in_a_directory_stands_in_its_successor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    (run / "inner").mkdir(parents=True)
    for here in (run / "inner", run):
        monkeypatch.chdir(here)
        with replacing_directory(run, ()) as new:
            (new / "made").write_text("anew")
        assert Path.cwd() == here
        assert (run / "made").samefile(Path(os.path.relpath(run, here)) / "made")
    with replacing_directory(run, None):
        pass
    assert os.listdir() == []
    with pytest.raises(OSError, match="cannot be replaced"), replacing_directory(Path("/"), ()):
        pass


@pytest.mark.parametrize("name", ["", ".", "..", "/"])
def test_a_directory_is_no_file_to_write(name: str) -> None:
    with pytest.raises(IsADirectoryError), replacing(Path(name)):
        pass


def test_json_of_every_kind_is_a_value_error(tmp_path: Path) -> None:
    for content in (b"[" * 100_000, b"\xff", b"{", b"9" * 5000):
        (tmp_path / "a.json").write_bytes(content)
        with pytest.raises(ValueError):
            read_json(tmp_path / "a.json")


@pytest.mark.parametrize("name", ["./a", "../a", "/a", "~/a", "a/b/c", "x" * 5000 + "/../a"])
def test_paths_are_told_from_names_of_the_hub(name: str) -> None:
    assert is_path(name)
    assert not is_path("somebody/something")
    assert not is_path("x" * 5000)


@pytest.mark.parametrize("answer", [404, OSError("no route")])
def test_the_hub_answers_with_whatever_it_says(
    monkeypatch: pytest.MonkeyPatch, answer: int | OSError
) -> None:
    class Session:
        def head(self, address: str, timeout: float) -> int:
            if isinstance(answer, OSError):
                raise answer
            return answer

    monkeypatch.setattr(matkv.files, "get_session", Session)
    assert hub_answers() is (answer == 404)
    assert only_fetched("somebody/something") is not (answer == 404)
    assert only_fetched("./here") is False
