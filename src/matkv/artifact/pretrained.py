"""Artifacts that come with the package, by the names of their models."""

from __future__ import annotations

import hashlib
import os
import shutil
from pathlib import Path

from matkv.errors import ArtifactError
from matkv.files import cache_home, replacing_directory

SHIPPED = Path(__file__).parent.parent / "pretrained"


def shipped_names() -> tuple[str, ...]:
    """Names that stand for an artifact of the package wherever one is asked for."""
    return tuple(sorted(path.name for path in SHIPPED.glob("*") if path.is_dir()))


def resolved(path: str | Path) -> Path:
    """The directory that `path` means; one of the package's is copied to the cache folder first.

    A copy takes what is measured of it, and the package stays as it was installed. A directory that
    is there goes before a name.

    Raises:
        ArtifactError: the copy cannot be written.
    """
    name = str(path)
    if name not in shipped_names() or Path(name).exists():
        return Path(path)
    source = SHIPPED / name
    files = sorted(one for one in source.rglob("*") if one.is_file())
    content = hashlib.sha256(b"".join(one.read_bytes() for one in files)).hexdigest()[:12]
    target = cache_home() / "artifacts" / f"{name}-{content}"
    if target.is_dir():
        return target
    try:
        with replacing_directory(target, None) as new:
            for one in files:
                place = new / one.relative_to(source)
                place.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(one, place)
    except OSError as error:
        raise ArtifactError(
            f"cannot copy the artifact of {name} to {target}: {os.strerror(error.errno or 0)}; "
            "free some space or set MATKV_CACHE to another folder"
        ) from error
    return target
