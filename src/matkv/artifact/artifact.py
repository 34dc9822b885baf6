"""The artifact: bases and rank tables of one model, in a directory that is safe to share.

    config.json          format version, base model, fingerprint, geometry, rank tables, history
    bases.safetensors    layers.<l>.<side>.encode [GDD], .decode [GDD] unless orthogonal,
                         .energy [GD], .codes.<part> where codes were fitted; fp32
    lora/                adapters in PEFT's format, where some were trained
    results/*.json       what was measured, untouched by `save`

Nothing is pickled, and a kill or a full disk while saving leaves the old artifact whole.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from matkv.artifact.config import CONFIG, damaged, read_config, write_config
from matkv.artifact.history import Distilled, Entry, entries
from matkv.artifact.hub import download, upload
from matkv.artifact.lora import Lora
from matkv.artifact.pretrained import resolved
from matkv.artifact.storage import (
    BASES,
    LORA,
    check_target,
    checksum,
    checksum_of_all,
    plain,
    quantizer_tensors,
    read_bases,
    read_lora,
)
from matkv.bases.maps import Maps, SideBases
from matkv.bases.quantizer import Quantizer
from matkv.errors import ArtifactError, BudgetError, FingerprintError, RankError
from matkv.files import digest, is_path, recover_directory, replacing_directory, save_tensors
from matkv.ranks import SIDES, Geometry, RankTable, Side, check_budget

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, repr=False)
class Artifact:
    """Bases for every compressed layer of one model, and rank tables by budget.

    `bases[layer][side]` holds the maps; `tables` what a search found, by budget; `sink` and
    `recent` the number of first and last tokens to keep exact; `history` one entry per stage that
    made it. `fingerprint` holds a few weights of the base model, by which another is told apart.
    """

    base_model: str
    geometry: Geometry
    fingerprint: tuple[float, ...]
    bases: dict[int, dict[Side, SideBases]]
    tables: dict[float, RankTable] = field(default_factory=dict)
    sink: int = 0
    recent: int = 0
    history: tuple[dict[str, Any], ...] = ()
    lora: Lora | None = None

    def __repr__(self) -> str:
        budgets = ", ".join(f"{100 * one:.4g}%" for one in sorted(self.tables, reverse=True))
        adapters = "no adapters" if self.lora is None else f"adapters of {self.lora}"
        made = ", ".join(str(entry.get("stage")) for entry in self.history)
        return (
            f"Artifact of {self._model}: {_describe(self.geometry)}\n"
            f"    bases {self.digest}, made by {made or 'hand'}, {adapters}\n"
            f"    rank tables {budgets or 'none: uniform ranks'}; exact tokens: first {self.sink}, "
            f"last {self.recent}"
        )

    @property
    def _model(self) -> str:
        return self.base_model or "a model without a name"

    @property
    def digest(self) -> str:
        """A short name of the bases and adapters: equal only where these are bit-equal."""
        return digest(*self._contents())

    def _contents(self) -> Iterator[bytes]:
        for layer, sides in sorted(self.bases.items()):
            for side in SIDES:
                maps = sides[side].maps
                yield f"{layer}.{side}".encode()
                for map_XDD in (maps.encode_XDD, maps.decode_XDD):
                    yield plain(map_XDD).numpy().tobytes()
                for tensor in quantizer_tensors(sides[side].quantizer).values():
                    yield plain(tensor).numpy().tobytes()
        for name, tensor in sorted(self.lora.tensors.items()) if self.lora is not None else ():
            yield name.encode()
            yield plain(tensor).numpy().tobytes()

    def maps(self, layer: int, side: Side) -> Maps:
        """The bases [GDD] of one side of one layer, and the way back."""
        return self.bases[layer][side].maps

    def quantizer(self, layer: int, side: Side) -> Quantizer:
        """How the columns of one side of one layer are turned into codes.

        Raises:
            ArtifactError: none was fitted to the bases.
        """
        quantizer = self.bases[layer][side].quantizer
        if quantizer is None:
            raise ArtifactError(
                "the artifact has no codes for its bases: fit some with matkv allocate"
            )
        return quantizer

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
        self.check_geometry(geometry)
        if not _close(fingerprint, self.fingerprint):
            raise FingerprintError(
                f"the artifact was made for {self._model}, whose weights differ from this "
                "model's: load that model, or calibrate this one; a quantized copy has weights and "
                "bases of its own"
            )

    def check_geometry(self, geometry: Geometry) -> None:
        """`check` of a model whose weights are not there.

        Raises:
            FingerprintError: its geometry is another.
        """
        if geometry.without_rings() != self.geometry.without_rings():
            raise FingerprintError(
                f"the artifact was made for {self._model} ({_describe(self.geometry)}), this "
                f"model has {_describe(geometry)}: load that model, or calibrate this one"
            )

    @property
    def smallest_trained_rank(self) -> int:
        """The smallest rank that the last training drew; 0 for bases that were not trained."""
        trained = entries(self.history, Distilled)
        return trained[-1].smallest_rank if trained else 0

    @property
    def loss_weights(self) -> tuple[float, float]:
        """What divergence and cross-entropy weighed in the last training; the first alone if none.

        The two add up to one.
        """
        trained = entries(self.history, Distilled)
        return (trained[-1].loss_weights if trained else None) or (1.0, 0.0)

    def with_history(self, entry: Entry) -> Artifact:
        """A copy with one more history entry."""
        return replace(self, history=(*self.history, entry.to_json()))

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
                tensors[f"{name}.encode"] = plain(bases.maps.encode_XDD)
                if not bases.maps.is_orthogonal:
                    tensors[f"{name}.decode"] = plain(bases.maps.decode_XDD)
                tensors[f"{name}.energy"] = plain(bases.energy_GD)
                for part, tensor in quantizer_tensors(bases.quantizer).items():
                    tensors[f"{name}.{part}"] = plain(tensor)
        save_tensors(tensors, directory / BASES)
        if self.lora is not None:
            self.lora.write(directory / LORA)
        write_config(
            directory,
            {
                "base_model": self.base_model,
                "geometry": self.geometry.to_json(),
                "fingerprint": list(self.fingerprint),
                "bases_sha256": checksum(directory / BASES),
                "lora_sha256": checksum_of_all(directory / LORA),
                "sink": self.sink,
                "recent": self.recent,
                "tables": {str(b): t.to_json() for b, t in sorted(self.tables.items())},
                "history": list(self.history),
            },
        )

    def save_pretrained(self, save_directory: str | Path) -> Path:
        """`save`, by the name that transformers and PEFT give it."""
        return self.save(save_directory)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        revision: str | None = None,
        token: str | None = None,
        commit_message: str = "Upload matkv artifact",
    ) -> str:
        """Commit the artifact to a repository of the hub, made if need be; returns its address.

        Raises:
            ArtifactError: the hub does not take it.
        """
        with TemporaryDirectory() as folder:
            saved = self.save(Path(folder) / "artifact")
            return upload(
                saved,
                repo_id,
                private=private,
                revision=revision,
                token=token,
                message=commit_message,
            )

    # ---- loading

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | Path,
        *,
        revision: str | None = None,
        token: str | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
    ) -> Artifact:
        """The artifact of a directory, else of a repository of the hub.

        Raises:
            ArtifactError: there is neither, or see `load`.
        """
        name = str(name_or_path)
        if is_path(name):
            return cls.load(name)
        options = {"revision": revision, "token": token, "cache_dir": cache_dir}
        return cls.load(download(name, **options, local_files_only=local_files_only))

    @classmethod
    def load(cls, path: str | Path) -> Artifact:
        """Read and check an artifact directory, or one that comes with the package, by its name.

        Raises:
            ArtifactError: it is missing, foreign, damaged or of another format version.
        """
        directory = resolved(path).resolve()
        recover_directory(directory)
        stored = read_config(directory)
        try:
            return cls(
                base_model=stored.base_model,
                geometry=stored.geometry,
                fingerprint=stored.fingerprint,
                bases=read_bases(directory / BASES, stored.geometry, stored.bases_sha256),
                tables=stored.rank_tables(),
                sink=stored.sink,
                recent=stored.recent,
                history=stored.history,
                lora=read_lora(directory / LORA, stored.lora_sha256),
            )
        except (KeyError, ValueError, BudgetError, RankError) as error:
            raise damaged(directory, error) from error


def _close(ours: tuple[float, ...], theirs: tuple[float, ...]) -> bool:
    """Equal up to what casts between fp32, bf16 and fp16 change."""
    if len(ours) != len(theirs):
        return False
    a, b = (torch.tensor(one, dtype=torch.float32) for one in (ours, theirs))
    return bool(torch.allclose(a, b, rtol=0.01, atol=1e-3 * float(b.abs().mean())))


def _describe(geometry: Geometry) -> str:
    shapes = sorted({(s.kv_heads, s.head_dim) for s in geometry.layers})
    heads = ", ".join(f"{heads} KV heads × {dim}" for heads, dim in shapes)
    return f"{len(geometry.layers)} layers, {len(geometry.compressed)} of them compressed, {heads}"
