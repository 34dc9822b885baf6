"""Switch a model's attention to latents and back."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from matkv.artifact.artifact import Artifact
from matkv.artifact.records import Record
from matkv.artifact.setting import Setting
from matkv.errors import ArtifactError, MatkvError, RankError
from matkv.hf.function import ATTACHMENT, NAME, use_handlers, use_implementations
from matkv.hf.generation import PREPARE, PrepareForward, PrepareGeneration, check_caches
from matkv.hf.geometry import attention_modules, geometry_of
from matkv.hf.handlers import OnLatents
from matkv.hf.merge import Merged, merge
from matkv.hf.weights import fingerprint
from matkv.hf.wrappers import decoder_of, device_of, model_in
from matkv.latents.coding import layer_coding
from matkv.ranks import RankTable

Model = TypeVar("Model", bound=nn.Module)


@dataclass(eq=False)
class Attachment:
    """What `attach` did to a model, kept on its decoder for `detach` and for questions about it."""

    artifact: Artifact
    table: RankTable
    model: PreTrainedModel
    implementations: dict[str, str] = field(default_factory=dict)
    hooks: list[RemovableHandle] = field(default_factory=list)
    merged: list[Merged] = field(default_factory=list)


# Buffers made in inference mode would fail in training later.
@torch.inference_mode(False)
def attach(
    model: Model,
    artifact: Artifact | str | Path,
    budget: float | None = None,
    *,
    ranks: RankTable | None = None,
    sink: int | None = None,
    recent: int | None = None,
) -> Model:
    """Switch `model` to latent attention at a budget or at given ranks; returns the same model.

    Afterwards `model.generate(...)` fills a `LatentCache` by itself. Attaching again replaces the
    ranks. `sink` and `recent`, the numbers of first and last tokens kept exact, come from the
    artifact unless given. `model` may be wrapped, by peft or torch.compile for instance; the
    artifact may be given by its path.

    Raises:
        ArtifactError: there is no artifact.
        FingerprintError: the artifact was made for another model.
        BudgetError, RankError: the budget or the ranks do not fit.
        UnsupportedModelError: the model's weights are packed, and the artifact has adapters.
    """
    if (budget is None) == (ranks is None):
        raise RankError("attach takes either a budget or a rank table")
    artifact, inner = _artifact(artifact), model_in(model)
    before = attachment_of(inner)
    if before is not None and before.merged:  # with its own weights again, it can be recognized
        detach(inner)
    artifact.check(geometry_of(inner.config), fingerprint(inner))
    table = ranks if ranks is not None else artifact.table(budget)  # type: ignore[arg-type]
    if not isinstance(table, RankTable) or table.geometry != artifact.geometry:
        raise RankError("the rank table was made for another model's geometry")
    sink, recent = _exact(artifact.sink, sink, "sink"), _exact(artifact.recent, recent, "recent")
    detach(inner)
    try:
        _switch(inner, Attachment(artifact, table, inner), sink=sink, recent=recent)
    except BaseException:
        detach(inner)
        raise
    return model


def _switch(model: PreTrainedModel, attachment: Attachment, *, sink: int, recent: int) -> None:
    """Put everything in place; the attachment says at any time what is to be undone."""
    decoder, modules = decoder_of(model), attention_modules(model)
    artifact, table = attachment.artifact, attachment.table
    source = artifact.digest
    decoder.__dict__[ATTACHMENT] = attachment
    attachment.merged = merge(model, artifact.lora)
    for layer in artifact.geometry.compressed:
        handler = OnLatents(
            artifact.maps(layer, "key"),
            artifact.maps(layer, "value"),
            table.key[layer],
            table.value[layer],
            sink=sink,
            recent=recent,
            window=artifact.geometry.layers[layer].window,
            source=source,
            coding=layer_coding(table, layer, artifact.quantizer),
        )
        handler.to(device_of(modules[layer]), model.dtype).requires_grad_(False)
        setattr(modules[layer], NAME, handler)
    attachment.implementations = use_handlers(decoder)
    attachment.hooks = [
        decoder.register_forward_pre_hook(PrepareForward(decoder), with_kwargs=True),
        decoder.register_forward_hook(check_caches),
    ]
    model.__dict__[PREPARE] = PrepareGeneration(model)


def detach(model: Model) -> Model:
    """Undo `attach`, whatever wraps the model by now; does nothing to a model not attached.

    Returns the same model.
    """
    decoder, attachment = decoder_of(model), attachment_of(model)
    if attachment is None:
        return model
    attachment.model.__dict__.pop(PREPARE, None)
    for hook in attachment.hooks:
        hook.remove()
    for part in attachment.merged:
        part.undo()
    for module in list(decoder.modules()):
        if isinstance(getattr(module, NAME, None), OnLatents):
            delattr(module, NAME)
    use_implementations(decoder, attachment.implementations)
    del decoder.__dict__[ATTACHMENT]  # last: until then, detach can be called again
    return model


def attachment_of(model: nn.Module) -> Attachment | None:
    """How a model is attached, asked of the model, of its decoder or of what wraps them."""
    attachment: Attachment | None = decoder_of(model).__dict__.get(ATTACHMENT)
    return attachment


def _artifact(given: Artifact | str | Path) -> Artifact:
    if isinstance(given, str | Path):
        return Artifact.load(given)
    if not isinstance(given, Artifact):
        raise ArtifactError(f"an artifact or the path of one is needed, not {str(given)[:40]!r}")
    return given


def attached_table(model: nn.Module) -> RankTable:
    """The ranks an attached model runs at.

    Raises:
        MatkvError: the model is not attached.
    """
    attachment = attachment_of(model)
    if attachment is None:
        raise MatkvError("the model is not attached: call matkv.attach(model, artifact, budget)")
    return attachment.table


def _exact(default: int, given: int | None, name: str) -> int:
    tokens = default if given is None else given
    if type(tokens) is not int or tokens < 0:
        raise RankError(f"{name} {tokens} must be a number of tokens, 0 for none")
    return tokens


@contextmanager
def attached(
    model: Model, artifact: Artifact | str | Path, setting: Setting | float
) -> Iterator[Model]:
    """The model at a budget, or at all of a setting; detached at the end, and for the full cache.

    Raises:
        FingerprintError, BudgetError, RankError: see `attach`.
    """
    if not isinstance(setting, Setting):
        setting = Setting(budget=setting)
    artifact = _artifact(artifact)
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
