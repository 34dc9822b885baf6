"""Loading models by name."""

from __future__ import annotations

from pathlib import Path

import pytest

import matkv
from matkv.errors import ModelError
from matkv.models.load import load_config
from tiny import save_model


def test_a_model_that_is_not_there_is_named() -> None:
    with pytest.raises(ModelError, match=r"cannot load /no/such/model"):
        matkv.load_model("/no/such/model")
    with pytest.raises(ModelError, match=r"no file /no/such/model\.gguf"):
        matkv.load_model("/no/such/model.gguf")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("config.json", "{}"),
        ("config.json", "[1, 2]"),
        ("config.json", "not json"),
        ("config.json", '{"model_type": "llama", "hidden_size": "wide"}'),
        ("model.safetensors", "cut"),
        ("tokenizer.json", "{}"),
    ],
)
def test_damaged_files_are_an_error_of_one_line(tmp_path: Path, name: str, content: str) -> None:
    save_model(tmp_path)
    (tmp_path / name).write_text(content)
    with pytest.raises(ModelError, match=rf"cannot load {tmp_path}: ") as caught:
        matkv.load_model(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_hub_that_does_not_answer_is_asked_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Its client would ask again and again, for the better part of a minute."""
    asked = []

    def silent() -> bool:
        asked.append(1)
        return False

    monkeypatch.setattr("matkv.files.hub_answers", silent)
    with pytest.raises(ModelError, match="cannot load no-model-at-all: "):
        matkv.load_model("no-model-at-all")
    with pytest.raises(ModelError, match="no config of a model in nobody/nothing"):
        load_config("nobody/nothing")
    assert len(asked) == 2
    assert "Retrying" not in caplog.text


def test_a_directory_needs_no_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_model(tmp_path / "model")
    monkeypatch.setattr("matkv.files.hub_answers", lambda: pytest.fail("the hub was asked"))
    monkeypatch.chdir(tmp_path)
    matkv.load_model("model")


@pytest.mark.parametrize("name", ["", " "])
def test_no_name_is_no_model(name: str) -> None:
    with pytest.raises(ModelError, match="no model is named: a model is a hub id"):
        matkv.load_model(name)
