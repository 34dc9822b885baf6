"""matkv generate: answer a prompt with a compressed cache."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer
from transformers import TextStreamer

from matkv.artifact.setting import Setting
from matkv.cache.cache import LatentCache
from matkv.commands import console
from matkv.commands.from_fields import from_fields
from matkv.commands.memory import attach_setting, cache_use
from matkv.commands.options import BudgetOpt, JsonOpt, Loading, NewTokensOpt, RunArg, Sampling
from matkv.evaluate.samples import chat_ids, generate, text_ids


@from_fields(without=("budget",))
def generate_command(
    run: RunArg,
    prompt: Annotated[str, typer.Argument(help="what to say to the model")],
    way: Setting,
    sampling: Sampling,
    loading: Loading,
    budget: BudgetOpt = 0.5,
    max_new_tokens: NewTokensOpt = 128,
    raw: Annotated[bool, typer.Option("--raw", help="no chat template")] = False,
    as_json: JsonOpt = False,
) -> None:
    """Answer a prompt with a compressed cache."""
    setting = way.at(budget)
    artifact, model, tokenizer = loading.open(run)
    table = attach_setting(model, artifact, setting)
    turns = [{"role": "user", "content": prompt}]
    ids = text_ids(tokenizer, prompt) if raw else chat_ids(tokenizer, turns)
    cache = LatentCache(model)
    streamer = (
        None if as_json else TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    )
    answer = generate(model, tokenizer, ids, cache, streamer, max_new_tokens, **asdict(sampling))
    use = cache_use(model, cache)
    if as_json:
        text = tokenizer.decode(answer, skip_special_tokens=True)
        ran = {"budget": budget, "kept": table.budget}
        console.print_json({"text": text, "tokens": len(answer), **ran, **asdict(use)})
    else:
        console.err.print(str(use), style="dim")
