"""Benchmark of a whole model: full caches and every budget in one run, taking turns.

Caches are filled with random states through `cache.update`, not by reading a prompt: decoding takes
the same time, and any context can be measured. Time to first token does read a prompt.

Shapes: B batch, G KV head, T token, D head dim.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from pydantic import Field
from transformers import (
    AutoModelForCausalLM,
    DynamicCache,
    PreTrainedConfig,
    PreTrainedModel,
    StaticCache,
)

from matkv.artifact.artifact import Artifact
from matkv.artifact.results import Kind
from matkv.artifact.setting import CACHE_KEYS, Setting
from matkv.benchmark.timing import Spread, take_turns, thread_count, transient_bytes
from matkv.cache.cache import LatentCache, storage_nbytes
from matkv.cache.naming import cache_argument
from matkv.errors import MatkvError
from matkv.hf.attach import attach, detach
from matkv.hf.geometry import geometry_of
from matkv.hf.memory import check_fits
from matkv.progress import OnProgress, Report
from matkv.ranks import Budget, RankTable
from matkv.settings import Count, Few, Many, Number, Seed, settings

BENCHMARK = Kind("benchmark", (*CACHE_KEYS, "name", "context", "batch", "threads"))
DYNAMIC, STATIC, EMPTY = "DynamicCache", "StaticCache", "empty"
WARM_UP = 3


@settings(MatkvError)
class BenchmarkConfig:
    """What to measure: every combination of `contexts`, `batches`, and full caches and `budgets`.

    Budgets are set `way`. Time to first token is measured in short contexts alone, since on a CPU
    reading takes long.

    Raises:
        BudgetError: a budget is outside (0, 1].
        MatkvError: a number is not positive, or nothing is to be measured.
    """

    contexts: Many[Count] = Field(default=(512, 2048, 8192), description="cached tokens")
    batches: Many[Few] = Field(default=(1,), description="sequences")
    budgets: Many[Budget] = Field(
        default=(1.0, 0.5, 0.375, 0.25), description="fractions of cache bytes to keep"
    )
    way: Setting = Field(default_factory=Setting)
    steps: Few = Field(default=16, description="rounds of each measurement")
    first_token_rounds: Number = Field(default=3, description="rounds of times to first token")
    first_token_context: Number = Field(
        default=2048, description="longest context in which the first token is timed"
    )
    threads: Few | None = Field(default=None, description="CPU threads; torch's unless given")
    seed: Seed = Field(default=0, description="seed of states")

    def __post_init__(self) -> None:
        if not self.contexts or not self.batches:
            raise MatkvError("nothing is to be measured: give at least one of contexts and batches")


@dataclass(frozen=True)
class BenchmarkRow:
    """One cache in one situation.

    `name` is DynamicCache, StaticCache (both with sdpa at full width) or the budget. Steps are
    medians over turns with quartiles; `speedup` is DynamicCache's step over this one, `over_static`
    StaticCache's. `share` is the part of a step that grows with the cache, by comparison with an
    empty one: attention, and what the cache does to itself; `limit` the speedup over DynamicCache
    if that part fell to `held`: of the full cache's bytes at that context, exact tokens and layers
    with a sliding window counted. `peak_bytes` are weights, cache and what a step takes on top,
    None where the system cannot tell; `first_token_ms` None where it was not measured.
    """

    name: str
    budget: float | None
    kept: float
    held: float
    context: int
    batch: int
    step_ms: float
    step_ms_low: float
    step_ms_high: float
    tokens_per_second: float
    speedup: float
    speedup_low: float
    speedup_high: float
    over_static: float
    share: float
    limit: float
    first_token_ms: float | None
    cache_bytes: int
    weight_bytes: int
    peak_bytes: int | None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class _Candidate:
    """A model with a way to make its caches, which keep `exact` first and last tokens."""

    name: str
    budget: float | None
    table: RankTable
    exact: tuple[int, int]
    model: PreTrainedModel
    new_cache: Callable[[int], Any]

    def held(self, context: int) -> float:
        """The share of the full cache's bytes that are held."""
        sink, recent = self.exact
        return self.table.held(context, sink=sink, recent=recent)


@torch.inference_mode()
def benchmark(
    model: PreTrainedModel,
    artifact: Artifact,
    config: BenchmarkConfig,
    *,
    on_progress: OnProgress | None = None,
) -> list[BenchmarkRow]:
    """Measure full caches and every budget; the model is left detached.

    Raises:
        BudgetError, FingerprintError: see `attach`.
    """
    detach(model)
    candidates = list(_candidates(model, artifact, config))
    situations = [(context, batch) for context in config.contexts for batch in config.batches]
    report = Report(on_progress, "benchmark", len(situations), "situations")
    rows: list[BenchmarkRow] = []
    with thread_count(config.threads):
        for done, (context, batch) in enumerate(situations, start=1):
            rows += _situation(candidates, config, context, batch)
            report(done, f"context {context:,} · batch {batch}")
    return rows


def random_model(
    config: PreTrainedConfig,
    dtype: torch.dtype = torch.bfloat16,
    *,
    device: str | torch.device = "cpu",
    seed: int = 0,
) -> PreTrainedModel:
    """A model of a config with random weights: as fast as one with real ones."""
    devices = [device] if torch.device(device).type == "cuda" else []
    with torch.random.fork_rng(devices=devices), torch.device(device):
        torch.manual_seed(seed)
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.config._name_or_path = "random weights"
    model.eval()
    return model


def twin(model: PreTrainedModel, *, share_weights: bool = True) -> PreTrainedModel:
    """A copy of a model that can be attached on its own; by default the weights are shared."""
    memo = {id(p): p for p in model.parameters()} if share_weights else {}
    return copy.deepcopy(model, memo)


# ---- candidates


def _candidates(
    model: PreTrainedModel, artifact: Artifact, config: BenchmarkConfig
) -> Iterator[_Candidate]:
    text = model.config.get_text_config(decoder=True)
    full = RankTable.full(artifact.geometry), (0, 0), model
    yield _Candidate(DYNAMIC, None, *full, lambda room: DynamicCache(config=text))
    yield _Candidate(STATIC, None, *full, lambda room: StaticCache(config=text, max_cache_len=room))
    for budget in config.budgets:
        table = artifact.table(budget, uniform=config.way.uniform)
        # Adapters are added to the weights in place, so these have to be the copy's own.
        copied = twin(model, share_weights=artifact.lora is None)
        attach(copied, artifact, ranks=table, sink=config.way.sink, recent=config.way.recent)
        parts = table, config.way.exact(artifact), copied, _latent_cache(copied)
        yield _Candidate(f"{budget:.1%}", budget, *parts)


def _latent_cache(model: PreTrainedModel) -> Callable[[int], LatentCache]:
    return lambda room: LatentCache(model, max_cache_len=room)


# ---- one situation


def _situation(
    candidates: Sequence[_Candidate], config: BenchmarkConfig, context: int, batch: int
) -> list[BenchmarkRow]:
    plain = candidates[0].model
    room = context + config.steps + WARM_UP + 2
    nbytes = RankTable.full(geometry_of(plain.config)).nbytes(room, plain.dtype, batch=batch)
    held = round(nbytes * sum(candidate.held(room) for candidate in candidates))
    check_fits(held, plain.device, f"context {context:,} times batch {batch:,}")
    caches = {c.name: c.new_cache(room) for c in candidates}
    generator = torch.Generator().manual_seed(config.seed)
    _fill(list(caches.values()), plain, batch, context, generator)
    ids_B1 = torch.zeros(batch, 1, dtype=torch.long, device=plain.device)
    steps: dict[str, Callable[[], object]] = {
        c.name: partial(c.model, ids_B1, **cache_argument(c.model, caches[c.name]), use_cache=True)
        for c in candidates
    }
    steps[EMPTY] = lambda: plain(
        ids_B1, **cache_argument(plain, candidates[0].new_cache(1)), use_cache=True
    )
    times = take_turns(steps, config.steps, warm_up=WARM_UP, device=plain.device)
    first_tokens = _first_tokens(candidates, config, context, batch)
    weights = sum(parameter.nbytes for parameter in plain.parameters())
    rows = []
    for candidate in candidates:
        held = storage_nbytes(caches[candidate.name])
        transient = transient_bytes(steps[candidate.name], plain.device)
        peak = None if transient is None else weights + held + transient
        rows.append(_row(candidate, times, first_tokens, context, batch, (held, weights, peak)))
    return rows


def _fill(
    caches: Sequence[Any],
    model: PreTrainedModel,
    batch: int,
    tokens: int,
    generator: torch.Generator,
) -> None:
    """The same random keys and values for all caches, a layer at a time."""
    for index, shape in enumerate(geometry_of(model.config).layers):
        size_BGTD = (batch, shape.kv_heads, tokens, shape.head_dim)
        key_BGTD, value_BGTD = (
            torch.randn(size_BGTD, generator=generator).to(model.device, model.dtype)
            for _ in range(2)
        )
        for cache in caches:
            cache.update(key_BGTD, value_BGTD, index)


def _first_tokens(
    candidates: Sequence[_Candidate], config: BenchmarkConfig, context: int, batch: int
) -> dict[str, list[float]]:
    """Times from a prompt of random tokens to the logits after it; empty where too long."""
    if not config.first_token_rounds or context > config.first_token_context:
        return {}
    model = candidates[0].model
    generator = torch.Generator().manual_seed(config.seed)
    vocabulary = model.config.get_text_config(decoder=True).vocab_size
    ids_BT = torch.randint(vocabulary, (batch, context), generator=generator).to(model.device)

    def read(candidate: _Candidate) -> None:
        cache = candidate.new_cache(context)
        given = cache_argument(candidate.model, cache)
        candidate.model(ids_BT, **given, use_cache=True, logits_to_keep=1)

    reads = {candidate.name: partial(read, candidate) for candidate in candidates}
    return take_turns(reads, config.first_token_rounds, warm_up=1, device=model.device)


def _row(
    candidate: _Candidate,
    times: dict[str, list[float]],
    first_tokens: dict[str, list[float]],
    context: int,
    batch: int,
    sizes: tuple[int, int, int | None],
) -> BenchmarkRow:
    own = times[candidate.name]
    step = Spread.of(own)
    first = first_tokens.get(candidate.name)
    speedup = Spread.of_ratios(times[DYNAMIC], own)
    grows = max(0.0, 1 - Spread.of_ratios(times[EMPTY], times[DYNAMIC]).median)
    return BenchmarkRow(
        name=candidate.name,
        budget=candidate.budget,
        kept=candidate.table.budget,
        held=candidate.held(context),
        context=context,
        batch=batch,
        step_ms=step.median,
        step_ms_low=step.low,
        step_ms_high=step.high,
        tokens_per_second=1e3 * batch / step.median,
        speedup=speedup.median,
        speedup_low=speedup.low,
        speedup_high=speedup.high,
        over_static=Spread.of_ratios(times[STATIC], own).median,
        share=max(0.0, 1 - Spread.of_ratios(times[EMPTY], own).median),
        limit=1 / (1 - grows * (1 - candidate.held(context))),
        first_token_ms=Spread.of(first).median if first else None,
        cache_bytes=sizes[0],
        weight_bytes=sizes[1],
        peak_bytes=sizes[2],
    )
