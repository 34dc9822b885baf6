"""Everything that only a GPU can show, in one run of minutes.

    python benchmarks/gpu.py [-o gpu.json] [--minutes 9]
    python benchmarks/gpu.py --dry-run              tiny shapes on the CPU, in Triton's interpreter

In this order, so that a run cut short has what matters most: what the card can do at best; the
decode kernels against attention in double precision, for mixes of ranks and of codes; one layer's
decode attention against full-width kernels, with the share of the measured bandwidth that it
reaches; a 7B decoder with random weights, tokens a second at every batch that fits, and a step in a
CUDA graph; training steps of its bases, plain and with everything sharded by FSDP. A part that
fails is a row with its error, and the next one goes on. Cells that exceed the memory are left out.
Budgets come as ragged ranks, and as codes of equal bits for all heads. Not here: prefill, and
several GPUs.

Shapes: B batch, H query head, G KV head, T token, D head dim.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

if not torch.cuda.is_available():  # read when triton is imported, which transformers does
    os.environ["TRITON_INTERPRET"] = "1"

import torch.nn.functional as F
import transformers
import triton
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import DynamicCache, LlamaConfig, PreTrainedModel, StaticCache

import matkv
from matkv.attention import latent
from matkv.attention.kernels import gpu, gpu_codes
from matkv.attention.latent import attend
from matkv.bases.maps import Maps
from matkv.bases.quantizer import fit
from matkv.benchmark.attention import ragged_ranks
from matkv.benchmark.decode import random_model
from matkv.benchmark.timing import Spread, take_turns
from matkv.cache import LatentCache, LatentLayer, StaticLatentCache, storage_nbytes
from matkv.cache.naming import cache_argument
from matkv.codes import Bands
from matkv.files import replacing
from matkv.hf.observe import fit_quantizers
from matkv.latents.coding import SideCoding
from matkv.latents.latents import Latents
from matkv.latents.layer import LayerProjection
from matkv.ranks import SIDES, LayerBands, LayerRanks, RankTable
from sharded import Training, sharded_training

Row = dict[str, Any]
SCALING = 0.1
# query heads, KV heads, head dim
SHAPES = {"LLaMA2-7B": (32, 32, 128), "Mistral-7B": (32, 8, 128), "LLaMA-3-70B": (64, 8, 128)}
MIXES: dict[str, tuple[LayerRanks, LayerRanks]] = {
    "full": ((128,) * 4, (128,) * 4),
    "uniform": ((48,) * 4, (48,) * 4),
    "odd": ((3, 77, 1, 40), (5, 33, 127, 1)),
    "ragged, one width": ((16, 48, 80, 112), (112, 80, 48, 16)),
    "zero": ((0, 128, 0, 40), (72, 0, 0, 128)),
}
CODED: dict[str, tuple[LayerBands, LayerBands]] = {
    "codes": (((0, 16, 32, 32),) * 4, ((0, 8, 48, 64),) * 4),
    "odd codes": (
        ((3, 21, 45, 7), (0, 2, 33, 1), (1, 0, 7, 120), (128, 0, 0, 0)),
        ((1, 2, 22, 79), (0, 0, 0, 0), (0, 128, 0, 0), (2, 7, 1, 0)),
    ),
}
# Bands of every head where a budget is kept as codes: shares of its columns at 16, 8, 4, 2 bits.
AS_CODES: dict[float, tuple[float, float, float, float]] = {
    0.5: (0, 1, 0, 0),
    0.25: (0, 0, 1, 0),
    0.125: (0, 0, 0, 1),
    0.0625: (0, 0, 0, 0.5),
}
TILED = 64  # tokens whose codes are made, and then repeated
# How far the result may be from double precision, relative to its norm.
CLOSE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How large everything is."""

    device: str
    contexts: tuple[int, ...]
    batches: tuple[int, ...]
    budgets: tuple[float, ...]
    copy_elements: int
    exact_lengths: tuple[int, ...]
    dtypes: tuple[torch.dtype, ...]
    rounds: int
    model: LlamaConfig
    model_context: int
    model_batches: tuple[int, ...]
    training_batch: int
    training_length: int


def full_plan() -> Plan:
    """For one H100 or H200."""
    return Plan(
        device="cuda",
        contexts=(32_768, 4096, 131_072),
        batches=(8, 1, 64),
        budgets=(0.25, 0.5, 1.0, 0.125, 0.0625),
        copy_elements=1 << 30,
        exact_lengths=(1, 64, 1000, 4097),
        dtypes=(torch.float32, torch.float16, torch.bfloat16),
        rounds=20,
        model=LlamaConfig(),  # its defaults are LLaMA-7B
        model_context=4096,
        model_batches=(1, 8, 16, 32, 64, 128),
        training_batch=4,
        training_length=1024,
    )


def dry_plan() -> Plan:
    """Every part once, in seconds on a CPU."""
    small = LlamaConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    return Plan(
        device="cpu",
        contexts=(96,),
        batches=(2,),
        budgets=(0.25,),
        copy_elements=1 << 12,
        exact_lengths=(70,),
        dtypes=(torch.float32,),
        rounds=1,
        model=small,
        model_context=32,
        model_batches=(1, 2),
        training_batch=2,
        training_length=16,
    )


# ---- what the card can do


def ceilings(plan: Plan) -> Iterator[Row]:
    """Bytes a second of a large copy, read and written, and bf16 products a second."""
    source = torch.randn(plan.copy_elements // 2, device=plan.device).to(torch.bfloat16)
    target = torch.empty_like(source)
    took = _median(plan, lambda: target.copy_(source))
    yield {"what": "copy", "bytes_per_second": 4 * source.numel() / took}
    side = min(8192, int(plan.copy_elements**0.5))
    a, b = (torch.randn(side, side, device=plan.device).to(torch.bfloat16) for _ in range(2))
    yield {"what": "matmul", "flops_per_second": 2 * side**3 / _median(plan, lambda: a @ b)}


# ---- right


@torch.inference_mode()
def exactness(plan: Plan) -> Iterator[Row]:
    """The kernels against attention in double precision on keys and values of the same ranks."""
    for name in (*MIXES, *CODED):
        for dtype in plan.dtypes:
            for length in plan.exact_lengths:
                for starts in (None, (0, length // 2)):
                    error = _error(plan, name, dtype, length, starts)
                    yield {
                        "ranks": name,
                        "dtype": str(dtype).removeprefix("torch."),
                        "length": length,
                        "padded": starts is not None,
                        "error": error,
                        "passes": error <= CLOSE[dtype],
                    }


def _error(
    plan: Plan, name: str, dtype: torch.dtype, length: int, starts: tuple[int, int] | None
) -> float:
    """‖out − reference‖ / ‖reference‖ of two sequences, three query heads a KV head."""
    generator = torch.Generator().manual_seed(length)
    key_maps, value_maps = (_orthogonal(4, 128, generator) for _ in range(2))
    query = torch.randn(2, 12, 1, 128, generator=generator).to(dtype)
    key, value = torch.randn(2, 2, 4, length, 128, generator=generator).to(dtype)
    mask = None
    if starts is not None:
        mask = torch.arange(length) >= torch.tensor(starts)[:, None, None, None]
    projection = _projection(name, key_maps, value_maps, generator).to(plan.device, dtype)
    latents, _ = LatentLayer(projection).update(key.to(plan.device), value.to(plan.device))
    on_device = None if mask is None else mask.to(plan.device)
    decode = gpu_codes.decode if name in CODED else gpu.decode
    with patch.object(latent, "_decoder", lambda *_: decode):
        out = attend(latents, query.to(plan.device), on_device, scaling=SCALING).cpu().double()
    if name in CODED:
        kept = _rebuilt(latents)
    else:
        kept = [
            _truncated(x.double(), maps.encode_XDD.double(), own)
            for x, maps, own in zip((key, value), (key_maps, value_maps), MIXES[name], strict=True)
        ]
    key_BHTD, value_BHTD = (x.repeat_interleave(3, dim=1) for x in kept)
    reference = F.scaled_dot_product_attention(
        query.double(), key_BHTD, value_BHTD, attn_mask=mask, scale=SCALING
    )
    return float((out - reference).norm() / reference.norm().clamp_min(1e-9))


def _projection(name: str, key: Maps, value: Maps, generator: torch.Generator) -> LayerProjection:
    """Of one mix of ranks, or of codes with steps fitted to other random states."""
    if name in MIXES:
        return LayerProjection(key, value, *MIXES[name])
    bands = CODED[name]
    states = torch.randn(2, 4, 500, 128, generator=generator)
    key_coding, value_coding = (
        SideCoding(own, fit(x_GND)) for own, x_GND in zip(bands, states, strict=True)
    )
    key_ranks, value_ranks = (tuple(map(sum, own)) for own in bands)
    return LayerProjection(key, value, key_ranks, value_ranks, coding=(key_coding, value_coding))


def _rebuilt(latents: Latents) -> list[Tensor]:
    """Keys and values that rows of codes stand for, unpacked by torch.  [BGTD]"""
    projection = latents.projection
    rows = [part if part.dtype == torch.uint8 else part.float() for part in latents.rows]
    keys, values = [], []
    for bucket, rows_BNTC in zip(projection.buckets, projection.latents(rows), strict=True):
        width, z_BNTC = bucket.width, rows_BNTC.double()
        enter_NDM = projection.query[bucket.heads, :, :width].double()
        leave_NMD = projection.output[bucket.heads, projection.width - width :].double()
        keys.append(z_BNTC[..., :width] @ enter_NDM.mT)
        values.append(z_BNTC[..., bucket.row_width - width :] @ leave_NMD)
    return [projection.unsort(torch.cat(side, dim=1)).cpu() for side in (keys, values)]


def _truncated(x_BGTD: Tensor, basis_GDD: Tensor, ranks: LayerRanks) -> Tensor:
    """What keys or values are after a way through their ranks."""
    gate_GD = torch.arange(basis_GDD.shape[-1]) < torch.tensor(ranks)[:, None]
    return (x_BGTD @ basis_GDD * gate_GD[:, None]) @ basis_GDD.mT


# ---- fast


@torch.inference_mode()
def decode_attention(plan: Plan) -> Iterator[Row]:
    """One layer at decode: latents at each budget in turns with full-width kernels."""
    copy_rate = next(ceilings(plan))["bytes_per_second"]
    for model, (heads, kv_heads, dim) in SHAPES.items():
        for context in plan.contexts:
            for batch in plan.batches:
                full_bytes = 4 * batch * kv_heads * context * dim
                if 3 * full_bytes > _memory(plan):
                    continue
                row = {"shape": model, "context": context, "batch": batch}
                yield from _cell(plan, heads, kv_heads, dim, row, copy_rate)


def _cell(
    plan: Plan, heads: int, kv_heads: int, dim: int, row: Row, copy_rate: float
) -> Iterator[Row]:
    generator = torch.Generator().manual_seed(0)
    shape = row["batch"], kv_heads, row["context"]
    query = _random(plan, row["batch"], heads, 1, dim)
    candidates = _full_width(query, _random(plan, *shape, dim), _random(plan, *shape, dim))
    kept: dict[str, int] = {}
    for budget, as_codes in product(plan.budgets, (False, True)):
        if as_codes and budget not in AS_CODES:
            continue
        make = _coded_latents if as_codes else _ragged_latents
        latents = make(plan, kv_heads, dim, row, budget, generator)
        name = f"{budget:.2%}{' codes' if as_codes else ''}"
        kept[name] = sum(x.numel() * x.element_size() for x in latents.rows)
        candidates[name] = partial(attend, latents, query, None, scaling=dim**-0.5)
    times = take_turns(candidates, plan.rounds, device=plan.device)
    full = min(Spread.of(taken).median for name, taken in times.items() if name not in kept)
    for name, taken in times.items():
        ms = Spread.of(taken).median
        nbytes = kept.get(name, 4 * row["batch"] * kv_heads * row["context"] * dim)
        rate = nbytes / ms * 1e3
        yield {**row, "kernel": name, "ms": ms, "speedup": full / ms, "of_copy": rate / copy_rate}


def _ragged_latents(
    plan: Plan, kv_heads: int, dim: int, row: Row, budget: float, generator: torch.Generator
) -> Latents:
    """Random rows of ragged ranks."""
    key_ranks, value_ranks = (ragged_ranks(kv_heads, dim, budget, generator) for _ in range(2))
    key_maps, value_maps = (_orthogonal(kv_heads, dim, generator) for _ in range(2))
    projection = LayerProjection(key_maps, value_maps, key_ranks, value_ranks)
    projection = projection.to(plan.device, torch.bfloat16)
    rows = [
        _random(plan, row["batch"], b.heads.stop - b.heads.start, row["context"], b.row_width)
        for b in projection.buckets
    ]
    return Latents(projection, rows)


def _coded_latents(
    plan: Plan, kv_heads: int, dim: int, row: Row, budget: float, generator: torch.Generator
) -> Latents:
    """Codes of a few random tokens, over and over, the same bands for every head."""
    key_maps, value_maps = (_orthogonal(kv_heads, dim, generator) for _ in range(2))
    bands = _bands(budget, dim)
    coding = [
        SideCoding((bands,) * kv_heads, fit(torch.randn(kv_heads, 200, dim, generator=generator)))
        for _ in range(2)
    ]
    ranks = (sum(bands),) * kv_heads
    pair = coding[0], coding[1]
    projection = LayerProjection(key_maps, value_maps, ranks, ranks, coding=pair)
    projection = projection.to(plan.device, torch.bfloat16)
    few = min(TILED, row["context"])
    states = [_random(plan, 1, kv_heads, few, dim) for _ in range(2)]
    latents, _ = LatentLayer(projection).update(*states)
    times = -(-row["context"] // few)
    rows = [
        x_BNTC.repeat(row["batch"], 1, times, 1)[:, :, : row["context"]].contiguous()
        for x_BNTC in latents.rows
    ]
    return Latents(projection, rows)


def _bands(budget: float, dim: int) -> Bands:
    wide, eight, four, two = (int(share * dim) for share in AS_CODES[budget])
    return wide, eight, four, two


def _full_width(query: Tensor, key: Tensor, value: Tensor) -> dict[str, Callable[[], object]]:
    """sdpa by the backends that decode at full width on a GPU."""
    wide = partial(
        F.scaled_dot_product_attention,
        query,
        key,
        value,
        enable_gqa=query.shape[1] != key.shape[1],
    )
    if query.device.type != "cuda":
        return {"sdpa": wide}

    def by(backend: SDPBackend) -> object:
        with sdpa_kernel(backend):
            return wide()

    found: dict[str, Callable[[], object]] = {}
    kinds = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}
    for name, backend in kinds.items():
        try:
            by(backend)
        except RuntimeError:  # this shape is not the backend's
            continue
        found[name] = partial(by, backend)
    return found or {"sdpa": wide}


# ---- a whole model


@torch.inference_mode()
def whole_model(plan: Plan) -> Iterator[Row]:
    """Tokens a second of every batch that fits, full and at each budget, and in a CUDA graph."""
    model = random_model(plan.model, torch.bfloat16, device=plan.device)
    ids = torch.randint(plan.model.vocab_size, (2, 64), device=plan.device)
    artifact = _with_quantizers(model, matkv.calibrate(model, [ids]), ids)
    coded = [budget for budget in plan.budgets if budget in AS_CODES]
    ways = [(None, False), *((one, True) for one in coded), *((one, False) for one in plan.budgets)]
    for budget, as_codes in ways:
        if budget is not None:
            table = _coded_table(artifact, budget) if as_codes else artifact.table(budget)
            matkv.attach(model, artifact, ranks=table)
        name = "full" if budget is None else f"{budget:.2%}{' codes' if as_codes else ''}"
        for batch in plan.model_batches:
            room = plan.model_context + plan.rounds + 4
            latent_cache = partial(LatentCache, model, max_cache_len=room)
            cache = DynamicCache() if budget is None else latent_cache()
            try:
                row = _step(plan, model, cache, batch)
            except torch.OutOfMemoryError:
                break
            yield {"cache": name, "batch": batch, **row}
        yield {"cache": name, "batch": 1, "graph": True, **_graph(plan, model, budget)}
        matkv.detach(model)


def _with_quantizers(
    model: PreTrainedModel, artifact: matkv.Artifact, ids_BT: Tensor
) -> matkv.Artifact:
    """The artifact with steps for codes of all its columns."""
    maps = {
        layer: {side: its.maps for side, its in sides.items()}
        for layer, sides in artifact.bases.items()
    }
    found = fit_quantizers(model, maps, [{"input_ids": ids_T} for ids_T in ids_BT])
    bases = {
        layer: {side: replace(its, quantizer=found[layer, side]) for side, its in sides.items()}
        for layer, sides in artifact.bases.items()
    }
    return replace(artifact, bases=bases)


def _coded_table(artifact: matkv.Artifact, budget: float) -> RankTable:
    """The same bands for all heads of all layers."""
    bands = {
        (layer, side, head): _bands(budget, artifact.geometry.layers[layer].head_dim)
        for layer in artifact.geometry.compressed
        for side in SIDES
        for head in range(artifact.geometry.layers[layer].kv_heads)
    }
    return RankTable.banded(artifact.geometry, bands)


def _step(plan: Plan, model: PreTrainedModel, cache: Any, batch: int) -> Row:
    """A decoding step behind `model_context` random tokens."""
    config = plan.model
    width = config.hidden_size // config.num_attention_heads
    heads = config.num_key_value_heads or config.num_attention_heads
    shape = batch, heads, plan.model_context, width
    for layer in range(config.num_hidden_layers):
        cache.update(_random(plan, *shape), _random(plan, *shape), layer)
    nbytes = storage_nbytes(cache)
    ids = torch.ones(batch, 1, dtype=torch.long, device=plan.device)
    given = cache_argument(model, cache)
    seconds = _median(plan, lambda: model(input_ids=ids, **given, use_cache=True))
    return {"step_ms": 1e3 * seconds, "tokens_per_second": batch / seconds, "cache_bytes": nbytes}


def _graph(plan: Plan, model: PreTrainedModel, budget: float | None) -> Row:
    """A step with a static cache, compiled into a CUDA graph; on a CPU traced only."""
    room = plan.model_context
    static = partial(StaticCache, plan.model, max_cache_len=room)
    cache: Any = static() if budget is None else StaticLatentCache(model, room)
    kind: Row = {"mode": "reduce-overhead"} if plan.device == "cuda" else {"backend": "eager"}
    compiled: Any = torch.compile(model.forward, fullgraph=plan.device == "cuda", **kind)
    ids = torch.ones(1, 1, dtype=torch.long, device=plan.device)
    given = cache_argument(model, cache)
    seconds = _median(plan, lambda: compiled(input_ids=ids, **given))
    torch.compiler.reset()
    return {"step_ms": 1e3 * seconds, "tokens_per_second": 1 / seconds}


# ---- training


def training(plan: Plan) -> Iterator[Row]:
    """Steps of the whole model's bases, plain and sharded."""
    yield from sharded_training(
        Training(
            device=plan.device,
            dtype=torch.bfloat16,
            model=plan.model,
            batch=plan.training_batch,
            length=plan.training_length,
            steps=3,
        )
    )


# ---- how


def _median(plan: Plan, work: Callable[[], object]) -> float:
    """Seconds of one call, the median of some."""
    times = take_turns({"it": work}, plan.rounds, warm_up=3, device=plan.device)["it"]
    return Spread.of(times).median / 1e3


def _random(plan: Plan, *shape: int) -> Tensor:
    return torch.randn(shape, device=plan.device, dtype=torch.float32).to(torch.bfloat16)


def _orthogonal(heads: int, dim: int, generator: torch.Generator) -> Maps:
    return Maps.orthogonal(torch.linalg.qr(torch.randn(heads, dim, dim, generator=generator)).Q)


def _memory(plan: Plan) -> int:
    if plan.device != "cuda":
        return 1 << 30
    free, _ = torch.cuda.mem_get_info()
    return free


PARTS: dict[str, Callable[[Plan], Iterator[Row]]] = {
    "ceilings": ceilings,
    "exactness": exactness,
    "decode attention": decode_attention,
    "whole model": whole_model,
    "training": training,
}


def measure(plan: Plan, seconds: float) -> dict[str, Any]:
    """All parts, until the time is up; what was left out says so."""
    started = time.perf_counter()
    found: dict[str, Any] = {"made": _made(plan)}
    for name, part in PARTS.items():
        rows: list[Row] = []
        found[name] = rows
        try:
            for row in part(plan):
                rows.append(row)
                print(name, json.dumps(row), flush=True)
                if time.perf_counter() - started > seconds:
                    rows.append({"left_out": "the rest: the time was up"})
                    break
        except Exception as error:  # one part must not take the others with it
            rows.append({"failed": f"{type(error).__name__}: {error}"[:500]})
            print(name, rows[-1], flush=True)
    return found


def _made(plan: Plan) -> Row:
    device = torch.cuda.get_device_name() if plan.device == "cuda" else platform.processor()
    versions = {m.__name__: m.__version__ for m in (torch, triton, transformers, matkv)}
    return {"device": device, "date": time.strftime("%Y-%m-%d"), **versions}


def summary(found: dict[str, Any]) -> str:
    """What one looks for first, in a few lines."""
    wrong = [row for row in found["exactness"] if not row.get("passes", False)]
    fast = [row for row in found["decode attention"] if "%" in row.get("kernel", "")]
    failed = [
        f"{name}: {row['failed']}" for name in PARTS for row in found[name] if "failed" in row
    ]
    lines = [*failed, f"exactness: {len(found['exactness'])} cases, {len(wrong)} not within bounds"]
    for row in fast:
        lines.append(
            f"{row['shape']:>12} {row['context']:>7,} × {row['batch']:<3} {row['kernel']:>7}: "
            f"{row['ms']:8.3f} ms, {row['speedup']:5.2f} × full, {row['of_copy']:.0%} of a copy"
        )
    for row in found["whole model"]:
        if "step_ms" in row:
            how = "graph" if row.get("graph") else f"batch {row['batch']}"
            lines.append(f"{row['cache']:>12} {how}: {row['tokens_per_second']:,.0f} tokens/s")
    for row in found["training"]:
        if "step_ms" in row:
            right = {True: ", the same losses", False: ", OTHER LOSSES"}.get(row.get("passes"), "")
            lines.append(f"training, {row['way']}: {row['step_ms']:.0f} ms a step{right}")
    return "\n".join(lines)


def main() -> None:
    """Measure, print a summary, write everything."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("-o", "--out", type=Path, default=Path("gpu.json"))
    parser.add_argument("--minutes", type=float, default=9.0)
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes on the CPU")
    options = parser.parse_args()
    if not options.dry_run and not torch.cuda.is_available():
        parser.error("there is no CUDA device: --dry-run tries everything out on the CPU")
    if options.dry_run:
        with patch.object(gpu, "_multiprocessors", lambda device: 4):
            found = measure(dry_plan(), 60 * options.minutes)
    else:
        found = measure(full_plan(), 60 * options.minutes)
    with replacing(options.out) as new:
        new.write_text(json.dumps(found, indent=1), encoding="utf-8")
    print(summary(found))


if __name__ == "__main__":
    main()
