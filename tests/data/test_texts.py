"""Texts from every source."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from matkv import data
from matkv.errors import DataError


def test_text_file_is_one_document(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_text("First line.\n\nSecond – line.\n", encoding="utf-8")
    assert data.read_texts(str(file), "train") == ["First line.\n\nSecond – line.\n"]


def test_directory_gives_its_text_files_by_name_without_blank_ones(tmp_path: Path) -> None:
    for name, text in {"b.txt": "B", "a.txt": "A", "c.txt": " \n", "d.md": "D"}.items():
        (tmp_path / name).write_text(text)
    assert data.read_texts(tmp_path, "train") == ["A", "B"]


def test_jsonl_gives_the_field_text(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    lines = [json.dumps({"text": "one\u2028two"}, ensure_ascii=False), "", '{"text": "three"}']
    file.write_text("\n".join(lines), encoding="utf-8")
    assert data.read_texts(file, "train") == ["one\u2028two", "three"]


@pytest.mark.parametrize("bad", ['{"text": ', '{"body": "x"}', '{"text": 3}', '["text"]'])
def test_jsonl_error_names_the_line(tmp_path: Path, bad: str) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text(f'{{"text": "fine"}}\n\n{bad}\n')
    with pytest.raises(DataError, match=r"a\.jsonl, line 3"):
        data.read_texts(file, "train")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("missing.txt", None, "does not exist"),
        ("empty.txt", b"", "holds no text"),
        ("blank.jsonl", b"\n\n", "holds no text"),
        ("latin.txt", b"caf\xe9", "not UTF-8 at byte 3"),
        ("table.csv", b"a,b", r"suffix '\.csv'"),
    ],
)
def test_bad_files_are_refused(
    tmp_path: Path, name: str, content: bytes | None, message: str
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        data.read_texts(tmp_path / name, "train")


def test_directory_without_text_files_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"has no \.txt file"):
        data.read_texts(tmp_path, "train")


# --------------------------------------------------------------------------------- hub data


@pytest.fixture
def answering(monkeypatch: pytest.MonkeyPatch) -> None:
    """A hub that answers, for stand-ins of `datasets`."""
    monkeypatch.setattr("matkv.data.hub.hub_answers", lambda: True)


class HubDataset(dict[str, list[Any]]):
    @property
    def column_names(self) -> list[str]:
        return list(self)


@pytest.mark.usefixtures("answering")
def test_hub_name_configuration_and_split_are_passed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[str, str | None, str]] = []

    def load_dataset(name: str, config: str | None, *, split: str) -> HubDataset:
        calls.append((name, config, split))
        return HubDataset(text=["one", "", None])

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    assert data.read_texts("hub:owner/name:config", "validation") == ["one"]
    data.read_texts("hub:name", "train")
    assert calls == [("owner/name", "config", "validation"), ("name", None, "train")]


def test_datasets_asks_no_hub_that_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    config = pytest.importorskip("datasets.config")
    seen = []

    def load_dataset(*_: str | None, split: str) -> HubDataset:
        seen.append(config.HF_HUB_OFFLINE)
        return HubDataset(text=["one"])

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    monkeypatch.setattr(config, "HF_HUB_OFFLINE", False)
    for answers in (True, False):
        monkeypatch.setattr("matkv.data.hub.hub_answers", lambda answers=answers: answers)
        assert data.read_texts("hub:x", "train") == ["one"]
    assert seen == [False, True]
    assert config.HF_HUB_OFFLINE is False


@pytest.mark.usefixtures("answering")
def test_hub_failures_become_data_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown_split(name: str, config: str | None, *, split: str) -> HubDataset:
        raise ValueError("Unknown split")

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=unknown_split))
    with pytest.raises(DataError, match="cannot load split 'validation' of hub:x: Unknown split"):
        data.read_texts("hub:x", "validation")
    no_text = SimpleNamespace(load_dataset=lambda *_, **__: HubDataset(body=["x"]))
    monkeypatch.setitem(sys.modules, "datasets", no_text)
    with pytest.raises(DataError, match=r"has columns \['body'\]"):
        data.read_texts("hub:x", "train")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match=r"pip install datasets"):
        data.read_texts("hub:x", "train")


# ----------------------------------------------------------------------------------- tokens
