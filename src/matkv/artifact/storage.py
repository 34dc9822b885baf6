"""An artifact's files, written and read back with checks."""

from __future__ import annotations

import hashlib
from dataclasses import fields
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from matkv.artifact.config import CONFIG, damaged
from matkv.artifact.lora import Lora
from matkv.bases.maps import Maps, SideBases
from matkv.bases.quantizer import Quantizer
from matkv.codes import CODED
from matkv.errors import ArtifactError
from matkv.ranks import SIDES, Geometry, Side

BASES, LORA = "bases.safetensors", "lora"


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


def read_bases(path: Path, geometry: Geometry, sha256: str) -> dict[int, dict[Side, SideBases]]:
    """The bases of every compressed layer.

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
        raise damaged(path, error) from None
    return {
        layer: {side: _read_side(tensors, geometry, layer, side) for side in SIDES}
        for layer in geometry.compressed
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
    return SideBases(
        Maps(encode_GDD, decode_GDD), energy_GD, _read_quantizer(tensors, name, square)
    )


def _read_quantizer(
    tensors: dict[str, Tensor], name: str, square: tuple[int, int, int]
) -> Quantizer | None:
    parts = {one.name: tensors.get(f"{name}.codes.{one.name}") for one in fields(Quantizer)}
    if all(tensor is None for tensor in parts.values()):
        return None
    for part, tensor in parts.items():
        wanted = (len(CODED), *square[:2]) if part.endswith("_WGD") else square[:2]
        if tensor is None or tuple(tensor.shape) != wanted or tensor.dtype != torch.float32:
            raise ValueError(f"{name}.codes.{part} is missing, or not {wanted} float32")
        if not bool((tensor.isfinite() & (tensor >= 0)).all()):
            raise ValueError(f"{name}.codes.{part} holds numbers that cannot be")
    quantizer = Quantizer(**parts)  # type: ignore[arg-type]
    for positive in (quantizer.scale_GD, quantizer.step_WGD):
        if not bool((positive > 0).all()):
            raise ValueError(f"{name}.codes has a scale or a step of zero")
    return quantizer


def quantizer_tensors(quantizer: Quantizer | None) -> dict[str, Tensor]:
    """The tensors of a quantizer by the name they are stored under; none of none."""
    if quantizer is None:
        return {}
    return {f"codes.{one.name}": getattr(quantizer, one.name) for one in fields(quantizer)}


def read_lora(directory: Path, sha256: str | None) -> Lora | None:
    """The adapters; None where the artifact says that it has none.

    Raises:
        ArtifactError: they are missing or not told of, or their checksum is not `sha256`.
    """
    if checksum_of_all(directory) != sha256:
        raise ArtifactError(
            f"{directory} is missing or damaged: its checksum is not the one in {CONFIG}; restore "
            "it, or distill again"
        )
    if sha256 is None:
        return None
    try:
        return Lora.read(directory)
    except (SafetensorError, OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise damaged(directory, error) from None


def plain(tensor: Tensor) -> Tensor:
    """A tensor as it is stored: fp32, on the CPU."""
    # A copy, because safetensors refuses tensors that share memory.
    return tensor.detach().to("cpu", torch.float32, copy=True).contiguous()


def checksum(path: Path) -> str:
    """The checksum of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def checksum_of_all(directory: Path) -> str | None:
    """One checksum of the files in a directory; None without any."""
    sums = [checksum(path) for path in sorted(directory.glob("*")) if path.is_file()]
    return hashlib.sha256("".join(sums).encode()).hexdigest() if sums else None
