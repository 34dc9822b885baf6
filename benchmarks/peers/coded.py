"""Codes of full keys and values, written from their formats and simulated on the full cache.

TurboQuant (arXiv 2504.19874, the variant of least squared error): a random rotation, the norm of
every token and head in 16 bits, and every coordinate of its direction by one fixed codebook: the
levels of least squared error for a normal distribution of deviation 1/sqrt(D), which a coordinate
of a random direction nearly has. No calibration.

int4 per token and head, as vLLM has it: from the least to the largest number of a token, head and
side in equal steps, a scale and a zero point of 16 bits each.

Both see every token as a code as soon as it is written, the query's own too; the context is read
with the full cache and becomes codes afterwards.

Shapes: B batch, G KV head, T token, D head dim, C code.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cache as remembered
from typing import Any, Protocol

import torch
from torch import Tensor

from matkv.bases.gates import Projected
from matkv.hf.geometry import geometry_of
from matkv.hf.handlers import truncating

from .ours import NONE, Codes, Exact, fake_quantize
from .protocol import Method

NORM_NBYTES = 2
ROUNDS = 500  # of Lloyd's algorithm; 3 and 4 bits settle in far fewer


class Coded(Method):
    """A full cache whose tokens, the exact ones aside, are seen through codes.

    `handlers` changes keys and values of every layer, `coded_nbytes` counts one token's codes.
    """

    note = "simulated"

    def __init__(self, exact: Exact = NONE) -> None:
        self.exact = exact
        self.coding = ExitStack()

    def handlers(self, model: Any) -> Mapping[int, Projected]:
        raise NotImplementedError

    def coded_nbytes(self, cache: Any) -> int:
        raise NotImplementedError

    @contextmanager
    def applied(self, model: Any) -> Iterator[Any]:
        with self.coding:
            yield model

    def read(self, model: Any, context_BT: Tensor) -> Any:
        self.coding.close()  # what the window before has left
        cache = super().read(model, context_BT)
        self.coding.enter_context(truncating(model, self.handlers(model)))
        return cache

    def held(self, cache: Any) -> tuple[float, float | None]:
        tokens = cache.get_seq_length()
        exact = self.exact.among(tokens)
        full = sum(
            x_BGTD.shape[1] * x_BGTD.shape[3] * x_BGTD.element_size() for x_BGTD in states(cache)
        )
        return (tokens - exact) * self.coded_nbytes(cache) + exact * full, None


def states(cache: Any) -> Iterator[Tensor]:
    """Keys and values of every layer.  [BGTD]"""
    for layer in cache.layers:
        yield from (layer.keys, layer.values)


# ---- a head at a time


class Format(Protocol):
    """How one token of one head and side becomes codes, and its bytes at a head dim.

    `fixed` counts the numbers that all heads share.
    """

    def nbytes(self, dim: int) -> int: ...

    def fixed(self, dim: int) -> int: ...

    def __call__(self, x_BGTD: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class TurboQuant:
    """One rotation for all heads, norms, and a codebook of 2^bits levels."""

    bits: int

    def nbytes(self, dim: int) -> int:
        return -(-dim * self.bits // 8) + NORM_NBYTES

    def fixed(self, dim: int) -> int:
        return dim * dim + (1 << self.bits)

    def __call__(self, x_BGTD: Tensor) -> Tensor:
        turn_DD = rotation(x_BGTD.shape[-1]).to(x_BGTD.device)
        levels_C = codebook(self.bits).to(x_BGTD.device) / math.sqrt(x_BGTD.shape[-1])
        norm_BGT1 = x_BGTD.norm(dim=-1, keepdim=True)
        direction_BGTD = (x_BGTD / norm_BGT1.clamp_min(1e-12)) @ turn_DD
        edges = (levels_C[1:] + levels_C[:-1]) / 2
        decoded_BGTD = levels_C[torch.bucketize(direction_BGTD, edges)]
        back_BGTD: Tensor = norm_BGT1.half().float() * (decoded_BGTD @ turn_DD.T)
        return back_BGTD


@dataclass(frozen=True)
class PerTokenHead:
    """Asymmetric codes with a scale and a zero point for all of a head's numbers."""

    bits: int

    def nbytes(self, dim: int) -> int:
        return self._codes(dim).nbytes(dim)

    def fixed(self, dim: int) -> int:
        return 0

    def __call__(self, x_BGTD: Tensor) -> Tensor:
        return fake_quantize(x_BGTD, self._codes(x_BGTD.shape[-1]))

    def _codes(self, dim: int) -> Codes:
        return Codes(bits=self.bits, group=dim)


@remembered
def rotation(dim: int) -> Tensor:
    """A random orthogonal matrix, always the same.  [DD]"""
    generator = torch.Generator().manual_seed(0)
    turn_DD: Tensor = torch.linalg.qr(torch.randn(dim, dim, generator=generator)).Q
    return turn_DD


@remembered
def codebook(bits: int) -> Tensor:
    """The 2^bits levels of least squared error for a standard normal variable, rising.  [C]

    Lloyd's algorithm: edges in the middle between levels, levels at the mean between edges.
    """
    count = 1 << bits
    places_C = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    # Many levels lie as densely as the cube root of the density.
    levels_C = math.sqrt(3) * torch.special.ndtri(places_C)
    ends = torch.tensor([math.inf], dtype=torch.float64)
    for _ in range(ROUNDS):
        edges = torch.cat((-ends, (levels_C[1:] + levels_C[:-1]) / 2, ends))
        density = (-edges.square() / 2).exp() / math.sqrt(2 * math.pi)
        share_C = torch.special.ndtr(edges).diff()
        levels_C = -density.diff() / share_C
        levels_C = (levels_C - levels_C.flip(0)) / 2  # symmetric in spite of rounding
    found_C: Tensor = levels_C.float()
    return found_C


class ThroughFormat(Projected):
    """One layer's keys and values as they come out of a format."""

    def __init__(self, form: Format) -> None:
        super().__init__()
        self.form = form

    def changed(self, key_BGTD: Tensor, value_BGTD: Tensor) -> tuple[Tensor, Tensor]:
        """Both as they come out of the cache."""
        key, value = (self.form(x.float()).to(x.dtype) for x in (key_BGTD, value_BGTD))
        return key, value


class CodedHeads(Coded):
    """Every head of every layer in one format."""

    def __init__(self, form: Format) -> None:
        super().__init__()
        self.form = form

    def handlers(self, model: Any) -> Mapping[int, Projected]:
        layers = range(len(geometry_of(model.config).layers))
        return {layer: ThroughFormat(self.form) for layer in layers}

    def coded_nbytes(self, cache: Any) -> int:
        return sum(x_BGTD.shape[1] * self.form.nbytes(x_BGTD.shape[3]) for x_BGTD in states(cache))

    def fixed_nbytes(self, model: Any) -> int:
        dims = {shape.head_dim for shape in geometry_of(model.config).layers}
        return sum(map(self.form.fixed, dims)) * int(model.dtype.itemsize)
