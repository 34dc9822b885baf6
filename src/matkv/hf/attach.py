"""Switch a model's attention to latents and back."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from functools import partial
from types import MethodType

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from matkv.artifact.artifact import Artifact, digest
from matkv.artifact.records import Record
from matkv.errors import MatkvError, RankError
from matkv.hf.function import NAME, use_implementation
from matkv.hf.generation import PREPARE, prepare_cache_for_generation, prepare_forward
from matkv.hf.geometry import attention_modules, fingerprint, geometry_of
from matkv.latents.layer import LayerProjection
from matkv.ranks import RankTable, digest_of


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
    prepare = partial(prepare_forward, notes_padding=sink > 0)
    hook = model.get_decoder().register_forward_pre_hook(prepare, with_kwargs=True)
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


@dataclass(frozen=True, kw_only=True)
class Caches:
    """The caches to measure: the full one, then every budget.

    `uniform` ignores stored rank tables; `sink` and `recent`, the first and last tokens kept exact,
    come from the artifact unless given.
    """

    budgets: tuple[float, ...]
    uniform: bool = False
    sink: int | None = None
    recent: int | None = None

    def attached(self, model: PreTrainedModel, artifact: Artifact) -> Generator[Record]:
        """Attach one after the other and tell what identifies each; leaves the model detached.

        Raises:
            BudgetError, FingerprintError, RankError: see `attach`; before anything is measured.
        """
        tables = {budget: artifact.table(budget, uniform=self.uniform) for budget in self.budgets}
        dtype = str(model.dtype).removeprefix("torch.")
        common = {"artifact": digest(artifact), "dtype": dtype}
        sink = artifact.sink if self.sink is None else self.sink
        recent = artifact.recent if self.recent is None else self.recent
        detach(model)
        artifact.check(geometry_of(model.config), fingerprint(model))
        try:
            yield {**common, "ranks": None, "budget": None, "sink": None, "recent": None}
            for budget, table in tables.items():
                attach(model, artifact, ranks=table, sink=sink, recent=recent)
                ranks = digest_of(table)
                yield {**common, "ranks": ranks, "budget": budget, "sink": sink, "recent": recent}
        finally:
            detach(model)
