"""Benchmark of one layer's attention at decode, without a model: full width against latents.

Shapes: B batch, H query head, G KV head, J query heads of a KV head, T cached token, D head dim,
C row columns.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from matkv.attention.latent import attend
from matkv.bases.maps import Maps
from matkv.bases.quantizer import GAIN_ZERO, HALF_STEPS, Quantizer
from matkv.benchmark.timing import Spread, take_turns, thread_count
from matkv.codes import CODED, GAIN_BYTES, WIDTHS, Bands
from matkv.errors import BudgetError, RankError
from matkv.hf.memory import check_fits
from matkv.latents.coding import SideCoding
from matkv.latents.latents import Latents
from matkv.latents.layer import LayerProjection
from matkv.ranks import Budget, LayerRanks, default_step
from matkv.schedule import whole_grains
from matkv.settings import Count, Few, Seed, settings


@settings(RankError)
class AttentionCase:
    """One layer's attention at decode: one new query a sequence over `context` cached tokens.

    The ranks are random and ragged, of mean `budget` × `head_dim`; with `codes` every head has the
    bits of such a rank, for all of its columns.

    Raises:
        BudgetError: `budget` is outside (0, 1].
        RankError: a size is not positive, or the query heads are no multiple of the KV heads.
    """

    heads: Few = Field(default=32, description="query heads")
    kv_heads: Few = Field(default=32, description="KV heads")
    head_dim: Few = Field(default=128, description="width of a head")
    context: Count = Field(default=16_384, description="cached tokens")
    batch: Few = Field(default=1, description="sequences")
    budget: Budget = Field(default=0.375, description="mean rank over the width of a head")
    codes: bool = Field(default=False, description="columns at 8, 4 and 2 bits in place of ranks")
    dtype: torch.dtype = torch.bfloat16
    device: str = Field(default="cpu", description="cpu, cuda, cuda:1, ...")
    threads: Few | None = Field(default=None, description="CPU threads; torch's unless given")
    rounds: Few = Field(default=15, description="rounds of each measurement")
    seed: Seed = Field(default=0, description="seed of states and ranks")

    def __post_init__(self) -> None:
        if self.heads % self.kv_heads:
            raise RankError(
                f"{self.heads} query heads must be a multiple of {self.kv_heads} KV heads"
            )


@torch.inference_mode()
def attention_benchmark(case: AttentionCase) -> dict[str, Any]:
    """Time full-width sdpa and latent attention in turns.

    `full_ms` is sdpa as transformers calls it while decoding, the faster of its ways to share a KV
    head among query heads. `latent_ms` is everything `attend` does: queries into latents, scores,
    softmax, and outputs back to full width. `speedup` is the median of the round-by-round ratios,
    `speedup_low` and `speedup_high` their quartiles; `limit` is full over kept cache bytes.
    """
    numbers = 2 * case.batch * case.kv_heads * case.context * case.head_dim
    nbytes = 2 * numbers * case.dtype.itemsize
    check_fits(
        nbytes, torch.device(case.device), f"context {case.context:,} times batch {case.batch:,}"
    )
    generator = torch.Generator().manual_seed(case.seed)
    key_ranks, value_ranks = (
        ragged_ranks(case.kv_heads, case.head_dim, case.budget, generator) for _ in range(2)
    )
    query = _random(case, generator, case.heads, 1, case.head_dim)
    candidates = _full_width(case, query, generator)
    latents = _latents(case, key_ranks, value_ranks, generator)
    candidates["latent"] = partial(attend, latents, query, None, scaling=case.head_dim**-0.5)
    kept_bytes = sum(row.nbytes for row in latents.rows)
    with thread_count(case.threads):
        times = take_turns(candidates, case.rounds, device=case.device)
        threads = torch.get_num_threads()
    latent = times.pop("latent")
    name, full = min(times.items(), key=lambda item: Spread.of(item[1]).median)
    speedup = Spread.of_ratios(full, latent)
    return {
        "full_ms": Spread.of(full).median,
        "latent_ms": Spread.of(latent).median,
        "speedup": speedup.median,
        "limit": numbers * case.dtype.itemsize / kept_bytes,
        "speedup_low": speedup.low,
        "speedup_high": speedup.high,
        "full_kind": name,
        "threads": threads,
        "rounds": case.rounds,
    }


def ragged_ranks(heads: int, dim: int, budget: float, generator: torch.Generator) -> LayerRanks:
    """Random ranks on a grid of an eighth of the head dim, their mean budget × dim.

    Between one and seven eighths, as long as the budget allows it.

    Raises:
        BudgetError: the budget is below one step of the grid in all.
    """
    step = default_step(dim)
    total = whole_grains(budget, dim * heads, step)
    low, high = 1, dim // step - 1
    if not low * heads <= total <= high * heads:
        low, high = 0, dim // step
    if total < 1:
        raise BudgetError(f"budget {budget} leaves {heads} heads of dimension {dim} without ranks")
    units = torch.randint(low, high + 1, (heads,), generator=generator)
    while (missing := total - int(units.sum())) != 0:
        one = int(torch.randint(heads, (), generator=generator))
        units[one] = (units[one] + (1 if missing > 0 else -1)).clamp(low, high)
    return tuple(int(unit) * step for unit in units)


def _random(case: AttentionCase, generator: torch.Generator, *shape: int) -> Tensor:
    """Normal numbers, [B, *shape]."""
    numbers = torch.randn(case.batch, *shape, generator=generator, dtype=torch.float32)
    return numbers.to(case.device, case.dtype)


def _full_width(
    case: AttentionCase, query_BHD: Tensor, generator: torch.Generator
) -> dict[str, Callable[[], object]]:
    shape = (case.kv_heads, case.context, case.head_dim)
    key_BGTD, value_BGTD = (_random(case, generator, *shape) for _ in range(2))
    sdpa = F.scaled_dot_product_attention
    if case.heads == case.kv_heads:
        return {"sdpa": partial(sdpa, query_BHD, key_BGTD, value_BGTD)}
    packed_BGJD = query_BHD.view(case.batch, case.kv_heads, -1, case.head_dim)
    return {
        "sdpa, enable_gqa": partial(sdpa, query_BHD, key_BGTD, value_BGTD, enable_gqa=True),
        "sdpa, heads as positions": partial(sdpa, packed_BGJD, key_BGTD, value_BGTD),
    }


def bands_within(bits: int, dim: int) -> Bands:
    """Bands of all columns, or of as many as these bits pay for; the gain's byte counts too.

    Two widths that follow each other, and 8 bits for the first sixteenth of the columns, as in
    tables that were found for real models.
    """
    bits -= 8 * GAIN_BYTES
    counts = dict.fromkeys(WIDTHS, 0)
    if bits >= 8 * dim:
        counts[16] = min(dim, (bits - 8 * dim) // 8)
        counts[8] = dim - counts[16]
        return counts[16], counts[8], 0, 0
    counts[8] = dim // 16 if bits > 4 * dim // 2 else 0
    bits, dim = bits - 8 * counts[8], dim - counts[8]
    if bits >= 4 * dim:
        more = (bits - 4 * dim) // 4
        counts[8], counts[4] = counts[8] + more, dim - more
    elif bits >= 2 * dim:
        counts[4] = (bits - 2 * dim) // 2 // 4 * 4
        counts[2] = dim - counts[4]
    else:
        counts[2] = max(0, bits) // 2 // 4 * 4
    return counts[16], counts[8], counts[4], counts[2]


def _latents(
    case: AttentionCase,
    key_ranks: LayerRanks,
    value_ranks: LayerRanks,
    generator: torch.Generator,
) -> Latents:
    """Random rows, codes with gains around one."""
    heads, dim = case.kv_heads, case.head_dim
    key, value = (
        Maps.orthogonal(torch.linalg.qr(torch.randn(heads, dim, dim, generator=generator)).Q)
        for _ in range(2)
    )
    ranks, coding = [key_ranks, value_ranks], None
    if case.codes:
        bands = [tuple(bands_within(16 * rank, dim) for rank in side) for side in ranks]
        ranks = [tuple(map(sum, side)) for side in bands]
        ones_WGD = torch.ones(len(CODED), heads, dim)
        steps_WGD = torch.stack(
            [ones * HALF_STEPS[w] for ones, w in zip(ones_WGD, CODED, strict=True)]
        )
        quantizer = Quantizer(ones_WGD[0], steps_WGD, ones_WGD)
        coding = SideCoding(bands[0], quantizer), SideCoding(bands[1], quantizer)
    projection = LayerProjection(key, value, ranks[0], ranks[1], coding=coding)
    projection = projection.to(case.device, case.dtype)
    rows = []
    for count, columns, dtype in projection.storages(case.dtype):
        if dtype != torch.uint8:
            rows.append(_random(case, generator, count, case.context, columns))
            continue
        shape = (case.batch, count, case.context, columns)
        codes = torch.randint(256, shape, generator=generator, dtype=torch.uint8)
        codes[..., : 2 * GAIN_BYTES] = codes[..., : 2 * GAIN_BYTES] % 8 + GAIN_ZERO - 4
        rows.append(codes.to(case.device))
    return Latents(projection, rows)
