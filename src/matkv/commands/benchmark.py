"""matkv benchmark: decoding steps, timed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import torch
import typer

from matkv.artifact.artifact import Artifact
from matkv.artifact.results import Results
from matkv.benchmark.attention import AttentionCase, attention_benchmark
from matkv.benchmark.decode import BENCHMARK, BenchmarkConfig, BenchmarkRow, benchmark, random_model
from matkv.calibrate import calibrate
from matkv.commands import console
from matkv.commands.bars import token_progress
from matkv.commands.options import (
    DeviceOpt,
    DtypeOpt,
    JsonOpt,
    ModelOpt,
    RecentOpt,
    SinkOpt,
    TrustOpt,
    UniformOpt,
    open_run,
)
from matkv.commands.tables import benchmark_table, facts
from matkv.errors import MatkvError
from matkv.models.dtype import as_device, choose
from matkv.models.load import load_config
from matkv.plan import parse_bytes
from matkv.report.pictures.decoding import save_benchmark


def benchmark_command(
    run: Annotated[
        Path | None, typer.Argument(metavar="[RUN]", help="artifact; none with --attention")
    ] = None,
    attention: Annotated[
        bool, typer.Option("--attention", help="one layer's attention alone, without a model")
    ] = False,
    random_weights: Annotated[
        str | None, typer.Option(help="a config's directory or hub id, in place of RUN")
    ] = None,
    context: Annotated[list[int] | None, typer.Option(help="cached tokens, repeatable")] = None,
    batch: Annotated[list[int] | None, typer.Option(help="sequences, repeatable")] = None,
    budget: Annotated[list[float] | None, typer.Option(help="repeatable")] = None,
    steps: Annotated[int, typer.Option(help="rounds of each measurement", min=1)] = 16,
    seed: Annotated[int, typer.Option(help="of states, and of ranks with --attention")] = 0,
    heads: Annotated[int, typer.Option(help="query heads, with --attention", min=1)] = 32,
    kv_heads: Annotated[int, typer.Option(help="KV heads, with --attention", min=1)] = 32,
    head_dim: Annotated[int, typer.Option(help="with --attention", min=1)] = 128,
    threads: Annotated[int | None, typer.Option(help="CPU threads", min=1)] = None,
    uniform: UniformOpt = False,
    sink: SinkOpt = None,
    recent: RecentOpt = None,
    plots: Annotated[Path | None, typer.Option(help="directory for plots")] = None,
    memory: Annotated[str | None, typer.Option(help="memory of the plots, as 80GB")] = None,
    model_name: ModelOpt = None,
    dtype: DtypeOpt = "auto",
    device: DeviceOpt = None,
    trust_remote_code: TrustOpt = False,
    as_json: JsonOpt = False,
) -> None:
    """Time decoding with full caches and with every budget, taking turns in one run."""
    contexts, batches, budgets = context or [], batch or [], budget or []
    if attention:
        case = AttentionCase(
            heads=heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            context=contexts[0] if contexts else 16_384,
            batch=batches[0] if batches else 1,
            budget=budgets[0] if budgets else 0.375,
            dtype=choose(dtype, torch.bfloat16, as_device(device)),
            device=device or "cpu",
            threads=threads,
            rounds=steps,
            seed=seed,
        )
        result = attention_benchmark(case)
        if as_json:
            console.print_json(result)
        else:
            console.out.print(facts("attention of one layer, one new token", result))
        return
    given = {"contexts": tuple(contexts), "batches": tuple(batches), "budgets": tuple(budgets)}
    config = BenchmarkConfig(
        **{name: value for name, value in given.items() if value},  # type: ignore[arg-type]
        steps=steps,
        uniform=uniform,
        sink=sink,
        recent=recent,
        threads=threads,
        seed=seed,
    )
    if random_weights is not None:
        model = random_model(
            load_config(random_weights, trust_remote_code=trust_remote_code),
            choose(dtype, torch.bfloat16, as_device(device)),
            device=device or "cpu",
        )
        artifact = calibrate(model, [torch.arange(64)[None]])
    elif run is not None:
        artifact, model, _ = open_run(run, model_name, dtype, device, trust_remote_code)
    else:
        raise MatkvError("benchmark needs RUN, --random-weights CONFIG or --attention")
    with token_progress("benchmark", len(config.contexts) * len(config.batches)) as update:
        rows = benchmark(model, artifact, config, on_progress=lambda done, _: update(done))
    records = [row.to_json() for row in rows]
    if run is not None:
        _keep(run, artifact, model.dtype, config, rows)
    if plots is not None:
        save_benchmark(records, plots, memory=None if memory is None else parse_bytes(memory))
    if as_json:
        console.print_json({"rows": records})
    else:
        console.out.print(benchmark_table(records))


def _keep(
    run: Path,
    artifact: Artifact,
    dtype: torch.dtype,
    config: BenchmarkConfig,
    rows: Sequence[BenchmarkRow],
) -> None:
    """Rows beside the artifact, with what they were measured of."""
    caches = {one: config.at(one).record(artifact, dtype) for one in (None, *config.budgets)}
    threads = config.threads or torch.get_num_threads()
    kept = [caches[row.budget] | row.to_json() | {"threads": threads} for row in rows]
    Results(run, BENCHMARK).add(kept, seed=config.seed, steps=config.steps)
