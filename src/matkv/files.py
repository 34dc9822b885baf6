"""Files in and out: text and JSON lines with errors that name the line, outputs that are never half
written.

What is written gets a name beside its own and is renamed at the end, so that a kill or a full disk
leaves what was there before.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import shutil
import time
import uuid
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from huggingface_hub import constants, get_session
from safetensors.torch import save
from torch import Tensor

from matkv.errors import DataError

logger = logging.getLogger(__name__)

HUB_SECONDS = 5.0  # to connect, and to answer


def cache_home() -> Path:
    """Folder for what matkv derives once and keeps: `MATKV_CACHE`, else the XDG cache folder."""
    if own := os.environ.get("MATKV_CACHE"):
        return Path(own).expanduser()
    if xdg := os.environ.get("XDG_CACHE_HOME"):
        return Path(xdg) / "matkv"
    return Path.home() / ".cache" / "matkv"


def digest(*parts: bytes) -> str:
    """A short name of some content: equal only where all of it is equal."""
    total = hashlib.sha256()
    for part in parts:
        total.update(part)
    return total.hexdigest()[:12]


# ---- names


def is_path(name: str | Path) -> bool:
    """Whether a name is a path: there, or no name that the hub could give."""
    text = str(name)
    return os.path.exists(text) or text.startswith((".", "/", "~")) or text.count("/") > 1


def only_fetched(name: str | Path) -> bool:
    """Whether all there can be of a name is what was fetched before: the hub does not answer.

    Its client asks a hub out of reach again and again for the better part of a minute, for every
    file. Asked once here, a slip in a name is an error within seconds, with a network or without.
    """
    return not is_path(name) and not hub_answers()


def hub_answers() -> bool:
    """Whether the hub answers, be it with no; False too where `HF_HUB_OFFLINE` is set."""
    try:
        get_session().head(constants.ENDPOINT, timeout=HUB_SECONDS)
    except Exception:  # the client's errors are those of one HTTP library or another
        return False
    return True


# ---- reading


def read_text(path: Path) -> str:
    """The text of a UTF-8 file.

    Raises:
        DataError: it cannot be read, or is not UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 at byte {error.start}: save it as UTF-8") from error
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from error


def read_json(path: Path) -> Any:
    """What a JSON file holds.

    Raises:
        OSError: it cannot be read.
        ValueError: it is not JSON in UTF-8, or nested too deeply.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def read_json_lines(path: Path) -> Iterator[tuple[str, Any]]:
    """What every line of a JSONL file holds, and where it stands, for errors; blank lines left out.

    Raises:
        DataError: the file cannot be read, or a line is not JSON.
    """
    # Not splitlines(): JSON strings may hold U+2028 and its like, which are no line ends here.
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        yield where, _parsed(where, line)


def _parsed(where: str, line: str) -> Any:
    try:
        data = json.loads(line)
        if "\\u" in line:
            json.dumps(data, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise DataError(f"{where}: half of a surrogate pair, which is no character") from error
    except RecursionError as error:
        raise DataError(f"{where}: not JSON that can be read (nested too deeply)") from error
    except ValueError as error:  # of numbers with thousands of digits too
        raise DataError(f"{where}: not JSON ({getattr(error, 'msg', error)})") from error
    return data


# ---- writing


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A name beside `path` to write a file to: renamed to it at the end, gone after an error.

    Folders above are made. The suffix stays, for those who tell formats by it.

    Raises:
        OSError: it cannot be written, or names no file.
    """
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, "is a directory, not a file", str(path))
    new = path.with_name(f".{uuid.uuid4().hex[:8]}-{path.name}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield new
        new.replace(path)
    finally:
        # Its folder may be what could not be made; that error must not hide behind this one.
        with suppress(OSError):
            new.unlink()


def save_tensors(
    tensors: dict[str, Tensor], path: Path, metadata: dict[str, str] | None = None
) -> None:
    """Write tensors to a safetensors file that has reached the disk afterwards.

    Raises:
        OSError: they cannot be written.
    """
    # Not save_file(), whose files nobody but their owner may read, whatever the umask.
    data = save({name: tensor.contiguous() for name, tensor in tensors.items()}, metadata)
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


@contextmanager
def replacing_directory(target: Path, written: Collection[str] | None) -> Iterator[Path]:
    """A new directory beside `target` that takes its place at the end, and is gone after an error.

    It starts with everything of the old one but the names in `written`; empty where that is None.

    Raises:
        OSError: it cannot be written, or is the root of all.
    """
    if not target.name:
        raise OSError(errno.EBUSY, "cannot be replaced", str(target))
    recover_directory(target)
    _sweep(target)
    new = target.with_name(f".{target.name}.new-{uuid.uuid4().hex[:8]}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        if written is None:
            new.mkdir()
        else:
            _copy_others(target, new, written)
        yield new
        with _following(target):
            _swap(new, target)
    except BaseException:
        shutil.rmtree(new, ignore_errors=True)
        raise


def recover_directory(target: Path) -> None:
    """Put back the directory that a kill between the renames of `_swap` left aside."""
    if os.path.exists(target):
        return
    old = _aside(target)
    if os.path.isdir(old):
        logger.warning("a save to %s was cut off: what was there before is put back", target)
        old.rename(target)


def _copy_others(old: Path, new: Path, written: Collection[str]) -> None:
    def left_out(directory: str, _names: list[str]) -> Collection[str]:
        return written if Path(directory) == old else ()

    if old.is_dir():
        shutil.copytree(old, new, symlinks=True, ignore=left_out, copy_function=_link_or_copy)
    else:
        new.mkdir()


def _link_or_copy(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def _sweep(target: Path) -> None:
    """Remove what killed saves to `target` left beside it; one under way is younger than a day."""
    for left in target.parent.glob(f".{target.name}.new-*"):
        if time.time() - left.stat().st_mtime > 86_400:
            shutil.rmtree(left, ignore_errors=True)


def _swap(new: Path, target: Path) -> None:
    """Put `new` in place of `target`; `recover_directory` mends a kill between the two renames."""
    old = _aside(target)
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        target.rename(old)
    try:
        new.rename(target)
    except OSError:
        if old.exists():
            old.rename(target)
        raise
    shutil.rmtree(old, ignore_errors=True)


@contextmanager
def _following(target: Path) -> Iterator[None]:
    """Whoever stands in `target` stands in what takes its place, and not in a removed directory."""
    try:
        here = Path.cwd()
    except FileNotFoundError:
        here = target.parent
    inside = here.is_relative_to(target)
    yield
    if inside:
        os.chdir(here if here.is_dir() else target)


def _aside(target: Path) -> Path:
    return target.with_name(f".{target.name}.old")
