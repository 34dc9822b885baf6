"""matkv benchmark: decoding steps, timed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import torch
import typer

from matkv.artifact.artifact import Artifact
from matkv.artifact.results import Results
from matkv.artifact.setting import Setting
from matkv.benchmark.decode import BENCHMARK, BenchmarkConfig, BenchmarkRow, benchmark, random_model
from matkv.calibrate import calibrate
from matkv.commands import console
from matkv.commands.bars import progress_bar
from matkv.commands.from_fields import from_fields
from matkv.commands.options import JsonOpt, Loading, as_runs
from matkv.commands.tables import benchmark_table
from matkv.errors import MatkvError
from matkv.models.dtype import as_device, choose
from matkv.models.load import load_config
from matkv.plan import parse_bytes
from matkv.report.pictures.decoding import save_benchmark


@from_fields(without=("budget", "way"), contexts="context", batches="batch", budgets="budget")
def benchmark_command(
    config: BenchmarkConfig,
    way: Setting,
    loading: Loading,
    run: Annotated[
        Path | None, typer.Argument(metavar="[RUN]", help="artifact directory", callback=as_runs)
    ] = None,
    random_weights: Annotated[
        str | None, typer.Option(help="a config's directory or hub id, in place of RUN")
    ] = None,
    plots: Annotated[Path | None, typer.Option(help="directory for plots")] = None,
    memory: Annotated[str | None, typer.Option(help="memory of the plots, as 80GB")] = None,
    as_json: JsonOpt = False,
) -> None:
    """Time decoding with full caches and with every budget, taking turns in one run."""
    config = replace(config, way=way)
    most = None if memory is None else parse_bytes(memory)
    if random_weights is not None:
        model = random_model(
            load_config(random_weights, trust_remote_code=loading.trust_remote_code),
            choose(loading.dtype, torch.bfloat16, as_device(loading.device)),
            device=loading.device or "cpu",
        )
        artifact = calibrate(model, [torch.arange(64)[None]])
    elif run is not None:
        artifact, model, _ = loading.open(run)
    else:
        raise MatkvError("benchmark needs RUN or --random-weights CONFIG")
    with progress_bar("benchmark") as update:
        rows = benchmark(model, artifact, config, on_progress=update)
    records = [row.to_json() for row in rows]
    if run is not None:
        _keep(run, artifact, model.dtype, config, rows)
    if plots is not None:
        save_benchmark(records, plots, memory=most)
    if as_json:
        console.print_json({"rows": records})
    else:
        settings = [config.way.at(budget) for budget in config.budgets]
        console.out.print(benchmark_table(artifact, settings, records))


def _keep(
    run: Path,
    artifact: Artifact,
    dtype: torch.dtype,
    config: BenchmarkConfig,
    rows: Sequence[BenchmarkRow],
) -> None:
    """Rows beside the artifact, with what they were measured of."""
    caches = {one: config.way.at(one).record(artifact, dtype) for one in (None, *config.budgets)}
    threads = config.threads or torch.get_num_threads()
    kept = [caches[row.budget] | row.to_json() | {"threads": threads} for row in rows]
    Results(run, BENCHMARK).add(kept, seed=config.seed, steps=config.steps)
