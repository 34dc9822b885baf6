"""Second moments of queries, keys and values, and the ordered bases they give.

Shapes: L compressed layer, G KV head, D head dim.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from matkv.bases.maps import Maps

KeyBasis = Literal["pca", "query"]
ValueBasis = Literal["pca", "output"]
KEY_BASES: tuple[str, ...] = get_args(KeyBasis)
VALUE_BASES: tuple[str, ...] = get_args(ValueBasis)
TINY = torch.finfo(torch.float32).tiny


@dataclass(frozen=True)
class LayerMoments:
    """Uncentred second moments of one layer, each [GDD] in fp32.

    key      E[k k^T], keys after rotary embedding
    query    Σ E[q q^T] over the query heads that share the KV head, after rotary embedding
    value    E[v v^T]
    output   Σ W W^T over the same heads, W [D, model dim] being the head's output projection
    """

    key: Tensor
    query: Tensor
    value: Tensor
    output: Tensor


def key_maps(moments: LayerMoments, kind: KeyBasis) -> Maps:
    """Basis of the keys of one layer, most important column first.

    pca     eigenvectors of E[k k^T]  (arXiv 2410.14731, section 3)
    query   eigenvectors of E[k k^T]/tr + Σ E[q q^T]/tr: a direction counts by what the keys hold
            there and by what the queries ask for there
    """
    if kind == "pca":
        return Maps.orthogonal(ordered_basis(moments.key))
    return Maps.orthogonal(ordered_basis(unit_trace(moments.key) + unit_trace(moments.query)))


def value_maps(moments: LayerMoments, kind: ValueBasis) -> Maps:
    """Basis of the values of one layer, most important column first.

    pca     eigenvectors of E[v v^T]  (arXiv 2410.14731, section 3)
    output  eigenvectors of E[v v^T]/tr + Σ W W^T/tr: a direction counts by what the values hold
            there and by how loud the output projection makes it
    """
    if kind == "pca":
        return Maps.orthogonal(ordered_basis(moments.value))
    return Maps.orthogonal(ordered_basis(unit_trace(moments.value) + unit_trace(moments.output)))


def ordered_basis(moment_GDD: Tensor) -> Tensor:
    """Eigenvectors of symmetric matrices as columns, largest eigenvalue first.  [GDD -> GDD]"""
    _, basis_GDD = torch.linalg.eigh(moment_GDD.double())
    ordered_GDD: Tensor = basis_GDD.flip(-1).float().contiguous()
    return ordered_GDD


def unit_trace(moment_GDD: Tensor) -> Tensor:
    """Scale to trace one, so that two moments of different units can be added."""
    trace_G = moment_GDD.diagonal(dim1=-2, dim2=-1).sum(-1)
    return moment_GDD / trace_G.clamp_min(TINY)[:, None, None]


def column_energy(moment_GDD: Tensor, maps: Maps) -> Tensor:
    """Share of the moment's energy in each column of a basis; sums to one.  [GDD -> GD]"""
    encode_GDD = maps.encode_XDD
    energy_GD = torch.einsum("gdr,gde,ger->gr", encode_GDD, moment_GDD, encode_GDD).clamp_min(0)
    return energy_GD / energy_GD.sum(-1, keepdim=True).clamp_min(TINY)
