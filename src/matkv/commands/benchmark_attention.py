"""matkv benchmark-attention: one layer's attention, timed."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated

import torch
import typer

from matkv.benchmark.attention import AttentionCase, attention_benchmark
from matkv.commands import console
from matkv.commands.from_fields import from_fields
from matkv.commands.options import JsonOpt
from matkv.commands.tables import facts
from matkv.models.dtype import as_device, choose


@from_fields(rounds="steps")
def benchmark_attention_command(
    case: AttentionCase,
    dtype: Annotated[
        str, typer.Option(help="float32, bfloat16, float16 or auto: bfloat16 where that is fast")
    ] = "auto",
    as_json: JsonOpt = False,
) -> None:
    """Time one layer's attention at decode, full width against latents."""
    chosen = choose(dtype, torch.bfloat16, as_device(case.device))
    result = attention_benchmark(replace(case, dtype=chosen))
    if as_json:
        console.print_json(result)
    else:
        console.out.print(facts("attention of one layer, one new token", result))
