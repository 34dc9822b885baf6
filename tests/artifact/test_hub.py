"""Artifacts on the hub, by a stand-in of its client; and an artifact in a few lines."""

from __future__ import annotations

import inspect
from dataclasses import replace
from pathlib import Path

import huggingface_hub
import pytest

from hub import Hub
from matkv.artifact.artifact import Artifact
from matkv.errors import ArtifactError, FingerprintError
from one_artifact import GEOMETRY, assert_equal, make


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    return Hub(tmp_path / "hub").install(monkeypatch)


def test_what_was_pushed_comes_back(hub: Hub) -> None:
    address = make(lora=True).push_to_hub("you/it", private=True, token="secret")
    assert address == "https://hub/you/it/commit/1"
    assert_equal(Artifact.from_pretrained("you/it"), make(lora=True))
    create, upload, _ = hub.calls
    assert (create["private"], create["token"], upload["token"]) == (True, "secret", "secret")
    assert upload["commit_message"] == "Upload matkv artifact"


def test_a_newer_push_leaves_nothing_of_the_older_but_what_is_not_ours(hub: Hub) -> None:
    make(lora=True).push_to_hub("you/it")
    (hub.repo("you/it") / "README.md").write_text("kept")
    make(1).push_to_hub("you/it")
    assert_equal(Artifact.from_pretrained("you/it"), make(1))
    assert sorted(path.name for path in hub.repo("you/it").rglob("*") if path.is_file()) == [
        "README.md",
        "bases.safetensors",
        "config.json",
    ]


def test_revisions_are_told_apart_and_options_passed_on(hub: Hub, tmp_path: Path) -> None:
    make(0).push_to_hub("you/it")
    make(1).push_to_hub("you/it", revision="next")
    assert_equal(Artifact.from_pretrained("you/it"), make(0))
    found = Artifact.from_pretrained(
        "you/it", revision="next", token="t", cache_dir=tmp_path, local_files_only=True
    )
    assert_equal(found, make(1))
    options = {"cache_dir": tmp_path, "token": "t", "local_files_only": True, "revision": "next"}
    assert options.items() <= hub.calls[-1].items()


def test_a_directory_goes_before_the_hub(hub: Hub, tmp_path: Path) -> None:
    saved = make().save_pretrained(tmp_path / "runs" / "mine")
    assert_equal(Artifact.from_pretrained(saved), make())
    assert_equal(Artifact.from_pretrained(str(saved)), make())
    for name in ("./none", "/none/there", "runs/none/there"):
        with pytest.raises(ArtifactError, match="no artifact at"):
            Artifact.from_pretrained(name)
    assert hub.calls == []


def test_what_the_hub_does_not_have_is_one_line(hub: Hub) -> None:
    with pytest.raises(ArtifactError, match=r"cannot load you/none from the hub.*404") as error:
        Artifact.from_pretrained("you/none")
    assert "\n" not in str(error.value)


def test_what_the_hub_does_not_take_is_one_line(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError("403 Forbidden:\nlog in first")

    monkeypatch.setattr(huggingface_hub, "upload_folder", refuse)
    with pytest.raises(ArtifactError, match=r"cannot push to you/it.*403 Forbidden: log") as error:
        make().push_to_hub("you/it")
    assert "\n" not in str(error.value)


def test_a_name_that_is_none_is_one_line() -> None:
    with pytest.raises(ArtifactError, match="cannot load no name! from the hub"):
        Artifact.from_pretrained("no name!")


def test_the_stand_in_takes_what_the_hubs_client_takes() -> None:
    from matkv.artifact import hub as ours

    used = inspect.getsource(ours)
    for name, options in {
        "create_repo": ("private", "token", "exist_ok"),
        "upload_folder": (
            "repo_id", "folder_path", "commit_message", "revision", "token", "delete_patterns",
        ),
        "snapshot_download": ("revision", "token", "cache_dir", "local_files_only"),
    }.items():  # fmt: skip
        assert name in used
        assert set(options) <= set(inspect.signature(getattr(huggingface_hub, name)).parameters)


# ---- in a few lines


def test_an_artifact_is_shown_in_a_few_lines() -> None:
    shown = repr(make(lora=True))
    assert len(shown.splitlines()) <= 4 and max(map(len, shown.splitlines())) <= 110
    for words in (
        "somebody/some-model",
        "3 layers, 2 of them compressed",
        "made by calibrate",
        "rank 2 in 1 linear maps",
        "50%, 33.33%",
        "first 4, last 16",
        make(lora=True).digest,
    ):
        assert words in shown
    assert "uniform ranks" in repr(replace(make(), tables={}))


def test_a_model_without_a_name_reads_well() -> None:
    nameless = replace(make(), base_model="")
    assert "Artifact of a model without a name" in repr(nameless)
    with pytest.raises(FingerprintError, match="made for a model without a name, whose") as error:
        nameless.check(GEOMETRY, (1.0, 2.0, 3.0))
    assert "\n" not in str(error.value)
