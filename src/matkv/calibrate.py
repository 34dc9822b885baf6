"""Calibrate: one pass over text gives the bases a model starts from.

Shapes: B batch, H query head, G KV head, J query heads of a KV head, T token, N kept token, D head
dim, M model dim.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict
from typing import TYPE_CHECKING

from pydantic import Field

from matkv.artifact.artifact import Artifact
from matkv.artifact.history import Calibrated
from matkv.bases import moments
from matkv.bases.maps import SideBases
from matkv.bases.moments import KeyBasis, LayerMoments, ValueBasis
from matkv.errors import RankError
from matkv.progress import OnProgress
from matkv.settings import Number, settings

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from matkv.data.batch import Tokens


@settings(RankError)
class CalibrateConfig:
    """How to calibrate; `sink` and `recent`, tokens that `attach` keeps exact, are only stored."""

    key: KeyBasis = Field(
        default="query", description="key basis: query or pca (`moments.key_maps`)"
    )
    value: ValueBasis = Field(default="output", description="value basis: output or pca")
    skip_first: Number = Field(default=0, description="leave out each sequence's first tokens")
    sink: Number = Field(default=0, description="first tokens to keep exact")
    recent: Number = Field(default=0, description="last tokens to keep exact")
    windows: bool = Field(
        default=True, description="compress layers with a long sliding window as well"
    )


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
    from matkv.hf.observe import collect_moments  # stands upon transformers, as below

    config = config or CalibrateConfig()
    layers, tokens = collect_moments(
        model,
        batches,
        skip_first=config.skip_first,
        windows=config.windows,
        on_progress=on_progress,
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
    from matkv.hf.geometry import geometry_of
    from matkv.hf.weights import fingerprint

    bases = {}
    for layer, one in layers.items():
        key, value = moments.key_maps(one, config.key), moments.value_maps(one, config.value)
        bases[layer] = {
            "key": SideBases(key, moments.column_energy(one.key, key)),
            "value": SideBases(value, moments.column_energy(one.value, value)),
        }
    artifact = Artifact(
        base_model=str(model.config._name_or_path),
        geometry=geometry_of(model.config, windows=config.windows),
        fingerprint=fingerprint(model),
        bases=bases,  # type: ignore[arg-type]
        sink=config.sink,
        recent=config.recent,
    )
    return artifact.with_history(Calibrated(settings=asdict(config), tokens=tokens))
