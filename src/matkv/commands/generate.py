"""matkv generate: answer a prompt with a compressed cache."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer
from transformers import TextStreamer

from matkv.artifact.setting import Setting
from matkv.cache.cache import LatentCache
from matkv.commands import console
from matkv.commands.memory import attach_setting, cache_use
from matkv.commands.options import (
    BudgetOpt,
    DeviceOpt,
    DtypeOpt,
    JsonOpt,
    ModelOpt,
    NewTokensOpt,
    RecentOpt,
    RunArg,
    SeedOpt,
    SinkOpt,
    TemperatureOpt,
    TrustOpt,
    UniformOpt,
    open_run,
)
from matkv.evaluate.samples import chat_ids, generate


def generate_command(
    run: RunArg,
    prompt: Annotated[str, typer.Argument(help="what to say to the model")],
    budget: BudgetOpt = 0.5,
    uniform: UniformOpt = False,
    max_new_tokens: NewTokensOpt = 128,
    temperature: TemperatureOpt = 0.0,
    seed: SeedOpt = 0,
    raw: Annotated[bool, typer.Option("--raw", help="no chat template")] = False,
    sink: SinkOpt = None,
    recent: RecentOpt = None,
    model_name: ModelOpt = None,
    dtype: DtypeOpt = "auto",
    device: DeviceOpt = None,
    trust_remote_code: TrustOpt = False,
    as_json: JsonOpt = False,
) -> None:
    """Answer a prompt with a compressed cache."""
    setting = Setting(budget=budget, uniform=uniform, sink=sink, recent=recent)
    artifact, model, tokenizer = open_run(run, model_name, dtype, device, trust_remote_code)
    table = attach_setting(model, artifact, setting)
    turns = [{"role": "user", "content": prompt}]
    ids = tokenizer(prompt).input_ids if raw else chat_ids(tokenizer, turns)
    cache = LatentCache(model)
    streamer = (
        None if as_json else TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    )
    answer = generate(
        model, tokenizer, ids, cache, streamer, max_new_tokens, temperature=temperature, seed=seed
    )
    use = cache_use(model, cache)
    if as_json:
        text = tokenizer.decode(answer, skip_special_tokens=True)
        ran = {"budget": budget, "kept": table.budget}
        console.print_json({"text": text, "tokens": len(answer), **ran, **asdict(use)})
    else:
        console.err.print(str(use), style="dim")
