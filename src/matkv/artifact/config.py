"""config.json: all of an artifact but its tensors, under one checksum and checked before use."""

from __future__ import annotations

import hashlib
import json
import os
import re
import reprlib
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any

import numpy
from pydantic import ConfigDict, Field, ValidationError
from pydantic.dataclasses import dataclass

from matkv.artifact.history import check_history
from matkv.errors import ArtifactError, RankError
from matkv.ranks import Geometry, RankTable, check_budget

CONFIG = "config.json"
FORMAT_VERSION = 2  # 1 calls `recent` a window, and has no checksum of config.json itself
SEAL = "config_sha256"
# More is no artifact but an attack, or a file of something else: read neither.
MAX_BYTES, MAX_DEPTH, MAX_PARTS, MAX_TABLES, MAX_FINGERPRINT = 2**24, 64, 2**18, 1000, 2**16

Tokens = Annotated[int, Field(strict=True, ge=0, le=2**31 - 1)]
Text = Annotated[str, Field(strict=True)]
Number = Annotated[float, Field(strict=True, allow_inf_nan=False)]


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
class Stored:
    """What config.json holds, by its names; `tables` are checked against the geometry in `read`."""

    base_model: Text
    geometry: Geometry
    fingerprint: Annotated[tuple[Number, ...], Field(max_length=MAX_FINGERPRINT)]
    bases_sha256: Text
    lora_sha256: Text | None = None
    sink: Tokens
    recent: Tokens
    tables: Annotated[dict[str, Any], Field(max_length=MAX_TABLES)]
    history: tuple[dict[str, Any], ...]

    def rank_tables(self) -> dict[float, RankTable]:
        """The rank tables by budget.

        Raises:
            BudgetError, RankError: they do not fit the geometry, or two have one budget.
        """
        found: dict[float, RankTable] = {}
        for name, table in self.tables.items():
            budget = check_budget(float(name))
            if budget in found:
                raise RankError(f"there are two tables of budget {name}")
            found[budget] = RankTable.from_json(self.geometry, table)
        return found


def write_config(directory: Path, values: dict[str, Any]) -> None:
    """Write config.json, sealed with a checksum; it has reached the disk afterwards.

    Raises:
        ArtifactError: it would be larger than what can be read back.
        OSError: it cannot be written.
    """
    plain = json.loads(json.dumps(values))  # keys are text, as they will be when read back
    head = {"format": "matkv", "format_version": FORMAT_VERSION}
    data = json.dumps(sealed(head | plain), indent=1)
    _, parts = _nesting(data.encode())
    if len(data) > MAX_BYTES or parts > MAX_PARTS or len(values["tables"]) > MAX_TABLES:
        raise ArtifactError(
            f"{CONFIG} would have {len(data):,} bytes, {len(values['tables']):,} rank tables and "
            f"{parts:,} lists and objects; at most {MAX_BYTES:,}, {MAX_TABLES:,} and {MAX_PARTS:,} "
            "can be read back: keep fewer tables, or probe a training less often"
        )
    with (directory / CONFIG).open("w", encoding="utf-8") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def sealed(values: dict[str, Any]) -> dict[str, Any]:
    """A configuration with the checksum of all its other fields, however they are laid out."""
    others = {name: values[name] for name in values if name != SEAL}
    text = json.dumps(others, sort_keys=True)
    return others | {SEAL: hashlib.sha256(text.encode()).hexdigest()}


def read_config(directory: Path) -> Stored:
    """The configuration of an artifact.

    Raises:
        ArtifactError: it is missing, foreign, damaged or of another format version.
    """
    if not directory.is_dir():
        raise ArtifactError(
            f"no artifact at {directory}: make one with matkv calibrate MODEL -o RUN"
        )
    path = directory / CONFIG
    if not path.is_file():
        raise ArtifactError(f"{directory} is not a matkv artifact: it has no {CONFIG}")
    config = _parsed(path)
    if not isinstance(config, dict) or config.get("format") != "matkv":
        raise ArtifactError(f"{directory} is not a matkv artifact: {CONFIG} is another program's")
    version = config.get("format_version")
    if type(version) is not int or not 1 <= version <= FORMAT_VERSION:
        raise ArtifactError(
            f"{directory} has format version {reprlib.repr(version)}, this matkv reads 1 to "
            f"{FORMAT_VERSION}: upgrade matkv, or calibrate again"
        )
    if version == 1:
        config["recent"] = config.pop("window", None)
    elif SEAL not in config:
        raise damaged(path, "it names no checksum of itself")
    elif config[SEAL] != sealed(config)[SEAL]:
        raise damaged(path, "its checksum is not the one it names")
    try:
        known = {one.name: config[one.name] for one in fields(Stored) if one.name in config}
        stored = Stored(**known)
        check_history(stored.history)
    except (ValidationError, ArtifactError) as error:
        raise damaged(path, error) from None
    return stored


def _parsed(path: Path) -> Any:
    """JSON of a size and depth that are safe to read."""
    try:
        if path.stat().st_size > MAX_BYTES:
            raise damaged(path, f"it has more than {MAX_BYTES:,} bytes")
        data = path.read_bytes()
        depth, parts = _nesting(data)
        if depth > MAX_DEPTH or parts > MAX_PARTS:
            raise damaged(path, f"it has {parts:,} lists and objects, nested {depth:,} deep")
        return json.loads(data.decode("utf-8"))
    except (OSError, ValueError) as error:
        raise damaged(path, error) from None


def _nesting(data: bytes) -> tuple[int, int]:
    """How deep lists and objects of JSON are nested, and how many there are."""
    outside = re.sub(rb'"(?:[^"\\]|\\.)*"', b"", data, flags=re.DOTALL)
    letters = numpy.frombuffer(outside, dtype=numpy.uint8)
    opened, closed = (numpy.isin(letters, list(kind)) for kind in (b"[{", b"]}"))
    depths = (opened.astype(numpy.int32) - closed).cumsum()
    return int(depths.max(initial=0)), int(opened.sum())


def damaged(path: Path, reason: Exception | str) -> ArtifactError:
    """An error that says in one line what is wrong with a file of an artifact."""
    if isinstance(reason, ValidationError):
        found = reason.errors(include_url=False)[0]
        where = ".".join(map(str, found["loc"]))
        reason = f"{where} {reprlib.repr(found['input'])}: {found['msg']}"
    text = " ".join(str(reason).split())
    if isinstance(reason, (KeyError, TypeError, AttributeError)):
        text = f"{type(reason).__name__}: {text}"
    where = " ".join(str(path).split())
    return ArtifactError(f"{where} is damaged ({text[:300]}): restore it, or calibrate again")
