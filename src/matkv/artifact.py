"""The artifact: bases and rank tables of one model, in a directory that is safe to share.

    config.json          format version, base model, fingerprint, geometry, rank tables, history
    bases.safetensors    layers.<l>.<side>.encode [GDD], .decode [GDD] unless orthogonal,
                         .energy [GD]; fp32
    lora/                adapters in PEFT's format, where some were trained
    results/*.json       what was measured, untouched by `save`

Nothing is pickled, and a kill or a full disk while saving leaves the old artifact whole.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from matkv.errors import ArtifactError, FingerprintError, RankError
from matkv.files import recover_directory, replacing_directory
from matkv.lora import Lora
from matkv.projection import Maps
from matkv.ranks import SIDES, Geometry, RankTable, Side, check_budget
from matkv.schedule import schedule_from_json

FORMAT_VERSION = 1
CONFIG, BASES, LORA = "config.json", "bases.safetensors", "lora"

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class SideBases:
    """One side of one layer: its maps and the share of energy in each of their columns [GD]."""

    maps: Maps
    energy_GD: Tensor


@dataclass(frozen=True, kw_only=True)
class Artifact:
    """Bases for every growing layer of one model, and rank tables by budget.

    `bases[layer][side]` holds the maps; `tables` what a search found, by budget; `sink` and
    `window` the number of first and last tokens to keep exact; `history` one entry per stage that
    made it. `fingerprint` holds a few weights of the base model, by which another is told apart.
    """

    base_model: str
    geometry: Geometry
    fingerprint: tuple[float, ...]
    bases: dict[int, dict[Side, SideBases]]
    tables: dict[float, RankTable] = field(default_factory=dict)
    sink: int = 0
    window: int = 0
    history: tuple[dict[str, Any], ...] = ()
    lora: Lora | None = None

    def maps(self, layer: int, side: Side) -> Maps:
        """The bases [GDD] of one side of one layer, and the way back."""
        return self.bases[layer][side].maps

    def table(self, budget: float, *, uniform: bool = False) -> RankTable:
        """The rank table for `budget`: the stored one, else the nearest smaller, else uniform.

        Raises:
            BudgetError: `budget` is not in (0, 1] or below one step.
        """
        check_budget(budget)
        fitting = [stored for stored in self.tables if stored <= budget + 1e-9]
        if uniform or budget == 1 or not fitting:
            return RankTable.uniform(self.geometry, budget)
        best = max(fitting)
        if budget - best > 1e-9:
            logger.warning("no table for budget %g is stored: using the one for %g", budget, best)
        return self.tables[best]

    def check(self, geometry: Geometry, fingerprint: tuple[float, ...]) -> None:
        """Make sure that a model is the one these bases were made for.

        Raises:
            FingerprintError: its geometry or its weights are others.
        """
        if geometry != self.geometry:
            raise FingerprintError(
                f"the artifact was made for {self.base_model} ({_describe(self.geometry)}), this "
                f"model has {_describe(geometry)}: load that model, or calibrate this one"
            )
        if not _close(fingerprint, self.fingerprint):
            raise FingerprintError(
                f"the artifact was made for {self.base_model}, whose weights differ from this "
                "model's: load that model, or calibrate this one"
            )

    @property
    def smallest_trained_rank(self) -> int:
        """The smallest rank that the last training drew; 0 for bases that were not trained."""
        for entry in reversed(self.history):
            if "schedule" in entry:
                return min(schedule_from_json(entry["schedule"]).smallest)
        return 0

    @property
    def loss_weights(self) -> tuple[float, float]:
        """What divergence and cross-entropy weighed in the last training; the first alone if none.

        The two add up to one.
        """
        for entry in reversed(self.history):
            if "settings" in entry:
                kl, ce = entry["settings"]["kl"], entry["settings"]["ce"]
                return kl / (kl + ce), ce / (kl + ce)
        return 1.0, 0.0

    def with_history(self, stage: str, **entry: Any) -> Artifact:
        """A copy with one more history entry."""
        return replace(self, history=(*self.history, {"stage": stage, **entry}))

    # ---- saving

    def save(self, path: str | Path) -> Path:
        """Write the artifact to the directory `path`, replacing an older one at once.

        Raises:
            ArtifactError: the directory cannot be written, or `path` holds something else.
        """
        target = Path(path).resolve()
        check_target(target)
        try:
            with replacing_directory(target, written=(CONFIG, BASES, LORA)) as new:
                self._write(new)
        except OSError as error:
            raise ArtifactError(f"cannot save to {target}: {error}; nothing was changed") from error
        return target

    def _write(self, directory: Path) -> None:
        tensors: dict[str, Tensor] = {}
        for layer, sides in self.bases.items():
            for side, bases in sides.items():
                name = f"layers.{layer}.{side}"
                tensors[f"{name}.encode"] = _plain(bases.maps.encode_GDD)
                if not bases.maps.is_orthogonal:
                    tensors[f"{name}.decode"] = _plain(bases.maps.decode_GDD)
                tensors[f"{name}.energy"] = _plain(bases.energy_GD)
        _save_tensors(tensors, directory / BASES)
        if self.lora is not None:
            self.lora.write(directory / LORA)
        config = {
            "format": "matkv",
            "format_version": FORMAT_VERSION,
            "base_model": self.base_model,
            "geometry": self.geometry.to_json(),
            "fingerprint": list(self.fingerprint),
            "bases_sha256": _sha256(directory / BASES),
            "lora_sha256": _sha256_of_all(directory / LORA),
            "sink": self.sink,
            "window": self.window,
            "tables": {str(b): t.to_json() for b, t in sorted(self.tables.items())},
            "history": list(self.history),
        }
        with (directory / CONFIG).open("w", encoding="utf-8") as file:
            json.dump(config, file, indent=1)
            file.flush()
            os.fsync(file.fileno())

    # ---- loading

    @classmethod
    def load(cls, path: str | Path) -> Artifact:
        """Read and check an artifact directory.

        Raises:
            ArtifactError: it is missing, foreign, damaged or of another format version.
        """
        directory = Path(path).resolve()
        recover_directory(directory)
        config = _read_config(directory)
        try:
            geometry = Geometry.from_json(config["geometry"])
            tables = {
                float(budget): RankTable.from_json(geometry, table)
                for budget, table in config["tables"].items()
            }
            return cls(
                base_model=str(config["base_model"]),
                geometry=geometry,
                fingerprint=tuple(float(weight) for weight in config["fingerprint"]),
                bases=_read_bases(directory / BASES, geometry, config["bases_sha256"]),
                tables=tables,
                sink=int(config["sink"]),
                window=int(config["window"]),
                history=tuple(config["history"]),
                lora=_read_lora(directory / LORA, config.get("lora_sha256")),
            )
        except (KeyError, TypeError, ValueError, AttributeError, RankError) as error:
            raise ArtifactError(
                f"{directory / CONFIG} is damaged ({type(error).__name__}: {error}): restore it, "
                "or calibrate again"
            ) from error


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


def _read_config(directory: Path) -> dict[str, Any]:
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
    if version != FORMAT_VERSION:
        raise ArtifactError(
            f"{directory} has format version {version}, this matkv reads {FORMAT_VERSION}: "
            "upgrade matkv, or calibrate again"
        )
    return config


def _read_bases(path: Path, geometry: Geometry, sha256: str) -> dict[int, dict[Side, SideBases]]:
    if not path.is_file():
        raise ArtifactError(f"{path} is missing: restore it, or calibrate again")
    if _sha256(path) != sha256:
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


def _read_lora(directory: Path, sha256: str | None) -> Lora | None:
    if sha256 is None:
        return None
    if _sha256_of_all(directory) != sha256:
        raise ArtifactError(
            f"{directory} is missing or damaged: its checksum is not the one in {CONFIG}; restore "
            "it, or distill again"
        )
    return Lora.read(directory)


def _plain(tensor: Tensor) -> Tensor:
    # A copy, because safetensors refuses tensors that share memory.
    return tensor.detach().to("cpu", torch.float32, copy=True).contiguous()


def _save_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    try:
        save_file(tensors, path)
    except SafetensorError as error:  # how a full disk shows
        raise OSError(str(error)) from error
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sha256_of_all(directory: Path) -> str | None:
    """One checksum of the files in a directory; None without any."""
    sums = [_sha256(path) for path in sorted(directory.glob("*"))]
    return hashlib.sha256("".join(sums).encode()).hexdigest() if sums else None


def _close(ours: tuple[float, ...], theirs: tuple[float, ...]) -> bool:
    """Equal up to what casts between fp32, bf16 and fp16 change."""
    if len(ours) != len(theirs):
        return False
    a, b = torch.tensor(ours), torch.tensor(theirs)
    return bool(torch.allclose(a, b, rtol=0.01, atol=1e-3 * float(b.abs().mean())))


def _describe(geometry: Geometry) -> str:
    shapes = sorted({(s.kv_heads, s.head_dim) for s in geometry.layers})
    heads = ", ".join(f"{heads} KV heads × {dim}" for heads, dim in shapes)
    return f"{len(geometry.layers)} layers, {len(geometry.growing)} of them growing, {heads}"
