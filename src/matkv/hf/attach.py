"""Switch a model's attention to latents and back."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import MethodType

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from matkv.artifact.artifact import Artifact
from matkv.artifact.records import Record
from matkv.artifact.setting import Setting
from matkv.errors import MatkvError, RankError
from matkv.hf.function import NAME, use_implementation
from matkv.hf.generation import PREPARE, prepare_cache_for_generation, prepare_forward
from matkv.hf.geometry import attention_modules, fingerprint, geometry_of
from matkv.latents.layer import LayerProjection
from matkv.ranks import RankTable


@dataclass
class Attachment:
    """What `attach` did to a model, kept on it for `detach` and for questions about it."""

    artifact: Artifact
    table: RankTable
    attention_before: str
    hook: RemovableHandle
    weights_before: dict[str, Tensor]


def attach(
    model: PreTrainedModel,
    artifact: Artifact,
    budget: float | None = None,
    *,
    ranks: RankTable | None = None,
    sink: int | None = None,
    recent: int | None = None,
) -> PreTrainedModel:
    """Switch `model` to latent attention at a budget or at given ranks; returns the same model.

    Afterwards `model.generate(...)` fills a `LatentCache` by itself. Attaching again replaces the
    ranks. `sink` and `recent`, the numbers of first and last tokens kept exact, come from the
    artifact unless given.

    Raises:
        FingerprintError: the artifact was made for another model.
        BudgetError, RankError: the budget or the ranks do not fit.
    """
    if (budget is None) == (ranks is None):
        raise RankError("attach takes either a budget or a rank table")
    modules = attention_modules(model)
    if _merged(model):  # with its own weights again, it can be recognized
        detach(model)
    artifact.check(geometry_of(model.config), fingerprint(model))
    table = ranks if ranks is not None else artifact.table(budget)  # type: ignore[arg-type]
    if table.geometry != artifact.geometry:
        raise RankError("the rank table was made for another model's geometry")
    sink, recent = _exact(artifact.sink, sink, "sink"), _exact(artifact.recent, recent, "recent")
    detach(model)
    for layer in artifact.geometry.growing:
        projection = LayerProjection(
            artifact.maps(layer, "key"),
            artifact.maps(layer, "value"),
            table.key[layer],
            table.value[layer],
            sink=sink,
            recent=recent,
        )
        parameter = next(modules[layer].parameters())
        modules[layer].matkv = projection.to(parameter.device, model.dtype).requires_grad_(False)
    before = use_implementation(model, NAME)
    hook = model.get_decoder().register_forward_pre_hook(prepare_forward, with_kwargs=True)
    model.__dict__[PREPARE] = MethodType(prepare_cache_for_generation, model)
    model.__dict__["matkv_attachment"] = Attachment(
        artifact, table, before, hook, _merge(model, artifact)
    )
    return model


def detach(model: PreTrainedModel) -> PreTrainedModel:
    """Undo `attach`; does nothing to a model that is not attached. Returns the same model."""
    attachment: Attachment | None = model.__dict__.pop("matkv_attachment", None)
    if attachment is None:
        return model
    attachment.hook.remove()
    del model.__dict__[PREPARE]
    for name, weight in attachment.weights_before.items():
        model.get_parameter(name).data.copy_(weight)
    for module in attention_modules(model):
        if isinstance(getattr(module, "matkv", None), LayerProjection):
            del module.matkv
    model.set_attn_implementation(attachment.attention_before)
    return model


def _merged(model: PreTrainedModel) -> bool:
    attachment: Attachment | None = model.__dict__.get("matkv_attachment")
    return attachment is not None and bool(attachment.weights_before)


@torch.no_grad()
def _merge(model: PreTrainedModel, artifact: Artifact) -> dict[str, Tensor]:
    """Add the artifact's adapters to the weights; returns copies, on the CPU, of those before.

    Copies, because subtracting again would not give the same weights back.
    """
    before: dict[str, Tensor] = {}
    for path, update in artifact.lora.updates() if artifact.lora is not None else ():
        weight = model.get_parameter(f"{path}.weight")
        before[f"{path}.weight"] = weight.detach().to("cpu", copy=True)
        weight.add_(update.to(weight.device, weight.dtype))
    return before


def attached_table(model: PreTrainedModel) -> RankTable:
    """The ranks an attached model runs at.

    Raises:
        MatkvError: the model is not attached.
    """
    attachment: Attachment | None = model.__dict__.get("matkv_attachment")
    if attachment is None:
        raise MatkvError("the model is not attached: call matkv.attach(model, artifact, budget)")
    return attachment.table


def _exact(default: int, given: int | None, name: str) -> int:
    tokens = default if given is None else given
    if tokens < 0:
        raise RankError(f"{name} {tokens} must be a number of tokens, 0 for none")
    return tokens


@contextmanager
def attached(
    model: PreTrainedModel, artifact: Artifact, setting: Setting | float
) -> Iterator[PreTrainedModel]:
    """The model at a budget, or at all of a setting; detached at the end, and for the full cache.

    Raises:
        FingerprintError, BudgetError, RankError: see `attach`.
    """
    if not isinstance(setting, Setting):
        setting = Setting(budget=setting)
    table = setting.table(artifact)
    detach(model)
    try:
        if table is not None:
            attach(model, artifact, ranks=table, sink=setting.sink, recent=setting.recent)
        yield model
    finally:
        detach(model)


def identified(
    model: PreTrainedModel, artifact: Artifact, settings: Iterable[Setting]
) -> list[tuple[Setting, Record]]:
    """What identifies each setting in results, before anything is measured at one.

    Raises:
        FingerprintError: the artifact was made for another model.
        BudgetError: no table holds a budget.
    """
    found = [(one, one.record(artifact, model.dtype)) for one in settings]
    detach(model)
    artifact.check(geometry_of(model.config), fingerprint(model))
    return found
