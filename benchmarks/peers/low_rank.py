"""Palu and Eigen Attention, written from their papers: keys compressed before rotary embedding.

    y = x W^T,  z = y U,  y' = z U^T        x hidden state, W of k_proj or v_proj, z is cached

Palu (arXiv 2407.21118, section 3.2): the heads of a layer are taken in groups of up to four, and
the group's slice of W is replaced by a product of rank r, whitened by the calibration data, that
is, the truncated SVD of X W^T. Its right singular vectors are the eigenvectors of E[y y^T], so
W' = U U^T W with U of that moment is the same product. One rank for all layers and both sides, no
rank search, no fine-tuning.

Eigen Attention (arXiv 2408.05646, section 4): U from the joint moment of keys and of the queries
that read them, one a KV head; of values alone for values. For rotary models the authors' code takes
keys alone and one basis for all heads of a layer: `keys alone`. One rank for all layers.

In both, keys are rebuilt at full width before they are rotated: simulated by doing so at once,
which gives the same keys, while bytes count z. Calibrated on training articles.

Shapes: B batch, T token, N output features of a projection, X groups, Y features of a group, D head
dim, R rank.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from matkv.bases.moments import ordered_basis
from matkv.errors import UnsupportedModelError
from matkv.hf.geometry import attention_modules

from .protocol import Method

PROJECTIONS = {"query": "q_proj", "key": "k_proj", "value": "v_proj"}
MAX_GROUP = 4  # heads that Palu compresses together


@dataclass(frozen=True)
class HeadShape:
    """Heads of a model without sliding windows."""

    kv_heads: int
    head_dim: int

    @property
    def group(self) -> int:
        """Heads of one of Palu's groups: the most, up to four, that divide the KV heads."""
        return max(n for n in range(1, MAX_GROUP + 1) if self.kv_heads % n == 0)


@dataclass(frozen=True)
class PlainMoments:
    """Second moments of one layer before rotary embedding: key, value [NN], query [XYY]."""

    key_NN: Tensor
    value_NN: Tensor
    query_XYY: Tensor


class PlainRecorder:
    """Sums second moments of what the projections of one layer give, while its hooks are on."""

    def __init__(self, module: nn.Module, shape: HeadShape) -> None:
        self.shape, self.sums = shape, dict[str, Tensor]()
        self.handles = [
            projection(module, side).register_forward_hook(self._hook(side)) for side in PROJECTIONS
        ]

    def _hook(self, side: str) -> Any:
        def add(_: nn.Module, __: Any, y_BTN: Tensor) -> None:
            y_EN = y_BTN.detach().flatten(0, 1).float()
            if side == "query":
                D = self.shape.head_dim
                heads_XEY = y_EN.unflatten(-1, (self.shape.kv_heads, -1, D)).transpose(0, 1)
                rows_XEY = heads_XEY.flatten(1, 2)
                moment = rows_XEY.mT @ rows_XEY
            else:
                moment = y_EN.T @ y_EN
            self.sums[side] = self.sums[side] + moment if side in self.sums else moment

        return add

    def moments(self) -> PlainMoments:
        sums = {side: moment.cpu() for side, moment in self.sums.items()}
        return PlainMoments(sums["key"], sums["value"], sums["query"])


def projection(module: nn.Module, side: str) -> nn.Linear:
    """The linear map that makes one side.

    Raises:
        UnsupportedModelError: the attention has none of its own for that side.
    """
    found = getattr(module, PROJECTIONS[side], None)
    if not isinstance(found, nn.Linear):
        raise UnsupportedModelError(
            f"{type(module).__name__} has no {PROJECTIONS[side]}: low rank before rotary embedding "
            "is written for separate projections"
        )
    return found


@contextmanager
def recording(model: Any, shape: HeadShape) -> Iterator[list[PlainRecorder]]:
    """Record the moments of forward passes meanwhile, a recorder a layer."""
    recorders: list[PlainRecorder] = []
    try:
        for module in attention_modules(model):
            recorders.append(PlainRecorder(module, shape))
        yield recorders
    finally:
        for recorder in recorders:
            for handle in recorder.handles:
                handle.remove()


def blocks(moment_NN: Tensor, groups: int) -> Tensor:
    """The diagonal blocks of a moment, one a group.  [NN -> XYY]"""
    Y = moment_NN.shape[0] // groups
    parts = [moment_NN[g * Y : (g + 1) * Y, g * Y : (g + 1) * Y] for g in range(groups)]
    return torch.stack(parts)


def palu_bases(moments: PlainMoments, shape: HeadShape) -> tuple[Tensor, Tensor]:
    """Ordered bases of keys and values, one a group of heads.  [XYY]"""
    groups = shape.kv_heads // shape.group
    return (
        ordered_basis(blocks(moments.key_NN, groups)),
        ordered_basis(blocks(moments.value_NN, groups)),
    )


def eigen_bases(
    moments: PlainMoments, shape: HeadShape, *, keys_alone: bool
) -> tuple[Tensor, Tensor]:
    """Ordered bases of keys and values, one a head.  [XYY]"""
    key_XYY = blocks(moments.key_NN, shape.kv_heads)
    joint_XYY = key_XYY + moments.query_XYY
    if keys_alone:
        joint_XYY = key_XYY.sum(0, keepdim=True).expand_as(key_XYY)
    return ordered_basis(joint_XYY), ordered_basis(blocks(moments.value_NN, shape.kv_heads))


class LowRank(Method):
    """The outputs of k_proj and v_proj reduced to rank r a group: `bases` a layer, [XYY] a side."""

    note = "simulated"

    def __init__(self, bases: list[tuple[Tensor, Tensor]], budget: float) -> None:
        self.bases, self.budget = bases, budget
        self.columns = sum(
            basis.shape[0] * rank_of(basis, budget) for pair in bases for basis in pair
        )
        self.itemsize = 0

    @contextmanager
    def applied(self, model: Any) -> Iterator[Any]:
        self.itemsize = model.dtype.itemsize
        handles = []
        try:
            for module, pair in zip(attention_modules(model), self.bases, strict=True):
                for side, basis_XYY in zip(("key", "value"), pair, strict=True):
                    basis_XYR = basis_XYY[..., : rank_of(basis_XYY, self.budget)]
                    hook = _reducer(basis_XYR.to(model.device, model.dtype))
                    handles.append(projection(module, side).register_forward_hook(hook))
            yield model
        finally:
            for handle in handles:
                handle.remove()

    def held(self, cache: Any) -> tuple[float, float | None]:
        return cache.get_seq_length() * self.columns * self.itemsize, None

    def fixed_nbytes(self, model: Any) -> int:
        """Both factors less the weights they replace, where they are more."""
        added = 0
        for module, pair in zip(attention_modules(model), self.bases, strict=True):
            for side, basis_XYY in zip(("key", "value"), pair, strict=True):
                X, Y, _ = basis_XYY.shape
                columns = X * rank_of(basis_XYY, self.budget)
                weight_NM = projection(module, side).weight
                factors = columns * weight_NM.shape[1] + columns * Y
                added += max(0, factors - weight_NM.numel())
        return added * self.itemsize


def rank_of(basis_XYY: Tensor, budget: float) -> int:
    """The rank of every group within a budget."""
    return max(1, int(budget * basis_XYY.shape[-1] + 1e-9))


def _reducer(basis_XYR: Tensor) -> Any:
    def reduce(_: nn.Module, __: Any, y_BTN: Tensor) -> Tensor:
        y_BTXY = y_BTN.unflatten(-1, basis_XYR.shape[:2])
        z_BTXR = torch.einsum("btxy,xyr->btxr", y_BTXY, basis_XYR)
        return torch.einsum("btxr,xyr->btxy", z_BTXR, basis_XYR).flatten(-2)

    return reduce
