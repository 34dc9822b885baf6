"""A stand-in of the hub's client: repositories are directories, and no network is reached."""

from __future__ import annotations

import fnmatch
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest


class Hub:
    """What `huggingface_hub` does for the calls that matkv makes; `calls` are their options."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.calls: list[dict[str, Any]] = []

    def install(self, patch: pytest.MonkeyPatch) -> Hub:
        for name in ("create_repo", "upload_folder", "snapshot_download"):
            patch.setattr(huggingface_hub, name, getattr(self, name))
        return self

    def repo(self, repo_id: str, revision: str | None = None) -> Path:
        return self.folder / repo_id / (revision or "main")

    def create_repo(self, repo_id: str, *, exist_ok: bool = False, **options: Any) -> Any:
        self.calls.append({"call": "create", "repo_id": repo_id, **options})
        self.repo(repo_id).mkdir(parents=True, exist_ok=exist_ok)
        return SimpleNamespace(repo_id=repo_id)

    def upload_folder(
        self,
        *,
        repo_id: str,
        folder_path: str | Path,
        revision: str | None = None,
        delete_patterns: list[str] | None = None,
        **options: Any,
    ) -> Any:
        self.calls.append({"call": "upload", "repo_id": repo_id, "revision": revision, **options})
        repo = self.repo(repo_id, revision)
        for path in sorted(repo.rglob("*")):
            name = str(path.relative_to(repo))
            if path.is_file() and any(fnmatch.fnmatch(name, one) for one in delete_patterns or ()):
                path.unlink()
        shutil.copytree(folder_path, repo, dirs_exist_ok=True)
        return SimpleNamespace(commit_url=f"https://hub/{repo_id}/commit/1")

    def snapshot_download(
        self,
        repo_id: str,
        *,
        allow_patterns: list[str] | None = None,
        revision: str | None = None,
        **options: Any,
    ) -> str:
        self.calls.append({"call": "download", "repo_id": repo_id, "revision": revision, **options})
        repo, snapshot = self.repo(repo_id, revision), self.folder / "cache" / str(len(self.calls))
        if not repo.is_dir():
            raise FileNotFoundError(f"404: no repository {repo_id}\nat revision {revision}")
        for path in repo.rglob("*"):
            name = str(path.relative_to(repo))
            allowed = [fnmatch.fnmatch(name, one) for one in allow_patterns or ("*",)]
            if path.is_file() and any(allowed):
                (snapshot / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, snapshot / name)
        return str(snapshot)
