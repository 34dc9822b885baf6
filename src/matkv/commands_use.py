"""Commands that run a model with a compressed cache, or look at an artifact."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from transformers import TextStreamer

from matkv import console
from matkv.answers import chat_ids, generate
from matkv.artifact import Artifact
from matkv.cache import LatentCache
from matkv.hf import attach
from matkv.options import (
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
from matkv.ranks import check_budget


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
    check_budget(budget)
    artifact, model, tokenizer = open_run(run, model_name, dtype, device, trust_remote_code)
    attach(model, artifact, ranks=artifact.table(budget, uniform=uniform), sink=sink, window=recent)
    chat = [{"role": "user", "content": prompt}]
    ids = tokenizer(prompt).input_ids if raw else chat_ids(tokenizer, chat, prompt)
    cache = LatentCache(model)
    streamer = None if as_json else TextStreamer(tokenizer, skip_prompt=True)
    answer = generate(
        model, tokenizer, ids, cache, streamer, max_new_tokens, temperature=temperature, seed=seed
    )
    if as_json:
        text = tokenizer.decode(answer, skip_special_tokens=True)
        held = {"tokens_held": cache.get_seq_length(), "cache_bytes": cache.used_nbytes}
        console.print_json({"text": text, "tokens": len(answer), "budget": budget, **held})


def chat_command(
    run: RunArg,
    budget: BudgetOpt = 0.5,
    uniform: UniformOpt = False,
    max_new_tokens: NewTokensOpt = 512,
    temperature: TemperatureOpt = 0.0,
    seed: SeedOpt = 0,
    model_name: ModelOpt = None,
    dtype: DtypeOpt = "auto",
    device: DeviceOpt = None,
    trust_remote_code: TrustOpt = False,
) -> None:
    """Talk with the model; the compressed cache is kept from turn to turn. Ends with Ctrl-D."""
    check_budget(budget)
    artifact, model, tokenizer = open_run(run, model_name, dtype, device, trust_remote_code)
    attach(model, artifact, ranks=artifact.table(budget, uniform=uniform))
    cache, held = LatentCache(model), list[int]()
    turns: list[dict[str, str]] = []
    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    while True:
        try:
            said = console.out.input("[bold]you:[/bold] ")
        except EOFError:
            return
        turns.append({"role": "user", "content": said})
        ids = chat_ids(tokenizer, turns, said)
        cache.crop(min(_common_prefix(held, ids), len(ids) - 1) - len(held))
        how: dict[str, Any] = {"temperature": temperature, "seed": seed}
        answer = generate(model, tokenizer, ids, cache, streamer, max_new_tokens, **how)
        held = [*ids, *answer][: cache.get_seq_length()]
        reply = str(tokenizer.decode(answer, skip_special_tokens=True))
        turns.append({"role": "assistant", "content": reply})
        note = f"{cache.used_nbytes:,} bytes of cache for {len(held):,} tokens"
        console.err.print(note, style="dim")


def inspect_command(run: RunArg, as_json: JsonOpt = False) -> None:
    """Show what an artifact holds: its base model, its tables, and each layer's energy."""
    artifact = Artifact.load(run)
    if not as_json:
        console.out.print(f"base model {artifact.base_model}")
        for entry in artifact.history:
            console.out.print(" · ".join(f"{name} {value}" for name, value in entry.items()))
        for budget, table in sorted(artifact.tables.items(), reverse=True):
            keys, values = table.share("key"), table.share("value")
            console.out.print(f"table {budget:.1%}: keys {keys:.1%}, values {values:.1%}")
        console.out.print(console.energy_picture(artifact))
        return
    energy = {
        str(layer): {side: bases.energy_GD.tolist() for side, bases in sides.items()}
        for layer, sides in artifact.bases.items()
    }
    console.print_json(
        {
            "base_model": artifact.base_model,
            "history": artifact.history,
            "budgets": sorted(artifact.tables),
            "energy": energy,
        }
    )


def _common_prefix(a: list[int], b: list[int]) -> int:
    """How many leading tokens two sequences share."""
    pairs = enumerate(zip(a, b, strict=False))
    return next((i for i, (x, y) in pairs if x != y), min(len(a), len(b)))
