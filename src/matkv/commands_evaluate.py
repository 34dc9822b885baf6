"""The command that evaluates an artifact."""

from __future__ import annotations

from typing import Annotated

import typer

from matkv import console, data
from matkv.evaluate import evaluate
from matkv.options import (
    DeviceOpt,
    DtypeOpt,
    JsonOpt,
    ModelOpt,
    RecentOpt,
    RunArg,
    SinkOpt,
    TextOpt,
    TrustOpt,
    UniformOpt,
    open_run,
)
from matkv.ranks import check_budget


def evaluate_command(
    run: RunArg,
    budget: Annotated[list[float], typer.Option(help="may be given several times")],
    text: TextOpt = "default",
    window: Annotated[int, typer.Option(help="tokens of one sequence", min=2)] = 1024,
    tokens: Annotated[int | None, typer.Option(help="tokens to score; all unless given")] = None,
    uniform: UniformOpt = False,
    sink: SinkOpt = None,
    recent: RecentOpt = None,
    model_name: ModelOpt = None,
    dtype: DtypeOpt = "auto",
    device: DeviceOpt = None,
    trust_remote_code: TrustOpt = False,
    as_json: JsonOpt = False,
) -> None:
    """Perplexity and bytes per token of the full cache and of each budget, side by side."""
    for one in budget:
        check_budget(one)
    texts = data.read_texts(text, "validation")
    artifact, model, tokenizer = open_run(run, model_name, dtype, device, trust_remote_code)
    windows = data.text_windows(tokenizer, texts, window, tokens)
    passes = [None, *budget]
    with console.token_progress("evaluating", windows.numel() * len(passes)) as update:
        rows = evaluate(
            model,
            artifact,
            windows,
            budget,
            uniform=uniform,
            sink=sink,
            window=recent,
            on_progress=lambda at, done: update(passes.index(at) * windows.numel() + done),
        )
    if as_json:
        console.print_json({"rows": [row.to_json() for row in rows]})
        return
    console.out.print(console.evaluation_table(f"{run} on {text}, windows of {window}", rows))
    fixed = sum(not shape.grows for shape in artifact.geometry.layers)
    if fixed:
        console.out.print(f"{fixed} layers have sliding windows: uncompressed, not in bytes/token")
