"""Calibrate: one pass over text gives the bases a model starts from.

Shapes: B batch, H query head, G KV head, J query heads of a KV head, T token, N kept token, D head
dim, M model dim.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass

from transformers import PreTrainedModel

from matkv.artifact.artifact import Artifact
from matkv.bases import moments
from matkv.bases.maps import SideBases
from matkv.bases.moments import KEY_BASES, VALUE_BASES, KeyBasis, LayerMoments, ValueBasis
from matkv.data.batch import Tokens
from matkv.errors import RankError
from matkv.hf.geometry import fingerprint, geometry_of
from matkv.hf.observe import OnProgress, collect_moments


@dataclass(frozen=True, kw_only=True)
class CalibrateConfig:
    """How to calibrate.

    `key` and `value` name the bases (see `moments.key_maps` and `moments.value_maps`); the first
    `skip_first` tokens of every sequence are left out of the moments. `sink` and `recent`, the
    numbers of first and last tokens that `attach` keeps exact, are only stored.
    """

    key: KeyBasis = "query"
    value: ValueBasis = "output"
    skip_first: int = 0
    sink: int = 0
    recent: int = 0

    def __post_init__(self) -> None:
        if self.key not in KEY_BASES:
            raise RankError(f"key basis {self.key!r} must be one of {', '.join(KEY_BASES)}")
        if self.value not in VALUE_BASES:
            raise RankError(f"value basis {self.value!r} must be one of {', '.join(VALUE_BASES)}")
        for name in ("skip_first", "sink", "recent"):
            if getattr(self, name) < 0:
                raise RankError(f"{name} {getattr(self, name)} must be 0 or more")


def calibrate(
    model: PreTrainedModel,
    batches: Iterable[Tokens],
    config: CalibrateConfig | None = None,
    *,
    on_progress: OnProgress | None = None,
) -> Artifact:
    """Make an artifact from one pass over `batches`.

    A batch is a tensor [BT] of token ids, or a mapping with `input_ids` and `attention_mask`, whose
    zeros mark padding. Memory does not depend on the number of tokens.

    Raises:
        DataError: there is no token.
        UnsupportedModelError: the model's attention cannot be reproduced on latents.
    """
    config = config or CalibrateConfig()
    layers, tokens = collect_moments(
        model, batches, skip_first=config.skip_first, on_progress=on_progress
    )
    return artifact_from(model, layers, config, tokens=tokens)


def artifact_from(
    model: PreTrainedModel,
    layers: dict[int, LayerMoments],
    config: CalibrateConfig,
    *,
    tokens: int,
) -> Artifact:
    """An artifact of the bases that `config` names, from moments already collected."""
    bases = {}
    for layer, one in layers.items():
        key, value = moments.key_maps(one, config.key), moments.value_maps(one, config.value)
        bases[layer] = {
            "key": SideBases(key, moments.column_energy(one.key, key)),
            "value": SideBases(value, moments.column_energy(one.value, value)),
        }
    artifact = Artifact(
        base_model=str(model.config._name_or_path),
        geometry=geometry_of(model.config),
        fingerprint=fingerprint(model),
        bases=bases,  # type: ignore[arg-type]
        sink=config.sink,
        recent=config.recent,
    )
    return artifact.with_history("calibrate", **asdict(config), tokens=tokens)
