"""An artifact's files, written and read back with checks."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from matkv.artifact.lora import Lora
from matkv.bases.maps import Maps, SideBases
from matkv.errors import ArtifactError
from matkv.ranks import SIDES, Geometry, Side

FORMAT_VERSION = 2  # 1 calls `recent` a window
CONFIG, BASES, LORA = "config.json", "bases.safetensors", "lora"


def check_target(path: Path) -> None:
    """Make sure that saving to `path` replaces nothing but an artifact.

    Raises:
        ArtifactError: something else is there.
    """
    if path.is_dir() and not any(path.iterdir()):
        return
    if path.exists() and not _is_ours(path):
        raise ArtifactError(f"{path} exists and is not an artifact: choose another directory")


def _is_ours(directory: Path) -> bool:
    """Whether a directory holds an artifact; other programs, too, have a config.json."""
    config = directory / CONFIG
    return config.is_file() and b'"format": "matkv"' in config.read_bytes()[:4096]


def read_config(directory: Path) -> dict[str, Any]:
    """The plain data of an artifact's configuration.

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
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ArtifactError(
            f"{path} is damaged ({error}): restore it, or calibrate again"
        ) from error
    if not isinstance(config, dict) or config.get("format") != "matkv":
        raise ArtifactError(f"{directory} is not a matkv artifact: {CONFIG} is another program's")
    version = config.get("format_version")
    if version not in (1, FORMAT_VERSION):
        raise ArtifactError(
            f"{directory} has format version {version}, this matkv reads 1 to {FORMAT_VERSION}: "
            "upgrade matkv, or calibrate again"
        )
    return config


def read_bases(path: Path, geometry: Geometry, sha256: str) -> dict[int, dict[Side, SideBases]]:
    """The bases of every growing layer.

    Raises:
        ArtifactError: the file is missing, or its checksum is not `sha256`.
        KeyError, ValueError: a tensor is missing, or not what the geometry asks for.
    """
    if not path.is_file():
        raise ArtifactError(f"{path} is missing: restore it, or calibrate again")
    if checksum(path) != sha256:
        raise ArtifactError(
            f"{path} is damaged: its checksum is not the one in {CONFIG}; restore it, or calibrate "
            "again"
        )
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise ArtifactError(
            f"{path} is damaged ({error}): restore it, or calibrate again"
        ) from error
    return {
        layer: {side: _read_side(tensors, geometry, layer, side) for side in SIDES}
        for layer in geometry.growing
    }


def _read_side(tensors: dict[str, Tensor], geometry: Geometry, layer: int, side: Side) -> SideBases:
    shape = geometry.layers[layer]
    name = f"layers.{layer}.{side}"
    encode_GDD, energy_GD = tensors[f"{name}.encode"], tensors[f"{name}.energy"]
    decode_GDD = tensors.get(f"{name}.decode", encode_GDD)
    square = (shape.kv_heads, shape.head_dim, shape.head_dim)
    for tensor, wanted in ((encode_GDD, square), (decode_GDD, square), (energy_GD, square[:2])):
        if tuple(tensor.shape) != wanted or tensor.dtype != torch.float32:
            raise ValueError(
                f"{name} is {tuple(tensor.shape)} {tensor.dtype}, not {wanted} float32"
            )
        if not bool(tensor.isfinite().all()):
            raise ValueError(f"{name} holds numbers that are not finite")
    return SideBases(Maps(encode_GDD, decode_GDD), energy_GD)


def read_lora(directory: Path, sha256: str | None) -> Lora | None:
    """The adapters; None where the artifact says that it has none.

    Raises:
        ArtifactError: they are missing, or their checksum is not `sha256`.
    """
    if sha256 is None:
        return None
    if checksum_of_all(directory) != sha256:
        raise ArtifactError(
            f"{directory} is missing or damaged: its checksum is not the one in {CONFIG}; restore "
            "it, or distill again"
        )
    return Lora.read(directory)


def plain(tensor: Tensor) -> Tensor:
    """A tensor as it is stored: fp32, on the CPU."""
    # A copy, because safetensors refuses tensors that share memory.
    return tensor.detach().to("cpu", torch.float32, copy=True).contiguous()


def save_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    """Write tensors to a file that has reached the disk afterwards.

    Raises:
        OSError: they cannot be written.
    """
    try:
        save_file(tensors, path)
    except SafetensorError as error:  # how a full disk shows
        raise OSError(str(error)) from error
    with path.open("rb") as file:
        os.fsync(file.fileno())


def checksum(path: Path) -> str:
    """The checksum of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def checksum_of_all(directory: Path) -> str | None:
    """One checksum of the files in a directory; None without any."""
    sums = [checksum(path) for path in sorted(directory.glob("*"))]
    return hashlib.sha256("".join(sums).encode()).hexdigest() if sums else None
