"""Artifacts on the Hugging Face hub, as directories of their files."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import huggingface_hub

from matkv.artifact.config import CONFIG
from matkv.artifact.storage import BASES, LORA
from matkv.errors import ArtifactError

# Nothing else is fetched, and of these what a newer version lacks is removed when it is pushed.
FILES = [CONFIG, BASES, f"{LORA}/*"]


def download(repo_id: str, **options: Any) -> Path:
    """The directory of an artifact in the hub's cache; `options` are `snapshot_download`'s.

    Raises:
        ArtifactError: it cannot be had.
    """
    with _explained(f"cannot load {repo_id} from the hub"):
        return Path(huggingface_hub.snapshot_download(repo_id, allow_patterns=FILES, **options))


def upload(
    folder: Path,
    repo_id: str,
    *,
    private: bool | None,
    revision: str | None,
    token: str | None,
    message: str,
) -> str:
    """Make a repository unless it is there, and commit an artifact's directory to it.

    Returns the address of the commit.

    Raises:
        ArtifactError: the hub does not take it.
    """
    with _explained(f"cannot push to {repo_id}"):
        made = huggingface_hub.create_repo(repo_id, private=private, token=token, exist_ok=True)
        commit = huggingface_hub.upload_folder(
            repo_id=made.repo_id,
            folder_path=folder,
            commit_message=message,
            revision=revision,
            token=token,
            delete_patterns=FILES,
        )
        return str(commit.commit_url)


@contextmanager
def _explained(what: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # the client's errors are those of one HTTP library or another
        reason = " ".join(str(error).split())[:300]
        raise ArtifactError(
            f"{what}: {type(error).__name__}: {reason}; is the name right, are you logged in?"
        ) from error
