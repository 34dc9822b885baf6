"""Plan: what a model and its cache will take, with and without compression, from its config alone.

Compressed is an artifact's table with its exact tokens, or equal ranks where there is none.

Arithmetic, no measurement: bytes of weights and of cache, what fits into a memory, and the time of
a decoding step that does nothing but read both once. Activations and the allocator come on top.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Annotated, Any

import torch
from pydantic import BeforeValidator, Field
from transformers import AutoModelForCausalLM, PreTrainedConfig

from matkv.errors import MatkvError
from matkv.hf.geometry import geometry_of
from matkv.latents.layer import projections_nbytes
from matkv.ranks import Budget, RankTable
from matkv.settings import Count, Positive, settings

UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
BINARY_UNITS = {"Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40}
# By its data sheet.
DEFAULT_BANDWIDTH, DEFAULT_DEVICE = 3.35e12, "H100 SXM"


def parse_bytes(text: str) -> int:
    """Bytes of a size such as 80GB, 24GiB, 512M or 1e9.

    Raises:
        MatkvError: it is none.
    """
    match = re.fullmatch(r"\s*([0-9.]+(?:[eE]\+?[0-9]+)?)\s*([KMGT]?i?)B?\s*", text)
    unit = (UNITS | BINARY_UNITS).get(match[2]) if match else None
    try:
        size = round(float(match[1]) * unit)  # type: ignore[index, operator]
    except (TypeError, ValueError, OverflowError):
        size = 0
    if size <= 0:
        raise MatkvError(f"size {text!r} must be like 80GB, 24GiB or 1e9")
    return size


def as_bytes(given: object) -> object:
    """Bytes where a text is given, as 80GB; anything else is left as it is."""
    return parse_bytes(given) if isinstance(given, str) else given


Bytes = Annotated[int, Field(gt=0), BeforeValidator(as_bytes)]


@settings(MatkvError)
class PlanCase:
    """What to plan for; `dtype` of weights and cache is the config's, or bf16 where it has none.

    Raises:
        BudgetError: `budget` is outside (0, 1].
        MatkvError: another number is not positive.
    """

    context: Count = Field(description="tokens of a sequence")
    batch: Count = Field(default=1, description="sequences")
    budget: Budget = Field(default=0.5, description="fraction of cache bytes to keep")
    memory: Bytes | None = Field(default=None, description="as 80GB or 24GiB")
    bandwidth: Annotated[Positive, BeforeValidator(as_bytes)] = Field(
        default=DEFAULT_BANDWIDTH,
        description=f"bytes a second, as 936G; {DEFAULT_DEVICE}'s 3.35T unless given",
    )
    dtype: torch.dtype | None = None


@dataclass(frozen=True)
class Footprint:
    """One way to hold the cache; the bytes of tokens kept exact are among those of the cache.

    `staying_bytes` of `cache_bytes` are of layers that stay as they are; `bases_bytes` are the maps
    that compression adds to the weights; `token_bytes` what each further token of one sequence adds
    where all sliding windows are full. `largest_batch` fits at the planned context,
    `largest_context` at the planned batch; both None without a memory, and 0 where not even one
    fits. `decode_ms` is the time of reading weights, maps and cache once.
    """

    cache_bytes: int
    staying_bytes: int
    token_bytes: int
    bases_bytes: int
    total_bytes: int
    fits: bool | None
    largest_batch: int | None
    largest_context: int | None
    decode_ms: float


@dataclass(frozen=True)
class Plan:
    """Footprints of the full and the compressed cache of one model.

    `layers` are all of its layers, `compressed_layers` those that a budget is of. `sink` and
    `recent` are the tokens that the compressed cache keeps exact.
    A mixture of experts reads fewer weights a step than `weight_bytes`: its `decode_ms` is high.
    """

    model_type: str
    layers: int
    compressed_layers: int
    parameters: int
    weight_bytes: int
    dtype: str
    context: int
    batch: int
    budget: float
    sink: int
    recent: int
    memory: int | None
    bandwidth: float
    full: Footprint
    compressed: Footprint

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def plan(
    config: PreTrainedConfig,
    case: PlanCase,
    table: RankTable | None = None,
    *,
    sink: int = 0,
    recent: int = 0,
) -> Plan:
    """Plan a model that its config describes; no weights are loaded.

    Compressed, it has an artifact's `table` for the budget, with the first `sink` and the last
    `recent` tokens exact; without a table equal ranks, the largest within the budget.

    Raises:
        BudgetError: the budget leaves no rank.
        UnsupportedModelError: the model's attention cannot be reproduced on latents.
    """
    geometry = geometry_of(config)
    parameters = parameter_count(config)
    dtype = case.dtype or stored_dtype(config)
    weights = parameters * dtype.itemsize
    if table is None:
        table = RankTable.uniform(geometry, case.budget, step=1)
    bases = projections_nbytes(table, dtype)
    return Plan(
        model_type=config.model_type,
        layers=len(geometry.layers),
        compressed_layers=len(geometry.compressed),
        parameters=parameters,
        weight_bytes=weights,
        dtype=str(dtype).removeprefix("torch."),
        context=case.context,
        batch=case.batch,
        budget=case.budget,
        sink=sink,
        recent=recent,
        memory=case.memory,
        bandwidth=case.bandwidth,
        full=_footprint(case, _Held(RankTable.full(geometry), dtype), weights, 0),
        compressed=_footprint(case, _Held(table, dtype, sink, recent), weights, bases),
    )


def stored_dtype(config: PreTrainedConfig) -> torch.dtype:
    """The dtype that a config names, bfloat16 where it names none."""
    text = config.get_text_config(decoder=True)
    found: torch.dtype | None = getattr(config, "dtype", None) or getattr(text, "dtype", None)
    return found or torch.bfloat16


def parameter_count(config: PreTrainedConfig) -> int:
    """Parameters of the model a config describes, tied ones once."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    return sum(parameter.numel() for parameter in model.parameters())


@dataclass(frozen=True)
class _Held:
    """How a cache holds tokens."""

    table: RankTable
    dtype: torch.dtype
    sink: int = 0
    recent: int = 0

    def nbytes(self, batch: int, context: int) -> int:
        return self.table.nbytes(
            context, self.dtype, batch=batch, sink=self.sink, recent=self.recent
        )


def _footprint(case: PlanCase, held: _Held, weights: int, bases: int) -> Footprint:
    free = None if case.memory is None else case.memory - weights - bases
    cache = held.nbytes(case.batch, case.context)
    return Footprint(
        cache_bytes=cache,
        staying_bytes=held.table.staying_nbytes(case.context, held.dtype, batch=case.batch),
        token_bytes=held.table.added_bytes(held.dtype),
        bases_bytes=bases,
        total_bytes=weights + bases + cache,
        fits=None if free is None else cache <= free,
        largest_batch=None if free is None else max(0, free // held.nbytes(1, case.context)),
        largest_context=(
            None
            if free is None
            else _largest(lambda tokens: held.nbytes(case.batch, tokens) <= free)
        ),
        decode_ms=1e3 * (weights + bases + cache) / case.bandwidth,
    )


def _largest(fits: Callable[[int], bool]) -> int:
    """The largest number that fits, 0 for none; what is larger fits less."""
    high = 1
    while fits(high):
        high *= 2
    low = high // 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
